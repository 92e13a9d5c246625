import getpass
import json
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from noisyssl.benchmarks import records
from noisyssl.benchmarks.measure import Spread
from noisyssl.errors import DataError, MachineError


def one(**figures):
    return records.record("loading", settings={"size": 224}, figures=figures, n=7)


def test_what_is_written_is_read_oldest_first(tmp_path):
    first, second = {**one(a=1), "date": "2026-02-01"}, {**one(a=2), "date": "2026-01-01"}
    records.write(tmp_path / "b.jsonl", first)
    records.write(tmp_path / "a.jsonl", one(a=3))
    records.write(tmp_path / "b.jsonl", second)
    assert [r["figures"]["a"] for r in records.read(tmp_path)][:2] == [2, 1]
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 2
    assert records.read(tmp_path)[1] == first


def test_values_become_plain_json(tmp_path):
    made = records.record(
        "loading",
        settings={"data": Path("/secret/place/set"), "sizes": (64, 224)},
        figures={"ratio": np.float32(1.5), "count": np.int64(3)},
        n=3,
        spread={"ratio": Spread(median=1.5, p10=1.0, p90=2.0)},
    )
    assert made["settings"] == {"data": "set", "sizes": [64, 224]}
    assert made["figures"] == {"ratio": 1.5, "count": 3}
    assert made["spread"]["ratio"] == {"median": 1.5, "p10": 1.0, "p90": 2.0}
    assert json.loads(json.dumps(made)) == made


def test_no_host_user_or_path_in_the_facts():
    text = json.dumps({key: one(a=1)[key] for key in ("machine", "versions", "commit")})
    assert platform.node() not in text
    assert "/" not in text.replace("(R)", "")
    if len(getpass.getuser()) > 3:  # "root" may be part of a word
        assert f'"{getpass.getuser()}"' not in text


def test_nan_and_unknown_fields_are_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(ValueError, match="not JSON compliant"):
        records.write(path, one(a=float("nan")))
    with pytest.raises(ValueError, match="host"):
        records.write(path, {**one(a=1), "host": "x"})
    assert not path.exists()


def test_writers_at_once_do_not_mix(tmp_path):
    rows = [{**one(a=i), "settings": {"text": "x" * 20_000}} for i in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda row: records.write(tmp_path / "a.jsonl", row), rows))
    assert sorted(r["figures"]["a"] for r in records.read(tmp_path)) == list(range(12))


def test_a_torn_line_is_named(tmp_path):
    records.write(tmp_path / "a.jsonl", one(a=1))
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"question": "load')
    with pytest.raises(DataError, match=r"a\.jsonl line 2 is no record"):
        records.read(tmp_path)


def test_an_unwritable_place_is_the_machines_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        records.write(tmp_path / "file" / "a.jsonl", one(a=1))


def test_commit_says_changed_and_ignores_results(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True
        )

    code = tmp_path / "benchmarks" / "records.py"
    code.parent.mkdir()
    code.write_text("a = 1\n")
    monkeypatch.setattr(records, "__file__", str(code))
    assert records.commit() is None
    git("init", "-q")
    assert records.commit() is None
    git("add", ".")
    git("commit", "-qm", "one")
    clean = records.commit()
    assert clean is not None
    assert len(clean) == 40
    results = tmp_path / "benchmarks" / "results"
    results.mkdir()
    (results / "a.jsonl").write_text("{}")
    assert records.commit() == clean
    code.write_text("a = 2\n")
    assert records.commit() == f"{clean}+changed"
