"""A palette changes what the eye does not see, and nothing else."""

import numpy as np
from PIL import Image

from icl.figures.palette import NUM_COLOURS, with_palette
from icl.figures.style import PNG_DPI, panels, save


def test_few_colours_stay_what_they_are():
    pixels = np.random.default_rng(0).integers(0, 6, (31, 43, 3), dtype=np.uint8) * 40
    picture = Image.fromarray(pixels)
    assert len(picture.getcolors()) <= NUM_COLOURS
    np.testing.assert_array_equal(with_palette(picture).convert("RGB"), pixels)


def test_of_many_colours_the_frequent_ones_stay_and_the_others_are_near():
    ramp = np.linspace(0, 255, 600)
    pixels = np.stack(np.broadcast_arrays(ramp[None, :], ramp[:300, None], 128.0), axis=-1).astype(np.uint8)
    pixels[:40, :300] = (0, 114, 178)
    reduced = with_palette(Image.fromarray(pixels))
    assert reduced.mode == "P"
    shown = np.asarray(reduced.convert("RGB")).astype(int)
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) <= NUM_COLOURS
    assert (shown[:40, :300] == (0, 114, 178)).all()
    assert np.abs(shown - pixels).mean() < 5


def test_a_saved_figure_has_its_size_and_equal_bytes(tmp_path):
    def draw():
        figure, (axis,) = panels(1, 1, 3.0, 2.0)
        axis.plot([0, 1, 2], [2.0, 0.5, 1.0])
        return figure

    (first, _), (second, _) = (save(draw(), tmp_path / name, "line") for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    with Image.open(first) as picture:
        assert picture.mode == "P"
        assert picture.size == (3 * PNG_DPI, 2 * PNG_DPI)
        assert round(picture.info["dpi"][0]) == PNG_DPI
