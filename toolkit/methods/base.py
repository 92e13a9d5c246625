"""The contract of a self-supervised method: which views it wants, what it minimises."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from noisyssl.backbones import Backbone
from noisyssl.objective import Objective


class SSLMethod(Objective):
    """A backbone, its heads, and the loss over views of the same images; labels are never read."""

    Config: ClassVar[type]
    """Frozen dataclass of the method's own settings, with the paper's defaults."""
    views: ClassVar[Any]
    """A static function: size -> the views of one sample, tuple[View, ...]."""
    least_batch: ClassVar[int] = 1
    """Smallest batch the loss is defined for."""

    def __init__(self, backbone: Backbone, config: Any, size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.size = size

    def embed(self, head: nn.Module, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Head outputs per view, each (B, D); one backbone call per view size."""
        out: dict[int, Tensor] = {}
        for size in dict.fromkeys(view.shape[-1] for view in views):
            same = [i for i, view in enumerate(views) if view.shape[-1] == size]
            joined = head(self.backbone(torch.cat([views[i] for i in same])))
            out.update(zip(same, joined.chunk(len(same)), strict=True))
        return tuple(out[i] for i in range(len(views)))
