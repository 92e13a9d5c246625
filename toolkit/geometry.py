"""The evaluation view: which part of an image a model is shown, and how it is resampled."""

from collections.abc import Callable

import numpy as np
from PIL import Image

from noisyssl.errors import pick

Box = tuple[float, float, float, float]


def _centred_square(height: int, width: int) -> Box:
    side = min(height, width)
    top, left = (height - side) / 2, (width - side) / 2
    return top, left, top + side, left + side


def _whole(height: int, width: int) -> Box:
    return 0.0, 0.0, float(height), float(width)


FITS: dict[str, Callable[[int, int], Box]] = {"crop": _centred_square, "squash": _whole, "pad": _whole}
"""How an image becomes a square (`data.fit`): the part of it that is resampled."""


def evaluation_box(height: int, width: int, fit: str = "crop") -> Box:
    """(top, left, bottom, right) in source pixels, fractional, of what the evaluation view shows.

    Raises:
        ConfigError: unknown fit.
    """
    return pick(FITS, fit, "data.fit")(height, width)


def evaluation_view(image: np.ndarray, size: int, fit: str = "crop") -> np.ndarray:
    """(size, size, 3) uint8: one antialiased bilinear resampling of the evaluation box.

    crop: the centred square. squash: the whole image, its proportions lost. pad: the whole image in
    proportion, centred on black. An image of size x size comes back as it is.

    Raises:
        ConfigError: unknown fit.
    """
    height, width = image.shape[:2]
    top, left, bottom, right = evaluation_box(height, width, fit)
    rows = columns = size
    if fit == "pad":
        scale = size / max(height, width)
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    resized = Image.fromarray(image).resize(
        (columns, rows), Image.Resampling.BILINEAR, box=(left, top, right, bottom)
    )
    if (rows, columns) == (size, size):
        return np.array(resized)
    square = np.zeros((size, size, 3), np.uint8)
    y, x = (size - rows) // 2, (size - columns) // 2
    square[y : y + rows, x : x + columns] = np.asarray(resized)
    return square
