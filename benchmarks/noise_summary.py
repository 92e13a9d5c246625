"""What the finished cells of a noise grid say: mean and spread over seeds, paired gains with intervals."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from noisyssl.benchmarks.noise import Place
from noisyssl.benchmarks.noise_grid import RANDOM, Cell, Grid
from noisyssl.gains import paired_gain
from noisyssl.pipelines.labels import truth_of
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.samples import Samples

Row = dict[str, Any]
PLAIN = "ce"
"""The objective that the others are compared with."""
FIGURES = ("balanced_accuracy", "accuracy", "macro_auroc", "calibration_error")


def cell_rows(grid: Grid, place: Place) -> list[Row]:
    """One row for each finished cell: what it is, and its figures."""
    return [_cell_row(cell, Run.open(place.cell(cell), "train").metrics()) for cell in finished(grid, place)]


def finished(grid: Grid, place: Place) -> list[Cell]:
    """The cells that have figures."""
    return [cell for cell in grid.cells if (place.cell(cell) / "metrics.json").is_file()]


def _cell_row(cell: Cell, metrics: Row) -> Row:
    row: Row = {**asdict(cell), "name": cell.name, "realised": metrics["noise"]["realised"]}
    choices = metrics.get("choices") or {"validation": metrics["best"]}  # 0.1.0 knew one rule
    for which, found in (("best", choices["validation"]), ("last", metrics["last"])):
        for name in FIGURES:
            row[f"{which}_{name}"] = found["figures"][name]["value"]
    row["best_epoch"] = choices["validation"]["epoch"]
    stable = choices.get("stability")
    row["stable_epoch"] = stable and stable["epoch"]
    row["stable_balanced_accuracy"] = stable and stable["figures"]["balanced_accuracy"]["value"]
    for name, figures in metrics["baselines"].items():
        row[f"baseline_{name}"] = figures["balanced_accuracy"]["value"]
    told = metrics["objective_facts"]
    row["estimated_rate"] = None if told.get("oracle") else told.get("noise_rate")
    row["oracle"] = bool(told.get("oracle"))
    row["seconds"] = metrics["seconds"]
    return row


def summary(grid: Grid, place: Place, samples: Samples) -> list[Row]:
    """One row for each pretraining, objective and noise: means and standard deviations over its seeds.

    `gain_start` is LAST minus that of random weights, `gain_objective` LAST minus that of cross-entropy, over
    the seeds that both sides share: {"value", "low", "high", "seeds"}, or None where there is no other side.
    """
    rows = cell_rows(grid, place)
    last = {cell: logits_of_last(place, cell, samples) for cell in finished(grid, place)}
    kinds = dict.fromkeys(_kind(row) for row in rows)
    out = []
    for noise, objective, start in kinds:
        own = [row for row in rows if _kind(row) == (noise, objective, start)]
        entry: Row = {"noise": noise, "objective": objective, "pretraining": start, "seeds": len(own)}
        for key in ("realised", "seconds"):
            entry[key] = statistics.mean(row[key] for row in own)
        for key in own[0]:
            values = [row.get(key) for row in own]
            if key.endswith(FIGURES) or key.startswith("baseline_"):
                entry[key] = spread_of(values)
        entry["gain_start"] = entry["gain_objective"] = None
        if start != RANDOM:
            entry["gain_start"] = _gain(last, samples, (noise, objective, start), (noise, objective, RANDOM))
        if objective != PLAIN:
            entry["gain_objective"] = _gain(last, samples, (noise, objective, start), (noise, PLAIN, start))
        out.append(entry)
    return out


def _kind(row: Row) -> tuple[str, str, str]:
    return row["noise"], row["objective"], row["pretraining"]


def spread_of(values: Sequence[float | None]) -> Row | None:
    """Mean and standard deviation (None of a single value); None if one is missing."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return None
    return {
        "mean": statistics.mean(known),
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "values": known,
    }


Logits = tuple[np.ndarray, np.ndarray]
"""(E, N, K) logits of LAST's epochs, and the (N,) rows of samples that they belong to."""


def logits_of_last(place: Place, cell: Cell, samples: Samples) -> Logits:
    """What LAST was measured on."""
    folder = place.cell(cell)
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    with np.load(folder / "predictions.npz", allow_pickle=False) as kept:
        rows = kept["index"]
    where = np.searchsorted(samples.where("test"), rows)
    epochs = [
        np.load(folder / f"logits/test-{epoch:04}.npy", allow_pickle=False)[where]
        for epoch in metrics["last"]["epochs"]
    ]
    return np.stack(epochs), rows


def _gain(
    last: dict[Cell, Logits], samples: Samples, ours: tuple[str, str, str], theirs: tuple[str, str, str]
) -> Row | None:
    sides = [
        {
            cell.seed: found
            for cell, found in last.items()
            if (cell.noise, cell.objective, cell.pretraining) == key
        }
        for key in (ours, theirs)
    ]
    shared = sorted(sides[0].keys() & sides[1].keys())
    if not shared:
        return None
    rows = sides[0][shared[0]][1]
    every = [side[seed] for side in sides for seed in shared]
    for _, own in every[1:]:
        rows = np.intersect1d(rows, own)  # a file that broke later is missing in some
    first, second = ([side[seed][0][:, np.isin(side[seed][1], rows)] for seed in shared] for side in sides)
    labels, groups = truth_of(samples)[rows], [samples.groups[row] for row in rows]
    found = paired_gain(first, second, labels, groups)
    low, high = (None if math.isnan(end) else end for end in (found.low, found.high))
    return {"value": found.value, "low": low, "high": high, "seeds": len(shared)}
