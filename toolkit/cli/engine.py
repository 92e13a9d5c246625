"""`noisyssl engine`: a bundle with TensorRT engines for this machine, or for cards that are elsewhere."""

import json
from pathlib import Path
from typing import Annotated

import typer

from noisyssl.cli.options import Json
from noisyssl.errors import ConfigError


def engine(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder written by `noisyssl export`; not changed.")],
    out: Annotated[Path, typer.Option(help="Bundle folder to create: the same, with more engines.")],
    tensorrt: Annotated[
        str,
        typer.Option(help="Compute capabilities, such as SM86,SM120; by default the GPU of this machine."),
    ] = "",
    precision: Annotated[str, typer.Option(help="fp32,fp16,int8; by default all that the bundle has.")] = "",
    batch: Annotated[str, typer.Option(help="Smallest, usual and largest batch.")] = "1,8,64",
    flavour: Annotated[str, typer.Option(help="tensorrt, tensorrt_rtx, or auto.")] = "auto",
    timing_cache: Annotated[
        Path | None, typer.Option(help="File that keeps what `tensorrt` measured, for quicker builds.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Build TensorRT engines on the target machine or in its container; writes a new bundle."""
    from noisyssl.deploy.engines import add

    _, sidecars = add(
        bundle, out, precisions=_words(precision), capabilities=_words(tensorrt), profile=_profile(batch),
        flavour=flavour, timing_cache=timing_cache,
    )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(sidecars))
        return
    for one in sidecars:
        typer.echo(
            f"{out / one['name']}: {one['precision']}, {one['flavour']} {one['version']} for "
            f"{', '.join(one['compute_capabilities'])}, {one['bytes'] / 1e6:.1f} MB, {one['build_s']:.1f} s"
        )
        checked = "the network's types" + (" and the engine's inspector" if one["inspected"] else "")
        typer.echo(f"  {one['precision']} proved by {checked}; the same without noisyssl, inside the bundle:")
        typer.echo(f"  {one['command']}")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _profile(text: str) -> tuple[int, int, int]:
    words = _words(text)
    if len(words) != 3 or not all(word.isdecimal() for word in words):
        raise ConfigError(f"--batch is {text!r}; it must be three batch sizes. Write 1,8,64.")
    smallest, usual, largest = map(int, words)
    return smallest, usual, largest
