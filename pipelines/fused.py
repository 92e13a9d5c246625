"""Views on the GPU from images that lie in its memory: Triton kernels by the rules of `batched`.

One kernel crops, resizes, flips, stains, colours and turns an image without ever writing a float; only images
that are blurred need two more. Rotation by an angle is another, JPEG two (`fused_jpeg`); torch solarises.
"""

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from noisyssl.pipelines import fused_jpeg
from noisyssl.pipelines.colour import sent, solarised, twist
from noisyssl.pipelines.draws import NO_BLUR, Draws
from noisyssl.pipelines.stain import density_map, is_stained
from noisyssl.pipelines.turns import rotation
from noisyssl.views import View

BLOCK = 1024
"""Pixels that a program computes."""


def numbers(draws: Draws) -> np.ndarray:
    """(B, 31) float32, all that the kernels know of each sample.

    First and last row (0, 1) and column (2, 3) of the crop, transposed (4), sigma (5), colour matrix (6-14)
    and offset (15), stained (16), density map (17-28), cosine and sine of the angle (29, 30).
    """
    (top, left), (bottom, right) = (corner.T for corner in draws.corners())
    matrix, offset = twist(draws)
    sigma = np.where(draws.sigma > NO_BLUR, draws.sigma, 0)
    single = np.stack([top, bottom, left, right, draws.transposed(), sigma], 1)
    count = len(sigma)
    parts = (
        single, matrix.reshape(count, 9), (offset + 0.5)[:, None],
        is_stained(draws)[:, None], density_map(draws).reshape(count, 12), rotation(draws.angle),
    )  # fmt: skip
    return np.concatenate(parts, 1).astype(np.float32)


def sent_numbers(draws: Draws, device: torch.device) -> Tensor:
    """`numbers` on the GPU."""
    return sent(numbers(draws), device)


def table(pixels: Tensor) -> Tensor:
    """(N, 3) int64: where each of (N, H, W, 3) uint8 contiguous images lies, its height and width."""
    count, height, width, _ = pixels.shape
    places = torch.arange(count, device=pixels.device) * (height * width * 3) + pixels.data_ptr()
    out = torch.empty((count, 3), dtype=torch.int64, device=pixels.device)
    out[:, 0], out[:, 1], out[:, 2] = places, height, width  # filled there: a copy would wait for the GPU
    return out


def apply(images: Tensor, view: View, draws: Draws, columns: Tensor) -> Tensor:
    """(B, 3, S, S) uint8 in channels-last memory: `view` of the images.

    Args:
        images: (B, 3) int64 on the GPU: address, height and width of each, (H, W, 3) uint8 without gaps.
            Whoever owns the memory keeps it until the stream is through.
        view: decides the size, and what is done after the crop at all.
        draws: of the same B samples.
        columns: their `numbers`, beside the images.

    Nothing waits for the GPU: which images are blurred is known on the host.
    """
    size, count, device = view.size, len(images), images.device
    out = torch.empty((count, size, size, 3), dtype=torch.uint8, device=device)
    colour = bool(view.jitter or view.grey or view.blur)
    grid = (count, triton.cdiv(size * size, BLOCK))
    crop[grid](images, columns, out, SIZE=size, STAIN=view.stain > 0, COLOUR=colour, BLOCK=BLOCK)
    blurred = np.flatnonzero(draws.sigma > NO_BLUR)
    if len(blurred):
        rows = sent(blurred.astype(np.int32), device)
        between = torch.empty((len(blurred), size, size, 3), dtype=torch.float32, device=device)
        blur_across[len(blurred), triton.cdiv(3 * size * size, BLOCK)](
            out, rows, columns, between, SIZE=size, BLOCK=BLOCK
        )
        blur_down[len(blurred), grid[1]](between, rows, columns, out, SIZE=size, BLOCK=BLOCK)
    if view.angle:
        crops, out = out, torch.empty_like(out)
        turn[grid](crops, columns, out, SIZE=size, BLOCK=BLOCK)
    if view.solarise:
        out = solarised(out, draws)
    if view.jpeg:
        fused_jpeg.compress(out, draws)
    return out.permute(0, 3, 1, 2)


def try_on(device: torch.device) -> None:
    """Run a kernel: Triton builds what starts one by a C compiler, with Python's headers."""
    image = torch.zeros((1, 2, 2, 3), dtype=torch.uint8, device=device)
    columns = torch.zeros((1, 31), device=device)
    turn[1, 1](image, columns, torch.empty_like(image), SIZE=2, BLOCK=BLOCK)


@triton.jit
def crop(
    images, numbers, out,
    SIZE: tl.constexpr, STAIN: tl.constexpr, COLOUR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Crop and resize to bytes, stain to bytes; colour and transpose images that no blur waits for."""
    sample = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIZE * SIZE
    y, x = pixel // SIZE, pixel % SIZE
    row = numbers + sample * 31
    entry = images + sample * 3
    image = tl.load(entry).to(tl.pointer_type(tl.uint8))
    height, width = tl.load(entry + 1).to(tl.int32), tl.load(entry + 2).to(tl.int32)
    top, bottom, left, right = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    down, across = (bottom - top) / SIZE, (right - left) / SIZE
    tall, wide = tl.maximum(tl.abs(down), 1.0), tl.maximum(tl.abs(across), 1.0)
    middle_y, middle_x = top + (y.to(tl.float32) + 0.5) * down, left + (x.to(tl.float32) + 0.5) * across
    first_y = tl.floor(middle_y - tall - 0.5).to(tl.int32) + 1
    first_x = tl.floor(middle_x - wide - 0.5).to(tl.int32) + 1
    taps_y, taps_x = tl.ceil(2 * tall).to(tl.int32), tl.ceil(2 * wide).to(tl.int32)
    red, green, blue = middle_y * 0, middle_y * 0, middle_y * 0
    total = middle_y * 0
    for i in range(0, taps_y):
        at_y = first_y + i
        weight_y = tl.maximum(0.0, 1 - tl.abs(at_y.to(tl.float32) + 0.5 - middle_y) / tall)
        line = tl.minimum(tl.maximum(at_y, 0), height - 1) * width
        for j in range(0, taps_x):
            at_x = first_x + j
            weight_x = tl.maximum(0.0, 1 - tl.abs(at_x.to(tl.float32) + 0.5 - middle_x) / wide)
            weight = weight_y * weight_x
            at = image + (line + tl.minimum(tl.maximum(at_x, 0), width - 1)) * 3
            red += weight * tl.load(at, mask=inside, other=0).to(tl.float32)
            green += weight * tl.load(at + 1, mask=inside, other=0).to(tl.float32)
            blue += weight * tl.load(at + 2, mask=inside, other=0).to(tl.float32)
            total += weight
    red, green, blue = _byte(red / total + 0.5), _byte(green / total + 0.5), _byte(blue / total + 0.5)
    if STAIN:
        if tl.load(row + 16) > 0:
            r, g, b = _density(red), _density(green), _density(blue)
            red = _stained(r, g, b, row + 17)
            green = _stained(r, g, b, row + 21)
            blue = _stained(r, g, b, row + 25)
    place = pixel
    if tl.load(row + 5) == 0:
        if COLOUR:
            r, g, b = red, green, blue
            red, green, blue = _coloured(r, g, b, row)
        place = tl.where(tl.load(row + 4) > 0, x * SIZE + y, pixel)
    _store(out + sample * SIZE * SIZE * 3, place, red, green, blue, inside)


@triton.jit
def blur_across(images, rows, numbers, between, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(N, S, S, 3) float32: the images at `rows` blurred along their rows, mirrored at the border."""
    sample = tl.load(rows + tl.program_id(0)).to(tl.int64)
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = value < SIZE * SIZE * 3
    x = value // 3 % SIZE
    sigma = tl.load(numbers + sample * 31 + 5)
    reach = tl.minimum(tl.ceil(3 * sigma).to(tl.int32), SIZE - 1)
    image = images + sample * SIZE * SIZE * 3
    out, total = value.to(tl.float32) * 0, 0.0
    for step in range(-reach, reach + 1):
        weight = tl.exp(-0.5 * (step / sigma) * (step / sigma))
        to = tl.abs(x + step)
        to = tl.where(to > SIZE - 1, 2 * (SIZE - 1) - to, to)
        out += weight * tl.load(image + value + 3 * (to - x), mask=inside, other=0).to(tl.float32)
        total += weight
    tl.store(between + tl.program_id(0).to(tl.int64) * SIZE * SIZE * 3 + value, out / total, mask=inside)


@triton.jit
def blur_down(between, rows, numbers, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Blur along the columns, colour, round and transpose into the images at `rows`."""
    sample = tl.load(rows + tl.program_id(0)).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIZE * SIZE
    y, x = pixel // SIZE, pixel % SIZE
    row = numbers + sample * 31
    sigma = tl.load(row + 5)
    reach = tl.minimum(tl.ceil(3 * sigma).to(tl.int32), SIZE - 1)
    image = between + tl.program_id(0).to(tl.int64) * SIZE * SIZE * 3
    r, g, b = y.to(tl.float32) * 0, y.to(tl.float32) * 0, y.to(tl.float32) * 0
    total = 0.0
    for step in range(-reach, reach + 1):
        weight = tl.exp(-0.5 * (step / sigma) * (step / sigma))
        to = tl.abs(y + step)
        to = tl.where(to > SIZE - 1, 2 * (SIZE - 1) - to, to)
        at = image + (to * SIZE + x) * 3
        r += weight * tl.load(at, mask=inside, other=0)
        g += weight * tl.load(at + 1, mask=inside, other=0)
        b += weight * tl.load(at + 2, mask=inside, other=0)
        total += weight
    r, g, b = r / total, g / total, b / total
    place = tl.where(tl.load(row + 4) > 0, x * SIZE + y, pixel)
    red, green, blue = _coloured(r, g, b, row)
    _store(out + sample * SIZE * SIZE * 3, place, red, green, blue, inside)


@triton.jit
def turn(images, numbers, out, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rotate about the centre; without an angle every pixel falls on itself."""
    sample = tl.program_id(0).to(tl.int64)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < SIZE * SIZE
    middle = 0.5 * (SIZE - 1)
    v, u = (pixel // SIZE).to(tl.float32) - middle, (pixel % SIZE).to(tl.float32) - middle
    cosine, sine = tl.load(numbers + sample * 31 + 29), tl.load(numbers + sample * 31 + 30)
    column = tl.minimum(tl.maximum(cosine * u - sine * v + middle, 0.0), SIZE - 1.0)
    row = tl.minimum(tl.maximum(sine * u + cosine * v + middle, 0.0), SIZE - 1.0)
    x, y = tl.floor(column).to(tl.int32), tl.floor(row).to(tl.int32)
    right, below = tl.minimum(x + 1, SIZE - 1), tl.minimum(y + 1, SIZE - 1)
    across, down = column - x, row - y
    image = images + sample * SIZE * SIZE * 3
    red, green, blue = column * 0, column * 0, column * 0
    for i in tl.static_range(2):
        line, of_row = (below, down) if i else (y, 1 - down)
        for j in tl.static_range(2):
            place, weight = (right, of_row * across) if j else (x, of_row * (1 - across))
            at = image + (line * SIZE + place) * 3
            red += weight * tl.load(at, mask=inside, other=0).to(tl.float32)
            green += weight * tl.load(at + 1, mask=inside, other=0).to(tl.float32)
            blue += weight * tl.load(at + 2, mask=inside, other=0).to(tl.float32)
    red, green, blue = _byte(red + 0.5), _byte(green + 0.5), _byte(blue + 0.5)
    _store(out + sample * SIZE * SIZE * 3, pixel, red, green, blue, inside)


@triton.jit
def _byte(value):
    """A whole number in 0-255, by truncation."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32).to(tl.float32)


@triton.jit
def _density(value):
    """Optical density in bits; black counts as 1."""
    return tl.log2(255.0 / tl.maximum(value, 1.0))


@triton.jit
def _stained(r, g, b, change):
    """One channel from three densities and four numbers."""
    d = tl.load(change) * r + tl.load(change + 1) * g + tl.load(change + 2) * b + tl.load(change + 3)
    return _byte(255.0 * tl.exp2(-d) + 0.5)


@triton.jit
def _coloured(r, g, b, row):
    """Red, green, blue through the affine map, whose offset holds the half that rounds."""
    offset = tl.load(row + 15)
    red = tl.load(row + 6) * r + tl.load(row + 7) * g + tl.load(row + 8) * b + offset
    green = tl.load(row + 9) * r + tl.load(row + 10) * g + tl.load(row + 11) * b + offset
    blue = tl.load(row + 12) * r + tl.load(row + 13) * g + tl.load(row + 14) * b + offset
    return _byte(red), _byte(green), _byte(blue)


@triton.jit
def _store(image, place, red, green, blue, inside):
    """Three whole floats as the bytes of one pixel."""
    at = image + place * 3
    tl.store(at, red.to(tl.int32).to(tl.uint8), mask=inside)
    tl.store(at + 1, green.to(tl.int32).to(tl.uint8), mask=inside)
    tl.store(at + 2, blue.to(tl.int32).to(tl.uint8), mask=inside)
