"""How far a server's own decoding and resampling is from `images`, and whether that changes an answer."""

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from noisyssl.deploy.predict import Item
from noisyssl.deploy.runtime import Runtime
from noisyssl.errors import DataError, ExportError
from noisyssl.geometry import evaluation_view
from noisyssl.images import BadImage, decode, read

MAX_DIFFERENCE = 2.0
"""In grey levels of 255, the mean over images of their mean difference."""
MIN_EQUAL_TOP1 = 0.999
MIN_IMAGES = 100
BATCH = 32
View = Callable[[bytes], np.ndarray | None]


def measure(runtime: Runtime, items: Iterable[Item], view: View) -> dict[str, Any]:
    """`view` compared with `geometry.evaluation_view` on files, both through the classifier.

    A file that only `images` can decode counts as another answer: the server would refuse it. One that
    neither can is left out.

    Raises:
        DataError: too few images to speak of one in a thousand.
    """
    geometry = runtime.manifest.geometry
    differences: list[float] = []
    equal = refused = broken = 0
    stream = iter(items)
    while group := list(islice(stream, BATCH)):
        pairs = []
        for _, file in group:
            try:
                data = read(file) if isinstance(file, Path) else b""
                ours = evaluation_view(decode(data), geometry.size, geometry.fit)
            except BadImage:
                broken += 1
                continue
            theirs = view(data)
            if theirs is None:
                refused += 1
            else:
                pairs.append((ours, theirs))
        if pairs:
            ours_, theirs_ = (np.stack(side) for side in zip(*pairs, strict=True))
            gap = np.abs(ours_.astype(np.int16) - theirs_.astype(np.int16))
            differences += gap.mean(axis=(1, 2, 3)).tolist()
            equal += int((runtime.logits(ours_).argmax(1) == runtime.logits(theirs_).argmax(1)).sum())
    images = len(differences) + refused
    if images < MIN_IMAGES:
        raise DataError(
            f"--images has {images} readable images; the ensemble is proved on {MIN_IMAGES} or more. "
            "Add images, or leave --images out to deploy without the ensemble."
        )
    return {
        "images": images,
        "mean_difference": float(np.mean(differences)) if differences else None,
        "largest_mean_difference": float(np.max(differences)) if differences else None,
        "equal_top1": equal / images,
        "refused_by_dali": refused,
        "broken": broken,
    }


def must_hold(parity: dict[str, Any]) -> None:
    """Raises ExportError unless what was measured is within the limits."""
    difference, equal = parity["mean_difference"], parity["equal_top1"]
    if difference is None or difference > MAX_DIFFERENCE or equal < MIN_EQUAL_TOP1:
        shown = "none decoded" if difference is None else f"{difference:.2f}/255 on average"
        raise ExportError(
            f"DALI's evaluation view of {parity['images']} images differs: {shown}, "
            f"{100 * equal:.2f} % equal top-1, {parity['refused_by_dali']} refused; "
            f"allowed are {MAX_DIFFERENCE:.0f}/255 and {100 * MIN_EQUAL_TOP1:.1f} %. The ensemble is "
            "left out: let clients decode, as `predict` does."
        )
