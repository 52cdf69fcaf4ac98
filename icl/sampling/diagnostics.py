r"""Convergence diagnostics of Markov chains: split R-hat, bulk effective sample size, Monte-Carlo standard error.

They follow Vehtari, Gelman, Simpson, Carpenter & Bürkner, "Rank-normalization, folding, and localization: an improved R-hat"
(Bayesian Analysis 2021). For effective sample sizes, autocovariances are combined over chains as in their eq. 10 and cut off by
Geyer's initial monotone positive sequence. The standard error is computed from the chains' means instead.

Shapes: E chains, N draws.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor


def split_rhat(draws: Tensor) -> float:
    """Potential scale reduction R̂ of draws (E, N): rank-normalised, each chain split in two, the larger of the plain and the folded value.

    It is 1 if chains agree. Above 1.01, chains are usually considered not to have mixed. It is NaN for fewer than 4 draws and for
    constant draws.
    """
    halves = _split(draws)
    folded = (halves - halves.median()).abs()
    return max(_rhat(_rank_normalise(halves)), _rhat(_rank_normalise(folded)))


def bulk_ess(draws: Tensor) -> float:
    """Bulk effective sample size of draws (E, N), rank-normalised and split: the number of independent draws with the same precision."""
    return _ess(_rank_normalise(_split(draws)))


FEW_CHAINS = 4
"""With at least this many chains, the standard error is computed from the means of the chains."""

BATCHES = 8
"""With fewer chains, it is computed from the means of at least this many stretches of draws, over all chains."""


def mcse_of_mean(draws: Tensor) -> float:
    r"""Monte-Carlo standard error of the mean of draws (E, N), in the units of the draws.

    It is s/√E · t/2, where s is the standard deviation of the chains' means, and t the 97.5 % point of Student's distribution with E − 1
    degrees of freedom. So ± 2 errors is a 95 % interval. The means of chains are independent for every kernel. An estimate from
    autocorrelations would assume a reversible chain, which underdamped Langevin dynamics is not (benchmarks/llc/standard_errors.py).
    Fewer than FEW_CHAINS chains are cut into stretches, and the means of these are used instead. The result is NaN if there are too few
    draws for that.
    """
    draws = draws.double()
    chains, length = draws.shape
    if chains < FEW_CHAINS:
        count = _stretches(chains)
        if length < 2 * count:
            return math.nan
        draws = torch.cat([part.mean(dim=1, keepdim=True) for part in draws.tensor_split(count, dim=1)]).reshape(-1, 1)
    means = draws.mean(dim=1)
    return float(means.std()) / math.sqrt(len(means)) * student_factor(len(means) - 1)


def independent_parts(chains: int, length: int) -> Iterator[tuple[int, slice]]:
    """The parts of draws (E, N) whose means `mcse_of_mean` uses, as (chain, slice of draws).

    They are whole chains, or stretches if there are fewer than FEW_CHAINS chains. If there are too few draws for stretches, they are whole
    chains.
    """
    count = 1 if chains >= FEW_CHAINS or length < 2 * _stretches(chains) else _stretches(chains)
    edges = [0, *itertools.accumulate(length // count + (part < length % count) for part in range(count))]
    for chain in range(chains):
        for start, stop in itertools.pairwise(edges):
            yield chain, slice(start, stop)


def _stretches(chains: int) -> int:
    """The number of stretches into which each of few chains is cut."""
    return -(-BATCHES // chains)


def student_factor(freedom: int) -> float:
    """t(97.5 %)/2 of Student's distribution: the factor by which ± 2 errors from few independent values become a 95 % interval."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975)) / 2


def _split(draws: Tensor) -> Tensor:
    """(E, N) -> (2E, N // 2) in float64; an odd middle draw is left out."""
    half = draws.shape[1] // 2
    draws = draws.double()
    return torch.cat((draws[:, :half], draws[:, draws.shape[1] - half :]))


def _rank_normalise(draws: Tensor) -> Tensor:
    """Φ⁻¹((rank − 3/8) / (S + 1/4)) over all S draws; ties share their mean rank (Blom 1958)."""
    _, inverse, counts = torch.unique(draws.flatten(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean_rank = last - (counts.double() - 1) / 2
    ranks = mean_rank[inverse].reshape(draws.shape)
    return torch.special.ndtri((ranks - 0.375) / (draws.numel() + 0.25))


def _rhat(draws: Tensor) -> float:
    """√(pooled variance / mean within-chain variance) of draws (E, N)."""
    length = draws.shape[1]
    if length < 2:
        return math.nan
    within = draws.var(dim=1).mean()
    between = draws.mean(dim=1).var() if draws.shape[0] > 1 else torch.zeros((), dtype=draws.dtype)
    if within == 0:
        return math.nan
    return math.sqrt(float((length - 1) / length + between / within))


def _autocovariance(draws: Tensor) -> Tensor:
    """Biased autocovariances (E, N) of each chain at lags 0..N-1, by the fast Fourier transform."""
    length = draws.shape[1]
    centred = draws - draws.mean(dim=1, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * length)
    return torch.fft.irfft(spectrum.abs().square(), n=2 * length)[:, :length] / length


def _ess(draws: Tensor) -> float:
    """Number of draws / integrated autocorrelation time, over chains (E, N); at most S log10 S, as in Stan."""
    chains, length = draws.shape
    total = chains * length
    if length < 3 or not bool(torch.isfinite(draws).all()) or float(draws.std()) == 0.0:
        return math.nan
    covariance = _autocovariance(draws)
    within = float(covariance[:, 0].mean()) * length / (length - 1)
    pooled = within * (length - 1) / length
    if chains > 1:
        pooled += float(draws.mean(dim=1).var())
    rho = (1.0 - (within - covariance.mean(dim=0)) / pooled).tolist()
    rho[0] = 1.0
    # Geyer: for a reversible chain, sums of neighbouring pairs are positive and decreasing. After the first that is not, rho is noise.
    pairs_sum, previous, lag = 0.0, math.inf, 0
    while lag + 1 < length:
        pair = rho[lag] + rho[lag + 1]
        if pair <= 0:
            break
        previous = min(previous, pair)
        pairs_sum += previous
        lag += 2
    time = max(2.0 * pairs_sum - 1.0, 1.0 / math.log10(max(total, 10)))
    return total / time
