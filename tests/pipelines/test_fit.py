"""The loop's laws, on a two-layer network and batches made by hand."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from noisyssl.batch import Batch
from noisyssl.config import TrainConfig
from noisyssl.errors import Stopped, TrainingError
from noisyssl.objective import Objective
from noisyssl.optim import cosine
from noisyssl.pipelines.fit import fit, prepare

CPU = torch.device("cpu")


class Toy(Objective):
    """Least squares of a small network; counts what the loop promises to call."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 1))
        self.poison: int | None = None
        self.calls: list[tuple[float, bool]] = []
        self.epochs = 0

    def forward(self, batch):
        x = batch.views[0].float().mean((2, 3)) / 100
        loss = F.mse_loss(self.net(x)[:, 0], batch.label.float())
        if self.poison is not None and self.poison in batch.index.tolist():
            loss = loss * torch.nan
        return {"loss": loss, "twice": 2 * loss.detach()}

    def before_epoch(self, predict):
        self.epochs += 1

    def after_step(self, progress, ok):
        self.calls.append((progress, bool(ok)))


class Toys:
    """Batches that are a function of (epoch, position), as a loader's are."""

    def __init__(self, count: int = 6, size: int = 4) -> None:
        self.count, self.size = count, size
        self.position, self.dropped, self.labels, self.name = (0, 0), {}, None, "toys"

    def __len__(self) -> int:
        return self.count

    def start(self, epoch, position, dropped=None):
        self.position = (epoch, position)

    def batch(self, epoch: int, position: int) -> Batch:
        generator = torch.Generator().manual_seed(1000 * epoch + position)
        views = torch.randint(0, 256, (self.size, 3, 2, 2), dtype=torch.uint8, generator=generator)
        index = torch.arange(self.size) + position * self.size
        label = torch.randint(0, 2, (self.size,), generator=generator)
        return Batch(views=(views,), index=index, key=index, label=label)

    def __iter__(self):
        epoch, position = self.position
        for place in range(position, self.count):
            self.position = (epoch, place + 1) if place + 1 < self.count else (epoch + 1, 0)
            yield self.batch(epoch, place)

    def close(self):
        pass


def stage(**changes) -> TrainConfig:
    return replace(TrainConfig(epochs=3, batch=4, lr=0.01, warmup=0.0, log_every=2), **changes)


def run(state, loader, config, **more):
    """Finish the training; the log, and the checkpoints as (tensors, record) copies."""
    log, saved = more.pop("log", []), []

    def save():
        tensors = {name: value.clone() for name, value in state.tensors().items()}
        saved.append((tensors, json.loads(json.dumps(state.record()))))

    for _ in fit(state, loader, config, device=CPU, predict=lambda i: i, log=log.append, save=save, **more):
        pass
    return log, saved


def weights(objective) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in objective.parameters()])


def test_the_loop_is_the_plain_loop():
    config = stage(optimizer="sgd", momentum=0.0, weight_decay=0.0)
    state, loader = prepare(Toy(), config, CPU), Toys()
    plain = Toy()
    run(state, loader, config)
    for step in range(18):
        plain.zero_grad()
        plain(loader.batch(step // 6, step % 6))["loss"].backward()
        rate = 0.01 * cosine((step + 0.5) / 18, 0.0)
        with torch.no_grad():
            for p in plain.parameters():
                p -= rate * p.grad
    torch.testing.assert_close(weights(state.objective), weights(plain), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_any_checkpoint_resumes_to_the_same_bits(optimizer, precision):
    config = stage(optimizer=optimizer, precision=precision, ema=0.9, accumulate=2, checkpoint_minutes=1e-9)
    whole = prepare(Toy(norm=True), config, CPU)
    _, saved = run(whole, Toys(), config)
    assert len(saved) == 3 * 3
    assert any(record["position"] for _, record in saved)
    for tensors, record in saved:
        state = prepare(Toy(norm=True), config, CPU)
        state.restore(tensors, record)
        run(state, Toys(), config)
        ours, theirs = state.tensors(), whole.tensors()
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), (name, record)


def test_accumulated_batches_are_one_large_batch():
    large, parts = stage(optimizer="sgd"), stage(optimizer="sgd", accumulate=2)

    class Joined(Toys):
        def batch(self, epoch, position):
            a, b = (Toys().batch(epoch, 2 * position + i) for i in (0, 1))
            return Batch(
                views=(torch.cat([a.views[0], b.views[0]]),), index=torch.cat([a.index, b.index]),
                key=torch.cat([a.key, b.key]), label=torch.cat([a.label, b.label]),
            )  # fmt: skip

    ours, theirs = prepare(Toy(), parts, CPU), prepare(Toy(), large, CPU)
    run(ours, Toys(6), parts)
    run(theirs, Joined(3), large)
    assert ours.step == theirs.step == 9
    torch.testing.assert_close(weights(ours.objective), weights(theirs.objective), rtol=1e-5, atol=1e-7)


def test_clipping_bounds_the_step():
    config = stage(optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=1e-3, epochs=1, lr=1.0)
    state = prepare(Toy(), config, CPU)
    before = weights(state.objective).clone()
    log, _ = run(state, Toys(1), config)
    assert log[0]["grad_norm"] > 1e-3  # the norm before clipping is what is logged
    moved = (weights(state.objective) - before).norm().item()
    assert moved == pytest.approx(1e-3 * log[0]["lr"], rel=1e-3)


def test_the_average_follows_by_its_formula():
    config = stage(optimizer="sgd", ema=0.75, epochs=1)
    state = prepare(Toy(norm=True), config, CPU)
    expected = weights(state.objective).clone()
    trail = []
    original = state.objective.after_step
    state.objective.after_step = lambda p, ok: (
        trail.append(weights(state.objective).clone()),
        original(p, ok),
    )
    run(state, Toys(4), config)
    for now in trail:
        expected = 0.75 * expected + 0.25 * now
    torch.testing.assert_close(weights(state.average), expected, rtol=1e-5, atol=1e-7)
    assert state.trained() is state.average
    assert not any(p.requires_grad for p in state.average.parameters())
    assert not state.average.training
    counters = [
        (a, o)
        for (n, a), o in zip(
            state.average.state_dict().items(), state.objective.state_dict().values(), strict=True
        )
        if "num_batches" in n
    ]
    assert all(torch.equal(a, o) for a, o in counters)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lars"])
def test_a_loss_that_is_not_finite_moves_nothing_and_names_step_and_samples(optimizer):
    config = stage(optimizer=optimizer, log_every=4, ema=0.9)
    objective = Toy(norm=False)
    objective.poison = 9  # in the third batch: samples 8-11
    state = prepare(objective, config, CPU)
    snapshots = []
    real = objective.after_step
    objective.after_step = lambda p, ok: (snapshots.append(weights(objective).clone()), real(p, ok))
    log, saved = [], []
    with pytest.raises(
        TrainingError, match=r"loss is nan at step 3 of 18, samples 8, 9, 10, 11; lower train\.lr"
    ):
        for _ in fit(
            state, Toys(), config, device=CPU, predict=len, log=log.append, save=lambda: saved.append(1)
        ):
            pass
    assert saved == []
    assert log == []
    assert torch.equal(snapshots[1], snapshots[2])
    assert not torch.equal(snapshots[0], snapshots[1])
    assert [ok for _, ok in objective.calls] == [True, True, False, True]
    assert weights(state.objective).isfinite().all()
    assert weights(state.average).isfinite().all()


def test_a_gradient_that_is_not_finite_stops_too():
    class Steep(Toy):
        def forward(self, batch):
            terms = super().forward(batch)
            zero = self.net[0].weight.sum() * 0
            return {"loss": terms["loss"] + zero.sqrt()}  # value fine, slope infinite

    config = stage()
    with pytest.raises(TrainingError, match="a gradient is not finite"):
        run(prepare(Steep(), config, CPU), Toys(), config)


def test_fp16_scaling_skips_overflows_and_goes_on():
    config = stage(precision="fp16", optimizer="sgd", lr=1e-5)

    class Loud(Toy):
        def forward(self, batch):
            return {"loss": super().forward(batch)["loss"] * 100.0}

    state = prepare(Loud(), config, CPU)
    assert state.scaler.is_enabled()
    log, _ = run(state, Toys(), config)
    assert sum(entry["skipped"] for entry in log) > 0
    assert log[-1]["skipped"] == 0
    assert state.scaler.get_scale() < 65536
    skipped = [ok for _, ok in state.objective.calls]
    assert not all(skipped)
    assert weights(state.objective).isfinite().all()


def test_a_signal_saves_and_stops():
    config = stage()
    state = prepare(Toy(), config, CPU)
    seen = iter([None, None, None, 15])
    saved = []
    with pytest.raises(Stopped, match="--resume") as caught:
        for _ in fit(
            state, Toys(), config, device=CPU, predict=len, log=lambda e: None, stopped=lambda: next(seen),
            save=lambda: saved.append((state.epoch, state.position, state.step)),
        ):  # fmt: skip
            pass
    assert caught.value.code == 143
    assert saved == [(0, 4, 4)]


def test_the_log_says_what_happened():
    config = stage(log_every=4)
    state = prepare(Toy(), config, CPU)
    log, saved = run(state, Toys(), config)
    assert [entry["step"] for entry in log] == [4, 6, 8, 12, 16, 18]
    assert [entry["epoch"] for entry in log] == [1, 1, 2, 2, 3, 3]
    for entry in log:
        assert entry["twice"] == pytest.approx(2 * entry["loss"])
        assert entry["steps"] == 18
        assert math.isfinite(entry["images_per_s"])
    assert json.loads(json.dumps(log)) == log
    assert len(saved) == 3
    assert state.objective.epochs == 3
    assert [p for p, _ in state.objective.calls] == [pytest.approx((i + 1) / 18) for i in range(18)]


def test_compiled_in_place_keeps_names():
    config = stage(compile="on")
    eager = prepare(Toy(), stage(), CPU).tensors().keys()
    assert prepare(Toy(), config, CPU).tensors().keys() == eager


@pytest.mark.slow
def test_compiled_training_agrees_with_eager():
    eager, compiled = prepare(Toy(), stage(), CPU), prepare(Toy(), stage(compile="on"), CPU)
    run(eager, Toys(), stage())
    run(compiled, Toys(), stage(compile="on"))
    torch.testing.assert_close(weights(compiled.objective), weights(eager.objective), rtol=1e-4, atol=1e-6)


def test_groups_scale_the_learning_rate():
    class Slow(Toy):
        def parameter_groups(self):
            return [{**group, "lr_scale": 0.0} for group in super().parameter_groups()]

    config = stage(optimizer="sgd", weight_decay=0.0)
    state = prepare(Slow(), config, CPU)
    before = copy.deepcopy(weights(state.objective))
    run(state, Toys(), config)
    assert torch.equal(weights(state.objective), before)


def test_what_happens_between_epochs_does_not_count_as_throughput(monkeypatch):
    """A step takes a second of this clock; whoever looks at the network between epochs takes a thousand."""
    from noisyssl.pipelines import fit as module

    clock = [0.0]
    monkeypatch.setattr(module, "time", type("clock", (), {"monotonic": staticmethod(lambda: clock[0])}))
    monkeypatch.setattr(Toy, "after_step", lambda self, progress, ok: clock.__setitem__(0, clock[0] + 1))
    config, log = stage(checkpoint_minutes=1e9), []
    state = prepare(Toy(), config, CPU)
    for _ in fit(state, Toys(), config, device=CPU, predict=None, log=log.append, save=lambda: None):
        clock[0] += 1000
    assert {entry["images_per_s"] for entry in log} == {4.0}
    assert log[-1]["seconds"] > 2000
