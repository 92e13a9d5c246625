"""Compiling if that is faster: the choice, and that measuring leaves no trace."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from noisyssl.batch import Batch
from noisyssl.classifier import build_classifier
from noisyssl.config import TrainConfig
from noisyssl.errors import ConfigError
from noisyssl.objective import Given
from noisyssl.objectives import OBJECTIVES, build_objective
from noisyssl.pipelines import speedup
from noisyssl.pipelines.fit import prepare

GIVEN = Given(count=4, train=np.arange(4), classes=3)
CPU = torch.device("cpu")
STAGE = replace(TrainConfig(), compile="auto", batch=4)


class Once:
    """A loader of the same batch."""

    def __init__(self):
        self.dropped = {}
        index = torch.arange(4)
        views = (torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8),)
        self.batch, self.started = Batch(views=views, index=index, key=index, label=index % 3), []

    def start(self, epoch, position, dropped):
        self.started.append((epoch, position))

    def __iter__(self):
        return iter([self.batch])


@pytest.fixture
def state():
    torch.manual_seed(0)
    network = build_classifier("resnet18-w16", "plain", 3)
    network.backbone.trunk.layer4.append(nn.Dropout(0.5))  # draws from torch's generator
    return prepare(build_objective("ce", network, OBJECTIVES["ce"][1](), GIVEN), STAGE, CPU)


def pretend(monkeypatch, eager, compiled):
    """Compilation takes no time here, and the two ways as long as is given."""
    taken = iter([eager, compiled])

    def milliseconds(both, device):
        both()  # it does run: buffers and random numbers move
        value = next(taken)
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(speedup, "milliseconds", milliseconds)
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", self._call_impl)
    )


@pytest.mark.parametrize(("compiled", "kept"), [(5.0, True), (15.0, False)])
def test_the_faster_way_is_kept_and_said(state, compiled, kept, monkeypatch):
    pretend(monkeypatch, 10.0, compiled)
    log = []
    speedup.compile_if_faster(state, Once(), STAGE, CPU, log.append)
    assert (state.objective._compiled_call_impl is not None) == kept
    assert state.facts["compile"]["compiled"] is kept
    assert log[0]["message"].startswith("compiled: " if kept else "not compiled: ")
    assert f"take {compiled:.1f} ms compiled, 10.0 ms as they are" in log[0]["message"]


def test_measuring_changes_neither_weights_buffers_nor_random_numbers(state, monkeypatch):
    pretend(monkeypatch, 10.0, 5.0)
    loader = Once()
    before, random = copy.deepcopy(state.tensors()), torch.get_rng_state()
    speedup.compile_if_faster(state, loader, STAGE, CPU, lambda entry: None)
    after = state.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in state.objective.parameters())


def test_a_resumed_run_goes_on_as_it_began(state, monkeypatch):
    pretend(monkeypatch, 10.0, 5.0)
    loader = Once()
    state.facts["compile"] = {"compiled": True}
    speedup.compile_if_faster(state, loader, STAGE, CPU, pytest.fail)
    assert not loader.started
    assert state.objective._compiled_call_impl is not None


def test_what_cannot_be_compiled_trains_without(state, monkeypatch):
    pretend(monkeypatch, 10.0, RuntimeError("no compiler\nfound"))
    log = []
    speedup.compile_if_faster(state, Once(), STAGE, CPU, log.append)
    assert state.objective._compiled_call_impl is None
    assert "not compiled, which failed (RuntimeError: no compiler found)" in log[0]["message"]


def test_a_batch_that_does_not_fit_is_measured_in_parts(state, monkeypatch):
    sizes, real = [], type(state.objective).forward

    def forward(self, batch):
        sizes.append(len(batch.index))
        if len(batch.index) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(type(state.objective), "forward", forward)
    monkeypatch.setattr(speedup, "CALLS", 1)
    monkeypatch.setattr(
        nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", self._call_impl)
    )
    speedup.compile_if_faster(state, Once(), STAGE, CPU, lambda entry: None)
    assert state.parts == 2
    assert sizes[0] == 4
    assert set(sizes[1:]) == {2}


def test_off_and_on_measure_nothing(state):
    for choice in ("off", "on"):
        loader = Once()
        speedup.compile_if_faster(state, loader, replace(STAGE, compile=choice), CPU, pytest.fail)
        assert not loader.started
    with pytest.raises(ConfigError, match=r"train\.compile is 'yes'"):
        replace(STAGE, compile="yes")


@pytest.mark.slow
def test_with_the_real_compiler(state):
    log = []
    speedup.compile_if_faster(state, Once(), STAGE, CPU, log.append)
    facts = state.facts["compile"]
    assert not facts["error"]
    assert facts["eager_ms"] > 0 < facts["compiled_ms"]
