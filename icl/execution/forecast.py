"""The cost of runs before they start: time from a short measurement on this machine, and disk space from file sizes.

Each part of a run (a step, an evaluation, a file) is measured alone and multiplied by how often the run does it. Only a few
files in the system's temporary folder are written.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from icl.checkpoints import Checkpoints
from icl.config import Training
from icl.devices import torch_threads
from icl.estimation import LLCConfig, estimate_at_checkpoint
from icl.estimation.estimate import estimates_of
from icl.execution.llc_run import subject_of
from icl.execution.surroundings import Surroundings
from icl.model import initial_parameters
from icl.sampling.budget import MOST_TIMES
from icl.storage import LocalStore
from icl.tracking.trackers import LocalTracker
from icl.training.loop import stepper_for

MEASURED_S = 1.0
"""About how many seconds one measurement takes."""

ROW_BYTES = 1500
"""About how many bytes a row of metrics has."""


Watch = Callable[[int, int], None]
"""Called with (sampling steps done, steps in all)."""


@dataclass(frozen=True)
class Forecast:
    """The cost of one run.

    Attributes:
        seconds: time of the run, without the start of its process.
        most_seconds: the same if every estimate takes as many draws as it may.
        bytes: space on the disk.
        checkpoints: how many checkpoints the run writes, or at how many it estimates.
        step_seconds: time of one training step, or of one sampling step of all chains.
        parameters: number of parameters of the model.
    """

    seconds: float
    most_seconds: float
    bytes: int
    checkpoints: int
    step_seconds: float
    parameters: int


def forecast_training(config: Training, place: Surroundings, measured_s: float = MEASURED_S) -> Forecast:
    """The cost of a whole training run, measured with the code that would train it."""
    config = config.resolved()
    with stepper_for([config], 0, [{}], place.device, place.threads) as stepper:
        stepper.run(1)  # compiles, and fills caches
        step_s = _seconds_each(lambda: stepper.run(1), measured_s)
        stepper.evaluate()
        evaluation_s = _seconds_each(stepper.evaluate, measured_s / 3)
        weights = {name: value.cpu() for name, value in stepper.weights()[0].items()}
        state = stepper.states()[0]
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, tracker = (
            Checkpoints(LocalStore(Path(folder)), config.name),
            LocalTracker(Path(folder) / "metrics"),
        )
        about = {"config": config.model_dump_json()}
        checkpoint_s = _seconds_each(lambda: checkpoints.save(0, weights, about), measured_s / 10)
        state_s = _seconds_each(lambda: checkpoints.save_state(1, state, about), measured_s / 10)
        row_s = _seconds_each(lambda: tracker.log(0, {"batch/loss": 1.0}), measured_s / 10)
        sizes = checkpoints.store.sizes(checkpoints.prefix)
    weights_bytes, state_bytes = sizes[checkpoints.weights_key(0)], sizes[checkpoints.state_key(1)]
    saved, evaluated = len(config.checkpoint_steps()), len(config.logging_steps())
    states = config.num_steps // config.checkpointer_config.state_every + 1
    rows = evaluated + config.num_steps // config.logger_config.loss_every
    seconds = (
        config.num_steps * step_s + evaluated * evaluation_s + saved * checkpoint_s + states * state_s + rows * row_s
    )
    size = saved * weights_bytes + state_bytes + evaluated * ROW_BYTES + rows * 50
    return Forecast(seconds, seconds, size, saved, step_s, _count(weights))


class _Measured(Exception):
    """Ends an estimate that was started only to measure its speed."""


def forecast_llc(config: LLCConfig, place: Surroundings, measured_s: float = MEASURED_S) -> Forecast:
    """The cost of the estimates along a run, at its checkpoints, or if it has none yet, at those that it will have.

    Pilot chains, by which the sampler may find its own step size, are not included. With a target error, an estimate may
    take up to four times as many draws as asked for: `seconds` is the cost without these, `most_seconds` the cost with all.
    """
    config = config.of(place.with_kept_seed(config.training))
    subject = subject_of(config, place)
    present = subject.steps()
    if present:
        chosen = config.chosen_steps(present)
        model = subject.model(chosen[-1])
        parameters = sum(value.numel() for value in model.parameters())

        def begin(config: LLCConfig, watch: Watch) -> object:
            return next(estimates_of(config, subject, chosen[-1:], [model.to(place.device)], place.device, watch))
    else:
        training = config.training.resolved()
        config = config.of(training)
        chosen = config.chosen_steps(training.checkpoint_steps())
        weights = initial_parameters(training.task_config.shape, training.task_config.model_seed or 0)
        parameters = _count(weights)

        def begin(config: LLCConfig, watch: Watch) -> object:
            return estimate_at_checkpoint(config, weights, place.device, watch)

    begun, step_s, steps = measured_estimate(config, begin, place, measured_s)
    each = begun + steps * step_s
    sampler = config.sampler_config
    most = (
        sampler.max_draws or MOST_TIMES * sampler.num_draws if sampler.target_error is not None else sampler.num_draws
    )
    factor = (sampler.num_burnin_steps + most * sampler.num_steps_bw_draws) / sampler.num_steps
    size = len(chosen) * (ROW_BYTES + sampler.num_chains * 100 * 25)
    return Forecast(each * len(chosen), each * factor * len(chosen), size, len(chosen), step_s, parameters)


def measured_estimate(
    config: LLCConfig,
    begin: Callable[[LLCConfig, Watch], object],
    place: Surroundings,
    measured_s: float = MEASURED_S,
) -> tuple[float, float, int]:
    """Measure an estimate by starting it and ending it early, with the threads that it will have.

    Burn-in is left out, because a draw and the tests of the target take a fifth of a step's time.

    Returns:
        Seconds before its first step, seconds per step, and how many steps it has.
    """
    sampler = config.sampler_config
    update: dict[str, object] = {
        "cores": place.threads if place.device.type == "cpu" else 1,
        "target_error": None,
        "max_draws": None,
        "num_burnin_steps": 0,
        "num_draws": math.ceil(sampler.num_steps / sampler.num_steps_bw_draws),
    }
    if sampler.step_size is None:  # the step size does not change the cost of a step; pilot chains are left out
        update |= {"epsilon": 1e-7, "gamma": 1.0 if sampler.gamma is None else sampler.gamma}
    config = config.model_copy(update={"sampler_config": sampler.model_copy(update=update)})
    start = time.perf_counter()
    seen: list[tuple[float, int, int]] = []

    def watch(done: int, total: int) -> None:
        seen.append((time.perf_counter(), done, total))
        if seen[-1][0] - seen[0][0] > measured_s:
            raise _Measured

    try:
        with torch_threads(place.threads) if place.device.type == "cpu" else nullcontext():
            begin(config, watch)
    except _Measured:
        pass
    except (ValueError, RuntimeError):
        if len(seen) < 2:  # it failed too early for a measurement
            raise
    (first, done, _), (last, reached, total) = seen[0], seen[-1]
    step_s = (last - first) / max(reached - done, 1)
    return max(first - start - done * step_s, 0.0), step_s, total


def wall_seconds(seconds: Sequence[float], jobs: int, startup_s: float = 0.0) -> float:
    """How long all runs take if `jobs` run at a time and the next starts when one ends."""
    ends = [0.0] * max(min(jobs, len(seconds)), 1)
    for each in seconds:
        earliest = ends.index(min(ends))
        ends[earliest] += startup_s + each
    return max(ends)


def _count(weights: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in weights.values())


def _seconds_each(call: Callable[[], object], measured_s: float) -> float:
    """The mean time of a call, over as many calls as fit into `measured_s` seconds."""
    start, calls = time.perf_counter(), 0
    while calls < 3 or (time.perf_counter() - start < measured_s and calls < 1000):
        call()
        calls += 1
    return (time.perf_counter() - start) / calls
