"""Every random choice of loading, as data: pure functions of (seed, epoch, index, view number).

Nothing here depends on the batch, on prefetch or on which other samples exist, so a run resumes from
(epoch, position) alone, and both implementations of a view can be handed the very same draws.
"""

import math
from dataclasses import dataclass, fields

import numpy as np

from noisyssl.geometry import evaluation_box
from noisyssl.philox import MASK, philox, uniform
from noisyssl.views import View

KEY, ORDER = 0, 1
"""Last counter word: keys of samples and places in an epoch are independent draws."""
VIEW = 1 << 16
"""Stream of view 0 within a sample's key; smaller streams are left to objectives."""
ATTEMPTS = 10
"""Crops tried before the fallback, as in torchvision's RandomResizedCrop."""
NO_BLUR = 1e-3
"""Standard deviation that stands for "no blur": DALI reads 0 as "derive it from the window"."""
FIRST = 2 * ATTEMPTS + 12
"""Numbers drawn for every view: the crop, flips, colour, blur."""
MORE = 13
"""Numbers drawn after those for views that turn, stain, solarise or compress."""


Epoch = int | np.ndarray


@dataclass(frozen=True, slots=True)
class Slot:
    """One batch of the schedule."""

    place: tuple[int, int]
    """Epoch, and batch within it."""
    index: np.ndarray
    """(B,) int64 samples, at least one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What one view does to each of B samples; every field is a (B,) array, float32 if not said otherwise."""

    top: np.ndarray
    """Upper edge of the crop in source pixels."""
    left: np.ndarray
    """Left edge of the crop in source pixels."""
    bottom: np.ndarray
    """Lower edge of the crop in source pixels, exclusive."""
    right: np.ndarray
    """Right edge of the crop in source pixels, exclusive."""
    horizontal: np.ndarray
    """bool: left-right flip."""
    vertical: np.ndarray
    """bool: upside-down flip."""
    brightness: np.ndarray
    """Factor on all values."""
    contrast: np.ndarray
    """Factor about mid-grey (128)."""
    saturation: np.ndarray
    """Factor on the chroma; 0 is grey."""
    hue: np.ndarray
    """Rotation of the chroma in degrees."""
    sigma: np.ndarray
    """Standard deviation of the blur in pixels of the view; `NO_BLUR` where there is none."""
    turns: np.ndarray
    """int64: quarter turns, counter-clockwise, after the flips; 0 to 3."""
    angle: np.ndarray
    """Rotation in degrees, counter-clockwise, after the quarter turns."""
    stain_factor: np.ndarray
    """(B, 3): factor on the amount of haematoxylin, eosin, DAB."""
    stain_shift: np.ndarray
    """(B, 3): added to the amounts, in units of optical density (natural logarithm)."""
    solarised: np.ndarray
    """bool: values of 128 and above are inverted."""
    quality: np.ndarray
    """int64: JPEG quality, 1 to 100; 0 where it is not compressed."""

    def part(self, rows: slice) -> "Draws":
        """The draws of some of the samples."""
        return Draws(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def transposed(self) -> np.ndarray:
        """(B,) bool: rows and columns change places after the crop; `corners` holds the rest of the turns."""
        return self.turns % 2 == 1

    def corners(self) -> tuple[np.ndarray, np.ndarray]:
        """(B, 2) where each crop starts and ends, row then column; ends before its start if mirrored.

        A counter-clockwise quarter turn is a left-right flip and then a transposition, half a turn is both
        flips, so only the transposition is left to be done after the crop.
        """
        horizontal = self.horizontal ^ np.isin(self.turns, (1, 2))
        vertical = self.vertical ^ np.isin(self.turns, (2, 3))
        start = np.where(vertical, self.bottom, self.top), np.where(horizontal, self.right, self.left)
        end = np.where(vertical, self.top, self.bottom), np.where(horizontal, self.left, self.right)
        return np.stack(start, 1), np.stack(end, 1)


def keys(seed: int, epoch: Epoch, index: np.ndarray) -> np.ndarray:
    """(B,) int64: one key per sample and epoch, the root of all its draws."""
    return _hash(seed, epoch, index, KEY)


def order(seed: int, epoch: int, indices: np.ndarray) -> np.ndarray:
    """(N,) int64 permutation of `indices` for this epoch.

    Each index has its own place, a hash, and ties go by index: without some of the indices the others keep
    their relative order.
    """
    ascending = np.sort(np.asarray(indices, np.int64))
    return ascending[np.argsort(_hash(seed, epoch, ascending, ORDER), kind="stable")]


def draw(
    view: View,
    seed: int,
    epoch: Epoch,
    index: np.ndarray,
    number: int,
    heights: np.ndarray,
    widths: np.ndarray,
) -> Draws:
    """The draws of `view`, the `number`-th of its samples, for B samples.

    Args:
        view: ranges and probabilities.
        seed: of the run.
        epoch: from 0; one for all, or (B,) of them.
        index: (B,) int64 rows of `samples.csv`.
        number: place of the view among the views of a sample; two equal views get different draws.
        heights: (B,) pixels of the source images.
        widths: (B,) pixels of the source images.
    """
    more = view.turn or view.angle or view.stain or view.solarise or view.jpeg
    draws = uniform(keys(seed, epoch, index), VIEW + number, FIRST + (MORE if more else 0))
    crop, rest = draws[:, : 2 * ATTEMPTS + 2], draws[:, 2 * ATTEMPTS + 2 : FIRST].T
    new = draws[:, FIRST:].T if more else np.ones((MORE, len(draws)))  # 1 is never below a probability
    jittered, grey, blurred = rest[2] < view.jitter, rest[7] < view.grey, rest[8] < view.blur

    def factor(row: np.ndarray, reach: float) -> np.ndarray:
        return np.where(jittered, _between(row, max(0.0, 1 - reach), 1 + reach), 1).astype(np.float32)

    top, left, bottom, right = _boxes(view, crop, heights, widths)
    stained, (worst, best) = (new[3] < view.stain)[:, None], view.quality
    factors = _between(new[4:7].T, max(0.0, 1 - view.stain_factor), 1 + view.stain_factor)
    shifts = _between(new[7:10].T, -view.stain_shift, view.stain_shift)
    return Draws(
        top=top,
        left=left,
        bottom=bottom,
        right=right,
        horizontal=rest[0] < view.flip,
        vertical=rest[1] < view.upside,
        brightness=factor(rest[3], view.brightness),
        contrast=factor(rest[4], view.contrast),
        saturation=np.where(grey, np.float32(0), factor(rest[5], view.saturation)),
        hue=np.where(jittered, _between(rest[6], -360 * view.hue, 360 * view.hue), 0).astype(np.float32),
        sigma=np.where(blurred, _between(rest[9], *view.sigma), NO_BLUR).astype(np.float32),
        turns=np.where(new[0] < view.turn, new[1] * 4, 0).astype(np.int64),
        angle=_between(new[2], -view.angle, view.angle).astype(np.float32),
        stain_factor=np.where(stained, factors, 1).astype(np.float32),
        stain_shift=np.where(stained, shifts, 0).astype(np.float32),
        solarised=new[10] < view.solarise,
        quality=np.where(new[11] < view.jpeg, worst + new[12] * (best - worst + 1), 0).astype(np.int64),
    )


def _hash(seed: int, epoch: Epoch, index: np.ndarray, purpose: int) -> np.ndarray:
    index = np.asarray(index, np.int64)
    high, low, _, _ = philox(
        (index & MASK, index >> 32, epoch & MASK, purpose), (seed & MASK, (seed >> 32) & MASK)
    )
    return (high << 32) | low


def _between(draws: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * draws


def _boxes(view: View, draws: np.ndarray, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """(4, B) float32 top, left, bottom, right."""
    heights, widths = np.asarray(heights, np.int64), np.asarray(widths, np.int64)
    if view.area == (1.0, 1.0) and view.ratio == (1.0, 1.0):
        sizes, inverse = np.unique(np.stack([heights, widths], 1), axis=0, return_inverse=True)
        boxes = np.array([evaluation_box(int(h), int(w), "crop") for h, w in sizes], np.float32)
        return boxes.reshape(-1, 4)[inverse.reshape(-1)].T
    return _random_resized_crop(view, draws, heights, widths).astype(np.float32)


def _random_resized_crop(
    view: View, draws: np.ndarray, heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    """(4, B) boxes by torchvision's rule: the first of ten shapes that fits, else a clipped centre crop."""
    low, high = view.ratio
    area = _between(draws[:, :ATTEMPTS], *view.area) * (heights * widths)[:, None]
    ratio = np.exp(_between(draws[:, ATTEMPTS : 2 * ATTEMPTS], math.log(low), math.log(high)))
    tried_h, tried_w = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    fits = (tried_h > 0) & (tried_w > 0) & (tried_h <= heights[:, None]) & (tried_w <= widths[:, None])
    first = np.argmax(fits, 1)[:, None]
    h, w = np.take_along_axis(tried_h, first, 1)[:, 0], np.take_along_axis(tried_w, first, 1)[:, 0]
    top = np.floor(draws[:, 2 * ATTEMPTS] * (heights - h + 1))
    left = np.floor(draws[:, 2 * ATTEMPTS + 1] * (widths - w + 1))

    none = ~fits.any(1)
    h = np.where(none, np.clip(np.rint(widths / low), 1, heights), h)
    w = np.where(none, np.clip(np.rint(heights * high), 1, widths), w)
    top = np.where(none, (heights - h) // 2, top)
    left = np.where(none, (widths - w) // 2, left)
    return np.stack([top, left, top + h, left + w])
