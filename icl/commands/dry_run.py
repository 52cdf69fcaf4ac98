"""`--dry-run`: lists the runs of a sweep, how they differ and what they will cost. It starts none of them."""

import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from rich.console import Console
from rich.table import Table

from icl.config.settings import dotted
from icl.config.varying import varying
from icl.devices import available_cores, runs_at_once
from icl.estimation import LLCConfig
from icl.estimation.kept import settings_of
from icl.execution.closing import short_name
from icl.execution.forecast import Forecast, forecast_llc, forecast_training, wall_seconds
from icl.execution.names import RunConfig, training_of
from icl.execution.surroundings import Surroundings
from icl.sampling.presets import preset_of

LONG_S = 120.0
"""If the runs will take longer than this, a line says so before they start."""

MANY_STEPS = 10_000
"""With fewer steps in all, runs start without a measurement."""

QUICK_S = 0.3
"""Seconds of one measurement before a start."""


def forecasts(configs: Sequence[RunConfig], place: Surroundings, measured_s: float) -> list[Forecast]:
    """The cost of each run. Runs of equal size and length are measured once."""
    known: dict[str, Forecast] = {}
    found = []
    for config in configs:
        alike = _cost_decides(config)
        if alike not in known:
            known[alike] = (
                forecast_llc(config, place, measured_s)
                if isinstance(config, LLCConfig)
                else forecast_training(config, place, measured_s)
            )
        found.append(known[alike])
    return found


def dry_run(configs: Sequence[RunConfig], place: Surroundings, jobs: int, startup_s: float) -> None:
    """Print the runs (`icl.execution.names.distinct`) and their cost. The first column is the number that `--index` takes."""
    all_settings = [_settings(config) for config in configs]
    differing = varying(all_settings)
    costs = forecasts(configs, place, 1.0)
    table = Table(title=f"{len(configs)} runs; none is started", title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("run", overflow="fold")
    for setting in differing:
        table.add_column(short_name(setting, differing), justify="right")
    for heading in ("parameters", "checkpoints", "time", "disk"):
        table.add_column(heading, justify="right")
    for index, (config, settings, cost) in enumerate(zip(configs, all_settings, costs, strict=True)):
        flat = dotted(settings)
        table.add_row(
            str(index), config.name, *(str(flat.get(setting)) for setting in differing), f"{cost.parameters:,}",
            f"{cost.checkpoints:,}", _span(cost.seconds, cost.most_seconds), in_bytes(cost.bytes),
        )  # fmt: skip
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
    print(_in_all(costs, jobs, startup_s))
    step = f"{costs[0].step_seconds * 1e3:.3g} ms"
    print(
        f"Measured on this machine's {place.device}: a step of the first run takes {step}. Other work on the machine makes it longer."
    )
    if any(isinstance(config, LLCConfig) and config.sampler_config.step_size is None for config in configs):
        print("The sampler first finds its own step size; the time of these pilot chains is not included.")


def say_before_a_long_start(configs: Sequence[RunConfig], place: Surroundings, jobs: int) -> None:
    """Print one line on the cost of the runs that are about to start, if they take long."""
    if not _may_be_long(configs):
        return
    started = time.perf_counter()
    try:
        costs = forecasts(configs, place, QUICK_S)
    except (ValueError, RuntimeError, OSError):
        return  # the runs themselves will report what is wrong
    if wall_seconds([cost.seconds for cost in costs], jobs) > LONG_S + (time.perf_counter() - started):
        print(
            f"icl: {_in_all(costs, jobs, 0.0)} (less if part of it is done already; --dry-run shows each run)",
            file=sys.stderr,
        )


def jobs_of(configs: Sequence[RunConfig], place: Surroundings, jobs: int | None) -> tuple[int, int]:
    """How many runs are done at a time, and the threads of each."""
    cores = available_cores(place.device)
    if len(configs) == 1:
        return 1, jobs or cores
    at_once = jobs or runs_at_once(place.device)
    return at_once, max(cores // min(at_once, len(configs)), 1)


def in_bytes(count: float) -> str:
    """A size in bytes as text, in B, kB, MB or GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit always returns")


def _in_all(costs: Sequence[Forecast], jobs: int, startup_s: float) -> str:
    least, most = (
        wall_seconds([getattr(cost, name) for cost in costs], jobs, startup_s) for name in ("seconds", "most_seconds")
    )
    size = in_bytes(sum(cost.bytes for cost in costs))
    at_once = f"{len(costs)} runs, {min(jobs, len(costs))} at a time" if len(costs) > 1 else "one run"
    return f"{at_once}: about {_span(least, most)} and {size} of disk"


def _span(least: float, most: float) -> str:
    first, last = str(timedelta(seconds=max(round(least), 1))), str(timedelta(seconds=max(round(most), 1)))
    return first if first == last else f"{first} to {last}"


def _settings(config: RunConfig) -> dict[str, object]:
    if not isinstance(config, LLCConfig):
        return {
            key: value
            for key, value in config.without_derived_seeds().model_dump(mode="json").items()
            if key in config.decides
        }
    settings = settings_of(config)
    preset = preset_of(config.sampler_config)
    return {**settings, "sampler_config": preset} if preset else settings


def _cost_decides(config: RunConfig) -> str:
    """All settings on which a run's cost depends, as text: everything but seeds, names and the learning rate."""
    training = training_of(config)
    data = training.model_dump(
        mode="json", exclude={"run_name": True, "optimizer_config": {"lr": True}, "scheduler_config": True}
    )
    data["task_config"] = {key: value for key, value in data["task_config"].items() if not key.endswith("seed")}
    text = json.dumps(data, sort_keys=True)
    if isinstance(config, LLCConfig):
        text += config.model_dump_json(
            include={"subject", "subject_config", "steps", "step", "checkpoints", "checkpoint_idx", "testing"}
        )
        text += config.sampler_config.model_dump_json(exclude={"epsilon", "gamma", "nbeta", "init_seed"})
        text += str(config.sampler_config.step_size is None)
    return text


def _may_be_long(configs: Sequence[RunConfig]) -> bool:
    """Whether the runs are long enough to be measured first."""
    steps = 0
    for config in configs:
        if not isinstance(config, LLCConfig):
            steps += config.num_steps
        else:
            sampler = config.sampler_config
            steps += sampler.num_chains * (sampler.num_burnin_steps + sampler.num_draws)
    return steps > MANY_STEPS
