r"""Models for `benchmarks.llc.honesty`, whose λ̂ at a finite nβ and γ is known: exactly, by quadrature, or from one long run.

Shapes: E chains, P parameters, B samples of a batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from icl.sampling.objective import Batch, Objective
from icl.sampling.truth import KnownModel, deep_linear, normal_crossing, warped_regression
from icl.streams import Stream

Exact = Callable[[float, float], float]
FEATURES, HIDDEN, CLASSES = 6, 5, 5
PENALTY = 0.003
WEIGHTED_DRAWS = 400_000


class FunctionObjective:
    """Losses (E,) of positions (E, P) on a batch, differentiated by autograd in one call: several times as fast as a module."""

    def __init__(self, anchor: Tensor, losses_of: Callable[[Tensor, Batch], Tensor]) -> None:
        self.anchor = anchor
        self._losses_of = losses_of

    def losses(self, positions: Tensor, batch: Batch) -> Tensor:
        """Losses (E, 1)."""
        with torch.no_grad():
            return self._losses_of(positions, batch)[:, None]

    def losses_and_gradients(
        self, positions: Tensor, batch: Batch, token_weights: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (E, 1) and gradients (E, P)."""
        leaf = positions.detach().requires_grad_()
        losses = self._losses_of(leaf, batch)
        (gradients,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach()[:, None], gradients


class RegressionObjective:
    """Half the mean squared error of x·w, with its gradient by hand."""

    def __init__(self, anchor: Tensor) -> None:
        self.anchor = anchor

    def losses(self, positions: Tensor, batch: Batch) -> Tensor:
        """Losses (E, 1)."""
        inputs, targets = batch
        return 0.5 * (positions @ inputs.T - targets).square().mean(dim=1, keepdim=True)

    def losses_and_gradients(
        self, positions: Tensor, batch: Batch, token_weights: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Losses (E, 1) and gradients (E, P)."""
        inputs, targets = batch
        residual = positions @ inputs.T - targets
        return 0.5 * residual.square().mean(dim=1, keepdim=True), residual @ inputs / len(inputs)


@dataclass(frozen=True)
class Target:
    """A model at the minimum of its loss on n samples.

    Attributes:
        objective: at w*.
        data: all samples, as one batch.
        num_samples: n of nβ = n / log n; that of the data, or nominal where the loss does not depend on their number.
        cuts: whether the samples can be cut into mini-batches.
        exact: (nβ, γ) -> nβ (E[L] − L(w*)); None: it takes a long run.
        curvatures: of the loss at w* (P,), where it is quadratic.
    """

    name: str
    family: str
    objective: Callable[[Tensor], Objective]
    anchor: Tensor
    data: tuple[Tensor, Tensor]
    num_samples: int
    cuts: bool = False
    exact: Exact | None = None
    curvatures: Tensor | None = None

    def at(self, off: float) -> Objective:
        """The objective with w* moved by `off` in every coordinate, up or down."""
        signs = torch.sign(torch.sin(torch.arange(len(self.anchor)) * 2.399963 + 0.5)).to(self.anchor)
        return self.objective(self.anchor + off * signs)

    def batches(self, size: int | None) -> list[tuple[Tensor, Tensor]]:
        """All the data as batches of one size."""
        if size is None:
            return [self.data]
        inputs, targets = self.data
        return list(zip(inputs.split(size), targets.split(size), strict=True))


@cache
def regression(name: str, samples: int, size: int, spread: float = 1.0, flat: int = 0, seed: int = 0) -> Target:
    """Linear regression with noise of variance 1 at its least-squares solution: curvatures from 1 down to 1/spread in `size` rotated
    directions, and none in `flat` more."""
    stream = Stream(seed, f"honesty/{name}")
    scales = torch.cat([torch.logspace(0, -float(torch.tensor(spread).log10()) / 2, size), torch.zeros(flat)]).double()
    rotation = torch.linalg.qr(stream.normal(0, (size + flat, size + flat)).double()).Q
    inputs = (stream.normal(1, (samples, size + flat)).double() * scales) @ rotation.T
    targets = inputs @ stream.normal(2, (size + flat,)).double() + stream.normal(3, (samples,)).double()
    solution = torch.linalg.lstsq(inputs, targets[:, None], driver="gelsd").solution[:, 0]
    curvatures = torch.linalg.eigvalsh(inputs.T @ inputs / samples).clamp(min=0.0)

    def exact(nbeta: float, gamma: float) -> float:
        return float((0.5 * nbeta * curvatures / (nbeta * curvatures + gamma)).sum())

    data = (inputs.float(), targets.float())
    return Target(
        name, "regular", RegressionObjective, solution.float(), data, samples, True, exact, curvatures
    )  # fmt: skip


def _of_known(
    known: KnownModel, family: str, samples: int, losses_of: Callable[[Tensor, Batch], Tensor], exact: Exact | None
) -> Target:
    anchor = torch.cat([value.detach().reshape(-1) for value in known.module.parameters()])
    name = f"{known.name}, n {samples:,}"
    return Target(name, family, lambda at: FunctionObjective(at, losses_of), anchor, known.batch, samples, exact=exact)


@cache
def crossing(powers: tuple[int, int], copies: int, samples: int) -> Target:
    """`normal_crossing`, exact by quadrature."""

    def losses_of(positions: Tensor, batch: Batch) -> Tensor:
        factors = positions.unflatten(1, (2, copies))
        return (factors[:, 0] ** powers[0] * factors[:, 1] ** powers[1]).square().mean(dim=1)

    known = normal_crossing(powers, copies)
    return _of_known(known, "normal crossing", samples, losses_of, known.at)


@cache
def warped(size: int, samples: int) -> Target:
    """`warped_regression`, exact by weighted draws: its loss is quadratic in u = sinh(A w) − sinh(A w*), which is drawn, and weighted by
    |dw/du| and the localisation."""
    known = warped_regression(size, 0)
    mixing, outputs = known.module.mixing, known.batch[1]
    assert isinstance(mixing, Tensor)
    matrix, centre = mixing.double(), outputs.double()

    def exact(nbeta: float, gamma: float) -> float:
        drawn = Stream(0, "honesty/warped").normal(0, (WEIGHTED_DRAWS, size)).double() * (size / (2 * nbeta)) ** 0.5
        inner = torch.asinh(centre + drawn)
        away = torch.linalg.solve(matrix, (inner - torch.asinh(centre)).T).T
        weights = torch.softmax(-torch.log(torch.cosh(inner)).sum(dim=1) - gamma / 2 * away.square().sum(dim=1), dim=0)
        return float(nbeta * (weights * drawn.square().mean(dim=1)).sum())

    def losses_of(positions: Tensor, batch: Batch) -> Tensor:
        return (torch.sinh(positions @ mixing.T) - outputs).square().mean(dim=1)

    return _of_known(known, "warped", samples, losses_of, exact)


@cache
def network(widths: tuple[int, ...], rank: int, samples: int) -> Target:
    """`deep_linear`."""
    known = deep_linear(widths, rank, 0)
    family = "reduced rank" if len(widths) == 3 else "deep linear"
    objective = known.objective()

    def moved(anchor: Tensor) -> Objective:
        other = deep_linear(widths, rank, 0).objective()
        other.anchor = anchor
        return other

    return Target(f"{known.name}, n {samples:,}", family, moved, objective.anchor, known.batch, samples)


@cache
def digits(samples: int) -> Target:
    """A net of two layers on the first principal components of scikit-learn's digits 0 to 4, at the minimum of its cross-entropy with a
    quadratic penalty on the weights, without which there is none."""
    from sklearn.datasets import load_digits

    pixels, labels = (torch.as_tensor(each) for each in load_digits(return_X_y=True))
    pixels, labels = pixels[labels < CLASSES], labels[labels < CLASSES]
    order = torch.argsort(Stream(0, "honesty/digits").uniform(0, (len(pixels),)))[:samples]
    inputs = pixels[order].double() - pixels.double().mean(dim=0)
    inputs = inputs @ torch.linalg.svd(inputs, full_matrices=False).Vh[:FEATURES].T
    inputs, labels = (inputs / inputs.std(dim=0)).float(), labels[order]
    shapes = [(HIDDEN, FEATURES), (HIDDEN,), (CLASSES, HIDDEN), (CLASSES,)]
    sizes = [torch.Size(shape).numel() for shape in shapes]

    def losses_of(positions: Tensor, batch: Batch) -> Tensor:
        pieces = [part.unflatten(1, shape) for part, shape in zip(positions.split(sizes, 1), shapes, strict=True)]
        inner = torch.tanh(batch[0] @ pieces[0].mT + pieces[1][:, None])
        logits = inner @ pieces[2].mT + pieces[3][:, None]
        aims = batch[1].expand(len(positions), -1)
        losses = F.cross_entropy(logits.mT, aims, reduction="none").mean(dim=1)
        return losses + PENALTY / 2 * positions.square().sum(dim=1)

    weights = Stream(1, "honesty/digits").normal(0, (1, sum(sizes))).double().div(2).requires_grad_()
    wide = (inputs.double(), labels)
    trainer = torch.optim.LBFGS(
        [weights], max_iter=300, tolerance_grad=1e-7, tolerance_change=0, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        trainer.zero_grad()
        loss = losses_of(weights, wide).sum()
        loss.backward()
        return loss

    trainer.step(closure)
    data = (inputs, labels)
    anchor = weights.detach()[0].float()
    return Target(
        f"digits, n {samples:,}", "classifier", lambda at: FunctionObjective(at, losses_of), anchor, data, samples, True
    )
