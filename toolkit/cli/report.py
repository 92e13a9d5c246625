"""`noisyssl report`: one HTML page about a run or a bundle."""

from pathlib import Path
from typing import Annotated

import typer

from noisyssl.errors import ConfigError


def report(
    source: Annotated[Path, typer.Argument(metavar="RUN|BUNDLE", help="Folder of a run or of a bundle.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; RUN/report.html by default. A bundle needs it.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Where the images are now, for the sample pictures.")
    ] = None,
    records: Annotated[Path | None, typer.Option(help="Folder of speed records (*.jsonl) to show.")] = None,
) -> None:
    """Write one self-contained HTML page: figures with intervals, curves, samples, parity, environment."""
    from noisyssl.benchmarks.records import read
    from noisyssl.benchmarks.report import write_report

    if records is not None and not records.is_dir():
        raise ConfigError(f"--records {records} is no folder; give one that holds *.jsonl records.")
    typer.echo(write_report(source, out, data, read(records) if records else ()))
