"""The contract of a self-supervised method: which views it wants, what it minimises."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from noisyssl.backbones import Backbone
from noisyssl.errors import ConfigError
from noisyssl.objective import Objective


class SSLMethod(Objective):
    """A backbone, its heads, and the loss over views of the same images; labels are never read.

    A method's module names its idea in the first line of its docstring, its paper in the second
    paragraph and its use in the third: `docs/methods.md` is made of them.
    """

    Config: ClassVar[type]
    """Frozen dataclass of the method's own settings, with the paper's defaults."""
    views: ClassVar[Any]
    """A static function: size -> the views of one sample, tuple[View, ...]."""
    family: ClassVar[str]
    """contrastive, joint-embedding, pretext or generative."""
    least_batch: ClassVar[int] = 1
    """Smallest batch the loss is defined for."""
    upright: ClassVar[bool] = False
    """Its task is to tell which way is up, which images without such a way cannot answer."""

    def __init__(self, backbone: Backbone, config: Any, size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.size = size

    def must_accept(self, batch: int) -> None:
        """Raises ConfigError if batches of this size (over all processes) cannot train this method."""
        if batch < self.least_batch:
            raise ConfigError(
                f"pretrain.batch is {batch}, but {type(self).__name__} compares samples; "
                f"set pretrain.batch at least {self.least_batch}."
            )

    def embed(self, head: nn.Module, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Head outputs per view, each (B, D); one backbone call per view size."""
        return per_size(lambda images: head(self.backbone(images)), views)


def per_size(network: Any, views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The (B, D) outputs of `network` per view; views of one size go through it together."""
    out: dict[int, Tensor] = {}
    for size in dict.fromkeys(view.shape[-1] for view in views):
        same = [i for i, view in enumerate(views) if view.shape[-1] == size]
        joined = network(torch.cat([views[i] for i in same]))
        out.update(zip(same, joined.chunk(len(same)), strict=True))
    return tuple(out[i] for i in range(len(views)))
