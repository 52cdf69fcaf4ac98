"""The cases of `benchmarks.llc.honesty`: models, batches, settings and seeds, sound and deliberately bad.

Whether a setting is sound is said before sampling (`is_sound`), never by what came out.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.llc.targets import Target, crossing, digits, network, regression, warped
from icl.sampling import AUTOMATIC, SamplerConfig
from icl.sampling.langevin import LangevinConfig, friction_of

DEFAULT = AUTOMATIC.model_copy(update={"num_draws": 2500})
"""`automatic` with five sixths of its draws, to which it may add as it does."""

SHORTER = DEFAULT.model_copy(update={"num_draws": 1500, "num_burnin_steps": 500})
"""Half of its draws, for linear regression."""

FIXED = SamplerConfig(num_chains=8, num_draws=1000, num_burnin_steps=300, epsilon=1.0, gamma=1.0, init_seed=0)

SMALL = 0.1
"""ε λ_max of a short step of SGLD; 4 is where it diverges."""

FORGOTTEN = 10.0
"""Relaxation times of the softest direction that a sound budget holds, burn-in included."""

PRECISE = 0.03
"""Standard error, as a share of λ̂, that linear theory expects of a sound budget: with more, no estimate could be told to be within 10 %."""

Make = Callable[[], Target]


@dataclass(frozen=True)
class Case:
    """One estimate.

    Attributes:
        kind: of setting; those of GOOD are meant well.
        batch: size of the mini-batches; None: all the data.
        step: ε λ_max, with λ_max the largest curvature of the potential; None: found by the pilot.
        settings: in place of DEFAULT's, or of FIXED's where a step is given.
        off: how far every weight of w* is moved.
    """

    name: str
    kind: str
    target: Make
    batch: int | None = None
    step: float | None = None
    settings: Mapping[str, Any] | None = None
    off: float = 0.0
    seed: int = 0

    @property
    def key(self) -> str:
        """What tells it from all others."""
        settings = " ".join(f"{key}={value}" for key, value in sorted((self.settings or {}).items()))
        step = "" if self.step is None else f"step={self.step:g}"
        off = f"off={self.off:g}" if self.off else ""
        return " ".join(
            filter(None, (self.name, f"batch={self.batch or 'all'}", step, settings, off, f"seed={self.seed}"))
        )

    def config(self, target: Target, gamma: float | None, curvature: float) -> SamplerConfig:
        """Its settings; the step in units of the curvature λ_max of the potential, γ that of the model's reference where it has one."""
        given = {"init_seed": self.seed}
        if not target.cuts:
            given["eval_dataset_size"] = target.num_samples
        if gamma is not None:
            given["gamma"] = gamma
        given |= self.settings or {}
        if self.step is None:
            return (SHORTER if target.curvatures is not None else DEFAULT).model_copy(update=given)
        stiffest = curvature + max(given.get("gamma", 1.0) - (gamma or 1.0), 0.0) + given.get("weight_decay", 0.0)
        return FIXED.model_copy(update={"epsilon": self.step / stiffest, **given})


GOOD = ("default", "default, mini-batches", "short step", "langevin, step given", "control variates")
BAD = (
    "step too long", "localisation 1e5", "box", "noise level", "weight decay", "batches of one", "plain batch noise", "w* off",
    "too few draws", "not spread",
)  # fmt: skip


def is_sound(case: Case, config: SamplerConfig, target: Target) -> bool:
    """Whether setting and budget are sound: a kind that is meant well, with so many steps that chains forget their start in the softest
    direction FORGOTTEN times, and with draws for a standard error below PRECISE where linear theory tells it.

    Args:
        config: as used, with what the pilot found.
    """
    if case.kind not in GOOD:
        return False
    nbeta, gamma = config.inverse_temperature, config.localization
    if target.curvatures is None:
        return config.num_steps >= FORGOTTEN * relaxation(config, gamma)
    driven = [nbeta * curvature for curvature in target.curvatures.tolist()]
    times = [relaxation(config, each + gamma) for each in driven]
    parts = [0.5 * each / (each + gamma) for each in driven]
    draws = config.num_chains * config.num_draws
    variance = sum(2 * part**2 * time / draws for part, time in zip(parts, times, strict=True))
    return config.num_steps >= FORGOTTEN * max(times) and math.sqrt(variance) <= PRECISE * sum(parts)


def relaxation(config: SamplerConfig, curvature: float) -> float:
    """Steps in which a chain forgets its place in a direction, by its linear theory."""
    assert config.step_size is not None
    if config.method != "langevin":
        return 2.0 / (config.step_size * curvature)
    friction = friction_of(
        LangevinConfig(nbeta=0.0, gamma=config.localization, weight_decay=config.weight_decay, friction=config.friction)
    )
    root = math.sqrt(max(friction**2 - 4 * curvature, 0.0))
    rate = 2 * curvature / (friction + root) if root else friction / 2
    return 1.0 / (rate * math.sqrt(config.step_size))


def _linear(samples: int, size: int, spread: float = 1.0, flat: int = 0) -> tuple[str, Make]:
    name = (
        f"linear {size}"
        + (f"+{flat} flat" if flat else "")
        + (f", spread {spread:g}" if spread > 1 else "")
        + f", n {samples:,}"
    )
    return name, lambda: regression(name, samples, size, spread, flat)


REGULAR = [
    _linear(500, 3), _linear(1000, 10), _linear(2000, 40), _linear(10_000, 5), _linear(3000, 8, 1e3), _linear(10_000, 6, 1e4),
    _linear(2000, 6, 1.0, 54), _linear(20_000, 20, 100.0),
]  # fmt: skip
CROSSINGS = [
    (f"w1w2, n {n:,}", lambda n=n: crossing((1, 1), 5, n)) for n in (1000, 100_000)
] + [("w1w2^2, n 10,000", lambda: crossing((1, 2), 5, 10_000))]  # fmt: skip
WARPED = [(f"warped {d}", lambda d=d: warped(d, 2**17)) for d in (7, 19)]
REDUCED_RANK = [
    ("7-5-11 rank 2", lambda: network((7, 5, 11), 2, 2**17)),
    ("9-6-8 rank 3", lambda: network((9, 6, 8), 3, 20_000)),
]
DEEP = [
    ("7-5-11-3 rank 1", lambda: network((7, 5, 11, 3), 1, 2**17)),
    ("5-8-6-9-4 rank 2", lambda: network((5, 8, 6, 9, 4), 2, 20_000)),
]
DIGITS = [("digits, n 200", lambda: digits(200))]


def cases(quick: bool = False) -> list[Case]:
    """All of them, the kinds mixed, so that a part of them is a fair sample."""
    found = [*_regular(), *_singular()]
    assert len({case.key for case in found}) == len(found)
    order = sorted(range(len(found)), key=lambda i: (i * 0.6180339887498949) % 1.0)
    mixed = [found[i] for i in order]
    if not quick:
        return mixed
    small = [case for case in mixed if case.name in (REGULAR[0][0], CROSSINGS[0][0]) and case.batch is None]
    return [
        next(case for case in small if case.kind == kind) for kind in ("default", "noise level", "step too long", "box")
    ]


def _regular() -> Iterator[Case]:
    for name, make in REGULAR:
        for seed in (0, 1):
            yield Case(name, "default", make, seed=seed)
            for batch in (20, 100):
                yield Case(name, "default, mini-batches", make, batch, seed=seed)
        yield Case(name, "langevin, step given", make, step=0.5, settings={"sampling_method": "langevin"})
    for name, make in REGULAR[:4]:
        for seed in (0, 1):
            yield Case(name, "short step", make, step=SMALL, seed=seed)
            yield Case(name, "short step", make, step=SMALL, settings={"num_draws": 4000}, seed=seed)
            yield Case(name, "control variates", make, 100, SMALL, {"control_variates": "on"}, seed=seed)
            yield Case(
                name, "control variates", make, 100, SMALL, {"control_variates": "on", "num_draws": 4000}, seed=seed
            )
        yield Case(
            name,
            "control variates",
            make,
            50,
            SMALL,
            {"control_variates": "on", "sampling_method": "langevin", "friction": 60.0},
        )
        yield from _bad(name, make)
        for batch, step in ((1, 0.01), (1, 0.1)):
            yield Case(name, "batches of one", make, batch, step, {"sampling_method": "sgnht"})
            yield Case(name, "batches of one", make, batch, step, {"sampling_method": "rmsprop_sgld"})
        for batch, step, method in ((10, 0.1, "sgld"), (10, 0.5, "langevin"), (50, 0.5, "sgld")):
            yield Case(name, "plain batch noise", make, batch, step, {"sampling_method": method})
        for off in (0.02, 0.05, 0.1):
            yield Case(name, "w* off", make, step=SMALL, off=off)
    for name, make in REGULAR[4:7]:
        for step in (0.1, 0.01):
            yield Case(name, "not spread", make, step=step, settings={"num_burnin_steps": 0})
        yield Case(name, "step too long", make, step=2.0)
        yield Case(name, "noise level", make, step=SMALL, settings={"noise_level": 0.5})


def _bad(name: str, make: Make) -> Iterator[Case]:
    for step in (1.0, 2.0, 3.0, 3.7):
        yield Case(name, "step too long", make, step=step)
    for level in (0.1, 0.8, 1.3):
        yield Case(name, "noise level", make, step=SMALL, settings={"noise_level": level})
    for box in (0.01, 0.05):
        yield Case(name, "box", make, step=SMALL, settings={"bounding_box_size": box})
    yield Case(name, "box", make, step=0.5, settings={"bounding_box_size": 0.05, "sampling_method": "langevin"})
    yield Case(name, "localisation 1e5", make, step=SMALL, settings={"gamma": 1e5})
    yield Case(name, "weight decay", make, step=SMALL, settings={"weight_decay": 100.0})
    for draws in (10, 40):
        yield Case(name, "too few draws", make, step=SMALL, settings={"num_draws": draws, "num_burnin_steps": 0})
    yield Case(name, "not spread", make, step=0.001, settings={"num_burnin_steps": 0})


def _singular() -> Iterator[Case]:
    for family in (CROSSINGS, WARPED, REDUCED_RANK, DEEP, DIGITS):
        for name, make in family:
            for seed in (0, 1):
                yield Case(name, "default", make, seed=seed)
            yield Case(
                name,
                "langevin, step given",
                make,
                step=0.25,
                settings={"sampling_method": "langevin", "num_burnin_steps": 1000, "num_draws": 3000},
            )
            yield Case(name, "noise level", make, step=SMALL, settings={"noise_level": 0.5})
            yield Case(name, "not spread", make, step=0.02, settings={"num_burnin_steps": 0})
        name, make = family[0]
        yield from _bad(name, make)
        yield Case(name, "w* off", make, step=SMALL, off=0.3 if family is CROSSINGS else 0.05)
    for name, make in DIGITS:
        for batch in (20, 100):
            for seed in (0, 1):
                yield Case(name, "default, mini-batches", make, batch, seed=seed)
        yield Case(name, "plain batch noise", make, 10, SMALL)
        yield Case(name, "batches of one", make, 1, SMALL, {"sampling_method": "sgnht"})
        yield Case(name, "batches of one", make, 1, SMALL, {"sampling_method": "rmsprop_sgld"})
