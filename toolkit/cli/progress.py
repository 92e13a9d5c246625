"""What a person sees while a command works: a bar on a terminal, plain lines elsewhere, always on stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer


@contextmanager
def training_progress(title: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A callable that takes the run's log entries; among several processes only the first one shows them."""
    from noisyssl.distributed import rank

    if rank() > 0:
        yield lambda entry: None
        return
    if not sys.stderr.isatty():
        yield _plain(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=1.0, figures="")

        def show(entry: dict[str, Any]) -> None:
            if entry["kind"] == "step":
                progress.update(task, completed=entry["progress"], figures=_figures(entry))
            elif (line := _line(entry)) is not None:
                progress.console.print(f"{title}: {line}", markup=False, highlight=False)

        yield show


def tell(line: str) -> None:
    """One line on stderr. Whoever reads it may leave (`2>&1 | head`): the work goes on."""
    with suppress(OSError):
        typer.echo(line, err=True)


def _plain(title: str) -> Callable[[dict[str, Any]], None]:
    began = time.monotonic()
    shown = [0.0]

    def show(entry: dict[str, Any]) -> None:
        now = time.monotonic()
        if entry["kind"] == "step":
            if now - shown[0] < 10:  # a line every ten seconds is enough for a log file
                return
            shown[0] = now
            left = (now - began) * (1 - entry["progress"]) / max(1e-9, entry["progress"])
            tell(f"{title}: {entry['progress']:4.0%} {_figures(entry)}, {left:.0f} s left")
        elif (line := _line(entry)) is not None:
            tell(f"{title}: {line}")

    return show


def _figures(entry: dict[str, Any]) -> str:
    loss = "-" if entry["loss"] is None else f"{entry['loss']:.3f}"
    return f"epoch {entry['epoch']}/{entry['epochs']} loss {loss} {entry['images_per_s']:.0f} images/s"


def _line(entry: dict[str, Any]) -> str | None:
    if entry["kind"] == "epoch" and "val" in entry:
        return f"epoch {entry['epoch']} validation balanced accuracy {entry['val']['balanced_accuracy']:.3f}"
    if entry["kind"] == "probe":
        scores = [
            f"{words} {entry[name]['balanced_accuracy']:.3f}"
            for name, words in (("knn", "k-NN"), ("linear", "linear probe"))
            if name in entry
        ]
        told = f"validation balanced accuracy: {', '.join(scores)}; " if scores else ""
        return f"epoch {entry['epoch']} {told}effective rank {entry['effective_rank']:.1f}"
    if entry["kind"] == "warning":
        return f"warning: {entry['message']}"
    if entry["kind"] in ("weights", "compile", "batch"):
        return str(entry["message"])
    if entry["kind"] == "start":
        resumed = f", resumed from {entry['resumed']}" if entry["resumed"] else ""
        return f"{entry['loader']} loader on {entry['device']}{resumed}"
    return None


@contextmanager
def counting(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A callable that takes (images done, images in all), or None where nobody watches."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title)
        yield lambda done, total: progress.update(task, completed=done, total=total)
