"""The choice of the coordinates that are sampled: whole parameters, parts of them, attention heads, or any boolean mask.

A pattern is one of

    blocks.*.attention.**       names of parameters (`icl.sampling.patterns`)
    blocks.0.mlp.up.weight[3]   a part of them, indexed as in NumPy: [0:4] rows, [:, 2] a column
    l0h1, l1h*, l0g0            attention heads, or groups of heads that share keys and values (`icl.sampling.heads`)

A coordinate moves if an include pattern names it, no exclude pattern names it, and the mask, if there is one, is true there. All other
coordinates stay at w*, bit for bit.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from icl.model import InContextRegressionTransformer
from icl.sampling.heads import HEAD, head_masks
from icl.sampling.patterns import everything_if_star, matching

Masks = Mapping[str, Tensor]
"""Parameter name -> boolean mask of its shape, or of a shape that broadcasts to it. Parameters without a mask stay at w*."""

_INDEXED = re.compile(r"(?P<name>[^\[\]]+)\[(?P<index>[^\[\]]*)\]")


@dataclass(frozen=True)
class Restriction:
    """The coordinates that move.

    Attributes:
        masks: name -> boolean mask, for every parameter that moves at least in part, in the model's order.
        shapes: name -> shape, for every parameter.
    """

    masks: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]

    @property
    def num_moving(self) -> int:
        """P, the number of coordinates that move."""
        return sum(int(mask.sum()) for mask in self.masks.values())

    def index(self, names: Iterable[str]) -> Tensor | None:
        """The indices of the moving coordinates in the concatenation of the named parameters, ascending; None if all move."""
        still = {
            name: torch.zeros(shape, dtype=torch.bool) for name, shape in self.shapes.items() if name not in self.masks
        }
        flat = torch.cat([(self.masks[name] if name in self.masks else still[name]).reshape(-1) for name in names])
        return None if bool(flat.all()) else flat.nonzero()[:, 0]

    def __str__(self) -> str:
        """A line for each parameter that moves, and their sum."""
        width = max(map(len, self.masks))
        lines = []
        for name, mask in self.masks.items():
            moving, size = int(mask.sum()), mask.numel()
            part = "" if moving == size else f"  {moving / size:.0%}{_place(mask)}"
            lines.append(f"{name:<{width}}  {moving:>9,} of {size:>9,}{part}")
        total = sum(shape.numel() for shape in self.shapes.values())
        lines.append(f"{'moving':<{width}}  {self.num_moving:>9,} of {total:>9,}  {self.num_moving / total:.2%}")
        return "\n".join(lines)


def restrict(
    model: nn.Module, include: Sequence[str] = ("**",), exclude: Sequence[str] = (), mask: Masks | None = None
) -> Restriction:
    """The coordinates that move. Print the result to see them, and their number, before an estimate.

    Frozen parameters (`requires_grad=False`) do not move.

    Raises:
        ValueError: a pattern or a mask names no parameter, an index or a mask does not fit, or no coordinate is left to move.
    """
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    reference = type(model) is InContextRegressionTransformer
    moving = _union(model, parameters, everything_if_star(include), reference)
    for name, taken in _union(model, parameters, exclude, reference).items():
        if name in moving:
            moving[name] = moving[name] & ~taken
    if mask is not None:
        allowed = {name: _fitting(name, value, parameters) for name, value in mask.items()}
        moving = {name: moving[name] & allowed[name] for name in moving if name in allowed}
    moving = {name: moving[name] for name in parameters if name in moving and bool(moving[name].any())}
    if not moving:
        given = f"include={list(include)} with exclude={list(exclude)}"
        raise ValueError(f"{given}{'' if mask is None else ' and the mask'} leaves no parameter to sample")
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    moving = {name: value for name, value in moving.items() if name in trained}
    if not moving:
        raise ValueError(
            "every selected parameter is frozen (requires_grad=False), so there is nothing to sample; "
            "call requires_grad_(True) on what the estimate is about"
        )
    return Restriction(moving, {name: value.shape for name, value in parameters.items()})


def _union(
    model: nn.Module, parameters: Mapping[str, Tensor], patterns: Sequence[str], reference: bool
) -> dict[str, Tensor]:
    """The union of the masks of all patterns, by parameter name."""
    found: dict[str, Tensor] = {}
    for pattern in patterns:
        for name, mask in _named(model, parameters, pattern, reference).items():
            found[name] = found[name] | mask if name in found else mask
    return found


def _named(model: nn.Module, parameters: Mapping[str, Tensor], pattern: str, reference: bool) -> Mapping[str, Tensor]:
    """The masks of one pattern, by parameter name."""
    if HEAD.fullmatch(pattern) and pattern not in parameters:
        return head_masks(model, pattern)
    indexed = _INDEXED.fullmatch(pattern)
    names = matching(parameters, indexed["name"] if indexed else pattern, reference=reference)
    if indexed is None:
        return {name: torch.ones(parameters[name].shape, dtype=torch.bool) for name in names}
    index = _index(pattern, indexed["index"])
    return {name: _part(pattern, parameters[name], index) for name in names}


def _index(pattern: str, text: str) -> tuple[int | slice, ...]:
    """The index written as text, such as `0:4, 2`."""
    places: list[int | slice] = []
    try:
        for piece in text.split(","):
            numbers = [int(number) if number.strip() else None for number in piece.split(":")]
            if len(numbers) == 1 and numbers[0] is not None:
                places.append(numbers[0])
            elif 2 <= len(numbers) <= 3:
                places.append(slice(*numbers))
            else:
                raise ValueError
    except ValueError:
        raise ValueError(
            f"the pattern {pattern!r} has no index in its brackets; write name[3], name[0:4] for rows, name[:, 2] for a column"
        ) from None
    return tuple(places)


def _part(pattern: str, value: Tensor, index: tuple[int | slice, ...]) -> Tensor:
    mask = torch.zeros(value.shape, dtype=torch.bool)
    try:
        mask[index] = True
    except IndexError:
        mask[...] = False
    if not bool(mask.any()):
        raise ValueError(f"the pattern {pattern!r} is outside a parameter of shape {tuple(value.shape)}")
    return mask


def _fitting(name: str, mask: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    if name not in parameters:
        raise ValueError(f"the mask names {name!r}, which is no parameter; the names are {_listed(parameters)}")
    mask = torch.as_tensor(mask)
    shape = tuple(parameters[name].shape)
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask of {name} is of type {mask.dtype}; it must be boolean, true where the weight moves")
    try:
        return mask.cpu().expand(shape).clone()
    except RuntimeError:
        raise ValueError(f"the mask of {name} has shape {tuple(mask.shape)}, the parameter has {shape}") from None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def _place(mask: Tensor) -> str:
    """The index of the block where a mask is true; "" if that is no block."""
    places = []
    for dim, size in enumerate(mask.shape):
        along = mask.movedim(dim, 0).reshape(size, -1).any(dim=1).nonzero()[:, 0]
        first, last = int(along[0]), int(along[-1])
        if last - first + 1 != len(along):
            return ""
        places.append(":" if len(along) == size else str(first) if first == last else f"{first}:{last + 1}")
    block = torch.zeros_like(mask)
    block[_index("", ", ".join(places))] = True
    while places and places[-1] == ":":
        places.pop()
    return f"  [{', '.join(places)}]" if bool((block == mask).all()) else ""
