"""The charts of a report: tables in, plotly figures out.

The horizontal axis counts updates, step + 1, because the checkpoint of step t holds t + 1 updates. So step 0 can be shown on a
logarithmic axis.

The reader of a page chooses what is drawn. So each trace has a `meta`: its run (`run`, an index), the choices under which it is
shown (`pick`), and its palette and colour. Run names and settings come from users, and `plain` keeps plotly from reading them as
markup.
"""

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from icl.report.gather import ALONG, HEALTHY, Material

CURVES, CHAINS, TOKENS, HEADS, MEASURES = 45_000, 25_000, 16_000, 12_000, 20_000
"""The most points of all curves of a chart together. A point takes about 16 bytes."""
FEWEST, MOST = 20, 400
"""The fewest and the most points of one curve."""
DIGITS = 7
"""Digits of a number: as many as float32 carries, and as the tables have."""

UPDATES = "updates (step + 1)"
TOKEN = re.compile(r"^(?P<measure>.*)/token/(?P<token>\d+)$")
LLC_TOKEN = re.compile(r"^llc/mean/(?P<token>\d+)$")


@dataclass(frozen=True)
class Chart:
    """A figure with its heading and its note.

    Attributes:
        name: identifies the chart in the page.
        title: its heading.
        note: the sentence below it, about what is drawn and what was thinned.
        figure: the plotly figure, with the traces of all choices.
        log_y: whether the vertical axis is logarithmic if all values are positive.
    """

    name: str
    title: str
    note: str
    figure: go.Figure
    log_y: bool = False


def charts(material: Material) -> list[Chart]:
    """All charts for which the material has data, in the order of the page."""
    drawn = [
        training(material), estimates(material), chains(material), tokens(material), tokens_along(material), attention(material),
        structure(material),
    ]  # fmt: skip
    return [chart for chart in drawn if chart is not None]


def plain(text: object) -> str:
    """A text in a form that plotly shows unchanged."""
    return html.escape(str(text), quote=False)


def training(material: Material) -> Chart | None:
    """The logged metrics over the steps, one line per run. The reader chooses the metric; the loss comes first."""
    table = material.metrics
    names = [
        name for name in table.columns if name not in ("run", ALONG) and not TOKEN.match(name) and _numeric(table, name)
    ]
    if not names:
        return None
    loss = material.loss
    names.sort(key=lambda name: name != loss)
    curves = [(name, run, _curve(rows, name)) for name in names for (run,), rows in _groups(table, "run")]
    curves = [(name, run, curve) for name, run, curve in curves if len(curve)]
    curves, left = _fitting(curves, CURVES)
    points = _share(CURVES, len(curves))
    traces = [
        _line(material, run, *_thinned(curve, MOST if name == loss else points), pick={"show": name})
        for name, run, curve in curves
    ]
    note = f"One line per run. Long curves keep the lowest and the highest of each stretch, so no peak is lost.{left}"
    hover = "%{fullData.name}<br>after %{x} updates: %{y:.5g}<extra></extra>"
    return Chart("training", "Loss and evaluations", note, _figure(traces, hover, y="value"), log_y=True)


def _symbol(verdict: str) -> str:
    """A verdict names what failed before what was not tested."""
    if verdict == HEALTHY:
        return "circle"
    return "circle-open" if verdict.startswith("not tested") or not verdict else "x-thin-open"


def estimates(material: Material) -> Chart | None:
    """λ̂ over the steps with standard errors, the verdict at each point, and the ends of the stages found in the run's λ̂."""
    table = material.estimates
    if table.empty:
        return None
    traces: list[dict[str, Any]] = []
    for (way, place), rows in _groups(table, "way", "run"):
        rows = rows.sort_values(ALONG)
        line = _line(material, int(place), rows[ALONG], rows["llc/mean"], pick={"sampler": way}, mode="lines+markers")
        line |= {
            "error_y": {"type": "data", "array": _numbers(rows["llc/mcse"]), "width": 3, "thickness": 1.2},
            "marker": {"size": 8, "symbol": [_symbol(verdict) for verdict in rows["verdict"]]},
            "customdata": [_broken(plain(verdict)) for verdict in rows["verdict"]],
        }
        traces.append(line)
    for row in (
        material.stages.loc[lambda stages: stages["kind"] != "end"].to_dict("records") if len(material.stages) else ()
    ):
        own = table.loc[(table["run"] == row["run"]) & (table["way"] == row["way"]), "llc/mean"]
        at = [_number(row["end_step"] + 1)] * 2
        line = _line(material, row["run"], (), (), pick={"sampler": row["way"]})
        label = (
            f"end of {row['stage']}: {row['kind']} at step {row['end_step']:,.0f} (90 % interval {row['low']:,.0f} to "
            f"{row['high']:,.0f}, probability {row['probability']:.2f})"
        )
        line |= {
            "x": at,
            "y": _numbers([own.min(), own.max()]),
            "line": {"dash": "dot", "width": 1},
            "customdata": [label] * 2,
        }
        line["meta"]["dash"] = "dot"
        traces.append(line)
    note = (
        "Bars: one standard error. Filled circles: healthy. Crosses: a test of the chains failed. Rings: none failed, but one was not made "
        "or was too noisy to decide. The verdict says which. Dotted lines: ends of the stages that were found in the run's own λ̂."
    )
    hover = "%{fullData.name}<br>after %{x} updates: %{y:.4g}<br>%{customdata}<extra></extra>"
    return Chart("estimates", "Local learning coefficient λ̂", note, _figure(traces, hover, y="λ̂"))


def chains(material: Material) -> Chart | None:
    """Loss and distance of the chains of an estimate along their draws. The reader chooses run, sampler, step, and loss or distance."""
    table = material.traces
    if table.empty:
        return None
    groups = list(_groups(table.sort_values(["run", "way", ALONG], kind="stable"), "run", "way", ALONG))
    per_step = max(len(set(rows["chain"])) for _, rows in groups)
    most = max(1, CHAINS // (2 * per_step * FEWEST))
    kept = [
        groups[place]
        for place in np.unique(np.linspace(0, len(groups) - 1, min(most, len(groups))).round().astype(int))
    ]
    points = min(100, _share(CHAINS, 2 * sum(len(set(rows["chain"])) for _, rows in kept)))
    start = {
        (row["run"], row["way"], row[ALONG]): row.get("loss/init") for row in material.estimates.to_dict("records")
    }
    traces: list[dict[str, Any]] = []
    for (place, way, step), rows in kept:
        for quantity in ("loss", "distance"):
            pick = {"run": _label(material, place), "sampler": way, "step": f"{step:,}", "show": quantity}
            for (chain,), course in _groups(rows, "chain"):
                course = course.iloc[:: max(1, -(-len(course) // points))]
                traces.append(
                    {
                        "x": _numbers(course["draw"]),
                        "y": _numbers(course[quantity]),
                        "name": f"chain {chain}",
                        "mode": "lines",
                        "meta": {"run": None, "pick": pick, "palette": "runs", "colour": int(chain)},
                    }
                )
            anchor = start.get((place, way, step))
            if quantity == "loss" and anchor is not None and np.isfinite(anchor):
                ends = _numbers([rows["draw"].min(), rows["draw"].max()])
                meta = {"run": None, "pick": pick, "palette": "ink", "colour": 0, "dash": "dash"}
                traces.append(
                    {
                        "x": ends,
                        "y": _numbers([anchor] * 2),
                        "name": "L(w*), where the chains start",
                        "mode": "lines",
                        "meta": meta,
                    }
                )
    note = f"Each loss is the mean over a stretch of draws. The distance is that from w*. At most {points} points per chain."
    if len(kept) < len(groups):
        note += f" {len(kept)} of {len(groups)} estimates are shown; `icl tabulate` writes all to a table."
    hover = "%{fullData.name}<br>draw %{x}: %{y:.5g}<extra></extra>"
    figure = _figure(traces, hover, x="draw", y="", log_x=False, legend=True)
    return Chart("chains", "Traces of the chains", note, figure)


def tokens(material: Material) -> Chart | None:
    """Each metric that exists per token, over the tokens, at the last step that has it: one line per run."""
    traces = []
    for measure, run, curves in _per_token(material):
        last = max(curve.index[-1] for curve in curves.values())
        ends = {token: curve.iloc[-1] for token, curve in curves.items() if curve.index[-1] == last}
        line = _line(material, run, ends, ends.values(), pick={"show": measure}, mode="lines+markers", shift=0)
        traces.append(line)
    if not traces:
        return None
    note = "At the last step at which it was measured. Tokens are the examples in the context, counted from 0."
    hover = "%{fullData.name}<br>token %{x}: %{y:.5g}<extra></extra>"
    figure = _figure(traces, hover, x="token", y="value", log_x=False)
    figure.update_xaxes(dtick=1 + max(len(trace["x"]) for trace in traces) // 12)
    return Chart("tokens", "Per token, at the end", note, figure)


def tokens_along(material: Material) -> Chart | None:
    """Each metric that exists per token, over the steps, for one run: one line per token."""
    found = [
        (measure, run, token, max(*curves, 1), curve)
        for measure, run, curves in _per_token(material)
        for token, curve in curves.items()
    ]
    if not found:
        return None
    # If not all fit, the loss and λ̂ are kept first.
    first = sorted(found, key=lambda each: 0 if each[0] == material.loss else 1 if each[0].startswith("λ̂") else 2)
    found, left = _fitting(first, TOKENS)
    points = _share(TOKENS, len(found))
    traces: list[dict[str, Any]] = []
    for measure, run, token, last, curve in found:
        x, y = _thinned(curve, points)
        meta = {
            "run": None,
            "pick": {"run": _label(material, run), "show": measure},
            "palette": "tokens",
            "colour": token / last,
        }
        traces.append({"x": _updates(x), "y": _numbers(y), "name": f"token {token}", "mode": "lines", "meta": meta})
    note = f"One line per token, from the first to the last. At most {points} points per line.{left}"
    hover = "%{fullData.name}<br>after %{x} updates: %{y:.5g}<extra></extra>"
    return Chart("tokens-along", "Per token, over training", note, _figure(traces, hover, y="value", legend=True))


def attention(material: Material) -> Chart | None:
    """Metrics of the attention patterns over the steps, one line per head. The reader chooses run and metric."""
    table = material.attention
    names = [name for name in table.columns if name not in ("run", ALONG, "block", "head")]
    if table.empty or not names:
        return None
    order = {
        head: place for place, (head, _) in enumerate(_groups(table.sort_values(["block", "head"]), "block", "head"))
    }
    curves = [
        (name, run, block, head, curve)
        for name in names
        for (run, block, head), rows in _groups(table, "run", "block", "head")
        if len(curve := _curve(rows, name))
    ]
    curves, left = _fitting(curves, HEADS)
    points = _share(HEADS, len(curves))
    traces: list[dict[str, Any]] = []
    for name, run, block, head, curve in curves:
        x, y = _thinned(curve, points)
        pick = {"run": _label(material, run), "show": name}
        meta = {"run": None, "pick": pick, "palette": "runs", "colour": order[block, head]}
        title = f"block {block}, head {head}"
        traces.append({"x": _updates(x), "y": _numbers(y), "name": title, "mode": "lines", "meta": meta})
    note = f"Averaged over sequences and query tokens (`icl analyse`). At most {points} points per line.{left}"
    hover = "%{fullData.name}<br>after %{x} updates: %{y:.4g}<extra></extra>"
    return Chart("attention", "Attention", note, _figure(traces, hover, y="value", legend=True))


def structure(material: Material) -> Chart | None:
    """All other measures of `icl analyse` over the steps. A measure with several parts has one line per part, in the run's colour."""
    table = material.structure
    if table.empty:
        return None
    curves = [(*keys, _curve(rows, "value")) for keys, rows in _groups(table, "measure", "run", "part")]
    curves, left = _fitting(curves, MEASURES)
    points = _share(MEASURES, len(curves))
    traces = []
    for measure, run, part, curve in curves:
        line = _line(material, int(run), *_thinned(curve, points), pick={"show": measure})
        traces.append(line | {"name": f"{line['name']}, {plain(part)}"} if part else line)
    note = f"From the tables of `icl analyse`. At most {points} points per line.{left}"
    hover = "%{fullData.name}<br>after %{x} updates: %{y:.5g}<extra></extra>"
    return Chart("structure", "Structure", note, _figure(traces, hover, y="value"), log_y=True)


def _groups(table: pd.DataFrame, *keys: str) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Each combination of keys, as a tuple, and its rows, in order of first appearance."""
    yield from table.groupby(list(keys), sort=False)


def _per_token(material: Material) -> Iterator[tuple[str, int, dict[int, pd.Series]]]:
    """(measure, run, token -> its curve over the steps), first for the logged metrics, then for λ̂."""
    several = len(material.estimates) > 0 and material.estimates["way"].nunique() > 1
    for source, pattern, title in ((material.metrics, TOKEN, ""), (material.estimates, LLC_TOKEN, "λ̂")):
        columns: dict[str, dict[int, str]] = {}
        for match in (match for name in source.columns if (match := pattern.match(str(name)))):
            columns.setdefault(title or match["measure"], {})[int(match["token"])] = match[0]
        for measure, of in columns.items():
            for keys, rows in _groups(source, *(["way", "run"] if title else ["run"])):
                curves = {token: _curve(rows, of[token]) for token in sorted(of)}
                curves = {token: curve.sort_index() for token, curve in curves.items() if len(curve)}
                if curves:
                    yield f"{measure}, {keys[0]}" if title and several else measure, int(keys[-1]), curves


def _line(
    material: Material,
    run: int,
    steps: Any,
    values: Any,
    *,
    pick: Mapping[str, str],
    mode: str = "lines",
    shift: int = 1,
) -> dict[str, Any]:
    """A trace of one run, in the run's colour."""
    return {
        "x": [_number(step + shift) for step in steps],
        "y": _numbers(values),
        "name": plain(_label(material, run)),
        "mode": mode,
        "meta": {"run": int(run), "pick": dict(pick), "palette": "runs", "colour": int(run)},
    }


def _figure(
    traces: Sequence[dict[str, Any]], hover: str, *, y: str, x: str = UPDATES, log_x: bool = True, legend: bool = False
) -> go.Figure:
    layout = {
        "template": "none",
        "xaxis": {"title": {"text": x}, "type": "log" if log_x else "linear"},
        "yaxis": {"title": {"text": y}},
        "showlegend": legend,
    }
    return go.Figure([go.Scatter(hovertemplate=hover, **trace) for trace in traces], layout)


def _label(material: Material, run: int) -> str:
    return str(material.runs["label"].iloc[int(run)])


def _curve(rows: pd.DataFrame, column: str) -> pd.Series:
    """The finite values of a column over the steps."""
    values = rows[column].to_numpy(dtype=float)
    kept = np.isfinite(values)
    return pd.Series(values[kept], index=rows[ALONG].to_numpy()[kept])


def _thinned(curve: pd.Series, points: int) -> tuple[np.ndarray, np.ndarray]:
    """A subset of at most about `points` points of a curve.

    The curve is cut into points / 2 stretches of equal length in log(step + 1). The lowest and the highest point of each stretch
    stay, and so do the first and the last point of the curve.
    """
    steps, values = np.asarray(curve.index), np.asarray(curve)
    if len(values) <= points:
        return steps, values
    along = np.log1p(steps.astype(float))
    stretch = ((along - along[0]) / (along[-1] - along[0]) * (points // 2 - 1)).astype(int)
    order = np.lexsort((values, stretch))
    edges = np.flatnonzero(np.diff(stretch[order])) + 1
    kept = np.unique([0, len(values) - 1, *order[[0, *edges]], *order[[*(edges - 1), -1]]])
    return steps[kept], values[kept]


def _fitting(curves: Sequence[tuple[Any, ...]], points: int) -> tuple[list[tuple[Any, ...]], str]:
    """As many curves as have room for FEWEST points each, and a sentence about those left out.

    The first entry of a curve is its choice. All curves of a choice are kept or left out together.
    """
    sizes: dict[str, int] = {}
    for name, *_ in curves:
        sizes[name] = sizes.get(name, 0) + 1
    kept, room = [], points // FEWEST
    for name, size in sizes.items():
        room -= size
        if room >= 0 or not kept:
            kept.append(name)
    left = [name for name in sizes if name not in kept]
    sentence = f" Left out for lack of room: {', '.join(left[:5])}{', ...' if len(left) > 5 else ''}." if left else ""
    return [curve for curve in curves if curve[0] in kept], sentence


def _share(points: int, curves: int) -> int:
    """The number of points of each curve, so that all curves together have about `points`."""
    return int(np.clip(points // max(curves, 1), FEWEST, MOST))


def _numeric(table: pd.DataFrame, name: str) -> bool:
    return pd.api.types.is_numeric_dtype(table[name])


def _updates(steps: Any) -> list[float | None]:
    return [_number(step + 1) for step in steps]


def _numbers(values: Any) -> list[float | None]:
    return [_number(value) for value in values]


def _number(value: Any) -> float | None:
    """The value for JSON. Whole numbers stay whole, other numbers are rounded to DIGITS digits, and NaN and infinity become None."""
    if value is None or not np.isfinite(value):
        return None
    return int(value) if float(value).is_integer() and abs(value) < 1e15 else float(f"{value:.{DIGITS}g}")


def _broken(text: str, width: int = 70) -> str:
    """A long text broken into lines, for a hover label."""
    lines = [""]
    for word in text.split(" "):
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "<br>".join(lines)
