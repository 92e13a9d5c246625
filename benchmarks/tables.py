"""README tables from the committed records: `python -m noisyssl.benchmarks.tables [--check]`.

Each region between `<!-- record: QUESTION -->` and `<!-- end -->` is rewritten; no figure is typed by hand.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noisyssl.benchmarks.records import RESULTS, Record, read
from noisyssl.errors import ConfigError, NoisySSLError, near_miss

README = Path(__file__).parents[1] / "README.md"
REGION = re.compile(r"(<!-- record: (?P<name>[^>]*?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Cells as text; the first column names the row."""

    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    notes: tuple[str, ...]
    """How the numbers were made: one sentence per machine, commit and day."""


def latest(records: Iterable[Record]) -> list[Record]:
    """The newest record of each setting, in order of first appearance; `records` come oldest first."""
    newest: dict[str, Record] = {}
    for one in records:
        newest[json.dumps(one["settings"], sort_keys=True)] = one
    return list(newest.values())


def generic(records: Sequence[Record]) -> Table:
    """Any records of one question: a row per record and named row, a column per differing setting and figure.

    One record with flat figures becomes two columns: figure and value.
    """
    newest = latest(records)
    lines = [(one, *line) for one in newest for line in _lines(one)]
    if len(lines) == 1:
        one, _, figures = lines[0]
        rows = [(words(name), cell(value, _spread(one, name))) for name, value in figures.items()]
        return Table(header=("figure", "value"), rows=rows, notes=notes(newest))
    differ = [name for name in _names(one["settings"] for one in newest) if _differs(newest, name)]
    columns = _names(figures for _, _, figures in lines)
    named = any(name for _, name, _ in lines)
    rows = []
    for one, name, figures in lines:
        settings = tuple(cell(one["settings"].get(key)) for key in differ)
        values = tuple(
            cell(figures.get(key), _spread(one, f"{name}.{key}" if name else key)) for key in columns
        )
        rows.append((*((words(name),) if named else ()), *settings, *values))
    header = (*(("",) if named else ()), *(words(name) for name in (*differ, *columns)))
    return Table(header=header, rows=rows, notes=notes(newest))


TABLES: dict[str, Callable[[Sequence[Record]], Table]] = {
    "demo": generic,
    "loading": generic,
    "inference": generic,
    "scan": generic,
    "kill": generic,
    "calibration": generic,
    "histology_lung3": generic,
    "chest_xray3": generic,
}
"""Which function lays out the records of a question."""


def table(question: str, records: Sequence[Record]) -> Table:
    """The table of the records of `question` among `records` (oldest first).

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


def markdown(one: Table) -> str:
    """A Markdown table, numbers to the right, the notes below it."""
    sides = ["---" if i == 0 else "---:" for i in range(len(one.header))]
    lines = [one.header, sides, *one.rows]
    body = "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |" for line in lines)
    return body + "\n\n" + "\n".join(f"<sub>{note}</sub>" for note in one.notes) + "\n"


def rewrite(text: str, records: Sequence[Record]) -> str:
    """`text` with every marked region filled from `records`.

    Raises:
        ConfigError: a region names an unknown question or one without records, or has no end.
    """
    opened, closed = text.count("<!-- record:"), len(REGION.findall(text))
    if opened != closed:
        raise ConfigError(
            f"README.md opens {opened} record regions and closes {closed}; end each with <!-- end -->."
        )
    return REGION.sub(lambda m: m[1] + markdown(table(m["name"].strip(), records)) + m[4], text)


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


def _differs(records: Sequence[Record], name: str) -> bool:
    return len({json.dumps(one["settings"].get(name), sort_keys=True) for one in records}) > 1


def main(arguments: Sequence[str]) -> None:
    """Rewrite README.md, or with --check exit 1 when that would change it.

    Raises:
        ConfigError: an unknown argument, or what `rewrite` raises.
    """
    if list(arguments) not in ([], ["--check"]):
        raise ConfigError(f"arguments are {' '.join(arguments)!r}; only --check is allowed. Leave them out.")
    before = README.read_text(encoding="utf-8")
    after = rewrite(before, read(RESULTS))
    if arguments and after != before:
        sys.exit("README.md differs from its records; run python -m noisyssl.benchmarks.tables.")
    if after != before:
        README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except NoisySSLError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.code)
