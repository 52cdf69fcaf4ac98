"""The device of a run, chosen once, by name: cpu, cuda, cuda:<i>, mps or xla.

torch_xla is imported only when xla is asked for.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from icl.native.quota import usable_cores

_NAMES = "cpu, cuda, cuda:<index>, mps or xla"
# Where nothing can be measured: small enough for every accelerator in use.
_UNKNOWN_MEMORY = 4 * 2**30


def resolve_device(name: str | None = None) -> torch.device:
    """The device of that name; without a name, cuda if there is a GPU, else cpu.

    cuda is the current GPU for one run, and all GPUs for a sweep (`devices_for_runs`). cuda:1 is one GPU.

    mps and xla are never chosen by themselves: models of this size are too small to keep an mps device busy, and looking
    for a TPU starts its runtime.

    Raises:
        ValueError: an unknown name, or a device that is not there.
    """
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    match = re.fullmatch(r"(cpu|cuda|mps|xla)(?::(\d+))?", name.strip().lower())
    if match is None or (match[2] is not None and match[1] != "cuda"):
        raise ValueError(f"unknown device {name!r}: DEVICE must be {_NAMES}")
    kind, index = match[1], match[2]
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise ValueError(f"device {name!r} is not there: {count} CUDA device(s) found; use DEVICE=cpu")
        return torch.device("cuda") if index is None else torch.device("cuda", int(index))
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not there: it needs a Mac with Apple silicon; use DEVICE=cpu")
    if kind == "xla":
        return _xla_device()
    return torch.device(kind)


def devices_for_runs(device: torch.device) -> list[torch.device]:
    """The devices among which the runs of a sweep are shared: every GPU if `device` is cuda without an index, else `device` alone."""
    if device.type == "cuda" and device.index is None:
        return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [device]


def seen_alone(devices: Sequence[torch.device], environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables of the environment of a process that is to see these GPUs only. It numbers them anew: cuda:0, cuda:1, ..."""
    names = environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    own = [names[index] if names[0] else str(index) for index in (device.index for device in devices)]
    return {"CUDA_VISIBLE_DEVICES": ",".join(own), "DEVICE": "cuda"}


def _xla_device() -> torch.device:
    try:
        import torch_xla  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(f"device 'xla' needs torch_xla: pip install 'icl[tpu]' ({error})") from None
    try:
        return torch_xla.device()
    except RuntimeError as error:
        reason = (str(error).strip() or "unknown reason").splitlines()[0]
        raise ValueError(f"device 'xla' cannot start: {reason}; set PJRT_DEVICE=TPU, or PJRT_DEVICE=CPU") from None


def end_of_graph(device: torch.device) -> None:
    """Tell a lazy device (xla) to run what was recorded so far as one graph; does nothing elsewhere."""
    if device.type == "xla":
        import torch_xla  # pyright: ignore[reportMissingImports]

        torch_xla.sync()


def same_graph_each_step(device: torch.device) -> AbstractContextManager[object]:
    """On a lazy device (xla), run backward passes in the calling thread within this block.

    The results of a graph are all tensors that are alive at its end. Autograd's own thread frees the tensors of a backward pass at no fixed
    time. Each time others would be alive, so that the graph would be a new one and be compiled again.
    """
    return torch.autograd.set_multithreading_enabled(device.type != "xla")


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Set how many CPU threads PyTorch uses within this block.

    Code that has threads of its own should give PyTorch one. PyTorch's threads spin for a while after each operation, on the cores that the
    others need.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def chain_memory(device: torch.device) -> int:
    """Bytes that the chains of one group may take by default: `memory_budget` on an accelerator, 2 GiB on a CPU, where larger groups are no
    faster."""
    return 2**31 if device.type == "cpu" else memory_budget(device)


def memory_budget(device: torch.device) -> int:
    """Bytes that one computation may plan to use: half of what is free on the device now.

    The other half is for allocators' slack and for neighbours on a shared machine.
    """
    if device.type == "cuda":
        # What PyTorch holds for reuse is free as well.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + held) // 2
    if device.type == "mps":
        return (torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()) // 2
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return _UNKNOWN_MEMORY


def runs_at_once(device: torch.device) -> int:
    """How many runs of a sweep are done at a time by default: one per CPU core, or one per accelerator."""
    return available_cores(device) if device.type == "cpu" else len(devices_for_runs(device))


def available_cores(device: torch.device) -> int:
    """CPU cores that this process may use for computing on the device (`icl.native.quota.usable_cores`)."""
    return usable_cores() if device.type == "cpu" else 1
