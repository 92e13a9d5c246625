"""Views on the CPU by compiled loops (numba), from decoded pixels to the finished copies.

What `batched` does by matrices over whole batches, by the same rules; an image keeps one core busy, and
threads take different images.
"""

import weakref
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noisyssl.pipelines import jpeg
from noisyssl.pipelines.colour import twist
from noisyssl.pipelines.draws import NO_BLUR, Draws
from noisyssl.pipelines.loops import make_views
from noisyssl.pipelines.stain import density_map, is_stained
from noisyssl.pipelines.turns import rotate_images, rotation, transpose_images
from noisyssl.views import View

TASK = 8
"""Images that a thread takes at a time."""


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
        sigma = np.where(one.sigma > NO_BLUR, one.sigma, np.float32(0))
        colour = change.astype(np.float32), (shift + 0.5).astype(np.float32)
        columns.append((*one.corners(), is_stained(one), density_map(one), sigma, *colour))
    rows = [np.stack(column, 1) for column in zip(*columns, strict=True)]
    later = [steps_left(view, one) for view, one in zip(views, draws, strict=True)]

    def make(first: int) -> None:
        planes = tuple(np.empty((3, view.size, view.size), np.uint8) for view in views)
        part = slice(first, min(first + TASK, len(images)))
        for i in range(part.start, part.stop):
            image = images[i].view()
            image.flags.writeable = False  # as memory maps are: one compiled variant serves all sources
            make_views(image, *(row[i] for row in rows), planes, tuple(out[i] for out in outs))
        for out, steps in zip(outs, later, strict=True):
            for change, arrays in steps:
                change(out[part], *(array[part] for array in arrays))

    for _ in pool.map(make, range(0, len(images), TASK)):
        pass
    return tuple(torch.from_numpy(out).permute(0, 3, 1, 2) for out in outs)


def steps_left(view: View, draws: Draws) -> list[tuple[Any, tuple[np.ndarray, ...]]]:
    """What is done after `make_views`: functions of (N, S, S, 3) images, in place, and arrays of B rows."""
    steps: list[tuple[Any, tuple[np.ndarray, ...]]] = []
    if view.turn:
        steps.append((transpose_images, (draws.transposed(),)))
    if view.angle:
        steps.append((rotate_images, (rotation(draws.angle),)))
    if view.solarise:
        steps.append((solarise_images, (draws.solarised,)))
    if view.jpeg:
        tables = jpeg.tables(np.maximum(draws.quality, 1)).reshape(-1, 2, 64)
        steps.append((jpeg.compress_images, (tables, draws.quality > 0)))
    return steps


def solarise_images(images: np.ndarray, which: np.ndarray) -> None:
    """Values of 128 and above become 255 minus themselves: whole numbers, so the smaller of the two."""
    for n in np.flatnonzero(which):
        np.minimum(images[n], 255 - images[n], out=images[n])
