"""`noisyssl bench engines`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from noisyssl.benchmarks.records import Record

Bundle = Annotated[
    Path | None,
    typer.Argument(help="Bundle with fp16 and int8; a random ResNet-18 at 224 pixels without one."),
]


def measured(bundle: Path | None) -> "list[Record]":
    """The records that `bench engines` tells."""
    from noisyssl.benchmarks.engines import measure

    return [measure(bundle)]
