"""Tables of README.md and of docs/ from the records: `python -m noisyssl.benchmarks.tables [--check]`.

Each region between `<!-- record: QUESTION -->` and `<!-- end -->` is rewritten; no figure is typed by hand.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from noisyssl.benchmarks import methods_page
from noisyssl.benchmarks.records import RESULTS, Record, read
from noisyssl.errors import ConfigError, NoisySSLError, near_miss

PAGES = tuple(
    Path(__file__).parents[1] / name
    for name in (
        "README.md",
        "docs/methods.md",
        "docs/performance.md",
        "docs/noise.md",
        "docs/dicom.md",
        "docs/deploy.md",
    )
)
REGION = re.compile(r"(<!-- record: (?P<name>[^>]*?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Cells as text; the first column names the row."""

    title: str = ""
    """What tells this table from the other ones of its question."""
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...]
    """How the numbers were made: one sentence per machine, commit and day."""


def generic(records: Sequence[Record], ignore: Sequence[str] = ()) -> list[Table]:
    """Any records of one question, the newest of each setting: one table per set of figures.

    A row per record and named row, a column per figure and per setting that differs; one record with flat
    figures has a row per figure instead. `ignore` names settings that came out of the measurement.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for one in latest(records, ignore):
        groups.setdefault(tuple(_names(figures for _, figures in _lines(one))), []).append(one)
    differ = _differ([one for group in groups.values() for one in group], ignore)
    return [_table(group, columns, differ, len(groups) > 1, ignore) for columns, group in groups.items()]


def latest(records: Iterable[Record], ignore: Sequence[str] = ()) -> list[Record]:
    """The newest record of each setting and machine, in order of first appearance; `records` oldest first."""
    newest: dict[str, Record] = {}
    for one in records:
        newest[json.dumps(_settings(one, ignore), sort_keys=True)] = one
    return list(newest.values())


def _table(
    records: Sequence[Record],
    columns: Sequence[str],
    differ: Sequence[str],
    several: bool,
    ignore: Sequence[str],
) -> Table:
    own = _differ(records, ignore)
    shared = _settings(records[0], ignore)
    title = ", ".join(f"{words(key)} {cell(shared.get(key))}" for key in differ if key not in own)
    lines = [(one, *line) for one in records for line in _lines(one)]
    if len(lines) == 1:
        one, _, figures = lines[0]
        rows = [(words(name), cell(value, _spread(one, name))) for name, value in figures.items()]
        header: tuple[str, ...] = ("figure", "value")
        return Table(title=title if several else "", header=header, rows=rows, notes=notes(records))
    named = any(name for _, name, _ in lines)
    full = []
    for one, name, figures in lines:
        settings = tuple(cell(_settings(one, ignore).get(key)) for key in own)
        values = (cell(figures.get(key), _spread(one, f"{name}.{key}" if name else key)) for key in columns)
        full.append((*((words(name),) if named else ()), *settings, *values))
    header = (*(("",) if named else ()), *(words(name) for name in (*own, *columns)))
    return Table(title=title if several else "", header=header, rows=full, notes=notes(records))


TABLES: dict[str, Callable[[Sequence[Record]], list[Table]]] = {
    "demo": generic,
    "loading": partial(generic, ignore=("torchvision",)),  # the setting that was torchvision's best
    "feeding": generic,
    "ladder": generic,
    "gpu limits": generic,
    "growth": generic,
    "audit": partial(generic, ignore=("looking, s",)),
    "features": generic,
    "noise": partial(
        generic, ignore=("data", "training images", "validation images", "test images", "pretraining epochs")
    ),
    "serving": generic,
    "step": generic,
    "inference": generic,
    "engines": generic,
    "dicom": generic,
    "scan": generic,
    "kill": generic,
    "scaling": generic,
    "calibration": generic,
    "histology_lung3": generic,
    "chest_xray3": generic,
}
"""Which function lays out the records of a question."""


def tables(question: str, records: Sequence[Record]) -> list[Table]:
    """The tables of the records of `question` among `records` (oldest first).

    Raises:
        ConfigError: no such question, or no record of it yet.
    """
    if question not in TABLES:
        raise ConfigError(
            f"record {question!r} is unknown; choose one of {', '.join(TABLES)}.{near_miss(question, TABLES)}"
        )
    own = [one for one in records if one["question"] == question]
    if not own:
        raise ConfigError(
            f"records of {question!r} are 0; one is needed for its table. Run its benchmark first."
        )
    return TABLES[question](own)


def markdown(many: Sequence[Table]) -> str:
    """Markdown tables with their titles, numbers to the right; below them the notes, each once."""
    parts = []
    for one in many:
        title = f"{one.title}:\n\n" if one.title else ""
        parts.append(title + laid_out(one.header, one.rows))
    below = dict.fromkeys(note for one in many for note in one.notes)
    return "\n\n".join([*parts, "\n".join(f"<sub>{note}</sub>" for note in below)]) + "\n"


def laid_out(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """One Markdown table; all but the first column to the right."""
    sides = ["---" if i == 0 else "---:" for i in range(len(header))]
    cells = (" | ".join(str(c).replace("|", "\\|") for c in line) for line in (header, sides, *rows))
    return "\n".join(f"| {line} |" for line in cells)


def rewrite(text: str, records: Sequence[Record]) -> str:
    """`text` with every marked region filled from `records`.

    Raises:
        ConfigError: a region names an unknown question or one without records, or has no end.
    """
    opened, closed = text.count("<!-- record:"), len(REGION.findall(text))
    if opened != closed:
        raise ConfigError(
            f"the page opens {opened} record regions and closes {closed}; end each with <!-- end -->."
        )
    return REGION.sub(lambda m: m[1] + markdown(tables(m["name"].strip(), records)) + m[4], text)


def cell(value: Any, spread: Mapping[str, float] | None = None) -> str:
    """A figure as a reader wants it: three or four digits, the 10th to 90th percentile behind it."""
    if spread:
        return f"{cell(value)} ({cell(spread['p10'])} to {cell(spread['p90'])})"
    if isinstance(value, Mapping) and {"value", "low", "high"} <= set(value):
        return f"{cell(value['value'])} ({cell(value['low'])} to {cell(value['high'])})"
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if 0 < abs(value) < 0.01:
            return f"{value:.2g}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{3 if abs(value) < 10 else 1}f}"
    if isinstance(value, list | tuple):
        return ", ".join(cell(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{words(key)} {cell(item)}" for key, item in value.items())
    return words(str(value))


def words(name: str) -> str:
    """A field name as text."""
    return name.replace("images_per_s", "images/s").replace("_per_s", "/s").replace("_", " ")


def notes(records: Sequence[Record]) -> tuple[str, ...]:
    """Machine, versions, commit, day and n of these records, one sentence per distinct set."""
    return tuple(dict.fromkeys(_note(one) for one in records))


def _note(one: Record) -> str:
    here, versions = one["machine"], one["versions"]
    gpus = ", ".join(gpu["name"] for gpu in here.get("gpus", [])) or "no GPU"
    stack = ", ".join(f"{name} {versions[name]}" for name in ("torch", "onnxruntime-gpu") if name in versions)
    code = f"commit {one['commit'][:10]}{'+' * ('+' in one['commit'])}" if one["commit"] else "no commit"
    machine = f"{here.get('cpu')}, {here.get('cores')} cores, {gpus}"
    return f"n = {one['n']:,}; {machine}; {stack}; {code}; {str(one['date'])[:10]}"


def _lines(one: Record) -> list[tuple[str, dict[str, Any]]]:
    """(row name, figures) of a record; one nameless row for flat figures."""
    figures = one["figures"]
    nested = figures and all(isinstance(v, dict) and not {"value", "low"} <= set(v) for v in figures.values())
    return list(figures.items()) if nested else [("", figures)]


def _spread(one: Record, name: str) -> Mapping[str, float] | None:
    found: Any = (one["spread"] or {}).get(name)
    if found is None and "." in name:
        row, column = name.split(".", 1)
        found = ((one["spread"] or {}).get(row) or {}).get(column)
    return found if isinstance(found, dict) and {"p10", "p90"} <= set(found) else None


def _names(many: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for one in many for name in one))


def _settings(one: Record, ignore: Sequence[str]) -> dict[str, Any]:
    """What was chosen, the machine included."""
    machine = ", ".join(gpu["name"] for gpu in one["machine"].get("gpus", [])) or one["machine"].get("cpu")
    return {name: value for name, value in one["settings"].items() if name not in ignore} | {
        "machine": machine
    }


def _differ(records: Sequence[Record], ignore: Sequence[str]) -> list[str]:
    """Names of the settings that are not the same in all `records`."""
    settings = [_settings(one, ignore) for one in records]
    return [n for n in _names(settings) if len({json.dumps(s.get(n), sort_keys=True) for s in settings}) > 1]


def main(arguments: Sequence[str]) -> None:
    """Rewrite the pages, or with --check exit 1 when that would change one.

    Raises:
        ConfigError: an unknown argument, or what `rewrite` raises.
    """
    if list(arguments) not in ([], ["--check"]):
        raise ConfigError(f"arguments are {' '.join(arguments)!r}; only --check is allowed. Leave them out.")
    records = read(RESULTS)
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = methods_page.rewrite(rewrite(before, records))
        if after == before:
            continue
        if arguments:
            sys.exit(f"{page.name} differs from its records; run python -m noisyssl.benchmarks.tables.")
        page.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except NoisySSLError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.code)
