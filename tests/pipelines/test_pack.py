import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from noisyssl.errors import ConfigError, DataError, MachineError
from noisyssl.geometry import evaluation_view
from noisyssl.pipelines import pack as packing
from noisyssl.pipelines.pack import pack, read_pack
from noisyssl.pipelines.scan import check, open_samples


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("NOISYSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packing, "BLOCK", 8)


@pytest.fixture
def source(tmp_path):
    """45 images of two classes, 12 x 14 pixels, three to a group; the names need care."""
    rows = ["path,label,group,true_label"]
    for i in range(45):
        pixels = np.random.default_rng(i).integers(0, 256, (14, 12, 3), dtype=np.uint8)
        name = f"=1,{i}.png"
        Image.fromarray(pixels).save(tmp_path / name)
        rows.append(f'"{name}",{"xy"[i // 3 % 2]},p{i // 3},{"" if i else "x"}')
    (tmp_path / "t.csv").write_text("\n".join(rows))
    return tmp_path / "t.csv"


def test_packing_as_is_loses_nothing(source, tmp_path):
    samples = open_samples(source, seed=3)
    packed = open_samples(pack(samples, tmp_path / "out"), seed=4)
    assert packed.array.shape == (45, 14, 12, 3)
    assert isinstance(packed.array, np.memmap)
    for i in range(45):
        np.testing.assert_array_equal(packed.image(i), samples.image(i))
    for name in ("paths", "classes", "groups"):
        assert getattr(packed, name) == getattr(samples, name)
    for name in ("labels", "true_labels", "splits", "widths", "heights"):
        np.testing.assert_array_equal(getattr(packed, name), getattr(samples, name))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"images.npy", "samples.csv", "pack.json"}
    assert not (tmp_path / "out.partial").exists()
    assert np.load(tmp_path / "out" / "images.npy").shape == (45, 14, 12, 3)


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_packing_at_a_size_is_the_evaluation_view(source, tmp_path, fit):
    samples = open_samples(source)
    array, _ = read_pack(pack(samples, tmp_path / "out", size=8, fit=fit))
    for i in (0, 17, 44):
        np.testing.assert_array_equal(array[i], evaluation_view(samples.image(i), 8, fit))


def test_packing_unlabelled_images(source, tmp_path):
    packed = open_samples(pack(open_samples(source, labelled=False), tmp_path / "out"))
    assert (packed.classes, packed.true_labels, len(packed)) == ((), None, 45)


def test_what_cannot_be_packed(source, tmp_path):
    samples = open_samples(source)
    with pytest.raises(ConfigError, match="--size is 4; it must lie in"):
        pack(samples, tmp_path / "out", size=4)
    with pytest.raises(ConfigError, match=r"--fit 'corp' is unknown.*Did you mean 'crop'\?"):
        pack(samples, tmp_path / "out", size=8, fit="corp")
    pack(samples, tmp_path / "out", size=8)
    with pytest.raises(ConfigError, match="out exists; name a new folder"):
        pack(samples, tmp_path / "out", size=8)
    Image.new("RGB", (20, 30)).save(tmp_path / "=1,3.png")
    with pytest.raises(ConfigError, match="2 sizes, from 12 x 14 to 20 x 30 pixels; name one"):
        pack(open_samples(source), tmp_path / "other")


KILLED = """
import os, signal, sys
from noisyssl.pipelines import pack as packing
from noisyssl.pipelines.scan import open_samples
packing.BLOCK = 8
kill = lambda done, total: done == int(sys.argv[3]) and os.kill(os.getpid(), signal.SIGKILL)
packing.pack(open_samples(sys.argv[1]), sys.argv[2], size=10, progress=kill)
"""


def test_a_killed_pack_goes_on(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, source, out, "30"])
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    done, said = [], []
    samples = open_samples(source)
    pack(samples, out, size=10, progress=lambda i, _: done.append(i), say=said.append)
    assert done == list(range(25, 46))  # 24 images were in finished blocks
    assert said == [f"{out}.partial: 24 images of an earlier pack are kept."]
    unkilled = pack(samples, tmp_path / "unkilled", size=10)
    for name in ("images.npy", "samples.csv", "pack.json"):
        assert (out / name).read_bytes() == (unkilled / name).read_bytes()


def stop_at(samples, out, count, **settings):
    def stop(done, _):
        if done == count:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(samples, out, progress=stop, **settings)


def test_finished_blocks_are_verified_before_they_are_kept(source, tmp_path):
    samples, done = open_samples(source), []
    stop_at(samples, tmp_path / "out", 30)
    images = tmp_path / "out.partial" / "images.npy"
    data = bytearray(images.read_bytes())
    data[-2000 - 504 * 8] ^= 1  # in the second or third block
    images.write_bytes(data)
    pack(samples, tmp_path / "out", progress=lambda i, _: done.append(i))
    assert 8 < done[0] < 25
    assert check(tmp_path / "out").images == 45


@pytest.mark.parametrize(
    ("torn", "first"),
    [
        (lambda text: text + b"ab12", 25),
        (lambda text: text + b"00" * 32 + b"\n", 25),
        (lambda text: text + b"\xff\n", 25),
        (lambda text: text[:-70], 17),
        (lambda text: b"", 1),
    ],
)
def test_a_torn_progress_line_is_ignored(source, tmp_path, torn, first):
    samples, done = open_samples(source), []
    stop_at(samples, tmp_path / "out", 30)
    progress = tmp_path / "out.partial" / "blocks.txt"
    progress.write_bytes(torn(progress.read_bytes()))
    pack(samples, tmp_path / "out", progress=lambda i, _: done.append(i))
    assert done[0] == first
    assert check(tmp_path / "out").images == 45


def test_other_data_or_settings_start_afresh(source, tmp_path):
    said, done = [], []
    stop_at(open_samples(source), tmp_path / "out", 30, size=10)
    Image.new("RGB", (12, 14)).save(tmp_path / "=1,3.png")
    samples = open_samples(source)
    pack(samples, tmp_path / "out", size=10, say=said.append, progress=lambda i, _: done.append(i))
    assert done[0] == 1
    assert "unfinished pack of other data or settings; it is started afresh" in said[0]
    array, _ = read_pack(tmp_path / "out", every_block=True)
    np.testing.assert_array_equal(array[3], evaluation_view(samples.image(3), 10))


def test_two_packs_do_not_write_one_folder(source, tmp_path):
    samples = open_samples(source)

    def second(done, _):
        if done == 10:
            pack(samples, tmp_path / "out")

    with pytest.raises(ConfigError, match="is being written by another process"):
        pack(samples, tmp_path / "out", progress=second)


def test_a_full_disk_keeps_what_is_finished(source, tmp_path, monkeypatch):
    samples, done, calls = open_samples(source), [], []
    flush = packing._flush

    def full(file):
        calls.append(file)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        flush(file)

    monkeypatch.setattr(packing, "_flush", full)
    with pytest.raises(MachineError, match="the disk is full; free space and run the same command again"):
        pack(samples, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(packing, "_flush", flush)
    pack(samples, tmp_path / "out", progress=lambda i, _: done.append(i))
    assert done[0] == 17


def test_a_disk_that_is_too_small_is_seen_before_the_work(source, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(MachineError, match="MiB and the disk has"):
        pack(open_samples(source), tmp_path / "out")


def test_an_image_that_breaks_after_the_scan_is_named(source, tmp_path):
    samples = open_samples(source)
    (tmp_path / "=1,20.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"=1,20\.png: is empty"):
        pack(samples, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_what_was_altered_is_refused(source, tmp_path):
    out = pack(open_samples(source), tmp_path / "out")
    flip(out / "images.npy", -1)
    with pytest.raises(DataError, match=r"images\.npy: images 40-44 were changed. Pack the data again"):
        read_pack(out)
    flip(out / "images.npy", -1)
    flip(out / "samples.csv", -70)
    with pytest.raises(DataError, match=r"samples\.csv was changed after packing"):
        read_pack(out)
    flip(out / "samples.csv", -70)
    flip(out / "images.npy", 100)
    with pytest.raises(DataError, match=r"images\.npy is not described by pack\.json"):
        read_pack(out)
    flip(out / "images.npy", 100)
    read_pack(out, every_block=True)
    os.truncate(out / "images.npy", 1000)
    with pytest.raises(DataError, match=r"has 1,000 bytes, not 22,808"):
        read_pack(out)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": 2}, "packed by version 2; this is version 1. Pack the data again"),
        ({"shape": [45, 14, 12]}, "Pack the data again"),
        ({"shape": "x"}, "Pack the data again"),
        ({"blocks": []}, "not described by pack.json"),
        ({"blocks": None}, "not a readable pack"),
    ],
)
def test_a_description_that_does_not_fit_is_refused(source, tmp_path, changed, message):
    out = pack(open_samples(source), tmp_path / "out")
    described = json.loads((out / "pack.json").read_text()) | changed
    (out / "pack.json").write_text(json.dumps(described))
    with pytest.raises(DataError) as error:
        open_samples(out)
    assert message in str(error.value)


def test_check_reads_every_block_and_opening_a_few(source, tmp_path, monkeypatch):
    out = pack(open_samples(source), tmp_path / "out")
    flip(out / "images.npy", -1)
    monkeypatch.setattr(packing, "SAMPLED", 0)
    assert len(open_samples(out)) == 45
    with pytest.raises(DataError, match="were changed"):
        check(out)


def test_a_pack_can_be_packed_smaller(source, tmp_path):
    first = open_samples(pack(open_samples(source), tmp_path / "out"))
    second = open_samples(pack(first, tmp_path / "small", size=8))
    np.testing.assert_array_equal(second.image(5), evaluation_view(first.image(5), 8))
    assert second.paths == first.paths


def test_a_full_disk_while_describing_keeps_the_images(source, tmp_path, monkeypatch):
    samples, done = open_samples(source), []
    write = packing.write_whole

    def full(path, data):
        if path.name == "pack.json":
            raise MachineError("full")
        write(path, data)

    monkeypatch.setattr(packing, "write_whole", full)
    with pytest.raises(MachineError):
        pack(samples, tmp_path / "out")
    monkeypatch.setattr(packing, "write_whole", write)
    pack(samples, tmp_path / "out", progress=lambda i, _: done.append(i))
    assert done == []
    assert check(tmp_path / "out").images == 45
