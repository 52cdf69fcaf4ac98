"""The verdict on an estimate: tests of its chains, each with its outcome and, if it failed, what to do."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from icl.sampling.stein import UNKNOWN, Ratio

RHAT_LIMIT = 1.1
ESS_LIMIT = 100.0
RISE_LIMIT = 3.0
FEWEST_FOR_RISE = 3
"""Chains that the test for a rise needs. With fewer, split R̂ alone looks for one. Such an estimate is not healthy anyway: whether w* is the
minimum is not tested."""
FEWEST_OF_A_THIRD = 10
HEATING_LIMIT = 0.1
BASIN_SLACK = 0.05
TOLERANCE = 0.1
"""The allowed distance of a ratio from 1. A test fails if the distance exceeds this by more than ERRORS standard errors."""
ERRORS = 3.0
PASS = 0.2
"""A ratio that did not fail passes if its distance from 1, plus two standard errors, is at most this. Otherwise it is not tested."""
ERROR_SHARE, LEAST_ERROR = 0.1, 0.1
COST_SHARE, LEAST_COST = 0.05, 0.1
BALL_DECIDES = 0.75
"""If −dλ̂/d log γ, in units of λ̂, is above this, the localisation decides the estimate. It is 1 if λ̂ is proportional to 1/γ."""
MOST_AT_BOX = 0.01
FORGOTTEN = 10.0
"""The number of relaxation times after which a direction counts as explored."""

Outcome = Literal["passed", "failed", "not tested"]


@dataclass(frozen=True)
class Finding:
    """One test: its name and its outcome. If it did not pass, `text` has what was measured and what to do.

    Attributes:
        times: the factor by which the number of steps must grow to decide the test; 1 if more steps do not help.
        hot: the ratio of the chains' temperature to the target's in the directions tested; 1 for a test that does not measure it.
    """

    name: str
    outcome: Outcome
    text: str = ""
    times: float = 1.0
    hot: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """Whether an estimate may be trusted, and if not, why. It is trusted if every test has passed."""

    trusted: bool
    text: str
    findings: tuple[Finding, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether no test failed. Some may not have been decided, for example in a short run."""
        return all(finding.outcome != "failed" for finding in self.findings)


@dataclass(frozen=True)
class Evidence:
    """The measurements that the tests of the target use (`icl.sampling.stein`, `icl.sampling.checks`).

    Attributes:
        stiff, virial: the two Stein identities, as ratios that are 1 for the target; NaN if they were not measured.
        temperature: the kinetic temperature; NaN for kernels without momentum.
        at_box: share of coordinates at the wall of the bounding box.
        cost, twin: how much smaller λ̂ is because w* is not the minimum, by the loss at the chains' mean and by the gradient at w*.
        sensitivity: −dλ̂/d log γ.
        held: for a quadratic loss a lower bound of the sensitivity in units of λ̂, with little noise (`icl.sampling.stein.held_share`).
        unknown_gradient: the share of λ̂ that is lost because the control variate's mean gradient comes from few samples.
        pairing: how much larger λ̂ is because a chain's position depends on the batch that its loss is taken on.
    """

    stiff: Ratio = UNKNOWN
    virial: Ratio = UNKNOWN
    temperature: Ratio = UNKNOWN
    at_box: float = 0.0
    cost: Ratio = UNKNOWN
    twin: Ratio = UNKNOWN
    sensitivity: Ratio = UNKNOWN
    held: Ratio = UNKNOWN
    unknown_gradient: float = 0.0
    pairing: Ratio = UNKNOWN


def judge(
    excess: Tensor,
    *,
    num_lost: int,
    rhat: float,
    ess: float,
    mcse: float,
    mean_loss: float,
    init_loss: float,
    reference_loss: float | None,
    noise_heating: float = 0.0,
    init_error: float = 0.0,
    evidence: Evidence,
) -> Verdict:
    """Judge the healthy chains' trace of nβ(L − L(w*)).

    Args:
        excess: (E, N), chains that stayed finite.
        num_lost: the number of chains that diverged.
        mean_loss, init_loss: E[L] and L(w*).
        reference_loss: a loss that no useful model exceeds, such as that of predicting zero; chains above it have left the basin. Early in
            training w* itself is hardly better than that. Then chains may rise by BASIN_SLACK of it above w*, and the verdict cannot tell
            whether they left.
        noise_heating: what the batches' noise adds to the mean.
        init_error: the part of `mcse` that comes from the batches of L(w*).
        evidence: the measurements for the tests of the target.
    """
    if len(excess) == 0:
        lost = _finding("chains", f"{num_lost} of {num_lost} chains diverged: smaller epsilon")
        return _verdict([lost])
    chains = num_lost + len(excess)
    mean = float(excess.mean())
    findings = [
        _finding("chains", f"{num_lost} of {chains} chains diverged: smaller epsilon" if num_lost else ""),
        _basin(mean_loss, init_loss, reference_loss),
        *_stationary(excess, rhat, ess, mcse),
        *judge_target(evidence),
        _heating(noise_heating, mean),
        _pairing(evidence.pairing, mean),
        _mean_gradient(evidence.unknown_gradient),
        _minimum(evidence, mean),
        _certainty(mean, mcse, init_error),
        judge_ball(evidence, mean),
    ]
    return _verdict(findings)


def _verdict(findings: list[Finding]) -> Verdict:
    failed = [finding.text for finding in findings if finding.outcome == "failed"]
    untested = [f"{finding.name} ({finding.text})" for finding in findings if finding.outcome == "not tested"]
    parts = [*failed, *([f"not tested: {', '.join(untested)}"] if untested else [])]
    return Verdict(not parts, "; ".join(parts) if parts else "healthy", tuple(findings))


def _finding(name: str, problem: str) -> Finding:
    return Finding(name, "failed" if problem else "passed", problem)


def _basin(mean_loss: float, init_loss: float, reference_loss: float | None) -> Finding:
    if reference_loss is None:
        return Finding("basin", "not tested", "no weights that know nothing are worse than w*; give reference_loss")
    rim = max(reference_loss, init_loss + BASIN_SLACK * abs(reference_loss))
    if mean_loss <= rim:
        return Finding("basin", "passed")
    # A larger nbeta holds chains by the loss itself; a larger gamma holds them by force.
    return _finding(
        "basin",
        f"left the basin: the chain loss {mean_loss:.4g} is above {rim:.4g}, that of a model that has learnt nothing "
        "(larger gamma or nbeta, smaller epsilon)",
    )


def _stationary(excess: Tensor, rhat: float, ess: float, mcse: float) -> Iterator[Finding]:
    negative = float(excess.mean()) < -2 * mcse
    text = "negative: the chains found lower loss than w*, which is no minimum" if negative else ""
    yield _finding("sign", text)
    if len(excess) >= FEWEST_FOR_RISE:
        yield _rise(excess)
    yield judge_agreement(rhat, ess)


def judge_agreement(rhat: float, ess: float) -> Finding:
    """Whether chains agree, and have enough independent draws to tell."""
    disagree = f"chains disagree: split R-hat {rhat:.3f} is above {RHAT_LIMIT} (more draws, more burn-in)"
    few = f"too few independent draws: effective sample size {ess:.0f} is below {ESS_LIMIT:.0f} (more draws)"
    if math.isnan(rhat) or math.isnan(ess):
        return Finding("agreement", "not tested", "too few draws, or no spread, to compare chains: more draws")
    # R̂² − 1 falls like 1 / draws for chains of one law.
    if rhat > RHAT_LIMIT:
        return Finding("agreement", "failed", disagree, times=(rhat**2 - 1) / (RHAT_LIMIT**2 - 1))
    return (
        Finding("agreement", "failed", few, times=ESS_LIMIT / max(ess, 1.0))
        if ess < ESS_LIMIT
        else _finding("agreement", "")
    )


def judge_target(evidence: Evidence) -> Iterator[Finding]:
    """Whether the chains sample the target."""
    stiff, virial = evidence.stiff, evidence.virial
    yield _ratio(
        "stiff directions", stiff,
        "too hot where the loss is steep: the Stein ratio is {} (smaller epsilon, less noise by larger batches or control variates; "
        "noise_level 1, no weight decay)",
        "too cold where the loss is steep: the Stein ratio is {} (noise_level 1, no bounding box, more burn-in)",
    )  # fmt: skip
    times = times_to_spread(virial.value)
    yield _ratio(
        "all directions", virial,
        "too hot: the virial is {} (smaller epsilon, larger batches, no weight decay)",
        f"not spread: the virial is {{}}, so the soft directions are not explored and λ̂ may be too small (about {times:.2g} times the "
        "steps, or a larger gamma)",
        times,
    )  # fmt: skip
    temperature = evidence.temperature
    if temperature.value - ERRORS * temperature.error > 1 + TOLERANCE:
        yield _finding(
            "temperature",
            f"too hot: the kinetic temperature is {temperature.value:.3g} (smaller epsilon, larger batches)",
        )
    if evidence.at_box > MOST_AT_BOX:
        yield _finding(
            "box",
            f"held by the box: {evidence.at_box:.0%} of the coordinates lie at its wall (no bounding box, or a larger one)",
        )


def times_to_spread(virial: float) -> float:
    """The factor by which the number of steps must grow for a run of FORGOTTEN relaxation times, estimated from the virial.

    After x relaxation times without burn-in, the mean square of a direction is the share 1 − (1 − e^{−2x}) / 2x of its stationary value.
    """
    if not virial < 0.95:
        return 1.0
    low, high = 1e-6, FORGOTTEN
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if 1 + math.expm1(-2 * middle) / (2 * middle) < virial else (low, middle)
    return FORGOTTEN / high


def _ratio(name: str, ratio: Ratio, above: str, below: str, times_below: float = 1.0) -> Finding:
    if math.isnan(ratio.value) or math.isnan(ratio.error):
        return Finding(name, "not tested", "too few tested draws, or no clear curvature: more draws")
    shown, off = f"{ratio.value:.2f} ± {ratio.error:.2f}", abs(ratio.value - 1)
    if off - ERRORS * ratio.error > TOLERANCE:
        if ratio.value > 1:
            return Finding(name, "failed", above.format(shown), hot=ratio.value)
        return Finding(name, "failed", below.format(shown), times_below)
    if off + 2 * ratio.error > PASS:
        # With this many times the draws, a ratio whose distance from 1 is at most PASS / 2 would pass.
        times = (2 * ratio.error / (PASS - min(off, PASS / 2))) ** 2
        return Finding(name, "not tested", f"too noisy to say: {shown}; more draws or larger batches", max(times, 2.0))
    return Finding(name, "passed")


def _heating(noise_heating: float, mean: float) -> Finding:
    if math.isnan(noise_heating):
        text = (
            "no formula for what the batches' noise adds with this kernel; sgld or langevin, or one batch with all data"
        )
        return Finding("batch noise", "not tested", text)
    hot = noise_heating > HEATING_LIMIT * max(abs(mean), 1.0)
    text = (
        f"heated by its batches: their noise adds about {noise_heating:.3g} to the estimate "
        "(larger batches, control variates, smaller epsilon or smaller nbeta)"
    )
    return _finding("batch noise", text if hot else "")


def _pairing(pairing: Ratio, mean: float) -> Finding:
    """Whether the order of the batches biases the estimate.

    In a cycle of batches, the deviations from the mean gradient sum to 0. If this batch deviates in one direction, the other batches
    deviate in the opposite direction in sum, and the chain has followed those.
    """
    off = abs(pairing.value) - ERRORS * pairing.error
    text = (
        f"the order of the batches adds about {pairing.value:.2g}: a chain has followed the others to where the loss of the next is higher "
        '(batch_order "random", or control variates)'
    )
    return _finding("batch order", text if off > COST_SHARE * abs(mean) else "")


def _mean_gradient(share: float) -> Finding:
    text = (
        f"the mean gradient at w* is that of too few samples: its error lowers the estimate by about {share:.0%} "
        "(larger batches, more draws, a smaller nbeta)"
    )
    return _finding("mean gradient", text if share > HEATING_LIMIT else "")


def _minimum(evidence: Evidence, mean: float) -> Finding:
    if evidence.unknown_gradient > HEATING_LIMIT:
        return Finding("minimum", "not tested", "needs a mean gradient from more samples")
    known = [
        each for each in (evidence.cost, evidence.twin) if not math.isnan(each.value) and not math.isnan(each.error)
    ]
    if not known:
        return Finding("minimum", "not tested", "whether w* is a minimum of this loss")
    worst = max(known, key=lambda each: each.value - ERRORS * each.error)
    allowed = max(COST_SHARE * abs(mean), LEAST_COST)
    text = (
        f"w* is not the minimum of this loss, which lowers the estimate by about {worst.value:.2g} (train it further on these data, "
        "or take another w*)"
    )
    return _finding("minimum", text if worst.value - ERRORS * worst.error > allowed else "")


def _certainty(mean: float, mcse: float, init_error: float) -> Finding:
    if math.isnan(mcse):
        return Finding("error", "not tested", "too few draws for a standard error")
    allowed = max(ERROR_SHARE * abs(mean), LEAST_ERROR)
    if init_error >= allowed:
        text = (
            f"too uncertain to say: L(w*) is on other batches than the draws, which gives λ̂ an error of {init_error:.2g}, above "
            f"{allowed:.2g} (leave num_init_loss_batches out, so that the batches' noise cancels)"
        )
        return _finding("error", text)
    times = (mcse**2 - init_error**2) / (allowed**2 - init_error**2)  # draws do not reduce the error of L(w*)
    text = f"too uncertain to say: the standard error {mcse:.2g} is above {allowed:.2g} (about {times:.2g} times the draws)"
    return Finding("error", "failed", text, times) if mcse > allowed else _finding("error", "")


def judge_ball(evidence: Evidence, mean: float) -> Finding:
    """Whether the localisation decides the estimate, not the model."""
    sensitivity, held = evidence.sensitivity, evidence.held
    if math.isnan(sensitivity.value) and math.isnan(held.value):
        return Finding("localisation", "not tested", "no tested draws or distances to decide it")
    by_far = (
        sensitivity.value - 2 * sensitivity.error > BALL_DECIDES * abs(mean)
        or held.value - 2 * held.error > BALL_DECIDES
    )
    if by_far and mean > 0:
        text = "the localisation decides, not the model: the estimate is nearly proportional to 1/gamma (smaller gamma)"
        return _finding("localisation", text)
    if held.value + 2 * held.error > BALL_DECIDES:
        return Finding(
            "localisation",
            "not tested",
            f"its share is {held.value:.2f} ± {held.error:.2f}; smaller gamma or more draws",
            max((2 * held.error / max(abs(BALL_DECIDES - held.value), 1e-3)) ** 2, 2.0),
        )
    return _finding("localisation", "")


def _rise(excess: Tensor) -> Finding:
    """Whether the last third of the draws is above the middle third by more than chance, from the spread of the difference over chains."""
    third = excess.shape[1] // 3
    if third < FEWEST_OF_A_THIRD:
        return Finding("rise", "not tested", f"fewer than {3 * FEWEST_OF_A_THIRD} draws: more draws")
    gain = excess[:, -third:].mean(dim=1) - excess[:, third : 2 * third].mean(dim=1)
    error = float(gain.std()) / len(gain) ** 0.5
    mean = float(gain.mean())
    rising = mean > RISE_LIMIT * error and mean > 0.05 * float(excess.mean().abs())
    return _finding("rise", "still rising: more burn-in" if rising else "")
