"""`jpeg.compress` on the GPU: two Triton kernels, one for the blocks and one for the pixels.

Between them lie a byte of luma for each pixel and two of chroma for four. Outside the cosine transforms all
numbers are whole, as in the reference; those transforms are products of tiles with a matrix that holds the
cosines of four blocks along its diagonal.
"""

from functools import cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from noisyssl.pipelines.colour import sent
from noisyssl.pipelines.draws import Draws
from noisyssl.pipelines.jpeg import tables

BLOCK = 1024
"""Pixels that a program of `join` computes."""
TILE = 32
"""Pixels along a side of what a program of `split` computes: tensor products take no fewer than 16, and of
chroma there is one for two pixels."""


def compress(images: Tensor, draws: Draws) -> None:
    """Those of (B, S, S, 3) contiguous uint8 `images` that were drawn a quality, in place; nothing waits."""
    rows = np.flatnonzero(draws.quality > 0)
    if not len(rows):
        return
    size, device, count = images.shape[1], images.device, len(rows)
    half, tiles = -(-size // 2), triton.cdiv(size, TILE)
    where = sent(rows.astype(np.int32), device)
    steps = sent(tables(draws.quality[rows]).reshape(count, 128), device)
    luma = torch.empty((count, size, size), dtype=torch.int8, device=device)
    chroma = torch.empty((count, 2, half, half), dtype=torch.int8, device=device)
    split[count, tiles * tiles](
        images, where, steps, cosines(device), luma, chroma, SIZE=size, HALF=half, TILES=tiles, TILE=TILE
    )
    join[count, triton.cdiv(size * size, BLOCK)](
        luma, chroma, where, images, SIZE=size, HALF=half, BLOCK=BLOCK
    )


@cache
def cosines(device: torch.device) -> Tensor:
    """(TILE, TILE) float32: the cosine transform of each eight of TILE numbers."""
    frequency, place = np.arange(8)[:, None], np.arange(8)
    eight = np.cos(frequency * (2 * place + 1) * (np.pi / 16)) / 2
    eight[0] *= np.sqrt(0.5)
    return torch.from_numpy(np.kron(np.eye(TILE // 8), eight).astype(np.float32)).to(device)


@triton.jit
def split(
    images, rows, steps, cosines, luma, chroma,
    SIZE: tl.constexpr, HALF: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Luma (N, S, S) and chroma (N, 2, H, H), int8 about 0, of the images at `rows` after their blocks."""
    number = tl.program_id(0).to(tl.int64)
    image = images + tl.load(rows + number).to(tl.int64) * SIZE * SIZE * 3
    place = tl.arange(0, TILE)
    y, x = tl.program_id(1) // TILES * TILE + place, tl.program_id(1) % TILES * TILE + place
    right = tl.minimum(x, SIZE - 1)[None, :]
    pixels = image + (tl.minimum(y, SIZE - 1)[:, None] * SIZE + right) * 3
    levels = _weighed(pixels, 19595, 38470, 7471, 32768) - 128
    table = steps + number * 128 + place[:, None] % 8 * 8 + place[None, :] % 8
    turned = tl.load(cosines + place[:, None] * TILE + place[None, :])
    levels = _through_blocks(levels, turned, tl.load(table))
    inside = (y[:, None] < SIZE) & (x[None, :] < SIZE)
    tl.store(luma + number * SIZE * SIZE + y[:, None] * SIZE + x[None, :], levels, mask=inside)

    few = tl.arange(0, TILE // 2)
    table = steps + number * 128 + 64 + few[:, None] % 8 * 8 + few[None, :] % 8
    turned = tl.load(cosines + few[:, None] * TILE + few[None, :])
    y, x = tl.program_id(1) // TILES * (TILE // 2) + few, tl.program_id(1) % TILES * (TILE // 2) + few
    inside = (y[:, None] < HALF) & (x[None, :] < HALF)
    for channel in tl.static_range(2):
        four = 1 + x[None, :] % 2  # as libjpeg rounds, up and down in turn
        for i in tl.static_range(2):
            # below chroma its last line is repeated, which of an even size is not the last line of pixels
            line = tl.minimum(2 * tl.minimum(y, HALF - 1) + i, SIZE - 1)[:, None] * SIZE
            for j in tl.static_range(2):
                pixels = image + (line + tl.minimum(2 * x + j, SIZE - 1)[None, :]) * 3
                if channel == 0:
                    four = four + _weighed(pixels, -11059, -21709, 32768, 8421375)  # 128.5 * 65536 - 1
                else:
                    four = four + _weighed(pixels, 32768, -27439, -5329, 8421375)
        levels = _through_blocks(four // 4 - 128, turned, tl.load(table))
        at = chroma + (number * 2 + channel) * HALF * HALF + y[:, None] * HALF + x[None, :]
        tl.store(at, levels, mask=inside)


@triton.jit
def join(luma, chroma, rows, images, SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Red, green, blue of the images at `rows`: chroma enlarged linearly, three quarters near, one far."""
    number = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIZE * SIZE
    y, x = pixel // SIZE, pixel % SIZE
    near, left = y // 2, x // 2
    far = tl.minimum(tl.maximum(near + y % 2 * 2 - 1, 0), HALF - 1)
    beside = tl.minimum(tl.maximum(left + x % 2 * 2 - 1, 0), HALF - 1)
    blueness = _enlarged(chroma + number * 2 * HALF * HALF, near, far, left, beside, x, HALF, inside)
    redness = _enlarged(chroma + (number * 2 + 1) * HALF * HALF, near, far, left, beside, x, HALF, inside)
    light = tl.load(luma + number * SIZE * SIZE + pixel, mask=inside, other=0).to(tl.int32) + 128
    at = images + tl.load(rows + number).to(tl.int64) * SIZE * SIZE * 3 + pixel * 3
    _store_sum(at, light, 91881 * redness, inside)
    _store_sum(at + 1, light, -22554 * blueness - 46802 * redness, inside)
    _store_sum(at + 2, light, 116130 * blueness, inside)


@triton.jit
def _weighed(pixels, red, green, blue, base):
    """Three channels of int32, weighed and rounded down from 65536ths."""
    r, g, b = tl.load(pixels), tl.load(pixels + 1), tl.load(pixels + 2)
    return (red * r.to(tl.int32) + green * g.to(tl.int32) + blue * b.to(tl.int32) + base) >> 16


@triton.jit
def _through_blocks(levels, cosines, steps):
    """Each 8 x 8 block of whole numbers to multiples of `steps` in the cosine domain, and back to int8."""
    found = tl.dot(cosines, levels.to(tl.float32), input_precision="ieee")
    found = tl.dot(found, tl.trans(cosines), input_precision="ieee")
    # see `jpeg.LIFT`
    kept = (tl.floor(found / steps + 4096.5) - 4096.0) * steps
    back = tl.dot(tl.trans(cosines), kept, input_precision="ieee")
    back = tl.dot(back, cosines, input_precision="ieee")
    whole = tl.floor(back + 4096.5) - 4096.0
    return tl.minimum(tl.maximum(whole, -128.0), 127.0).to(tl.int8)


@triton.jit
def _enlarged(plane, near, far, left, beside, x, HALF: tl.constexpr, inside):
    """Sixteenths of four values of (H, H) int8, rounded up and down in turn as libjpeg does."""
    here = 3 * tl.load(plane + near * HALF + left, mask=inside, other=0).to(tl.int32)
    here += tl.load(plane + far * HALF + left, mask=inside, other=0).to(tl.int32)
    next = 3 * tl.load(plane + near * HALF + beside, mask=inside, other=0).to(tl.int32)
    next += tl.load(plane + far * HALF + beside, mask=inside, other=0).to(tl.int32)
    return (3 * here + next + 8 - x % 2) >> 4


@triton.jit
def _store_sum(at, light, change, inside):
    value = light + ((change + 32768) >> 16)
    tl.store(at, tl.minimum(tl.maximum(value, 0), 255).to(tl.uint8), mask=inside)
