"""Stage one: a backbone learns from images alone."""

import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from noisyssl.backbones import build_backbone
from noisyssl.config import Config
from noisyssl.distributed import rank, world
from noisyssl.errors import ConfigError, DataError
from noisyssl.machine import versions
from noisyssl.methods import METHODS
from noisyssl.methods.base import SSLMethod
from noisyssl.pipelines.batch_size import is_open
from noisyssl.pipelines.findings import NO_TRAINING
from noisyssl.pipelines.fit import fit, prepare
from noisyssl.pipelines.loader import open_loader
from noisyssl.pipelines.modality import concerns, stage_views
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.schedule import must_be_shared
from noisyssl.pipelines.setup import device_of, dropped_of, seed_all, settings_must_hold, start_from
from noisyssl.pipelines.speedup import choose_way
from noisyssl.pipelines.watch import Truth, watching
from noisyssl.views import View

Show = Callable[[dict[str, Any]], None]


def pretrain(
    config: Config,
    samples: Samples,
    run: Run,
    *,
    truth: Truth | None = None,
    stopped: Callable[[], int | None] = lambda: None,
) -> dict[str, Any]:
    """Train a backbone by `config.pretrain.method` in `run`, from its newest checkpoint if there is one.

    Only the training split is used; labels are never read. Writes `checkpoints/last.safetensors`
    (the backbone), `metrics.json`; returns the latter. Several processes call this together: each batch is
    shared among them, and the first one writes.

    Args:
        truth: labels that the probe measures features with, see `watch`; the run is the same without them.

    Raises:
        ConfigError: the batch is smaller than the method needs, or larger than the data.
        TrainingError, DataError: see `fit` and `open_loader`.
        Stopped: a signal asked to end; the checkpoint is written.
    """
    stage, began = config.pretrain, time.monotonic()
    must_divide(config)
    device = device_of(config.device)
    torch.set_num_threads(config.threads)
    seed_all(config.seed)
    method, views = scratch(config, samples)
    method.must_accept(stage.batch)  # here too: another number of processes may go on
    if run.is_fresh():
        must_be_possible(config, samples)
        if stage.weights:
            run.log(start_from(method.backbone.trunk, stage.weights))
    state = prepare(method, stage, device)
    resumed = run.restore(state)
    loader = open_loader(
        samples,
        samples.where("train"),
        views,
        batch=stage.batch,
        seed=config.seed,
        device=device,
        kind=config.data.loader,  # type: ignore[arg-type]
        drop_last=True,
        threads=config.threads,
        quarantine=config.data.quarantine,
        rank=rank(),
        world=world(),
    )
    loader.dropped.update(dropped_of(state.facts))
    with closing(loader), watching(config, samples, truth, run, loader.dropped) as watch:
        run.log(
            {
                "kind": "start", "loader": loader.name, "device": str(device), "processes": world(),
                "resumed": str(resumed or ""),
            }
        )  # fmt: skip
        for message in concerns(config, "pretrain", samples) if resumed is None else ():
            run.log({"kind": "warning", "message": message, "time": time.time()})
        if (before := state.facts.get("processes", world())) != world():
            run.log(
                {
                    "kind": "warning", "time": time.time(),
                    "message": f"{before} processes trained this run and {world()} go on: the same images in "
                    "the same order, but sums over them are rounded otherwise.",
                }
            )  # fmt: skip
        state.facts["processes"] = world()
        if resumed is None:
            watch.look(0, state)

        def save() -> None:
            state.facts["dropped"] = {str(index): reason for index, reason in loader.dropped.items()}
            run.save(state)

        def log(entry: dict[str, Any]) -> None:
            if entry["kind"] == "step":
                state.facts["loss"] = entry["loss"]
            run.log(entry)

        if loader.note:
            run.log({"kind": "warning", "message": loader.note, "time": time.time()})
        choose_way(state, loader, stage, device, run.log)

        for epoch in fit(
            state, loader, stage, device=device, predict=_no_logits, log=log, save=save, stopped=stopped
        ):
            run.log({"kind": "epoch", "epoch": epoch, "step": state.step, "loss": state.facts["loss"]})
            watch.look(epoch, state)
        probed = watch.final(state)
    architecture = {"backbone": config.backbone, "stem": config.stem, "size": config.data.size}
    run.save_weights("last", state.trained().backbone, architecture | {"method": stage.method})  # type: ignore[arg-type]
    metrics = {
        "stage": "pretrain",
        "method": stage.method,
        "epochs": stage.epochs,
        "images": len(samples.where("train")),
        "loss": state.facts["loss"],
        "probe": probed,
        "dropped": {samples.paths[i]: reason for i, reason in loader.dropped.items()},
        "seconds": time.monotonic() - began,
        "loader": loader.name,
        "device": str(device),
        "processes": world(),
        "versions": versions(),
    }
    run.write("metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def scratch(config: Config, samples: Samples | None = None) -> tuple[SSLMethod, tuple[View, ...]]:
    """The method with random weights, and the views it sees."""
    kind, backbone = METHODS[config.pretrain.method], build_backbone(config.backbone, config.stem)
    return kind(backbone, config.pretrain.options, config.data.size), stage_views(config, "pretrain")


def must_make_sense(config: Config) -> None:
    """Raises ConfigError or MachineError for what can be refused before any image is opened."""
    stage, kind = config.pretrain, METHODS[config.pretrain.method]
    settings_must_hold(config, stage)
    kind.views(config.data.size)  # refuses a size that its views cannot have
    scratch(config)[0].must_accept(stage.batch)
    must_divide(config)


def must_be_possible(config: Config, samples: Samples) -> None:
    """Raises DataError without training images, ConfigError for what these samples make impossible."""
    stage, images = config.pretrain, len(samples.where("train"))
    if not images:
        raise DataError(f"{config.data.path}: {NO_TRAINING}")
    if stage.batch > images and not is_open(config, stage):
        raise ConfigError(
            f"pretrain.batch is {stage.batch}, but there are only {images} training images; "
            f"set it with --set pretrain.batch={images} or less."
        )


def must_divide(config: Config) -> None:
    """Raises ConfigError if the batch does not fall into parts that suit each process."""
    stage, kind = config.pretrain, METHODS[config.pretrain.method]
    if is_open(config, stage):
        return
    must_be_shared(stage.batch, world(), "pretrain.batch")
    if world() > 1 and not kind.sync_batchnorm and stage.batch < 2 * world():
        raise ConfigError(
            f"pretrain.batch is {stage.batch} over {world()} processes, but {stage.method} normalises within "
            f"each, which takes two images; set pretrain.batch at least {2 * world()}."
        )


def backbone_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The backbone's tensors and architecture (backbone, stem, size, method) of a pretraining run."""
    return Run.open(folder, "pretrain").weights("last")


def _no_logits(indices: Any, module: Any = None) -> Any:
    raise AssertionError("pretraining has no logits")
