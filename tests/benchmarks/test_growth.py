"""The growth benchmark at a size that takes seconds."""

from noisyssl.benchmarks import growth


def test_each_part_has_a_record(monkeypatch):
    monkeypatch.setattr(growth, "STEADY", 500)
    found = list(growth.measure(largest=10_000, threads=2, turns=3, images=64))
    epoch, opening, memory = (one["figures"] for one in found)
    assert list(epoch) == ["10 images", "100 images", "1,000 images", "10,000 images"]
    assert all(0 < row["us / image"] < 10_000 for row in epoch.values())
    assert 0 < opening["scanned before, s"] < opening["first time, s"]
    assert memory["growth"] == memory["last third, MiB"] / memory["middle third, MiB"]
    assert 0.8 < memory["growth"] < 1.25
    assert memory["most, MiB"] >= memory["last third, MiB"]


def test_memory_counts_what_the_process_holds():
    before = growth.anonymous()
    held = bytearray(b"x") * (64 << 20)
    assert 60 < growth.anonymous() - before < 70
    del held
