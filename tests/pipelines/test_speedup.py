"""Eager, compiled or CUDA graphs: the choice, and that measuring leaves no trace."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from noisyssl.batch import Batch
from noisyssl.classifier import build_classifier
from noisyssl.config import Config, TrainConfig
from noisyssl.errors import ConfigError
from noisyssl.objective import Given
from noisyssl.objectives import OBJECTIVES, build_objective
from noisyssl.objectives.supervised import Supervised
from noisyssl.pipelines import speedup
from noisyssl.pipelines.fit import prepare
from noisyssl.pipelines.setup import settings_must_hold

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


def compiles_at_once(monkeypatch):
    """Compilation takes no time here, and changes nothing."""
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", self._call_impl)
    )


def pretend(monkeypatch, *, graphs_too=False, losses=None, slopes=None, **taken):
    """The ways take as many milliseconds as is given, or fail so.

    `losses` adds to the loss of a way, `slopes` multiplies its gradient.
    """
    compiles_at_once(monkeypatch)
    marked, ways = [], iter(taken.items())

    def milliseconds(both, device):
        way, value = next(ways)
        off["now"], slope["now"] = (losses or {}).get(way, 0.0), (slopes or {}).get(way, 1.0)
        both()  # it does run: buffers and random numbers move
        if isinstance(value, Exception):
            raise value
        return value

    def forward(self, batch):
        loss = real(self, batch)["loss"] + off["now"]
        return {"loss": loss * slope["now"] + (1 - slope["now"]) * loss.detach()}

    off, slope, real = {"now": 0.0}, {"now": 1.0}, Supervised.forward
    monkeypatch.setattr(Supervised, "forward", forward)
    monkeypatch.setattr(speedup, "milliseconds", milliseconds)
    monkeypatch.setattr(speedup, "can_capture", lambda device: graphs_too)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    monkeypatch.setattr(torch.compiler, "reset", lambda: marked.append("reset"))
    return marked


@pytest.mark.parametrize(("compiled", "way"), [(5.0, "compiled"), (15.0, "eager")])
def test_the_faster_way_is_kept_and_said(state, compiled, way, monkeypatch):
    pretend(monkeypatch, eager=10.0, compiled=compiled)
    log = []
    speedup.choose_way(state, Once(), STAGE, CPU, log.append)
    assert state.way == state.facts["compile"]["way"] == way
    assert (state.objective._compiled_call_impl is not None) == (way == "compiled")
    assert log[0]["message"] == (
        f"steps are taken {speedup.WORDS[way]}: "
        f"forward and backward take 10.0 ms as they are, {compiled:.1f} ms compiled."
    )


@pytest.mark.parametrize(
    ("ms", "way"),
    [
        ({"eager": 10.0, "compiled": 5.0, "graphs": 4.0}, "graphs"),
        ({"eager": 10.0, "compiled": 4.0, "graphs": 5.0}, "compiled"),
        ({"eager": 3.0, "compiled": 5.0, "graphs": 4.0}, "eager"),
    ],
)
def test_on_a_gpu_graphs_are_the_third_way(state, ms, way, monkeypatch):
    marked = pretend(monkeypatch, graphs_too=True, **ms)
    log = []
    speedup.choose_way(state, Once(), STAGE, CPU, log.append)
    assert state.way == state.facts["compile"]["way"] == way
    assert state.facts["compile"]["ms"] == ms
    assert marked == [1] + ["reset"] * (way != "graphs")  # the memory of graphs that lost is given back
    assert f"{ms['graphs']:.1f} ms as CUDA graphs" in log[0]["message"]


def test_graphs_that_are_asked_for_are_kept_though_slower(state, monkeypatch):
    pretend(monkeypatch, graphs_too=True, eager=3.0, graphs=4.0)
    speedup.choose_way(state, Once(), replace(STAGE, compile="graphs"), CPU, lambda entry: None)
    assert state.way == "graphs"


@pytest.mark.parametrize("wanted", ["graphs", "auto"])
def test_graphs_that_fail_are_left_and_the_log_says_why(state, wanted, monkeypatch):
    ways = {"eager": 10.0} | ({"compiled": 9.0} if wanted == "auto" else {})
    pretend(monkeypatch, graphs_too=True, **ways, graphs=RuntimeError("cannot be\ncaptured"))
    log = []
    speedup.choose_way(state, Once(), replace(STAGE, compile=wanted), CPU, log.append)
    assert state.way == list(ways)[-1]
    assert "as CUDA graphs they failed (RuntimeError: cannot be captured)." in log[0]["message"]
    assert state.facts["compile"]["errors"].keys() == {"graphs"}


@pytest.mark.parametrize("off", [0.2, float("nan")])
def test_a_way_whose_loss_is_another_is_out_however_fast(state, off, monkeypatch):
    pretend(monkeypatch, graphs_too=True, losses={"graphs": off}, eager=10.0, compiled=9.0, graphs=1.0)
    log = []
    speedup.choose_way(state, Once(), STAGE, CPU, log.append)
    assert state.way == "compiled"
    assert "as CUDA graphs they failed (its loss is" in log[0]["message"]
    assert speedup.close(1.02, 1.0, *speedup.TOLERANCE["loss"])
    assert not speedup.close(float("inf"), float("inf"), *speedup.TOLERANCE["loss"])


@pytest.mark.parametrize("slope", [0.8, 1.2, float("nan")])
def test_a_way_whose_gradient_is_another_is_out_however_fast(state, slope, monkeypatch):
    pretend(monkeypatch, slopes={"compiled": slope}, eager=10.0, compiled=1.0)
    log = []
    speedup.choose_way(state, Once(), STAGE, CPU, log.append)
    assert state.way == "eager"
    assert "compiled they failed (its gradient is" in log[0]["message"]


def test_a_gradient_that_is_rounded_otherwise_is_the_same(state, monkeypatch):
    pretend(monkeypatch, slopes={"compiled": 1.05}, eager=10.0, compiled=1.0)
    speedup.choose_way(state, Once(), STAGE, CPU, lambda entry: None)
    assert state.way == "compiled"


def test_measuring_changes_neither_weights_buffers_nor_random_numbers(state, monkeypatch):
    pretend(monkeypatch, graphs_too=True, eager=10.0, compiled=6.0, graphs=5.0)
    loader = Once()
    before, random = copy.deepcopy(state.tensors()), torch.get_rng_state()
    speedup.choose_way(state, loader, STAGE, CPU, lambda entry: None)
    after = state.tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in state.objective.parameters())


@pytest.mark.parametrize(
    ("facts", "way"),
    [
        ({"way": "graphs"}, "graphs"),
        ({"way": "eager"}, "eager"),
        ({"compiled": True}, "compiled"),  # of runs before there were graphs
        ({"compiled": False}, "eager"),
    ],
)
def test_a_resumed_run_goes_on_as_it_began(state, facts, way, monkeypatch):
    pretend(monkeypatch, graphs_too=True, eager=1.0, **({} if way == "eager" else {way: 2.0}))
    loader = Once()
    state.facts["compile"] = facts
    speedup.choose_way(state, loader, STAGE, CPU, pytest.fail)
    assert bool(loader.started) == (way != "eager")  # that it works here is tried
    assert state.way == way
    assert (state.objective._compiled_call_impl is not None) == (way != "eager")


def test_a_run_of_graphs_that_is_resumed_where_there_are_none_says_so(state, monkeypatch):
    pretend(monkeypatch, graphs_too=False)
    state.facts["compile"], log = {"way": "graphs"}, []
    speedup.choose_way(state, Once(), STAGE, CPU, log.append)
    assert state.way == "eager"
    assert log[0]["kind"] == "warning"
    assert "steps as CUDA graphs, which fails here (they take an NVIDIA GPU" in log[0]["message"]


@pytest.mark.parametrize("wanted", ["auto", "on"])
def test_what_cannot_be_compiled_trains_without(state, wanted, monkeypatch):
    pretend(monkeypatch, eager=10.0, compiled=RuntimeError("no compiler\nfound"))
    log = []
    speedup.choose_way(state, Once(), replace(STAGE, compile=wanted), CPU, log.append)
    assert state.objective._compiled_call_impl is None
    assert "compiled they failed (RuntimeError: no compiler found)" in log[0]["message"]


def test_on_compiles_though_that_is_slower(state, monkeypatch):
    pretend(monkeypatch, eager=1.0, compiled=2.0)
    speedup.choose_way(state, Once(), replace(STAGE, compile="on"), CPU, lambda entry: None)
    assert state.way == state.facts["compile"]["way"] == "compiled"


def test_a_resumed_run_whose_compiler_is_gone_says_so_and_goes_on(state, monkeypatch):
    pretend(monkeypatch, eager=10.0, compiled=RuntimeError("no compiler"))
    state.facts["compile"], log = {"way": "compiled"}, []
    speedup.choose_way(state, Once(), STAGE, CPU, log.append)
    assert state.way == "eager"
    assert state.facts["compile"] == {"way": "compiled"}  # where there is one it is compiled again
    assert [entry["kind"] for entry in log] == ["warning"]
    assert "compiled, which fails here (RuntimeError: no compiler); it goes on without." in log[0]["message"]


def test_a_batch_that_does_not_fit_is_measured_in_parts(state, monkeypatch):
    sizes, real = [], type(state.objective).forward

    def forward(self, batch):
        sizes.append(len(batch.index))
        if len(batch.index) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(type(state.objective), "forward", forward)
    monkeypatch.setattr(speedup, "CALLS", 1)
    compiles_at_once(monkeypatch)
    log = []
    speedup.choose_way(state, Once(), STAGE, CPU, log.append)
    assert state.parts == 2
    assert "each batch is taken in 2 parts from here on" in log[0]["message"]
    assert sizes[0] == 4
    assert set(sizes[1:]) == {2}


def test_off_measures_nothing(state):
    loader = Once()
    speedup.choose_way(state, loader, replace(STAGE, compile="off"), CPU, pytest.fail)
    assert not loader.started
    with pytest.raises(ConfigError, match=r"train\.compile is 'yes'; choose one of off, on, graphs, auto"):
        replace(STAGE, compile="yes")


def test_graphs_without_a_gpu_are_refused_in_one_line():
    config = Config(device="cpu", backbone="resnet18-w16", train=replace(STAGE, compile="graphs"))
    with pytest.raises(
        ConfigError, match=r"train\.compile is 'graphs', which takes .*; set train\.compile=on"
    ):
        settings_must_hold(config, config.train)
    assert not speedup.can_capture(CPU)


def test_graphs_need_a_process_of_their_own(monkeypatch):
    assert speedup.can_capture(torch.device("cuda"))
    monkeypatch.setattr(speedup, "world", lambda: 2)
    assert not speedup.can_capture(torch.device("cuda"))
    assert speedup.candidates(STAGE, torch.device("cuda")) == ["compiled"]


@pytest.mark.slow
def test_with_the_real_compiler(state):
    log = []
    speedup.choose_way(state, Once(), STAGE, CPU, log.append)
    facts = state.facts["compile"]
    assert not facts["errors"]
    assert facts["ms"].keys() == {"eager", "compiled"}
    assert min(facts["ms"].values()) > 0
