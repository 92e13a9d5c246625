"""The one training loop. Pretraining and fine-tuning differ in the objective, not here."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from inspect import signature
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from noisyssl.batch import Batch
from noisyssl.config import Stage
from noisyssl.distributed import exchange, wait_for_all, world
from noisyssl.errors import ConfigError, Stopped, TrainingError
from noisyssl.layers import join_batchnorms
from noisyssl.objective import Objective, Predict
from noisyssl.optim import build_optimizer, cosine
from noisyssl.pipelines.loader import Loader
from noisyssl.pipelines.signals import Wishes
from noisyssl.pipelines.state import State, average_of, follow
from noisyssl.pipelines.stepping import halved, step

Log = Callable[[dict[str, Any]], None]


def prepare(objective: Objective, stage: Stage, device: torch.device) -> State:
    """The state before the first step: objective on `device` in channels-last, optimizer, scaler, average."""
    if world() > 1 and objective.sync_batchnorm:
        join_batchnorms(objective, device)
    objective.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = average_of(objective) if stage.ema else None
    optimizer = build_optimizer(
        objective.parameter_groups(),
        stage.optimizer,
        lr=stage.lr,
        weight_decay=stage.weight_decay,
        momentum=stage.momentum,
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype_of(stage, device) is torch.float16)
    network = joined(objective) if world() > 1 else objective
    state = State(objective=objective, network=network, optimizer=optimizer, scaler=scaler, average=average)
    state.take({"on": "compiled", "graphs": "graphs"}.get(stage.compile, "eager"))
    return state


def joined(objective: Objective) -> DistributedDataParallel:
    """`objective` with its gradients averaged over the processes.

    DDP lays its buckets out anew after the first backward pass, and a sum over three processes or more
    depends on the layout to the last bit. So that the first step after a resume is like any other, that first
    pass happens here, over nothing but the parameters. (No static_graph: it breaks accumulation, pytorch
    #187732, and compilation, #109261; without unused parameters it would gain nothing.)
    """
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters  # after torch 2.11
    buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    network = DistributedDataParallel(objective, gradient_as_bucket_view=True, **buffers)  # type: ignore[arg-type]
    parameters = [p for p in objective.parameters() if p.requires_grad]

    def touch() -> Tensor:
        return torch.stack([p.sum() for p in parameters]).sum()

    objective.forward = touch  # type: ignore[method-assign, assignment]
    network().backward()
    del objective.forward
    objective.zero_grad(set_to_none=True)
    return network


def fit(
    state: State,
    loader: Loader,
    stage: Stage,
    *,
    device: torch.device,
    predict: Predict,
    log: Log,
    save: Callable[[], None],
    stopped: Callable[[], int | None] = lambda: None,
) -> Iterator[int]:
    """Minimise `objective(batch)["loss"]`, yielding the number of finished epochs after each one.

    Continues from `state` wherever it stands. A checkpoint is saved after each yield, and between
    steps every `stage.checkpoint_minutes`; the host waits for the device only then and at log lines.

    Args:
        predict: handed to `objective.before_epoch`.
        log: gets one dict of means every `stage.log_every` steps, and warnings (by "kind").
        save: writes a checkpoint of `state`.
        stopped: number of a signal that asks to end; the loop then saves and raises.

    Several processes take the same steps, and stop at the same one.

    Raises:
        TrainingError: a loss or a gradient was not finite; names the step and the samples. Nothing
            has moved since: such a step changes neither weights, optimizer, averages nor queues.
        Stopped: after the checkpoint that a signal asked for.
    """
    dtype = dtype_of(stage, device)
    steps_per_epoch = math.ceil(len(loader) / stage.accumulate)
    steps = steps_per_epoch * stage.epochs
    window, wishes = Window(state, stage, steps, log), Wishes(stopped)
    loader.start(state.epoch, state.position, loader.dropped)
    saved_at = time.monotonic()
    while state.epoch < stage.epochs:
        if state.position == 0:
            state.objective.before_epoch(predict)
        state.objective.train()
        state.step = state.epoch * steps_per_epoch + state.position // stage.accumulate
        for group in grouped(loader, stage.accumulate):
            rate = stage.lr * cosine((state.step + 0.5) / steps, stage.warmup)
            parts = state.parts
            terms, ok = step(state, group, rate, stage, device, dtype)
            if state.parts > parts:
                message = f"{halved(state.parts)}. What BatchNorm remembers of this one batch counts twice."
                log({"kind": "warning", "message": message, "time": time.time()})
            state.step += 1
            epoch, state.position = loader.position
            state.objective.after_step(state.step / steps, ok)
            if state.average is not None:
                follow(state.average, state.objective, stage.ema, ok)
            window.add(group, terms, ok, rate)
            if state.step % stage.log_every == 0:
                window.flush()
            if epoch > state.epoch:
                continue  # that was the last step: the epoch's own end saves
            signal, due = wishes.between_steps(time.monotonic() - saved_at > 60 * stage.checkpoint_minutes)
            if signal or due:
                window.flush()
                save()
                saved_at = time.monotonic()
                if signal:
                    wait_for_all()  # whoever leaves first ends the others: not while one still writes
                    raise Stopped(signal)
        window.flush()
        state.epoch, state.position = state.epoch + 1, 0
        yield state.epoch
        save()
        saved_at = window.since = time.monotonic()  # images/s are those of steps alone
        if (signal := wishes.now()) and state.epoch < stage.epochs:
            raise Stopped(signal)


class Window:
    """The steps since the last log line: their terms stay on the device until `flush` reads them at once."""

    def __init__(self, state: State, stage: Stage, steps: int, log: Log) -> None:
        self.state, self.stage, self.steps, self.log = state, stage, steps, log
        self.rows: list[tuple[int, list[Tensor], dict[str, Tensor], Tensor, float]] = []
        self.started = self.since = time.monotonic()

    def add(self, group: list[Batch], terms: dict[str, Tensor], ok: Tensor, rate: float) -> None:
        self.rows.append((self.state.step, [batch.index for batch in group], terms, ok, rate))

    def flush(self) -> None:
        """Log the means since the last call.

        Raises:
            TrainingError: one of these steps was not finite.
        """
        if not self.rows:
            return
        names = list(self.rows[0][2])
        values = torch.stack([torch.stack([row[2][name] for name in names]) for row in self.rows]).cpu()
        taken = torch.stack([row[3] for row in self.rows]).cpu()
        loss = values[:, names.index("loss")]
        # fp16 scaling skips steps whose gradients overflow as part of its search: only the loss counts there
        failed = ~loss.isfinite() if self.state.scaler.is_enabled() else ~taken
        if failed.any():
            number, indices, _, _, _ = self.rows[int(failed.nonzero()[0])]
            raise TrainingError(self._what_failed(number, indices, float(loss[failed][0])))
        if not taken.any() and self.state.scaler.get_scale() < 1:
            section = self.stage.section()
            raise TrainingError(
                f"no gradient of the last {len(self.rows)} steps is finite in fp16, although its scale is "
                f"down to {self.state.scaler.get_scale():g}; set {section}.precision=float32 or bf16."
            )
        now = time.monotonic()
        images = world() * sum(len(index) for row in self.rows for index in row[1])
        self.log(
            {
                "kind": "step",
                "step": self.state.step,
                "steps": self.steps,
                "epoch": (self.state.step - 1) // max(1, self.steps // self.stage.epochs) + 1,
                "epochs": self.stage.epochs,
                "progress": self.state.step / self.steps,
                "lr": self.rows[-1][4],
                **{
                    name: float(column[taken].mean()) if taken.any() else None
                    for name, column in zip(names, values.T, strict=True)
                },
                "skipped": int((~taken).sum()),
                "images_per_s": images / max(1e-9, now - self.since),
                "seconds": now - self.started,
            }
        )
        self.rows, self.since = [], now

    def _what_failed(self, number: int, indices: list[Tensor], loss: float) -> str:
        section = self.stage.section()
        samples = list(chain(*exchange(torch.cat(indices).tolist())))
        shown = ", ".join(map(str, samples[:16])) + (f", ... ({len(samples)})" if len(samples) > 16 else "")
        what = f"loss is {loss}" if not math.isfinite(loss) else f"a gradient is not finite (loss {loss:.4g})"
        return (
            f"{what} at step {number} of {self.steps}, samples {shown}; "
            f"lower {section}.lr ({self.stage.lr:g}), set {section}.clip=1 or {section}.precision=float32."
        )


def grouped(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` consecutive batches; the last may be shorter."""
    group: list[Batch] = []
    for batch in loader:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def dtype_of(stage: Stage, device: torch.device) -> torch.dtype:
    """The autocast type of this stage on this device.

    Raises:
        ConfigError: the device cannot compute in it.
    """
    bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if stage.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" and bf16 else torch.float32
    if stage.precision == "bf16" and not bf16:
        raise ConfigError(
            f"{stage.section()}.precision is 'bf16', which this GPU lacks; set fp16 or float32."
        )
    return {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[stage.precision]
