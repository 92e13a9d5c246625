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

    def before_epoch(self, predict: Predict) -> None:
        """Called at the start of each epoch; see `Objective.before_epoch`."""

    def facts(self) -> dict[str, Any]:
        """See `Objective.facts`."""
        return {}


@torch.no_grad()
def remember(memory: Tensor, index: Tensor, value: Tensor) -> None:
    """Write the (B, ...) values of these samples into the (N, ...) memory: those of all processes.

    Each process then remembers every sample, whichever of them sees it next.
    """
    memory[gather(index)] = gather(value)
