import errno
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from noisyssl import checkpoint, disk
from noisyssl.errors import ConfigError, MachineError, TrainingError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3), "empty": torch.zeros(0)}


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "x.safetensors", TENSORS, {"step": 3, "names": ["é"]})
    tensors, facts = checkpoint.load(tmp_path / "x.safetensors")
    assert facts == {"step": 3, "names": ["é"]}
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_channels_last_tensors_keep_their_values(tmp_path):
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    checkpoint.save(tmp_path / "x", {"w": weight}, {})
    assert torch.equal(checkpoint.load(tmp_path / "x")[0]["w"], weight)


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "x.safetensors"
    checkpoint.save(path, TENSORS, {})
    good = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(200):
        data = bytearray(good)
        at = int(torch.randint(len(data), (), generator=generator))
        data[at] ^= 1 << int(torch.randint(8, (), generator=generator))
        path.write_bytes(bytes(data))
        try:
            tensors, facts = checkpoint.load(path)
        except TrainingError:
            found += 1
        else:  # a bit of padding or of a name's case in the header that changes nothing
            assert facts == {}
            assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert found > 150


def test_a_truncated_file_is_found(tmp_path):
    path = tmp_path / "x"
    checkpoint.save(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TrainingError, match="delete it"):
        checkpoint.load(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_failing_disk_leaves_the_old_file_and_says_so(tmp_path, monkeypatch, call, number):
    path = tmp_path / "x"
    checkpoint.save(path, TENSORS, {"which": "old"})

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    if call == "replace":
        monkeypatch.setattr(type(path), "replace", fail)
    else:
        fake = dict(vars(os), fsync=staticmethod(fail))
        monkeypatch.setattr(disk, "os", type("broken_os", (), fake))
    with pytest.raises(
        MachineError, match="the disk is full" if number == errno.ENOSPC else "cannot be written"
    ):
        checkpoint.save(path, TENSORS, {"which": "new"})
    assert checkpoint.load(path)[1] == {"which": "old"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3)
        self.bn1 = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 2)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.trunk.", "encoder_q."])
def test_foreign_weights_fit_whatever_their_prefix(prefix):
    torch.manual_seed(0)
    theirs, ours = Net(), Net()
    weights = {prefix + k: v for k, v in theirs.state_dict().items() if not k.startswith("fc")} | {
        "queue": torch.zeros(3)
    }
    loaded, missing, unused = checkpoint.fit_weights(ours, weights)
    assert torch.equal(ours.conv1.weight, theirs.conv1.weight)
    assert torch.equal(ours.bn1.running_mean, theirs.bn1.running_mean)
    assert set(missing) == {"fc.weight", "fc.bias"}
    assert unused == ["queue"]
    assert len(loaded) == 7


def test_weights_of_another_shape_are_left_out_and_of_another_model_refused():
    ours = Net()
    weights = Net(8).state_dict() | {"fc.weight": torch.ones(2, 4)}
    loaded, missing, _ = checkpoint.fit_weights(ours, weights)
    assert "fc.weight" in loaded
    assert "conv1.weight" in missing
    with pytest.raises(ConfigError, match="set backbone and stem"):
        checkpoint.fit_weights(ours, {"other": torch.zeros(3, 3)})


class Harm:
    """What a hostile file would run when unpickled."""

    def __reduce__(self):
        return (os.system, ("touch /tmp/noisyssl-was-here",))


def test_foreign_files_run_no_code(tmp_path):
    state = Net().state_dict()
    torch.save(state, tmp_path / "good.pt")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "nested.pt")
    save_file(state, tmp_path / "good.safetensors")
    for name in ("good.pt", "nested.pt", "good.safetensors"):
        assert checkpoint.read_weights(tmp_path / name).keys() == state.keys()
    (tmp_path / "bad.pt").write_bytes(pickle.dumps(Harm()))
    torch.save({"w": Harm()}, tmp_path / "worse.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    for name in ("bad.pt", "worse.pt", "junk.safetensors"):
        with pytest.raises(ConfigError, match="cannot be loaded safely"):
            checkpoint.read_weights(tmp_path / name)
    with pytest.raises(ConfigError, match="more than plain tensors") as caught:
        checkpoint.read_weights(tmp_path / "worse.pt")
    assert "weights_only" not in str(caught.value), "torch's own advice is to run its code"
    (tmp_path / "run.json").touch()
    with pytest.raises(ConfigError, match=r"is no file; .* A pretraining run is named with --init"):
        checkpoint.read_weights(tmp_path)
    with pytest.raises(ConfigError, match="not a mapping"):
        checkpoint.read_weights(tmp_path / "list.pt")
    with pytest.raises(ConfigError, match="does not exist"):
        checkpoint.read_weights(tmp_path / "absent.pt")
    assert not os.path.exists("/tmp/noisyssl-was-here")
