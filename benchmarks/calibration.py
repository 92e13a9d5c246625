"""Is the generated set hard for colour and learnable by a network? One JSON record line on standard output.

Run it as `python -m noisyssl.benchmarks.calibration`. Each seed paints its own set, fits the two colour
baselines and trains a small network twice: on the true labels and on labels with symmetric noise. All figures
are balanced accuracies on the true labels of the test split, after the last epoch.
"""

import argparse
import csv
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from noisyssl import noise
from noisyssl.baselines import colour_histogram, fit_predict, mean_rgb
from noisyssl.benchmarks.measure import Spread
from noisyssl.benchmarks.records import record
from noisyssl.classifier import build_classifier
from noisyssl.optim import cosine
from noisyssl.pipelines.generate import CLASSES, generate

BACKBONE = "resnet18-w32"
BATCH = 128
LR = 1e-3
SHIFT = 6
"""Largest shift of a training crop in pixels at 64; the border is reflected."""


def read(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N, H, W, 3) uint8 images, (N,) int64 true labels and (N,) splits of a generated set."""
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    images = np.stack([np.asarray(Image.open(folder / row["path"])) for row in rows])
    labels = np.array([CLASSES.index(row["true_label"]) for row in rows])
    return images, labels, np.array([row["split"] for row in rows])


def balanced_accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes of the share of their rows whose largest score is right."""
    right = scores.argmax(axis=1) == labels
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def train(images: np.ndarray, labels: np.ndarray, epochs: int, seed: int) -> nn.Module:
    """A classifier after plain cross-entropy with AdamW, cosine, flips and shifts."""
    torch.manual_seed(seed)
    model = build_classifier(BACKBONE, "plain", len(CLASSES)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    pixels, targets = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
    size, shift = images.shape[1], max(1, SHIFT * images.shape[1] // 64)
    steps = max(1, len(labels) // BATCH)
    model.train()
    for step in range(epochs * steps):
        if step % steps == 0:
            order = torch.randperm(len(labels))
        optimizer.param_groups[0]["lr"] = LR * cosine(step / (epochs * steps), warmup=0.0)
        rows = order[step % steps * BATCH :][:BATCH]
        batch = pixels[rows].float()
        for axis in (2, 3):
            batch = torch.where((torch.rand(len(rows)) < 0.5)[:, None, None, None], batch.flip(axis), batch)
        top, left = torch.randint(0, 2 * shift + 1, (2,)).tolist()
        batch = F.pad(batch, (shift,) * 4, mode="reflect")[:, :, top : top + size, left : left + size]
        loss = F.cross_entropy(model(batch.contiguous(memory_format=torch.channels_last)), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.inference_mode()
def scores(model: nn.Module, images: np.ndarray) -> np.ndarray:
    """(N, K) logits."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return torch.cat([model(part) for part in pixels.split(BATCH)]).numpy()


def calibrate(
    folder: Path, *, count: int, size: int, epochs: int, rate: float, seed: int
) -> dict[str, float]:
    """Balanced test accuracies of one set, painted into `folder`; no noisy training when `rate` is 0."""
    generate(folder, count=count, size=size, seed=seed)
    images, labels, splits = read(folder)
    train_rows, test_rows = (np.flatnonzero(splits == name) for name in ("train", "test"))
    figures = {}
    for name, feature in (("mean_rgb", mean_rgb), ("histogram", colour_histogram)):
        rows = np.stack([feature(image) for image in images])
        out = fit_predict(rows[train_rows], labels[train_rows], rows[test_rows], len(CLASSES))
        figures[name] = balanced_accuracy(out, labels[test_rows])
    given = {"clean_training": labels[train_rows]}
    if rate:
        matrix = noise.matrix(noise.Noise("symmetric", rate), CLASSES)
        given["noisy_training"] = noise.inject(labels[train_rows], matrix, seed)
    for name, targets in given.items():
        model = train(images[train_rows], targets, epochs, seed)
        figures[name] = balanced_accuracy(scores(model, images[test_rows]), labels[test_rows])
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Prints the record; medians over the seeds are its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="images per set")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument(
        "--rate", type=float, default=0.4, help="symmetric noise of the second training; 0: none"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    chosen = vars(parser.parse_args(arguments))
    seeds = chosen.pop("seeds")
    with tempfile.TemporaryDirectory() as folder:
        found = [calibrate(Path(folder) / str(seed), **chosen, seed=seed) for seed in seeds]
    spread = {name: Spread.of([figures[name] for figures in found]) for name in found[0]}
    fixed = {"backbone": BACKBONE, "batch": BATCH, "lr": LR, "optimizer": "adamw", "seeds": seeds}
    one = record(
        "calibration",
        settings=chosen | fixed,
        figures={name: values.median for name, values in spread.items()},
        n=len(seeds),
        spread=spread,
    )
    sys.stdout.write(json.dumps(one, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
