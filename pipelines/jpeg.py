"""What JPEG compression does to an image: ITU-T T.81 with the tables of its annex K, without the coding.

Red, green, blue to luma and chroma (JFIF), chroma halved in both directions (4:2:0), blocks of 8 x 8 by the
cosine transform, rounding to multiples of a table that the quality scales, and back. Padding, roundings and
the linear enlargement of chroma are libjpeg's, so that a real file gives nearly the same pixels.
By torch for batches anywhere, and by compiled loops on the CPU. Outside the cosine transforms all numbers are
whole, and below 2**24 where they are added up: float32 is exact, and both give the same bits.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from noisyssl.pipelines.jit import compiled

LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62), (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99),
)  # fmt: skip
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99), (18, 21, 26, 66, 99, 99, 99, 99), (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99), *[(99,) * 8] * 4,
)  # fmt: skip
TO_YCC = np.array([(19595, 38470, 7471), (-11059, -21709, 32768), (32768, -27439, -5329)], np.float32)
BASE_YCC = np.array([0.5, 128.5, 128.5], np.float32) * 65536 - np.array([0, 1, 1], np.float32)
"""Red, green, blue to luma, Cb, Cr in 0-255, times 65536."""
FROM_YCC = np.array([(0, 91881), (-22554, -46802), (116130, 0)], np.float32)
"""What Cb and Cr about 0 add to red, green, blue, times 65536."""
LIFT = 4096
"""Larger than any coefficient. Adding it before truncation rounds negative numbers too, and leaves the sum
only 11 binary digits behind the point: a tie, which flat blocks are full of, is one however it came about."""
LANES = 16
"""Blocks transformed at a time."""


def tables(quality: np.ndarray) -> np.ndarray:
    """(B, 2, 8, 8) float32 steps for luma and chroma; quality 1 to 100 scales them as libjpeg does."""
    quality = quality.astype(np.int64)[:, None, None, None]
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    return np.clip((np.array([LUMA, CHROMA]) * percent + 50) // 100, 1, 255).astype(np.float32)


def compress(planes: Tensor, steps: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 as they come back from JPEG files; `steps` (B, 2, 8, 8) are their `tables`."""
    size = planes.shape[-1]
    half, beyond = -(-size // 2), -size % 16
    padded = F.pad(planes.float(), (0, beyond, 0, 2 * half - size), mode="replicate")
    red, green, blue = padded.unbind(1)
    luma, *chroma = (
        _whole(float(r) * red + float(g) * green + float(b) * blue + float(base), 1 / 65536)
        for (r, g, b), base in zip(TO_YCC, BASE_YCC, strict=True)
    )
    four = F.avg_pool2d(torch.stack(chroma, 1), 2, divisor_override=1)
    four += 1 + torch.arange(four.shape[-1], device=four.device) % 2  # as libjpeg rounds, up and down in turn
    luma = _through_blocks(luma[:, None] - 128, steps[:, :1])[:, :, :size, :size]
    small = _through_blocks(_whole(four, 0.25) - 128, steps[:, 1:])[:, :, :half, :half]
    large = _enlarged(small)[:, :, :size, :size]
    added = torch.stack(
        [_whole(float(b) * large[:, 0] + float(r) * large[:, 1] + 32768, 1 / 65536) for b, r in FROM_YCC], 1
    )
    return (luma + added + 128).clamp_(0, 255).to(torch.uint8)


def _whole(numbers: Tensor, scale: float) -> Tensor:
    """The whole part of scaled numbers, rounded towards minus infinity."""
    return (numbers * scale).floor_()


def _enlarged(small: Tensor) -> Tensor:
    """(B, 2, 2H, 2W) from (B, 2, H, W): three quarters of its source, a quarter of the next."""
    framed = F.pad(small, (1, 1, 1, 1), mode="replicate")
    middle, before, after = framed[:, :, 1:-1], framed[:, :, :-2], framed[:, :, 2:]
    rows = torch.stack([3 * middle + before, 3 * middle + after], 3).flatten(2, 3)
    middle, before, after = rows[..., 1:-1], rows[..., :-2], rows[..., 2:]
    left, right = _whole(3 * middle + before + 8, 1 / 16), _whole(3 * middle + after + 7, 1 / 16)
    return torch.stack([left, right], 4).flatten(3, 4)


def _through_blocks(planes: Tensor, steps: Tensor) -> Tensor:
    """(B, C, H, W) float about 0, filled up to whole blocks, each rounded to `steps` (B, 1, 8, 8)."""
    planes = F.pad(planes, (0, 0, 0, -planes.shape[2] % 8), mode="replicate")
    frequency, place = torch.arange(8, device=planes.device)[:, None], torch.arange(8, device=planes.device)
    cosines = torch.cos(frequency * (2 * place + 1) * (math.pi / 16)) / 2
    cosines[0] *= math.sqrt(0.5)
    blocks = planes.unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)  # (B, C, H / 8, W / 8, 8, 8)
    steps = steps[:, :, None, None]
    levels = (cosines @ blocks @ cosines.T / steps).add_(LIFT + 0.5).floor_().sub_(LIFT)
    blocks = (cosines.T @ (levels * steps) @ cosines).add_(LIFT + 0.5).floor_().sub_(LIFT).clamp_(-128, 127)
    return blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)


ZERO, ONE, THREE, SEVEN, EIGHT, WHITE = (np.float32(x) for x in (0, 1, 3, 7, 8, 255))
LOW, HIGH, SCALE, QUARTER, SIXTEENTH = (np.float32(x) for x in (-128, 127, 1 / 65536, 1 / 4, 1 / 16))
UP, DOWN = np.float32(LIFT + 0.5), np.float32(LIFT)
Eight = tuple[Any, Any, Any, Any, Any, Any, Any, Any]
C1, C2, C3, C4, C5, C6, C7 = (np.float32(math.cos(k * math.pi / 16) / 2) for k in range(1, 8))


@compiled
def compress_images(images: np.ndarray, steps: np.ndarray, which: np.ndarray) -> None:
    """`compress` in place those (N, S, S, 3) uint8 `images` where `which` is true; `steps` (N, 2, 64)."""
    size = images.shape[1]
    wide = (size + 15) // 16 * 16
    half = (size + 1) // 2
    luma, chroma = np.empty((wide, wide), np.float32), np.empty((2, wide // 2, wide // 2), np.float32)
    for n in range(len(images)):
        if which[n]:
            split(images[n], luma, chroma)
            round_blocks(luma, steps[n, 0])
            for channel in range(2):
                round_blocks(chroma[channel], steps[n, 1])
            join(luma, chroma[:, :half, :half], images[n])


@compiled
def split(image: np.ndarray, luma: np.ndarray, chroma: np.ndarray) -> None:
    """(S, S, 3) uint8 to luma (P, P) and chroma (2, P / 2, P / 2) about 0; the border fills the rest."""
    size, wide = len(image), len(luma)
    half = (size + 1) // 2
    line, colour = np.empty((3, wide), np.float32), np.empty(wide, np.float32)
    red, green, blue = line[0], line[1], line[2]
    for y in range(2 * half):
        row = image[min(y, size - 1)].reshape(3 * size)
        for x in range(size):
            red[x], green[x], blue[x] = row[3 * x], row[3 * x + 1], row[3 * x + 2]
        red[size:], green[size:], blue[size:] = red[size - 1], green[size - 1], blue[size - 1]
        weigh(line, 0, luma[y])
        for x in range(wide):
            luma[y, x] += LOW
        for channel in range(2):
            weigh(line, channel + 1, colour)
            out = chroma[channel, y // 2]
            if y % 2 == 0:
                for x in range(len(out)):
                    out[x] = colour[2 * x] + colour[2 * x + 1]
            else:
                for x in range(len(out)):
                    four = out[x] + colour[2 * x] + colour[2 * x + 1] + np.float32(np.int32(x & 1)) + ONE
                    out[x] = np.float32(np.int32(QUARTER * four)) + LOW
    luma[size:], chroma[:, half:] = luma[size - 1], chroma[:, half - 1 : half]


@compiled
def weigh(line: np.ndarray, k: int, out: np.ndarray) -> None:
    """Row `k` of `TO_YCC` for each pixel of (3, P) `line`, rounded."""
    red, green, blue = line[0], line[1], line[2]
    r, g, b, base = TO_YCC[k, 0], TO_YCC[k, 1], TO_YCC[k, 2], BASE_YCC[k]
    for x in range(len(out)):
        out[x] = np.float32(np.int32(SCALE * (r * red[x] + g * green[x] + b * blue[x] + base)))


@compiled
def join(luma: np.ndarray, chroma: np.ndarray, image: np.ndarray) -> None:
    """Write (S, S, 3) uint8 from luma (P, P) and chroma (2, H, H), H half of S, enlarged linearly."""
    size, half = len(image), chroma.shape[1]
    line, large = np.empty(half + 2, np.float32), np.empty((2, 2 * half), np.float32)
    done = np.empty((3, size), np.uint8)
    blueness, redness = large[0], large[1]
    for y in range(size):
        for channel in range(2):
            near, next = chroma[channel, y // 2], min(max(y // 2 + y % 2 * 2 - 1, 0), half - 1)
            far, inner, out = chroma[channel, next], line[1 : half + 1], large[channel]
            for x in range(half):
                inner[x] = THREE * near[x] + far[x] + np.float32(4 * 128)  # above 0, to be truncated
            line[0], line[half + 1] = inner[0], inner[half - 1]
            for x in range(half):
                left, right = THREE * line[x + 1] + line[x] + EIGHT, THREE * line[x + 1] + line[x + 2] + SEVEN
                out[2 * x] = np.float32(np.int32(SIXTEENTH * left)) + LOW
                out[2 * x + 1] = np.float32(np.int32(SIXTEENTH * right)) + LOW
        row = luma[y]
        for channel in range(3):
            b, r, out = FROM_YCC[channel, 0], FROM_YCC[channel, 1], done[channel]
            for x in range(size):
                added = SCALE * (b * blueness[x] + r * redness[x] + np.float32(32768)) + np.float32(256)
                value = row[x] + np.float32(np.int32(added)) + LOW
                out[x] = np.uint8(np.int32(min(max(value, ZERO), WHITE)))
        red, green, blue = done[0], done[1], done[2]
        flat = image[y].reshape(3 * size)
        for x in range(size):
            flat[3 * x], flat[3 * x + 1], flat[3 * x + 2] = red[x], green[x], blue[x]


@compiled
def round_blocks(plane: np.ndarray, steps: np.ndarray) -> None:
    """Each 8 x 8 block of (H, W) float32 `plane` to multiples of `steps` (64,) in the cosine domain.

    Sixteen blocks at a time, coefficient by coefficient: every step runs over sixteen neighbours in memory.
    """
    across = plane.shape[1] // 8
    count = across * (plane.shape[0] // 8)
    work = np.empty(64 * LANES, np.float32)
    for first in range(0, count, LANES):
        for lane in range(LANES):
            block = min(first + lane, count - 1)
            y, x = 8 * (block // across), 8 * (block % across)
            for i in range(8):
                for j in range(8):
                    work[(8 * i + j) * LANES + lane] = plane[y + i, x + j]
        into(work, 8 * LANES)
        for i in range(8):
            into(work[8 * LANES * i :], LANES)
        for k in range(64):
            step, of = steps[k], np.float32(1) / steps[k]
            for i in range(LANES * k, LANES * k + LANES):
                work[i] = (np.float32(np.int32(work[i] * of + UP)) - DOWN) * step
        back(work, 8 * LANES)
        for i in range(8):
            back(work[8 * LANES * i :], LANES)
        for lane in range(min(LANES, count - first)):
            block = first + lane
            y, x = 8 * (block // across), 8 * (block % across)
            for i in range(8):
                for j in range(8):
                    value = np.float32(np.int32(work[(8 * i + j) * LANES + lane] + UP)) - DOWN
                    plane[y + i, x + j] = min(max(value, LOW), HIGH)


@compiled
def into(w: np.ndarray, step: int) -> None:
    """`cosine` in place of the first 8 rows of `step` numbers, downwards.

    The compiler puts this into `round_blocks`, where it knows that neighbours do not overlap.
    """
    for i in range(step):
        j, k, m = i + 2 * step, i + 4 * step, i + 6 * step
        w[i], w[i + step], w[j], w[j + step], w[k], w[k + step], w[m], w[m + step] = cosine(
            w[i], w[i + step], w[j], w[j + step], w[k], w[k + step], w[m], w[m + step]
        )


@compiled
def back(w: np.ndarray, step: int) -> None:
    """`inverse` in place of the first 8 rows of `step` numbers, downwards."""
    for i in range(step):
        j, k, m = i + 2 * step, i + 4 * step, i + 6 * step
        w[i], w[i + step], w[j], w[j + step], w[k], w[k + step], w[m], w[m + step] = inverse(
            w[i], w[i + step], w[j], w[j + step], w[k], w[k + step], w[m], w[m + step]
        )


@compiled
def cosine(a: float, b: float, c: float, d: float, e: float, f: float, g: float, h: float) -> Eight:
    """The eight coefficients of eight numbers (T.81, A.3.3, in one direction), even and odd ones apart."""
    p, q, r, s = a + h, b + g, c + f, d + e
    t, u, v, w = a - h, b - g, c - f, d - e
    even, odd, k, m = p + s, q + r, p - s, q - r
    first, third = C1 * t + C3 * u + C5 * v + C7 * w, C3 * t - C7 * u - C1 * v - C5 * w
    fifth, seventh = C5 * t - C1 * u + C7 * v + C3 * w, C7 * t - C5 * u + C3 * v - C1 * w
    return (
        C4 * (even + odd),
        first,
        C2 * k + C6 * m,
        third,
        C4 * (even - odd),
        fifth,
        C6 * k - C2 * m,
        seventh,
    )


@compiled
def inverse(a: float, b: float, c: float, d: float, e: float, f: float, g: float, h: float) -> Eight:
    """The eight numbers of eight coefficients."""
    even, odd, k, m = C4 * (a + e), C4 * (a - e), C2 * c + C6 * g, C6 * c - C2 * g
    p, s, q, r = even + k, even - k, odd + m, odd - m
    t, u = C1 * b + C3 * d + C5 * f + C7 * h, C3 * b - C7 * d - C1 * f - C5 * h
    v, w = C5 * b - C1 * d + C7 * f + C3 * h, C7 * b - C5 * d + C3 * f - C1 * h
    return p + t, q + u, r + v, s + w, s - w, r - v, q - u, p - t
