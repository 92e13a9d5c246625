"""Everything that training changes: what a checkpoint holds and a resumed run starts from."""

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from noisyssl.objective import Objective

WAYS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    # for one shape: torch would replace the code at the first smaller batch by slower code for any shape
    "compiled": {"dynamic": False},
    "graphs": {"mode": "reduce-overhead", "dynamic": False},
}
"""How a step may be taken, and what torch.compile is told for it."""


@dataclass(kw_only=True)
class State:
    """One training between two steps."""

    objective: Objective
    network: torch.nn.Module
    """What a step calls: the objective; among several processes DistributedDataParallel around it."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: Objective | None = None
    """Exponential moving average of the objective; None when `ema` is 0."""
    epoch: int = 0
    """Epochs finished."""
    position: int = 0
    """Batches of the current epoch that the finished steps have used."""
    step: int = 0
    """Optimizer steps taken or skipped."""
    parts: int = 1
    """Parts that each batch is taken in, one after the other, since the whole did not fit into memory."""
    way: str = "eager"
    """How steps are taken, of `WAYS`; a choice for this machine and no part of a checkpoint."""
    largest: int = 0
    """Samples of the largest forward pass since the way was chosen: what compiled code is for."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the stage adds for itself: JSON only (best epoch so far, dropped files)."""

    def take(self, way: str) -> None:
        """Take steps this way from here on; in place, so that names of parameters stay as they are."""
        if way == self.way:
            return
        self.objective._compiled_call_impl = None  # what `compile` sets: eager again
        if (told := WAYS[way]) is not None:
            self.objective.compile(**told)
        self.way, self.largest = way, 0

    def fitting(self, size: int) -> AbstractContextManager[Any]:
        """A context for a forward pass of this many samples: fewer than usual are not worth compiling.

        An epoch's last batch is smaller, and so is one that broken files were dropped from. A minute of
        compilation for each such size, or the memory of a graph, is more than they will ever take.
        """
        self.largest = max(self.largest, size)
        if self.way == "eager" or size == self.largest:
            return nullcontext()
        return torch.compiler.set_stance("force_eager")

    def begin(self) -> None:
        """Call it before each step: what the last one computed may be written over from here on.

        Graphs write to the same addresses each time. Within a step they follow each other (parts,
        accumulated batches), and gradients that lie in their memory must last until the optimizer has used
        them; torch guesses that each forward pass begins anew unless it is told. Whatever is kept longer
        (terms for the log, queues, memories) has to be a copy.
        """
        if self.way == "graphs":
            torch.compiler.cudagraph_mark_step_begin()

    def trained(self) -> Objective:
        """The objective whose weights are evaluated and saved: the average where there is one."""
        return self.average if self.average is not None else self.objective

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a flat name, for `checkpoint.save`."""
        out = {f"objective.{name}": value for name, value in self.objective.state_dict().items()}
        if self.average is not None:
            out |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for i, slots in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer.{i}.{k}": v for k, v in slots.items() if isinstance(v, Tensor)}
        out["random.cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            out["random.cuda"] = torch.cuda.get_rng_state()
        return out

    def record(self) -> dict[str, Any]:
        """All that is not a tensor, JSON-able."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "step": self.step,
            "parts": self.parts,
            "scaler": self.scaler.state_dict(),
            "facts": self.facts,
        }

    def restore(self, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        """Continue from what `tensors` and `record` gave; every name must be there."""
        self.objective.load_state_dict(_below(tensors, "objective."))
        if self.average is not None:
            self.average.load_state_dict(_below(tensors, "average."))
        slots: dict[int, dict[str, Tensor]] = {}
        for name, value in _below(tensors, "optimizer.").items():
            i, slot = name.split(".", 1)
            slots.setdefault(int(i), {})[slot] = value
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for (
            number,
            state,
        ) in slots.items():  # files hold plain layouts; fused kernels walk memory, not indices
            slots[number] = {name: _laid_out_like(parameters[number], v) for name, v in state.items()}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        torch.set_rng_state(tensors["random.cpu"])
        if "random.cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random.cuda"])
        self.epoch, self.position, self.step = record["epoch"], record["position"], record["step"]
        self.scaler.load_state_dict(record["scaler"])
        self.parts = record.get("parts", 1)  # runs of 0.1.0 and before have none
        self.facts = record["facts"]


def average_of(objective: Objective) -> Objective:
    """A copy that follows `objective`; made before compiling, gets no gradient."""
    return copy.deepcopy(objective).requires_grad_(False).eval()


@torch.no_grad()
def follow(average: Objective, objective: Objective, decay: float, ok: Tensor) -> None:
    """Average <- decay * average + (1 - decay) * objective where `ok`, without reading it on the host.

    Integer buffers (batch counters) are copied.
    """
    pairs = list(zip(average.state_dict().values(), objective.state_dict().values(), strict=True))
    floats = [(a, o) for a, o in pairs if a.is_floating_point()]
    ours, theirs = [a for a, _ in floats], [o for _, o in floats]
    change = torch._foreach_sub(theirs, ours)
    torch._foreach_mul_(change, (1 - decay) * ok.to(torch.float32))
    torch._foreach_add_(ours, change)
    for a, o in pairs:
        if not a.is_floating_point():
            a.copy_(o)


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device="cpu").copy_(value)


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
