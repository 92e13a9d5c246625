"""`noisyssl bench dicom`: pixels of DICOM files against other readers, and among themselves."""

from pathlib import Path
from typing import Annotated

import typer

from noisyssl.cli.bench_records import Out, tell
from noisyssl.cli.options import Json


def dicom(
    folder: Annotated[
        Path | None, typer.Argument(help="Folder of DICOM files to compare too; their names are recorded.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Compare DICOM pixels across transfer syntaxes, twins and readers."""
    from noisyssl.benchmarks.dicom_pixels import measure

    tell(measure(folder), out, as_json)
