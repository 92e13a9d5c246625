"""Images in the GPU's memory, or copied there; the logic runs on the CPU too, the kernels interpreted."""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with PyTorch for NVIDIA GPUs on Linux")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where the kernels are defined

from noisyssl.errors import ConfigError, MachineError
from noisyssl.pipelines import fused, gpu_streams, loader, resident  # fused: while interpreted
from noisyssl.pipelines.batched import BatchedStream
from noisyssl.pipelines.gpu_streams import DecodedStream, ResidentStream, UploadStream
from noisyssl.pipelines.loader import open_loader, streams
from noisyssl.pipelines.pack import pack
from noisyssl.pipelines.scan import open_samples
from noisyssl.pipelines.schedule import Schedule
from noisyssl.views import evaluation, pair, training

os.environ.pop("TRITON_INTERPRET", None)

CPU = torch.device("cpu")
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def files(tissue):
    return open_samples(tissue, labelled=False)


@pytest.fixture(scope="module")
def packed(files, tmp_path_factory):
    return open_samples(pack(files, tmp_path_factory.mktemp("packed") / "set", size=40), labelled=False)


def stream(kind, samples, views=None, device=HERE):
    schedule = Schedule(samples.where("train"), batch=4, seed=3, shuffle=True, drop_last=True)
    views = training(16) if views is None else views
    return kind(samples, views, schedule.slots(1, 1, {}), batch=4, seed=3, device=device, threads=2)


def close_to(got, expected):
    difference = (got.cpu().int() - expected.int()).abs()
    return difference.max() <= 2 and (difference > 0).float().mean() < 0.02


@pytest.mark.parametrize("kind", [ResidentStream, UploadStream])
def test_they_give_the_views_of_every_other_stream(kind, packed, monkeypatch):
    monkeypatch.setattr("noisyssl.pipelines.ahead.PIECE", 8)  # the draws of two batches at a time
    ours, theirs = stream(kind, packed), stream(BatchedStream, packed, device=CPU)
    for _ in range(5):
        assert ours.flying[0].place == theirs.flying[0].place
        for got, expected in zip(next(ours), next(theirs), strict=True):
            assert close_to(got, expected)
    ours.close()
    theirs.close()


def test_what_is_in_flight_runs_over_the_end_of_an_epoch(packed):
    ours = stream(ResidentStream, packed, views=())
    count = len(packed.where("train")) // 4
    places = []
    for _ in range(2 * count):
        places.append(ours.flying[0].place)
        next(ours)
    assert places == [(1 + (1 + n) // count, (1 + n) % count) for n in range(2 * count)]
    ours.close()


def test_all_loaders_share_one_copy_and_the_last_one_frees_it(packed):
    first, second = stream(ResidentStream, packed), stream(ResidentStream, packed)
    assert first._store is second._store
    pixels = first._store.pixels
    assert pixels.shape == packed.array.shape
    assert np.array_equal(pixels.cpu().numpy(), packed.array)
    first.close(), second.close()
    del first, second, pixels
    assert not resident._stores


def test_a_copy_in_parts_is_whole(packed, monkeypatch):
    monkeypatch.setattr(resident, "PART", 3 * packed.array[0].size)
    assert np.array_equal(resident.Store(packed.array, CPU).pixels.numpy(), packed.array)


def test_auto_takes_the_gpus_memory_only_for_packed_images_that_fit(packed, files, monkeypatch):
    cuda, size = torch.device("cuda"), packed.array.size
    monkeypatch.setattr(loader, "has_dali", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(size / 0.6) + 2, 0))
    assert streams("auto", packed, cuda) == ("resident", ResidentStream)
    assert streams("auto", files, cuda) == ("dali-gpu", DecodedStream)
    assert streams("auto", packed, CPU)[0] == "dali-cpu"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(size / 0.6) - 2, 0))
    assert streams("auto", packed, cuda) == ("upload", UploadStream)
    assert streams("resident", packed, cuda)[0] == "resident"  # asked for: it may take more
    monkeypatch.setattr(loader, "can_fuse", lambda device: False)
    assert streams("auto", packed, cuda)[0] == "dali-cpu"


def test_a_gpu_whose_kernels_do_not_run_leaves_the_views_to_the_cpu_and_says_why(packed, monkeypatch):
    """Triton needs a C compiler, which slim containers lack."""

    def fails(device):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")

    cuda = torch.device("cuda", 0)
    gpu_streams.unfused.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused, "try_on", fails)
    monkeypatch.setattr(loader, "has_dali", lambda: True)
    assert streams("auto", packed, cuda)[0] == "dali-cpu"
    where = np.arange(len(packed))
    opened = open_loader(packed, where, (evaluation(16),), batch=2, seed=0, device=cuda)
    assert opened.note == (
        "the GPU does not make the views: Triton fails (RuntimeError: Failed to find C compiler. "
        "Please specify via CC.); it takes a C compiler and Python's headers."
    )
    gpu_streams.unfused.cache_clear()
    assert open_loader(packed, where, (evaluation(16),), batch=2, seed=0, device=CPU).note == ""


def test_images_in_the_gpus_memory_without_a_gpu_or_as_files_are_refused(packed, files):
    with pytest.raises(MachineError, match=r"loader is 'resident'.*takes an NVIDIA GPU.*data.loader=auto"):
        streams("resident", packed, CPU)
    with pytest.raises(ConfigError, match=r"the images are files; run `noisyssl data pack`"):
        streams("resident", files, torch.device("cuda"))


def test_too_little_memory_is_one_line(packed, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(MachineError, match=r"the images take 0.0 GiB, more than.*data.loader=auto"):
        resident.store(packed, CPU)


@gpu
@pytest.mark.parametrize("kind", ["resident", "upload", "dali-gpu"])
def test_on_the_gpu_each_sample_comes_once_and_looks_as_on_the_cpu(kind, packed, files, monkeypatch):
    if kind == "dali-gpu":
        pytest.importorskip("nvidia.dali", reason="needs nvidia-dali")
    data = files if kind == "dali-gpu" else packed
    monkeypatch.setattr(loader, "has_dali", lambda: True)
    monkeypatch.setattr(loader, "fits", lambda *_: kind == "resident")

    def opened(how, device):
        return open_loader(data, data.where("train"), pair(32), batch=4, seed=1, device=device, kind=how)

    with_gpu, reference = opened("auto", torch.device("cuda")), opened("batched", CPU)
    assert with_gpu.name == kind
    for ours, theirs in zip(with_gpu, reference, strict=True):
        assert ours.index.tolist() == theirs.index.tolist()
        assert ours.key.tolist() == theirs.key.tolist()
        for got, expected in zip(ours.views, theirs.views, strict=True):
            assert got.is_contiguous(memory_format=torch.channels_last)
            assert close_to(got, expected)
    with_gpu.close()
    reference.close()


@gpu
def test_a_batch_of_the_gpu_can_be_kept(packed, monkeypatch):
    for fitting in (True, False):
        monkeypatch.setattr(loader, "fits", lambda *_, fitting=fitting: fitting)
        opened = open_loader(
            packed, packed.where("train"), pair(32), batch=4, seed=1, device=torch.device("cuda")
        )
        kept = [batch.views[0] for batch in opened]
        opened.close()
        again = [
            batch.views[0].clone()
            for batch in open_loader(
                packed, packed.where("train"), pair(32), batch=4, seed=1, device=torch.device("cuda")
            )
        ]
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
