"""Reads the content of a report into tables: from the runs, their estimates, and the tables of `icl analyse`.

A run may lack settings, metrics or estimates. The tables of these are then empty, and the report has the rest. If the metrics or
estimates of a run are missing, they are taken from tables of `icl tabulate` and `icl analyse`, if there are any.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from icl.analysis.measures import MEASURES
from icl.analysis.run_tables import keys_of, label_of, plain_text, without
from icl.analysis.stages import FEWEST_ESTIMATES, detectable, find_boundaries, stage_table
from icl.analysis.tables import read_table
from icl.checkpoints.run import SUFFIX
from icl.config import ConfigError
from icl.config.settings import dotted
from icl.config.varying import varying
from icl.estimation.kept import Estimates, sampler_label, settings_of
from icl.execution.closing import short_name
from icl.execution.opened import Run
from icl.storage import LocalStore, StorageError
from icl.subjects.digest import DIGEST

LOSSES = ("pretrain/mse", "batch/loss")
"""Columns that are shown as the loss of a run, in this order. Without them it is the first column with "loss" in its name."""

STRUCTURE = (*(name for name in MEASURES if name not in ("attention", "evals")), "evals")
"""Tables of `icl analyse` that are shown as they are, in this order."""
ESTIMATES, TRACES = "llc", "_traces"
"""The beginning of the names of tables of estimates, and the end of those of their traces."""

SETTINGS = "settings"
"""The column that tells the rows of one run apart, in a table that has several subjects of its name."""

SUBJECT, CHAINS = "subject_config", "sampler_config.num_chains"
"""Settings of estimates: what tells subjects of one class apart, and what does not tell estimates apart."""

HEALTHY = "healthy"
ALONG = "step"

Progress = Callable[[int, str], None]


@dataclass(frozen=True)
class Material:
    """The tables of a report. Each has the column `run`, the index of the run in `runs`, counted from 0.

    Attributes:
        runs: one row per run: `name`, `label`, `state`, `remark`, `steps`, `num_steps`, `first_loss`, `loss`, `parameters`,
            `sequences`, `checkpoints`, `bytes`, `seconds`, `estimates`, `healthy`, `estimation_seconds`.
        settings: one row per setting: `setting`, then one column per run, named by its index.
        differing: the settings that vary.
        metrics: `run`, `step`, and the logged metrics.
        estimates: `run`, `way` (the sampler's preset, or its settings in words), `step`, and the columns of `LLCResult.summary`.
        traces: `run`, `way`, `step`, `chain`, `draw`, `loss`, `distance`.
        stages: `run`, `way`, the columns of `icl.analysis.stages.stage_table`, and for each end `low`, `high`, `probability`, `kind`.
        attention: `run`, `step`, `block`, `head`, and the metrics of `icl analyse`, averaged over the query tokens.
        structure: `run`, `measure`, `part`, `step`, `value`: all other measures of `icl analyse`.
        notes: sentences about what could not be shown, and why.
    """

    runs: pd.DataFrame
    settings: pd.DataFrame
    differing: tuple[str, ...]
    metrics: pd.DataFrame
    estimates: pd.DataFrame
    traces: pd.DataFrame
    stages: pd.DataFrame
    attention: pd.DataFrame
    structure: pd.DataFrame
    notes: tuple[str, ...]

    @property
    def loss(self) -> str | None:
        """The column of the metrics that is shown as the loss."""
        return loss_column(self.metrics)


def gather(runs: Sequence[Run], data: Path | None = None, progress: Progress = lambda done, note: None) -> Material:
    """Read the tables of a report.

    Args:
        runs: the runs that the report shows.
        data: the folder with the tables of `icl analyse`; None: there are none.
        progress: called before each run with its index and its name.
    """
    settings = [_settings(run) for run in runs]
    differing = varying(settings)
    flat = [dotted(each) for each in settings]
    tables, notes = _tables_of(runs, data)
    labels = _labels([run.name for run in runs], flat, differing)
    reasons: dict[str, list[int]] = {}
    summaries, metrics, estimates, traces, stages = [], [], [], [], []
    for place, run in enumerate(runs):
        progress(place, run.name)
        logged = run.metrics if len(run.metrics) else _rows_of(tables, ("metrics", "evals"), place)
        estimated, chains = _estimates(run)
        if estimated.empty:
            estimated, chains = _tabulated(tables, place)
        estimated = _with_columns(
            estimated, {"llc/mean": np.nan, "llc/mcse": np.nan, "loss/init": np.nan, "verdict": ""}
        )
        found, why = _stages(estimated)
        reasons.setdefault(why, []).append(place)
        summaries.append({"run": place, **_summary(run, logged, estimated, flat[place])})
        for rows, table in ((metrics, logged), (estimates, estimated), (traces, chains), (stages, found)):
            rows.append(table.assign(run=place))
    progress(len(runs), "")
    notes += [f"{_which(places, labels)}: {why}" for why, places in reasons.items() if why]
    return Material(
        runs=pd.DataFrame(summaries).assign(label=labels),
        settings=_settings_table(flat),
        differing=tuple(differing),
        metrics=_joined(metrics),
        estimates=_joined(estimates),
        traces=_joined(traces),
        stages=_joined(stages),
        attention=_joined([_attention(rows) for name, rows in tables.items() if name == "attention"]),
        structure=_joined([_long(name, tables[name]) for name in STRUCTURE if name in tables]),
        notes=tuple(notes),
    )


def loss_column(metrics: pd.DataFrame) -> str | None:
    """The column that is shown as the loss of a run, or None."""
    named = [name for name in LOSSES if name in metrics.columns]
    return next(iter([*named, *(str(name) for name in metrics.columns if "loss" in str(name))]), None)


def _settings(run: Run) -> dict[str, Any]:
    """The settings of a run. If this version does not accept them, they are returned as stored. A subject without a training run
    has those of its estimates."""
    try:
        return run.settings.without_derived_seeds().model_dump(mode="json")
    except ConfigError:
        stored = run.checkpoints.settings()
        return stored if stored is not None else next((each.stored for each in run.estimate_sets if each.stored), {})


def _settings_table(flat: Sequence[dict[str, Any]]) -> pd.DataFrame:
    names = dict.fromkeys(name for each in flat for name in each)
    return pd.DataFrame(
        [{"setting": name, **{place: each.get(name) for place, each in enumerate(flat)}} for name in names],
        columns=pd.Index(["setting", *range(len(flat))]),
        dtype=object,
    )


def _labels(names: Sequence[str], flat: Sequence[dict[str, Any]], differing: Sequence[str]) -> list[str]:
    """The labels of the runs: the settings that vary, or the runs' names if these settings do not tell all runs apart."""
    labels = [
        ", ".join(f"{short_name(setting, differing)} {each.get(setting)}" for setting in differing) for each in flat
    ]
    return labels if len(set(labels)) == len(labels) and all(labels) else list(names)


def _which(places: Sequence[int], labels: Sequence[str]) -> str:
    """Several runs in a few words."""
    return "All runs" if len(places) == len(labels) > 1 else "; ".join(labels[place] for place in places)


def _summary(run: Run, metrics: pd.DataFrame, estimates: pd.DataFrame, settings: dict[str, Any]) -> dict[str, Any]:
    steps = run.steps
    summary = run.summary
    column = loss_column(metrics)
    loss = metrics[column].dropna() if column else pd.Series(dtype=float)
    try:
        parameters = run.settings.task_config.shape.num_parameters
    except ConfigError:
        parameters = None
    last = max([*steps, *(int(step) for step in _column(metrics, ALONG)[-1:])], default=None)
    done = None if last is None else last + 1
    batch = settings.get("batch_size")
    verdicts = _column(estimates, "verdict")
    return {
        "name": run.name,
        "state": "finished" if done is not None and done == settings.get("num_steps") else _state(run),
        "remark": str(summary.get("error") or summary.get("remark") or ""),
        "steps": done,
        "num_steps": settings.get("num_steps"),
        "first_loss": float(loss.iloc[0]) if len(loss) else None,
        "loss": float(loss.iloc[-1]) if len(loss) else None,
        "parameters": parameters,
        "sequences": done * batch if done and isinstance(batch, int) else None,
        "checkpoints": len(steps),
        "bytes": sum(run.store.sizes(run.checkpoints.prefix).values()),
        "seconds": _seconds(run),
        "estimates": len(estimates),
        "healthy": verdicts.count(HEALTHY),
        "estimation_seconds": sum(_span(each.folder, "*.json*") or 0 for each in run.estimate_sets) or None,
    }


def _state(run: Run) -> str:
    try:
        writer = run.checkpoints.holder(everywhere=False)
    except StorageError:
        writer = None
    if not run.steps and run.checkpoints.settings() is None:
        return "estimates only"
    return "running" if writer else "finished" if run.finished else "interrupted"


def _seconds(run: Run) -> float | None:
    """Seconds from the first to the last file of the run; None if it is not on this disk."""
    return _span(run.store.root / run.checkpoints.prefix, f"*{SUFFIX}") if isinstance(run.store, LocalStore) else None


def _span(folder: Path, pattern: str) -> float | None:
    """Seconds from the first to the last change of a folder's files. `config.json` counts, because it is written first."""
    times = [path.stat().st_mtime for path in [*folder.glob(pattern), *folder.glob("config.json")]]
    return max(times) - min(times) if len(times) > 1 else None


def _estimates(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All estimates and their traces. Of several under one sampler at one checkpoint, the one with the most chains counts."""
    rows: dict[tuple[str, int], tuple[int, dict[str, Any], pd.DataFrame]] = {}
    for each, how in zip(run.estimate_sets, _ways(run.estimate_sets), strict=True):
        table, traces = each.rows, each.traces
        chains = int((each.stored.get("sampler_config") or {}).get("num_chains") or 0)
        for row in table.to_dict("records"):
            step = int(row[ALONG])
            if chains >= rows.get((how, step), (0,))[0]:
                of_step = traces.loc[traces[ALONG] == step] if len(traces) else traces
                rows[how, step] = chains, {"way": how, **{str(key): value for key, value in row.items()}}, of_step
    kept = [rows[key] for key in sorted(rows)]
    estimates = pd.DataFrame([row for _, row, _ in kept])
    return estimates, _joined([trace.assign(way=row["way"]) for _, row, trace in kept])


def _ways(sets: Sequence[Estimates]) -> list[str]:
    """How each set of estimates was made: the sampler in a few words, and whatever else differs from sets with the same words. For
    sets of one preset the number of chains does not count."""
    words, settings = map(list, zip(*map(_way, sets), strict=True)) if sets else ([], [])
    subjects = varying([{SUBJECT: each.get(SUBJECT)} for each in settings])
    ways = []
    for own, flat in zip(words, map(dotted, settings), strict=True):
        equal = [each for word, each in zip(words, settings, strict=True) if word == own]
        differing = dict.fromkeys([*subjects, *varying(equal)])
        ways.append(", ".join([own, *(f"{name.partition('.')[2] or name} {flat.get(name)}" for name in differing)]))
    return ways


def _way(estimates: Estimates) -> tuple[str, dict[str, Any]]:
    """The sampler in a few words, and all settings that decide an estimate but the number of chains."""
    try:
        config = estimates.settings if estimates.stored else None
    except ConfigError:
        config = None
    if config is None:
        return estimates.name, {}
    return sampler_label(config), without(settings_of(config), [CHAINS])


def _stages(estimates: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The stages that the run's own λ̂ shows, and the reason if there are none."""
    tables, reasons = [], []
    if estimates.empty:
        return pd.DataFrame(), ""
    for how, rows in estimates.groupby("way", sort=False):
        rows = detectable(rows, "loss/init")
        if len(rows) < FEWEST_ESTIMATES:
            reasons.append(
                f"{how}: stages need estimates at {FEWEST_ESTIMATES} checkpoints, and there are {len(rows)}."
            )
            continue
        errors = rows["llc/mcse"]
        found = find_boundaries(rows[ALONG], rows["llc/mean"], errors)
        if not len(found.steps):
            reasons.append(f"{how}: λ̂ shows no boundary between stages that is significant.")
            continue
        last = float(rows[ALONG].iloc[-1])
        ends = [*found.steps, last]
        # The loss is L(w*) on the estimates' own data, because training logged its losses at other steps.
        table = stage_table(ends, rows[ALONG], rows["loss/init"], rows["llc/mean"], errors)
        kinds = ["extremum" if each else "plateau" for each in found.extremum]
        tables.append(
            table.assign(
                way=how,
                low=[*found.low, np.nan],
                high=[*found.high, np.nan],
                probability=[*found.probability, np.nan],
                kind=[*kinds, "end"],
            )
        )
    return _joined(tables), " ".join(dict.fromkeys(reasons))


def _tables_of(runs: Sequence[Run], data: Path | None) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Name -> rows, with the column `run`, of all tables whose JSON file names one of the runs; and notes on unreadable ones."""
    places = {run.name: place for place, run in enumerate(runs)}
    found: dict[str, list[pd.DataFrame]] = {}
    taken: dict[str, set[tuple[Any, ...]]] = {}
    notes = []
    made: dict[str, Any] = {}
    for path, about in _tables(data):
        named = about["runs"]
        wanted = {str(key): places[run] for key, run in named.items() if isinstance(run, str) and run in places}
        if not wanted:
            continue
        try:
            table = read_table(path, ALONG)
        except (ValueError, OSError) as error:
            notes.append(f"{path.name} is left out: {error}")
            continue
        keys = list(keys_of(table))
        values = pd.DataFrame(table, columns=pd.Index(keys)).to_dict("records")
        labels = [label_of(row) for row in values]
        # Analyses of families name a run by the value of its one key.
        short = [plain_text(row[keys[0]]) for row in values] if len(keys) == 1 else labels
        of = pd.DataFrame(
            {"run": [wanted.get(label, wanted.get(value)) for label, value in zip(labels, short, strict=True)]}
        )
        if len(wanted) > len(set(wanted.values())):  # subjects of one class, with other settings, have one name
            of[SETTINGS] = labels
        rows = (
            pd.concat([of, table.drop(columns=[*keys, DIGEST], errors="ignore")], axis=1)
            .dropna(subset=["run"])
            .astype({"run": int})
        )
        name = path.name.split(".")[0]
        if name.startswith(ESTIMATES):
            sampler = about.get("sampler_config")
            if made.setdefault(name, sampler) != sampler:  # the same name for another way of sampling
                traces = name[len(name.removesuffix(TRACES)) :]
                name = f"{name.removesuffix(TRACES)} in {path.parent.name}{traces}"
        # Each folder of tables has its own copy of a run's rows. The first one that has a checkpoint counts.
        at = list(rows[[column for column in ("run", SETTINGS, ALONG) if column in rows]].itertuples(index=False))
        new = rows.loc[[each not in taken.get(name, ()) for each in at]]
        if len(new) < len(rows):
            notes.append(
                f"{path}: {len(rows) - len(new)} rows are left out, because another table has these checkpoints."
            )
        if len(new):
            found.setdefault(name, []).append(new)
            taken.setdefault(name, set()).update(at)
    return {name: _joined(tables) for name, tables in found.items()}, notes


def _tables(data: Path | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The tables in a folder that the report can show, each with the content of its JSON file, which names its runs: label -> name."""
    for about in sorted([*data.glob("*.json"), *data.glob("*/*.json")]) if data is not None else ():
        if about.stem not in ("metrics", "evals", "attention", *STRUCTURE) and not about.stem.startswith(ESTIMATES):
            continue
        try:
            settings = json.loads(about.read_text("utf-8"))
        except (ValueError, OSError):
            continue
        if not isinstance(settings, dict) or not isinstance(settings.get("runs"), dict):
            continue
        for path in (about.with_suffix(".csv"), about.with_suffix(".csv.gz")):
            if path.is_file():
                yield path, settings


def _rows_of(tables: Mapping[str, pd.DataFrame], names: Sequence[str], place: int) -> pd.DataFrame:
    """The rows of a run, from the first of the named tables that has any, and has those of one subject."""
    for table in (tables[name] for name in names if name in tables):
        if SETTINGS in table.columns:
            continue
        rows = pd.DataFrame(table.loc[table["run"] == place]).drop(columns="run").copy()
        if len(rows):
            return rows
    return pd.DataFrame()


def _tabulated(tables: Mapping[str, pd.DataFrame], place: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Estimates and traces of a run, read from tables. The name of a table is used as the `way` of sampling."""
    names = [name for name in tables if name.startswith(ESTIMATES) and not name.endswith(TRACES)]
    parts = [
        tuple(_rows_of(tables, [table], place).assign(way=name) for table in (name, f"{name}{TRACES}"))
        for name in names
    ]
    return _joined([rows for rows, _ in parts]), _joined([traces for _, traces in parts])


def _attention(rows: pd.DataFrame) -> pd.DataFrame:
    """Metrics of each head, averaged over the query tokens."""
    keys = ["run", ALONG, "block", "head"]
    numbers = [column for column in rows.columns if column not in (*keys, "token")]
    return _means(rows, keys, numbers)


def _long(name: str, rows: pd.DataFrame) -> pd.DataFrame:
    """The table with one row per run, step, part and number. Rows that differ only in an index are combined by root mean square."""
    texts = [column for column in rows.columns if not pd.api.types.is_numeric_dtype(rows[column])]
    parts = [*texts, *(column for column in ("position", "gain") if column in rows.columns)]
    keys = ["run", ALONG, *parts]
    numbers = [column for column in rows.columns if column not in (*keys, "index")]
    several = bool(rows.duplicated(keys).any())
    if several:
        squares = rows.assign(**{column: rows[column] ** 2 for column in numbers})
        means = _means(squares, keys, numbers)
        rows = means.assign(**{column: means[column].pow(0.5) for column in numbers})
    long = rows.melt(keys, numbers, "_name", "_value").dropna(subset=["_value"])
    column = long["_name"].astype(str)
    numbered = column.str.extract(r"^(?P<measure>.*)/(?P<part>\d+)$")
    measure = f"{name}: " + numbered["measure"].fillna(column) + (" (root mean square)" if several else "")
    texts = [long[key].map(plain_text) for key in parts]
    part = texts[0].str.cat(texts[1:], " ") if texts else numbered["part"].fillna("")
    return pd.DataFrame(
        {"run": long["run"], "measure": measure, "part": part, ALONG: long[ALONG], "value": long["_value"]}
    )


def _with_columns(table: pd.DataFrame, missing: Mapping[str, Any]) -> pd.DataFrame:
    """The table with these columns added, and its missing values in them filled."""
    if table.empty:
        return table
    table = table.assign(**{name: value for name, value in missing.items() if name not in table.columns})
    return table.fillna({name: value for name, value in missing.items() if value == value})


def _means(rows: pd.DataFrame, keys: Sequence[str], numbers: Sequence[str]) -> pd.DataFrame:
    of = pd.DataFrame(rows, columns=pd.Index([*keys, *numbers]))
    return pd.DataFrame(of.groupby(list(keys), as_index=False).mean())


def _column(table: pd.DataFrame, name: str) -> list[Any]:
    return list(table[name]) if name in table.columns else []


def _joined(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    full = [table for table in tables if len(table)]
    return pd.concat(full, ignore_index=True) if full else pd.DataFrame()
