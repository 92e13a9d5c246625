"""`noisyssl audit`: labels that are likely wrong, ranked; `noisyssl data apply` acts on what was decided."""

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from noisyssl.cli.options import Device, Json, Quarantine
from noisyssl.cli.progress import counting, tell
from noisyssl.errors import ConfigError, pick

if TYPE_CHECKING:
    from noisyssl.pipelines.samples import Samples


def audit(
    data: Annotated[Path, typer.Argument(help="Labelled images; all splits are audited.")],
    *,
    features: Annotated[Path, typer.Option(help="Run of `noisyssl pretrain`, or of `train`, that looks.")],
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    flagged: Annotated[
        str, typer.Option(help="Decision beside flagged images: keep (you decide), relabel or drop.")
    ] = "keep",
    shown: Annotated[int, typer.Option(min=1, help="Images on the page.")] = 200,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of folds and bootstrap.")] = 0,
    device: Device = None,
    quarantine: Quarantine = None,
    as_json: Json = False,
) -> None:
    """Find labels that are likely wrong: audit.csv, audit.json and a page to judge by eye."""
    from noisyssl.disk import write_whole
    from noisyssl.pipelines.audit import audit as run_audit
    from noisyssl.pipelines.audit import facts
    from noisyssl.pipelines.audit_page import page
    from noisyssl.pipelines.audit_table import DECISIONS, audit_text
    from noisyssl.pipelines.embed import frozen_backbone
    from noisyssl.pipelines.run import Run
    from noisyssl.pipelines.setup import device_of, threads_of

    pick(dict.fromkeys(DECISIONS), flagged, "--flagged")
    if out.exists():
        raise ConfigError(f"--out {out} already exists; give a new folder.")
    frozen, where, threads = frozen_backbone(features), device_of(device or "auto"), threads_of(0)
    samples = opened(data, quarantine)
    if Run.open(features).facts()["stage"] == "train":
        tell(
            f"note: {features} learnt labels: wrong ones that it knows by heart look right to it. "
            "A run of `noisyssl pretrain` has seen none."
        )
    with counting("looking at images") as progress:
        found = run_audit(samples, frozen, where, threads, seed=seed, progress=progress)
    told = facts(found, samples.classes) | {"features": frozen.what, "weights_sha256": frozen.digest}
    out.mkdir(parents=True)
    write_whole(out / "audit.csv", audit_text(found, samples, flagged).encode("utf-8", "surrogateescape"))
    write_whole(out / "audit.json", (json.dumps(told, indent=2) + "\n").encode())
    look = page(found, samples, shown, flagged, frozen.size, frozen.fit, threads)
    write_whole(out / "index.html", look.encode("utf-8", "replace"))
    if as_json:
        typer.echo(json.dumps(told))
        return
    rate, low, high = found.rate
    typer.echo(
        f"{len(found.rows):,} labels judged on features of {frozen.what}, by regressions that saw no image "
        "of the same group."
    )
    typer.echo(
        f"About {rate:.1%} are wrong (95 % interval {low:.1%} to {high:.1%}); {told['flagged']:,} flagged."
    )
    for name, row in zip(samples.classes, found.matrix, strict=True):
        shares = ", ".join(f"{other} {share:.2f}" for other, share in zip(samples.classes, row, strict=True))
        typer.echo(f"  truly {name}: labelled {shares}")
    typer.echo(f"{out / 'index.html'} shows the most suspicious; {out / 'audit.csv'} lists all of them.")
    typer.echo(next_step(data, out / "audit.csv", samples))


def next_step(data: Path, table: Path, samples: "Samples") -> str:
    """How the decisions get into the data: a CSV names files, which packed images and arrays are not."""
    if samples.array is None:
        return f"Next: noisyssl data apply {quote(str(data))} {quote(str(table))} --out NEW.csv"
    if data.is_dir():
        command = f"noisyssl data apply SOURCE {quote(str(table))} --out NEW.csv"
        return f"Next: {command}, where SOURCE is what {data} was packed from; then pack NEW.csv."
    return f"Labels of an .npz cannot be changed here; change them where {data} was made, by {table}."


def apply(
    data: Annotated[Path, typer.Argument(help="The audited images: class folders or a CSV.")],
    decisions: Annotated[Path, typer.Argument(metavar="AUDIT.csv", help="With what was decided.")],
    *,
    out: Annotated[Path, typer.Option(help="CSV to write, in a folder above the images; must not exist.")],
    quarantine: Quarantine = None,
) -> None:
    """Write a CSV of the data with an audit's decisions: labels kept, changed, images dropped."""
    from noisyssl.disk import write_whole
    from noisyssl.pipelines.audit_table import applied

    if out.exists():
        raise ConfigError(f"--out {out} already exists; name a new file.")
    samples = opened(data, quarantine)
    text, counts = applied(samples, decisions, out)
    write_whole(out, text.encode("utf-8", "surrogateescape"))
    typer.echo(
        f"{out}: {counts['keep']:,} labels kept, {counts['relabel']:,} changed, {counts['drop']:,} dropped."
    )


def opened(data: Path, quarantine: bool | None) -> "Samples":
    """Labelled samples; what training would refuse (leaks, small classes) is no matter here."""
    from noisyssl.pipelines.scan import open_samples

    with counting("checking images") as progress:
        samples = open_samples(
            data,
            quarantine=bool(quarantine),
            allow_leaks=True,
            labelled=True,
            classify=False,
            progress=progress,
        )
    for note in samples.notes:
        tell(f"note: {note}")
    return samples
