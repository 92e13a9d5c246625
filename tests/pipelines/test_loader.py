import importlib.util
from itertools import chain, islice

import numpy as np
import pytest
import torch
from PIL import Image

from noisyssl.errors import ConfigError, DataError, MachineError
from noisyssl.pipelines import loader as loading
from noisyssl.pipelines.draws import keys
from noisyssl.pipelines.loader import open_loader
from noisyssl.pipelines.samples import Samples
from noisyssl.views import evaluation, pair

CPU = torch.device("cpu")
N, BATCH = 22, 4
KINDS = [
    pytest.param(
        "dali",
        marks=pytest.mark.skipif(importlib.util.find_spec("nvidia.dali") is None, reason="needs nvidia-dali"),
    ),
    "batched",
]
both = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny tensors: on a busy machine threads that wait for each other made these tests five times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shade(index):
    return 10 * index + 8


@pytest.fixture
def samples(tmp_path):
    """Image i is `shade(i)` below and a little lighter above: a batch shows which samples it holds."""
    paths = [f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(N)]
    heights, widths = 20 + np.arange(N) % 5, 30 - np.arange(N) % 3
    for i, path in enumerate(paths):
        pixels = np.full((heights[i], widths[i], 3), shade(i), np.uint8)
        pixels[: heights[i] // 2] += 8
        Image.fromarray(pixels).save(tmp_path / path, quality=95)
    return Samples(
        root=tmp_path, paths=paths, classes=("a", "b"), labels=np.arange(N) % 2, splits=np.full(N, "train"),
        groups=paths, heights=heights.astype(np.int32), widths=widths.astype(np.int32),
        native=np.ones(N, bool), digests=[""] * N,
    )  # fmt: skip


@pytest.fixture
def opened(samples):
    """open_loader on the samples with small defaults; closed at the end."""
    loaders = []

    def open_(kind, indices=None, views=None, **settings):
        indices = np.arange(N) if indices is None else indices
        settings = {"batch": BATCH, "seed": 5, "device": CPU, "kind": kind} | settings
        loaders.append(open_loader(samples, indices, views or pair(16), **settings))
        return loaders[-1]

    yield open_
    for loader in loaders:
        loader.close()


def equal(a, b):
    same = torch.equal(a.index, b.index) and torch.equal(a.key, b.key)
    return same and all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def epochs(loader, count):
    return [list(loader) for _ in range(count)]


@both
@pytest.mark.parametrize(
    ("first", "sizes"),
    [(0, [4, 4, 4, 4, 4, 2]), (1, [4, 4, 4, 4, 5]), (2, [4, 4, 4, 4, 4])],  # a single image joins the others
)
def test_every_index_comes_exactly_once_per_epoch(opened, kind, first, sizes):
    indices = np.arange(first, N)
    loader = opened(kind, indices)
    orders = []
    for batches in epochs(loader, 3):
        assert len(batches) == len(loader) == len(sizes)
        assert [len(batch.index) for batch in batches] == sizes
        orders.append(torch.cat([batch.index for batch in batches]).tolist())
        assert sorted(orders[-1]) == indices.tolist()
    assert len({tuple(x) for x in orders}) == 3


@both
def test_drop_last_leaves_only_full_batches(opened, kind):
    loader = opened(kind, drop_last=True)
    for batches in epochs(loader, 2):
        assert [len(batch.index) for batch in batches] == [4] * 5
        assert len(torch.cat([batch.index for batch in batches]).unique()) == 20


@both
def test_without_shuffle_indices_ascend_and_pixels_follow(opened, kind):
    loader = opened(kind, np.arange(N)[::-1], (evaluation(16),), shuffle=False)
    for batches in epochs(loader, 2):
        assert torch.cat([batch.index for batch in batches]).tolist() == list(range(N))
        for batch in batches:
            shown = batch.views[0].float().mean((1, 2, 3))
            assert (shown - shade(batch.index) - 4).abs().max() < 1.5


@both
def test_labels_and_keys_follow_the_index_and_can_be_replaced(opened, kind):
    loader = opened(kind, labels=torch.arange(N) * 100)
    for epoch in range(2):
        for batch in loader:
            assert torch.equal(batch.label, batch.index * (100 if epoch == 0 else -1))
            assert batch.key.tolist() == keys(5, epoch, batch.index.numpy()).tolist()
        loader.labels = torch.arange(N) * -1
    loader.labels = None
    assert next(iter(loader)).label is None


@both
def test_two_fresh_loaders_give_identical_bytes_and_another_seed_does_not(opened, kind):
    first, second, other = opened(kind), opened(kind), opened(kind, seed=6)
    for a, b in zip(chain(*epochs(first, 2)), chain(*epochs(second, 2)), strict=True):
        assert equal(a, b)
    assert not equal(next(iter(opened(kind))), next(iter(other)))


@both
def test_memory_is_channels_last(opened, kind):
    for view in next(iter(opened(kind))).views:
        assert view.dtype == torch.uint8
        assert view.shape == (BATCH, 3, 16, 16)
        assert view.is_contiguous(memory_format=torch.channels_last)


@both
@pytest.mark.parametrize("position", [0, 3, 5, 6])
def test_start_in_the_middle_equals_the_uninterrupted_stream(opened, kind, position):
    whole = epochs(opened(kind), 3)
    loader = opened(kind)
    list(islice(loader, 2))  # whatever was read ahead must not show
    loader.start(1, position)
    resumed = epochs(loader, 2)
    for a, b in zip(whole[1][position:] + whole[2], chain(*resumed), strict=True):
        assert equal(a, b)
    assert len(resumed[0]) == 6 - position


@both
def test_position_is_where_a_resumed_loader_goes_on(opened, kind):
    whole = [*chain(*epochs(opened(kind), 2))]
    for done in (1, 5, 6, 7):
        loader = opened(kind)
        for epoch in range(2):
            list(islice(loader, min(done, 6) if epoch == 0 else done - 6))
            if done <= 6:
                break
        resumed = opened(kind)
        resumed.start(*loader.position)
        assert equal(next(iter(resumed)), whole[done])


@both
def test_a_sample_removed_by_the_scan_changes_no_draw_of_the_others(opened, kind):
    def by_index(loader):
        return {
            int(index): [view[i] for view in batch.views]
            for batch in loader
            for i, index in enumerate(batch.index)
        }

    whole, without = by_index(opened(kind)), by_index(opened(kind, np.delete(np.arange(N), 9)))
    assert set(whole) - set(without) == {9}
    for index, views in without.items():
        assert all(torch.equal(a, b) for a, b in zip(views, whole[index], strict=True))


@both
def test_a_dropped_sample_leaves_a_gap_and_nothing_else(opened, kind):
    whole = epochs(opened(kind), 2)
    missing = [whole[0][2].index[1].item(), *whole[0][4].index.tolist()]
    loader = opened(kind)
    loader.start(0, 0, {index: "broken" for index in missing})
    gappy = epochs(loader, 2)
    assert len(gappy[0]) == 5, "a batch of dropped samples only is skipped"
    for full, left in zip(whole[0][:4] + whole[0][5:] + whole[1], gappy[0] + gappy[1], strict=True):
        kept = ~torch.isin(full.index, torch.tensor(missing))
        assert torch.equal(full.index[kept], left.index)
        for a, b in zip(full.views, left.views, strict=True):
            assert torch.equal(a[kept], b)


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])


BREAK = {
    "truncated": truncate,
    "gone": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"?" * 99),
}


@both
@pytest.mark.parametrize("how", BREAK)
@pytest.mark.parametrize("foreign", [False, True], ids=["native", "foreign"])
def test_a_file_that_breaks_in_the_run_stops_it_with_its_path(opened, samples, kind, how, foreign):
    samples.native[:] = not foreign
    loader = opened(kind)
    index = list(opened(kind))[4].index[2].item()
    BREAK[how](samples.file(index))
    with pytest.raises(DataError, match=rf"{samples.paths[index]}.*--quarantine"):
        list(loader)


@both
@pytest.mark.parametrize("how", BREAK)
def test_with_quarantine_it_is_dropped_and_nothing_is_lost_or_repeated(opened, samples, kind, how):
    whole = epochs(opened(kind), 2)
    broken = [whole[0][3].index[0].item(), whole[0][4].index[2].item(), whole[1][0].index[1].item()]
    loader = opened(kind, quarantine=True)
    running = iter(loader)
    got = [next(running)]
    for index in set(broken) - set(torch.cat([batch.index for batch in whole[0][:3]]).tolist()):
        BREAK[how](samples.file(index))
    got += [*running]
    for index in broken:
        samples.file(index).write_bytes(b"?")
    got += [*loader]
    assert set(loader.dropped) == set(broken)
    assert all(samples.paths[index] in reason for index, reason in loader.dropped.items())
    for number, (full, left) in enumerate(zip(whole[0] + whole[1], got, strict=True)):
        seen = [index for index in full.index.tolist() if index in left.index.tolist()]
        assert left.index.tolist() == seen
        assert set(full.index.tolist()) - set(seen) <= set(broken)
        kept = torch.isin(full.index, left.index)
        for a, b in zip(full.views, left.views, strict=True):
            assert torch.equal(a[kept], b), number


def places(loader):
    return [tuple(batch.index.tolist()) for batch in loader]


def test_dropping_leaves_no_training_batch_of_a_single_image(opened):
    """22 images in batches of 4: the last has 2, and BatchNorm cannot train on 1."""
    whole = places(opened("batched"))
    loader = opened("batched")
    loader.start(0, 0, {whole[-1][0]: "broken"})
    assert places(loader) == whole[:-1]
    loader.start(0, 0, {index: "broken" for index in whole[1][:2]})
    assert places(loader) == [whole[0], whole[1][2:], *whole[2:]]
    kept = opened("batched", shuffle=False)
    kept.start(0, 0, {21: "broken"})
    assert places(kept)[-1] == (20,), "an evaluation sees every image"


def test_too_little_left_for_any_batch_ends_the_run(opened):
    loader = opened("batched", np.arange(4), batch=2)
    first = places(opened("batched", np.arange(4), batch=2))
    loader.start(0, 0, {pair[0]: "broken" for pair in first})
    with pytest.raises(DataError, match="2 of 4 samples were dropped"):
        places(loader)


@both
def test_an_error_that_no_file_explains_is_raised_as_it_is(opened, samples, kind, monkeypatch):
    loader = opened(kind)
    running = iter(loader)
    next(running)

    def fail(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("noisyssl.pipelines.batched.draw", fail)
    monkeypatch.setattr("noisyssl.pipelines.compiled.apply", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(running)


@both
def test_all_files_broken_ends_the_run(opened, samples, kind):
    for index in range(N):
        samples.file(index).unlink()
    with pytest.raises(DataError, match=f"all {N} samples were dropped"):
        list(opened(kind, quarantine=True))


def test_too_few_samples_says_to_lower_the_batch(opened):
    with pytest.raises(ConfigError, match=r"batch is 32 with 22 samples.*Lower the batch"):
        opened("batched", batch=32, drop_last=True)
    with pytest.raises(ConfigError, match="0 samples"):
        opened("batched", np.array([], np.int64))
    assert len(opened("batched", batch=32)) == 1


def test_auto_takes_dali_where_it_is_and_says_so(opened, monkeypatch):
    assert opened("batched").name == "batched"
    if importlib.util.find_spec("nvidia.dali"):
        assert opened("auto").name == "dali-cpu"
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert opened("auto").name == "batched"
    with pytest.raises(MachineError, match=r"pip install noisyssl\[train\]"):
        opened("dali")
