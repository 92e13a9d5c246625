"""Evaluation views of samples and a model's logits on them, for figures, model choice and gates."""

import os
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from noisyssl.disk import disk
from noisyssl.evaluation import figures
from noisyssl.geometry import evaluation_view
from noisyssl.images import BadImage
from noisyssl.pipelines.samples import Samples

HELD = 1_000_000_000
"""Bytes of evaluation views that lie on disk between two looks at the same images."""


@contextmanager
def evaluation_images(
    samples: Samples,
    indices: np.ndarray,
    size: int,
    fit: str,
    threads: int,
    folder: Path | None = None,
    dropped: dict[int, str] | None = None,
) -> Iterator[np.ndarray]:
    """(M, size, size, 3) uint8: the evaluation view of each index in order, decoded once.

    Made by `noisyssl.images`, as `predict` makes them, so that figures and served answers agree
    exactly; DALI's view may differ by grey levels. Kept in a nameless file: the memory stays the
    operating system's to reclaim, and nothing is left behind by a kill.

    Args:
        folder: where the file lies; the system's temporary folder by default.
        broken: receives row -> reason of each file that broke after the scan; its row stays black.

    Raises:
        BadImage: a file broke after the scan, and there is no `broken`.
    """
    shape = (len(indices), size, size, 3)
    with tempfile.TemporaryFile(dir=folder) as file, ThreadPoolExecutor(threads) as pool:
        if len(indices) == 0:
            yield np.zeros(shape, dtype=np.uint8)
            return
        with disk(folder or Path(tempfile.gettempdir())):  # reserved now: a mapping cannot report a full disk
            os.posix_fallocate(file.fileno(), 0, int(np.prod(shape)))
        images = np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)

        def fill(row: int) -> None:
            index = int(indices[row])
            try:
                if dropped is None or index not in dropped:
                    images[row] = evaluation_view(samples.image(index), size, fit)
            except BadImage as error:
                if dropped is None:
                    raise
                dropped[index] = str(error)

        for start in range(0, len(indices), 1024):  # bounded queue of futures
            list(pool.map(fill, range(start, min(start + 1024, len(indices)))))
        yield images


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in evaluation mode; afterwards each of its parts is again in the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@torch.no_grad()
def logits_of(module: nn.Module, images: np.ndarray, device: torch.device, batch: int = 256) -> np.ndarray:
    """(M, K) float32 of (M, S, S, 3) uint8 images, in evaluation mode and full float32 (no TF32).

    Of a backbone these are the features.
    """
    out = []
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with evaluating(module):
            for start in range(0, len(images), batch):
                chunk = torch.from_numpy(np.array(images[start : start + batch]))
                views = chunk.to(device, non_blocking=True).permute(0, 3, 1, 2)
                out.append(module(views).float().cpu())
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return torch.cat(out).numpy()


class Looks:
    """Logits of samples that are looked at epoch after epoch; use it as a context.

    The evaluation views of the last question stay on disk, up to `HELD` bytes; a larger set is decoded anew
    in chunks of that size, so neither memory nor disk grows with it.
    """

    def __init__(
        self,
        samples: Samples,
        size: int,
        fit: str,
        threads: int,
        folder: Path | None = None,
        dropped: dict[int, str] | None = None,
    ) -> None:
        """The arguments of `evaluation_images`, but for the indices."""
        self.samples, self.size, self.dropped = samples, size, dropped
        self.place = (size, fit, threads, folder, dropped)
        self.indices = np.zeros(0, np.int64)
        self.views = np.zeros(0, np.uint8)
        self.open = ExitStack()

    def __enter__(self) -> "Looks":
        return self

    def __exit__(self, *exc: object) -> None:
        self.open.close()

    def logits(self, module: nn.Module, indices: np.ndarray, device: torch.device) -> np.ndarray:
        """(M, K) float32 logits of `module` on the evaluation views of (M,) `indices`.

        Raises:
            BadImage: as `evaluation_images`.
        """
        rows = max(1, HELD // (self.size * self.size * 3))
        parts = []
        for start in range(0, len(indices), rows):
            chunk = indices[start : start + rows]
            if not np.array_equal(chunk, self.indices):
                self.open.close()
                self.indices = chunk
                self.views = self.open.enter_context(evaluation_images(self.samples, chunk, *self.place))
            if self.dropped:  # also what broke since the last look: a resumed run sees it black
                self.views[~whole(chunk, self.dropped)] = 0
            parts.append(logits_of(module, self.views, device))
        return np.concatenate(parts)


def whole(indices: np.ndarray, dropped: Mapping[int, str]) -> np.ndarray:
    """(M,) bool: which of the samples were not dropped."""
    return ~np.isin(indices, np.fromiter(dropped, np.int64, len(dropped)))


def brief(
    logits: np.ndarray,
    labels: np.ndarray,
    indices: np.ndarray,
    dropped: Mapping[int, str],
    classes: tuple[str, ...],
) -> dict[str, Any]:
    """What the log keeps of one epoch on one split: the (N,) labels at `indices` against their logits."""
    known = (labels[indices] >= 0) & whole(indices, dropped)
    result = figures(logits[known], labels[indices[known]], np.arange(known.sum()), classes, resamples=0)
    names = ("accuracy", "balanced_accuracy", "macro_f1")
    return {name: getattr(result, name).value for name in names}
