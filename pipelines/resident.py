"""Packed images in the GPU's memory: copied there once, for all loaders that are open."""

import weakref

import numpy as np
import torch

from noisyssl.errors import ConfigError, MachineError
from noisyssl.pipelines.samples import Samples

SHARE = 0.6
"""Of the GPU's free memory that images may take without being asked."""
PART = 1 << 28
"""Bytes copied at a time."""


class Store:
    """The pixels of one array on one device."""

    def __init__(self, array: np.ndarray, device: torch.device) -> None:
        self.array = array  # kept, so that its id stays its own
        self.pixels = torch.empty(array.shape, dtype=torch.uint8, device=device)
        step = max(1, PART // (array[0].size or 1))
        for first in range(0, len(array), step):
            part = np.array(array[first : first + step])  # memory maps are read-only, which torch warns about
            self.pixels[first : first + step] = torch.from_numpy(part).to(device)


_stores: "weakref.WeakValueDictionary[tuple[int, str], Store]" = weakref.WeakValueDictionary()
"""One copy serves all loaders that are open at a time."""


def store(samples: Samples, device: torch.device) -> Store:
    """The pixels of `samples` on `device`.

    Raises:
        MachineError: they do not fit.
    """
    assert samples.array is not None
    key = id(samples.array), str(device)
    if (found := _stores.get(key)) is None:
        try:
            found = _stores[key] = Store(samples.array, device)
        except torch.OutOfMemoryError as error:
            raise MachineError(
                f"the images take {bytes_of(samples) / 2**30:.1f} GiB, more than the GPU has free; "
                "set data.loader=auto."
            ) from error
    return found


def bytes_of(samples: Samples) -> int:
    """Bytes of the decoded images of a packed source."""
    return 0 if samples.array is None else int(np.prod(samples.array.shape, dtype=np.int64))


def fits(samples: Samples, device: torch.device) -> bool:
    """Whether `auto` keeps these images on the GPU: packed, and at most `SHARE` of its free memory."""
    if device.type != "cuda" or samples.array is None:
        return False
    if (id(samples.array), str(device)) in _stores:
        return True
    return bytes_of(samples) <= SHARE * torch.cuda.mem_get_info(device)[0]


def must_be_packed(samples: Samples) -> None:
    """Raises ConfigError where images are files."""
    if samples.array is None:
        raise ConfigError(
            "data.loader is 'resident', but the images are files; "
            "run `noisyssl data pack` and give its folder, or set data.loader=auto."
        )
