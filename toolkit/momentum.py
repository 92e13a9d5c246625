"""Networks that follow another one slowly: the targets and key encoders of momentum methods."""

import copy
import math
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def twin(network: Network) -> Network:
    """A copy that gets no gradient."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, network: nn.Module, momentum: float | Tensor, ok: Tensor) -> None:
    """Parameters of `slow` <- momentum * theirs + (1 - momentum) * `network`'s, where `ok`.

    Buffers stay: the slow network's BatchNorms see their own batches. `ok` is () bool on the device and
    is not read on the host.
    """
    ours: list[Tensor] = list(slow.parameters())
    theirs: list[Tensor] = list(network.parameters())
    change = torch._foreach_sub(theirs, ours)
    torch._foreach_mul_(change, (1 - momentum) * ok.float())
    torch._foreach_add_(ours, change)


def rising(start: float, progress: float) -> float:
    """Momentum from `start` to 1 along a cosine as progress goes from 0 to 1 (arXiv:2006.07733, 3.3)."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2
