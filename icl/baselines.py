"""Optimal in-context predictors, called like the transformer: every prediction uses the examples before it and no
others.

Ridge is Bayes-optimal for Gaussian tasks, dMMSE (the discrete minimum mean squared error estimator) for M equally
likely tasks (Raventós et al., arXiv 2306.15063, section 2 and appendix A):

    ridge   ŵ_k = (X_{<k}ᵀ X_{<k} + σ² I)⁻¹ X_{<k}ᵀ Y_{<k}
    dMMSE   ŵ_k = Σ_m softmax_m( -Σ_{j<k} (y_j - w_m·x_j)² / (2σ²) ) w_m
    both    ŷ_k = ŵ_k · x_k

Without examples ridge predicts 0 and dMMSE uses the plain mean of the tasks. σ² = 0 is taken as the limit: ridge becomes
the least squares solution of smallest norm, dMMSE the mean of the tasks that fit the examples.

Shapes: B batch (any number of leading axes), K examples, D task dimension, M tasks.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from icl.native import dmmse as native

Predictor = Callable[[Tensor, Tensor], Tensor]
"""(xs (B, K, D), ys (B, K, 1)) -> predictions (B, K, 1)."""

# Below this variance float32 residuals of the true task are rounding, not noise.
_SMALLEST_VARIANCE = 1e-12
# The Gram matrix with σ² on its diagonal is solved if σ² is above this share of its largest entry. Float64 then leaves seven digits.
_SOLVABLE = 1e-9
# Elements of the running-loss buffer: it should stay in the cache of a CPU core, and fill an accelerator.
_BLOCK_ON_CPU = 2**19
_BLOCK_ELSEWHERE = 2**26
_GRAM_ELEMENTS = 2**23


def zero_predictor(xs: Tensor, ys: Tensor) -> Tensor:
    """The prediction of the task prior's mean, ŷ = 0: xs (B, K, D), ys (B, K, 1) -> (B, K, 1)."""
    _check_sequences(xs, ys)
    return torch.zeros_like(ys)


def ridge_predictor(xs: Tensor, ys: Tensor, noise_variance: float) -> Tensor:
    """Ridge predictions (B, K, 1) for xs (B, K, D), ys (B, K, 1) and σ²; see the module's docstring.

    Raises:
        ValueError: shapes that do not fit, or a negative variance.
    """
    return _apply(ridge_weights(xs, ys, noise_variance), xs)


def ridge_weights(xs: Tensor, ys: Tensor, noise_variance: float) -> Tensor:
    """The ridge estimates ŵ_k behind each prediction, (B, K, D).

    Raises:
        ValueError: shapes that do not fit, or a negative variance.
    """
    _check_sequences(xs, ys)
    _check_variance(noise_variance)
    *batch, examples, task_size = xs.shape
    rows = max(1, _GRAM_ELEMENTS // (examples * task_size**2))
    weights = [
        _ridge_block(x, y, noise_variance)
        for x, y in zip(
            xs.reshape(-1, examples, task_size).split(rows), ys.reshape(-1, examples, 1).split(rows), strict=True
        )
    ]
    return torch.cat(weights).reshape(*batch, examples, task_size) if weights else torch.zeros_like(xs)


def _ridge_block(xs: Tensor, ys: Tensor, noise_variance: float) -> Tensor:
    # The Gram matrix squares the condition number of the inputs: float32 would lose half its digits. Apple's
    # GPUs have no float64.
    precise = torch.float32 if xs.device.type == "mps" else torch.float64
    x, y = xs.to(precise), ys.to(precise)
    gram = _sum_before((x[..., :, None] * x[..., None, :]).flatten(-2)).unflatten(-1, (x.shape[-1], x.shape[-1]))
    moment = _sum_before(x * y)
    largest = gram.diagonal(dim1=-2, dim2=-1).amax() if gram.numel() else gram.new_zeros(())
    if noise_variance <= _SOLVABLE * float(largest):
        # Fewer than D examples leave directions of curvature 0. Their rounding errors must not be divided by σ².
        curvature, directions = torch.linalg.eigh(gram)
        seen = curvature > 1e-13 * curvature[..., -1:]
        inverse = torch.where(seen, 1 / (curvature + noise_variance), 0.0)
        solution = directions @ (inverse[..., None] * (directions.mT @ moment[..., None]))
    else:
        gram.diagonal(dim1=-2, dim2=-1).add_(noise_variance)
        solution = torch.linalg.solve(gram, moment[..., None])
    return solution.squeeze(-1).to(xs.dtype)


def dmmse_predictor(xs: Tensor, ys: Tensor, tasks: Tensor, noise_variance: float) -> Tensor:
    """dMMSE predictions (B, K, 1) for xs (B, K, D), ys (B, K, 1), tasks (M, D) and σ²; see the module's docstring.

    The extra memory does not grow with M, and with B only through the result.

    Raises:
        ValueError: shapes that do not fit, no tasks, or a negative variance.
    """
    return _apply(dmmse_weights(xs, ys, tasks, noise_variance), xs)


def dmmse_weights(xs: Tensor, ys: Tensor, tasks: Tensor, noise_variance: float) -> Tensor:
    """The posterior means ŵ_k behind each prediction, (B, K, D).

    Raises:
        ValueError: shapes that do not fit, no tasks, or a negative variance.
    """
    _check_sequences(xs, ys)
    _check_variance(noise_variance)
    if tasks.ndim != 2 or tasks.shape[0] < 1 or tasks.shape[1] != xs.shape[-1]:
        raise ValueError(f"tasks must be (M, {xs.shape[-1]}) with M >= 1, got {tuple(tasks.shape)}")
    examples, task_size = xs.shape[-2:]
    tasks = tasks.to(xs)
    # Dividing by √2 σ once turns every squared residual into a log-likelihood.
    scale = 1 / math.sqrt(2 * max(noise_variance, _SMALLEST_VARIANCE))
    x, y = (xs * scale).reshape(-1, examples, task_size), (ys * scale).reshape(-1, examples)
    differentiable = x.requires_grad or y.requires_grad or tasks.requires_grad
    if xs.device.type == "cpu" and xs.dtype == torch.float32 and len(x) > 0 and not differentiable:
        means = native.dmmse_weights(x, y, tasks, torch.get_num_threads())
        if means is not None:
            return means.reshape(xs.shape)
    block = _BLOCK_ON_CPU if xs.device.type == "cpu" else _BLOCK_ELSEWHERE
    rows = max(1, min(len(x), max(256, block // len(tasks))))
    means = [
        _posterior_means(*part, tasks, max(1, block // rows)) for part in zip(x.split(rows), y.split(rows), strict=True)
    ]
    return torch.cat(means).reshape(xs.shape) if means else torch.zeros_like(xs)


def _posterior_means(xs: Tensor, ys: Tensor, tasks: Tensor, tasks_per_block: int) -> Tensor:
    """Posterior mean of the task before each example, (B, K, D), with log-likelihood -(y - w·x)² of an example.

    One pass over the tasks in blocks. Within a block the log-likelihood of the prefix grows example by example; the
    blocks' means are averaged with weights exp(log Σ likelihood), in double precision (an online softmax: Milakov &
    Gimelshein, arXiv 1805.02867).
    """
    batch, examples, task_size = xs.shape
    wide = torch.float32 if xs.device.type == "mps" else torch.float64
    log_evidence = xs.new_full((examples, batch, 1), -math.inf, dtype=wide)
    mean = xs.new_zeros((examples, batch, task_size), dtype=wide)
    buffers = xs.new_empty((2, batch * min(tasks_per_block, len(tasks))))
    for part in tasks.split(tasks_per_block):
        log_likelihood, weights = (buffer[: batch * len(part)].view(batch, len(part)) for buffer in buffers)
        log_likelihood.zero_()
        columns = part.T.contiguous()  # this layout makes the second product four times as fast as the other
        for k in range(examples):
            if k > 0:
                residuals = torch.addmm(ys[:, k - 1, None], xs[:, k - 1], columns, alpha=-1, out=weights)
                log_likelihood.addcmul_(residuals, residuals, value=-1)
            torch.softmax(log_likelihood, dim=-1, out=weights)
            # log Σ exp(l) = max l - log max softmax(l): exact where it matters, because the largest
            # weight is at least 1/M.
            evidence = log_likelihood.amax(-1, keepdim=True).to(wide) - weights.amax(-1, keepdim=True).to(wide).log()
            log_evidence[k] = torch.logaddexp(log_evidence[k], evidence)
            block_mean = torch.nn.functional.linear(weights, columns).to(wide)
            mean[k] += (evidence - log_evidence[k]).exp() * (block_mean - mean[k])
    return mean.transpose(0, 1).to(xs.dtype)


def _sum_before(values: Tensor) -> Tensor:
    """Σ_{j<k} values_j along the axis of examples: (B, K, N) -> (B, K, N)."""
    return torch.cat((torch.zeros_like(values[..., :1, :]), values[..., :-1, :].cumsum(dim=-2)), dim=-2)


def _apply(weights: Tensor, xs: Tensor) -> Tensor:
    return (weights * xs).sum(dim=-1, keepdim=True)


def _check_sequences(xs: Tensor, ys: Tensor) -> None:
    if xs.ndim < 2 or xs.shape[-2] < 1 or ys.shape != (*xs.shape[:-1], 1):
        raise ValueError(
            f"expected xs (B, K, D) with K >= 1 and ys (B, K, 1), got {tuple(xs.shape)} and {tuple(ys.shape)}"
        )


def _check_variance(noise_variance: float) -> None:
    if not (noise_variance >= 0 and math.isfinite(noise_variance)):
        raise ValueError(f"noise_variance must be finite and at least 0, got {noise_variance}")
