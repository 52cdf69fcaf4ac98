"""The look of every figure: page sizes, fonts, colours, deterministic files."""

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, LogFormatterMathtext
from PIL import Image
from seaborn import color_palette

from icl.figures.palette import with_palette
from icl.storage.files import replacing

Colour = tuple[float, float, float, float]
LineStyle = str | tuple[int, tuple[float, ...]]

WIDTH, FULL_WIDTH = 3.25, 6.75
"""A column and a page, in inches."""
HEIGHT, FULL_HEIGHT = 0.618 * WIDTH, 0.618 * FULL_WIDTH

PNG_DPI = 130
"""Crisp on a page; print has the PDF."""

# Dates and versions in the files would make every rebuild differ.
_METADATA = {"CreationDate": None, "Producer": None, "Creator": None}

# Colours that differ in lightness too, so that they survive grey printing and colour blindness (Okabe & Ito).
MODEL, OPTIMAL, ZERO, OTHER, MEAN = "#0072B2", "#009E73", "#D55E00", "#999999", "#B2182B"

RC = {
    # Both come with matplotlib: a system's own Times would give every machine other pixels.
    "font.family": ["STIXGeneral", "DejaVu Serif"],
    "mathtext.fontset": "stix",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.2,
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "svg.hashsalt": "icl",
    "pdf.fonttype": 42,
}


@contextmanager
def page() -> Iterator[None]:
    """The style, for the length of a `with` block or of a function it decorates; nothing global stays changed."""
    with mpl.rc_context(RC):  # type: ignore[arg-type]
        yield


def panels(
    rows: int, columns: int, width: float = FULL_WIDTH, height: float | None = None, **options
) -> tuple[Figure, list[Axes]]:
    """A figure of panels, in reading order, that belongs to no global registry; options go to `Figure.subplots`."""
    figure = Figure(figsize=(width, height or HEIGHT * rows * width / FULL_WIDTH), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flatten())


def shades(name: str, count: int) -> list[Colour]:
    """Colours from dark to light of a palette; the palest tenth, lost on white paper, is left out."""
    colours = mpl.colormaps[name]
    return [colours(k / max(count - 1, 1) * 0.9) for k in range(count)]


class _MajorLabels(LogFormatterMathtext):
    """Powers of ten, written out where the axis spans less than two decades."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        low, high = self.axis.get_view_interval()  # type: ignore[union-attr]
        return f"{x:g}" if high < 100 * low else super().__call__(x, pos)


class _MinorLabels(LogFormatter):
    """Plain numbers between the powers of ten, where there is room for them."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def log_y(axis: Axes) -> None:
    """A logarithmic y axis with plain numbers between the powers of ten where it spans less than a decade or so."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(_MajorLabels())
    axis.yaxis.set_minor_formatter(_MinorLabels(labelOnlyBase=False, minor_thresholds=(1.0, 0.4)))


def seed_looks(count: int) -> list[tuple[Colour, LineStyle]]:
    """A colour and a line style per run, so that runs can be told apart in grey too."""
    styles: list[LineStyle] = ["-", "--", "-.", ":", (0, (6, 1.5))]
    return [((*colour, 1.0), styles[i % len(styles)]) for i, colour in enumerate(color_palette("deep", count))]


def token_colours(count: int) -> list[Colour]:
    """One viridis colour per token, dark to light."""
    return shades("viridis", count)


def save(figure: Figure, folder: Path, name: str, kinds: tuple[str, ...] = ("png", "pdf")) -> list[Path]:
    """Write `<name>.<kind>` for each kind, each whole or not at all, so that equal figures are equal files."""
    paths = [folder / f"{name}.{kind}" for kind in kinds]
    with page():
        # Laying out once, and not again for each kind, takes two thirds of the time and gives every kind the same layout.
        figure.draw_without_rendering()
        figure.set_layout_engine(None)
        for path, kind in zip(paths, kinds, strict=True):
            with replacing(path) as file:
                if kind == "png":
                    _save_png(figure, file)
                else:
                    figure.savefig(file, format=kind, metadata=_METADATA)
    return paths


def _save_png(figure: Figure, file: BinaryIO) -> None:
    full = BytesIO()
    figure.savefig(full, format="png", dpi=PNG_DPI)
    with_palette(Image.open(full)).save(file, "PNG", optimize=True, dpi=(PNG_DPI, PNG_DPI))
