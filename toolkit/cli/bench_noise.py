"""`noisyssl bench noise`: a grid of trainings under label noise, and its report."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisyssl.cli.options import Json, open_data
from noisyssl.cli.progress import tell
from noisyssl.errors import ExportError, TrainingError

if TYPE_CHECKING:
    from noisyssl.benchmarks.records import Record


def noise(
    grid: Annotated[str, typer.Argument(help="TOML file, or a shipped grid, such as small-histology.")],
    work: Annotated[Path, typer.Option(help="Folder of the runs and of the report; finished runs are kept.")],
    data: Annotated[Path | None, typer.Option(help="Labelled data, where the grid names none.")] = None,
    on: Annotated[
        str, typer.Option(help="local, ray (starts a cluster on this machine) or ray://HOST:PORT.")
    ] = "local",
    threads: Annotated[int, typer.Option(help="CPU threads of each training; 0 is what the grid says.")] = 0,
    out: Annotated[Path | None, typer.Option(help="JSON-lines file to append the record to.")] = None,
    as_json: Json = False,
) -> None:
    """Pretraining x objective x noise x rate x seed: accuracy BEST and LAST, gains, what is served."""
    from noisyssl.benchmarks import noise as cells
    from noisyssl.benchmarks import noise_page
    from noisyssl.benchmarks.noise_grid import read_grid
    from noisyssl.benchmarks.records import write
    from noisyssl.pipelines.signals import caught

    if on != "local" and not threads:
        threads = 1  # a task each: as many at a time as there are cores, and the same on every node
    asked = read_grid(grid, data, threads or None)
    place = cells.Place(folder=work.absolute())
    first = cells.settled(asked.config(asked.cells[0]))
    if on != "local":
        from noisyssl.benchmarks.noise_ray import connect, run_all

        connect(on)
    samples = open_data(first, labelled=True)
    cells.must_agree(asked, place, samples)
    if on != "local":
        run_all(asked, place, tell)
    else:
        with caught() as stopped:
            cells.run_all(asked, place, samples, tell, stopped)
    found = noise_page.write(asked, place, samples)  # before exports, which may be refused
    if refused := cells.export_all(asked, place, exported, tell) if asked.exported else []:
        tell(f"{len(refused)} of {len(asked.exported)} cells could not be exported; the report says why.")
    if asked.exported:
        found = noise_page.write(asked, place, samples)
    _tell(found, place.folder, out, as_json)
    if out is not None:
        write(out, found)
    if failed := cells.failures(asked, place):
        name, error = next(iter(failed.items()))
        raise TrainingError(
            f"{len(failed)} of {len(asked.cells)} cells failed, "
            f"first {name}: {error.strip().splitlines()[-1]} "
            "The others are in the report; the same command tries the failed ones again."
        )
    if refused:
        raise ExportError(f"{refused[0]} Accuracies are in the report; the same command exports again.")


def exported(run: Path, bundle: Path, precisions: tuple[str, ...]) -> dict[str, Any]:
    """The manifest of a new bundle of `run`; no engine, which needs the target's GPU."""
    from noisyssl.cli.export import write_bundle

    return asdict(write_bundle(run, bundle, tensorrt="none", precision=",".join(precisions)))


def _tell(found: "Record", folder: Path, out: Path | None, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo((folder / "report.md").read_text(encoding="utf-8"))
    typer.echo(f"report  {folder / 'report.html'}")
