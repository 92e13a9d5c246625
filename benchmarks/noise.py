"""Question: which pretraining and objective keep their accuracy under which label noise?

Each cell of a grid is a run folder below `cells/`, each pretraining one below `pretrain/`. What is finished
is never trained again, what was stopped goes on from its checkpoint, and a cell that fails is listed and does
not end the others: only what would fail them all does, such as a full disk.
"""

import json
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from noisyssl.benchmarks.noise_grid import RANDOM, Cell, Grid
from noisyssl.config import Config
from noisyssl.disk import write_whole
from noisyssl.errors import DataError, ExportError, MachineError, NoisySSLError, Stopped
from noisyssl.pipelines import pretrain, train
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.scan import open_samples
from noisyssl.pipelines.setup import threads_of

Stop = Callable[[], int | None]
Export = Callable[[Path, Path, tuple[str, ...]], dict[str, Any]]
"""A finished run, the bundle to write and its precisions -> the bundle's manifest as JSON values."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a grid's runs lie."""

    folder: Path

    def cell(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def start(self, cell: Cell) -> Path | None:
        """The pretraining run of a cell; None for random weights."""
        if cell.pretraining == RANDOM:
            return None
        return self.folder / "pretrain" / f"{cell.pretraining}-seed{cell.seed}"

    def bundle(self, cell: Cell) -> Path:
        return self.folder / "bundles" / cell.name

    def served(self, cell: Cell) -> Path:
        """What the bundle of a cell says of itself, or why there is none."""
        return self.folder / "bundles" / f"{cell.name}.json"

    def failure(self, cell: Cell) -> Path:
        return self.folder / "failed" / f"{cell.name}.json"


def opened(config: Config) -> Samples:
    """The samples of a grid, as its `data` settings say; the scan is cached."""
    data = config.data
    return open_samples(
        data.path, seed=data.split_seed, quarantine=data.quarantine, allow_leaks=data.allow_leaks,
        labelled=True, threads=config.threads,
    )  # fmt: skip


def must_agree(grid: Grid, place: Place, samples: Samples) -> None:
    """Raises ConfigError or DataError if runs of other settings or data lie in this folder."""
    for cell in grid.cells:
        start = place.start(cell)
        for folder, stage in ((place.cell(cell), "train"), (start, "pretrain")):
            if folder is not None and (folder / "run.json").is_file():
                run = Run.open(folder, stage)
                run.must_match(settled(grid.config(cell, start)))
                run.must_hold(samples if stage == "train" else samples.unlabelled())


def settled(config: Config) -> Config:
    """With the automatic numbers filled in."""
    return replace(config, threads=threads_of(config.threads))


def run_all(
    grid: Grid, place: Place, samples: Samples, say: Callable[[str], None], stopped: Stop = lambda: None
) -> None:
    """Train every cell that is not finished, one after the other.

    Raises:
        Stopped: a signal came; the run that it met has its checkpoint.
        MachineError: what would fail every cell: a full disk, a missing device.
    """
    for number, cell in enumerate(grid.cells, start=1):
        told = f"[{number}/{len(grid.cells)}] {cell.name}"
        if (place.cell(cell) / "metrics.json").is_file():
            continue
        if signal := stopped():
            raise Stopped(signal)
        say(f"{told} ...")
        say(f"{told}: {run_cell(grid, place, cell, samples, stopped)}")
    if signal := stopped():
        raise Stopped(signal)


def run_cell(grid: Grid, place: Place, cell: Cell, samples: Samples, stopped: Stop = lambda: None) -> str:
    """Train a cell, after its pretraining where that is not finished; what to say of it."""
    try:
        start = place.start(cell)
        config = settled(grid.config(cell, start))
        if start is not None:
            stage(pretrain, config, samples.unlabelled(), start, stopped)
        metrics = stage(train, config, samples, place.cell(cell), stopped)
    except (Stopped, MachineError, KeyboardInterrupt):
        raise
    except Exception as error:
        message = (
            str(error) if isinstance(error, NoisySSLError) else "".join(traceback.format_exception(error))
        )
        return failed(place, cell, message)
    place.failure(cell).unlink(missing_ok=True)
    best, last = (metrics[key]["figures"]["balanced_accuracy"]["value"] for key in ("best", "last"))
    return f"BEST {best:.3f}, LAST {last:.3f}, {metrics['seconds']:.0f} s"


def failed(place: Place, cell: Cell, message: str) -> str:
    """Keep what went wrong for the report; what to say of it."""
    write_whole(place.failure(cell), json.dumps({"cell": cell.name, "error": message}) + "\n")
    return f"failed: {message.strip().splitlines()[-1]}"


def stage(
    module: Any, config: Config, samples: Samples, folder: Path, stopped: Stop = lambda: None
) -> dict[str, Any]:
    """The metrics of one run, finished before, resumed or begun."""
    name = module.__name__.rpartition(".")[2]
    if (folder / "run.json").is_file():
        run = Run.open(folder, name)
    else:
        module.must_make_sense(config)
        module.must_be_possible(config, samples)
        run = Run.create(folder, config, name, samples)
    if not run.is_finished():
        with run.alone():
            getattr(module, name)(config, samples, run, stopped=stopped)
    return run.metrics()


def export_all(grid: Grid, place: Place, export: Export, say: Callable[[str], None]) -> list[str]:
    """Bundles of the trained cells that the grid exports; what was refused, in words.

    The report shows what was refused, and the same command tries it again.
    """
    refused = []
    for cell in grid.exported:
        kept = place.served(cell)
        known = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {"error": ""}
        if "error" not in known or not (place.cell(cell) / "metrics.json").is_file():
            continue
        say(f"exporting {cell.name} ...")
        shutil.rmtree(place.bundle(cell), ignore_errors=True)  # of a run that was killed before it said so
        try:
            found = export(place.cell(cell), place.bundle(cell), grid.precisions)
        except (ExportError, DataError) as error:
            found = {"error": str(error)}
            refused.append(f"{cell.name}: {error}")
        write_whole(kept, json.dumps(found) + "\n")
    return refused


def failures(grid: Grid, place: Place) -> dict[str, str]:
    """What went wrong, by the name of the cell."""
    return {
        cell.name: json.loads(place.failure(cell).read_text(encoding="utf-8"))["error"]
        for cell in grid.cells
        if place.failure(cell).is_file() and not (place.cell(cell) / "metrics.json").is_file()
    }
