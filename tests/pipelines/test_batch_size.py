"""A batch of auto: which sizes are tried, which one is taken, and that the run holds the numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from noisyssl.cli import run
from noisyssl.config import AutoBatch
from noisyssl.errors import ConfigError, DataError
from noisyssl.methods import METHODS
from noisyssl.objectives import OBJECTIVES
from noisyssl.pipelines import batch_size, pretrain, stepping, train
from noisyssl.pipelines.batch_size import doubling, scaled, settle, smallest
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.scan import open_samples
from noisyssl.recipe import load

SMALL = ["backbone=resnet18-w16", "threads=1", "data.size=32"]
NARROW = [
    "pretrain.moco2.queue=64", "pretrain.moco2.splits=2", "pretrain.moco3.hidden=64",
    "pretrain.byol.hidden=64", "pretrain.barlow.width=64", "pretrain.vicreg.width=64",
    "pretrain.dino.prototypes=128",
    "pretrain.dino.hidden=64",
]  # fmt: skip
MODULES = {"pretrain": pretrain, "train": train}


@pytest.fixture(scope="module")
def samples(tissue):
    return open_samples(tissue)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with 1,000 bytes of free memory that computes on the CPU; a call takes ten milliseconds."""
    used = {"most": 0, "calls": []}

    def milliseconds(one, device):
        one()
        used["calls"].append(1)
        return 10.0

    monkeypatch.setattr(batch_size, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 50 + used["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: used.update(most=0))
    return used


@pytest.fixture
def speeds(monkeypatch):
    """Images/s that a GPU would be measured to reach, by size; what was asked for is noted."""
    table = {"asked": []}

    def measured(config, stage, samples, module, sizes, processes):
        table["asked"].append(sizes)
        return {size: table[size] for size in sizes if size in table}

    monkeypatch.setattr(batch_size, "device_of", lambda name: torch.device("cuda"))
    monkeypatch.setattr(batch_size, "measured", measured)
    return table


def config_of(*settings):
    return load(None, [*SMALL, *settings])


def test_sizes_double_from_32_until_an_epoch_has_eight_steps_or_4096_images():
    assert doubling(10**6, 1) == [32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert doubling(8 * 256, 1) == [32, 64, 128, 256]
    assert doubling(8 * 256 - 1, 1) == [32, 64, 128]
    assert doubling(40, 1) == [32]  # however small the set is


@pytest.mark.parametrize("processes", [2, 3, 5, 64])
def test_every_size_falls_into_equal_shares(processes):
    sizes = doubling(10**6, processes)
    assert all(size % processes == 0 for size in sizes)
    assert 32 <= sizes[0] < 32 + processes
    assert sizes[-1] <= 4096 < 2 * sizes[-1]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({32: 100, 64: 200, 128: 400}, 128),
        ({32: 100, 64: 100, 128: 100}, 32),  # no gain: the most steps
        ({32: 100, 64: 191, 128: 200}, 64),
        ({32: 100, 64: 189, 128: 200}, 128),
        ({32: 100, 64: 200, 128: 150}, 64),  # slower again
        ({32: 1}, 32),
    ],
)
def test_the_smallest_within_five_percent_of_the_best_is_taken(table, expected):
    assert smallest(table) == expected


def test_the_learning_rate_follows_the_optimizer():
    assert scaled(0.1, "sgd", 4) == scaled(0.1, "lars", 4) == pytest.approx(0.4)
    assert scaled(0.1, "adam", 4) == scaled(0.1, "adamw", 4) == pytest.approx(0.2)
    assert scaled(0.1, "sgd", 0.5) == pytest.approx(0.05)


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.1), ("adamw", 0.2)])
def test_what_was_found_is_in_the_config_and_said(samples, speeds, optimizer, lr):
    speeds.update({32: 100.0})
    config = config_of(f"train.optimizer={optimizer}", "train.lr=0.4", "train.batch=128", "train.batch=auto")
    settled, facts = settle(config, "train", samples, train)
    assert type(settled.train.batch) is int
    assert (settled.train.batch, settled.train.lr) == (32, pytest.approx(lr))
    assert settled == replace(config, train=replace(config.train, batch=32, lr=settled.train.lr))
    assert facts["asked"] == {"batch": 128, "lr": 0.4}
    assert facts["images_per_s"] == {"32": 100.0}
    found = "the smallest within 5 % of the best (100 at 32; images/s of one GPU)"
    assert facts["message"] == f"batch auto is 32, {found}; lr is {lr}, from 0.4 at 128."
    json.dumps(facts)


def test_a_number_is_left_alone(samples, speeds):
    config = config_of("train.batch=48")
    assert settle(config, "train", samples, train) == (config, {})
    assert not speeds["asked"]


def test_on_a_cpu_auto_is_the_number_that_was_set(samples, monkeypatch):
    monkeypatch.setattr(batch_size, "measured", pytest.fail)
    config = config_of("device=cpu", "train.batch=48", "train.batch=auto", "train.lr=0.3")
    settled, facts = settle(config, "train", samples, train)
    assert type(settled.train.batch) is int
    assert (settled.train.batch, settled.train.lr) == (48, 0.3)
    assert facts["message"] == "batch auto is 48, as set or by default: a CPU gains nothing by another."
    with pytest.raises(ConfigError, match=r"pretrain\.batch is 256, but there are only"):
        settle(config_of("device=cpu", "pretrain.batch=auto"), "pretrain", samples, pretrain)


@pytest.mark.parametrize("batch", ["256", "auto"])
def test_without_training_images_no_batch_is_asked_for(samples, batch):
    none = replace(samples, splits=np.full(len(samples), "test", dtype="<U5"))
    with pytest.raises(DataError, match="no training images: every image is in val or test"):
        pretrain.must_be_possible(config_of(f"pretrain.batch={batch}"), none)


def test_a_number_that_will_be_replaced_is_not_held_against_the_data(samples, speeds):
    config = config_of("pretrain.batch=auto")
    pretrain.must_be_possible(config, samples)  # 256 are more than there are
    speeds.update({32: 100.0})
    assert settle(config, "pretrain", samples, pretrain)[0].pretrain.batch == 32
    with pytest.raises(DataError, match="has no labels"):
        settle(config_of("train.batch=auto"), "train", samples.unlabelled(), train)


def test_sizes_that_a_method_refuses_are_not_tried(speeds, samples, monkeypatch):
    monkeypatch.setattr(batch_size, "doubling", lambda images, processes: [32, 64, 128])
    moco = ["pretrain.method=moco2", "pretrain.batch=auto", "pretrain.moco2.splits=4"]
    speeds.update({32: 1.0, 64: 2.0})
    settle(config_of(*moco, "pretrain.moco2.queue=128"), "pretrain", samples, pretrain)
    settle(config_of(*moco, "pretrain.moco2.queue=64"), "pretrain", samples, pretrain)
    assert speeds["asked"] == [[32, 64], [32]]


def test_where_nothing_fits_the_smallest_is_left_to_the_run(speeds, samples):
    settled, facts = settle(config_of("train.batch=auto"), "train", samples, train)
    assert settled.train.batch == 32
    assert "none fits" in facts["message"]


class Module:
    """A stage whose network has room for so many images, and needs a byte for each."""

    def __init__(self, room, used, divisible):
        self.room, self.used, self.divisible = room, used, divisible

    def scratch(self, config, samples):
        objective, views = train.scratch(config, samples)
        real, room, used = objective.forward, self.room, self.used

        def forward(batch):
            count = len(batch.index)
            if count > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            used["most"] = max(used["most"], count)
            return real(batch)

        objective.forward, objective.divisible = forward, self.divisible
        return objective, views


@pytest.mark.parametrize("divisible", [True, False])
def test_measuring_ends_where_the_memory_does(gpu, samples, divisible, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", pytest.fail)  # a minute for each size
    config = config_of("train.batch=auto", "device=cpu", "train.compile=on", "train.tune=head:1")
    module = Module(9, gpu, divisible)
    found = batch_size.measured(config, config.train, samples, module, [4, 8, 16, 32], 1)
    assert found == {4: 400.0, 8: 800.0}


def test_measuring_ends_where_four_fifths_of_the_free_memory_are_used(gpu, samples, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20, 2000))
    config = config_of("train.batch=auto", "device=cpu")
    module = Module(99, gpu, True)
    assert [*batch_size.measured(config, config.train, samples, module, [8, 16, 17], 1)] == [8, 16]
    monkeypatch.setattr(batch_size, "streams", lambda *_: ("resident", None))
    monkeypatch.setattr(batch_size, "bytes_of", lambda samples: 10)  # which the images will take of it
    assert [*batch_size.measured(config, config.train, samples, module, [8, 16, 17], 1)] == [8]


def test_each_process_takes_its_share(gpu, samples):
    config = config_of("train.batch=auto", "device=cpu")
    found = batch_size.measured(config, config.train, samples, Module(4, gpu, True), [8, 16, 32], 4)
    assert found == {8: 200.0, 16: 400.0}


@pytest.mark.parametrize("name", [*METHODS, *OBJECTIVES])
def test_every_method_and_objective_can_be_measured(gpu, samples, name, monkeypatch):
    stage, chooser = ("pretrain", "method") if name in METHODS else ("train", "objective")
    own = [setting for setting in NARROW if setting.startswith(f"pretrain.{name}.")]
    own += [f"{stage}.{chooser}={name}", f"{stage}.batch=auto", f"{stage}.ema=0.9"]
    config = config_of("device=cpu", *own)
    seen, real = [], stepping.step

    def step(*arguments):
        terms, ok = real(*arguments)
        seen.append(set(terms))
        return terms, ok

    monkeypatch.setattr(batch_size, "step", step)
    found = batch_size.measured(config, getattr(config, stage), samples, MODULES[stage], [4], 1)
    assert found == {4: 400.0}
    if name == "dividemix":  # not as it warms up, which takes half the memory
        assert "labelled" in seen[0]


def command(tissue, out, *more):
    settings = [part for setting in SMALL for part in ("--set", setting)]
    start = ["train", str(tissue), "--out", str(out), "--epochs", "1", "--batch", "auto"]
    start += ["--set", "train.batch=128"]  # as a recipe would: lr belongs to it
    return run([*start, *settings, *more])


def test_a_run_holds_its_numbers_and_measures_once(tissue, tmp_path, speeds, monkeypatch, capsys):
    speeds.update({32: 100.0})
    assert command(tissue, tmp_path / "run", "--set", "train.lr=0.001") == 0
    made = Run.open(tmp_path / "run")
    assert (made.config().train.batch, made.config().train.lr) == (32, pytest.approx(0.0005))
    assert made.facts()["batch"]["images_per_s"] == {"32": 100.0}
    told = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["batch"] for entry in told if entry["kind"] == "batch"] == [32]
    assert "batch auto is 32" in capsys.readouterr().err
    monkeypatch.setattr(batch_size, "measured", pytest.fail)
    monkeypatch.setattr(train, "train", lambda config, *_, **__: {"batch": config.train.batch})
    for lr in ([], ["--set", "train.lr=0.001"], ["--set", "train.lr=0.0005"]):
        (tmp_path / "run" / "metrics.json").unlink(missing_ok=True)
        capsys.readouterr()
        assert command(tissue, tmp_path / "run", *lr, "--resume", "--json") == 0
        assert json.loads(capsys.readouterr().out)["batch"] == 32
    assert command(tissue, tmp_path / "run", "--set", "train.lr=0.002", "--resume") == 2
    assert "train.lr: 0.0005 -> 0.002" in capsys.readouterr().err


def test_a_run_of_a_number_that_is_resumed_with_auto_keeps_it(tissue, tmp_path, speeds):
    config, samples = config_of("train.batch=48"), open_samples(tissue)
    made = Run.create(tmp_path / "run", config, "train", samples)
    assert made.settled(config_of("train.batch=auto")).train.batch == 48
    made.must_match(config_of("train.batch=auto"))
    with pytest.raises(ConfigError, match=r"train\.lr: 0\.001 -> 0\.5"):
        made.must_match(config_of("train.batch=auto", "train.lr=0.5"))
    with pytest.raises(ConfigError, match=r"train\.batch: 48 -> 64"):
        made.must_match(config_of("train.batch=64"))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train", "none", "train.batch is 'none'; it must be a whole number or auto."),
        ("pretrain", "0", "pretrain.batch is 0; it must be at least 1, or auto."),
        ("pretrain", "1", "pretrain.batch is 1; BatchNorm needs 2 or more. Set --batch 2 or auto."),
        ("build", "many", "train.batch is 'many'; it must be a whole number or auto."),
    ],
)
def test_anything_else_is_refused_in_one_line_that_names_auto(name, text, message, tissue, tmp_path, capsys):
    where = [str(tmp_path / "x")] if name == "build" else ["--out", str(tmp_path / "x")]
    assert run([name, str(tissue), *where, "--batch", text]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    if name == "build":
        assert "pretrain.batch is 'many'" in said


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["pretrain", "train"])
def test_a_real_gpu_finds_a_batch_and_keeps_nothing(name, samples, monkeypatch):
    monkeypatch.setattr(batch_size, "doubling", lambda images, processes: [32, 64, 128])
    config = config_of("device=cuda", f"{name}.batch=auto")
    settle(config, name, samples, MODULES[name])  # libraries keep what they work in
    before = torch.cuda.memory_allocated()
    settled, facts = settle(config, name, samples, MODULES[name])
    assert getattr(settled, name).batch in (32, 64, 128)
    assert [*facts["images_per_s"]] == ["32", "64", "128"]
    assert min(facts["images_per_s"].values()) > 0
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert isinstance(getattr(config, name).batch, AutoBatch)
