import os

from noisyssl.benchmarks import image_zoo, scanning


def test_every_broken_file_is_counted_and_no_good_one(monkeypatch, tmp_path):
    monkeypatch.setenv("NOISYSSL_CACHE", str(tmp_path))
    made = scanning.measure(good=len(image_zoo.KINDS), each=1, size=32, runs=2)
    figures = made["figures"]
    assert (figures["broken"], figures["found"], figures["false_alarms"]) == (12, 12, 0)
    assert figures["images_per_s"] > 0
    assert made["settings"]["kinds"] == len(image_zoo.KINDS)
    assert os.environ["NOISYSSL_CACHE"] == str(tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_wrong_reason_does_not_count(monkeypatch):
    reasons = dict(image_zoo.REASONS, empty="is something else")
    monkeypatch.setattr(scanning.image_zoo, "REASONS", reasons)
    assert scanning.measure(good=2, each=1, size=32, runs=1)["figures"]["found"] == 11
