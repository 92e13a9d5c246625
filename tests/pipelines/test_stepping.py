"""A step that does not fit into memory is taken in parts, and stays the same step."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from noisyssl.batch import Batch
from noisyssl.classifier import build_classifier
from noisyssl.config import TrainConfig
from noisyssl.errors import TrainingError
from noisyssl.losses import LOSSES
from noisyssl.methods import METHODS
from noisyssl.objective import Given, Objective
from noisyssl.objectives import OBJECTIVES, build_objective
from noisyssl.pipelines import stepping
from noisyssl.pipelines.fit import fit, prepare

GIVEN = Given(count=6, train=np.arange(6), classes=3)
CPU = torch.device("cpu")
STAGE = TrainConfig(epochs=2, batch=12, lr=0.01, warmup=0.0, log_every=1)


class Hungry(Objective):
    """Memory for `room` samples at a time."""

    divisible = True

    def __init__(self, room):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.room, self.seen, self.waiting = nn.Linear(3, 1), room, [], []

    def forward(self, batch):
        self.seen.append(batch.index.tolist())
        self.waiting.append(batch.index.tolist())
        if len(batch.index) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        out = self.net(batch.views[0].float().mean((2, 3)) / 100)[:, 0]
        return {"loss": F.mse_loss(out, batch.label.float())}

    def after_step(self, progress, ok):
        self.waiting = []


def batch_of(size=12):
    generator = torch.Generator().manual_seed(0)
    views = (torch.randint(0, 256, (size, 3, 2, 2), dtype=torch.uint8, generator=generator),)
    index = torch.arange(size)
    return Batch(views=views, index=index, key=index + 100, label=index % 2)


def taken(room, size=12, accumulate=1):
    """The weights after one step, and the objective."""
    state = prepare(Hungry(room), STAGE, CPU)
    group = [batch_of(size)] * accumulate
    terms, ok = stepping.step(state, group, 0.01, STAGE, CPU, torch.float32)
    assert ok
    return torch.cat([p.detach().flatten() for p in state.objective.parameters()]), terms, state


def test_what_the_parts_before_left_for_after_the_step_is_forgotten():
    _, _, state = taken(3)
    assert [i for part in state.objective.waiting for i in part] == [*range(12)]


@pytest.mark.parametrize("size", [12, 11])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("room", [6, 3])
def test_parts_make_the_same_step_as_the_whole(room, accumulate, size):
    """11 samples fall into unequal parts: each must weigh as many samples as it has."""
    whole, expected, _ = taken(99, size, accumulate)
    parts, terms, state = taken(room, size, accumulate)
    assert state.parts == 12 // room
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-7)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-7)


def test_the_next_step_does_not_try_the_whole_again():
    _, _, state = taken(6)
    state.objective.seen.clear()
    stepping.step(state, [batch_of()], 0.01, STAGE, CPU, torch.float32)
    assert [len(part) for part in state.objective.seen] == [6, 6]
    other = prepare(Hungry(6), STAGE, CPU)
    other.restore(state.tensors(), copy.deepcopy(state.record()))
    assert other.parts == 2


def test_parts_of_a_batch_hold_each_sample_once_with_all_that_is_its_own():
    batch = batch_of(7)
    parts = batch.parts(3)
    assert [len(part.index) for part in parts] == [3, 2, 2]
    for name in ("index", "key", "label"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert torch.equal(torch.cat([part.views[0] for part in parts]), batch.views[0])
    unlabelled = replace(batch, label=None)
    assert [part.label for part in unlabelled.parts(2)] == [None, None]
    assert batch.parts(1) == [batch]


def test_what_compares_samples_or_is_small_already_says_what_to_set(monkeypatch):
    with pytest.raises(
        TrainingError, match=r"a batch of 12 does not fit.*set train.batch=6, train.precision"
    ):
        taken(1)
    monkeypatch.setattr(Hungry, "divisible", False)
    with pytest.raises(TrainingError, match=r"a batch of 12 does not fit into the GPU's memory; set train"):
        taken(6)
    monkeypatch.setattr(Hungry, "divisible", True)
    monkeypatch.setattr(stepping, "world", lambda: 2)
    with pytest.raises(TrainingError, match="does not fit"):
        taken(6)


class Always:
    """A loader of three equal batches an epoch."""

    def __init__(self):
        self.dropped, self.position = {}, (0, 0)

    def __len__(self):
        return 3

    def start(self, epoch, position, dropped):
        self.position = (epoch, position)

    def __iter__(self):
        epoch = self.position[0]
        for place in range(3):
            self.position = (epoch, place + 1) if place < 2 else (epoch + 1, 0)
            yield batch_of()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 6])
def test_a_smaller_batch_later_falls_into_fewer_parts_of_two_and_more(size):
    """The last batch of an epoch: no part is empty, or a single image, on which BatchNorm cannot train."""
    state = prepare(Hungry(99), STAGE, CPU)
    state.parts = 4
    terms, ok = stepping.step(state, [batch_of(size)], 0.01, STAGE, CPU, torch.float32)
    assert ok
    assert terms["loss"].isfinite()
    assert min(map(len, state.objective.seen)) >= min(2, size)


def test_a_run_says_so_once():
    state, log = prepare(Hungry(6), STAGE, CPU), []
    loader = Always()
    list(fit(state, loader, STAGE, device=CPU, predict=None, log=log.append, save=lambda: None))
    warnings = [entry["message"] for entry in log if entry["kind"] == "warning"]
    assert len(warnings) == 1
    assert "each batch is taken in 2 parts from here on" in warnings[0]
    assert sum(entry["kind"] == "step" for entry in log) == 6


@pytest.mark.parametrize("name", [name for name, kind in METHODS.items() if kind.divisible] + [*LOSSES])
def test_whatever_says_that_it_splits_is_a_mean_over_samples(name):
    """Without BatchNorm's coupling: in evaluation mode parts weighed by size give the loss of the whole."""
    torch.manual_seed(0)
    if name in METHODS:
        from noisyssl.backbones import build_backbone

        kind = METHODS[name]
        objective = kind(build_backbone("resnet18-w16"), kind.Config(), 64)
        views = kind.views(64)
    else:
        network = build_classifier("resnet18-w16", "plain", 3)
        objective, views = build_objective(name, network, OBJECTIVES[name][1](), GIVEN), (64,)
    sizes = [getattr(view, "size", view) for view in views]
    index = torch.arange(6)
    images = tuple(torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8) for size in sizes)
    batch = Batch(views=images, index=index, key=index * 7919, label=index % 3)
    objective.eval()
    with torch.no_grad():
        whole = objective(batch)["loss"]
        parts = sum(objective(part)["loss"] * len(part.index) / 6 for part in batch.parts(4))
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_methods_that_compare_samples_do_not_split():
    kept = {name for name, kind in METHODS.items() if not kind.divisible}
    assert kept == {"simclr", "moco2", "moco3", "byol", "simsiam", "barlow", "vicreg", "dino"}


class Two(Objective):
    """Two networks whose gradients have the lengths 30 and 0.3."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)

    def forward(self, batch):
        return {"loss": 30 * self.first.weight.sum() + 0.3 * self.second.weight.sum()}

    def apart(self):
        return self.first, self.second


def test_two_networks_are_clipped_apart():
    """Together, the steep one would shorten the other one's step to a hundredth."""
    stage = replace(STAGE, optimizer="sgd", momentum=0.0, weight_decay=0.0, clip=1.0)
    state = prepare(Two(), stage, CPU)
    before = [p.detach().clone() for p in state.objective.parameters()]
    terms, ok = stepping.step(state, [batch_of()], 0.1, stage, CPU, torch.float32)
    moved = [float(b - p.detach()) for b, p in zip(before, state.objective.parameters(), strict=True)]
    assert moved == pytest.approx([0.1, 0.03], rel=1e-4)
    assert float(terms["grad_norm"]) == pytest.approx(30.0015, rel=1e-4)
    assert ok


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_real_gpu_that_is_too_small_takes_the_step_in_parts():
    device, stage = torch.device("cuda"), replace(STAGE, batch=256, precision="float32")
    views = (torch.randint(0, 256, (256, 3, 96, 96), dtype=torch.uint8, device=device),)
    index = torch.arange(256, device=device)
    batch = Batch(views=views, index=index, key=index, label=index % 3)
    torch.manual_seed(0)
    network = build_classifier("resnet18", "plain", 3)
    given = Given(count=256, train=np.arange(256), classes=3)
    state = prepare(build_objective("ce", network, OBJECTIVES["ce"][1](), given), stage, device)
    stepping.step(state, [batch], 0.01, stage, device, torch.float32)  # libraries keep what they work in
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    stepping.step(state, [batch], 0.01, stage, device, torch.float32)
    assert state.parts == 1
    most = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    room = before + 0.6 * (most - before)
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        for _ in range(2):
            terms, ok = stepping.step(state, [batch], 0.01, stage, device, torch.float32)
            assert ok
            assert terms["loss"].isfinite()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert state.parts in (2, 4)
