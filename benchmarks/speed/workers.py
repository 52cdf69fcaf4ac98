"""Timing variants against a baseline: each in processes of its own, taking turns, on a machine that others may use too.

Every round runs all variants, forwards and backwards by turns, so that a slow spell hits all alike; what is reported
is the median and the quartiles over rounds, of seconds per unit and of the ratio to the baseline in the same round.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

Work = Callable[[], Any]


@dataclass(frozen=True)
class Variant:
    """One way to do the work.

    Attributes:
        name: shown in the table.
        make: called in each worker with its keywords; returns the work of one round.
        keywords: one mapping per worker process; they work at the same time.
        units: what all workers together do in one round.
        threads: of torch, in each worker.
        compiled: False runs as on a machine without a compiler.
    """

    name: str
    make: Callable[..., Work]
    keywords: Sequence[Mapping[str, Any]]
    units: float
    threads: int = 1
    compiled: bool = True


@dataclass(frozen=True)
class Timing:
    """Seconds per unit in each round."""

    name: str
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.seconds)

    def speedup(self, baseline: "Timing") -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of how many times faster than the baseline, round by round."""
        ratios = [theirs / ours for ours, theirs in zip(self.seconds, baseline.seconds, strict=True)]
        low, high = quartiles(ratios)
        return low, statistics.median(ratios), high


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Lower and upper quartile; the value itself, twice, if there is one only."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def take_turns(variants: Sequence[Variant], rounds: int) -> dict[str, Timing]:
    """Time the variants in `rounds` rounds, after one that does not count; by name."""
    crews = [_Crew(variant) for variant in variants]
    try:
        timings = {variant.name: Timing(variant.name) for variant in variants}
        for round_ in range(rounds + 1):
            for crew in crews if round_ % 2 else crews[::-1]:
                seconds = crew.run()
                if round_ > 0:
                    timings[crew.variant.name].seconds.append(seconds / crew.variant.units)
        return timings
    finally:
        for crew in crews:
            crew.dismiss()


class _Crew:
    """The processes of one variant, idle but for their turn."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        # A server that has imported everything forks the workers: they start at once.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__"])
        self._ends: list[Connection] = []
        self._processes = []
        for keywords in variant.keywords:
            ours, theirs = context.Pipe()
            arguments = (theirs, variant.make, dict(keywords), variant.threads, variant.compiled)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)
        self._receive()

    def run(self) -> float:
        """Seconds until the last worker is through its round."""
        start = time.perf_counter()
        for end in self._ends:
            end.send(True)
        self._receive()
        return time.perf_counter() - start

    def dismiss(self) -> None:
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join()

    def _receive(self) -> None:
        for end in self._ends:
            if (error := end.recv()) is not None:
                raise RuntimeError(f"{self.variant.name}: {error}")


def _serve(end: Connection, make: Callable[..., Work], keywords: dict[str, Any], threads: int, compiled: bool) -> None:
    os.environ["ICL_NATIVE"] = "1" if compiled else "0"
    torch.set_num_threads(threads)
    try:
        work = make(**keywords)
        end.send(None)
        while end.recv():
            work()
            end.send(None)
    except EOFError:
        return
    except Exception as error:
        end.send(f"{type(error).__name__}: {error}")
        raise
