"""The learning coefficient along the checkpoints of a subject: one estimate at each chosen checkpoint."""

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Protocol

import torch
from torch import nn

from icl.estimation.config import LLCConfig
from icl.estimation.estimate import (
    checkpoints_at_once,
    estimates_of,
    finds_localisation,
    with_localisation,
    with_one_localisation,
)
from icl.sampling import LLCResult
from icl.subjects import Subject

Tell = Callable[[int, int], None]
"""Called with (sampling steps done over all checkpoints, steps of one checkpoint, or 0 if not known yet). It may raise, to end the work."""


class Workers(Protocol):
    """Several processes that estimate."""

    def __len__(self) -> int: ...

    def estimates(self, config: LLCConfig, groups: Sequence[Sequence[int]], tell: Tell) -> Generator[list[LLCResult]]:
        """The estimates at each group of checkpoints, in the order of the groups."""
        ...


class _Stopped(Exception):
    """Ends an estimate before it is complete, because the run was asked to stop."""


def estimate_over_run(
    config: LLCConfig,
    subject: Subject,
    done: Sequence[int],
    record: Callable[[int, nn.Module, LLCResult], None],
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    gamma: float | None = None,
    so_far: Callable[[float, float], None] | None = None,
    workers: Workers | None = None,
) -> int:
    """Estimate at every chosen checkpoint that is not in `done`, and record each estimate when it is ready.

    Checkpoints whose chains share a batch are ready together.

    Args:
        config: the settings of the estimates.
        subject: what the estimates are about (`icl.subjects`).
        done: steps whose estimates exist already.
        record: called with each step, its model and its estimate.
        progress: called with (sampling steps done, steps in all), over all checkpoints.
        should_stop: asked before each checkpoint and whenever `progress` is called. An estimate that it ends early is not recorded.
        gamma: the localisation γ of the estimates in `done`, if pilot chains chose it. None: pilot chains choose it now, at the last chosen
            checkpoint, for all checkpoints.
        so_far: called with (λ̂, its standard error) from the draws so far, if checkpoints are sampled one by one. Not called while `workers`
            estimate.
        workers: processes among which the checkpoints are divided, if there is more than one checkpoint. None: this process does all.

    Returns:
        How many chosen checkpoints are left without an estimate.
    """
    chosen = config.chosen_steps(subject.steps())
    todo = [step for step in chosen if step not in set(done)]
    if todo and finds_localisation(config):
        config = (
            with_one_localisation(config, subject, chosen[-1], device)
            if gamma is None
            else with_localisation(config, gamma)
        )
    size = checkpoints_at_once(config, device)
    if workers is not None:
        size = max(1, min(size, -(-len(todo) // len(workers))))
    groups = [todo[start : start + size] for start in range(0, len(todo), size)]
    if workers is not None and len(groups) > 1:
        return len(todo) - _divided(workers, config, subject, groups, record, progress, should_stop)
    start = 0
    for steps, models in _models(subject, groups):
        # Not asked before the first checkpoint. Code may be compiled until its first step, and a signal ends that at once
        # (`stop_signal`).
        if start > 0 and should_stop():
            return len(todo) - start

        def report(now: int, total: int, start: int = start, share: int = len(steps)) -> None:
            if should_stop():
                raise _Stopped
            if progress is not None:
                progress(start * total + share * now, len(todo) * total)

        try:
            results = estimates_of(config, subject, steps, models, device, report, so_far)
            for step, model, result in zip(steps, models, results, strict=True):
                record(step, model, result)
        except _Stopped:
            return len(todo) - start
        start += len(steps)
    return 0


def _divided(
    workers: Workers,
    config: LLCConfig,
    subject: Subject,
    groups: Sequence[Sequence[int]],
    record: Callable[[int, nn.Module, LLCResult], None],
    progress: Callable[[int, int], None] | None,
    should_stop: Callable[[], bool],
) -> int:
    """Estimate in several processes and record here. Returns how many checkpoints were recorded."""
    recorded, count = 0, sum(map(len, groups))

    def tell(now: int, total: int) -> None:
        if should_stop():
            raise _Stopped
        if progress is not None and total > 0:
            progress(now, count * total)

    with suppress(_Stopped), closing(workers.estimates(config, groups, tell)) as estimates:
        for steps, results in zip(groups, estimates, strict=True):
            for step, result in zip(steps, results, strict=True):
                record(step, subject.model(step), result)
                recorded += 1
    return recorded


def _models(subject: Subject, groups: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], list[nn.Module]]]:
    """The steps and models of each group. If the subject allows it, the next group is read while one is being sampled.

    Raises:
        CheckpointError, StorageError: a checkpoint cannot be read. All models before it have been yielded.
    """
    if not getattr(subject, "reads_ahead", False):
        for steps in groups:
            yield steps, [subject.model(step) for step in steps]
        return

    def read(steps: Sequence[int]) -> tuple[list[nn.Module], Exception | None]:
        models: list[nn.Module] = []
        try:
            for step in steps:
                models.append(subject.model(step))
        except Exception as error:
            return models, error
        return models, None

    reader = ThreadPoolExecutor(1)
    try:
        following = reader.submit(read, groups[0]) if groups else None
        for index, steps in enumerate(groups):
            assert following is not None
            models, error = following.result()
            if error is None and index + 1 < len(groups):
                following = reader.submit(read, groups[index + 1])
            if models:
                yield steps[: len(models)], models
            if error is not None:
                raise error
    finally:
        reader.shutdown(wait=False, cancel_futures=True)
