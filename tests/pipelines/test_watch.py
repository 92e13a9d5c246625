"""Looking at a pretraining between epochs: it shows what is learnt and changes nothing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from noisyssl import checkpoint, probe
from noisyssl.errors import Stopped
from noisyssl.evaluation import figures
from noisyssl.methods import METHODS
from noisyssl.methods.simclr import SimCLR
from noisyssl.pipelines.evaluate import evaluating, evaluation_images, logits_of
from noisyssl.pipelines.labels import truth_of
from noisyssl.pipelines.pretrain import pretrain
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.scan import open_samples
from noisyssl.pipelines.watch import Truth, one_of_each, projected
from noisyssl.recipe import load

SMALL = (
    "backbone=resnet18-w16", "threads=1", "data.size=32", "device=cpu",
    "pretrain.batch=32", "pretrain.epochs=3",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _quick_map():
    """t-SNE has tests of its own and takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "flat_map", lambda features: features[:, :2])
        yield


@pytest.fixture(scope="module")
def samples(tissue):
    """72 training images of all classes; the others are left to the test split."""
    found = open_samples(tissue)
    splits = found.splits.copy()
    splits[found.where("train")[72:]] = "test"
    return replace(found, splits=splits)


def config(*settings: str):
    return load(None, [*SMALL, *settings])


def start(folder: Path, samples, *settings: str, truth: Truth | None = None, **more):
    """A pretraining without labels in `folder`; its metrics."""
    made = config(*settings)
    run = Run.open(folder) if folder.exists() else Run.create(folder, made, "pretrain", samples.unlabelled())
    return pretrain(made, samples.unlabelled(), run, truth=truth, **more)


def truth_from(samples) -> Truth:
    return Truth(samples.classes, truth_of(samples))


def log(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def newest(folder: Path) -> dict[str, torch.Tensor]:
    """All that training changes, random generators included."""
    return checkpoint.load(max((folder / "checkpoints").glob("step-*")))[0]


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.fixture(scope="module")
def watched(samples, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("watched") / "run"
    start(folder, samples, "pretrain.probe_every=2", "pretrain.ema=0.9", truth=truth_from(samples))
    return folder


def test_looking_changes_no_bit(samples, watched, tmp_path):
    """Weights, statistics, optimizer, average and generators after three epochs, with and without looks."""
    assert start(tmp_path / "run", samples, "pretrain.probe_every=0", "pretrain.ema=0.9")["probe"] is None
    assert log(tmp_path / "run", "probe") == []
    assert not (tmp_path / "run" / "probe.npz").exists()
    assert_same_bits(newest(tmp_path / "run"), newest(watched))
    losses = [[entry["loss"] for entry in log(f, "step")] for f in (tmp_path / "run", watched)]
    assert losses[0] == losses[1]


def test_looking_at_the_network_that_learns_changes_no_bit(samples, tmp_path):
    """Without an average the very modules that train are looked at, BatchNorm statistics and all."""
    for every in ("0", "1"):
        start(tmp_path / every, samples, f"pretrain.probe_every={every}", "pretrain.epochs=2")
    assert len(log(tmp_path / "1", "probe")) == 3
    assert_same_bits(newest(tmp_path / "0"), newest(tmp_path / "1"))


def test_labels_change_what_is_seen_and_not_what_is_learnt(samples, watched, tmp_path):
    truth = truth_from(samples)
    shuffled = replace(truth, labels=np.random.default_rng(0).permutation(truth.labels))
    found = start(tmp_path / "run", samples, "pretrain.probe_every=2", "pretrain.ema=0.9", truth=shuffled)
    assert_same_bits(newest(tmp_path / "run"), newest(watched))
    expected = json.loads((watched / "metrics.json").read_text())["probe"]
    assert found["probe"]["features"] == expected["features"]
    assert found["probe"]["linear"] != expected["linear"]


def test_it_looks_at_the_start_every_so_often_and_at_the_end(watched):
    looks = log(watched, "probe")
    assert [entry["epoch"] for entry in looks] == [0, 2, 3]
    for entry in looks:
        assert 0 < entry["std"] < entry["full_std"] == pytest.approx(128**-0.5)
        assert 1 < entry["effective_rank"] < 128
        assert set(entry["embedding"]) == {"std", "full_std", "effective_rank"}
    assert looks[0]["effective_rank"] != looks[-1]["effective_rank"]
    assert not log(watched, "warning")


def test_the_figures_are_those_of_the_saved_backbone_on_validation_images(samples, watched):
    from noisyssl.pipelines.embed import frozen_backbone

    found = json.loads((watched / "metrics.json").read_text())["probe"]
    backbone = frozen_backbone(watched).backbone
    rng = np.random.default_rng(0)  # the order decides between equally near images, nothing else
    train, val = (rng.permutation(samples.where(split)) for split in ("train", "val"))
    features = []
    for rows in (train, val):
        with evaluation_images(samples, rows, 32, "crop", 1) as images:
            features.append(logits_of(backbone, images, torch.device("cpu")))
    labels, groups = samples.labels, np.array(samples.groups)
    assert found["images"] == {"train": len(train), "val": len(val)}
    assert found["features"]["effective_rank"] == pytest.approx(
        probe.spread(features[0]).effective_rank, rel=1e-4
    )
    votes = probe.knn(features[0], labels[train], features[1], 9, 20)
    fitted, strength = probe.linear(features[0], labels[train], groups[train], features[1], 9)
    assert (found["k"], found["strength"]) == (20, strength)
    for name, scores in (("knn", votes), ("linear", fitted)):
        expected = figures(scores, labels[val], groups[val], samples.classes).to_json()
        for figure in ("balanced_accuracy", "accuracy"):
            assert found[name][figure] == expected[figure]
    last = log(watched, "probe")[-1]
    assert last["knn"]["balanced_accuracy"] == found["knn"]["balanced_accuracy"]["value"]


def test_the_test_split_is_not_touched(samples, watched):
    with np.load(watched / "probe.npz", allow_pickle=False) as stored:
        splits = {
            name: set(samples.splits[stored[name].ravel()])
            for name in ("map_index", "query_index", "near_index")
        }
    assert splits == {"map_index": {"train", "val"}, "query_index": {"val"}, "near_index": {"train"}}


def test_the_sheet_holds_the_nearest_training_images_with_their_labels(samples, watched):
    with np.load(watched / "probe.npz", allow_pickle=False) as stored:
        found = dict(stored)
    labels = truth_of(samples)
    assert found["classes"].tolist() == list(samples.classes)
    for name in ("map", "query", "near"):
        np.testing.assert_array_equal(found[f"{name}_label"], labels[found[f"{name}_index"]])
    assert found["near_index"].shape == (8, 5)
    assert len(set(found["query_label"].tolist())) == 8, "one of each class first"
    assert (np.diff(found["near_cosine"], axis=1) <= 0).all()


def test_a_stopped_run_resumes_to_the_same_bits_looks_and_figures(samples, watched, tmp_path):
    calls = iter([None, None, 15])  # inside the second epoch
    settings = ("pretrain.probe_every=2", "pretrain.ema=0.9")
    truth = truth_from(samples)
    with pytest.raises(Stopped):
        start(tmp_path / "run", samples, *settings, truth=truth, stopped=lambda: next(calls))
    assert checkpoint.load(max((tmp_path / "run" / "checkpoints").glob("step-*")))[1]["position"] == 1
    start(tmp_path / "run", samples, *settings, truth=truth)
    assert_same_bits(newest(tmp_path / "run"), newest(watched))
    assert_same_looks(tmp_path / "run", watched)


@pytest.mark.parametrize("kept", [True, False], ids=["after the last epoch", "before the first checkpoint"])
def test_a_killed_run_logs_each_look_once(samples, watched, tmp_path, kept):
    shutil.copytree(watched, tmp_path / "run")
    for name in ("metrics.json", "probe.npz"):
        (tmp_path / "run" / name).unlink()
    if not kept:
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        (tmp_path / "run" / "checkpoints").mkdir()
    start(tmp_path / "run", samples, "pretrain.probe_every=2", "pretrain.ema=0.9", truth=truth_from(samples))
    assert_same_looks(tmp_path / "run", watched)


def assert_same_looks(ours: Path, theirs: Path) -> None:
    seen = [[entry | {"seconds": 0} for entry in log(folder, "probe")] for folder in (ours, theirs)]
    assert seen[0] == seen[1]
    found = [json.loads((folder / "metrics.json").read_text())["probe"] for folder in (ours, theirs)]
    assert found[0] == found[1]
    with np.load(ours / "probe.npz") as mine, np.load(theirs / "probe.npz") as other:
        for name in other:
            np.testing.assert_array_equal(mine[name], other[name])


def test_without_labels_only_the_spread_is_measured(samples, tmp_path):
    bare = replace(samples.unlabelled(), splits=np.full(len(samples), "train", dtype="<U5"))
    found = start(tmp_path / "run", bare, "pretrain.epochs=1")["probe"]
    assert not {"knn", "linear", "k"} & set(found)
    assert found["images"] == {"train": len(samples) - 8, "val": 0}
    assert found["features"]["effective_rank"] > 1
    with np.load(tmp_path / "run" / "probe.npz") as stored:
        assert not set(stored["query_index"]) & set(stored["near_index"].ravel())
        assert set(stored["map_label"]) == {-1}


class Constant(SimCLR):
    """A method whose embedding says nothing, while its features are well."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.projector = nn.Linear(self.backbone.features, 8)
        nn.init.constant_(self.projector.weight, 0)
        nn.init.constant_(self.projector.bias, 1)

    def forward(self, batch):
        return {"loss": (self.backbone(batch.views[0]).mean() - 1).square()}


def test_a_collapse_is_a_warning_that_says_what_to_try(samples, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "simclr", Constant)
    shown = []
    monkeypatch.setattr(
        Run, "log", lambda self, entry, real=Run.log: (shown.append(entry), real(self, entry))
    )
    found = start(tmp_path / "run", samples, "pretrain.epochs=1", truth=truth_from(samples))["probe"]
    assert found["collapsed"]
    (warning,) = log(tmp_path / "run", "warning")
    assert "after epoch 1 the embedding of all images" in warning["message"]
    assert "lower pretrain.lr" in warning["message"]
    assert warning in shown, "the terminal shows what is logged"


def test_features_that_are_not_finite_do_not_stop_the_training(samples, tmp_path, monkeypatch):
    from noisyssl.pipelines import watch

    real = watch.logits_of
    monkeypatch.setattr(watch, "logits_of", lambda *arguments: np.full_like(real(*arguments), np.inf))
    assert start(tmp_path / "run", samples, "pretrain.epochs=1")["probe"] is None
    told = [entry["message"] for entry in log(tmp_path / "run", "warning")]
    assert ["not finite" in message for message in told] == [True, True]  # at the start, after the epoch


def test_a_file_that_broke_since_the_scan_is_left_out(tissue, tmp_path):
    shutil.copytree(tissue.parent, tmp_path / "data")
    samples = open_samples(tmp_path / "data" / tissue.name)
    victim = int(samples.where("val")[3])
    samples.file(victim).write_bytes(b"no image")
    settings = ("pretrain.epochs=1", "pretrain.probe_every=1")
    found = start(tmp_path / "run", samples, *settings, truth=truth_from(samples))["probe"]
    assert found["images"] == {"train": len(samples.where("train")), "val": len(samples.where("val")) - 1}
    assert found["knn"]["n"] == len(samples.where("val")) - 1
    (warning,) = log(tmp_path / "run", "warning")
    assert samples.paths[victim] in warning["message"]
    with np.load(tmp_path / "run" / "probe.npz") as stored:
        assert victim not in stored["map_index"]


def test_every_part_is_again_in_its_own_mode():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)))
    module.train()
    module[1].eval()
    with evaluating(module):
        assert not any(part.training for part in module.modules())
    assert [part.training for part in module.modules()] == [True, True, False, False, False]


def test_a_projector_of_something_else_is_not_asked():
    method = nn.Module()
    features = np.ones((4, 6), np.float32)
    assert projected(method, features, torch.device("cpu")) is None
    method.projector = nn.Sequential(nn.Linear(54, 3))  # such as nine tiles side by side
    assert projected(method, features, torch.device("cpu")) is None
    method.projector = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    assert projected(method, features, torch.device("cpu")).shape == (4, 3)
    assert method.projector[1].num_batches_tracked == 0


def test_one_of_each_label_comes_first():
    assert one_of_each(np.array([2, 2, 0, 2, 1, 0]), 4).tolist() == [0, 2, 4, 1]
