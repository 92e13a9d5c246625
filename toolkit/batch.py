"""What a loader yields and an objective consumes."""

from dataclasses import dataclass

import torch
from torch import Tensor

Terms = dict[str, Tensor]
"""Scalars of one step by name; "loss" is minimised, the others are logged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Views of B samples, and what identifies each sample."""

    views: tuple[Tensor, ...]
    """Per view (B, 3, S, S) uint8 in channels-last memory; S may differ between views."""
    index: Tensor
    """(B,) int64 rows of `samples.csv`."""
    key: Tensor
    """(B,) int64 from (seed, epoch, index): whatever an objective draws itself is a function of it."""
    label: Tensor | None = None
    """(B,) int64 given labels, looked up by index outside the data graph; None without labels."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies overlap with computation where memory is pinned."""
        return Batch(
            views=tuple(view.to(device, non_blocking=True) for view in self.views),
            index=self.index.to(device, non_blocking=True),
            key=self.key.to(device, non_blocking=True),
            label=None if self.label is None else self.label.to(device, non_blocking=True),
        )

    def parts(self, count: int) -> list["Batch"]:
        """The batch in this many parts, as equal as can be; itself if it is one."""
        if count == 1:
            return [self]
        views = zip(*(view.tensor_split(count) for view in self.views), strict=True)
        labels = [None] * count if self.label is None else self.label.tensor_split(count)
        rest = zip(self.index.tensor_split(count), self.key.tensor_split(count), labels, strict=True)
        return [
            Batch(views=part, index=index, key=key, label=label)
            for part, (index, key, label) in zip(views, rest, strict=True)
        ]
