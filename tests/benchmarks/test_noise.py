"""A small grid, from its cells to its pages: kills, failures, what is kept and what is counted."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from noisyssl.benchmarks import noise as cells
from noisyssl.benchmarks import noise_page
from noisyssl.benchmarks.noise_grid import read_grid
from noisyssl.benchmarks.noise_summary import cell_rows
from noisyssl.cli import run
from noisyssl.errors import ExportError

GRID = """
recipe = "small"
seeds = [0, 1]
[settings]
backbone = "resnet18-w16"
threads = 1
[settings.data]
size = 32
[settings.pretrain]
epochs = 1
batch = 64
probe_every = 0
[settings.train]
epochs = 2
checkpoint_minutes = 0.0001
[[grid]]
pretraining = ["random", "simclr"]
objective = ["ce", "frozen"]
noise = ["symmetric"]
rate = [0.4]
"""


@pytest.fixture(scope="module")
def grid_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("grid") / "mine.toml"
    path.write_text(GRID)
    return path


@pytest.fixture(scope="module")
def whole(grid_file, tissue, tmp_path_factory):
    """The grid, finished undisturbed."""
    work = tmp_path_factory.mktemp("whole")
    assert bench(grid_file, tissue, work, "--out", str(work / "records.jsonl")) == 0
    return work


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two cells of one seed from random weights."""
    path = tmp_path_factory.mktemp("grid") / "two.toml"
    path.write_text(GRID.replace("[0, 1]", "[0]").replace('"random", "simclr"', '"random"'))
    return path


def bench(grid, data, work, *more: str) -> int:
    return run(["bench", "noise", str(grid), "--data", str(data), "--work", str(work), *more])


def figures_of(work) -> list[dict]:
    with (work / "cells.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def test_each_cell_has_its_row_and_seeds_its_own_flips(whole):
    rows = figures_of(whole)
    assert len(rows) == 8
    flips = {row["name"]: (whole / "cells" / row["name"] / "noise.csv").read_text() for row in rows}
    by_seed = {row["seed"]: {flips[r["name"]] for r in rows if r["seed"] == row["seed"]} for row in rows}
    assert [len(found) for found in by_seed.values()] == [
        1,
        1,
    ]  # every cell of a seed trains on the same labels
    assert by_seed["0"] != by_seed["1"]


def test_the_summary_is_the_mean_over_seeds_and_the_gain_the_difference_of_means(whole):
    record = json.loads((whole / "records.jsonl").read_text())
    rows = figures_of(whole)

    def mean(objective: str, start: str) -> float:
        own = [r for r in rows if (r["objective"], r["pretraining"]) == (objective, start)]
        return float(np.mean([float(r["last_balanced_accuracy"]) for r in own]))

    found = record["figures"]["symmetric:0.4, ce, simclr"]
    assert found["LAST"] == pytest.approx(mean("ce", "simclr"))
    assert found["LAST - random"]["value"] == pytest.approx(mean("ce", "simclr") - mean("ce", "random"))
    assert found["LAST - random"]["low"] <= found["LAST - random"]["value"] <= found["LAST - random"]["high"]
    assert found["LAST - ce"] is None
    frozen = record["figures"]["symmetric:0.4, frozen, random"]
    assert frozen["LAST - ce"]["value"] == pytest.approx(mean("frozen", "random") - mean("ce", "random"))
    assert frozen["LAST - random"] is None
    assert record["n"] == 8
    assert {"symmetric:0.4, baseline mean rgb", "symmetric:0.4, baseline colour histogram"} <= record[
        "figures"
    ].keys()


def test_the_pages_say_it_all(whole):
    html, text = (whole / "report.html").read_text(), (whole / "report.md").read_text()
    for one in ("LAST", "simclr", "frozen", "colour histogram", "8 of 8"):
        assert one in html
        assert one in text
    assert "<script" not in html


def test_again_it_trains_nothing(whole, grid_file, tissue, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("cells/*/metrics.json")}
    assert bench(grid_file, tissue, whole) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_settings_in_the_same_folder_are_refused(whole, grid_file, tissue, tmp_path, capsys):
    other = tmp_path / "mine.toml"
    other.write_text(GRID.replace("epochs = 2", "epochs = 4"))
    assert bench(other, tissue, whole) == 2
    assert "epochs" in capsys.readouterr().err


def killed_grid(grid_file, tissue, work, kills: int, seed: int) -> None:
    """Run the grid in processes of its own, kill so many at random moments, then let one finish."""
    generator = random.Random(seed)
    command = [sys.executable, "-m", "noisyssl.cli", "bench", "noise", str(grid_file)]
    command += ["--data", str(tissue), "--work", str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = 0
    while done < kills:
        before = sum(1 for _ in work.rglob("*"))
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while process.poll() is None and sum(1 for _ in work.rglob("*")) == before:
            time.sleep(0.02)  # it has begun to write
        time.sleep(generator.uniform(0, 1.5))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            done += 1
        process.wait()
        if (work / "report.html").exists():
            break
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == 0


@pytest.mark.slow
def test_killed_five_times_it_ends_on_the_same_cells_and_figures(whole, grid_file, tissue, tmp_path):
    killed_grid(grid_file, tissue, tmp_path / "work", kills=5, seed=3)
    assert figures_of(tmp_path / "work") == figures_of(whole)


@pytest.mark.slow
def test_stopped_in_a_cell_it_goes_on_there(whole, grid_file, tissue, tmp_path, monkeypatch):
    from noisyssl.pipelines.run import Run

    saves, real, begun = [], Run.save, []

    def save(self, state):
        real(self, state)
        saves.append(self.folder.name)
        if len(saves) == 7:
            raise KeyboardInterrupt

    def create(folder, *arguments):
        begun.append(folder.name)
        return made(folder, *arguments)

    made = Run.create
    monkeypatch.setattr(Run, "save", save)
    monkeypatch.setattr(Run, "create", create)
    assert bench(grid_file, tissue, tmp_path) == 130
    assert bench(grid_file, tissue, tmp_path) == 0
    assert len(begun) == len(set(begun)) == 10  # eight cells and two pretrainings, each begun once
    assert figures_of(tmp_path) == figures_of(whole)


def test_a_cell_that_fails_is_listed_and_ends_no_other(two, tissue, tmp_path, monkeypatch, capsys):
    from noisyssl.errors import TrainingError
    from noisyssl.pipelines import train

    real = train.train

    def fails_once(config, samples, run, **more):
        if config.train.tune == "all":
            raise TrainingError("loss is nan at step 3; lower train.lr.")
        return real(config, samples, run, **more)

    monkeypatch.setattr(train, "train", fails_once)
    assert bench(two, tissue, tmp_path) == 3
    said = capsys.readouterr().err
    assert "1 of 2 cells failed" in said
    assert "lower train.lr" in said
    assert len(figures_of(tmp_path)) == 1
    assert "loss is nan at step 3" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr(train, "train", real)
    assert bench(two, tissue, tmp_path) == 0
    assert len(figures_of(tmp_path)) == 2
    assert "loss is nan" not in (tmp_path / "report.html").read_text()


def test_each_rate_is_exported_by_itself_and_what_is_refused_is_tried_again(whole, grid_file, tmp_path):
    """The names of two cells differ behind the dot of the rate only; neither run is opened here."""
    text = grid_file.read_text().replace("rate = [0.4]", "rate = [0.2, 0.4]")
    (tmp_path / "rates.toml").write_text(text + '[export]\nobjective = ["ce"]\npretraining = ["random"]\n')
    grid, place = read_grid(str(tmp_path / "rates.toml")), cells.Place(folder=tmp_path)
    assert len(grid.exported) == 2
    for cell in grid.exported:
        place.cell(cell).mkdir(parents=True)
        (place.cell(cell) / "metrics.json").touch()
    refuses, asked = [True], []

    def export(run, bundle, precisions):
        asked.append(run.name)
        if "0.4" in run.name and refuses:
            raise ExportError("a logit differs by 1; export again.")
        return {"of": run.name}

    refused = cells.export_all(grid, place, export, lambda text: None)
    assert [one.partition(":")[0] for one in refused] == ["random-ce-symmetric-0.4-seed0"]
    refuses.clear()
    assert cells.export_all(grid, place, export, lambda text: None) == []
    assert asked == [*(cell.name for cell in grid.exported), "random-ce-symmetric-0.4-seed0"]
    for cell in grid.exported:
        assert json.loads(place.served(cell).read_text()) == {"of": cell.name}


def test_two_noises_of_one_kind_and_rate_are_two_plots():
    def row(noise: str, last: float) -> dict:
        return {
            "noise": noise, "objective": "ce", "pretraining": "random",
            "last_balanced_accuracy": {"mean": last, "sd": 0.01, "values": [last]},
        }  # fmt: skip

    rows = [row("none", 0.9), row("instance:0.3", 0.8), row("instance:0.3:runs/a", 0.7)]
    assert [title for title, _ in noise_page.curves(rows)] == [
        "LAST under instance noise", "LAST under instance:runs/a noise",
    ]  # fmt: skip


def test_a_gain_without_an_interval_is_a_number_alone():
    assert noise_page.gain({"value": 0.05, "low": None, "high": None, "seeds": 1}) == "+0.050"
    assert noise_page.gain(None) == "-"


def test_a_full_disk_ends_the_grid_and_loses_nothing(two, tissue, tmp_path, monkeypatch, capsys):
    from noisyssl.errors import MachineError
    from noisyssl.pipelines import train

    real, calls = train.train, []

    def full(config, samples, run, **more):
        calls.append(run.folder.name)
        if len(calls) == 2:
            raise MachineError(f"{run.folder} cannot be written: the disk is full; free space.")
        return real(config, samples, run, **more)

    monkeypatch.setattr(train, "train", full)
    assert bench(two, tissue, tmp_path) == 7
    assert "the disk is full" in capsys.readouterr().err
    assert len(calls) == 2
    assert len(list(tmp_path.glob("cells/*/metrics.json"))) == 1


@pytest.mark.slow
def test_a_ray_cluster_of_two_workers_gives_the_same_figures(whole, grid_file, tissue, tmp_path):
    pytest.importorskip("ray", reason="needs noisyssl[ray]")
    assert bench(grid_file, tissue, tmp_path, "--on", "ray") == 0
    assert figures_of(tmp_path) == figures_of(whole)
    grid = read_grid(str(grid_file))
    assert len(cell_rows(grid, cells.Place(folder=tmp_path))) == 8


@pytest.mark.parametrize("on", ["ray://127.0.0.1:1", "rays", "http://here"])
def test_a_cluster_that_is_none_is_one_line(grid_file, tissue, tmp_path, capsys, on):
    pytest.importorskip("ray", reason="needs noisyssl[ray]")
    code = bench(grid_file, tissue, tmp_path, "--on", on)
    assert code == (7 if on.startswith("ray://") else 2)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert "ray" in said
