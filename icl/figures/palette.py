"""Pictures with 256 colours, which look the same as in full colour and take a third of the bytes.

The most frequent colours, those of areas, lines and letters, are kept exactly. The others are mixtures at edges. They are replaced by
the nearest colour of the palette.
"""

import numpy as np
from PIL import Image
from scipy.spatial import KDTree

NUM_COLOURS = 256
_EXACT = 128


def with_palette(picture: Image.Image) -> Image.Image:
    """The picture with a palette of at most 256 colours. Equal pictures give equal results."""
    pixels = np.asarray(picture.convert("RGB"))
    codes = (pixels.astype(np.uint32) * np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    found, index, counts = np.unique(codes, return_inverse=True, return_counts=True)
    colours = np.stack([found >> 16, found >> 8 & 255, found & 255], axis=1).astype(np.uint8)
    palette = colours
    if len(colours) > NUM_COLOURS:
        order = np.argsort(-counts.astype(np.int64), kind="stable")
        exact, others = colours[order[:_EXACT]], colours[order[_EXACT:]]
        palette = np.concatenate([exact, _median_cut(others, NUM_COLOURS - _EXACT)])
    # The leaf size is fixed, because it decides between equally near colours and so changes the bytes.
    places = KDTree(palette.astype(float), leafsize=16).query(colours.astype(float))[1]
    nearest = np.asarray(places, dtype=np.uint8)
    result = Image.fromarray(nearest[index].reshape(codes.shape), "P")
    result.putpalette(palette.tobytes())
    return result


def _median_cut(colours: np.ndarray, num: int) -> np.ndarray:
    """At most `num` colours that represent the colours (N, 3)."""
    cut = Image.fromarray(colours[None], "RGB").quantize(num, Image.Quantize.MEDIANCUT)
    return np.array(cut.getpalette(), dtype=np.uint8).reshape(-1, 3)[:num]
