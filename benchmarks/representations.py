"""Question "features": what each method's frozen features are worth, beside random weights and colour alone.

Each cell is a pretraining run in a folder of its own, so a killed benchmark goes on where it stopped.
Features are measured as `noisyssl probe` does: the training split teaches, the test split is measured.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from noisyssl.benchmarks.records import Record, record
from noisyssl.config import Config
from noisyssl.disk import write_whole
from noisyssl.errors import ConfigError, pick
from noisyssl.evaluation import figures, gain
from noisyssl.methods import METHODS
from noisyssl.pipelines import pretrain
from noisyssl.pipelines.embed import frozen_backbone, random_backbone, write_arrays
from noisyssl.pipelines.labels import truth_of
from noisyssl.pipelines.probing import measure as probe
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.setup import device_of
from noisyssl.recipe import tree_of

RANDOM = "random"
"""The row of untrained weights: what pretraining must beat."""
KINDS = {"knn": "k-NN", "linear": "linear probe"}


def asked(rows: Iterable[str]) -> dict[str, int]:
    """Method -> number of seeds, of `METHOD` or `METHOD:SEEDS`; `random` is untrained weights.

    Raises:
        ConfigError: an unknown method, or a number of seeds that is none.
    """
    wanted = {}
    for row in rows:
        name, colon, count = row.partition(":")
        pick({RANDOM: None, **METHODS}, name, "--method")
        if colon and not (count.isdecimal() and int(count) > 0):
            raise ConfigError(f"--method is {row!r}; write METHOD or METHOD:SEEDS, such as {name}:3.")
        wanted[name] = int(count) if colon else 1
    return wanted


def measure(
    name: str,
    samples: Samples,
    work: Path,
    wanted: dict[str, int],
    config_of: Callable[[str, int], Config],
    tell: Callable[[str], None] = lambda line: None,
) -> Record:
    """One record of a data set: per method k-NN and linear probe, rank and minutes, means over its seeds.

    Figures are balanced accuracies with their bootstrap intervals over groups; minutes are those of runs that
    were not interrupted. Where `random` comes first,
    each method's gain over it is measured on the same resamples.

    Args:
        name: of the data set, in the record.
        work: where the runs lie; finished ones are kept.
        wanted: see `asked`.
        config_of: (method, seed) -> the configuration of its run.
        tell: receives a line per finished cell.
    """
    truth, test = truth_of(samples), samples.where("test")
    labels, groups = truth[test], np.array(samples.groups)[test]
    rows: dict[str, dict[str, Any]] = {}
    first: dict[str, np.ndarray] | None = None
    for method, seeds in wanted.items():
        found, scores = [], []
        for seed in range(seeds):
            config = config_of(next(iter(METHODS)) if method == RANDOM else method, seed)
            one = cell(config, samples, work / f"{method}-{seed}", untrained=method == RANDOM)
            found.append(one[0])
            scores.append(one[1])
            tell(f"{method}, seed {seed}: {_line(one[0])}")
        over = {key: np.stack([one[key] for one in scores]) for key in KINDS}
        first = over if method == RANDOM else first
        row: dict[str, Any] = {"seeds": seeds}
        for key, title in KINDS.items():
            row[title] = figures(over[key], labels, groups, samples.classes).to_json()["balanced_accuracy"]
            if first is not None and method != RANDOM:
                more = asdict(gain(over[key], first[key], labels, groups))
                row[f"{title} - random"] = {
                    name: None if math.isnan(value) else value for name, value in more.items()
                }
        row["effective rank"] = float(np.mean([one["effective_rank"] for one in found]))
        minutes = [one["minutes"] for one in found if one["minutes"] is not None]
        row["minutes"] = float(np.mean(minutes)) if minutes else None
        rows[method] = row
    for colour, figure in found[0]["baselines"].items():
        balanced = figure["balanced_accuracy"]
        rows[f"baseline {colour}"] = {
            KINDS["linear"]: {key: balanced[key] for key in ("value", "low", "high")}
        }
    stage = config.pretrain
    settings = {
        "data": name, "modality": config.data.modality, "training images": len(samples.where("train")),
        "test images": len(test), "size": config.data.size, "backbone": config.backbone,
        "epochs": stage.epochs, "batch": stage.batch, "optimizer": stage.optimizer, "lr": stage.lr,
    }  # fmt: skip
    return record("features", settings=settings, figures=rows, n=sum(wanted.values()))


def cell(
    config: Config, samples: Samples, folder: Path, *, untrained: bool = False
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `probe` says of one method and seed with the minutes of its run, and its (N, K) test scores.

    Both are kept beside the run; the figures come last and say that the cell is finished. What was kept of
    other settings or data is measured again; a run of others is refused.
    """
    told, arrays = folder.with_suffix(".json"), folder.with_suffix(".npz")
    asked = hashlib.sha256(json.dumps([tree_of(config), samples.digest()]).encode()).hexdigest()
    if told.is_file():
        found = json.loads(told.read_text(encoding="utf-8"))
        if found.get("asked") == asked:
            with np.load(arrays, allow_pickle=False) as kept:
                return found, {key: kept[key] for key in KINDS}
    minutes = None if untrained else minutes_of(pretrained(config, samples.unlabelled(), folder))
    frozen = random_backbone(config) if untrained else frozen_backbone(folder)
    scores: dict[str, np.ndarray] = {}
    found = probe(frozen, samples, device_of(config.device), config.threads, scores=scores)
    found |= {"minutes": minutes, "asked": asked}
    write_arrays(arrays, scores)
    write_whole(told, json.dumps(found, indent=2) + "\n")
    return found, scores


def pretrained(config: Config, samples: Samples, folder: Path) -> Run:
    """The finished run of `folder`, which is made or gone on with."""
    if folder.exists():
        run = Run.open(folder, "pretrain")
        run.must_match(config)
        run.must_hold(samples)
    else:
        pretrain.must_make_sense(config)
        pretrain.must_be_possible(config, samples)
        run = Run.create(folder, config, "pretrain", samples)
    if not run.is_finished():
        with run.alone():
            pretrain.pretrain(config, samples, run)
    return run


def minutes_of(run: Run) -> float | None:
    """Minutes that a finished run took; None for a resumed one, which has those of its last part only."""
    log = map(json.loads, (run.folder / "log.jsonl").read_text(encoding="utf-8").splitlines())
    if any(entry["kind"] == "start" and entry["resumed"] for entry in log):
        return None
    return run.metrics()["seconds"] / 60


def _line(found: dict[str, Any]) -> str:
    k_nn, linear = (found[name]["balanced_accuracy"]["value"] for name in ("knn", "linear"))
    return f"k-NN {k_nn:.3f}, linear probe {linear:.3f}, effective rank {found['effective_rank']:.1f}"
