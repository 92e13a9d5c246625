"""`noisyssl predict`: a bundle's labels for images, as a table, JSON lines or CSV."""

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from noisyssl.errors import ConfigError, DataError
from noisyssl.pipelines.tables import quote

if TYPE_CHECKING:
    from noisyssl.deploy.predict import Row


class Style(Protocol):
    """How a row is written."""

    def start(self) -> str: ...
    def line(self, row: "Row") -> str: ...


def predict(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder written by `noisyssl export`.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, folders, or CSVs with a column 'path'.")],
    runtime: Annotated[
        str, typer.Option(help="onnx, onnx-tensorrt, torch, tensorrt, or triton: a server.")
    ] = "onnx",
    precision: Annotated[str, typer.Option(help="fp32, or fp16 or int8 where the bundle has it.")] = "fp32",
    batch: Annotated[int, typer.Option(help="Images per call of the runtime.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto: a GPU where there is one.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads that decode, and that compute.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV with one column per class.")] = False,
) -> None:
    """Label images with a bundle; a broken file gets a row with its reason, the others are served.

    Exit code 0 when at least one image was served, 5 when none could be.
    """
    from noisyssl.deploy.predict import predict as rows_of
    from noisyssl.deploy.predict import sources
    from noisyssl.deploy.runtime import open_runtime

    if as_json and as_csv:
        raise ConfigError("--json and --csv are both given; choose one.")
    if not 1 <= batch <= 4096:
        raise ConfigError(f"--batch is {batch}; it must lie in 1-4096.")
    left_out: Counter[str] = Counter()
    items = sources(images, left_out)
    served = failed = 0
    try:
        where = None if device == "auto" else device
        with open_runtime(bundle, runtime, where, threads, precision) as opened:
            given = opened.manifest.classes, opened.manifest.threshold()
            style: Style = Json(*given) if as_json else Csv(*given) if as_csv else Table(*given)
            sys.stdout.write(style.start())
            for row in rows_of(opened, items, batch=batch, threads=threads):
                sys.stdout.write(f"{style.line(row)}\n")
                sys.stdout.flush()
                failed += row.error is not None
                served += row.error is None
    except BrokenPipeError:  # `| head` has seen enough; caught here because Typer would exit with 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if masks := left_out["masks"]:
        typer.echo(
            f"note: {masks:,} files in folders of masks beside a folder 'images' were left out, as in "
            "training; name such a folder itself to label it.",
            err=True,
        )
    if failed:
        if not served:
            raise DataError(f"all {failed:,} images could not be read; their rows say why. Check the paths.")
        typer.echo(
            f"{failed:,} of {served + failed:,} images could not be read; their rows say why.", err=True
        )


class Table:
    """Aligned columns: label, probability, path; the path is last, as its length is not known ahead."""

    def __init__(self, classes: Sequence[str], threshold: float | None = None) -> None:
        self.classes, self.threshold = [printable(name) for name in classes], threshold
        self.width = max(len("label"), *map(len, self.classes))

    def start(self) -> str:
        return self._columns("label", "probability", "path", "sure") + "\n"

    def line(self, row: "Row") -> str:
        if row.probabilities is None:
            return self._columns("error", "-", printable(f"{row.path}: {row.error}"), "-")
        best = int(row.probabilities.argmax())
        sure = "yes" if is_sure(row, self.threshold) else "no"
        return self._columns(self.classes[best], f"{row.probabilities[best]:.4f}", printable(row.path), sure)

    def _columns(self, label: str, probability: str, path: str, sure: str) -> str:
        middle = "" if self.threshold is None else f"{sure:<4}  "
        return f"{label:<{self.width}}  {probability:<11}  {middle}{path}"


class Json:
    """One object per line: path, label, probability[, sure], probabilities by class; or path, error."""

    def __init__(self, classes: Sequence[str], threshold: float | None = None) -> None:
        self.classes, self.threshold = classes, threshold

    def start(self) -> str:
        return ""

    def line(self, row: "Row") -> str:
        fields: dict[str, object] = {"path": row.path}
        if row.probabilities is None:
            fields["error"] = row.error
        else:
            best = int(row.probabilities.argmax())
            values = [round(float(value), 6) for value in row.probabilities]
            fields |= {"label": self.classes[best], "probability": values[best]}
            if self.threshold is not None:
                fields["sure"] = is_sure(row, self.threshold)
            fields["probabilities"] = dict(zip(self.classes, values, strict=True))
        return json.dumps(fields)


class Csv:
    """path, label, probability[, sure], error, then a column `p_CLASS` per class; cells by `tables.quote`."""

    def __init__(self, classes: Sequence[str], threshold: float | None = None) -> None:
        self.classes, self.threshold = classes, threshold

    def start(self) -> str:
        names = [f"p_{name}" for name in self.classes]
        return self._row(["path", "label", "probability", *self._sure("sure"), "error", *names]) + "\n"

    def line(self, row: "Row") -> str:
        if row.probabilities is None:
            empty = ("" for _ in self.classes)
            return self._row([row.path, "", "", *self._sure(""), row.error or "", *empty])
        best = int(row.probabilities.argmax())
        values = [f"{value:.6f}" for value in row.probabilities]
        sure = self._sure("yes" if is_sure(row, self.threshold) else "no")
        return self._row([row.path, self.classes[best], values[best], *sure, "", *values])

    def _sure(self, cell: str) -> list[str]:
        return [] if self.threshold is None else [cell]

    def _row(self, cells: Sequence[str]) -> str:
        line = Line()
        csv.writer(line, lineterminator="").writerow([quote(printable(cell)) for cell in cells])
        return line.text


def is_sure(row: "Row", threshold: float | None) -> bool:
    """Whether the row's answer reaches the bundle's threshold; without one every answer does."""
    return threshold is None or bool(row.probabilities is not None and row.probabilities.max() >= threshold)


class Line:
    """The file that `csv` wants, for one row."""

    text = ""

    def write(self, text: str) -> None:
        self.text += text


def printable(text: str) -> str:
    """`text` with control characters and undecodable bytes escaped, so that one row stays one line."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in text
    )
