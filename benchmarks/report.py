"""One self-contained HTML page about a run or a bundle: where it goes, and how it is rendered.

Names of classes and files are hostile input: the template escapes every value, and a content security policy
in the page forbids scripts and requests.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from noisyssl import __version__
from noisyssl.benchmarks import tables
from noisyssl.benchmarks.pages import Page, bundle_page, run_page
from noisyssl.benchmarks.records import Record
from noisyssl.deploy.bundle import MANIFEST
from noisyssl.disk import write_whole
from noisyssl.errors import ConfigError, MachineError

MARK = b'<meta name="generator" content="noisyssl report">'
FIGURES = {
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "macro_f1": "macro-F1",
    "macro_auroc": "macro-AUROC",
    "calibration_error": "calibration error",
}
"""Scalar figures in the order of the page; calibration error is the one that should be small."""


def write_report(
    source: Path, out: Path | None = None, data: Path | None = None, records: Sequence[Record] = ()
) -> Path:
    """Write the page about the run or bundle `source`; the path of the page.

    Args:
        out: the file to write; `report.html` inside a run by default, required for a bundle.
        data: where the images are now; by default where the run's `data.path` says.
        records: speed records to show, oldest first.

    Raises:
        ConfigError: `source` is neither run nor bundle, or `out` is missing, exists or lies in the bundle.
        BundleError: the bundle was altered.
        DataError: the run's own files are broken.
        MachineError: a package is missing, or the disk is full.
    """
    is_bundle = (source / MANIFEST).is_file()
    if not is_bundle and not (source / "config.toml").is_file():
        what = "holds neither config.toml nor manifest.json" if source.is_dir() else "is no folder"
        raise ConfigError(f"{source} {what}; give the folder of a run or of a bundle.")
    target = _target(source, out, is_bundle)
    page = bundle_page(source) if is_bundle else run_page(source, data)
    page["speed"] = [
        (tables.words(question), tables.tables(question, records))
        for question in dict.fromkeys(one["question"] for one in records)
        if question in tables.TABLES
    ]
    write_whole(target, render(page))
    return target


def _target(source: Path, out: Path | None, is_bundle: bool) -> Path:
    if out is None:
        if is_bundle:
            raise ConfigError(
                "--out is missing; a bundle is never written into. Name an HTML file outside it."
            )
        return source / "report.html"
    here, place = source.resolve(), out.resolve()
    if is_bundle and here in place.parents:
        raise ConfigError(
            f"--out {out} lies in the bundle; a bundle is never written into. Name another file."
        )
    own = not is_bundle and place.parent in (here, here.parent) and _is_report(out)
    if out.exists() and not own:
        raise ConfigError(
            f"--out {out} already exists; only an earlier report in or beside its run is replaced. "
            "Name a new file."
        )
    return out


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return MARK in file.read(2000)


def render(page: Page) -> str:
    """The HTML of a page; raises as `environment`."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return (
        environment()
        .get_template("report.html")
        .render(page=page, names=FIGURES, version=__version__, today=today)
    )


def environment() -> Any:
    """The templates of pages: every value is escaped, a missing one is an error.

    Raises:
        MachineError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise MachineError(
            "package 'jinja2' is missing; the report is made with it. Run `pip install 'noisyssl[report]'`."
        ) from None
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    found.filters |= {"figure": tables.cell, "words": tables.words, "svg": Markup}
    return found
