from functools import partial

from noisyssl.benchmarks.step import YARDSTICK, config_of, measure, method_step, peak
from noisyssl.methods import METHODS


def test_a_record_has_a_row_per_method_and_the_yardstick_is_one():
    one = measure(("simclr", "rotation"), batch=16, threads=1, runs=3, memory=False)
    assert list(one["figures"]) == [YARDSTICK, "simclr", "rotation"]
    assert one["figures"][YARDSTICK]["times backbone"] == 1.0
    assert one["spread"]["simclr"]["times backbone"]["p10"] > 0
    assert one["n"] == 3
    assert one["settings"]["batch"] == 16
    assert one["settings"]["size"] == 64


def test_peak_memory_counts_what_steps_take_and_not_what_imports_do():
    small, large = (
        peak(partial(method_step, config_of("simclr", "small", batch)), steps=1) for batch in (8, 64)
    )
    assert 20 < small < large < 1000  # 2.8 million weights, their gradients and two moments are 45 MiB


def test_the_small_recipe_has_every_method_at_its_own_batch():
    for name, kind in METHODS.items():
        config = config_of(name, "small", 256)
        assert isinstance(config.pretrain.options, kind.Config)
