import json
import os
from dataclasses import replace

import numpy as np
import pytest

from noisyssl.deploy import bundle as bundles
from noisyssl.deploy.bundle import (
    Architecture,
    Geometry,
    Input,
    Manifest,
    content,
    own_digest,
    read,
    sha256,
    write,
)
from noisyssl.errors import BundleError, ConfigError


def manifest_of(folder):
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return Manifest(
        classes=("benign", "malignant"),
        input=Input(size=32),
        geometry=Geometry(size=32, fit="crop"),
        architecture=Architecture(backbone="resnet18", stem="plain"),
        checkpoint={"which": "best"},
        training={"method": None},
        figures={"accuracy": 0.5},
        parity={"n": 3},
        tools={"torch": "2"},
        files={name: sha256(folder / name) for name in names},
        created="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture
def small(tmp_path):
    """A bundle of junk: reading must not care what the bytes mean."""
    folder = tmp_path / "small"
    (folder / "engines").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"graph" * 1000)
    (folder / "engines" / "a.plan").write_bytes(b"plan")
    write(folder, manifest_of(folder))
    return folder


def edit(folder, change):
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    values["sha256"] = own_digest(values)  # as somebody would who knows how
    path.write_text(json.dumps(values))


def test_a_manifest_altered_by_hand_is_refused(small):
    path = small / "manifest.json"
    first, second = read(small).classes[:2]
    text = path.read_text()
    swapped = (
        text.replace(f'"{first}"', '"\0"').replace(f'"{second}"', f'"{first}"').replace('"\0"', f'"{second}"')
    )
    assert swapped != text
    path.write_text(swapped)
    with pytest.raises(BundleError, match="altered"):
        read(small)
    path.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "sha256"}))
    with pytest.raises(BundleError, match="altered"):
        read(small)


def test_what_is_written_is_read(small):
    (small / "manifest.json").unlink()
    expected = manifest_of(small)
    write(small, expected)
    assert read(small) == expected
    assert content(small, expected, "engines/a.plan") == b"plan"


def test_undefined_figures_become_null(small):
    (small / "manifest.json").unlink()
    write(small, replace(manifest_of(small), figures={"auroc": [float("nan"), float("inf"), 0.5]}))
    assert read(small).figures == {"auroc": [None, None, 0.5]}


@pytest.mark.parametrize("name", ["model.onnx", "engines/a.plan"])
def test_every_changed_byte_is_refused(small, name):
    manifest = read(small)
    data = (small / name).read_bytes()
    for position in {0, len(data) // 2, len(data) - 1}:
        spoiled = bytearray(data)
        spoiled[position] ^= 1
        (small / name).write_bytes(spoiled)
        with pytest.raises(BundleError, match=r"altered\. Do not serve it"):
            read(small)
        with pytest.raises(BundleError, match=r"altered\. Do not serve it"):
            content(small, manifest, name)
    for wrong in (data[:-1], data + b"\0", b""):
        (small / name).write_bytes(wrong)
        with pytest.raises(BundleError, match="altered"):
            read(small)


def test_a_changed_byte_is_found_before_any_runtime_deserialises(bundle, monkeypatch):
    import onnxruntime
    import safetensors.torch

    from noisyssl.deploy import run_torch
    from noisyssl.deploy.runtime import RUNTIMES, open_runtime

    def never(*_, **__):
        raise AssertionError("deserialised")

    monkeypatch.setattr(onnxruntime, "InferenceSession", never)
    monkeypatch.setattr(safetensors.torch, "load", never)
    monkeypatch.setattr(run_torch, "load", never)
    for name in sorted(read(bundle).files):
        data = (bundle / name).read_bytes()
        (bundle / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        for runtime in RUNTIMES:
            with pytest.raises(BundleError, match=f"{name}.*altered"):
                open_runtime(bundle, runtime)
        (bundle / name).write_bytes(data)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "engines/../../x", "engines/a/b", "engines/", "engines", ".", "..", "",
     ".hidden", "engines/.hidden", "a\0b", "C:\\x", "engines\\a.plan", "~", "model.onnx\n", "ünicode",
     "a" * 300],
)  # fmt: skip
def test_hostile_names_are_refused_before_a_file_is_opened(small, tmp_path, monkeypatch, name):
    (tmp_path / "x").write_bytes(b"outside")
    edit(small, lambda values: values["files"].update({name: sha256(tmp_path / "x")}))
    opened = []
    inner = bundles._opened
    monkeypatch.setattr(bundles, "_opened", lambda folder, n: opened.append(n) or inner(folder, n))
    with pytest.raises(BundleError) as caught:
        read(small)
    assert opened == ["manifest.json"] or name == "engines"  # a plain name, but a folder
    assert "\n" not in str(caught.value)


def link(small, tmp_path):
    (small / "model.onnx").rename(tmp_path / "x")
    (small / "model.onnx").symlink_to(tmp_path / "x")


def hard_link(small, tmp_path):
    os.link(small / "model.onnx", tmp_path / "x")


def linked_folder(small, tmp_path):
    (small / "engines").rename(tmp_path / "engines")
    (small / "engines").symlink_to(tmp_path / "engines")


def pipe(small, tmp_path):
    (small / "model.onnx").unlink()
    os.mkfifo(small / "model.onnx")


def folder(small, tmp_path):
    (small / "model.onnx").unlink()
    (small / "model.onnx").mkdir()


def linked_manifest(small, tmp_path):
    (small / "manifest.json").rename(tmp_path / "m")
    (small / "manifest.json").symlink_to(tmp_path / "m")


@pytest.mark.parametrize("trick", [link, hard_link, linked_folder, pipe, folder, linked_manifest])
def test_only_plain_files_of_the_bundle_itself_are_read(small, tmp_path, trick):
    trick(small, tmp_path)
    with pytest.raises(BundleError, match=r"link|plain file|cannot be read"):
        read(small)


def test_a_missing_file_is_named_and_an_unlisted_one_ignored(small):
    (small / "notes.txt").write_text("extra")
    assert "notes.txt" not in read(small).files
    with pytest.raises(BundleError, match=r"lists no notes\.txt"):
        content(small, read(small), "notes.txt")
    (small / "engines" / "a.plan").unlink()
    with pytest.raises(BundleError, match=r"lacks engines/a\.plan"):
        read(small)


def test_folders_that_are_no_bundle(tmp_path):
    with pytest.raises(
        BundleError, match=r"has no manifest\.json; pass a folder written by `noisyssl export`"
    ):
        read(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        read(tmp_path / "missing")


def test_schema_policy(small):
    edit(small, lambda values: values.update(schema=2, classes=None))
    with pytest.raises(BundleError, match=r"has schema 2; this noisyssl reads 1-1\. Run `pip install -U"):
        read(small)
    edit(small, lambda values: values.update(schema=1, classes=["a", "b"], written_later={"x": 1}))
    assert read(small).classes == ("a", "b")
    edit(small, lambda values: values.update(schema=0))
    with pytest.raises(BundleError, match="schema is 0"):
        read(small)


@pytest.mark.parametrize(
    "field",
    ["classes", "input", "geometry", "architecture", "training", "figures", "parity", "files", "created"],
)
def test_missing_and_mistyped_fields_are_named(small, field):
    edit(small, lambda values: values.update({field: 7}))
    with pytest.raises(BundleError, match=f"{field} is 7; it must be"):
        read(small)
    edit(small, lambda values: values.pop(field))
    with pytest.raises(BundleError, match=f"lacks '{field}'"):
        read(small)


@pytest.mark.parametrize(
    "change",
    [
        {"classes": ["a"]},
        {"classes": ["a", "a"]},
        {"classes": ["a", 1]},
        {"input": {"size": True}},
        {"input": {"size": 32.0}},
        {"input": {"size": 4}},
        {"input": {"size": 32, "layout": "NCHW"}},
        {"geometry": {"size": 64, "fit": "crop"}},
        {"geometry": {"size": 32, "fit": "zoom"}},
        {"files": {}},
        {"files": {"model.onnx": "ABC"}},
        {"files": {"model.onnx": 1}},
        {"tools": {"torch": 2}},
        {"schema": "1"},
    ],
)
def test_wrong_values_are_one_line(small, change):
    edit(small, lambda values: values.update(change))
    with pytest.raises(BundleError, match=next(iter(change))) as caught:
        read(small)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"[" * 100_000, b"3", b"{}"])
def test_a_manifest_that_is_none(small, data):
    (small / "manifest.json").write_bytes(data)
    with pytest.raises(BundleError):
        read(small)


def test_a_huge_manifest_is_not_read(small, monkeypatch):
    monkeypatch.setattr(bundles, "MANIFEST_BYTES", 100)
    with pytest.raises(BundleError, match="is over"):
        read(small)


def test_spoiled_manifests_never_end_in_another_error(small):
    generator = np.random.default_rng(0)
    path = small / "manifest.json"
    good = path.read_bytes()
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for position in generator.integers(0, len(data), 3):
            data[position] = generator.integers(0, 256)
        path.write_bytes(data)
        try:
            read(small)
        except BundleError:
            refused += 1
    assert refused > 290
