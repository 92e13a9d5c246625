"""A backbone that is held stays to the bit, and learns again when it is let go."""

import pytest
import torch

from noisyssl import checkpoint
from noisyssl.backbones import build_backbone
from noisyssl.classifier import build_classifier
from noisyssl.cli import run
from noisyssl.errors import ConfigError
from noisyssl.pipelines.run import Run
from noisyssl.pipelines.state import average_of
from noisyssl.pipelines.tuning import head_epochs, hold
from noisyssl.recipe import load


def step(network: torch.nn.Module) -> None:
    network.train()
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    images = torch.randint(0, 255, (4, 3, 32, 32), dtype=torch.uint8)
    network(images).square().sum().backward()
    optimizer.step()


def copied(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def test_held_it_keeps_weights_and_statistics_while_the_head_learns():
    network = build_classifier("resnet18-w16", "plain", 3)
    hold(network, True)
    before, head = copied(network.backbone), network.head.weight.detach().clone()
    step(network)
    assert equal(copied(network.backbone), before)
    assert not torch.equal(network.head.weight, head)
    hold(network, False)
    step(network)
    after = copied(network.backbone)
    assert not torch.equal(after["trunk.conv1.weight"], before["trunk.conv1.weight"])
    assert not torch.equal(after["trunk.bn1.running_mean"], before["trunk.bn1.running_mean"])


def test_a_copy_that_follows_is_not_woken():
    class Holder(torch.nn.Module):
        sync_batchnorm = False

        def __init__(self) -> None:
            super().__init__()
            self.backbone = build_backbone("resnet18-w16")

    average = average_of(Holder())
    hold(average, False)
    assert not any(p.requires_grad for p in average.parameters())


@pytest.mark.parametrize(("tune", "held"), [("all", 0), ("head", 6), ("head:2", 2)])
def test_epochs_of_the_head_alone(tune, held):
    assert head_epochs(tune, 6) == held
    assert load(settings=["train.epochs=6", f"train.tune={tune}"]).train.tune == tune


@pytest.mark.parametrize("tune", ["tail", "head:", "head:0", "head:6", "head:x", "6"])
def test_anything_else_is_refused_by_name(tune):
    with pytest.raises(ConfigError, match=r"train\.tune is .*; it must be all, head, or head:N with N below"):
        load(settings=["train.epochs=6", f"train.tune={tune}"])


SETTINGS = ["--set", "backbone=resnet18-w16", "--set", "threads=1", "--size", "32", "--batch", "64"]


def test_a_frozen_training_ends_with_the_backbone_it_began_with(tissue, tmp_path):
    begun = tmp_path / "pretrained"
    assert run(["pretrain", str(tissue), "--out", str(begun), "--epochs", "1", *SETTINGS]) == 0
    out = tmp_path / "frozen"
    command = [
        "train",
        str(tissue),
        "--init",
        str(begun),
        "--out",
        str(out),
        "--tune",
        "head",
        "--epochs",
        "2",
    ]
    assert run([*command, *SETTINGS[2:4], *SETTINGS[6:]]) == 0
    start = checkpoint.load(begun / "checkpoints" / "last.safetensors")[0]
    end = checkpoint.load(out / "checkpoints" / "last.safetensors")[0]
    assert all(torch.equal(end[f"backbone.{name}"], value) for name, value in start.items())


def test_head_first_resumes_to_the_same_bits_in_both_halves(tissue, tmp_path, monkeypatch):
    def command(*more: str) -> int:
        return run(["train", *more])

    first = [str(tissue), "--noise", "symmetric:0.3", "--tune", "head:1", "--epochs", "3", *SETTINGS]
    first += ["--set", "train.choice=stability", "--set", "train.checkpoint_minutes=0.00001"]
    assert command(*first, "--out", str(tmp_path / "whole")) == 0
    saves, real = [], Run.save

    def save(self, state):
        real(self, state)
        saves.append(state.step)
        if len(saves) in (2, 6):
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", save)
    assert command(*first, "--out", str(tmp_path / "run")) == 130
    assert command("--resume", "--out", str(tmp_path / "run")) == 130
    assert command("--resume", "--out", str(tmp_path / "run")) == 0
    whole, resumed = (Run.open(tmp_path / name) for name in ("whole", "run"))
    for name in ("best", "last"):
        assert equal(resumed.weights(name)[0], whole.weights(name)[0])
    for key in ("best", "choices", "last", "final"):
        assert resumed.metrics()[key] == whole.metrics()[key], key
    assert set(whole.metrics()["choices"]) == {"validation", "stability"}
    assert whole.metrics()["best"]["epoch"] == whole.metrics()["choices"]["stability"]["epoch"]
