import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from noisyssl.cli import run
from noisyssl.cli.options import architecture_of, settings
from noisyssl.config import Config, DataConfig, PretrainConfig
from noisyssl.methods import METHODS
from noisyssl.pipelines import pretrain, train
from noisyssl.pipelines.modality import concerns, is_grey, stage_views
from noisyssl.pipelines.scan import open_samples
from noisyssl.views import MODALITIES, adapt, pair, training


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NOISYSSL_CACHE", str(tmp_path / "cache"))


def images(folder, grey, count=40, size=16):
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        pixels[:, 0 if grey(i) else 1 :] = pixels[
            :, 0 if grey(i) else 1 :, :1
        ]  # one column of colour is enough
        Image.fromarray(pixels).save(path)
    return folder


def config(modality="natural", method="simclr"):
    return Config(data=DataConfig(size=32, modality=modality), pretrain=PretrainConfig(method=method))


def test_both_stages_have_adapted_views():
    histology = config("histology")
    assert stage_views(histology, "pretrain") == tuple(adapt(view, "histology") for view in pair(32))
    assert stage_views(histology, "train") == tuple(adapt(view, "histology") for view in training(32))
    assert stage_views(config(), "pretrain") == pair(32)


def test_colour_jitter_on_grey_images_is_told(tmp_path):
    grey = open_samples(images(tmp_path / "grey", lambda i: True))
    colour = open_samples(images(tmp_path / "colour", lambda i: False))
    for stage in ("pretrain", "train"):
        (told,) = concerns(config(), stage, grey)
        assert "hue, saturation and grey of the views do nothing" in told
        assert concerns(config(), stage, colour) == []
        assert concerns(config("xray"), stage, grey) == []
        (told,) = concerns(config("histology"), stage, grey)
        assert "grey" in told
    assert concerns(config(method="rotation"), "pretrain", grey) == []  # its views have no colour to lose


def test_a_set_is_grey_if_all_training_images_are(tmp_path):
    samples = open_samples(images(tmp_path / "mixed", lambda i: i != 7, count=30))
    colour = np.array([path == "b/07.png" for path in samples.paths])
    assert colour.sum() == 1
    assert not is_grey(replace(samples, splits=np.full(30, "train")))
    assert is_grey(replace(samples, splits=np.where(colour, "test", "train")))


@pytest.mark.parametrize(("modality", "warned"), [("histology", True), ("xray", False), ("natural", False)])
def test_rotation_on_images_without_up_is_warned_of(tmp_path, modality, warned):
    samples = open_samples(images(tmp_path / "colour", lambda i: False))
    told = concerns(config(modality, "rotation"), "pretrain", samples)
    assert bool(told) == warned
    assert all("which way is up" in one for one in told)
    assert concerns(config(modality, "rotation"), "train", samples) == []
    assert concerns(config(modality), "pretrain", samples) == []


def test_the_flag_reaches_the_configuration_and_a_near_miss_is_named(tmp_path, capsys):
    flags = {"data.modality": "xray", "data.path": str(tmp_path)}
    assert settings(tmp_path / "run", "pretrain", None, None, flags, False).data.modality == "xray"
    for command in (["pretrain", "."], ["train", "."], ["build", "."]):
        out = [str(tmp_path / "o")] if command[0] == "build" else ["--out", str(tmp_path / "o")]
        assert run([*command, *out, "--modality", "fundsu"]) == 2
        error = capsys.readouterr().err
        assert "data.modality is 'fundsu'" in error
        assert "Did you mean 'fundus'?" in error


def test_the_flags_help_names_every_modality(capsys):
    for command in (["pretrain"], ["train"], ["build"], ["data", "views"]):
        assert run([*command, "--help"]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert all(name in said for name in MODALITIES)


def test_the_flags_help_names_every_method(capsys):
    assert run(["pretrain", "--help"]) == 0
    said = capsys.readouterr().out.replace(",", " ").split()
    assert set(METHODS) <= set(said)


@pytest.fixture
def loaded(monkeypatch):
    """The views that each stage loads, as they are asked for."""
    seen = []
    for stage in (pretrain, train):

        def spy(samples, indices, views, real=stage.open_loader, **settings):
            seen.append(views)
            return real(samples, indices, views, **settings)

        monkeypatch.setattr(stage, "open_loader", spy)
    return seen


def test_a_run_stores_its_modality_and_says_once_what_does_not_suit(tmp_path, capsys, loaded):
    data, out = images(tmp_path / "data", lambda i: True), tmp_path / "run"
    flags = [
        "--method", "rotation", "--modality", "histology", "--size", "16", "--epochs", "1", "--batch", "8",
        "--set", "backbone=resnet18-w16", "--set", "threads=1", "--set", "data.loader=batched",
    ]  # fmt: skip
    assert run(["pretrain", str(data), "--out", str(out), *flags]) == 0
    assert 'modality = "histology"' in (out / "config.toml").read_text()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert len([e for e in log if e["kind"] == "warning" and "which way is up" in e["message"]]) == 1
    assert capsys.readouterr().err.count("which way is up") == 1
    (out / "metrics.json").unlink()
    assert run(["pretrain", "--out", str(out), "--resume"]) == 0
    assert "which way is up" not in capsys.readouterr().err
    assert architecture_of(out)["data.modality"] == "histology"  # what training from it takes by itself
    more = ["--epochs", "1", "--set", "threads=1", "--set", "data.loader=batched", "--modality", "xray"]
    assert run(["train", str(data), "--init", str(out), "--out", str(tmp_path / "tuned"), *more]) == 0
    assert "was pretrained with --modality histology, this run has xray" in capsys.readouterr().err
    views = METHODS["rotation"].views(16)
    assert loaded[0] == tuple(adapt(view, "histology") for view in views)
    assert loaded[-1] == tuple(adapt(view, "xray") for view in training(16))
