"""`noisyssl deploy`: a bundle as a Triton model repository, its versions, and the way back."""

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisyssl.cli.options import Json
from noisyssl.errors import ExportError

if TYPE_CHECKING:
    from noisyssl.deploy.triton_models import Version
    from noisyssl.deploy.triton_repository import Repository

app = typer.Typer(no_args_is_help=True, help="Serve a bundle: Triton model repositories and their versions.")
Folder = Annotated[Path, typer.Argument(help="Repository written by `noisyssl deploy triton`.")]


@app.command()
def triton(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder written by `noisyssl export`.")],
    repository: Annotated[
        Path, typer.Argument(help="Folder to create, or a repository to add a version to.")
    ],
    precision: Annotated[
        str, typer.Option(help="fp32, fp16, int8 (for CPUs) or int8-trt, as far as the bundle has them.")
    ] = "fp32",
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Image files, folders or CSVs, 100 images or more: prove the ensemble on them, which takes "
            "encoded files. Without it there is none. May be given again."
        ),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model; by default noisyssl.")] = None,
    batch: Annotated[int, typer.Option(help="Largest batch of one request.")] = 64,
    threads: Annotated[
        int, typer.Option(help="CPU threads of one run; 0 is one per core, 1 suits small networks.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Write a Triton model repository, or add the bundle to one as its next version.

    Exit code 4 when the ensemble misses its limits: the repository is written without it.
    """
    from noisyssl.deploy.triton_models import version
    from noisyssl.deploy.triton_repository import deploy

    new = version(bundle, precision=precision, batch=batch, threads=threads)
    failed: ExportError | None = None
    if images:
        new, failed = _with_ensemble(bundle, new, images, batch)
    made = deploy(repository, new, name)
    _tell(made, new.left_out, as_json)
    if failed is not None:
        raise failed


@app.command()
def rollback(
    repository: Folder,
    version: Annotated[
        int | None, typer.Option(help="Version to serve; by default the one before the active one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Serve an older version again, from the server's next start on."""
    from noisyssl.deploy.triton_repository import roll_back

    _tell(roll_back(repository, version), [], as_json)


def _with_ensemble(
    bundle: Path, new: "Version", images: list[Path], batch: int
) -> tuple["Version", ExportError | None]:
    """The version with its ensemble, or without and the reason."""
    from noisyssl.deploy.predict import sources
    from noisyssl.deploy.runtime import open_runtime
    from noisyssl.deploy.triton_models import with_ensemble
    from noisyssl.deploy.triton_parity import measure, must_hold
    from noisyssl.pipelines.dali_serving import serialized, viewer

    with open_runtime(bundle, "onnx", "cpu") as runtime:
        geometry = runtime.manifest.geometry
        graph = serialized(geometry.size, geometry.fit, batch)
        parity = measure(runtime, sources(images), viewer(graph))
    try:
        must_hold(parity)
    except ExportError as error:
        return new, error
    return with_ensemble(new, graph, parity), None


def _tell(made: "Repository", left_out: list[str], as_json: bool) -> None:
    record = made.record
    active: dict[str, Any] = made.active
    if as_json:
        shown = {**record, "left_out": left_out}
        typer.echo(json.dumps(shown))
        return
    versions = ", ".join(record["versions"])
    typer.echo(
        f"{made.folder}: serves version {record['active']} (of {versions}), {active['precision']}, "
        f"{len(record['classes'])} classes, {record['size']} pixels, batch up to {record['batch']}"
    )
    for model, kind in made.models.items():
        typer.echo(f"  {model:<28} {kind}")
    if parity := active["dali"]:
        typer.echo(
            f"  ensemble proved on {parity['images']} images: "
            f"{parity['mean_difference']:.2f}/255 on average, {100 * parity['equal_top1']:.2f} % equal top-1"
        )
    for line in left_out:
        typer.echo(f"  {line}")
    typer.echo(
        f"Next: noisyssl serve {quote(str(made.folder))}   (or its launch.sh, with the official container)"
    )
