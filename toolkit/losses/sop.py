"""Sparse over-parameterisation: each sample learns by how much its own label is wrong.

Liu et al., ICML 2022, arXiv:2202.14026, eq. 4 to 7, without the two terms of SOP+: s = u^2 y - v^2 (1 - y) is
added to the prediction, with a u of one number and a v of K for each sample, from 1e-8 on. The network and u
minimise the cross entropy of p + s; u and v the squared distance of the hard prediction + s to the label y.

u and v descend by plain gradient steps at a constant rate whatever the optimizer is: their bias towards a
sparse s is the method. So they are a memory beside the network and not parameters. AdamW would move all rows
at every step and make all steps equally long, and clipping would shorten them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from noisyssl.config import require
from noisyssl.losses.base import Loss
from noisyssl.objective import Given

FLOOR = 1e-4
"""Smallest corrected probability, as in the authors' code."""
START = 1e-8
"""Standard deviation of u and v before training."""
BATCH = 128
"""The paper's batch, to which its learning rates of u and v belong."""
EPOCHS = 120
"""The paper's training. u and v grow by a factor at each visit: a shorter one takes longer steps, or they
would still be nothing at its end."""


class SparseOverParameterisation(Loss):
    """Cross entropy of the corrected prediction, and the distance that u and v descend on."""

    u: Tensor
    v: Tensor

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        lr_u: float = 10.0
        """Learning rate of u for batches of 128 and 120 epochs, from which the steps of other batches and of
        shorter trainings follow; the paper takes 10 for 10 classes."""
        lr_v: float = 10.0
        """Of v; the paper takes 10 for symmetric noise and 100 for asymmetric."""

        def __post_init__(self) -> None:
            require(self.lr_u >= 0, "train.sop.lr_u", self.lr_u, "0 or above")
            require(self.lr_v >= 0, "train.sop.lr_v", self.lr_v, "0 or above")

    def __init__(self, config: Config, given: Given) -> None:
        super().__init__(config, given)
        self.longer = max(1.0, EPOCHS / (given.epochs or EPOCHS)) / BATCH
        self.register_buffer("u", START * torch.randn(given.count, 1))
        self.register_buffer("v", START * torch.randn(given.count, given.classes))

    def formula(self, logits: Tensor, label: Tensor, index: Tensor) -> Tensor:
        y = one_hot(label, self.v.shape[1]).to(logits)
        hard = one_hot(logits.argmax(1), self.v.shape[1]).to(logits)
        u, v = self.u[index].to(logits), self.v[index].to(logits)
        added, taken = (u**2).clamp(max=1) * y, (v**2).clamp(max=1) * (1 - y)
        p = (logits.softmax(1) + added - taken).clamp(min=FLOOR)
        whole = p.sum(1, keepdim=True)
        entropy = -(y * (p / whole).clamp(min=FLOOR).log()).sum(1)
        off = hard + added - taken - y
        if self.training:
            with torch.no_grad():
                own = (p * y).sum(1, keepdim=True)
                pull = torch.where(
                    own > FLOOR * whole, 1 / whole - 1 / own, 0
                )  # of the cross entropy along u^2
                pull = pull + 2 * (off * y).sum(1, keepdim=True)
                u = u - self.config.lr_u * self.longer * 2 * u * torch.where(u**2 <= 1, pull, 0)
                v = v + self.config.lr_v * self.longer * 4 * v * torch.where(v**2 <= 1, off * (1 - y), 0)
                self.remember(index, u=u, v=v)
        return (entropy + off.square().sum(1)).mean()
