"""What a run of chains is worth, in plain words."""

from dataclasses import dataclass

from torch import Tensor

RHAT_LIMIT = 1.1
ESS_LIMIT = 100.0
RISE_LIMIT = 3.0
HEATING_LIMIT = 0.1
BASIN_SLACK = 0.05


@dataclass(frozen=True)
class Verdict:
    """Whether an estimate may be trusted, and why not."""

    trusted: bool
    text: str


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
) -> Verdict:
    """Judge the healthy chains' trace of nβ(L − L(w*)).

    Args:
        excess: (E, N), chains that stayed finite.
        num_lost: chains that did not.
        mean_loss, init_loss: E[L] and L(w*).
        reference_loss: a loss that no useful model exceeds, such as that of predicting zero; chains above it have left the basin. Where
            w* is itself hardly better or worse, as early in training, chains may rise by BASIN_SLACK of it above w*, and a verdict cannot
            tell whether they left. None leaves the question open everywhere.
        noise_heating: what the batches' noise adds to the mean.
    """
    lost = f"{num_lost} of {num_lost + len(excess)} chains diverged: smaller epsilon" if num_lost else ""
    if len(excess) == 0:
        return Verdict(False, lost)
    problems = [lost] if lost else []
    if reference_loss is not None:
        rim = max(reference_loss, init_loss + BASIN_SLACK * reference_loss)
        if mean_loss > rim:
            # A larger nbeta holds chains by the loss itself; a larger gamma holds them by force.
            problems.append(
                f"left the basin: the chain loss {mean_loss:.4g} is above {rim:.4g}, that of a model that has learnt nothing "
                "(larger gamma or nbeta, smaller epsilon)"
            )
    mean = float(excess.mean())
    if mean < -2 * mcse:
        problems.append("negative: the chains found lower loss than w*, which is no minimum")
    if _rising(excess):
        problems.append("still rising: more burn-in")
    if rhat > RHAT_LIMIT:
        problems.append(f"chains disagree: split R-hat {rhat:.3f} is above {RHAT_LIMIT} (more draws, more burn-in)")
    elif not ess >= ESS_LIMIT:
        problems.append(
            f"too few independent draws: effective sample size {ess:.0f} is below {ESS_LIMIT:.0f} (more draws)"
        )
    if noise_heating > HEATING_LIMIT * max(abs(mean), 1.0):
        problems.append(
            f"heated by its batches: their noise adds about {noise_heating:.3g} to the estimate "
            "(larger batches, smaller epsilon or smaller nbeta)"
        )
    return Verdict(not problems, "; ".join(problems) if problems else "healthy")


def _rising(excess: Tensor) -> bool:
    """Whether the last third lies above the middle third by more than chance, judged by the spread of that difference over chains."""
    third = excess.shape[1] // 3
    if third < 10:
        return False
    gain = excess[:, -third:].mean(dim=1) - excess[:, third : 2 * third].mean(dim=1)
    if len(gain) < 3:
        return False
    error = float(gain.std()) / len(gain) ** 0.5
    mean = float(gain.mean())
    return mean > RISE_LIMIT * error and mean > 0.05 * float(excess.mean().abs())
