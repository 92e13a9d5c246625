"""The ensemble's gate: what is measured, what it allows, and a repository without what it refuses."""

import numpy as np
import pytest
from PIL import Image

from noisyssl.cli import run
from noisyssl.deploy import bundle
from noisyssl.deploy.predict import sources
from noisyssl.deploy.runtime import open_runtime
from noisyssl.deploy.triton_parity import MIN_IMAGES, measure, must_hold
from noisyssl.deploy.triton_record import read
from noisyssl.errors import DataError, ExportError
from noisyssl.geometry import evaluation_view
from noisyssl.images import decode


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """100 JPEGs of different colours and shapes."""
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(5)
    for i in range(MIN_IMAGES):
        shape = (*generator.integers(30, 60, 2), 1)
        colour = generator.integers(20, 230, (1, 1, 3)) + generator.integers(-15, 15, shape)
        Image.fromarray(colour.astype(np.uint8)).save(folder / f"{i:03}.jpg")
    return folder


def measured(bundle, folder, view):
    with open_runtime(bundle, "onnx", "cpu") as runtime:
        return measure(runtime, sources([folder]), view)


def ours(data):
    return evaluation_view(decode(data), 32, "crop")


def test_the_same_view_holds(exported, photos):
    parity = measured(exported, photos, ours)
    assert (parity["images"], parity["mean_difference"], parity["equal_top1"]) == (100, 0.0, 1.0)
    must_hold(parity)


def test_three_grey_levels_are_too_many(exported, photos):
    parity = measured(exported, photos, lambda data: ours(data) + 3)
    assert parity["mean_difference"] == pytest.approx(3.0)
    with pytest.raises(ExportError, match=r"3\.00/255 on average"):
        must_hold(parity)


def test_a_changed_answer_is_one_too_many(exported, photos):
    class Colour:
        """Its label is the strongest channel."""

        manifest = bundle.read(exported)

        def logits(self, images):
            return images.mean(axis=(1, 2))

    first = (photos / "000.jpg").read_bytes()
    parity = measure(
        Colour(), sources([photos]), lambda data: np.roll(ours(data), 1, -1) if data == first else ours(data)
    )
    assert parity["equal_top1"] == 0.99
    with pytest.raises(ExportError, match=r"99\.00 % equal"):
        must_hold(parity)


def test_what_dali_cannot_read_counts(exported, photos):
    first = (photos / "000.jpg").read_bytes()
    parity = measured(exported, photos, lambda data: None if data == first else ours(data))
    assert (parity["refused_by_dali"], parity["images"]) == (1, 100)
    with pytest.raises(ExportError, match="1 refused"):
        must_hold(parity)


def test_too_few_images_prove_nothing(exported, photos, tmp_path):
    for i in range(MIN_IMAGES):
        (tmp_path / f"{i:03}.jpg").write_bytes((photos / f"{i:03}.jpg").read_bytes() if i else b"broken")
    with pytest.raises(DataError, match="99 readable images"):
        measured(exported, tmp_path, ours)


def test_the_repository_keeps_what_was_measured(exported, photos, tmp_path):
    pytest.importorskip("nvidia.dali", reason="needs noisyssl[train] on Linux")
    command = ["deploy", "triton", str(exported), str(tmp_path / "r"), "--images", str(photos)]
    assert run(command) == 0
    repository = read(tmp_path / "r")
    assert sorted(repository.models.values()) == ["dali", "ensemble", "onnxruntime"]
    parity = repository.active["dali"]
    assert parity["images"] == 100
    assert parity["equal_top1"] == 1.0
    assert 0 < parity["mean_difference"] < 1
    assert run(command[:-2]) == 2  # the next version must have the same models
    assert run(command) == 0
    assert read(tmp_path / "r").record["active"] == 2


def test_without_its_proof_there_is_no_ensemble(exported, photos, tmp_path, monkeypatch, capsys):
    from noisyssl.pipelines import dali_serving

    monkeypatch.setattr(dali_serving, "viewer", lambda graph: lambda data: ours(data) // 2)
    monkeypatch.setattr(dali_serving, "serialized", lambda *_: b"graph")
    command = ["deploy", "triton", str(exported), str(tmp_path / "r"), "--images", str(photos)]
    assert run(command) == 4
    assert "left out" in capsys.readouterr().err
    repository = read(tmp_path / "r")
    assert list(repository.models.values()) == ["onnxruntime"]
