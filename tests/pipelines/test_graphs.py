"""Steps as CUDA graphs, which write to the same memory each time: what begins a step, what may outlive it."""

import copy
import gc
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from noisyssl.backbones import build_backbone
from noisyssl.batch import Batch
from noisyssl.classifier import build_classifier
from noisyssl.config import TrainConfig
from noisyssl.methods import METHODS
from noisyssl.objective import Given
from noisyssl.objectives import OBJECTIVES, build_objective
from noisyssl.pipelines import speedup, stepping
from noisyssl.pipelines.fit import prepare
from noisyssl.pipelines.state import WAYS

CPU = torch.device("cpu")
STAGE = replace(TrainConfig(), batch=4, compile="off")
NARROW = {"moco2": {"queue": 32, "splits": 2}, "dino": {"prototypes": 64}}


def begun(name, device=CPU, stage=STAGE):
    """A small method or objective before its first step."""
    torch.manual_seed(0)
    if name in METHODS:
        kind = METHODS[name]
        objective = kind(build_backbone("resnet18-w16"), kind.Config(**NARROW.get(name, {})), 32)
    else:
        given = Given(
            count=16, train=np.arange(16), classes=3, labels=np.arange(16) % 3, epochs=3,
            another=lambda: build_classifier("resnet18-w16", "plain", 3),
        )  # fmt: skip
        network = build_classifier("resnet18-w16", "plain", 3)
        objective = build_objective(name, network, OBJECTIVES[name][1](), given)
    return prepare(objective, stage, device)


def batch_for(name, seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    sizes = [v.size for v in METHODS[name].views(32)] if name in METHODS else [32, 32]
    images = (torch.randint(0, 256, (count, 3, s, s), dtype=torch.uint8, generator=generator) for s in sizes)
    index = torch.arange(count)
    return Batch(views=tuple(images), index=index, key=index * 7919 + seed, label=index % 3)


@pytest.fixture
def marks(monkeypatch):
    """One entry for each time that torch is told of a new step; compilation changes nothing."""
    marked = []
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **_: setattr(self, "_compiled_call_impl", self._call_impl)
    )
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marked.append(1))
    return marked


@pytest.mark.parametrize(("way", "count"), [("eager", 0), ("compiled", 0), ("graphs", 1)])
def test_a_step_begins_once_whatever_it_consists_of(way, count, marks):
    """Gradients of its parts add up in the graphs' memory, which must not be written over in between."""
    state = begun("ce")
    state.take(way)
    state.parts = 2
    group = [batch_for("ce")] * 3
    stepping.step(state, group, 0.1, STAGE, CPU, torch.float32)
    assert marks == [1] * count


def test_a_step_that_did_not_fit_begins_again(marks, monkeypatch):
    state = begun("ce")
    real = type(state.objective).forward

    def forward(self, batch):
        if len(batch.index) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)

    monkeypatch.setattr(type(state.objective), "forward", forward)
    state.take("graphs")
    stepping.step(state, [batch_for("ce")], 0.1, STAGE, CPU, torch.float32)
    assert marks == [1, 1]


class Made(TorchDispatchMode):
    """Notes whatever memory the operations inside come out with."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.storages[one.untyped_storage()._cdata] = StorageWeakRef(one.untyped_storage())
        return out


@pytest.mark.parametrize("name", [*METHODS, *OBJECTIVES])
def test_nothing_that_a_forward_pass_made_outlives_its_step(name, monkeypatch):
    """It may lie in the memory of graphs, which the next step writes over: what is kept must be a copy."""
    state, batch = begun(name), batch_for(name)
    made, real = [], type(state.objective).forward

    def forward(self, batch):
        made.append(Made())
        with made[-1]:
            return real(self, batch)

    monkeypatch.setattr(type(state.objective), "forward", forward)
    inputs = [*batch.views, batch.index, batch.key, batch.label]
    owned = [*state.objective.parameters(), *state.objective.buffers(), *inputs]
    own = {tensor.untyped_storage()._cdata for tensor in owned}
    terms, ok = stepping.step(state, [batch] * 2, 0.01, STAGE, CPU, torch.float32)
    state.objective.after_step(0.5, ok)
    gc.collect()
    assert len(made) == 2
    alive = [ref for one in made for key, ref in one.storages.items() if key not in own and not ref.expired()]
    assert sum(len(one.storages) for one in made) > 20
    assert not alive
    assert terms["loss"].isfinite()  # as the log keeps it


@pytest.mark.parametrize("name", [*METHODS, *OBJECTIVES])
def test_a_forward_pass_writes_over_nothing_that_it_reads(name):
    """The backward pass of a compiled step may read a buffer again and take what it finds for the old values.

    BatchNorms' running statistics it does not read; counters of batches neither.
    """
    state, batch = begun(name), batch_for(name)
    state.objective.train()
    before = {key: value.clone() for key, value in state.objective.named_buffers()}
    state.network(batch)["loss"].backward()
    own = ("running_mean", "running_var", "num_batches_tracked")
    for key, value in state.objective.named_buffers():
        assert key.endswith(own) or torch.equal(value, before[key]), key


def noted(monkeypatch):
    """Compilation without the compiler: the shapes of the first view, of each graph that torch makes."""
    shapes = []

    def backend(graph, inputs):
        shapes.append(
            [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.dtype is torch.uint8]
        )
        return graph.forward

    monkeypatch.setitem(WAYS, "compiled", WAYS["compiled"] | {"backend": backend})
    return shapes


@pytest.mark.parametrize("name", ["moco2", "dino", "sop"])
def test_code_is_compiled_once_for_all_batches_of_a_step(name, fresh, monkeypatch):
    """A list that grew within the compiled code would be a new case with each batch."""
    shapes, state = noted(monkeypatch), begun(name)
    state.take("compiled")
    state.objective.train()
    for number in range(2):
        group = [batch_for(name, 10 * number + i) for i in range(3)]
        _, ok = stepping.step(state, group, 0.01, STAGE, CPU, torch.float32)
        state.objective.after_step(0.5, ok)
    assert len([one for one in shapes if one]) == 1


def test_a_smaller_batch_is_taken_as_it_is_and_the_next_one_by_the_same_code(fresh, monkeypatch):
    shapes, state = noted(monkeypatch), begun("ce")
    state.take("compiled")
    state.objective.train()
    calls, real = [], type(state.objective).forward

    def forward(self, batch):
        if not torch.compiler.is_compiling():
            calls.append(len(batch.index))
        return real(self, batch)

    monkeypatch.setattr(type(state.objective), "forward", forward)
    for count in (4, 4, 3, 4, 2, 4):
        stepping.step(state, [batch_for("ce", 0, count)], 0.01, STAGE, CPU, torch.float32)
    assert shapes == [[(4, 3, 32, 32)]]  # whole numbers: code for any size would have symbols
    assert calls == [3, 2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["elr", "sop"])
def test_compiled_steps_are_the_eager_ones(name, fresh):
    (eager, ours), (compiled, theirs) = (steps(name, way, CPU, 1) for way in ("eager", "compiled"))
    assert compiled == pytest.approx(eager, abs=1e-5)
    assert (ours - theirs).norm() < 1e-6 * ours.norm()


@pytest.mark.parametrize("name", ["elr", "sop", "moco2", "dino"])
@pytest.mark.parametrize("fails", ["nowhere", "in the forward pass", "in the backward pass"])
def test_what_a_forward_pass_leaves_for_after_the_step_is_forgotten(name, fails, marks, monkeypatch):
    """Keys wait for the queue, outputs for the centre: those of the measurement join neither."""
    monkeypatch.setattr(speedup, "CALLS", 1)
    state, batch = begun(name), batch_for(name)
    real = type(state.objective).forward

    def forward(self, batch):
        if state.way != "eager" and "forward" in fails:
            raise RuntimeError(f"fails {fails}")
        terms = real(self, batch)
        return {"loss": terms["loss"].detach()} if state.way != "eager" and "backward" in fails else terms

    monkeypatch.setattr(type(state.objective), "forward", forward)
    before = copy.deepcopy(state.tensors())
    facts = speedup.measured(state, batch, STAGE, CPU, torch.float32, ["compiled"])
    why = {"nowhere": "", "in the forward pass": "fails in the forward pass"}.get(fails, "require grad")
    assert why in facts["errors"].get("compiled", "")
    assert bool(why) == bool(facts["errors"])
    after = state.tensors()
    assert all(torch.equal(before[key], after[key]) for key in before)
    left = {"moco2": lambda own: own.waiting, "dino": lambda own: own.seen}
    assert left.get(name, lambda own: own.loss.waiting)(state.objective) == []
    assert getattr(state.objective, "loss", state.objective).left is None


@pytest.fixture
def fresh(monkeypatch):
    """Compiled code of earlier tests is gone (of one function only eight variants are kept), and no TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def steps(name, way, device, accumulate):
    """Losses of six steps, each on new images, and the weights after: graphs are replayed from the third."""
    stage = replace(STAGE, optimizer="sgd", lr=0.01, precision="float32")
    state, kept, read = begun(name, device, stage), [], []
    state.take(way)
    state.objective.train()
    for number in range(6):
        # of four images BatchNorm makes 5 % of a rounding in six steps
        group = [batch_for(name, 10 * number + i, 16) for i in range(accumulate)]
        terms, ok = stepping.step(state, group, 0.01, stage, device, torch.float32)
        state.objective.after_step(number / 6, ok)
        kept.append(terms["loss"])
        read.append(float(terms["loss"]))
    assert [float(loss) for loss in kept] == read  # the log reads them steps later
    return read, torch.cat([p.detach().flatten() for p in state.objective.parameters()])


GPU = torch.device("cuda")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["ce", "elr", "sop", "simclr", "moco2", "dino"])
def test_graphs_take_the_steps_of_eager(name, accumulate, fresh):
    (eager, ours), (graphs, theirs) = (steps(name, way, GPU, accumulate) for way in ("eager", "graphs"))
    near = 0.02 if name in ("simclr", "moco2") else 0.001  # the former's BatchNorms make 1 % of a rounding
    assert graphs == pytest.approx(eager, rel=near, abs=near)
    assert (ours - theirs).norm() < near * ours.norm()
    if name == "ce":  # nothing of it was left uncaptured
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.gpu
@on_gpu
def test_auto_measures_three_ways_and_leaves_no_trace(fresh):
    state, batch = begun("moco2", GPU), batch_for("moco2")
    before = copy.deepcopy(state.tensors())
    facts = speedup.measured(state, batch, STAGE, GPU, torch.float32, ["compiled", "graphs"])
    assert not facts["errors"]
    assert facts["ms"].keys() == {"eager", "compiled", "graphs"}
    assert facts["way"] == min(facts["ms"], key=facts["ms"].get)
    after = state.tensors()
    assert all(torch.equal(before[key], after[key]) for key in before)
