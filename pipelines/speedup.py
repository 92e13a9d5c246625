"""Whether torch.compile pays: both ways are timed on the run's own batch, and the faster one is kept."""

import time
from collections.abc import Callable
from typing import Any

import torch

from noisyssl.batch import Batch
from noisyssl.config import Stage
from noisyssl.distributed import exchange
from noisyssl.pipelines.fit import Log, dtype_of
from noisyssl.pipelines.loader import Loader
from noisyssl.pipelines.state import State
from noisyssl.pipelines.stepping import averaged_later, take_apart

CALLS = 10
"""Forward and backward passes that are timed."""


def compile_if_faster(state: State, loader: Loader, stage: Stage, device: torch.device, log: Log) -> None:
    """Compile `state.objective` if `stage.compile` is auto and that is faster; the log gets the reason.

    The choice is a fact of the run: a resumed one does not measure again, and goes on as it began. Training
    is the same as without the measurement: weights see no step, buffers and random numbers are put back.
    """
    if stage.compile != "auto":
        return
    facts = state.facts.get("compile")
    if facts is None:
        loader.start(state.epoch, state.position, loader.dropped)
        batch = next(iter(loader))
        facts = state.facts["compile"] = measured(state, batch, stage, device, dtype_of(stage, device))
        log({"kind": "compile", "message": said(facts), "time": time.time(), **facts})
    if facts["compiled"]:
        state.objective.compile()


def measured(
    state: State, batch: Batch, stage: Stage, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """{"compiled": the choice, "eager_ms", "compiled_ms": milliseconds, "error": why it did not compile}.

    Raises:
        TrainingError: the batch does not fit into memory, see `stepping.take_apart`.
    """
    batch = batch.to(device)
    state.objective.train()
    buffers = {name: value.clone() for name, value in state.objective.named_buffers()}

    def both() -> None:
        with averaged_later(state.network):
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                loss = state.network(batch.parts(state.parts)[0])["loss"]
            loss.backward()
        state.objective.zero_grad(set_to_none=True)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        eager = None
        while eager is None:
            try:
                eager = milliseconds(both, device)
            except torch.OutOfMemoryError as full:
                state.objective.zero_grad(set_to_none=True)
                take_apart(state, [batch], stage, full)
        compiled, error = None, ""
        state.objective.compile()
        try:
            compiled = milliseconds(both, device)
        except Exception as problem:  # the compiler has no exception of its own; training goes on without it
            error = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
        state.objective._compiled_call_impl = None  # what `compile` sets: eager again
    for name, value in state.objective.named_buffers():
        value.copy_(buffers[name])
    state.objective.zero_grad(set_to_none=True)
    votes = exchange([eager, compiled or 0.0])  # all must take the same way, the slowest decides
    errors = [vote for vote in exchange(error) if vote]
    eager, compiled = (max(times) for times in zip(*votes, strict=True))
    faster = not errors and compiled < eager
    return {"compiled": faster, "eager_ms": eager, "compiled_ms": compiled, "error": next(iter(errors), "")}


def milliseconds(both: Callable[[], None], device: torch.device) -> float:
    """Of one call, in the mean of `CALLS` after three that warm up."""
    for _ in range(3):
        both()
    wait(device)
    began = time.perf_counter()
    for _ in range(CALLS):
        both()
    wait(device)
    return 1e3 * (time.perf_counter() - began) / CALLS


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def said(facts: dict[str, Any]) -> str:
    """The choice in a sentence."""
    if facts["error"]:
        return f"not compiled, which failed ({facts['error']}); training goes on without."
    chosen = "compiled" if facts["compiled"] else "not compiled"
    return (
        f"{chosen}: forward and backward take {facts['compiled_ms']:.1f} ms compiled, "
        f"{facts['eager_ms']:.1f} ms as they are."
    )
