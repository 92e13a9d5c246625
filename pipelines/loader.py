"""One way to get batches, whoever computes the views: DALI, the GPU from its own memory, or torch."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from noisyssl.batch import Batch
from noisyssl.distributed import exchange
from noisyssl.errors import ConfigError, DataError, MachineError
from noisyssl.images import BadImage
from noisyssl.pipelines.batched import BatchedStream
from noisyssl.pipelines.colour import sent
from noisyssl.pipelines.dali import DaliStream
from noisyssl.pipelines.draws import Slot, keys
from noisyssl.pipelines.gpu_streams import DecodedStream, ResidentStream, UploadStream, can_fuse, unfused
from noisyssl.pipelines.resident import fits, must_be_packed
from noisyssl.pipelines.samples import Samples
from noisyssl.pipelines.schedule import Schedule, must_be_shared
from noisyssl.views import View

Kind = Literal["auto", "resident", "dali", "batched"]


class Loader(Protocol):
    """Endless epochs of batches: one epoch per `iter()`, or what `start` left of it."""

    name: str
    """Where the views come from: resident, upload, dali-gpu, dali-cpu or batched."""
    note: str
    """Why a GPU that is there does not make them; empty where it does."""
    labels: Tensor | None
    """(N,) int64 over all samples, on the CPU, looked up as a batch is handed out; replace it to relabel."""
    dropped: dict[int, str]
    """Index and reason of each file found broken since the scan, with quarantine."""
    position: tuple[int, int]
    """(epoch, batch) for `start` to go on after the last batch that was handed out."""

    def __len__(self) -> int:
        """Batches per epoch."""
        ...

    def __iter__(self) -> Iterator[Batch]:
        """The remaining batches of the current epoch; the next call gives the following epoch."""
        ...

    def start(self, epoch: int, position: int, dropped: Mapping[int, str] = ...) -> None:
        """Go to a batch of an epoch; what follows is the same, bit for bit, as after running up to it."""
        ...

    def close(self) -> None:
        """Stop threads and free buffers; a later `iter()` opens them again."""
        ...


class Stream(Protocol):
    """Views of the slots of a schedule, in order, computed ahead."""

    flying: list[Slot]
    """Slots taken from the schedule and not yet handed out, oldest first."""

    def __init__(
        self,
        samples: Samples,
        views: Sequence[View],
        slots: Iterator[Slot],
        *,
        seed: int,
        batch: int,
        device: torch.device,
        threads: int,
    ) -> None: ...

    def __next__(self) -> tuple[Tensor, ...]:
        """Per view (B, 3, S, S) uint8, channels-last, safe to keep, of the oldest slot in flight."""
        ...

    def close(self) -> None: ...


def open_loader(
    samples: Samples,
    indices: np.ndarray,
    views: Sequence[View],
    *,
    batch: int,
    seed: int,
    device: torch.device,
    kind: Kind = "auto",
    shuffle: bool = True,
    drop_last: bool = False,
    threads: int = 2,
    quarantine: bool = False,
    labels: Tensor | None = None,
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """A loader of `views` of the samples with these `indices`.

    Args:
        samples: the data set.
        indices: (M,) int64; each comes exactly once per epoch, unless the last partial batch is dropped.
        views: what each batch holds of its samples.
        batch: samples per batch, over all processes.
        seed: of order and augmentation.
        device: where batches arrive; DALI computes there too.
        kind: `auto` is the GPU's memory for a packed set that fits, else DALI where it is installed.
        shuffle: a new order every epoch; otherwise ascending indices.
        drop_last: leave out the last batch of an epoch where it is smaller than `batch`.
        threads: that decode and augment on the CPU.
        quarantine: a file that broke since the scan is dropped instead of ending the run.
        labels: (N,) int64 over all samples.
        rank: number of this process among those that share each batch.
        world: how many they are. Each gets its part of the very batches that one process alone would get;
            with `quarantine` all must ask for each batch together.

    Raises:
        ConfigError: there is not a single batch, it cannot be shared evenly, or files cannot be resident.
        MachineError: DALI or a GPU is asked for and missing.
    """
    if len(indices) < (batch if drop_last else 1):
        raise ConfigError(
            f"batch is {batch} with {len(indices)} samples; an epoch needs at least one full batch. "
            "Lower the batch size or add images."
        )
    must_be_shared(batch, world)
    if device.type == "cuda" and device.index is None:  # a thread's current device is GPU 0, whatever ours is
        device = torch.device("cuda", torch.cuda.current_device())
    schedule = Schedule(
        indices, batch=batch, seed=seed, shuffle=shuffle, drop_last=drop_last, rank=rank, world=world
    )
    return _Loader(
        samples, views, schedule, streams(kind, samples, device), device=device, threads=threads,
        quarantine=quarantine, labels=labels,
    )  # fmt: skip


def streams(kind: str, samples: Samples, device: torch.device) -> tuple[str, type[Stream]]:
    """The name of a loader of this kind, and what computes its views.

    Raises:
        ConfigError: the images are to lie on the GPU, but are files.
        MachineError: DALI or the GPU is asked for and missing.
    """
    must_be_possible(kind, device)
    if kind == "resident":
        must_be_packed(samples)
    fused = can_fuse(device)
    if kind == "resident" or (kind == "auto" and fused and fits(samples, device)):
        return "resident", ResidentStream
    if fused and kind != "batched" and samples.array is not None:
        return "upload", UploadStream
    if kind == "batched" or not has_dali():
        return "batched", BatchedStream
    return ("dali-gpu", DecodedStream) if fused else ("dali-cpu", DaliStream)


def must_be_possible(kind: str, device: torch.device) -> None:
    """Raises MachineError if DALI or the GPU is asked for and missing."""
    if kind == "dali" and not has_dali():
        raise MachineError(
            "loader is 'dali'; the package nvidia-dali is not installed. "
            "Run `pip install noisyssl[train]` on Linux, or choose loader = 'batched'."
        )
    if kind == "resident" and not can_fuse(device):
        raise MachineError(
            "loader is 'resident', which keeps the images in a GPU's memory; it takes an NVIDIA GPU, "
            "and Triton, which comes with PyTorch on Linux. Set data.loader=auto."
        )


def has_dali() -> bool:
    """Whether DALI is installed."""
    return find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None


class _Loader:
    def __init__(
        self,
        samples: Samples,
        views: Sequence[View],
        schedule: Schedule,
        named: tuple[str, type[Stream]],
        *,
        device: torch.device,
        threads: int,
        quarantine: bool,
        labels: Tensor | None,
    ) -> None:
        self.name, self._kind = named
        why = unfused(device) if device.type == "cuda" else ""
        self.note = f"the GPU does not make the views: {why}." if why else ""
        self.labels = labels
        self.dropped: dict[int, str] = {}
        self.position = (0, 0)
        self._samples, self._views, self._schedule = samples, views, schedule
        self._device, self._threads, self._quarantine = device, threads, quarantine
        self._stream: Stream | None = None

    def __len__(self) -> int:
        return self._schedule.count

    def start(self, epoch: int, position: int, dropped: Mapping[int, str] = {}) -> None:
        self.close()
        self.position, self.dropped = (epoch, position), dict(dropped)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def __iter__(self) -> Iterator[Batch]:
        epoch = self.position[0]
        while self._opened().flying[0].place[0] == epoch:
            fetched = self._fetch()
            if fetched is not None:
                yield self._batch(*fetched)

    def _opened(self) -> Stream:
        if self._stream is None:
            slots = self._schedule.slots(*self.position, self.dropped)
            self._stream = self._kind(
                self._samples, self._views, slots, batch=-(-self._schedule.largest // self._schedule.world),
                seed=self._schedule.seed, device=self._device, threads=self._threads,
            )  # fmt: skip
            self.position = self._stream.flying[0].place
        return self._stream

    def _fetch(self) -> tuple[Slot, tuple[Tensor, ...]] | None:
        """The next batch; None where broken files were dropped, so that what comes next has changed."""
        stream = self._opened()
        slot = stream.flying[0]
        views, broken = None, {}
        try:
            views = next(stream)
        except Exception as error:  # DALI has no exception of its own for a file that it cannot decode
            broken = self._broken(error, stream.flying)
        if self._quarantine and self._schedule.world > 1:
            # JSON keys are text; what one process found changes every process's part of the batches
            found = exchange({str(index): reason for index, reason in broken.items()})
            broken = {int(index): reason for one in found for index, reason in one.items()}
        if broken or views is None:
            self.close()
            self.dropped |= broken
            return None
        self.position = stream.flying[0].place
        return slot, views

    def _broken(self, error: Exception, flying: Sequence[Slot]) -> dict[int, str]:
        """The broken files among those in flight, to be dropped: DALI's error may belong to any of them."""
        self.close()
        broken: dict[int, str] = {}
        for index in np.concatenate([slot.index for slot in flying]).tolist():
            try:
                self._samples.image(index)
            except BadImage as reason:
                broken[index] = str(reason)
        if not broken:
            raise error
        if not self._quarantine:
            raise DataError(
                f"{next(iter(broken.values()))}; it was whole when the data were scanned. "
                "Restore it, or pass --quarantine to drop such files and go on."
            ) from error
        return broken

    def _batch(self, slot: Slot, views: tuple[Tensor, ...]) -> Batch:
        index = torch.from_numpy(slot.index)
        labels = self.labels
        return Batch(
            views=views,
            index=sent(index, self._device),
            key=sent(keys(self._schedule.seed, slot.place[0], slot.index), self._device),
            label=None if labels is None else sent(labels[index], self._device),
        )
