"""Views of one image by compiled loops: crop, resize, stain, blur, colour, while the rows are in the cache.

What `batched` and `colour` do by matrices over whole batches, by the same rules.
"""

import math

import numpy as np

from noisyssl.pipelines.jit import compiled

HALF, ONE, WHITE = np.float32(0.5), np.float32(1), np.float32(255)
DENSITY = -np.log2(np.maximum(np.arange(256), 1) / 255).astype(np.float32)
"""Optical density of each byte in bits, by look-up; black counts as 1."""
TOP, TWO, MINUS_TWO = np.float32(np.log2(255)), np.float32(2), np.float32(-2)
POWER = np.polynomial.Polynomial.fit(x := np.linspace(0, 1, 999), 2**x, 4).convert().coef.astype(np.float32)
"""Of a polynomial that is 2**x for x in [0, 1], to 4e-6."""


@compiled
def make_views(
    image: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    stained: np.ndarray,
    density: np.ndarray,
    sigma: np.ndarray,
    matrix: np.ndarray,
    offset: np.ndarray,
    planes: tuple[np.ndarray, ...],
    outs: tuple[np.ndarray, ...],
) -> None:
    """Write V views of (H, W, 3) uint8 `image` to `outs`, each (S, S, 3) uint8.

    One call for all of them, since threads queue for the interpreter between calls.

    Args:
        start: (V, 2) float32 row and column where each crop starts.
        end: (V, 2) float32 where it ends; before its start, it comes out mirrored.
        stained: (V,) bool.
        density: (V, 3, 4) float32 on optical densities and 1.
        sigma: (V,) float32 of the blur in pixels of the view; 0 for none.
        matrix: (V, 3, 3) float32 on RGB in 0-255.
        offset: (V,) added afterwards; holds the half that makes the final truncation a rounding.
        planes: per view (3, S, S) uint8 to work in.
    """
    for n in range(len(outs)):
        resize(image, start[n], end[n], planes[n])
        if stained[n]:
            stain_planes(planes[n], density[n])
        colour_planes(planes[n], sigma[n], matrix[n], offset[n], outs[n])


@compiled
def colour_planes(
    planes: np.ndarray, sigma: float, matrix: np.ndarray, offset: float, out: np.ndarray
) -> None:
    """Blur and colour (3, S, S) uint8 `planes` into (S, S, 3) uint8 `out`."""
    size = len(out)
    reach = min(math.ceil(3 * sigma), size - 1) if sigma else 0
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
def stain_planes(planes: np.ndarray, change: np.ndarray) -> None:
    """`stain.stain` of (3, S, S) uint8 `planes` in place, by (3, 4) `change`."""
    size = planes.shape[1]
    density = np.empty((3, size), np.float32)
    red, green, blue = density[0], density[1], density[2]
    for y in range(size):
        for channel in range(3):
            line, row = planes[channel, y], density[channel]
            for x in range(size):
                row[x] = DENSITY[line[x]]
        for channel in range(3):
            r, g, b, shift = change[channel, 0], change[channel, 1], change[channel, 2], change[channel, 3]
            row = planes[channel, y]
            for x in range(size):
                bits = TOP - (r * red[x] + g * green[x] + b * blue[x] + shift)
                row[x] = np.uint8(np.int32(power_of_two(min(max(bits, MINUS_TWO), TOP)) + HALF))


@compiled
def power_of_two(x: float) -> float:
    """2**x for x >= -2, as float32: a polynomial for the fraction, the whole part as an exponent's bits."""
    whole = np.int32(x + TWO)
    part = x + TWO - np.float32(whole)
    value = (((POWER[4] * part + POWER[3]) * part + POWER[2]) * part + POWER[1]) * part + POWER[0]
    return value * np.int32((whole + np.int32(125)) << np.int32(23)).view(np.float32)


@compiled
def gaussian(sigma: float, reach: int) -> np.ndarray:
    """(reach + 1,) float32 right half of a kernel whose whole sums to one, the middle first."""
    kernel = np.empty(reach + 1, np.float32)
    kernel[0] = ONE
    for k in range(1, reach + 1):
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
