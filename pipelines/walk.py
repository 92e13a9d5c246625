"""Every image file below a folder, and what lies beside them."""

import os
from collections import Counter
from collections.abc import Iterable

from noisyssl.errors import DataError
from noisyssl.formats import MASKS, SUFFIXES, is_image_name


def images_below(
    folder: str, prefix: str, ignored: Counter[str], above: tuple[str, ...] = ()
) -> Iterable[str]:
    """Relative paths of everything below `folder` that is named like an image, hidden names left out."""
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.") from None
    if (here := os.path.realpath(folder)) in above:
        raise DataError(f"{folder} leads back, by a link, to a folder above it; remove the link.")
    beside_images = any(entry.name.lower() == "images" for entry in entries)
    for entry in entries:
        if entry.name.startswith(".") or entry.name == "__MACOSX":
            if hidden := _images_in(entry):
                ignored[f"in hidden folder {prefix}{entry.name}"] += hidden
            continue
        if beside_images and MASKS.search(entry.name) and entry.is_dir():  # COVID-QU-Ex: they have no label
            ignored["masks"] += sum(1 for _ in images_below(entry.path, "", Counter(), (*above, here)))
            continue
        suffix = os.path.splitext(entry.name)[1].lower()
        if is_image_name(entry.path):  # a folder named like an image too: the scan says what is wrong with it
            yield prefix + entry.name
        elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # a link may name itself
            yield from images_below(entry.path, f"{prefix}{entry.name}/", ignored, (*above, here))
        else:
            ignored[suffix or "without suffix"] += 1


def _images_in(hidden: "os.DirEntry[str]") -> int:
    """How many files in a hidden folder end as images do; what cannot be read there is no matter."""
    if not hidden.name.startswith(".") or not os.path.isdir(hidden.path):
        return 0
    return sum(
        not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES
        for _, _, names in os.walk(hidden.path)
        for name in names
    )
