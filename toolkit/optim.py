"""Optimizers and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import Tensor

from noisyssl.errors import pick


class LARS(torch.optim.SGD):
    """SGD with momentum whose weight gradients are rescaled layer by layer.

    You, Gitman & Ginsburg 2017, arXiv:1708.03888: the local rate is eta * |w| / |g + wd * w| (norm of the
    sum, as in the authors' and the self-supervised community's code, not the sum of norms of eq. 6).
    Groups with `adapt = False` (biases, norms) take plain SGD steps.
    """

    ETA = 0.001

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update; the gradients of adapted groups are overwritten with what was applied."""
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if not group.get("adapt", True):
                continue
            decay, group["weight_decay"] = group["weight_decay"], 0.0  # already inside the gradient below
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients = [p.grad for p in weights]
            torch._foreach_add_(gradients, weights, alpha=decay)
            sizes = torch.stack(torch._foreach_norm(weights))
            lengths = torch.stack(torch._foreach_norm(gradients))
            trust = torch.where((sizes > 0) & (lengths > 0), self.ETA * sizes / lengths, 1.0)
            torch._foreach_mul_(gradients, list(trust.unbind()))
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


OPTIMIZERS = ("sgd", "adam", "adamw", "lars")


def build_optimizer(
    groups: list[dict], name: str, *, lr: float, weight_decay: float, momentum: float = 0.9
) -> torch.optim.Optimizer:
    """The optimizer called `name`; fused kernels, so that a skipped step costs no wait for the GPU.

    Raises:
        ConfigError: unknown name.
    """
    pick(dict.fromkeys(OPTIMIZERS), name, "optimizer")
    groups = [group for group in groups if group["params"]]
    if name in ("adam", "adamw"):
        adaptive = torch.optim.Adam if name == "adam" else torch.optim.AdamW
        return adaptive(groups, lr=lr, weight_decay=weight_decay, fused=True)
    kind = LARS if name == "lars" else torch.optim.SGD
    optimizer = kind(groups, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    if momentum:  # the fused kernel leaves it uninitialised where the very first step is skipped
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def update(optimizer: torch.optim.Optimizer, ok: Tensor) -> None:
    """`optimizer.step()` if `ok`, a () bool tensor; on a GPU without reading it on the host.

    Fused kernels leave parameters and state alone where `found_inf` is 1: the mechanism that
    GradScaler uses, here also for losses that are not finite.
    """
    if ok.device.type == "cpu":
        if ok:
            optimizer.step()
        return
    optimizer.grad_scale, optimizer.found_inf = None, (~ok).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]


def cosine(progress: float, warmup: float) -> float:
    """Factor on the learning rate: linear from 0 over `warmup` (share of the training), then cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1e-12, 1 - warmup)))
