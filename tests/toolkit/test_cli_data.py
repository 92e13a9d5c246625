import json
import shutil

import numpy as np
import pytest
from PIL import Image

from noisyssl.cli import run


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NOISYSSL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path):
    for i in range(40):
        path = tmp_path / "data" / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


def test_check_of_good_data(data, capsys):
    assert run(["data", "check", str(data)]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "│ a " in line)
    assert row.replace("│", " ").split() == ["a", "14", "3", "3", "20"]
    assert "0 bad files." in out
    assert "samples.csv and quarantine.csv are in" in out


def test_a_bad_file_is_exit_5_after_the_tables_are_written(data, capsys, tmp_path):
    (data / "a" / "[red]x.png").write_bytes(b"")
    assert run(["data", "check", str(data), "--out", str(tmp_path / "out")]) == 5
    captured = capsys.readouterr()
    assert "1 such as a/[red]x.png: is empty" in captured.out
    assert captured.err.count("\n") == 1
    assert "1 of 41 files are no good images: a/[red]x.png: is empty." in captured.err
    assert "a/[red]x.png,is empty" in (tmp_path / "out" / "quarantine.csv").read_text()
    assert len((tmp_path / "out" / "samples.csv").read_text().splitlines()) == 41
    assert run(["data", "check", str(data), "--quarantine"]) == 0


def test_a_leak_is_exit_5_unless_allowed(data, capsys, tmp_path):
    root = tmp_path / "split"
    shutil.copytree(data, root / "train")
    for name in "ab":
        (root / "test" / name).mkdir(parents=True)
        first = sorted((data / name).iterdir())[0]
        shutil.copy(first, root / "test" / name)
    assert run(["data", "check", str(root)]) == 5
    captured = capsys.readouterr()
    assert "2 sets of byte-identical files, 2 of them across splits" in captured.out
    assert "2 sets of identical images across splits" in captured.err
    assert run(["data", "check", str(root), "--allow-leaks"]) == 0


def test_json_has_the_same_facts(data, capsys):
    (data / "b" / "bad.jpg").write_bytes(b"<html></html>")
    assert run(["data", "check", str(data), "--json"]) == 5
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["train"] == {"a": 14, "b": 14}
    assert report["bad"] == [["b/bad.jpg", "is HTML, not an image"]]
    assert (report["leak"], report["images"], report["faults"]) == (False, 40, [])


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["check", "none"], 2, "none does not exist"),
        (["check", "data/empty"], 5, "holds no images; supported suffixes are .bmp"),
        (["check", "data/a"], 0, ""),
        (["check", "data", "--threads", "0"], 2, "--threads"),
        (["pack", "data", "data"], 2, "data exists; name a new folder"),
        (["pack", "data", "out", "--size", "2"], 2, "--size is 2; it must lie in"),
        (["pack", "none", "out"], 2, "none does not exist"),
        (["generate", "data"], 2, "data exists"),
        (["generate", "out", "--size", "9999"], 2, "--size is 9999"),
    ],
)
def test_exit_codes(data, capsys, monkeypatch, arguments, code, message):
    monkeypatch.chdir(data.parent)
    (data / "empty").mkdir()
    assert run(["data", *arguments]) == code
    assert message in capsys.readouterr().err
    assert not (data.parent / "out").exists()


def test_one_class_can_be_read_without_labels(data, capsys):
    shutil.rmtree(data / "b")
    assert run(["data", "check", str(data)]) == 5
    assert "one class only ('a')" in capsys.readouterr().err
    assert run(["data", "check", str(data), "--unlabelled"]) == 0
    assert "(no labels)" in capsys.readouterr().out
    assert run(["data", "pack", str(data), str(data.with_name("pack"))]) == 5
    assert run(["data", "pack", str(data), str(data.with_name("pack")), "--unlabelled"]) == 0


def test_pack_then_check(data, capsys, tmp_path):
    assert run(["data", "pack", str(data), str(tmp_path / "out"), "--size", "8", "--fit", "pad"]) == 0
    assert "40 images packed" in capsys.readouterr().out
    assert run(["data", "check", str(tmp_path / "out")]) == 0


def test_generate_then_check(tmp_path, capsys):
    assert run(["data", "generate", str(tmp_path / "out"), "--count", "150", "--size", "32"]) == 0
    assert run(["data", "check", str(tmp_path / "out" / "manifest.csv"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["images"] == 150
    assert not report["leak"]


def test_a_class_without_test_images_is_said_before_anything_trains(data, capsys):
    rows = [f"{p.relative_to(data)},{p.parent.name}" for p in sorted(data.rglob("*.png"))]
    splits = ["train" if i % 3 else ("val", "test")[i % 2] for i in range(40)]
    text = [
        f"{row},{'train' if row.endswith('b') and split == 'test' else split}"
        for row, split in zip(rows, splits, strict=True)
    ]
    (data / "t.csv").write_text("\n".join(["path,label,split", *text]))
    said = "class b has no test images; nothing measures it."
    assert run(["data", "check", str(data / "t.csv")]) == 0
    assert said in capsys.readouterr().out
    assert run(["train", str(data / "t.csv"), "--out", str(data / "run"), "--set", "backbone=resnet18-w16",
                "--size", "16", "--epochs", "1", "--batch", "8", "--set", "threads=1"]) == 0  # fmt: skip
    assert f"warning: {said}" in capsys.readouterr().err
