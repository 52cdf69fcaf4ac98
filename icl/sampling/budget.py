"""How long chains run: the configured draws, and then more draws until the estimate is precise enough or a maximum is reached.

An estimate is checked after num_draws draws, and again whenever the number of draws has grown by half. These numbers do not depend on the
maximum. So an estimate that stopped at its maximum and is resumed equals, bit for bit, one that had the larger maximum from the beginning.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from icl.sampling.chains import ChainRun, Chains, Paused, Progress
from icl.sampling.config import SamplerConfig
from icl.sampling.plan import Plan, StepData
from icl.sampling.result import LLCResult
from icl.sampling.tuning import Tuned
from icl.sampling.verdict import ERROR_SHARE, LEAST_ERROR, judge_agreement, judge_target

logger = logging.getLogger(__name__)

SoFar = Callable[[float, float], None]
"""Called with (λ̂, its standard error) from the draws so far."""

MOST_TIMES = 4
PARTS = 10
"""How often λ̂ so far is reported between two checks."""

MOST_RETRIES = 3
SHORTER = 0.25
"""Factor of ε after chains were lost at the pilot's step size. It halves the time per step, √ε."""

MAY_DIFFER = ("max_draws", "target_error", "cores", "max_memory_bytes")
"""Settings that may differ between an estimate and the one that continues it."""


def sampled(
    plan: Plan,
    seeds: Sequence[int],
    progress: Progress | None = None,
    so_far: SoFar | None = None,
    before: LLCResult | None = None,
    may_go_on: bool = True,
) -> tuple[ChainRun, Paused]:
    """The configured draws, and more while the standard error is above the target; and the final state of the chains.

    Args:
        plan: what is sampled, and how.
        seeds: one seed per chain.
        progress: called with (steps done, steps in all).
        so_far: called with the estimate so far.
        before: an earlier estimate to continue; None: start at w*.
        may_go_on: whether there may be more draws than configured.
    """
    config = plan.config
    most = draws_at_most(config) if may_go_on else config.num_draws
    chains = Chains(plan, seeds, None if before is None else before.paused)
    run = None if before is None else before.run
    for planned in lengths(config.num_draws):
        length = min(planned, most)
        have = 0 if run is None else run.losses.shape[1]
        if have > length:
            continue
        burn_in = config.num_burnin_steps if run is None else 0
        whole, done = burn_in + (length - have) * config.num_steps_bw_draws, 0
        for draws in _parts(length - have, 1 if so_far is None else PARTS):
            steps = draws * config.num_steps_bw_draws + (burn_in if done == 0 else 0)
            part = chains.advance(draws, None if progress is None else _share_of(progress, done, steps, whole))
            done += steps
            run = part if run is None else run.followed_by(part)
            if so_far is not None:
                result = LLCResult(run, config, 0, init_error=plan.init_error(run.losses.shape[1]))
                so_far(result.llc_mean, result.llc_mcse)
        assert run is not None
        if length == most or _precise(config, run, plan.init_error(length)):
            return run, chains.paused()
    raise AssertionError("lengths have no end")


def without_losses(
    plan: Plan, seeds: Sequence[int], progress: Progress | None, so_far: SoFar | None, may_go_on: bool
) -> tuple[Plan, ChainRun, Paused]:
    """`sampled` at the pilot's step size. If chains are lost, try again with a shorter one: they met stiffer places than the pilot."""
    for retry in range(MOST_RETRIES + 1):
        run, paused = sampled(plan, seeds, progress, so_far, may_go_on=may_go_on)
        lost = int((~run.healthy).sum())
        if not lost or retry == MOST_RETRIES or plan.recorders:
            break
        epsilon = plan.config.epsilon
        assert epsilon is not None
        logger.warning("%d of %d chains diverged at epsilon %.3g; again at a quarter of it", lost, len(seeds), epsilon)
        plan = replace(plan, config=plan.config.model_copy(update={"epsilon": SHORTER * epsilon}))
    return plan, run, paused


def lengths(draws: int) -> Iterator[int]:
    """The numbers of draws at which an estimate is checked."""
    while True:
        yield draws
        draws += max(draws // 2, 1)


def draws_at_most(config: SamplerConfig) -> int:
    """The most draws of a chain."""
    return config.num_draws if config.target_error is None else config.max_draws or MOST_TIMES * config.num_draws


def with_found(config: SamplerConfig, tuned: Tuned, seed: int) -> SamplerConfig:
    """The settings with the constants that the pilot chains found. With these settings the run can be repeated."""
    found = {
        "sampling_method": "langevin", "init_seed": seed, "epsilon": tuned.epsilon, "gamma": tuned.gamma, "friction": tuned.friction,
        "control_variates": "on" if tuned.control else "off", "batch_order": "random" if config.shuffled else "in turn",
    }  # fmt: skip
    return config.model_copy(update=found)


def check_resumable(before: LLCResult, plan: Plan, seeds: Sequence[int]) -> None:
    """Check that chains of this plan may continue an earlier estimate.

    Raises:
        ValueError: the estimate kept no chains, was made with other settings, weights or batches, records more than losses, or
            leaves nothing to do.
    """
    paused, config = before.paused, plan.config
    if paused is None or plan.recorders:
        raise ValueError("only an estimate without recorders and observables can be resumed; start a new estimate")
    other = before.config.model_copy(update={name: getattr(config, name) for name in MAY_DIFFER})
    differing = [name for name in type(config).model_fields if getattr(other, name) != getattr(config, name)]
    if differing:
        name = differing[0]
        raise ValueError(
            f"resume: {name} was {getattr(before.config, name)!r} and is {getattr(config, name)!r}; only {', '.join(MAY_DIFFER)} may change"
        )
    draws = before.run.losses.shape[1]
    if draws_at_most(config) < draws:
        raise ValueError(f"resume: there are {draws:,} draws; give target_error and a larger max_draws")
    if not torch.equal(paused.state.anchor[0], plan.anchors[0].cpu()):
        raise ValueError("resume: the model has other weights than in the estimate to continue; pass the same model")
    if plan.init_losses is None and plan.evaluation is None:
        now = StepData(plan, config.num_burnin_steps, seeds).anchor_losses().cpu()
        if not torch.allclose(now, before.run.anchor_losses[:, 0], rtol=1e-5):
            raise ValueError(
                "resume: the batches differ from those of the estimate to continue; a DataLoader that shuffles gives others each time, so "
                "pass the same list of batches, list(loader)"
            )


def _share_of(progress: Progress, before: int, steps: int, whole: int) -> Progress:
    """A callback for the progress of a part with `steps` steps that reports it as progress of the whole.

    `before` is the number of steps before the part. Steps of all groups count.
    """

    def told(now: int, total: int) -> None:
        groups = total // steps
        progress(groups * before + now, groups * whole)

    return told


def _parts(draws: int, count: int) -> Iterator[int]:
    """The sizes of `count` nearly equal parts of `draws` draws."""
    count = min(count, draws)
    for part in range(count):
        yield draws * (part + 1) // count - draws * part // count


def _precise(config: SamplerConfig, run: ChainRun, init_error: float) -> bool:
    """Whether more draws are not needed, or would not help.

    They are not needed if the standard error is below the target and below the limit of the verdict, chains agree, there are enough
    independent draws, and all tests of the target have a result. They would not help if chains are lost.
    """
    assert config.target_error is not None
    result = LLCResult(run, config, 0, init_error=init_error)
    if not result.any_healthy or result.num_lost:
        return True
    share, mean = config.target_error, abs(result.llc_mean)
    target = min(max(share * mean, 10 * share), max(ERROR_SHARE * mean, LEAST_ERROR))
    if not result.llc_mcse <= target or judge_agreement(result.llc_rhat, result.llc_ess).outcome != "passed":
        return False
    return all(finding.outcome != "not tested" for finding in judge_target(result.evidence))
