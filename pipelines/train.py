"""Stage two: a classifier learns from labels some of which are wrong."""

import io
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from noisyssl import checkpoint
from noisyssl.classifier import Classifier, build_classifier
from noisyssl.config import Config, TrainConfig
from noisyssl.errors import ConfigError, DataError
from noisyssl.evaluation import figures
from noisyssl.machine import versions
from noisyssl.noise import parse
from noisyssl.objective import Given, Objective
from noisyssl.objectives import build_objective
from noisyssl.pipelines import after
from noisyssl.pipelines.baselines import baseline_logits
from noisyssl.pipelines.choosing import Choices
from noisyssl.pipelines.evaluate import Looks, brief, evaluation_images, logits_of, whole
from noisyssl.pipelines.fit import fit, prepare
from noisyssl.pipelines.kept import LAST, Kept
from noisyssl.pipelines.labels import noise_must_fit, noisy_labels, truth_of
from noisyssl.pipelines.loader import open_loader
from noisyssl.pipelines.modality import concerns, stage_views
from noisyssl.pipelines.pretrain import backbone_of
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.setup import (
    device_of,
    dropped_of,
    seed_all,
    seen_by,
    settings_must_hold,
    start_from,
)
from noisyssl.pipelines.speedup import choose_way
from noisyssl.pipelines.tuning import head_epochs, hold
from noisyssl.views import View


def train(
    config: Config, samples: Samples, run: Run, *, stopped: Callable[[], int | None] = lambda: None
) -> dict[str, Any]:
    """Fine-tune a classifier in `run`, from its newest checkpoint if there is one.

    Writes `noise.csv`, `checkpoints/best|last.safetensors`, `predictions.npz` (test split, BEST) and
    `metrics.json`; returns the latter. BEST is chosen on validation labels, never on the test split.

    Raises:
        DataError: no labels, one class only, or a class that training lacks.
        ConfigError, TrainingError: see `fit` and `open_loader`.
        Stopped: a signal asked to end; the checkpoint is written.
    """
    stage, began = config.train, time.monotonic()
    device = device_of(config.device)
    torch.set_num_threads(config.threads)
    seed_all(config.seed)
    network = build_classifier(config.backbone, config.stem, len(samples.classes))
    pretraining = None
    if run.is_fresh():
        must_make_sense(config)
        must_be_possible(config, samples)
        if stage.weights:
            run.log(start_from(network.backbone.trunk, stage.weights))
        if stage.init:
            pretraining = initialise(network, Path(stage.init), config)
            for warning in seen_by(Path(stage.init), samples):
                run.log(warning)
    labels, noise = noisy_labels(config, samples, run)
    val, test = samples.where("val"), samples.where("test")
    truth = truth_of(samples)

    def another() -> Classifier:
        other = build_classifier(config.backbone, config.stem, len(samples.classes))
        if run.is_fresh() and stage.weights:
            start_from(other.backbone.trunk, stage.weights)
        if run.is_fresh() and stage.init:
            initialise(other, Path(stage.init), config)
        return other

    given = Given(
        count=len(samples), train=samples.where("train"), classes=len(samples.classes), labels=labels,
        epochs=stage.epochs, another=another,
    )  # fmt: skip
    objective = build_objective(stage.objective, network, stage.options, given)
    held = head_epochs(stage.tune, stage.epochs)
    hold(objective, held == stage.epochs)  # the optimizer gets what learns at any time
    state = prepare(objective, stage, device)
    resumed = run.restore(state)
    hold(state.objective, state.epoch < held)
    state.facts.setdefault("pretraining", pretraining)
    earlier = state.facts.get("seconds", 0.0)
    loader = open_loader(
        samples,
        samples.where("train"),
        stage_views(config, "train") * state.objective.copies,
        batch=stage.batch,
        seed=config.seed,
        device=device,
        kind=config.data.loader,  # type: ignore[arg-type]
        threads=config.threads,
        quarantine=config.data.quarantine,
        labels=torch.from_numpy(labels),
    )
    dropped = dropped_of(state.facts)
    broken = dropped if config.data.quarantine else None
    geometry = (config.data.size, config.data.fit, config.threads, run.folder, broken)
    with (
        evaluation_images(samples, val, *geometry) as val_images,
        evaluation_images(samples, test, *geometry) as test_images,
        Looks(samples, *geometry) as looks,
    ):
        try:
            loader.dropped.update(dropped)
            run.log(
                {"kind": "start", "loader": loader.name, "device": str(device), "resumed": str(resumed or "")}
            )
            for message in concerns(config, "train", samples) if resumed is None else ():
                run.log({"kind": "warning", "message": message, "time": time.time()})
            if loader.note:
                run.log({"kind": "warning", "message": loader.note, "time": time.time()})
            choose_way(state, loader, stage, device, run.log)
            kept = Kept(run, stage.epochs)
            choices = Choices(stage.choice, state.facts, kept)

            def save() -> None:
                state.facts["seconds"] = earlier + time.monotonic() - began
                dropped.update(loader.dropped)
                state.facts["dropped"] = {str(index): reason for index, reason in dropped.items()}
                run.save(state)
                if taken := choices.epochs():  # only now: a kill before the save starts from the old best
                    kept.drop_all_but(taken.values())

            def predict(indices: np.ndarray, module: torch.nn.Module | None = None) -> np.ndarray:
                asked = module or state.trained().classifier()  # type: ignore[operator]
                return looks.logits(asked, indices, device)

            for epoch in fit(
                state, loader, stage, device=device, predict=predict, log=run.log, save=save, stopped=stopped
            ):
                hold(state.objective, epoch < held)
                module = state.trained().classifier()  # type: ignore[operator]
                entry: dict[str, Any] = {"kind": "epoch", "epoch": epoch, "step": state.step, "test": None}
                entry["val"] = brief(
                    logits_of(module, val_images, device), labels, val, dropped, samples.classes
                )
                score = entry["val"]["balanced_accuracy"]
                better = choices.look(epoch, score, lambda: predict(given.train).argmax(axis=1))
                if better or epoch > stage.epochs - LAST:
                    logits = logits_of(module, test_images, device)
                    kept.put(epoch, logits)
                    entry["test"] = brief(logits, truth, test, dropped, samples.classes)
                if better:
                    kept.put_weights(epoch, module)
                run.log(entry)
        finally:
            loader.close()
        best_epoch = choices.best()
        run.save_weights("last", state.trained().classifier(), {"epoch": stage.epochs})  # type: ignore[operator]
        checkpoint.save(run.checkpoints / "best.safetensors", *kept.weights(best_epoch))
        best = build_classifier(config.backbone, config.stem, len(samples.classes)).to(device)
        best.load_state_dict(kept.weights(best_epoch)[0])
        val_logits = logits_of(best, val_images, device)
        final_val_logits = logits_of(state.trained().classifier(), val_images, device)  # type: ignore[operator]
        dropped.update(loader.dropped)
        baselines = baseline_logits(samples, labels, test_images, config, dropped)
    last = kept.last()
    seen = whole(test, dropped)
    groups = [samples.groups[i] for i in test[seen]]

    def measured(logits: np.ndarray) -> dict[str, Any]:
        return figures(logits[..., seen, :], truth[test[seen]], groups, samples.classes).to_json()

    held_out, rows = whole(val, dropped), val[whole(val, dropped)]
    known = rows[labels[rows] >= 0]
    unchecked = noise["spec"] == "none" and samples.true_labels is None
    wrong = None if unchecked or not len(known) else float((labels[known] != truth[known]).mean())
    kept_logits = after.Logits(
        val_labels=labels[rows], val_best=val_logits[held_out], val_final=final_val_logits[held_out],
        test_labels=truth[test[seen]], test_best=kept.get(best_epoch)[seen],
        test_final=kept.get(stage.epochs)[seen],
    )  # fmt: skip
    run.write(after.FILE, kept_logits.to_bytes())

    metrics = {
        "stage": "train",
        "objective": stage.objective,
        "objective_facts": state.objective.facts(),
        "classes": list(samples.classes),
        "best": {
            "epoch": best_epoch,
            "chosen_on": chosen_on(stage),
            "figures": measured(kept.get(best_epoch)),
            "calibration": after.fitted(kept_logits, "best", noise, wrong),
        },
        "choices": {
            name: {"epoch": epoch, "figures": measured(kept.get(epoch))}
            for name, epoch in choices.epochs().items()
        },
        "last": {"epochs": list(last), "figures": measured(np.stack([kept.get(e) for e in last]))},
        "final": {
            "epoch": stage.epochs,
            "figures": measured(kept.get(stage.epochs)),
            "calibration": after.fitted(kept_logits, "final", noise, wrong),
        },
        "baselines": {name: measured(logits) for name, logits in baselines.items()},
        "noise": noise,
        "init": stage.init or None,
        "pretraining": state.facts["pretraining"],
        "images": {split: len(samples.where(split)) for split in ("train", "val", "test")},
        "dropped": {samples.paths[i]: reason for i, reason in dropped.items()},
        "seconds": earlier + time.monotonic() - began,
        "loader": loader.name,
        "device": str(device),
        "versions": versions(),
    }
    buffer = io.BytesIO()
    np.savez(buffer, logits=kept.get(best_epoch)[seen], labels=truth[test[seen]], index=test[seen])
    run.write("predictions.npz", buffer.getvalue())
    run.write("metrics.json", json.dumps(metrics, indent=2) + "\n")
    return metrics


def scratch(config: Config, samples: Samples) -> tuple[Objective, tuple[View, ...]]:
    """An objective like the one that is trained, with random weights and labels as they are; its views."""
    stage, classes = config.train, len(samples.classes)
    network = partial(build_classifier, config.backbone, config.stem, classes)
    given = Given(
        count=len(samples), train=samples.where("train"), classes=classes, labels=samples.labels,
        epochs=stage.epochs, another=network,
    )  # fmt: skip
    objective = build_objective(stage.objective, network(), stage.options, given)
    hold(objective, stage.tune == "head")
    return objective, stage_views(config, "train") * objective.copies


def chosen_on(stage: TrainConfig) -> str:
    """What BEST is chosen by, in words."""
    if stage.choice == "stability":
        return "fewest changes of predictions on training images"
    return f"{stage.val_labels} validation balanced accuracy"


def must_make_sense(config: Config) -> None:
    """Raises ConfigError or MachineError for what can be refused before any image is opened."""
    parse(config.train.noise)
    settings_must_hold(config, config.train)
    if config.train.init:
        initialise(build_classifier(config.backbone, config.stem, 2), Path(config.train.init), config)


def must_be_possible(config: Config, samples: Samples) -> None:
    """Raises DataError for samples without labels, classes or splits; ConfigError for noise that fits not."""
    source = config.data.path
    if not samples.classes or (samples.labels[samples.where("train")] < 0).all():
        unread = "".join(f" {note}" for note in samples.notes if " not read: " in note)
        raise DataError(
            f"{source} has no labels; `noisyssl train` needs class folders or a label column.{unread}"
        )
    counts = np.bincount(samples.labels[samples.where("train")], minlength=len(samples.classes))
    if (counts > 0).sum() < 2:
        only = samples.classes[int(counts.argmax())]
        raise DataError(f"{source} has one class only, {only!r}; a classifier needs at least two.")
    for split in ("val", "test"):
        if not len(samples.where(split)):
            raise DataError(f"{source} has no {split} samples; add some, or leave the split column out.")
    noise_must_fit(config, samples)


def initialise(network: Classifier, folder: Path, config: Config) -> str:
    """Load the backbone of a pretraining run; the name of its method.

    Raises:
        ConfigError: it is another architecture.
    """
    tensors, facts = backbone_of(folder)
    for name, ours in (("backbone", config.backbone), ("stem", config.stem)):
        if facts[name] != ours:
            raise ConfigError(
                f"--init {folder} has {name} {facts[name]}, this run {ours}; set {name}={facts[name]}."
            )
    network.backbone.load_state_dict(tensors)
    return str(facts["method"])
