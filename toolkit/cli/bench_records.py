"""Records on the terminal and in files, and the options that every benchmark has."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from noisyssl.cli.figures import interval

if TYPE_CHECKING:
    from noisyssl.benchmarks.records import Record

Out = Annotated[Path | None, typer.Option(help="JSON-lines file to append the records to.")]
Threads = Annotated[int, typer.Option(help="CPU threads of every side; 0 is one per core.")]
Runs = Annotated[int, typer.Option(help="Counted rounds; the sides take turns.")]


def tell(found: "Iterable[Record]", out: Path | None, as_json: bool) -> None:
    """Print each record as it comes, and keep it where asked."""
    from noisyssl.benchmarks.records import write

    for one in found:
        if out is not None:
            write(out, one)
        if as_json:
            typer.echo(json.dumps(one))
            continue
        settings = ", ".join(f"{k} {v}" for k, v in one["settings"].items() if not isinstance(v, list))
        typer.echo(f"{one['question']}: {settings}")
        for name, value in one["figures"].items():
            row = value if isinstance(value, dict) else {"": value}
            typer.echo(f"  {name:<28} " + "  ".join(f"{k} {_number(v)}".strip() for k, v in row.items()))


def _number(value: object) -> str:
    if isinstance(value, dict):
        return interval(value).strip()
    return f"{value:.4g}" if isinstance(value, float) else str(value)
