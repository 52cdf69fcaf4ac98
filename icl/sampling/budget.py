"""How long chains run: the draws that were asked for, and more of them until the estimate is precise or a cap is met.

An estimate is looked at after num_draws draws, and then each time that there are half as many again, wherever the cap is. So one that
stopped at its cap and is resumed equals, bit for bit, one that had the larger cap from the beginning.
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
"""(λ̂, its standard error), of the draws so far."""

MOST_TIMES = 4
PARTS = 10
"""Times that λ̂ so far is told between two looks."""

MOST_RETRIES = 3
SHORTER = 0.25
"""Of ε, where chains were lost at a step that the pilot found: half the time per step."""

MAY_DIFFER = ("max_draws", "target_error", "cores", "max_memory_bytes")
"""Settings that may change from an estimate to the one that goes on with it."""


def sampled(
    plan: Plan,
    seeds: Sequence[int],
    progress: Progress | None = None,
    so_far: SoFar | None = None,
    before: LLCResult | None = None,
    may_go_on: bool = True,
) -> tuple[ChainRun, Paused]:
    """The configured draws, and more of them while the standard error is above the target; and where the chains are then.

    Args:
        so_far: told how the estimate comes along.
        before: an estimate to go on with.
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
                result = LLCResult(run, config, 0)
                so_far(result.llc_mean, result.llc_mcse)
        assert run is not None
        if length == most or _precise(config, run):
            return run, chains.paused()
    raise AssertionError("lengths have no end")


def without_losses(
    plan: Plan, seeds: Sequence[int], progress: Progress | None, so_far: SoFar | None, may_go_on: bool
) -> tuple[Plan, ChainRun, Paused]:
    """`sampled` at the pilot's step, or at a shorter one where chains were lost: they had met stiffer places than the pilot did."""
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
    """Numbers of draws at which an estimate is looked at."""
    while True:
        yield draws
        draws += max(draws // 2, 1)


def draws_at_most(config: SamplerConfig) -> int:
    """Where chains stop at the latest."""
    return config.num_draws if config.target_error is None else config.max_draws or MOST_TIMES * config.num_draws


def with_found(config: SamplerConfig, tuned: Tuned, seed: int) -> SamplerConfig:
    """The settings with what the pilot chains found, so that they repeat the run."""
    found = {
        "sampling_method": "langevin", "init_seed": seed, "epsilon": tuned.epsilon, "gamma": tuned.gamma, "friction": tuned.friction,
        "control_variates": "on" if tuned.control else "off", "batch_order": "random" if config.shuffled else "in turn",
    }  # fmt: skip
    return config.model_copy(update=found)


def check_resumable(before: LLCResult, plan: Plan, seeds: Sequence[int]) -> None:
    """Whether chains of this plan may go on with an earlier estimate.

    Raises:
        ValueError: it has kept no chains, was made with other settings, weights or batches, records more than losses, or leaves
            nothing to do.
    """
    paused, config = before.paused, plan.config
    if paused is None or plan.recorders:
        raise ValueError(
            "only an estimate of losses alone goes on where it stopped, without recorders or observables; start anew"
        )
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
        raise ValueError("resume: the weights of the model are not those of the estimate to go on with")
    if plan.pair and plan.evaluation is None:
        now = StepData(plan, config.num_burnin_steps, seeds).anchor_losses().cpu()
        if not torch.allclose(now, before.run.anchor_losses[:, 0], rtol=1e-5):
            raise ValueError(
                "resume: the batches are not those of the estimate to go on with; a DataLoader that shuffles gives others each time: "
                "pass the same list of batches, list(loader)"
            )


def _share_of(progress: Progress, before: int, steps: int, whole: int) -> Progress:
    """Progress of a part of so many steps, after `before` of the whole, told as progress of the whole; steps of all groups count."""

    def told(now: int, total: int) -> None:
        groups = total // steps
        progress(groups * before + now, groups * whole)

    return told


def _parts(draws: int, count: int) -> Iterator[int]:
    """So many draws in parts."""
    count = min(count, draws)
    for part in range(count):
        yield draws * (part + 1) // count - draws * part // count


def _precise(config: SamplerConfig, run: ChainRun) -> bool:
    """Whether the standard error is below the target and below what a verdict takes, there are enough independent draws of chains that
    agree, and the tests of the target have an answer; more draws do not help lost chains."""
    assert config.target_error is not None
    result = LLCResult(run, config, 0)
    if not result.any_healthy or result.num_lost:
        return True
    share, mean = config.target_error, abs(result.llc_mean)
    precise = result.llc_mcse <= min(max(share * mean, 10 * share), max(ERROR_SHARE * mean, LEAST_ERROR))
    if not precise or judge_agreement(result.llc_rhat, result.llc_ess).outcome == "failed":
        return False
    return all(finding.outcome != "not tested" for finding in judge_target(result.evidence))
