"""The Hessian of the loss: trace and leading eigenvalues, through Hessian-vector products.

Leading eigenvalues come from the Lanczos method (ARPACK). The trace comes from Hutchinson's estimator tr H = E[vᵀHv] over
random sign vectors v, after the directions found by Lanczos are removed (Meyer, Musco, Musco & Woodruff, "Hutch++", arXiv
2010.09649):

    tr H = Σ_i q_iᵀ H q_i + E[vᵀ Π H Π v],   Π = I - Q Qᵀ.

For models of up to SMALL parameters all of H is computed, and nothing is random.

The estimate is unbiased for any orthonormal Q. It removes most of the variance if few directions have most of the curvature. The
estimate is the mean over the vectors v, the probes, with its standard error. A Hessian-vector product is the derivative of
∇L·v, exact to rounding; the kinks of ReLU contribute nothing.

Shapes: P parameters, k eigenvalues.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from icl.analysis.data import AnalysisData
from icl.analysis.loss_on_data import LossOnData
from icl.model import InContextRegressionTransformer, flatten, predict, unflatten
from icl.sampling.objective import Batch, LossFunction, ModuleObjective
from icl.streams import Stream

NUM_SEQUENCES = 1024
"""The number of sequences of the loss, as in arXiv 2402.02364."""

SMALL = 16
"""The number of parameters up to which the columns of H cost fewer products than the fewest that Lanczos and probes take."""

Loss = Callable[[Tensor], Tensor]
MatVec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HessianEstimate:
    """Curvature of a loss at one point.

    Attributes:
        eigenvalues: (k,) those of largest magnitude, in descending order of magnitude.
        trace: the estimated trace.
        trace_std_error: standard error of the mean over probes; NaN for a single probe, 0 without any (the exact trace).
        num_probes: number of random vectors.
        num_products: number of Hessian-vector products.
    """

    eigenvalues: NDArray[np.float64]
    trace: float
    trace_std_error: float
    num_probes: int
    num_products: int


def hessian_vector_product(loss: Loss, point: Tensor) -> MatVec:
    """v (P,) -> H v (P,), H the Hessian of `loss`, a scalar function of a vector, at `point` (P,)."""
    origin = point.detach().requires_grad_()
    # The graph of the gradient is built once. Every product then costs one backward pass through it. Of PyTorch's kernels of attention
    # only the plain one has a second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(loss(origin), origin, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        if not gradient.requires_grad:  # the loss is linear
            return torch.zeros_like(origin)
        return torch.autograd.grad(gradient, origin, vector, retain_graph=True, materialize_grads=True)[0]

    return product


def mean_product(terms: Sequence[tuple[float, Loss]], point: Tensor) -> MatVec:
    """v (P,) -> H v (P,) for the loss Σ weight · loss over (weight, loss) in `terms`, at `point` (P,)."""
    if len(terms) == 1:
        ((weight, loss),) = terms
        inner = hessian_vector_product(loss, point)
        return lambda vector: weight * inner(vector)

    def product(vector: Tensor) -> Tensor:
        total = torch.zeros_like(point)
        for weight, loss in terms:  # the graphs are made anew, because those of all batches would not fit into memory
            total += weight * hessian_vector_product(loss, point)(vector)
        return total

    return product


def top_eigenvalues(
    product: MatVec, like: Tensor, k: int, tolerance: float = 1e-3, seed: int = 0, max_products: int = 1000
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The k eigenvalues of largest magnitude and their vectors (P, k), in descending order of magnitude.

    Args:
        product: v -> H v, H symmetric.
        like: a vector (P,) of the type and device that `product` takes.
        k: number of eigenvalues, below P.
        tolerance: relative accuracy of the residuals. The relative error of the eigenvalues is about its square.
        seed: seed of the start vector.
        max_products: bound on the number of products, approximately.

    Raises:
        ValueError: k is not in 1..P-1.
        scipy.sparse.linalg.ArpackNoConvergence: the method did not converge within `max_products`.
    """
    size = like.numel()
    if not 1 <= k < size:
        raise ValueError(f"k must lie in 1..{size - 1}, got {k}")

    def matvec(vector: NDArray[np.floating]) -> NDArray[np.floating]:
        return product(torch.as_tensor(vector).to(like).reshape(-1)).detach().cpu().double().numpy()

    operator = LinearOperator((size, size), matvec=matvec, dtype=np.float64)  # type: ignore[call-arg]
    start = Stream(seed, "hessian/start").normal(0, (size,)).double().numpy()
    # A small subspace restarts often, so the method stops early if eigenvalues are well separated.
    width = min(size, max(2 * k + 4, 8))
    try:
        values, vectors = eigsh(
            operator,
            k=k,
            which="LM",
            v0=start,
            tol=tolerance,  # type: ignore[arg-type]
            ncv=width,
            maxiter=max(1, max_products // width),
        )
    except ArpackError:
        if matvec(start).any():
            raise
        return np.zeros(k), np.eye(size, k)  # H = 0, which ARPACK does not take
    order = np.argsort(-np.abs(values))
    return values[order], vectors[:, order]


def hutchinson_trace(
    product: MatVec, like: Tensor, num_probes: int, without: Tensor | None = None, seed: int = 0
) -> tuple[float, float]:
    """Estimate of tr ΠHΠ and its standard error (NaN for a single probe), from `num_probes` random sign vectors.

    Args:
        product: v -> H v.
        like: a vector (P,) of the type and device that `product` takes.
        num_probes: number of sign vectors.
        without: orthonormal directions Q (P, k) to leave out: Π = I - Q Qᵀ. None: the trace of H itself.
        seed: seed of the sign vectors.

    Raises:
        ValueError: `num_probes` is below 1.
    """
    if num_probes < 1:
        raise ValueError(f"num_probes must be at least 1, got {num_probes}")
    samples = []
    for probe in range(num_probes):
        signs = torch.where(Stream(seed, "hessian/probe").uniform(probe, (like.numel(),)) < 0.5, -1.0, 1.0).to(like)
        if without is not None:
            signs = signs - without @ (without.T @ signs)
        samples.append(float(signs @ product(signs)))
    error = float(np.std(samples, ddof=1) / np.sqrt(num_probes)) if num_probes > 1 else float("nan")
    return float(np.mean(samples)), error


def estimate_hessian(
    loss: Loss, point: Tensor, k: int = 3, num_probes: int = 8, tolerance: float = 1e-2, seed: int = 0
) -> HessianEstimate:
    """Leading eigenvalues and the trace of the Hessian of `loss` at `point` (P,)."""
    return estimate_from_products(hessian_vector_product(loss, point), point, k, num_probes, tolerance, seed)


def estimate_from_products(
    inner: MatVec, point: Tensor, k: int = 3, num_probes: int = 8, tolerance: float = 1e-2, seed: int = 0
) -> HessianEstimate:
    """The same for a Hessian that is given by its products, v (P,) -> H v (P,). The k eigenvalues are P if P is smaller."""
    if point.numel() <= SMALL:
        return _exact(inner, point, k)
    spent = 0

    def product(vector: Tensor) -> Tensor:
        nonlocal spent
        spent += 1
        return inner(vector)

    values, vectors = top_eigenvalues(product, point, k, tolerance, seed)
    directions = torch.linalg.qr(torch.as_tensor(vectors))[0].to(point)
    rest, error = hutchinson_trace(product, point, num_probes, directions, seed)
    # A Ritz value is the Rayleigh quotient of its vector, so q_iᵀ H q_i needs no further product.
    return HessianEstimate(values, float(values.sum()) + rest, error, num_probes, spent)


def _exact(product: MatVec, point: Tensor, k: int) -> HessianEstimate:
    """All of H, column by column."""
    columns = (
        torch.stack([product(unit) for unit in torch.eye(point.numel()).to(point)]).detach().cpu().double().numpy()
    )
    values = np.linalg.eigvalsh((columns + columns.T) / 2)
    largest = values[np.argsort(-np.abs(values), kind="stable")][:k]
    return HessianEstimate(largest, float(np.trace(columns)), 0.0, 0, len(columns))


def regression_loss(model: InContextRegressionTransformer, xs: Tensor, ys: Tensor) -> tuple[Loss, Tensor]:
    """The training loss on fixed sequences as a function of the flat parameters, and the model's parameters (P,)."""
    shape = model.shape

    def loss(flat: Tensor) -> Tensor:
        return F.mse_loss(predict(shape, unflatten(shape, flat), xs, ys), ys)

    return loss, flatten(dict(model.named_parameters())).detach()


def hessian_table(
    model: InContextRegressionTransformer,
    xs: Tensor,
    ys: Tensor,
    k: int = 3,
    num_probes: int = 8,
    tolerance: float = 1e-2,
) -> pd.DataFrame:
    """One row: `hessian/evals/0..k-1`, `hessian/trace`, `hessian/trace_std_error`, `hessian/num_probes`,
    `hessian/num_products`."""
    loss, point = regression_loss(model, xs, ys)
    return pd.DataFrame([hessian_row(loss, point, k, num_probes, tolerance)])


def hessian_row(
    loss: Loss, point: Tensor, k: int = 3, num_probes: int = 8, tolerance: float = 1e-2
) -> dict[str, float]:
    """The columns of `hessian_table` for any loss at a point (P,)."""
    return _row(estimate_hessian(loss, point, k, num_probes, tolerance))


def _row(estimate: HessianEstimate) -> dict[str, float]:
    row: dict[str, float] = {f"hessian/evals/{i}": float(value) for i, value in enumerate(estimate.eigenvalues)}
    row |= {"hessian/trace": estimate.trace, "hessian/trace_std_error": estimate.trace_std_error}
    return row | {"hessian/num_probes": estimate.num_probes, "hessian/num_products": estimate.num_products}


def module_loss(model: nn.Module, loss_fn: LossFunction, batch: Batch) -> tuple[Loss, Tensor]:
    """The loss of any module on a batch as a function of its flat trainable parameters, and these parameters (P,)."""
    objective = ModuleObjective(model, loss_fn)
    return lambda flat: objective.loss_at(flat, batch), objective.anchor


def measure_hessian(model: InContextRegressionTransformer, data: AnalysisData) -> pd.DataFrame:
    """One row: `hessian_table` on the first 1024 validation sequences."""
    return hessian_table(model, data.validation.xs[:NUM_SEQUENCES], data.validation.ys[:NUM_SEQUENCES])


def measure_hessian_of_loss(at: LossOnData) -> pd.DataFrame:
    """One row for any subject: the columns of `hessian_table`, for the loss on fixed data."""
    objective = at.objective
    return pd.DataFrame([_row(estimate_from_products(mean_product(at.terms, objective.anchor), objective.anchor))])
