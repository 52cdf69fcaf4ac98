"""`icl analyse SWEEP.yaml`: measures the checkpoints of the subjects of an LLC sweep."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from icl import __version__
from icl.analysis.along_subject import SUBJECT_ANALYSES, Measured, analyse_subject, check_analyses
from icl.analysis.loss_on_data import SAMPLES
from icl.config import ConfigError
from icl.config.sweeps import load_sweep
from icl.devices import resolve_device
from icl.estimation import LLCConfig
from icl.estimation.tables import keys_of_sweep
from icl.execution.points import llc_points
from icl.execution.progress import progress_bar
from icl.subjects.named import make_subject


def analyse_sweep(
    sweep: Path,
    overrides: Sequence[str],
    only: Sequence[str] | None,
    output: Path | None,
    environ: Mapping[str, str],
    samples: int | None = None,
) -> dict[str, Path]:
    """Measure the subjects of a sweep, each once, at the checkpoints that the sweep chooses; returns analysis -> file of its table.

    Args:
        overrides: changes of settings, among them those of the choice of checkpoints (`icl.execution.points.choice_overrides`).
        only: the analyses; None: all of `SUBJECT_ANALYSES`.
        output: the folder for the tables; None: data/NAME for a sweep file NAME.yaml.
        samples: see `analyse_subject`.

    Raises:
        ConfigError: the sweep, an override or an analysis is wrong, or the sweep is about training runs.
    """
    check_analyses(only or ())
    configs = _about_subjects(sweep, overrides, environ)
    keys = tuple(key for key in keys_of_sweep(configs) if key.startswith("subject"))
    target = output or Path("data") / sweep.stem
    alike: dict[str, list[LLCConfig]] = {}
    for config in configs:
        alike.setdefault(json.dumps([config.subject, config.subject_config], sort_keys=True), []).append(config)
    paths: dict[str, Path] = {}
    with progress_bar("analysing") as update:
        for config, *others in alike.values():
            subject = make_subject(config.subject, config.subject_config)
            present = list(subject.steps())
            steps = sorted({step for each in (config, *others) for step in each.chosen_steps(present)})
            about = {"subject": config.subject, "subject_config": config.subject_config}
            seed = config.sampler_config.init_seed or 0
            settings = {**about, "init_seed": seed, "icl_version": __version__}
            what = Measured(subject, config.subject_name, settings, keys, config.sampler_config)
            paths |= analyse_subject(
                what, steps, target, only or SUBJECT_ANALYSES, samples=samples or SAMPLES,
                device=resolve_device(environ.get("DEVICE")), progress=update,
            )  # fmt: skip
    for path in paths.values():
        print(path)
    return paths


def _about_subjects(sweep: Path, overrides: Sequence[str], environ: Mapping[str, str]) -> list[LLCConfig]:
    """The points of the sweep.

    Raises:
        ConfigError: it is about training runs of this library.
    """
    loaded = load_sweep(sweep)
    named = "subject" in loaded.parameters or any(text.partition("=")[0].strip() == "subject" for text in overrides)
    configs = llc_points(loaded, overrides, environ) if named else []
    if not configs or any(config.is_regression for config in configs):
        raise ConfigError(
            f"{sweep} names no subject, so it is about training runs of this library; measure one by its name, icl analyse RUN (`icl runs` "
            f"lists them), or compare them with: icl analyse --family {sweep}"
        )
    return configs
