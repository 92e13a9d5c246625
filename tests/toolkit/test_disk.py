import os

import pytest

from noisyssl import disk
from noisyssl.disk import write_whole
from noisyssl.errors import MachineError


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    write_whole(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "os", type("full_os", (), dict(vars(os), fsync=staticmethod(full))))
    with pytest.raises(MachineError, match="the disk is full; free space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["t.csv"]


def test_bytes_and_text_with_strange_names_survive(tmp_path):
    write_whole(tmp_path / "deep" / "t", "a\udcff")
    assert (tmp_path / "deep" / "t").read_bytes() == b"a\xff"
    write_whole(tmp_path / "deep" / "t", b"b")
    assert (tmp_path / "deep" / "t").read_bytes() == b"b"
