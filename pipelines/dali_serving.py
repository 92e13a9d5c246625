"""The evaluation view as a DALI graph for a server: bytes of an image file in, (size, size, 3) uint8 out.

It is `geometry.evaluation_view` in DALI's operators: one antialiased triangular resampling of the same box.
The serialized graph is the `model.dali` of Triton's DALI backend, which runs it on the CPU.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from noisyssl.errors import pick

INPUT = "encoded"
"""Name of the graph's input: (L,) uint8, a whole JPEG, PNG, TIFF, BMP or WebP file; zeros may follow it."""


def serialized(size: int, fit: str, batch: int = 64) -> bytes:
    """The graph for at most `batch` files at a time.

    Raises:
        ConfigError: unknown fit.
    """
    fn, types, pipeline_def = _dali().fn, _dali().types, _dali().pipeline_def
    resample = pick(FITS, fit, "data.fit")

    @pipeline_def(batch_size=batch, num_threads=2, device_id=None)
    def graph() -> Any:
        encoded = fn.external_source(name=INPUT, dtype=types.UINT8, ndim=1, device="cpu")
        # Pillow decodes with libjpeg's smooth chroma upsampling, which DALI calls fancy
        image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB, jpeg_fancy_upsampling=True)
        return resample(image, size, {"interp_type": types.INTERP_LINEAR, "antialias": True})

    return bytes(graph().serialize())


def viewer(graph: bytes) -> Callable[[bytes], np.ndarray | None]:
    """What a server makes of one file with this graph: (size, size, 3) uint8, or None where DALI cannot."""
    from nvidia.dali import Pipeline

    def opened() -> Any:
        return Pipeline.deserialize(
            serialized_pipeline=graph, batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1
        )

    pipes = [opened()]

    def view(data: bytes) -> np.ndarray | None:
        try:
            pipes[0].feed_input(INPUT, [np.frombuffer(data, np.uint8)])
            (out,) = pipes[0].run()
            return np.array(out.at(0))
        except RuntimeError:  # DALI's own; its pipeline is dead after that
            pipes[0] = opened()
            return None

    return view


def _dali() -> Any:
    """The package, imported where it is used; its stubs know less of it than it has."""
    import nvidia.dali.fn
    import nvidia.dali.math
    import nvidia.dali.types

    return nvidia.dali


def _crop(image: Any, size: int, how: dict[str, Any]) -> Any:
    fn, math, types = _dali().fn, _dali().math, _dali().types
    shape = image.shape(dtype=types.FLOAT)
    height, width = shape[0], shape[1]
    side = math.min(height, width)
    start = fn.stack((height - side) / 2, (width - side) / 2)
    end = fn.stack((height + side) / 2, (width + side) / 2)
    return fn.resize(image, size=[size, size], roi_start=start, roi_end=end, roi_relative=False, **how)


def _squash(image: Any, size: int, how: dict[str, Any]) -> Any:
    fn = _dali().fn
    return fn.resize(image, size=[size, size], **how)


def _pad(image: Any, size: int, how: dict[str, Any]) -> Any:
    fn, math, types = _dali().fn, _dali().math, _dali().types
    shape = image.shape(dtype=types.FLOAT64)
    longer = math.max(shape[0], shape[1])
    rows, columns = (_rounded(shape[i] * size / longer) for i in (0, 1))
    small = fn.resize(image, resize_y=rows, resize_x=columns, **how)
    # the margin before is the smaller one, as in `evaluation_view`
    return fn.crop(
        small, crop=[size, size], rounding="truncate", out_of_bounds_policy="pad", fill_values=0
    )  # fmt: skip


def _rounded(length: Any) -> Any:
    """Python's `round`, halves to even, and at least 1: a row more or less moves the whole image."""
    fn, math, types = _dali().fn, _dali().math, _dali().types
    near, even = math.floor(length + 0.5), 2 * math.floor(length / 2 + 0.5)
    is_half = fn.cast(near - length == 0.5, dtype=types.FLOAT64)
    return fn.cast(math.max(near - is_half * (near - even), 1.0), dtype=types.FLOAT)


FITS: dict[str, Callable[[Any, int, dict[str, Any]], Any]] = {
    "crop": _crop,
    "squash": _squash,
    "pad": _pad,
}
