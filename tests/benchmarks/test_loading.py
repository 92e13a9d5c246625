"""The loading benchmark: an opponent whose workers all work, and turns that count what they made."""

import time

import pytest

from noisyssl.benchmarks import loading


class Slow:
    """Eight images, each of which takes a tenth of a second."""

    def __init__(self, *_):
        pass

    def __len__(self):
        return 8

    def __getitem__(self, index):
        time.sleep(0.1)
        return index


def test_all_workers_of_the_opponent_work_though_there_are_few_images(monkeypatch):
    monkeypatch.setattr(loading, "Files", Slow)
    workers, batches = 6, 24
    side = loading.opponent(None, (), "tensor", workers, 1, 0)
    seconds = loading.seconds_of(side, batches, 2 * workers)
    assert batches / seconds == pytest.approx(workers / 0.1, rel=0.35)


def test_what_lies_finished_at_the_start_is_not_counted():
    """A stream that has eight batches ready, and then makes one in a fiftieth of a second."""

    def stream():
        for number in range(1000):
            if number >= 8:
                time.sleep(0.02)
            yield number

    assert loading.seconds_of(stream, 10, 8) == pytest.approx(0.2, rel=0.3)
    assert loading.seconds_of(stream, 4) < 0.01
