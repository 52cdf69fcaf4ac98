"""CUDA graphs: the hundreds of kernel launches of a function, captured once and replayed as one launch."""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Runs before a capture. CUDA graphs need them, because libraries choose algorithms and allocate workspaces then."""


def warm_up(run: Callable[[], object], device: torch.device) -> None:
    """Run a function WARM_UP times on a side stream, as a capture needs."""
    side, main = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    main.wait_stream(side)


def captured(
    run: Callable[[], tuple[Tensor, ...] | None], device: torch.device
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    """The graph of a function that was warmed up, and the tensors that it returns, which every replay overwrites."""
    graph = torch.cuda.CUDAGraph()
    # By default PyTorch records what happens on the *current* GPU. Work on another one would be done now, and the graph would be empty.
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
        outputs = run()
    return graph, outputs or ()


class Replayed:
    """A function of tensors, captured once per shape of its inputs and then replayed. On devices other than cuda it is just called.

    Args:
        function: returns a tuple of tensors. It must not read numbers on the host that change between calls.

    Attributes:
        captured: how many shapes were captured.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        self._function = function
        self._graphs: dict[
            tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], tuple[Tensor, ...]]
        ] = {}

    @property
    def captured(self) -> int:
        return len(self._graphs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if inputs[0].device.type != "cuda":
            return self._function(*inputs)
        shapes = tuple(each.shape for each in inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture(inputs)
        graph, places, outputs = self._graphs[shapes]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return tuple(each.clone() for each in outputs)  # the next replay overwrites `outputs`

    def _capture(
        self, inputs: tuple[Tensor, ...]
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], tuple[Tensor, ...]]:
        places = tuple(each.clone() for each in inputs)
        warm_up(lambda: self._function(*places), places[0].device)
        graph, outputs = captured(lambda: self._function(*places), places[0].device)
        return graph, places, outputs
