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
"""Width of a column and of a page, in inches."""
HEIGHT, FULL_HEIGHT = 0.618 * WIDTH, 0.618 * FULL_WIDTH

PNG_DPI = 130
"""Enough for a screen. The PDF is for print."""

# Without dates and versions, which would make the files differ at every rebuild.
_METADATA = {"CreationDate": None, "Producer": None, "Creator": None}

# These colours also differ in lightness, for grey print and colour blindness (Okabe & Ito).
MODEL, OPTIMAL, ZERO, OTHER, MEAN = "#0072B2", "#009E73", "#D55E00", "#999999", "#B2182B"

RC = {
    # Both fonts come with matplotlib. With a system's own Times, every machine would give other pixels.
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
    """Use the style in a `with` block, or in a function that this decorates. Afterwards, global settings are as before."""
    with mpl.rc_context(RC):  # type: ignore[arg-type]
        yield


def panels(
    rows: int, columns: int, width: float = FULL_WIDTH, height: float | None = None, **options
) -> tuple[Figure, list[Axes]]:
    """A figure and its panels in reading order. It is not registered in pyplot. `options` are passed to `Figure.subplots`."""
    figure = Figure(figsize=(width, height or HEIGHT * rows * width / FULL_WIDTH), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flatten())


def shades(name: str, count: int) -> list[Colour]:
    """Colours of a palette from dark to light, without the palest tenth, which is hard to see on white."""
    colours = mpl.colormaps[name]
    return [colours(k / max(count - 1, 1) * 0.9) for k in range(count)]


class _MajorLabels(LogFormatterMathtext):
    """Labels of powers of ten, written as plain numbers if the axis spans less than a factor of 100."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        low, high = self.axis.get_view_interval()  # type: ignore[union-attr]
        return f"{x:g}" if high < 100 * low else super().__call__(x, pos)


class _MinorLabels(LogFormatter):
    """Labels between the powers of ten, as plain numbers, if there is room for them."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def log_y(axis: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers between the powers of ten if it spans less than a factor of about ten."""
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
    """Write `<name>.<kind>` for each kind, atomically. Equal figures give equal files."""
    paths = [folder / f"{name}.{kind}" for kind in kinds]
    with page():
        # The layout is made once for all kinds. This saves a third of the time, and all kinds look the same.
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
