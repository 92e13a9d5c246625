"""Which way to take steps (as they are, compiled, as CUDA graphs): timed on the run's own batch."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from noisyssl.batch import Batch
from noisyssl.config import Stage
from noisyssl.distributed import exchange, world
from noisyssl.pipelines.fit import Log, dtype_of
from noisyssl.pipelines.loader import Loader
from noisyssl.pipelines.state import State
from noisyssl.pipelines.stepping import averaged_later, halved, take_apart

CALLS = 10
"""Forward and backward passes that are timed."""
TOLERANCE = {"loss": (0.05, 0.05), "gradient": (0.15, 1e-5)}
"""Largest difference, relative or else absolute, between the means of a way and those of eager.

bf16 rounds to 0.4 %, and dropped paths are drawn differently; what reads a wrong address is far off. Where
only the backward pass does, the loss is right and the gradient is not.
"""
WORDS = {"eager": "as they are", "compiled": "compiled", "graphs": "as CUDA graphs"}


def can_capture(device: torch.device) -> bool:
    """Whether steps can be CUDA graphs: on a GPU, and alone.

    Losses and BatchNorms of several processes wait for each other in the midst of a step; capturing that
    would tie the processes' captures together.
    """
    return device.type == "cuda" and world() == 1


def choose_way(state: State, loader: Loader, stage: Stage, device: torch.device, log: Log) -> None:
    """Take the steps of `state` the fastest way, or the one that is asked for if it works; the log says why.

    The choice is a fact of the run: a resumed one goes on as it began, if that works where it is now.
    Training is the same as without the measurement: weights see no step, buffers and random numbers are put
    back.
    """
    if stage.compile == "off":
        return
    facts, before = state.facts.get("compile"), None
    if facts is not None:
        before = facts.get("way") or ("compiled" if facts["compiled"] else "eager")  # as older runs have it
    way, why = before or "", ""
    if before == "graphs" and not can_capture(device):
        way, why = "eager", "they take an NVIDIA GPU and a single process"
    elif before != "eager":
        ways = [before] if before else candidates(stage, device)
        loader.start(state.epoch, state.position, loader.dropped)
        batch, parts = next(iter(loader)), state.parts
        race = before is None and stage.compile == "auto"
        found = measured(state, batch, stage, device, dtype_of(stage, device), ways, race)
        if state.parts > parts:
            log({"kind": "warning", "message": f"{halved(state.parts)}.", "time": time.time()})
        way, why = found["way"], "; ".join(found["errors"].values())
        if before is None:
            state.facts["compile"] = found
            log({"kind": "compile", "message": said(found), "time": time.time(), **found})
    if before is not None and way != before:
        message = f"this run took its steps {WORDS[before]}, which fails here ({why}); it goes on without."
        log({"kind": "warning", "message": message, "time": time.time()})
    state.take(way)


def measured(
    state: State,
    batch: Batch,
    stage: Stage,
    device: torch.device,
    dtype: torch.dtype,
    ways: list[str],
    race: bool = True,
) -> dict[str, Any]:
    """{"way": the choice, "ms": {way: milliseconds}, "errors": {way: why it is out}}.

    Args:
        ways: what is tried beside eager.
        race: whether the fastest is chosen; else the first of `ways` that works.

    Raises:
        TrainingError: the batch does not fit into memory, see `stepping.take_apart`.
    """
    batch = batch.to(device)
    state.objective.train()
    buffers = {name: value.clone() for name, value in state.objective.named_buffers()}
    nothing = torch.zeros((), dtype=torch.bool, device=device)

    def timed(way: str) -> tuple[float, dict[str, float]]:
        """Milliseconds, and what to judge by; each way starts from the same buffers and random numbers."""
        losses, lengths = [], []

        def both() -> None:
            state.begin()
            try:
                with averaged_later(state.network):
                    with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                        loss = state.network(batch.parts(state.parts)[0])["loss"]
                    loss.backward()
            finally:
                state.objective.after_step(0.0, nothing)  # forgets what the forward pass left for it
            losses.append(loss.detach().clone())
            gradients = [p.grad for p in state.objective.parameters() if p.grad is not None]
            lengths.append(torch.nn.utils.get_total_norm(gradients, foreach=True))
            state.objective.zero_grad(set_to_none=True)

        state.take(way)
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                ms = milliseconds(both, device)
                means = {"loss": torch.stack(losses).mean(), "gradient": torch.stack(lengths).mean()}
                return ms, {name: float(value) for name, value in means.items()}
        finally:
            for name, value in state.objective.named_buffers():
                value.copy_(buffers[name])
            state.objective.zero_grad(set_to_none=True)

    found: dict[str, tuple[float, dict[str, float]]] = {}
    while not found:
        try:
            found["eager"] = timed("eager")
        except torch.OutOfMemoryError as full:
            take_apart(state, [batch], stage, full)
    errors: dict[str, str] = {}
    for way in ways:
        try:
            found[way] = timed(way)
        except Exception as problem:  # the compiler has no exception of its own; training goes on without it
            errors[way] = f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"
    for way, (_, means) in found.items():
        for what, right in found["eager"][1].items():
            if way != "eager" and not close(means[what], right, *TOLERANCE[what]):
                errors[way] = f"its {what} is {means[what]:.4g}, that of the steps as they are {right:.4g}"
    # all processes must take the same way; the slowest decides
    votes: list[Any] = exchange([{way: ms for way, (ms, _) in found.items()}, errors])
    errors = {way: why for _, problems in votes for way, why in problems.items()}
    ms = {way: max(times[way] for times, _ in votes) for way in found if way not in errors}
    way = min(ms, key=lambda way: ms[way]) if race else next((way for way in ways if way in ms), "eager")
    if way != "graphs" and can_capture(device):
        state.take("eager")
        torch.compiler.reset()  # graphs hold their memory for as long as their code is kept
        torch.cuda.empty_cache()
    return {"way": way, "ms": ms, "errors": errors}


def candidates(stage: Stage, device: torch.device) -> list[str]:
    """What is tried beside eager."""
    if stage.compile != "auto":
        return [{"on": "compiled"}.get(stage.compile, stage.compile)]
    return ["compiled", "graphs"] if can_capture(device) else ["compiled"]


def close(value: float, eager: float, relative: float, absolute: float) -> bool:
    """Whether two means are finite and the same but for rounding."""
    return math.isfinite(value) and math.isclose(value, eager, rel_tol=relative, abs_tol=absolute)


def milliseconds(both: Callable[[], None], device: torch.device) -> float:
    """Of one call, in the mean of `CALLS` after three that warm up: graphs run, are recorded, replayed."""
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
    """The choice in a sentence, and what is out."""
    times = ", ".join(f"{ms:.1f} ms {WORDS[way]}" for way, ms in facts["ms"].items())
    message = f"steps are taken {WORDS[facts['way']]}: forward and backward take {times}"
    for way, why in facts["errors"].items():
        message += f"; {WORDS[way]} they failed ({why})"
    return message + "."
