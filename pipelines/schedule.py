"""Which samples each batch of an epoch holds, and which part of it each process gets."""

from collections.abc import Iterator, Mapping

import numpy as np

from noisyssl.errors import ConfigError, DataError
from noisyssl.pipelines.draws import Slot, order


def must_be_shared(batch: int, world: int, name: str = "batch") -> None:
    """Raises ConfigError if a batch of this size does not fall into equal parts for so many processes."""
    if batch % world:
        low = batch // world * world
        near = f"{low} or {low + world}" if low else f"{world}"
        raise ConfigError(
            f"{name} is {batch} over {world} processes; each must get the same number of images. "
            f"Set {name} to {near}."
        )


class Schedule:
    """Which samples batch `position` of an epoch holds: a pure function of seed, indices and batch size.

    Among several processes each takes its part of that batch.
    """

    def __init__(
        self,
        indices: np.ndarray,
        *,
        batch: int,
        seed: int,
        shuffle: bool,
        drop_last: bool,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.rank, self.world = rank, world
        self.indices, self.batch, self.seed, self.shuffle = np.sort(indices), batch, seed, shuffle
        self.count = len(indices) // batch if drop_last else -(-len(indices) // batch)
        self.largest = batch
        if shuffle and not drop_last and len(indices) > batch > 1 and len(indices) % batch == 1:
            self.count, self.largest = self.count - 1, batch + 1  # BatchNorm cannot train on a single image
        self._order: tuple[int, np.ndarray] = (-1, self.indices)

    def index(self, epoch: int, position: int) -> np.ndarray:
        """(B,) int64 samples of one batch for all processes, before any is dropped."""
        if self.shuffle and self._order[0] != epoch:
            self._order = epoch, order(self.seed, epoch, self.indices)
        end = (position + 1) * self.batch
        if position == self.count - 1 and self.largest > self.batch:
            end += 1
        return self._order[1][position * self.batch : end]

    def slots(self, epoch: int, position: int, dropped: Mapping[int, str]) -> Iterator[Slot]:
        """One process's part of every batch from here on, for ever, without dropped samples or empty parts.

        Nothing moves up into the place of a dropped sample: all other batches stay as they are. Parts are
        equal: what is left of a batch over several processes may lose as many samples more as that takes.
        Where dropping leaves one image of several in a training batch, that one is left out as well.
        """
        gone = np.fromiter(dropped, np.int64, len(dropped))
        while True:
            whole, empty = position == 0, True
            for place in range(position, self.count):
                full = self.index(epoch, place)
                index = full[~np.isin(full, gone)]
                part = len(index) // self.world
                alone = self.shuffle and part * self.world == 1 < len(full)  # BatchNorm cannot train on it
                if part and not alone:
                    empty = False
                    yield Slot((epoch, place), index[self.rank * part : (self.rank + 1) * part])
            if whole and empty:
                left = np.isin(self.indices, gone, invert=True).any()
                count = f"{len(gone)} of {len(self.indices)}" if left else f"all {len(self.indices)}"
                raise DataError(f"{count} samples were dropped; restore the files.")
            epoch, position = epoch + 1, 0
