"""The contract of a robust loss of one network."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noisyssl.distributed import gather
from noisyssl.objective import Given, Predict


class Loss(nn.Module):
    """Logits and given labels to a scalar; a subclass writes its formula and nothing else."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """Settings of one loss: nothing here, fields in the subclass."""

    def __init__(self, config: Any, given: Given) -> None:
        super().__init__()
        self.config = config
        self.left: tuple[Tensor, dict[str, Tensor]] | None = None
        self.waiting: list[tuple[Tensor, dict[str, Tensor]]] = []

    def forward(self, logits: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """Mean loss, a scalar in float32 whatever autocast says: powers of probabilities underflow in fp16.

        Args:
            logits: (B, K), any float dtype.
            label: (B,) int64 given classes in [0, K).
            index: (B,) int64 rows of `samples.csv`, for losses that remember each sample.
        """
        with torch.autocast(logits.device.type, enabled=False):
            return self.formula(logits.float(), label, index)

    def formula(self, logits: Tensor, label: Tensor, index: Tensor) -> Tensor:
        """The loss in the precision of `logits`."""
        raise NotImplementedError

    def remember(self, index: Tensor, **memories: Tensor) -> None:
        """The (B, ...) values of these samples belong into the (N, ...) buffers so named, after the step.

        Not at once: the backward pass of a compiled step may read the buffer again for what it needs of the
        old values (PyTorch 2.11 to 2.15 do where that takes less memory than keeping them, as for no more
        samples than a batch has), and a step that is not taken must leave no trace.
        """
        self.left = gather(index), {name: gather(value.detach()) for name, value in memories.items()}

    def after_forward(self) -> None:
        """See `Objective.after_forward`."""
        if self.left is not None:
            self.waiting.append(self.left)
        self.left = None

    def after_step(self, ok: Tensor) -> None:
        """Write what waits: of all processes, so that each remembers a sample whichever sees it next."""
        self.after_forward()
        for index, values in self.waiting:
            for name, value in values.items():
                memory = getattr(self, name)
                memory[index] = torch.where(ok, value.to(memory), memory[index])
        self.waiting = []

    def before_epoch(self, predict: Predict) -> None:
        """Called at the start of each epoch; see `Objective.before_epoch`."""

    def facts(self) -> dict[str, Any]:
        """See `Objective.facts`."""
        return {}
