"""One optimizer step, in as many parts as the GPU's memory asks for."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from noisyssl.batch import Batch
from noisyssl.config import Stage
from noisyssl.distributed import mean_over_processes, world
from noisyssl.errors import TrainingError
from noisyssl.optim import update
from noisyssl.pipelines.state import State


def step(
    state: State, group: list[Batch], rate: float, stage: Stage, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimizer step on the mean of the group's losses: (terms on the device, () bool "was taken").

    Raises:
        TrainingError: the batch does not fit into the GPU's memory, and cannot be taken apart.
    """
    optimizer, scaler = state.optimizer, state.scaler
    for settings in optimizer.param_groups:
        lr = stage.lr if settings.get("constant") else rate
        settings["lr"] = lr * settings.get("lr_scale", 1.0)
    while True:
        state.begin()
        try:
            totals = gradients(state, group, device, dtype)
            break
        except torch.OutOfMemoryError as error:
            optimizer.zero_grad(set_to_none=True)
            take_apart(state, group, stage, error)
        torch.cuda.empty_cache()  # outside the handler, whose traceback holds the activations
        state.objective.after_step(0.0, torch.zeros((), dtype=torch.bool, device=device))  # forgets its parts
    totals = mean_over_processes(totals)  # so all judge the same loss below
    scaler.unscale_(optimizer)
    found = [p.grad for p in state.objective.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(found, foreach=True)
    if stage.clip:
        clip(state.objective.apart(), stage.clip, norm)
    ok = totals["loss"].isfinite() & norm.isfinite()
    if scaler.is_enabled():
        scaler.step(optimizer)  # skips by itself where a gradient overflowed fp16
        scaler.update()
    else:
        update(optimizer, ok)
    optimizer.zero_grad(set_to_none=True)
    return totals | {"grad_norm": norm}, ok


def clip(networks: tuple[torch.nn.Module, ...], largest: float, norm: Tensor) -> None:
    """Shorten the gradient of each network to `largest`; `norm` is that of all of them together."""
    for network in networks:
        parameters = [p for p in network.parameters() if p.grad is not None]
        if len(networks) > 1:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)


def gradients(
    state: State, group: list[Batch], device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Add the gradients of the group's mean loss up; its terms."""
    totals: dict[str, Tensor] = {}
    parts = [
        (part, len(part.index) / len(batch.index))
        for batch in group
        for part in batch.parts(min(state.parts, max(1, len(batch.index) // 2)))  # BatchNorm takes two
    ]
    for number, (part, share) in enumerate(parts, start=1):
        part, share = part.to(device), share / len(group)
        with averaged_later(state.network) if number < len(parts) else nullcontext():
            with (
                state.fitting(len(part.index)),
                torch.autocast(device.type, dtype, enabled=dtype is not torch.float32),
            ):
                terms = state.network(part)
            state.objective.after_forward()
            state.scaler.scale(terms["loss"] * share).backward()
        for name, value in terms.items():
            totals[name] = totals.get(name, 0) + value.detach().float() * share
    return totals


def take_apart(state: State, group: list[Batch], stage: Stage, error: Exception) -> None:
    """Let each batch be taken in twice as many parts, whose gradients add up to the same step.

    Raises:
        TrainingError: its loss compares samples with each other, its parts are as small as BatchNorm takes,
            or several processes would have to agree.
    """
    batch = max(len(one.index) for one in group)
    parts = 2 * state.parts
    if state.objective.divisible and world() == 1 and batch // parts >= 2:
        state.parts, state.largest = parts, 0
        return
    section = stage.section()
    raise TrainingError(
        f"a batch of {batch} does not fit into the GPU's memory; "
        f"set {section}.batch={max(2, stage.batch // 2)}, {section}.precision=bf16 or a smaller data.size."
    ) from error


def halved(parts: int) -> str:
    """That batches are taken in parts from here on, in words for the log."""
    return (
        f"the GPU's memory is full: each batch is taken in {parts} parts from here on, "
        "and BatchNorm sees one part at a time; the step stays that of the whole batch"
    )


def averaged_later(network: torch.nn.Module) -> Any:
    """A context in which gradients add up in each process, until a backward pass outside averages them."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()
