"""What BEST and LAST are made of: weights and test logits of some epochs, as files that outlive a kill."""

import io
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

from noisyssl import checkpoint
from noisyssl.classifier import Classifier
from noisyssl.errors import DataError
from noisyssl.pipelines.run import KEEP, Run

LAST = 5
"""Epochs that LAST averages over."""


class Kept:
    """Weights and test logits that BEST and LAST may need, by epoch, as files that outlive a kill."""

    def __init__(self, run: Run, epochs: int) -> None:
        self.run, self.epochs = run, epochs
        (run.folder / "logits").mkdir(exist_ok=True)

    def put(self, epoch: int, logits: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, logits)
        self.run.write(f"logits/test-{epoch:04}.npy", buffer.getvalue())

    def get(self, epoch: int) -> np.ndarray:
        """(M, K) float32 logits on the test split after that epoch."""
        return self._load(f"test-{epoch:04}.npy")

    def put_predicted(self, epoch: int, classes: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, classes.astype(np.int32))
        self.run.write(f"logits/predicted-{epoch:04}.npy", buffer.getvalue())

    def predicted(self, epoch: int) -> np.ndarray:
        """(M,) int32 classes predicted for the training images after that epoch."""
        return self._load(f"predicted-{epoch:04}.npy")

    def _load(self, name: str) -> np.ndarray:
        path = self.run.folder / "logits" / name
        try:
            return np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist; copy the run again, whole.") from None

    def put_weights(self, epoch: int, module: Classifier) -> None:
        self.run.save_weights(f"best-{epoch:04}", module, {"epoch": epoch})

    def weights(self, epoch: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors and facts that `put_weights` kept."""
        return checkpoint.load(self.run.checkpoints / f"best-{epoch:04}.safetensors")

    def last(self) -> range:
        """The epochs LAST averages."""
        return range(max(1, self.epochs - LAST + 1), self.epochs + 1)

    def drop_all_but(self, chosen: Collection[int]) -> None:
        """Remove what neither BEST, nor LAST, nor a resumed run may ask for."""
        logits = self.run.folder / "logits"
        for path in logits.glob("test-*.npy"):
            epoch = int(path.stem.removeprefix("test-"))
            if epoch not in chosen and epoch not in self.last():
                path.unlink()
        for path in self.run.checkpoints.glob("best-*.safetensors"):
            if int(path.stem.removeprefix("best-")) not in chosen:
                path.unlink()
        for path in sorted(logits.glob("predicted-*.npy"))[
            : -1 - KEEP
        ]:  # a damaged checkpoint starts earlier
            path.unlink()
