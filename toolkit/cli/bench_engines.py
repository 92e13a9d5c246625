"""`noisyssl bench engines`: TensorRT engines of each precision, their sizes and seconds."""

from pathlib import Path
from typing import Annotated

import typer

from noisyssl.cli.bench_records import Out, tell
from noisyssl.cli.options import Json


def engines(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Bundle with fp16 and int8; a random ResNet-18 at 224 pixels without one."),
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Build FP32, FP16 and INT8 engines for five architectures."""
    from noisyssl.benchmarks.engines import measure

    tell([measure(bundle)], out, as_json)
