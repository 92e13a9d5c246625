import csv
import io
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisyssl.errors import DataError
from noisyssl.pipelines.tables import (
    line_of,
    quote,
    read_own_table,
    read_table,
    table_text,
    unquote,
)

CELLS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(CELLS, CELLS), max_size=8))
def test_every_cell_comes_back(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "own.csv"
    columns = {"path": [a for a, _ in rows], "group": [b for _, b in rows]}
    path.write_bytes(table_text(columns).encode())
    assert read_own_table(path, ("path", "group")) == columns


@pytest.mark.parametrize(
    "cell", ["=1+1", "+x", "-cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "'=1", "-", "-1\n=1"]
)
def test_a_spreadsheet_runs_nothing(cell):
    assert quote(cell).startswith("'")
    assert unquote(quote(cell)) == cell


@pytest.mark.parametrize("cell", ["-1", "+2.5", "-1e3", "a=b", "x,y", "", "12"])
def test_harmless_cells_stay_as_they_are(cell):
    assert quote(cell) == cell


def test_names_that_are_no_utf8_come_back(tmp_path):
    name = os.fsdecode(b"scan\xff.png")
    (tmp_path / "own.csv").write_bytes(table_text({"path": [name]}).encode("utf-8", "surrogateescape"))
    assert read_own_table(tmp_path / "own.csv", ["path"]) == {"path": [name]}


def test_columns_are_found_in_any_order_and_a_bom_is_read(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufeffpath,extra, Label \r\na.png,x, ü\r\n".encode())
    assert read_table(tmp_path / "t.csv", ["path"], ["label", "split"]) == {"path": ["a.png"], "label": ["ü"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path;label\na.png;x\n", r"t\.csv:1: columns are separated by semicolons; save it with commas"),
        ("path\tlabel\na.png\tx\n", r"t\.csv:1: columns are separated by tabs; save it with commas"),
        ("paths,label\na.png,x\n", r"t\.csv:1: column 'path' is missing; .* Did you mean 'paths'\?"),
        ("", r"t\.csv:1: column 'path' is missing; the header has nothing"),
        ("path,label,label\n", r"t\.csv:1: column 'label' occurs 2 times"),
        ('path,label\n"a\nb.png",x\nc.png\n', r"t\.csv:4: 1 cells where the header has 2"),
        ('path,label\n"a.png,x\n', r"t\.csv:2: not readable as CSV"),
        ("path\n" + "x" * 200_000, r"t\.csv:2: not readable as CSV"),
    ],
)
def test_broken_tables_name_the_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_table(tmp_path / "t.csv", ["path"], ["label"])


def test_other_encodings_are_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes("path\nä.png\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"not UTF-8 text .* save it as CSV UTF-8"):
        read_table(tmp_path / "t.csv", ["path"])


def test_line_of_counts_lines_not_rows(tmp_path):
    (tmp_path / "t.csv").write_text('path\n"a\nb"\nc\n')
    assert [line_of(tmp_path / "t.csv", row) for row in (0, 1)] == [2, 4]


def test_the_text_is_plain_csv():
    assert list(csv.reader(io.StringIO(table_text({"path": ["a,b"], "width": [3]})))) == [
        ["path", "width"],
        ["a,b", "3"],
    ]


def test_blank_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("path,label\n\na.png,x\n\n\nb.png,y\n\n")
    assert read_table(path, ["path", "label"]) == {"path": ["a.png", "b.png"], "label": ["x", "y"]}
    assert [line_of(path, row) for row in (0, 1)] == [3, 6]
