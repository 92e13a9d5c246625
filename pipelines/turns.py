"""Turning finished views: the transposition that quarter turns leave, and rotation by a small angle.

Both by torch for batches anywhere, and by compiled loops for images on the CPU.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from noisyssl.pipelines.jit import compiled

HALF, ZERO, BYTE = np.float32(0.5), np.float32(0), np.uint32(255)


def rotation(angle: np.ndarray) -> np.ndarray:
    """(B, 2) float32 cosine and sine of (B,) degrees."""
    radians = np.deg2rad(angle.astype(np.float64))
    return np.stack([np.cos(radians), np.sin(radians)], 1).astype(np.float32)


def rotate(planes: Tensor, turned: Tensor) -> Tensor:
    """(B, C, S, S) uint8 turned counter-clockwise about the centre by (B, 2) cosines and sines.

    Bilinear, halves rounded up; what lies outside repeats the border.
    """
    size = planes.shape[-1]
    at = (torch.arange(size, device=planes.device) + 0.5) * (2 / size) - 1
    y, x = torch.meshgrid(at, at, indexing="ij")
    cosine, sine = turned[:, :1, None], turned[:, 1:, None]
    grid = torch.stack([cosine * x - sine * y, sine * x + cosine * y], 3)
    moved = F.grid_sample(planes.float(), grid, "bilinear", "border", align_corners=False)
    return moved.add_(0.5).clamp_(0, 255).to(torch.uint8)


@compiled
def transpose_images(images: np.ndarray, which: np.ndarray) -> None:
    """Rows and columns of those (N, S, S, 3) uint8 `images` where `which` is true change places."""
    size = images.shape[1]
    for n in range(len(images)):
        if which[n]:
            image = images[n]
            for y in range(size):
                for x in range(y):  # pixel by pixel: channel by channel it takes more than twice the time
                    red, green, blue = image[y, x, 0], image[y, x, 1], image[y, x, 2]
                    image[y, x, 0], image[y, x, 1], image[y, x, 2] = (
                        image[x, y, 0], image[x, y, 1], image[x, y, 2],
                    )  # fmt: skip
                    image[x, y, 0], image[x, y, 1], image[x, y, 2] = red, green, blue


@compiled
def rotate_images(images: np.ndarray, turned: np.ndarray) -> None:
    """`rotate` of (N, S, S, 3) uint8 `images` in place, by (N, 2) cosines and sines."""
    size = images.shape[1]
    packed = np.empty((size + 1) * (size + 1), np.uint32)
    for n in range(len(images)):
        pack(images[n], packed)
        rotate_packed(packed, turned[n, 0], turned[n, 1], images[n])


@compiled
def pack(image: np.ndarray, packed: np.ndarray) -> None:
    """(S, S, 3) uint8 as one word a pixel, with a repeated last row and column: (S + 1) * (S + 1) words."""
    size = len(image)
    wide = size + 1
    for y in range(size):
        row, out = image[y].reshape(3 * size), packed[y * wide : y * wide + size]
        for x in range(size):
            out[x] = row[3 * x] | np.uint32(row[3 * x + 1]) << 8 | np.uint32(row[3 * x + 2]) << 16
        packed[y * wide + size] = out[size - 1]
    packed[size * wide :] = packed[size * wide - wide : size * wide]


@compiled
def rotate_packed(packed: np.ndarray, cosine: float, sine: float, out: np.ndarray) -> None:
    """Write (S, S, 3) uint8 `out`, a row at a time; each step a loop over the row that vectorises."""
    size = len(out)
    wide = size + 1
    middle, last = np.float32(0.5 * (size - 1)), np.float32(size - 1)
    at, words = np.empty(size, np.int32), np.empty((4, size), np.uint32)
    across, down = np.empty(size, np.float32), np.empty(size, np.float32)
    done = np.empty((3, size), np.uint8)
    here, right, below, both = words[0], words[1], words[2], words[3]
    for y in range(size):
        v = np.float32(y) - middle
        for x in range(size):
            u = np.float32(np.int32(x)) - middle
            column = min(max(cosine * u - sine * v + middle, ZERO), last)
            row = min(max(sine * u + cosine * v + middle, ZERO), last)
            left, top = np.int32(column), np.int32(row)
            across[x], down[x] = column - np.float32(left), row - np.float32(top)
            at[x] = np.int32(top * wide + left)
        for x in range(size):
            first = at[x]
            here[x], right[x] = packed[first], packed[first + 1]
            below[x], both[x] = packed[first + wide], packed[first + wide + 1]
        for channel in range(3):
            bits, line = np.uint32(8 * channel), done[channel]
            for x in range(size):
                upper, lower = byte(here[x], bits), byte(below[x], bits)
                upper += across[x] * (byte(right[x], bits) - upper)
                lower += across[x] * (byte(both[x], bits) - lower)
                line[x] = np.uint8(np.int32(upper + down[x] * (lower - upper) + HALF))
        red, green, blue = done[0], done[1], done[2]
        flat = out[y].reshape(3 * size)
        for x in range(size):
            flat[3 * x], flat[3 * x + 1], flat[3 * x + 2] = red[x], green[x], blue[x]


@compiled
def byte(word: int, bits: int) -> np.float32:
    """One byte of a word."""
    return np.float32(np.int32(np.uint32(word >> bits) & BYTE))
