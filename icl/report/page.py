"""The page of a report: tables and charts in one HTML file that needs no server.

Most of the page is plotly's script. It is compressed (from 4.8 MB to 2 MB), and the browser decompresses it.
"""

import base64
import gzip
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from icl import __version__
from icl.execution.closing import estimate_text
from icl.figures.style import MODEL, OPTIMAL, OTHER, ZERO, shades
from icl.report.charts import Chart, charts
from icl.report.gather import Material
from icl.storage.files import write_atomically

# Okabe and Ito's colours, those of the figures first. On a dark background the darkest are lighter.
LIGHT = (MODEL, ZERO, OPTIMAL, "#CC79A7", "#C98500", "#3FA7DE", OTHER)
DARK = ("#4FA3E0", "#F07F3C", "#2FC79A", "#E39BC4", "#E8B33D", "#8FD0F5", "#B5B5B5")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
"""A run has a colour and a dash. Together they tell 35 runs apart."""


def page(material: Material, commands: Sequence[tuple[str, str]] = (), title: str = "") -> str:
    """The HTML of a report.

    Args:
        material: the content.
        commands: commands that continue, as pairs (what it does, the command line).
        title: the page's title; the default names the runs.
    """
    drawn = charts(material)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _shown, "size": _size, "duration": _duration, "whole": _whole}
    template = environment.from_string(_part("page.html"))
    return template.render(
        title=title or _title(material), sentence=_sentence(material), version=__version__,
        style=Markup(_part("page.css")), script=Markup(_part("page.js")), plotly=_plotly(),
        data=_embedded(material, drawn), charts={chart.name: chart for chart in drawn},
        runs=_records(material.runs), differing=material.differing, settings=_settings(material), estimates=_estimates(material),
        stages=_stages(material), ways=_ways(material), notes=material.notes, commands=commands, labels=list(material.runs["label"]),
    )  # fmt: skip


def write_report(material: Material, path: Path, commands: Sequence[tuple[str, str]] = (), title: str = "") -> int:
    """Write the page atomically; returns its size in bytes.

    Raises:
        ValueError: the path is a folder.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give --output a file, such as {path / 'report.html'}")
    content = page(material, commands, title).encode()
    write_atomically(path, content)
    return len(content)


def quoted(*words: str) -> str:
    """A command line, quoted for a shell."""
    return " ".join(shlex.quote(word) for word in words)


def _embedded(material: Material, drawn: Sequence[Chart]) -> Markup:
    """The data for the page's script: JSON without letters that could end its HTML tag."""
    data = {
        "runs": [
            {"name": row["name"], "label": row["label"], "dash": DASHES[place // len(LIGHT) % len(DASHES)]}
            for place, row in enumerate(_records(material.runs))
        ],
        "palettes": {
            "light": {"runs": LIGHT, "tokens": _hexes(0.0), "ink": ["#555555"]},
            "dark": {"runs": DARK, "tokens": _hexes(0.35), "ink": ["#AAAAAA"]},
        },
        "charts": [_chart(chart) for chart in drawn],
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return Markup(text)


def _chart(chart: Chart) -> dict[str, Any]:
    """A chart for the script. Values that all its traces share are stored once."""
    figure = chart.figure.to_plotly_json()
    traces = figure["data"]
    shared = {
        key: value
        for key, value in traces[0].items()
        if key not in ("x", "y", "meta") and all(trace.get(key) == value for trace in traces)
    }
    layout = {key: value for key, value in figure["layout"].items() if key != "template"}
    rest = [{key: value for key, value in trace.items() if key not in shared} for trace in traces]
    return {"name": chart.name, "logY": chart.log_y, "shared": shared, "traces": rest, "layout": layout}


@cache
def _plotly() -> str:
    """Plotly's script, compressed."""
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def _part(name: str) -> str:
    return files("icl.report").joinpath(name).read_text("utf-8")


def _hexes(start: float, count: int = 24) -> list[str]:
    """Colours of viridis from dark to light. `start` cuts off the darkest part, for a dark background."""
    colours = shades("viridis", round(count / (1 - start)))[-count:]
    return ["#" + "".join(f"{round(255 * part):02x}" for part in colour[:3]) for colour in colours]


def _title(material: Material) -> str:
    names = list(material.runs["name"])
    return names[0] if len(names) == 1 else f"{len(names)} runs"


def _sentence(material: Material) -> str:
    """The content of the report in one sentence."""
    runs = material.runs
    states = ", ".join(f"{n} {state}" for state, n in runs["state"].value_counts().items())
    parts = [f"{len(runs)} runs ({states})" if len(runs) > 1 else f"One run, {runs['state'].iloc[0]}"]
    if material.differing:
        parts.append(f"they differ in {', '.join(material.differing)}")
    losses = runs["loss"].dropna().astype(float)
    if len(losses):
        spread = f"{losses.min():.4g}" if len(losses) == 1 else f"from {losses.min():.4g} to {losses.max():.4g}"
        parts.append(f"{material.loss} at the end is {spread}")
    total, healthy = sum(runs["estimates"]), sum(runs["healthy"])
    parts.append(f"{total} estimates of λ̂, {healthy} of them healthy" if total else "no estimates of λ̂ yet")
    return "; ".join(parts) + "."


def _settings(material: Material) -> list[dict[str, Any]]:
    """Every setting with its value in each run; those that differ come first."""
    rows = []
    for row in material.settings.to_dict("records"):
        values = [_plain(value) for key, value in row.items() if key != "setting"]
        rows.append({"name": row["setting"], "differs": row["setting"] in material.differing, "values": values})
    return sorted(rows, key=lambda row: not row["differs"])


def _estimates(material: Material) -> list[dict[str, Any]]:
    table = material.estimates
    if table.empty:
        return []
    rows = _records(table.sort_values(["run", "way", "step"]))
    return [
        {
            "run": row["run"],
            "way": row["way"],
            "step": row["step"],
            "text": estimate_text(row),
            "verdict": row.get("verdict") or "",
        }
        for row in rows
    ]


def _stages(material: Material) -> list[dict[str, Any]]:
    """The stages. Their changes are texts with as many digits as the errors justify."""
    return [
        row
        | {
            name: estimate_text({"llc/mean": row[f"delta_{name}"], "llc/mcse": row[f"delta_{name}_std"]})
            for name in ("loss", "llc")
        }
        for row in _records(material.stages)
    ]


def _ways(material: Material) -> int:
    """The number of different settings of the sampler."""
    return len(set(material.estimates["way"])) if len(material.estimates) else 0


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table, with None for missing values."""
    return [
        {str(key): None if _missing(value) else value for key, value in row.items()} for row in table.to_dict("records")
    ]


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _plain(value: Any) -> str:
    if _missing(value):
        return "none"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, Mapping)) else str(value)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _whole(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _size(count: float | None) -> str:
    if count is None:
        return "–"
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
