"""Tissue-like images of nine classes, with slides as groups and true labels, written as a labelled data set.

Colour is optical density of haematoxylin and eosin: Ruifrok and Johnston, Anal. Quant. Cytol. Histol. 2001.
"""

import csv
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from noisyssl.errors import ConfigError, MachineError
from noisyssl.pipelines.canvas import FIELD, Canvas
from noisyssl.pipelines.tissue import KINDS

# Calibrated so that colour alone stays below 0.6 balanced accuracy where a small network reaches 0.9;
# `python -m noisyssl.benchmarks.calibration` measures it. While choosing these (2,000 images, 64 pixels,
# seed 0, its recipe with weight decay 0.05, 25 epochs): mean RGB 0.25, histogram 0.47, clean training 0.93,
# training at 40 % symmetric noise 0.77. More THICKNESS, CONTRAST or INTRUSION weakens the histogram and slows
# the network; less LEVELLING lets brightness betray adipose and background.
LEVELLING = 0.6
"""How far each tile's stain is pulled to its slide's: at 1 every class holds the same amount on average."""
THICKNESS = 0.32
"""Spread of the log of a tile's stain about its slide's."""
CONTRAST = 0.18
"""Spread of the log of the power that a tile's densities are raised to."""
INTRUSION = 0.3
"""Share of tiles into which a second kind of tissue reaches."""
INTRUDED = (0.1, 0.33)
"""Range of the share of such a tile that the second kind covers."""
REPEATS = 2
"""Tiles of each class on a slide."""

CLASSES = tuple(KINDS)
TILES = REPEATS * len(CLASSES)
MIX = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
"""Optical density of haematoxylin and eosin in red, green and blue (Ruifrok and Johnston, table 1)."""
OWN = 0.6
"""Log of the factor between the stain amounts of classes, in a grid of three by three, at difficulty 0."""
AMOUNTS = np.array([0.3, 0.325])
"""Mean density of each on an average slide."""


@dataclass(frozen=True)
class Slide:
    """What all tiles of one slide share: colour tells the slide, not the class."""

    stains: np.ndarray
    """(2, 3) optical density per unit of haematoxylin and of eosin."""
    amounts: np.ndarray
    """(2,) mean density of a tile."""
    white: np.ndarray
    """(3,) brightness of empty glass."""
    blur: float
    """Standard deviation of the scanner's focus, in units of a 64th of the tile."""
    noise: float
    """Standard deviation of the scanner's noise in grey levels."""
    order: np.ndarray
    """(TILES,) class of each tile."""


@lru_cache(maxsize=64)
def slide(seed: int, number: int, difficulty: float = 1.0) -> Slide:
    """The slide called `number` of the set `seed`; at difficulty 0 all are stained alike."""
    rng = np.random.default_rng((seed, 0, number))
    stains = np.clip(MIX + rng.normal(0, 0.06, (2, 3)) * difficulty, 0.02, None)
    amounts = rng.uniform((0.2, 0.2), (0.4, 0.45))
    return Slide(
        stains=(stains / np.linalg.norm(stains, axis=1, keepdims=True)).astype(np.float32),
        amounts=(AMOUNTS + (amounts - AMOUNTS) * difficulty).astype(np.float32),
        white=rng.uniform(225, 250, 3).astype(np.float32),
        blur=float(rng.uniform(0.35, 0.7)),
        noise=float(rng.uniform(2, 5)),
        order=np.concatenate([rng.permutation(len(CLASSES)) for _ in range(REPEATS)]),
    )


@lru_cache(maxsize=64)
def _gaussian(size: int, sigma: float) -> np.ndarray:
    at = np.arange(size) * (FIELD / size)
    weights = np.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _densities(rng: np.random.Generator, label: int, size: int, difficulty: float) -> np.ndarray:
    """(2, size, size) haematoxylin and eosin of one kind, each of mean 1 as far as LEVELLING says.

    At difficulty 0 of mean 1: what a class has of its own is added afterwards.
    """
    canvas = Canvas(rng, size)
    KINDS[CLASSES[label]](canvas)
    stain = np.clip(np.stack([canvas.haematoxylin, canvas.eosin]), 0, None)
    stain **= np.exp(rng.normal(0, CONTRAST * difficulty, (2, 1, 1))).astype(np.float32)
    return stain / stain.mean(axis=(1, 2), keepdims=True) ** (1 + (LEVELLING - 1) * difficulty)


def paint(seed: int, index: int, size: int, difficulty: float = 1.0) -> tuple[np.ndarray, int, int]:
    """(size, size, 3) uint8 RGB, label and slide of one image: a function of the arguments alone."""
    number, tile = divmod(index, TILES)
    on = slide(seed, number, difficulty)
    label = int(on.order[tile])
    rng = np.random.default_rng((seed, 1, index))
    stain = _densities(rng, label, size, difficulty)
    if rng.random() < INTRUSION * difficulty:
        other = _densities(rng, int(rng.integers(len(CLASSES))), size, difficulty)
        shape = Canvas(rng, size).smooth(20)
        edge = np.quantile(shape, 1 - rng.uniform(*INTRUDED))
        mask = np.clip((shape - edge) * 4 + 0.5, 0, 1)
        stain += mask * (other - stain)
    own = OWN * (1 - difficulty) * (np.array(divmod(label, 3)) - 1)
    amounts = on.amounts * np.exp(rng.normal(0, THICKNESS * difficulty, 2) + own)
    stain *= amounts[:, None, None].astype(np.float32)
    focus = _gaussian(size, on.blur)
    stain = focus @ stain @ focus.T
    light = on.white * np.exp(-np.log(10) * np.tensordot(stain, on.stains, (0, 0)))
    light += rng.standard_normal(light.shape, np.float32) * on.noise
    return np.clip(light + 0.5, 0, 255).astype(np.uint8), label, number


def _splits(seed: int, slides: int, full: int) -> list[str]:
    """The split of each slide: 70/15/15; validation and test only get full slides, which hold every class."""
    held = max(1, round(0.15 * slides))
    order = np.random.default_rng((seed, 2)).permutation(full)
    splits = ["train"] * slides
    for name, chosen in (("val", order[:held]), ("test", order[held : 2 * held])):
        for number in chosen:
            splits[number] = name
    return splits


def generate(
    folder: Path,
    *,
    count: int = 2000,
    size: int = 64,
    seed: int = 0,
    difficulty: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes `images/CLASS/SLIDE_NUMBER.png` and `manifest.csv` below `folder`.

    The manifest (path, label, split, group, true_label) splits 70/15/15 by slide. Image i depends on `seed`,
    `size`, `difficulty` and i only, so a bigger set starts with the same images. `folder` appears complete or
    not at all.

    Args:
        size: pixels, 32-224; a tile covers the same piece of tissue at every size.
        difficulty: 0-1; at 1 colour says little of the class and tissues mix, at 0 each class has amounts of
            stain of its own, all slides are stained alike and every tile holds one tissue.
        progress: called with (images written, count) after each image.

    Raises:
        ConfigError: `folder` exists, or a setting is out of range.
        MachineError: it cannot be written.
    """
    if os.path.lexists(folder):
        raise ConfigError(
            f"{folder} exists; generated data go into a new folder. Remove it or name another one."
        )
    if not 32 <= size <= 224:
        raise ConfigError(f"--size is {size}; it must lie in 32-224 pixels.")
    if count < 3 * TILES:
        raise ConfigError(f"--count is {count}; it must be at least {3 * TILES}, one slide for each split.")
    if seed < 0:
        raise ConfigError(f"--seed is {seed}; it must not be negative.")
    if not 0 <= difficulty <= 1:
        raise ConfigError(f"--difficulty is {difficulty}; it must lie in 0-1.")
    building = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        _write(building, count, size, seed, difficulty, progress)
        building.rename(folder)
    except OSError as error:
        reason = error.strerror or error
        raise MachineError(
            f"{folder} cannot be written: {reason}. Free space or name another folder."
        ) from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write(
    folder: Path,
    count: int,
    size: int,
    seed: int,
    difficulty: float,
    progress: Callable[[int, int], None] | None,
) -> None:
    for name in CLASSES:
        (folder / "images" / name).mkdir(parents=True)
    splits = _splits(seed, -(-count // TILES), count // TILES)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("path", "label", "split", "group", "true_label"))
        for index in range(count):
            image, label, number = paint(seed, index, size, difficulty)
            name, group = CLASSES[label], f"slide{number:04d}"
            path = f"images/{name}/{group}_{index % TILES:02d}.png"
            encoded = io.BytesIO()  # Pillow writes a file in ten pieces
            Image.fromarray(image).save(encoded, "PNG", compress_level=1)
            (folder / path).write_bytes(encoded.getvalue())
            table.writerow((path, name, splits[number], group, name))
            if progress is not None:
                progress(index + 1, count)
