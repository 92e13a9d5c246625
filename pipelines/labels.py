"""The labels that train, validate and evaluate, and the noise that is put into the first two."""

from typing import Any

import numpy as np

from noisyssl import noise as noises
from noisyssl.config import Config
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.tables import table_text


def truth_of(samples: Samples) -> np.ndarray:
    """(N,) the labels that evaluate: true ones where the source knows them, else the given ones."""
    if samples.true_labels is None:
        return samples.labels
    return np.where(samples.true_labels >= 0, samples.true_labels, samples.labels)


def noisy_labels(config: Config, samples: Samples, run: Run) -> tuple[np.ndarray, dict[str, Any]]:
    """The labels that train and, by default, validate, with what was done to them; test labels stay.

    Writes every flip to the run's `noise.csv`.
    """
    stage = config.train
    noise = noises.parse(stage.noise)
    classes = len(samples.classes)
    rows = samples.where("train", "val") if stage.val_labels == "noisy" else samples.where("train")
    labels = noises.inject(samples.labels, noise, classes, stage.noise_seed, rows)
    clean = truth_of(samples)
    if stage.val_labels == "clean":
        val = samples.where("val")
        labels[val] = clean[val]
    if not noises.is_recoverable(noise, classes):
        bound = (classes - 1) / classes
        message = (
            f"train.noise is {stage.noise}; at or beyond {bound:.3f} with {classes} classes the true label "
            "is no longer the most frequent: no method can recover it. Lower the rate."
        )
        run.log({"kind": "warning", "message": message})
    train_rows = samples.where("train")
    done = noises.realised(samples.labels, labels, classes, samples.where("train", "val"))
    on_train = noises.realised(clean, labels, classes, train_rows)
    names = samples.classes
    run.write(
        "noise.csv",
        table_text(
            {
                "index": [i for i, _, _ in done.flips],
                "path": [samples.paths[i] for i, _, _ in done.flips],
                "label": [names[a] for _, a, _ in done.flips],
                "given": [names[b] for _, _, b in done.flips],
            }
        ),
    )
    facts = on_train.to_json()
    return labels, {
        "spec": str(noise),
        "asked": noise.rate,
        "asked_matrix": noises.matrix(noise, classes).tolist(),
        "realised": facts["rate"],
        "matrix": facts["matrix"],
        "flips": len(done.flips),
        "val_labels": stage.val_labels,
        "seed": stage.noise_seed,
    }
