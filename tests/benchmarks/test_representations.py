"""The benchmark of frozen features: what it asks for, what it keeps, what its record says."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from noisyssl.benchmarks import representations
from noisyssl.benchmarks.records import write
from noisyssl.benchmarks.tables import tables
from noisyssl.cli import run
from noisyssl.errors import ConfigError
from noisyssl.pipelines import pretrain
from noisyssl.pipelines.embed import frozen_backbone, random_backbone
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.scan import open_samples
from noisyssl.recipe import load

SMALL = [
    "--epochs", "1", "--set", "backbone=resnet18-w16", "--set", "data.size=32", "--set", "threads=1",
    "--set", "pretrain.batch=32",
]  # fmt: skip
ROWS = ["--method", "random:2", "--method", "rotation:2", "--method", "simsiam"]


@pytest.fixture(scope="module")
def measured(tissue, tmp_path_factory):
    """The record, and the folder of runs."""
    folder = tmp_path_factory.mktemp("features")
    out = folder / "record.jsonl"
    command = ["bench", "features", str(tissue), "--work", str(folder / "work"), "--out", str(out)]
    assert run([*command, *ROWS, *SMALL]) == 0
    return json.loads(out.read_text()), folder / "work", command


def test_what_is_printed_is_a_figure_with_its_interval(measured, capsys):
    _, _, command = measured
    assert run([*command, *ROWS, *SMALL]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["rotation"])
    assert re.search(r"k-NN 0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]  k-NN - random -?0\.\d{3} \[", row)


def test_every_cell_is_a_run_and_random_weights_need_none(measured):
    _, work, _ = measured
    assert sorted(path.name for path in work.iterdir() if path.is_dir()) == [
        "rotation-0", "rotation-1", "simsiam-0",
    ]  # fmt: skip
    assert [Run.open(work / f"rotation-{seed}").config().seed for seed in (0, 1)] == [0, 1]
    assert Run.open(work / "simsiam-0").metrics()["probe"] is None


def test_a_row_is_the_mean_over_seeds_and_its_gain_over_random(measured):
    record, work, _ = measured
    told = {path.stem: json.loads(path.read_text()) for path in work.glob("*.json")}
    for key, title in representations.KINDS.items():
        values = {name: one[key]["balanced_accuracy"]["value"] for name, one in told.items()}
        row = record["figures"]["rotation"]
        mean = np.mean([values["rotation-0"], values["rotation-1"]])
        random = np.mean([values["random-0"], values["random-1"]])
        assert row[title]["value"] == pytest.approx(mean)
        assert row[title]["low"] < mean < row[title]["high"]
        assert row[f"{title} - random"]["value"] == pytest.approx(mean - random)
        assert f"{title} - random" not in record["figures"]["random"]
    assert record["figures"]["rotation"]["seeds"] == 2
    assert record["figures"]["simsiam"]["seeds"] == 1
    assert record["figures"]["random"]["minutes"] is None
    assert record["n"] == 5


def test_random_weights_are_those_that_pretraining_starts_from(measured):
    _, work, _ = measured
    config = Run.open(work / "rotation-1").config()
    assert random_backbone(config).digest == frozen_backbone(work / "rotation-1", random=True).digest
    assert random_backbone(config).digest != frozen_backbone(work / "rotation-0", random=True).digest


def test_the_record_has_a_table(measured):
    record, _, _ = measured
    (table,) = tables("features", [record])
    assert [row[0] for row in table.rows] == [
        "random", "rotation", "simsiam", "baseline mean rgb", "baseline colour histogram",
    ]  # fmt: skip


def test_finished_cells_are_kept_and_a_killed_one_goes_on(measured, monkeypatch):
    record, work, command = measured
    (work / "rotation-0.json").unlink()
    (work / "simsiam-0.json").unlink()
    (work / "simsiam-0" / "metrics.json").unlink()
    real, trained = pretrain.pretrain, []
    monkeypatch.setattr(
        pretrain, "pretrain", lambda *given: trained.append(given[2].folder.name) or real(*given)
    )
    assert run([*command, *ROWS, *SMALL]) == 0
    assert trained == ["simsiam-0"]
    again = json.loads((work.parent / "record.jsonl").read_text().splitlines()[-1])
    for one in (record, again):
        one["figures"]["simsiam"].pop("minutes")
    assert again["figures"] == record["figures"]
    with pytest.raises(ConfigError, match=r"pretrain\.batch"):
        representations.pretrained(pretrain_with(work / "simsiam-0", batch=16), None, work / "simsiam-0")


def test_other_settings_do_not_get_the_figures_that_were_kept(measured, capsys):
    _, work, command = measured
    longer = ["--epochs", "2", *SMALL[2:]]
    assert run([*command, "--method", "rotation", *longer]) == 2
    assert "pretrain.epochs: 1 -> 2" in capsys.readouterr().err
    before = json.loads((work / "random-0.json").read_text())
    larger = [word.replace("size=32", "size=16") for word in SMALL]
    assert run([*command, "--method", "random", *larger]) == 0
    assert json.loads((work / "random-0.json").read_text())["knn"] != before["knn"]


def test_a_resumed_run_has_no_minutes(measured, tmp_path):
    _, work, _ = measured
    shutil.copytree(work / "rotation-1", tmp_path / "run")
    resumed = Run.open(tmp_path / "run")
    assert representations.minutes_of(resumed) == resumed.metrics()["seconds"] / 60
    resumed.log({"kind": "start", "resumed": "step-000000001.safetensors"})
    assert representations.minutes_of(resumed) is None


def test_a_test_split_of_one_group_has_no_interval(tissue, tmp_path, monkeypatch):
    samples = open_samples(tissue)
    samples = replace(samples, groups=["one patient"] * len(samples))
    scores = dict.fromkeys(representations.KINDS, np.zeros((len(samples.where("test")), 9)))
    told = {name: {"balanced_accuracy": {"value": 0.1}} for name in representations.KINDS}
    told |= {"effective_rank": 1.0, "minutes": None, "baselines": {}}
    monkeypatch.setattr(representations, "cell", lambda *given, **more: (told, scores))
    wanted = {"random": 1, "simclr": 1}
    found = representations.measure("x", samples, tmp_path, wanted, lambda *given: load())
    write(tmp_path / "record.jsonl", found)
    assert found["figures"]["simclr"]["k-NN - random"] == {"value": 0.0, "low": None, "high": None}


def pretrain_with(folder, **changed):
    config = Run.open(folder).config()
    return replace(config, pretrain=replace(config.pretrain, **changed))


@pytest.mark.parametrize(
    ("row", "message"),
    [("simlcr", "Did you mean 'simclr'"), ("simclr:x", "METHOD:SEEDS"), ("simclr:0", "METHOD:SEEDS")],
)
def test_a_row_that_cannot_be_says_how_to_write_it(row, message):
    with pytest.raises(ConfigError, match=message):
        representations.asked([row])
