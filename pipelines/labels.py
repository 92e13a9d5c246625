"""The labels that train, validate and evaluate, and the noise that is put into the first two."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from noisyssl import instance_noise
from noisyssl import noise as noises
from noisyssl.config import Config
from noisyssl.errors import ConfigError, DataError, near_miss
from noisyssl.geometry import evaluation_view
from noisyssl.images import BadImage
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.sources import inside
from noisyssl.pipelines.tables import header_of, read_own_table, read_table, table_text

SMALL = 16
"""Pixels of the small copies whose colours instance-dependent noise hangs on, if no run's features do."""


def truth_of(samples: Samples) -> np.ndarray:
    """(N,) the labels that evaluate: true ones where the source knows them, else the given ones."""
    if samples.true_labels is None:
        return samples.labels
    return np.where(samples.true_labels >= 0, samples.true_labels, samples.labels)


def noisy_labels(config: Config, samples: Samples, run: Run) -> tuple[np.ndarray, dict[str, Any]]:
    """The labels that train and, by default, validate, with what was done to them; test labels stay.

    Writes every flip to the run's `noise.csv`; a resumed run reads them there.

    Raises:
        ConfigError, DataError: the noise does not suit the data, see `noises.matrix` and `given_column`.
    """
    stage = config.train
    noise = noises.parse(stage.noise)
    names, clean = samples.classes, truth_of(samples)
    rows = samples.where("train", "val") if stage.val_labels == "noisy" else samples.where("train")
    again = not run.is_fresh() and (run.folder / "noise.json").exists()  # 0.1.0 wrote none, and drew again
    asked = asked_before(run) if again else None if noise.kind == "column" else noises.matrix(noise, names)
    if again:
        labels = flipped_before(run, samples)
    elif noise.kind == "column":
        labels = given_column(Path(config.data.path), noise.source, samples, rows)
    elif noise.kind == "instance" and len(names) > 1:
        labels = noises.inject_each(
            samples.labels, instance_shares(noise, config, samples, rows), stage.noise_seed, rows
        )
    else:
        assert asked is not None
        labels = noises.inject(samples.labels, asked, stage.noise_seed, rows)
    done = noises.realised(samples.labels, labels, len(names), samples.where("train", "val"))
    if stage.val_labels == "clean":
        val = samples.where("val")
        labels[val] = clean[val]
    on_train = noises.realised(clean, labels, len(names), samples.where("train"))
    found = on_train.matrix if asked is None else asked
    if not noises.is_recoverable(np.where(np.isnan(found), np.eye(len(names)), found)):
        run.log({"kind": "warning", "message": beyond(stage.noise, len(names))})
    run.write("noise.json", json.dumps({"asked_matrix": None if asked is None else asked.tolist()}) + "\n")
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
        "asked_matrix": None if asked is None else asked.tolist(),
        "realised": facts["rate"],
        "matrix": facts["matrix"],
        "flips": len(done.flips),
        "val_labels": stage.val_labels,
        "seed": stage.noise_seed,
    }


def noise_must_fit(config: Config, samples: Samples) -> None:
    """Raises, before anything trains, what `noisy_labels` would raise."""
    noise = noises.parse(config.train.noise)
    if noise.kind == "column":
        rows = samples.where("train", "val")
        given_column(Path(config.data.path), noise.source, samples, rows)
    else:
        noises.matrix(noise, samples.classes)
    if noise.kind == "instance" and noise.source:
        from noisyssl.pipelines.embed import frozen_backbone

        frozen_backbone(Path(noise.source))


def beyond(spec: str, classes: int) -> str:
    """Why nobody can learn from these labels."""
    bound = f"at or beyond {(classes - 1) / classes:.3f} with {classes} classes "
    what = bound if spec.startswith("symmetric") else ""
    return (
        f"train.noise is {spec}; {what}the true label is no longer the most frequent: "
        "no method can recover it. Lower the rate."
    )


def flipped_before(run: Run, samples: Samples) -> np.ndarray:
    """(N,) labels with the flips of the run's own `noise.csv`."""
    index, given = read_own_table(run.folder / "noise.csv", ("index", "given")).values()
    labels = np.array(samples.labels, dtype=np.int64)
    for row, name in zip(index, given, strict=True):
        labels[int(row)] = samples.classes.index(name)
    return labels


def asked_before(run: Run) -> np.ndarray | None:
    """The matrix that the run began with: its file may be gone or changed."""
    found = json.loads((run.folder / "noise.json").read_text())["asked_matrix"]
    return None if found is None else np.array(found)


def given_column(table: Path, name: str, samples: Samples, rows: np.ndarray) -> np.ndarray:
    """(N,) labels with those of `rows` from another column of the data's CSV; empty cells keep theirs.

    Raises:
        ConfigError: the data are no CSV, or have no such column.
        DataError: a cell is no class of the label column, or an image has two.
    """
    if table.suffix.lower() != ".csv":
        raise ConfigError(
            f"train.noise is column:{name}, a column of a CSV, but {table} is none; give the data as CSV."
        )
    if name.lower() not in (columns := header_of(table)):
        raise ConfigError(
            f"train.noise is column:{name}, but {table} has no such column; it has {', '.join(columns)}."
            f"{near_miss(name, columns)}"
        )
    cells = read_table(table, ("path", name.lower()))
    given: dict[str, str] = {}
    for path, cell in zip(inside(table, cells["path"]), cells[name.lower()], strict=True):
        if cell and given.setdefault(path, cell) != cell:
            raise DataError(f"{table}: {path} is {given[path]!r} and {cell!r} in column {name}; keep one.")
    places = {label: place for place, label in enumerate(samples.classes)}
    labels = np.array(samples.labels, dtype=np.int64)
    for row in rows.tolist():
        cell = given.get(samples.paths[row], "")
        if cell and cell not in places:
            raise DataError(
                f"{table}: {cell!r} in column {name} is no class of column label; those are "
                f"{', '.join(samples.classes)}.{near_miss(cell, samples.classes)}"
            )
        if cell:
            labels[row] = places[cell]
    return labels


def instance_shares(noise: noises.Noise, config: Config, samples: Samples, rows: np.ndarray) -> np.ndarray:
    """(M, C) shares of each of `rows`, by features of the run that the noise names, else by small copies."""
    assert noise.rate is not None
    if noise.source:
        from noisyssl.pipelines.embed import features_of, frozen_backbone
        from noisyssl.pipelines.setup import device_of

        frozen, device = frozen_backbone(Path(noise.source)), device_of(config.device)
        (features,) = features_of(frozen, samples, rows, device, config.threads)
    else:

        def small(row: int) -> np.ndarray:
            try:
                view = evaluation_view(samples.image(row), config.data.size, config.data.fit)
            except BadImage:
                if not config.data.quarantine:
                    raise
                view = np.zeros((SMALL, SMALL, 3), np.uint8)  # its label trains nobody: the loader drops it
            copy = Image.fromarray(view).resize((SMALL, SMALL), Image.Resampling.BOX)
            return np.asarray(copy, np.float32).reshape(-1)

        with ThreadPoolExecutor(config.threads) as pool:
            features = np.stack(list(pool.map(small, rows.tolist())))
    return instance_noise.shares(
        features, samples.labels[rows], rows, len(samples.classes), noise.rate, config.train.noise_seed
    )
