import pytest

from noisyssl.benchmarks import tables
from noisyssl.errors import ConfigError


def record(question="loading", date="2026-11-01T00:00:00", spread=None, settings=None, **figures):
    machine = {"cpu": "Test CPU", "cores": 2, "gpus": []}
    return {
        "question": question,
        "settings": settings or {"size": 224},
        "figures": figures,
        "n": 7,
        "spread": spread,
        "machine": machine,
        "versions": {"torch": "2.15.0"},
        "commit": "0123456789abcdef+changed",
        "date": date,
    }


def test_flat_figures_become_two_columns_with_spread_and_note():
    spread = {"speedup": {"median": 3.81, "p10": 3.5, "p90": 4.0}}
    text = tables.markdown(tables.tables("loading", [record(speedup=3.81, images=12345, spread=spread)]))
    assert "| speedup | 3.810 (3.500 to 4.000) |" in text
    assert "| images | 12,345 |" in text
    assert "n = 7; Test CPU, 2 cores, no GPU; torch 2.15.0; commit 0123456789+; 2026-11-01" in text


def test_nested_figures_become_rows():
    (made,) = tables.tables("demo", [record("demo", random={"best": 0.5, "last": 0.25}, ssl={"best": 0.75})])
    assert made.header == ("", "best", "last")
    assert made.rows == [("random", "0.500", "0.250"), ("ssl", "0.750", "-")]


def test_settings_that_differ_become_columns_and_the_newest_record_wins():
    old = record(settings={"size": 64, "views": 2}, speedup=1.0)
    new = record(settings={"size": 64, "views": 2}, speedup=2.0, date="2026-12-01")
    other = record(settings={"size": 64, "views": 1}, speedup=3.0)
    (made,) = tables.tables("loading", [old, other, new])
    assert made.header == ("views", "speedup")
    assert made.rows == [("2", "2.000"), ("1", "3.000")]


def test_other_figures_get_their_own_table():
    one, two = (record(settings={"case": f"{n} views", "size": 224}, dali=n, torchvision=1) for n in (1, 2))
    packed = record(settings={"case": "packed", "size": 224}, packed=3)
    first, second = tables.tables("loading", [one, packed, two])
    assert (first.title, first.header) == ("", ("case", "dali", "torchvision"))
    assert [row[0] for row in first.rows] == ["1 views", "2 views"]
    assert (second.title, second.rows) == ("case packed", [("packed", "3")])
    text = tables.markdown([first, second])
    assert "\ncase packed:\n\n| figure | value |" in text
    assert text.count("<sub>") == 1


def test_what_came_out_of_a_measurement_is_no_setting():
    old = record(settings={"case": "one view", "torchvision": "0 workers"}, speedup=1.0)
    new = record(settings={"case": "one view", "torchvision": "2 workers"}, speedup=2.0)
    (made,) = tables.tables("loading", [old, new])
    assert made.rows == [("speedup", "2.000")]


def test_two_machines_stand_side_by_side():
    gpu = record(speedup=9.0)
    gpu["machine"] = {"cpu": "Other CPU", "cores": 8, "gpus": [{"name": "Test GPU"}]}
    (made,) = tables.tables("loading", [record(speedup=3.0), gpu])
    assert made.header == ("machine", "speedup")
    assert made.rows == [("Test CPU", "3.000"), ("Test GPU", "9.000")]
    assert len(made.notes) == 2


def test_regions_are_rewritten_and_nothing_else():
    before = "a\n<!-- record: loading -->\nold | figures\n<!-- end -->\nb\n"
    once = tables.rewrite(before, [record(speedup=3.0)])
    assert once.startswith("a\n<!-- record: loading -->\n| figure | value |")
    assert once.endswith("<!-- end -->\nb\n")
    assert "old" not in once
    assert tables.rewrite(once, [record(speedup=3.0)]) == once
    assert tables.rewrite("plain", []) == "plain"


def test_a_figure_cannot_break_the_table():
    made = tables.generic([record(**{"a|b": "x|y"})])
    assert "| a\\|b | x\\|y |" in tables.markdown(made)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- record: lodaing -->\n<!-- end -->", "Did you mean 'loading'"),
        ("<!-- record: kill -->\n<!-- end -->", "Run its benchmark"),
        ("<!-- record: loading -->\nno end", "opens 1 record regions and closes 0"),
    ],
)
def test_bad_regions_say_what_to_do(text, message):
    with pytest.raises(ConfigError, match=message):
        tables.rewrite(text, [record(speedup=1.0)])


def test_check_fails_until_the_readme_is_rewritten(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- record: loading -->\n<!-- end -->\n")
    monkeypatch.setattr(tables, "PAGES", (readme,))
    monkeypatch.setattr(tables, "read", lambda folder: [record(speedup=3.0)])
    with pytest.raises(SystemExit, match="differs from its records"):
        tables.main(["--check"])
    tables.main([])
    tables.main(["--check"])
    assert "| speedup | 3.000 |" in readme.read_text()
