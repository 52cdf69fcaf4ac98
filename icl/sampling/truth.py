r"""Models whose learning coefficient is known, to measure the error of an estimator. Each w* is a point that attains the coefficient.

Every model comes with data on which its loss at w* is exactly zero, so that the learning coefficient of the empirical loss is that of the
population loss (both are the same analytic function up to factors bounded away from 0 and ∞).

Linear networks W_L ... W_1 of widths H_0, ..., H_L and rank r reach Aoyagi's coefficient only at the most singular points of
the fibre: those where every layer has rank exactly r. There the layers are, up to rotations of every layer's space, I_r ⊕ 0. A
generic factorisation of the same map has layers of higher rank and a larger local coefficient.

Sources: Watanabe, "Algebraic Geometry and Statistical Learning Theory" (2009); Aoyagi & Watanabe, Neural Networks 18 (2005), "Stochastic
complexities of reduced rank regression"; Aoyagi, "Consideration on the learning efficiency of multiple-layered neural networks with linear
units", Neural Networks 172 (2024).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from icl.sampling.objective import ModuleObjective, Objective
from icl.streams import Stream


class LinearNetworkObjective:
    """The mean squared error of a linear network on one data set, for `estimate_llc_of`. It is several times as fast as `ModuleObjective`.

    Let XᵀX/n = RᵀR for the inputs X. The loss is ‖(W_L ... W_1 − W*) Rᵀ‖² / H_L, so its cost does not depend on the number of samples.
    Its methods ignore the batch they are given.

    Shapes: E networks, P parameters.
    """

    def __init__(self, layers: Sequence[Tensor], inputs: Tensor) -> None:
        self.anchor = torch.cat([layer.detach().reshape(-1) for layer in layers])
        self._shapes = [layer.shape for layer in layers]
        self._root = torch.linalg.qr(inputs.double() / math.sqrt(len(inputs))).R.T.to(inputs.dtype)
        self._target = self._products(self.anchor[None])[-1][0]

    def losses(self, positions: Tensor, batch: Any) -> Tensor:
        """Losses (E, 1)."""
        residual = self._products(positions)[-1] - self._target
        return residual.square().sum(dim=(1, 2))[:, None] / len(self._target)

    def losses_and_gradients(
        self, positions: Tensor, batch: Any, token_weights: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (E, 1) and gradients (E, P)."""
        layers, products = self._layers(positions), self._products(positions)
        residual = products[-1] - self._target
        upstream = residual * (2.0 / len(self._target))
        gradients = []
        for layer, below in zip(reversed(layers), reversed([self._root, *products[:-1]]), strict=True):
            gradients.append((upstream @ below.mT).flatten(1))
            upstream = layer.mT @ upstream
        return residual.square().sum(dim=(1, 2))[:, None] / len(self._target), torch.cat(gradients[::-1], dim=1)

    def _layers(self, positions: Tensor) -> list[Tensor]:
        pieces = positions.split([shape.numel() for shape in self._shapes], dim=1)
        return [piece.unflatten(1, shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def _products(self, positions: Tensor) -> list[Tensor]:
        """W_1 Rᵀ, W_2 W_1 Rᵀ, ..."""
        products = [self._root]
        for layer in self._layers(positions):
            products.append(layer @ products[-1])
        return products[1:]


@dataclass(frozen=True)
class KnownModel:
    """A module at w*, its loss and data, and the learning coefficient λ with its multiplicity m.

    `at`: (nβ, γ) -> the exact nβ E[L], which a perfect sampler would report at a finite nβ and γ; None if it is not known.
    """

    name: str
    family: str
    module: nn.Module
    loss_fn: Callable[[Callable[..., Any], Any], Tensor]
    batch: Any
    coefficient: float
    multiplicity: int = 1
    at: Callable[[float, float], float] | None = None

    @property
    def num_parameters(self) -> int:
        """P."""
        return sum(value.numel() for value in self.module.parameters())

    def objective(self) -> Objective:
        """The fastest objective of the model: hand-written for linear networks."""
        layers = list(self.module) if isinstance(self.module, nn.Sequential) else [self.module]
        weights = [layer.weight for layer in layers if isinstance(layer, nn.Linear)]
        if len(weights) == len(layers):
            return LinearNetworkObjective(weights, self.batch[0])
        return ModuleObjective(self.module, self.loss_fn)


def deep_linear_coefficient(widths: Sequence[int], rank: int) -> tuple[float, int]:
    r"""λ and multiplicity of a product of linear layers of widths H_0..H_L at a true map of given rank (Aoyagi 2024, theorem 1).

    With M_s = H_s − r, and 𝓜 the ℓ + 1 smallest M_s such that max 𝓜 < min of the others, Σ_𝓜 M ≥ ℓ max 𝓜 and Σ_𝓜 M < ℓ min of the others,
    a = Σ_𝓜 M − (⌈Σ_𝓜 M / ℓ⌉ − 1) ℓ:

        λ = r (H_0 + H_L − r)/2 + a(ℓ − a)/(4ℓ) − (ℓ − 1)(Σ_𝓜 M)²/(4ℓ) + ½ Σ_{i<j ∈ 𝓜} M_i M_j,      m = a(ℓ − a) + 1.

    Raises:
        ValueError: a rank above the smallest width, or fewer than two widths.
    """
    if len(widths) < 2 or not 0 <= rank <= min(widths):
        raise ValueError(f"rank {rank} needs at least two widths, none below it; got {list(widths)}")
    reduced = sorted(width - rank for width in widths)
    for count in range(2, len(reduced) + 1):
        chosen, rest, layers = reduced[:count], reduced[count:], count - 1
        total = sum(chosen)
        if total >= layers * chosen[-1] and (not rest or total < layers * rest[0]):
            remainder = total - (math.ceil(total / layers) - 1) * layers
            singular = (
                remainder * (layers - remainder) / (4 * layers)
                - (layers - 1) * total**2 / (4 * layers)
                + sum(a * b for a, b in combinations(chosen, 2)) / 2
            )
            regular = rank * (widths[0] + widths[-1] - rank) / 2
            return regular + singular, remainder * (layers - remainder) + 1
    raise AssertionError(f"no set of layers satisfies Aoyagi's conditions for {list(widths)}, rank {rank}")


def mean_squared_error(predict: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean over samples and outputs of (prediction − target)²."""
    inputs, targets = batch
    return (predict(inputs) - targets).square().mean()


def deep_linear(widths: Sequence[int], rank: int, seed: int, whitened: bool = False) -> KnownModel:
    """A deep linear network at a most singular point of its fibre: every layer is I_r ⊕ 0 between randomly rotated spaces.

    Data: 2 H_0 standard normal inputs and the network's own outputs; whitened, √H_0 times H_0 orthonormal inputs, whose loss is exactly the
    population's for inputs of unit covariance.
    """
    stream = Stream(seed, f"truth/{'-'.join(map(str, widths))}/{rank}")
    rotations = [torch.linalg.qr(stream.normal(i, (width, width)).double()).Q.float() for i, width in enumerate(widths)]
    layers = []
    for (before, after), (narrow, wide) in zip(pairwise(rotations), pairwise(widths), strict=True):
        layer = nn.Linear(narrow, wide, bias=False)
        layer.weight.data = after[:, :rank] @ before[:, :rank].T
        layers.append(layer)
    module = nn.Sequential(*layers)
    inputs = stream.child("inputs").normal(0, (2 * widths[0], widths[0]))
    if whitened:
        inputs = math.sqrt(widths[0]) * torch.linalg.qr(inputs[: widths[0]].double()).Q.float()
    coefficient, multiplicity = deep_linear_coefficient(widths, rank)
    with torch.no_grad():
        batch = (inputs, module(inputs))
    family = "reduced-rank regression" if len(widths) == 3 else "deep linear network"
    name = f"{'-'.join(map(str, widths))} rank {rank}"
    return KnownModel(name, family, module, mean_squared_error, batch, coefficient, multiplicity)


def linear_regression(size: int, seed: int) -> KnownModel:
    """y = w·x with standard normal inputs: regular, λ = d/2."""
    stream = Stream(seed, f"truth/linear/{size}")
    module = nn.Linear(size, 1, bias=False)
    module.weight.data = stream.normal(0, (1, size)) / math.sqrt(size)
    inputs = stream.normal(1, (2 * size, size))
    with torch.no_grad():
        batch = (inputs, module(inputs))
    curvature = torch.linalg.eigvalsh(2 * inputs.T.double() @ inputs.double() / len(inputs))

    def at(nbeta: float, gamma: float) -> float:
        return float((0.5 * nbeta * curvature / (nbeta * curvature + gamma)).sum())

    return KnownModel(f"linear {size}", "regular", module, mean_squared_error, batch, size / 2, at=at)


class _Warped(nn.Module):
    """w -> sinh(A w): an analytic diffeomorphism, so that matching its output is a regular problem with a skewed posterior."""

    def __init__(self, mixing: Tensor, weights: Tensor) -> None:
        super().__init__()
        self.mixing = nn.Buffer(mixing)
        self.weights = nn.Parameter(weights)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.sinh(self.mixing @ self.weights) * inputs


def warped_regression(size: int, seed: int) -> KnownModel:
    """A curved regular model, λ = d/2: outputs sinh(A w) with A of condition number 10."""
    stream = Stream(seed, f"truth/warped/{size}")
    rotation = torch.linalg.qr(stream.normal(0, (size, size)).double()).Q.float()
    mixing = rotation * torch.logspace(-0.5, 0.5, size)
    module = _Warped(mixing, stream.normal(1, (size,)) / 3)
    inputs = torch.ones(1)
    with torch.no_grad():
        batch = (inputs, module(inputs))
    return KnownModel(f"warped {size}", "regular", module, mean_squared_error, batch, size / 2)


class _Monomials(nn.Module):
    """Copies of the monomial u^a v^b."""

    def __init__(self, powers: tuple[int, ...], copies: int) -> None:
        super().__init__()
        self.powers = powers
        self.factors = nn.Parameter(torch.zeros(len(powers), copies))

    def forward(self, inputs: Tensor) -> Tensor:
        product = inputs
        for factor, power in zip(self.factors, self.powers, strict=True):
            product = product * factor**power
        return product


def normal_crossing(powers: tuple[int, int], copies: int) -> KnownModel:
    """Independent copies of L = (w_1^a w_2^b)² at 0: λ = 1/(2 max(a, b)) each; m adds up, less one per further copy."""
    module = _Monomials(powers, copies)
    largest = max(powers)
    multiplicity = copies * (powers.count(largest) - 1) + 1
    batch = (torch.ones(1), torch.zeros(copies))
    name = "×".join(f"w{i + 1}^{power}" for i, power in enumerate(powers)) + f", {copies} copies"
    at = partial(normal_crossing_at, powers, copies)
    coefficient = copies / (2 * largest)
    return KnownModel(name, "normal crossing", module, mean_squared_error, batch, coefficient, multiplicity, at)


def normal_crossing_at(powers: tuple[int, int], copies: int, nbeta: float, gamma: float) -> float:
    r"""nβ E[L] of `normal_crossing` exactly, at a finite nβ and γ: what a perfect sampler would report.

    Per copy, ∫∫ b u²ᵃv²ᵇ e^{−b u²ᵃv²ᵇ − γ(u² + v²)/2} du dv / ∫∫ e^{...}, with the weight b = nβ / copies, by the trapezoidal rule in the
    logarithms of u and v, where the integrand is smooth and decays on both sides.
    """
    largest = math.log(12.0 / math.sqrt(gamma))
    log_u = torch.linspace(largest - 30.0, largest, 1201, dtype=torch.float64)[:, None]
    log_v = log_u.T
    energy = nbeta / copies * torch.exp(2 * (powers[0] * log_u + powers[1] * log_v))
    radius = torch.exp(2 * log_u) + torch.exp(2 * log_v)
    weights = torch.exp(-energy - gamma / 2 * radius + log_u + log_v)
    return copies * float((energy * weights).sum() / weights.sum())
