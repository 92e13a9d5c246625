"""Splits where the source has none: by group, seeded, stratified by class.

A unit is what may not be divided: groups joined by an image that two of them share pixel by pixel.
"""

from collections.abc import Sequence

import numpy as np

from noisyssl.errors import DataError

SHARE = 0.15
"""Part of the training groups that becomes each missing split."""
REMEDY = (
    "Add images of other groups (one without a group is its own), or give the splits yourself: "
    "folders train, val and test, or a column 'split'."
)


def make_splits(
    groups: Sequence[str],
    labels: np.ndarray,
    given: np.ndarray | None = None,
    pixels: np.ndarray | None = None,
    *,
    seed: int = 0,
) -> np.ndarray:
    """(N,) str: `given` splits with validation and test added where it has none.

    15 % of the training units become each missing part (rounded, at least one), spread evenly over the
    classes; a class with three units or more is in every part, and every class keeps a training unit.
    The order of the samples plays no role. Only training samples ever move.

    Args:
        groups: Group name of each sample.
        labels: (N,) int64 given labels, -1 for none.
        given: (N,) str splits of the source; None makes all three parts.
        pixels: (N, 32) uint8 digests of the decoded images; equal ones stay together.
        seed: `data.split_seed`.

    Raises:
        DataError: too few groups.
    """
    splits = np.full(len(groups), "train", dtype="<U5") if given is None else given.astype("<U5")
    missing = [part for part in ("test", "val") if not (splits == part).any()]
    rows = np.flatnonzero(splits == "train")
    if not missing or not len(rows):
        return splits
    units = find_units([groups[row] for row in rows.tolist()], None if pixels is None else pixels[rows])
    classes = np.unique(labels[rows], return_inverse=True)[1].reshape(-1)
    part_of = _divide(units, classes, missing, np.random.default_rng(seed))
    splits[rows] = part_of[units]
    return splits


def find_units(groups: Sequence[str], pixels: np.ndarray | None) -> np.ndarray:
    """(N,) int64 unit of each sample, numbered in the order of the smallest group name inside each."""
    names = sorted(set(groups))
    place = {name: i for i, name in enumerate(names)}
    group = np.fromiter((place[name] for name in groups), np.int64, len(groups))
    parent = list(range(len(names)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for same in [] if pixels is None else identical(pixels):
        for one, other in zip(group[same].tolist(), group[same[1:]].tolist(), strict=False):
            low, high = sorted((root(one), root(other)))
            parent[high] = low
    roots = np.fromiter(map(root, parent), np.int64, len(parent))
    return np.unique(roots[group], return_inverse=True)[1].reshape(-1).astype(np.int64)


def identical(digests: np.ndarray) -> list[np.ndarray]:
    """Index sets (ascending, two or more) of equal rows of (N, 32) uint8 digests."""
    words = np.ascontiguousarray(digests).view(np.uint64)
    order = np.argsort(words[:, 0], kind="stable")
    same = words[order[1:], 0] == words[order[:-1], 0]
    if not same.any():
        return []
    # Eight bytes bring candidates together fast; the whole digest decides.
    rows = order[np.append(same, False) | np.append(False, same)]
    found = words[rows]
    differ = found[1:] != found[:-1]
    if (differ.any(axis=1) & ~differ[:, 0]).any():  # hardly ever with SHA-256, and a slow sort
        order = np.lexsort(found.T)
        rows, found = rows[order], found[order]
        differ = found[1:] != found[:-1]
    ends = np.flatnonzero(differ.any(axis=1)) + 1
    return sorted((part for part in np.split(rows, ends) if len(part) > 1), key=lambda part: int(part[0]))


def _divide(units: np.ndarray, classes: np.ndarray, parts: list[str], rng: np.random.Generator) -> np.ndarray:
    """(U,) str part of each unit, by systematic sampling along units ordered by main class, then chance."""
    count, kinds = int(units.max()) + 1, int(classes.max()) + 1
    if count <= len(parts):
        raise DataError(
            f"the training images form {count} group{'s' * (count != 1)}; {len(parts) + 1} are needed "
            f"to make the missing {' and '.join(parts)}. {REMEDY}"
        )
    pairs, sizes = np.unique(units * kinds + classes, return_counts=True)
    holder, kind = pairs // kinds, pairs % kinds  # one entry per class that a unit holds
    main = np.zeros(count, dtype=np.int64)
    by_size = np.lexsort(
        (-kind, sizes)
    )  # the last write wins: the largest class, the smaller number in a tie
    main[holder[by_size]] = kind[by_size]
    order = np.lexsort((rng.random(count), main))
    result = np.full(count, "train", dtype="<U5")
    target = max(1, round(SHARE * count))
    for part in parts:
        free = order[result[order] == "train"]
        taken = min(target, len(free) - 1)
        places = ((np.arange(taken) + rng.random()) * len(free) / taken).astype(np.int64)
        result[free[places]] = part
        _cover(result, part, holder, kind, kinds, order)
        if not (result == part).any():
            raise DataError(
                f"no group is left for {part}: every class needs a training group of its own. {REMEDY}"
            )
    return result


def _cover(
    result: np.ndarray, part: str, holder: np.ndarray, kind: np.ndarray, kinds: int, order: np.ndarray
) -> None:
    """Give each class back a training unit, then bring it into `part` where three or more units hold it."""
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    for move_to, move_from, spare in (("train", part, 0), (part, "train", 1)):
        present = np.bincount(kind[result[holder] == move_to], minlength=kinds)
        for lacking in np.flatnonzero(present == 0):
            own = holder[kind == lacking]
            if (result[own] == move_to).any():
                continue  # a unit moved for an earlier class brought this one along
            if move_to == part and len(own) < 3:
                continue
            able = [
                unit
                for unit in own[result[own] == move_from]
                if spare == 0 or _spares(result, unit, holder, kind)
            ]
            if able:
                result[min(able, key=lambda unit: rank[unit])] = move_to


def _spares(result: np.ndarray, unit: int, holder: np.ndarray, kind: np.ndarray) -> bool:
    """Whether every class of `unit` has another training unit."""
    training = (result[holder] == "train") & (holder != unit)
    return bool(np.isin(kind[holder == unit], kind[training]).all())
