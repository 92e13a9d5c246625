"""DINO: crops small and large guess the prototypes that a slowly following teacher sees in large ones.

Caron et al., ICCV 2021, arXiv:2104.14294, eq. 1-4, algorithm 1.

Made for vision transformers; six small crops a sample make it the dearest method here.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from noisyssl.backbones import Backbone
from noisyssl.batch import Batch, Terms
from noisyssl.config import require
from noisyssl.distributed import sum_over_processes, world
from noisyssl.methods.base import SSLMethod, per_size
from noisyssl.momentum import follow, rising, twin
from noisyssl.views import View, asymmetric_pair

LARGE, SMALL = 2, 6


def multi_crop(size: int) -> tuple[View, ...]:
    """Two large crops, then six of three sevenths of their side (96 of 224), at least 16 pixels."""
    large = asymmetric_pair(size)
    side = max(16, round(size * 3 / 7 / 8) * 8)
    small = replace(large[0], size=side, area=(0.05, 0.4), blur=0.5)
    return *(replace(view, area=(0.4, 1.0)) for view in large), *(small,) * SMALL


class DINO(SSLMethod):
    centre: Tensor
    progress: Tensor
    views = staticmethod(multi_crop)
    family = "joint-embedding"
    least_batch = 2

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        prototypes: int = 65_536
        """Outputs of the head, K."""
        hidden: int = 2048
        """Units of the head's layers."""
        bottleneck: int = 256
        """Units before the prototypes."""
        student_temperature: float = 0.1
        """tau_s."""
        teacher_temperature: float = 0.04
        """tau_t."""
        momentum: float = 0.996
        """Of the teacher at the start; it rises to 1 along a cosine."""
        centre_momentum: float = 0.9
        """m of eq. 4."""
        freeze: float = 0.01
        """Share of the training in which the prototypes stay as they are."""

        def __post_init__(self) -> None:
            for name in ("prototypes", "hidden", "bottleneck"):
                require(getattr(self, name) >= 1, f"pretrain.dino.{name}", getattr(self, name), "at least 1")
            for name in ("student_temperature", "teacher_temperature"):
                require(
                    0 < getattr(self, name) <= 10, f"pretrain.dino.{name}", getattr(self, name), "in (0, 10]"
                )
            for name in ("momentum", "centre_momentum", "freeze"):
                require(
                    0 <= getattr(self, name) < 1, f"pretrain.dino.{name}", getattr(self, name), "in [0, 1)"
                )

    def __init__(self, backbone: Backbone, config: Config, size: int) -> None:
        super().__init__(backbone, config, size)
        self.config = config
        self.head = Head(backbone.features, config)
        self.teacher = nn.Sequential(twin(backbone), twin(self.head))
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self.register_buffer("progress", torch.zeros(()))
        self.left: Tensor | None = None
        self.seen: list[Tensor] = []
        """Mean teacher outputs since the last step, of one forward pass each."""

    def forward(self, batch: Batch) -> Terms:
        self.head.frozen = self.progress < self.config.freeze
        students = self.embed(self.head, batch.views)
        with torch.no_grad():
            teachers = per_size(self.teacher, batch.views[:LARGE])
        temperatures = self.config.student_temperature, self.config.teacher_temperature
        with torch.autocast(students[0].device.type, enabled=False):
            means = [sum_over_processes(t.float().mean(0)) / world() for t in teachers]
        self.left = torch.stack(means).mean(0)
        return {"loss": cross_entropy(students, teachers, self.centre, *temperatures)}

    def after_forward(self) -> None:
        if self.left is not None:
            self.seen.append(self.left)
        self.left = None

    def after_step(self, progress: float, ok: Tensor) -> None:
        self.after_forward()
        momentum = rising(self.config.momentum, progress)
        follow(self.teacher, nn.Sequential(self.backbone, self.head), momentum, ok)
        seen = torch.stack(self.seen).mean(0) if self.seen else self.centre
        self.seen, self.head.frozen = [], None
        change = (1 - self.config.centre_momentum) * (seen - self.centre)
        self.centre += torch.where(ok, change, 0)
        self.progress.fill_(progress)


class Head(nn.Module):
    """(B, features) to (B, K): three layers, a unit vector, its cosine with each prototype."""

    def __init__(self, features: int, config: DINO.Config) -> None:
        super().__init__()
        hidden, bottleneck = config.hidden, config.bottleneck
        self.layers = nn.Sequential(
            nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )  # fmt: skip
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, bottleneck))
        self.frozen: Tensor | None = None
        """() bool on the device: whether the prototypes get no gradient."""

    def forward(self, features: Tensor) -> Tensor:
        prototypes: Tensor = self.prototypes
        if self.frozen is not None and prototypes.requires_grad:
            prototypes = torch.where(self.frozen, prototypes.detach(), prototypes)
        unit = F.normalize(self.layers(features).float(), dim=1, eps=1e-6)
        return F.linear(unit, F.normalize(prototypes, dim=1))


def cross_entropy(
    students: tuple[Tensor, ...],
    teachers: tuple[Tensor, ...],
    centre: Tensor,
    student_temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Mean cross entropy of every student view with every teacher view but itself (eq. 3), in float32.

    Args:
        students: (B, K) head outputs of all views, the teachers' views first.
        teachers: (B, K) head outputs of the large views.
        centre: (K,) running mean of the teacher's outputs.
    """
    with torch.autocast(centre.device.type, enabled=False):
        goals = [((t.float() - centre) / teacher_temperature).softmax(1) for t in teachers]
        guesses = [(s.float() / student_temperature).log_softmax(1) for s in students]
        terms = [
            -(goal * guess).sum(1).mean()
            for i, goal in enumerate(goals)
            for j, guess in enumerate(guesses)
            if i != j
        ]
        return torch.stack(terms).mean()
