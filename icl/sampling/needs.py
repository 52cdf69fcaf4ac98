r"""If the budget of an estimate was too small: what would suffice, in numbers.

Two things can be missing.

- **Length.** A test asks for `times` as many steps. If an error is too large, this is (error / allowed)². If a direction has not spread, it
  is as many as the direction needs to forget its start ten times.
- **Less noise.** Batch noise adds the share y to λ̂ (`icl.sampling.checks.noise_heating`). To first order, y is proportional to the
  effective step ε' and to 1 / batch size. It is also proportional to (nβ)² for plain gradients, and to nβ for gradients with a
  control variate, whose noise grows with ‖w − w*‖² ~ 1/nβ. Let q = y / NOISE_SHARE. Any one of the following reduces y to NOISE_SHARE:
  ε' / q with q times the steps, batches q times as large, or nβ / √q (plain) or nβ / q (controlled).

If the pilot found the step, y is NOISE_SHARE already, and the noise makes the steps too short. Batches `times` as large then allow steps
`times` as long, up to the longest stable ones.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from icl.sampling.tuning import NOISE_SHARE, SAFETY, STIFF_SHARE, effective_step
from icl.sampling.verdict import HEATING_LIMIT, Finding

MOST = 1e9
"""The most steps that are reported. A larger number would mean nothing."""


@dataclass(frozen=True)
class Effort:
    """What an estimate spent.

    Attributes:
        steps: steps of each chain.
        epsilon: ε.
        friction: η; None for SGLD.
        nbeta: nβ.
        batch: samples in the batch of a gradient; None if the batch never changes.
        samples: n, the number of samples of finite data; None if the data are infinite.
        control: whether gradients have a control variate.
        found: whether the pilot found the step size.
        longest: the longest stable effective step ε'; NaN if λ_max is not known.
        plain, controlled: what batch noise adds to λ̂ without and with the control variate; NaN if it is not known.
    """

    steps: int
    epsilon: float
    friction: float | None
    nbeta: float
    batch: int | None
    samples: int | None
    control: bool
    found: bool
    longest: float = math.nan
    plain: float = math.nan
    controlled: float = math.nan


@dataclass(frozen=True)
class Needs:
    """What would make the estimate precise enough. Any one of these suffices; None if it would not, or is not known.

    Attributes:
        steps: steps of each chain, with the same batch size.
        epsilon: the step size for these steps, if it must be shorter.
        batch: samples in a batch; `math.inf` means all the data at once.
        control: whether control variates would suffice.
        nbeta: the largest nβ that this budget can answer. This is another question.
    """

    steps: int | None = None
    epsilon: float | None = None
    batch: float | None = None
    control: bool = False
    nbeta: float | None = None

    @property
    def text(self) -> str:
        """The needs in words; empty if nothing is known."""
        parts = []
        if self.steps is not None:
            of = "" if self.epsilon is None else f" of epsilon {self.epsilon:.2g}"
            parts.append(f"about {_round(self.steps):,} steps{of}" + ("" if self.batch is None else " at this batch"))
        if self.batch is not None:
            parts.append(
                "all the data as one batch" if math.isinf(self.batch) else f"batches of {_round(self.batch):,}"
            )
        if self.control:
            parts.append("control variates")
        if self.nbeta is not None:
            parts.append(f"nbeta ≤ {self.nbeta:.2g}" if self.nbeta < 100 else f"nbeta ≤ {_round(self.nbeta):,}")
        return f"needs {', or '.join(parts)}" if parts else ""


def needs_of(effort: Effort, llc: float, findings: Sequence[Finding]) -> Needs:
    """What an estimate with these findings needs."""
    times = max(finding.times for finding in findings)
    failed = max((finding.times for finding in findings if finding.outcome == "failed"), default=1.0)
    share = _share(effort, llc)
    hot = share > HEATING_LIMIT or (
        share > STIFF_SHARE and any(each.outcome == "failed" and each.hot > 1 for each in findings)
    )
    if hot:
        return _quieter(effort, llc, share / NOISE_SHARE, failed)
    too_long = max((1 - 1 / each.hot for each in findings if each.outcome == "failed" and each.hot > 1), default=0.0)
    if too_long and effort.friction is None and not effort.found:
        shorter = too_long / NOISE_SHARE
        return Needs(steps=_steps(effort.steps * failed * shorter), epsilon=effort.epsilon / shorter)
    if times <= 1 or too_long:
        return Needs()
    found = Needs(steps=_steps(effort.steps * times))
    now = effective_step(effort.epsilon, effort.friction or 0.0)
    if not effort.found or effort.friction is None or effort.batch is None or not times <= effort.longest / now:
        return found
    return Needs(found.steps, None, _batch(effort, times), nbeta=effort.nbeta / times)


def _share(effort: Effort, llc: float) -> float:
    """y. The noise with a control variate was measured at the positions of chains that it had already heated: λ̂ = λ₀ / (1 − y)."""
    added = effort.controlled if effort.control else effort.plain
    if math.isnan(added) or llc <= 0 or effort.batch is None:
        return 0.0
    return added / llc if effort.control else added / max(llc - added, 0.1 * llc)


def _quieter(effort: Effort, llc: float, excess: float, times: float) -> Needs:
    epsilon, longer = effort.epsilon / excess, excess
    if effort.friction is not None:
        epsilon = step_of(effective_step(effort.epsilon, effort.friction) / excess, effort.friction)
        longer = math.sqrt(effort.epsilon / epsilon)  # as much time
    steps = _steps(effort.steps * times * longer)
    if times > 1:  # also too short, so nothing else would suffice alone
        return Needs(steps, epsilon)
    controls = not effort.control and effort.controlled <= STIFF_SHARE * max(llc - effort.plain, 0.1 * llc)
    nbeta = effort.nbeta / (excess if effort.control else math.sqrt(excess))
    return Needs(steps, epsilon, _batch(effort, excess), controls, nbeta)


def step_of(effective: float, friction: float) -> float:
    """ε with ε coth(η√ε / 2) = ε', by bisection: the left side grows with ε."""
    low, high = 0.0, effective
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if effective_step(middle, friction) < effective else (low, middle)
    return high


def longest_step(curvature: float, softest: float) -> float:
    """The longest effective step ε' that the pilot would take without noise."""
    return effective_step(SAFETY**2 / curvature, 2 * math.sqrt(softest))


def _batch(effort: Effort, times: float) -> float:
    assert effort.batch is not None
    size = effort.batch * times
    return math.inf if effort.samples is not None and size >= effort.samples else math.ceil(size)


def _steps(number: float) -> int | None:
    return math.ceil(number) if number <= MOST else None


def _round(number: float) -> int:
    """The number rounded up to two digits."""
    unit = 10 ** max(math.floor(math.log10(max(number, 1))) - 1, 0)
    return math.ceil(number / unit) * unit
