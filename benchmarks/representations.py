"""Question "features": what each method's frozen features are worth, beside random weights and colour alone.

Each cell is a pretraining run in a folder of its own, so a killed benchmark goes on where it stopped.
Features are measured as `noisyssl probe` does: the training split teaches, the test split is measured.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from noisyssl.benchmarks.records import Record, record
from noisyssl.config import Config
from noisyssl.disk import write_whole
from noisyssl.errors import ConfigError, pick
from noisyssl.methods import METHODS
from noisyssl.pipelines import pretrain
from noisyssl.pipelines.embed import frozen_backbone, random_backbone
from noisyssl.pipelines.probing import measure as probe
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.setup import device_of

RANDOM = "random"
"""The row of untrained weights: what pretraining must beat."""


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
    """One record of a data set: per method k-NN and linear probe over its seeds, rank and minutes.

    Args:
        name: of the data set, in the record.
        work: where the runs lie; finished ones are kept.
        wanted: see `asked`.
        config_of: (method, seed) -> the configuration of its run.
        tell: receives a line per finished cell.
    """
    figures: dict[str, dict[str, Any]] = {}
    baselines: dict[str, Any] = {}
    for method, seeds in wanted.items():
        found = []
        for seed in range(seeds):
            config = config_of(next(iter(METHODS)) if method == RANDOM else method, seed)
            found.append(cell(config, samples, work / f"{method}-{seed}", untrained=method == RANDOM))
            tell(f"{method}, seed {seed}: {_line(found[-1])}")
        figures[method] = _row(found)
        baselines = found[0]["baselines"]
    for colour, figure in baselines.items():
        figures[f"baseline {colour}"] = {"linear probe": _interval([figure])}
    stage = config.pretrain
    settings = {
        "data": name, "modality": config.data.modality, "training images": len(samples.where("train")),
        "test images": len(samples.where("test")), "size": config.data.size, "backbone": config.backbone,
        "epochs": stage.epochs, "batch": stage.batch, "optimizer": stage.optimizer, "lr": stage.lr,
    }  # fmt: skip
    return record("features", settings=settings, figures=figures, n=sum(wanted.values()))


def cell(config: Config, samples: Samples, folder: Path, *, untrained: bool = False) -> dict[str, Any]:
    """What `probe` says of one method and seed, with the minutes of its run; kept beside the run."""
    kept = folder.with_suffix(".json")
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    minutes = (
        None if untrained else pretrained(config, samples.unlabelled(), folder).metrics()["seconds"] / 60
    )
    frozen = random_backbone(config) if untrained else frozen_backbone(folder)
    found = probe(frozen, samples, device_of(config.device), config.threads) | {"minutes": minutes}
    write_whole(kept, json.dumps(found, indent=2) + "\n")
    return found


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


def _row(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "seeds": len(found),
        "k-NN": _interval([one["knn"] for one in found]),
        "linear probe": _interval([one["linear"] for one in found]),
        "effective rank": float(np.mean([one["effective_rank"] for one in found])),
        "minutes": None if found[0]["minutes"] is None else float(np.mean([one["minutes"] for one in found])),
    }


def _interval(figures: list[dict[str, Any]]) -> dict[str, float]:
    """Balanced accuracy: the mean over seeds, from the lowest to the highest of their 95 % intervals."""
    each = [one["balanced_accuracy"] for one in figures]
    low, high = min(one["low"] for one in each), max(one["high"] for one in each)
    return {"value": float(np.mean([one["value"] for one in each])), "low": low, "high": high}


def _line(found: dict[str, Any]) -> str:
    k_nn, linear = (found[name]["balanced_accuracy"]["value"] for name in ("knn", "linear"))
    return f"k-NN {k_nn:.3f}, linear probe {linear:.3f}, effective rank {found['effective_rank']:.1f}"
