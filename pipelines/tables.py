"""CSV files in and out: a user's table of images, and the `samples.csv` and `quarantine.csv` written here."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from noisyssl.errors import DataError, near_miss

CELL = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?", re.IGNORECASE)
"""A number: harmless in a spreadsheet even with a sign."""


def read_table(path: Path, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, list[str]]:
    """The columns of a CSV file that were asked for, stripped of surrounding spaces; a BOM is skipped.

    Raises:
        DataError: not UTF-8, not commas, a missing or repeated column, a row of another length.
    """
    line = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            _check_header(path, header, required)
            wanted = [name for name in (*required, *optional) if name in header]
            places = [header.index(name) for name in wanted]
            columns: list[list[str]] = [[] for _ in wanted]
            appends = [(place, column.append) for place, column in zip(places, columns, strict=True)]
            width, line = len(header), reader.line_num
            for row in reader:
                if len(row) != width:
                    if not row:  # editors leave blank lines
                        line = reader.line_num
                        continue
                    raise DataError(
                        f"{path}:{line + 1}: {len(row)} cells where the header has {width}; "
                        'put a cell that holds a comma in "quotes".'
                    )
                for place, append in appends:
                    append(row[place].strip())
                line = reader.line_num
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason}); save it as CSV UTF-8.") from None
    except csv.Error as error:
        raise DataError(
            f"{path}:{line + 1}: not readable as CSV ({error}); close or double the quotation marks there."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}.") from None
    return dict(zip(wanted, columns, strict=True))


def header_of(path: Path) -> list[str]:
    """The column names of a readable CSV, in lower case."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [name.strip().lower() for name in next(csv.reader(file), [])]


def _check_header(path: Path, header: list[str], required: Sequence[str]) -> None:
    joined = ",".join(header)
    if any(";" in name or "\t" in name for name in header) and not set(required) <= set(header):
        what = "semicolons" if ";" in joined else "tabs"
        raise DataError(f"{path}:1: columns are separated by {what}; save it with commas.")
    for name in required:
        if name not in header:
            raise DataError(
                f"{path}:1: column {name!r} is missing; the header has {', '.join(header) or 'nothing'}."
                f"{near_miss(name, header)} Add it, or rename the one that is meant."
            )
    for name in header:
        if name and header.count(name) > 1:
            raise DataError(f"{path}:1: column {name!r} occurs {header.count(name)} times; keep one.")


def line_of(path: Path, row: int) -> int:
    """The line on which data row `row` (from 0) of a readable CSV starts; cells may hold line breaks."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        next(reader)
        line = reader.line_num
        for cells in reader:
            if cells and row == 0:
                break
            row -= bool(cells)
            line = reader.line_num
    return line + 1


def quote(cell: str) -> str:
    """`cell` as a spreadsheet will not run it: an apostrophe before = + - @, tabs and apostrophes.

    Numbers stay as they are. `unquote` gives `cell` back.
    """
    return f"'{cell}" if cell[:1] in tuple("=+-@\t\r'") and not CELL.fullmatch(cell) else cell


def unquote(cell: str) -> str:
    """What `quote` was given."""
    return cell.removeprefix("'")


def table_text(columns: Mapping[str, Iterable[object]]) -> str:
    """A CSV file with these columns, cells quoted."""
    text = io.StringIO()
    writer = csv.writer(text)  # ends lines with CR LF, so a cell that holds either is put in quotes
    writer.writerow(columns)
    ready = [
        [quote(cell) if isinstance(cell, str) else cell for cell in column] for column in columns.values()
    ]
    writer.writerows(zip(*ready, strict=True))
    return text.getvalue()


def read_own_table(path: Path, columns: Sequence[str]) -> dict[str, list[str]]:
    """The columns of a CSV that `table_text` made, cells unquoted and not stripped.

    Raises:
        DataError: it is not such a file.
    """
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        header, *rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        places = [header.index(name) for name in columns]
        return {n: [unquote(row[i]) for row in rows] for n, i in zip(columns, places, strict=True)}
    except (OSError, csv.Error, ValueError, IndexError) as error:
        raise DataError(f"{path} is not a readable table ({error}); make its folder again.") from None


def some(names: Sequence[str]) -> str:
    """The first three of `names` and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
