"""The contract of whatever `fit` minimises: a self-supervised method or noisy classification."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

from noisyssl.batch import Batch, Terms


class Predict(Protocol):
    """What a network says of the evaluation views of some samples."""

    def __call__(self, indices: np.ndarray, module: nn.Module | None = None) -> np.ndarray:
        """(M, K) float32 logits of the samples with these (M,) int64 indices.

        Args:
            module: of this one, which takes (B, 3, H, W) bytes, instead of the one that is evaluated.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """What an objective may know of the labels before training."""

    count: int
    """Rows of `samples.csv`: a batch's `index` lies below it."""
    train: np.ndarray
    """(M,) int64 rows of the training split."""
    classes: int
    labels: np.ndarray | None = None
    """(N,) int64 given labels, -1 for none."""
    epochs: int | None = None
    """Of the whole training."""
    another: Callable[[], nn.Module] | None = None
    """A second classifier that starts like the first, with random weights of its own."""

    def at_most_a_third(self, epochs: int) -> int:
        """`epochs`, or a third of a training that is too short for so many; at least one."""
        return epochs if self.epochs is None else max(1, min(epochs, self.epochs // 3))


class Objective(nn.Module):
    """The loss is `forward`, so DDP, torch.compile and autocast wrap one call."""

    sync_batchnorm: ClassVar[bool] = True
    """Among several processes: whether BatchNorms see the whole batch, or each process its own share.

    With shares, the running statistics that are kept are those of the first process.
    """

    copies: ClassVar[int] = 1
    """Random views of each sample that fine-tuning hands out; methods name theirs by `views`."""

    divisible: ClassVar[bool] = False
    """Whether the loss is a mean over samples, so that parts of a batch can be taken one after the other."""

    def forward(self, batch: Batch) -> Terms:
        """Scalar terms of this batch with "loss", which is minimised; loss mathematics in float32."""
        raise NotImplementedError

    def before_epoch(self, predict: Predict) -> None:
        """Called at the start of each epoch, never in its midst: what it finds out belongs into buffers."""

    def after_forward(self) -> None:
        """Called after each forward pass of a step: what that left in an attribute joins what waits.

        `forward` is compiled, and a list that it appended to would be compiled anew at every length.
        `after_step` does the same first, so that who takes one pass to a step need not call this.
        """

    def after_step(self, progress: float, ok: Tensor) -> None:
        """Called after each optimizer step: EMA targets and queues move here.

        Args:
            progress: 0 to 1 over the whole training.
            ok: () bool on the device; False when the step was skipped, and then nothing may move
                (weigh the change with it: reading it on the host would wait for the GPU).
        """

    def heaviest(self) -> None:
        """Bring a copy that is thrown away into the phase of training that takes the most memory."""

    def apart(self) -> tuple[nn.Module, ...]:
        """The networks whose gradients are clipped each by its own norm; they hold all parameters."""
        return (self,)

    def facts(self) -> dict[str, Any]:
        """JSON values about the training for `metrics.json`: what was estimated, what was told."""
        return {}

    def parameter_groups(self) -> list[dict]:
        """Parameters for the optimizer: weights decay and adapt, biases and norms do neither.

        `lr_scale` multiplies the scheduled learning rate, or the peak one of a group that is `constant`;
        `adapt` is LARS's trust ratio.
        """
        weights = [p for p in self.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.parameters() if p.requires_grad and p.ndim <= 1]
        return [
            {"params": weights, "lr_scale": 1.0, "adapt": True},
            {"params": others, "lr_scale": 1.0, "adapt": False, "weight_decay": 0.0},
        ]
