"""Frozen features: a run's backbone, without its head, on evaluation views."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from noisyssl import checkpoint
from noisyssl.backbones import Backbone, build_backbone
from noisyssl.config import Config
from noisyssl.disk import disk
from noisyssl.pipelines.evaluate import evaluation_images, logits_of
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.samples import Samples

CHUNK = 4096
"""Images held on disk at once; bounds the temporary file (600 MB at 224 pixels)."""


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A backbone that no longer learns, and how its images are made."""

    backbone: Backbone
    size: int
    fit: str
    what: str
    """Where its weights come from, for a person."""
    digest: str
    """SHA-256 of its tensors."""


def frozen_backbone(folder: Path, *, random: bool = False) -> Frozen:
    """The backbone of a finished pretraining run, or of a training run at BEST.

    Args:
        random: the same architecture with the random weights that the run's seed gives, untrained.

    Raises:
        ConfigError: no run there, or it has not finished.
    """
    run = Run.open(folder)
    config, stage = run.config(), run.facts()["stage"]
    if random:
        return random_backbone(config)
    backbone = build_backbone(config.backbone, config.stem)
    if stage == "pretrain":
        tensors, facts = run.weights("last")
        backbone.load_state_dict(tensors)
        what = f"{facts['method']}, {config.pretrain.epochs} epochs"
    else:
        tensors, facts = run.weights("best")
        own = {n.removeprefix("backbone."): v for n, v in tensors.items() if n.startswith("backbone.")}
        backbone.load_state_dict(own)
        what = f"{config.train.objective}, BEST, epoch {facts['epoch']}"
    return _frozen(backbone, config, what)


def random_backbone(config: Config) -> Frozen:
    """The weights that pretraining with these settings would start from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        backbone = build_backbone(config.backbone, config.stem)
    return _frozen(backbone, config, f"random weights (seed {config.seed})")


def _frozen(backbone: Backbone, config: Config, what: str) -> Frozen:
    backbone.eval().requires_grad_(False)
    digest = checkpoint.digest(backbone.state_dict())
    return Frozen(backbone=backbone, size=config.data.size, fit=config.data.fit, what=what, digest=digest)


def views_in_chunks(
    samples: Samples, indices: np.ndarray, frozen: Frozen, threads: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """(which rows, (M, S, S, 3) uint8 evaluation views) of all `indices`, some thousands at a time."""
    for start in range(0, len(indices), CHUNK):
        rows = slice(start, min(start + CHUNK, len(indices)))
        with evaluation_images(samples, indices[rows], frozen.size, frozen.fit, threads) as images:
            yield rows, images


def features_of(
    frozen: Frozen,
    samples: Samples,
    indices: np.ndarray,
    device: torch.device,
    threads: int,
    also: tuple[Callable[[np.ndarray], np.ndarray], ...] = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """(M, D) float32 features of these samples, then (M, ...) float32 of what `also` makes of each view.

    Raises:
        BadImage: a file broke after the scan.
    """
    network = frozen.backbone.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    parts: list[list[np.ndarray]] = [[] for _ in range(1 + len(also))]
    for rows, images in views_in_chunks(samples, indices, frozen, threads):
        parts[0].append(logits_of(network, images, device))
        for kept, make in zip(parts[1:], also, strict=True):
            kept.append(np.stack([make(image) for image in images]).astype(np.float32))
        if progress is not None:
            progress(rows.stop, len(indices))
    return [np.concatenate(kept) for kept in parts]


def columns_of(samples: Samples, indices: np.ndarray) -> dict[str, np.ndarray]:
    """index, path, label, true_label, split and group of these samples; "" where a label is unknown."""
    names = np.array([*samples.classes, ""])  # -1 finds the last
    true = samples.true_labels if samples.true_labels is not None else np.full(len(samples), -1)
    return {
        "index": indices.astype(np.int64),
        "path": np.array([samples.paths[i] for i in indices]),
        "label": names[samples.labels[indices]],
        "true_label": names[true[indices]],
        "split": samples.splits[indices],
        "group": np.array([samples.groups[i] for i in indices]),
    }


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write an .npz that needs no pickle, whole or not at all.

    Raises:
        MachineError: the disk is full or refuses.
    """
    assert not any(np.asarray(value).dtype.hasobject for value in arrays.values())
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:  # not through memory: features of a large set fill it
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
