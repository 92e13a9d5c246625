"""A contact sheet for a person to judge: beside each original image what the views make of it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import zip_longest

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from noisyssl.errors import DataError
from noisyssl.geometry import evaluation_view
from noisyssl.pipelines import compiled
from noisyssl.pipelines.draws import draw, order
from noisyssl.pipelines.samples import Samples
from noisyssl.views import View

Group = tuple[str, Sequence[View], int]
"""A title for views of one sample, and in how many epochs they are shown."""
Column = tuple[str, list[np.ndarray]]
"""Its title, and a square uint8 image per row."""

GAP, LINE, MARGIN = 6, 18, 12
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def contact_sheet(
    samples: Samples, groups: Sequence[Group], *, title: str, size: int, seed: int, rows: int
) -> Image.Image:
    """The sheet. Its views are those that training with this seed draws in its first epochs.

    Args:
        samples: the training split is shown, its classes in turn.
        groups: what is shown beside the original, such as a method's views.
        title: first line.
        size: pixels of the original's evaluation view.
        seed: of the run, and of the choice of images.
        rows: images.

    Raises:
        DataError: there is no training image.
    """
    if not len(samples.where("train")):
        raise DataError(f"{samples.root} has no train images, which are shown; add some.")
    index = chosen(samples, seed, rows)
    images = [np.ascontiguousarray(samples.image(int(i))) for i in index]
    columns: list[Column] = [("original", [evaluation_view(image, size) for image in images])]
    for name, views, epochs in groups:
        tiles = drawn(samples, images, index, views, seed, epochs)
        for number in range(len(views)):
            head = f"{name} {number + 1}" if len(views) > 1 else name
            for epoch in range(epochs):
                columns.append((head if epoch == 0 else "", list(tiles[epoch][number])))
    return laid_out(columns, [caption(samples, int(i)) for i in index], [title, *described(groups)])


def chosen(samples: Samples, seed: int, rows: int) -> np.ndarray:
    """(R,) indices of the training split, shuffled, its classes in turn."""
    train = order(seed, 0, samples.where("train"))
    classes = [train[samples.labels[train] == label] for label in np.unique(samples.labels[train])]
    turns = [index for turn in zip_longest(*classes) for index in turn if index is not None]
    return np.array(turns[:rows], np.int64)


def drawn(
    samples: Samples,
    images: list[np.ndarray],
    index: np.ndarray,
    views: Sequence[View],
    seed: int,
    epochs: int,
) -> list[list[np.ndarray]]:
    """Per epoch and view (R, S, S, 3) uint8."""
    sizes, memory, out = (samples.heights[index], samples.widths[index]), compiled.Memory(), []
    with ThreadPoolExecutor(1) as pool:
        for epoch in range(epochs):
            draws = [draw(view, seed, epoch, index, number, *sizes) for number, view in enumerate(views)]
            made = compiled.apply(images, views, draws, pool, memory)
            out.append([view.permute(0, 2, 3, 1).numpy().copy() for view in made])
    return out


def caption(samples: Samples, index: int) -> str:
    label = int(samples.labels[index])
    name = f"{samples.classes[label]}   " if label >= 0 else ""
    return (name + samples.paths[index]).encode("ascii", "replace").decode()


def described(groups: Sequence[Group]) -> list[str]:
    """One line per kind of view: what differs from a plain resize."""
    lines: dict[str, None] = {}
    for name, views, _ in groups:
        for view in views:
            plain = View(size=view.size)
            settings = [f.name for f in fields(View) if getattr(view, f.name) != getattr(plain, f.name)]
            text = ", ".join(f"{key} {said(getattr(view, key))}" for key in settings)
            lines[f"{name}: {view.size} pixels, {text}"] = None
    return list(lines)


def said(value: object) -> str:
    return "-".join(map(said, value)) if isinstance(value, tuple) else f"{value:.3g}"


def laid_out(columns: Sequence[Column], captions: Sequence[str], notes: Sequence[str]) -> Image.Image:
    """Tiles in columns under their titles; views smaller than the largest are enlarged, pixel by pixel."""
    side = max(len(tiles[0]) for _, tiles in columns)
    side *= max(1, 160 // side)
    font = ImageFont.load_default(13)
    top = MARGIN + LINE * (len(notes) + 2)
    left = [MARGIN + n * (side + GAP) + apart(columns, n) for n in range(len(columns))]
    high = top + len(captions) * (side + LINE + GAP) + MARGIN
    sheet = Image.new("RGB", (left[-1] + side + MARGIN, high), PAPER)
    pen = ImageDraw.Draw(sheet)
    for line, note in enumerate(notes):
        pen.text((MARGIN, MARGIN + LINE * line), note, INK if line == 0 else FAINT, font)
    for x, (head, tiles) in zip(left, columns, strict=True):
        pen.text((x, top - LINE), head, INK, font)
        for row, tile in enumerate(tiles):
            shown = Image.fromarray(tile)
            if shown.width != side:
                whole = side % shown.width == 0
                shown = shown.resize((side, side), Image.Resampling[("BICUBIC", "NEAREST")[whole]])
            sheet.paste(shown, (x, top + row * (side + LINE + GAP) + LINE))
    for row, text in enumerate(captions):
        pen.text((MARGIN, top + row * (side + LINE + GAP)), text, FAINT, font)
    return sheet


def apart(columns: Sequence[Column], n: int) -> int:
    """Pixels by which the titles up to column `n` move it to the right: a gap before each new view."""
    return 2 * GAP * sum(bool(head) for head, _ in columns[1 : n + 1])
