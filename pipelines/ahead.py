"""Draws of the batches to come, by a thread in large pieces: one call for many batches is cheaper."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from noisyssl.errors import DataError
from noisyssl.pipelines.draws import Draws, Slot, draw
from noisyssl.pipelines.samples import Samples
from noisyssl.views import View

PIECE = 4096
"""Samples whose draws are computed in one call: a third of the time of calls for 256."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A batch, and what its views will do."""

    slot: Slot
    draws: list[Draws]
    """Per view."""
    numbers: list[Tensor]
    """Per view (B, 31) float32, what `fused` knows of the draws, where it makes the views; else empty."""


def drawn_ahead(
    samples: Samples,
    views: Sequence[View],
    slots: Iterator[Slot],
    *,
    seed: int,
    batch: int,
    device: torch.device | None,
    pool: Executor,
) -> Iterator[Drawn]:
    """Every slot with its draws, in order; one piece is computed while another is handed out.

    Args:
        samples: know the sizes of the images.
        views: what each batch holds of its samples.
        slots: which samples each batch holds.
        seed: of the draws.
        batch: samples in a slot, at most.
        device: where `fused` makes the views, if it does.
        pool: computes.
    """

    def drawn(piece: list[Slot]) -> list[Drawn]:
        if not piece:
            return []
        index = np.concatenate([slot.index for slot in piece])
        epoch = np.concatenate([np.full(len(slot.index), slot.place[0]) for slot in piece])
        sizes = samples.heights[index], samples.widths[index]
        draws = [draw(view, seed, epoch, index, number, *sizes) for number, view in enumerate(views)]
        numbers = []
        if device is not None:
            from noisyssl.pipelines import fused

            numbers = [fused.sent_numbers(one, device) for one in draws]
        ends = np.cumsum([len(slot.index) for slot in piece]).tolist()
        parts = [slice(end - len(slot.index), end) for slot, end in zip(piece, ends, strict=True)]
        return [
            Drawn(slot, [one.part(part) for one in draws], [one[part] for one in numbers])
            for slot, part in zip(piece, parts, strict=True)
        ]

    ended: list[Exception] = []

    def start() -> "Future[list[Drawn]]":
        piece: list[Slot] = []
        try:
            for slot in islice(slots, max(1, PIECE // batch)):
                piece.append(slot)
        except DataError as error:  # of an epoch far ahead: it is raised where that epoch is reached
            ended.append(error)
        return pool.submit(drawn, piece)

    coming = start()
    while ready := coming.result():
        coming = start()
        yield from ready
    if ended:
        raise ended[0]
