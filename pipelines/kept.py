"""What BEST and LAST are made of: weights and test logits of some epochs, as files that outlive a kill."""

import io
from typing import Any

import numpy as np
import torch

from noisyssl import checkpoint
from noisyssl.classifier import Classifier
from noisyssl.pipelines.run import Run

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
        return np.load(self.run.folder / f"logits/test-{epoch:04}.npy", allow_pickle=False)

    def put_weights(self, epoch: int, module: Classifier) -> None:
        self.run.save_weights(f"best-{epoch:04}", module, {"epoch": epoch})

    def weights(self, epoch: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors and facts that `put_weights` kept."""
        return checkpoint.load(self.run.checkpoints / f"best-{epoch:04}.safetensors")

    def last(self) -> range:
        """The epochs LAST averages."""
        return range(max(1, self.epochs - LAST + 1), self.epochs + 1)

    def drop_all_but(self, best: int) -> None:
        for path in (self.run.folder / "logits").glob("test-*.npy"):
            if (epoch := int(path.stem.removeprefix("test-"))) != best and epoch not in self.last():
                path.unlink()
        for path in self.run.checkpoints.glob("best-*.safetensors"):
            if int(path.stem.removeprefix("best-")) != best:
                path.unlink()
