"""The parts of the GPU suite, at a size that a CPU takes: what they compare, not what comes out."""

import itertools
from contextlib import ExitStack

import pytest
import torch

from noisyssl.benchmarks import feeding, gpu_suite, ladder, limits, loading
from noisyssl.errors import MachineError, TrainingError
from noisyssl.pipelines.setup import device_of
from noisyssl.views import pair


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return feeding.images(tmp_path_factory.mktemp("images"), 64, 64, 2)


@pytest.mark.parametrize("views", [1, 2])
def test_feeding_sets_every_source_against_the_same_synthetic_step(views, images, monkeypatch):
    """All sides run; their seconds are given here: synthetic steps 2, real ones 2.5, loading alone 0.5."""

    def interleaved(sides, warm, runs):
        for side in sides.values():
            side()
        alone = feeding.SYNTHETIC not in sides
        return {key: [2.0 if key == feeding.SYNTHETIC else 0.5 if alone else 2.5] * runs for key in sides}

    monkeypatch.setattr(feeding, "interleaved", interleaved)
    files, packed = images
    one = feeding.measure("resnet18-w16", views, files, packed, batch=16, size=32, steps=1, runs=2, threads=2)
    sources = feeding.sources(files, packed, device_of("auto"))
    assert list(one["figures"]) == list(sources)
    for row in one["figures"].values():
        assert row == {
            "step / synthetic step": 1.25, "images/s": 16 / 2.5,
            "views/s alone": views * 16 / 0.5, "views made / eaten": 4.0,
        }  # fmt: skip
    assert set(one["spread"]) == {f"{name}.step / synthetic step" for name in sources}


def test_each_step_gets_a_new_batch_and_the_synthetic_one_never_changes(images):
    _, packed = images
    with ExitStack() as stack:
        cpu = torch.device("cpu")
        following = feeding.endless(packed, "batched", pair(32), 8, cpu, 1, stack)
        rows = [following().index.tolist() for _ in range(2 * len(packed) // 8)]  # two epochs
    assert sorted(itertools.chain.from_iterable(rows)) == sorted([*range(len(packed))] * 2)
    same = feeding.synthetic(8, 2, 32, torch.device("cpu"))
    assert same() is same()
    assert same().views[0].is_contiguous(memory_format=torch.channels_last)
    assert len(same().views) == 2


def test_rungs_differ_in_nothing_but_what_they_are_called_for(monkeypatch):
    built = []
    original = ladder.prepare

    def noted(objective, stage, device):
        built.append((stage, original(objective, stage, device)))
        return built[-1][1]

    monkeypatch.setattr(ladder, "prepare", noted)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: None)  # takes a minute
    known = {"figures": {"copy GB/s": 1000.0, "matrix TFLOP/s": 100.0}}
    monkeypatch.setitem(limits.WORK, "resnet18-w16", (1e9, 1e6))
    one = ladder.measure("resnet18-w16", batch=4, size=32, steps=1, runs=2, known=known)
    stages = [stage for stage, _ in built]
    assert [stage.precision for stage in stages] == ["float32", *["bf16"] * 4]
    assert [stage.compile for stage in stages] == ["off", "off", "off", "on", "graphs"]
    assert [state.way for _, state in built] == ["eager", "eager", "eager", "compiled", "graphs"]
    layouts = [state.objective.network.backbone.trunk.layer1[0].conv1.weight for _, state in built]
    last = [weight.is_contiguous(memory_format=torch.channels_last) for weight in layouts]
    assert last == [False, False, True, True, True]
    figures = one["figures"]
    best = max(figures[f"{name}, images/s"] for name in ladder.RUNGS)
    assert figures["share of the no-overlap limit"] == pytest.approx(best / (1 / (1e-5 + 1e-6)))


def test_the_limit_adds_both_times():
    known = {"figures": {"copy GB/s": 4300.0, "matrix TFLOP/s": 790.0}}
    assert limits.images_per_s("resnet18", known) == pytest.approx(32_300, rel=0.01)
    assert limits.images_per_s("resnet50", known) == pytest.approx(8_850, rel=0.01)


def test_a_part_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    def fails():
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(limits, "measure", lambda: {"figures": {}})
    monkeypatch.setattr(feeding, "images", lambda *_: (None, None))
    monkeypatch.setattr(loading, "jpegs", lambda *_: None)
    monkeypatch.setattr(
        gpu_suite, "parts", lambda *_: {"bad": fails, "good": lambda: [{"a": 1}], "no": fails}
    )
    said, found = [], []
    with pytest.raises(TrainingError, match=r"1 parts failed: bad; the reasons are above"):
        found.extend(gpu_suite.measure(said.append, 2, only="d"))
    assert found == [{"figures": {}}, {"a": 1}]
    assert said[0] == "bad failed, RuntimeError: out of memory"
    assert [line.split(":")[0] for line in said[1:]] == ["bad", "good"]


def test_without_a_gpu_the_command_says_what_to_run(monkeypatch, capsys):
    from noisyssl.cli import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "gpu"])
    assert exit_.value.code == MachineError.code
    assert "PyTorch finds no NVIDIA GPU; `noisyssl bench all`" in capsys.readouterr().err
