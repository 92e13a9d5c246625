"""Views on the CPU: one compiled pass per image, from decoded pixels to the finished copy.

What `batched` does by matrices over whole batches, by the same rules, in loops that stay in the cache
(numba); an image keeps one core busy, and threads take different images.
"""

import math
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from noisyssl.pipelines.colour import twist
from noisyssl.pipelines.draws import NO_BLUR, Draws
from noisyssl.views import View

TASK = 8
"""Images that a thread takes at a time."""
HALF, ONE, WHITE = np.float32(0.5), np.float32(1), np.float32(255)


def compiled(function: Callable[..., object]) -> Any:
    """`function` as machine code that holds no interpreter lock; kept on disk where there is a place."""
    rules: dict[str, Any] = {
        "nogil": True,
        "fastmath": {"contract"},
    }  # "contract": multiply and add in one instruction
    try:
        return njit(cache=True, **rules)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(**rules)(function)


class Memory:
    """Arrays for batches, used again once a batch is gone: new memory costs a fifth of a view's time."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...]) -> np.ndarray:
        """An uninitialised uint8 array; whoever refers to it, or to a tensor of it, keeps it."""
        free = self._free.setdefault(shape, [])
        whole = free.pop() if free else np.empty(shape, np.uint8)
        lent = whole[:]
        weakref.finalize(lent, free.append, whole).atexit = False
        return lent


def apply(
    images: Sequence[np.ndarray],
    views: Sequence[View],
    draws: Sequence[Draws],
    pool: Executor,
    memory: Memory,
) -> tuple[Tensor, ...]:
    """Per view (B, 3, S, S) uint8 in channels-last memory, safe to keep.

    Args:
        images: B arrays (H, W, 3) uint8, contiguous; sizes may differ.
        views: decide the sizes.
        draws: per view, of the same B samples.
        pool: its threads share the images out.
        memory: where the views are written.
    """
    outs = [memory.empty((len(images), view.size, view.size, 3)) for view in views]
    columns = []
    for one in draws:
        change, shift = twist(one)
        columns.append(
            (*one.corners(), one.sigma, change.astype(np.float32), (shift + 0.5).astype(np.float32))
        )
    start, end, sigma, matrix, offset = (np.stack(column, 1) for column in zip(*columns, strict=True))

    def make(first: int) -> None:
        planes = tuple(np.empty((3, view.size, view.size), np.uint8) for view in views)
        for i in range(first, min(first + TASK, len(images))):
            image = images[i].view()
            image.flags.writeable = False  # as memory maps are: one compiled variant serves all sources
            written = tuple(out[i] for out in outs)
            make_views(image, start[i], end[i], sigma[i], matrix[i], offset[i], planes, written)

    for _ in pool.map(make, range(0, len(images), TASK)):
        pass
    return tuple(torch.from_numpy(out).permute(0, 3, 1, 2) for out in outs)


@compiled
def make_views(
    image: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    sigma: np.ndarray,
    matrix: np.ndarray,
    offset: np.ndarray,
    planes: tuple[np.ndarray, ...],
    outs: tuple[np.ndarray, ...],
) -> None:
    """`make_view` for each of V views: one call, since threads queue for the interpreter between calls."""
    for n in range(len(outs)):
        make_view(image, start[n], end[n], sigma[n], matrix[n], offset[n], planes[n], outs[n])


@compiled
def make_view(
    image: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    sigma: float,
    matrix: np.ndarray,
    offset: float,
    planes: np.ndarray,
    out: np.ndarray,
) -> None:
    """Write one view of (H, W, 3) uint8 `image` to (S, S, 3) uint8 `out`.

    Args:
        start: (2,) float32 row and column where the crop starts.
        end: (2,) float32 where it ends; before its start, it comes out mirrored.
        sigma: of the blur in pixels of the view; at most `NO_BLUR` for none.
        matrix: (3, 3) float32 on RGB in 0-255.
        offset: added afterwards; holds the half that makes the final truncation a rounding.
        planes: (3, S, S) uint8 to work in.
    """
    size = len(out)
    resize(image, start, end, planes)
    reach = min(math.ceil(3 * sigma), size - 1) if sigma > NO_BLUR else 0
    kernel = gaussian(sigma, reach)
    rows, padded = np.empty((3, size), np.float32), np.empty(size + 2 * reach, np.float32)
    done = np.empty((3, size), np.uint8)
    for y in range(size):
        for channel in range(3):
            blur_row(planes[channel], y, kernel, padded, rows[channel])
        colour_row(rows, matrix, offset, done, out[y])


@compiled
def resize(image: np.ndarray, start: np.ndarray, end: np.ndarray, planes: np.ndarray) -> None:
    """Crop and resize (H, W, 3) uint8 to (3, S, S) uint8 `planes`, halves rounded up.

    Summing whole rows is cheap, picking columns is not: where the crop is enlarged, the columns of each
    source row are picked once and kept for the next output row; else rows are summed first.
    """
    height, width, _ = image.shape
    size = planes.shape[1]
    rows, row_weight = taps(start[0], end[0], height, size)
    columns, column_weight = taps(start[1], end[1], width, size)
    left, right = 3 * columns.min(), 3 * (columns.max() + 1)
    columns = 3 * columns - left
    line = np.empty(right - left, np.float32)
    kept, kept_rows = np.empty((2, 3, size), np.float32), np.full(2, -1, np.int32)
    work = np.empty((3, size), np.float32)
    flat = image.reshape(height, 3 * width)
    for y in range(size):
        if rows.shape[1] == 2:
            for row in rows[y]:
                if kept_rows[row % 2] != row:
                    source = flat[row, left:right]
                    for i in range(len(line)):
                        line[i] = source[i]
                    pick(line, columns, column_weight, kept[row % 2])
                    kept_rows[row % 2] = row
            for channel in range(3):
                here, upper = row_weight[y, 0], kept[rows[y, 0] % 2, channel]
                there, lower = row_weight[y, 1], kept[rows[y, 1] % 2, channel]
                row_out = work[channel]
                for x in range(size):
                    row_out[x] = here * upper[x] + there * lower[x]
        else:
            line[:] = 0
            for tap in range(rows.shape[1]):
                weight, source = row_weight[y, tap], flat[rows[y, tap], left:right]
                for i in range(len(line)):
                    line[i] += weight * np.float32(source[i])
            pick(line, columns, column_weight, work)
        for channel in range(3):
            plane, row_out = planes[channel, y], work[channel]
            for x in range(size):
                plane[x] = np.uint8(np.int32(min(row_out[x] + HALF, WHITE)))


@compiled
def pick(line: np.ndarray, columns: np.ndarray, weights: np.ndarray, out: np.ndarray) -> None:
    """(3, S) float32 `out`: each column from its (S, T) places and weights in a line of RGB pixels."""
    red, green, blue = out[0], out[1], out[2]
    size, count = columns.shape
    if count == 2:  # spelt out, it takes half the time
        for x in range(size):
            a, b = columns[x, 0], columns[x, 1]
            here, there = weights[x, 0], weights[x, 1]
            red[x] = here * line[a] + there * line[b]
            green[x] = here * line[a + 1] + there * line[b + 1]
            blue[x] = here * line[a + 2] + there * line[b + 2]
        return
    for x in range(size):
        r = g = b = np.float32(0)
        for tap in range(count):
            at, weight = columns[x, tap], weights[x, tap]
            r += weight * line[at]
            g += weight * line[at + 1]
            b += weight * line[at + 2]
        red[x], green[x], blue[x] = r, g, b


@compiled
def taps(start: float, end: float, source: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(S, T) int32 pixels and float32 weights of antialiased linear resampling: `batched.resize_matrix`."""
    scale = (end - start) / np.float32(size)
    radius = max(ONE, abs(scale))
    count = math.ceil(2 * radius)  # whole numbers inside an open interval of this length
    where, weights = np.empty((size, count), np.int32), np.empty((size, count), np.float32)
    for i in range(size):
        centre = start + (np.float32(i) + HALF) * scale
        first = math.floor(centre - radius - HALF) + 1
        total = np.float32(0)
        for tap in range(count):
            pixel = first + tap
            weight = max(np.float32(0), ONE - abs(np.float32(pixel) + HALF - centre) / radius)
            where[i, tap], weights[i, tap] = min(max(pixel, 0), source - 1), weight
            total += weight
        weights[i] /= total
    return where, weights


@compiled
def gaussian(sigma: float, reach: int) -> np.ndarray:
    """(reach + 1,) float32 right half of a kernel whose whole sums to one, the middle first."""
    kernel = np.empty(reach + 1, np.float32)
    for k in range(reach + 1):
        kernel[k] = math.exp(-0.5 * (k / sigma) ** 2)
    kernel /= 2 * kernel.sum() - kernel[0]
    return kernel


@compiled
def blur_row(plane: np.ndarray, y: int, kernel: np.ndarray, padded: np.ndarray, out: np.ndarray) -> None:
    """Row `y` of a blurred (S, S) plane into (S,) float32 `out`, mirrored at the border.

    `padded` is (S + 2 reach,) float32 to work in.
    """
    size, reach = len(out), len(kernel) - 1
    if not reach:
        for x in range(size):
            out[x] = plane[y, x]
        return
    across = padded[reach : reach + size]
    weight, middle = kernel[0], plane[y]
    for x in range(size):
        across[x] = weight * np.float32(middle[x])
    for k in range(1, reach + 1):
        weight, above, below = kernel[k], plane[abs(y - k)], plane[size - 1 - abs(size - 1 - y - k)]
        for x in range(size):
            across[x] += weight * np.float32(np.int32(above[x]) + np.int32(below[x]))
    for k in range(1, reach + 1):
        padded[reach - k], padded[reach + size - 1 + k] = across[k], across[size - 1 - k]
    weight = kernel[0]
    for x in range(size):
        out[x] = weight * across[x]
    for k in range(1, reach + 1):
        weight = kernel[k]
        left, right = padded[reach - k : reach - k + size], padded[reach + k : reach + k + size]
        for x in range(size):
            out[x] += weight * (left[x] + right[x])


@compiled
def colour_row(
    rows: np.ndarray, matrix: np.ndarray, offset: float, done: np.ndarray, out: np.ndarray
) -> None:
    """(3, S) float32 to (S, 3) uint8 `out` by one affine map; `done` is (3, S) uint8 to work in."""
    red, green, blue = rows[0], rows[1], rows[2]
    size = len(red)
    for channel in range(3):
        r, g, b = matrix[channel, 0], matrix[channel, 1], matrix[channel, 2]
        row = done[channel]
        for x in range(size):
            value = r * red[x] + g * green[x] + b * blue[x] + offset
            row[x] = np.uint8(np.int32(min(max(value, np.float32(0)), WHITE)))
    first, second, third = done[0], done[1], done[2]
    flat = out.reshape(3 * size)  # one stride that the compiler knows: whole registers are interleaved
    for x in range(size):
        flat[3 * x], flat[3 * x + 1], flat[3 * x + 2] = first[x], second[x], third[x]
