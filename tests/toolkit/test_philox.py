import re

import numpy as np
import pytest
import torch

from noisyssl.philox import philox, uniform, words

KNOWN = [  # Random123 1.14, tests/kat_vectors, philox4x32 10
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def split(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(counter, key, expected, kind):
    out = philox(tuple(kind([word]) for word in split(counter)), tuple(kind([word]) for word in split(key)))
    assert [int(word[0]) for word in out] == split(expected)
    out = philox(tuple(kind([word]) for word in split(counter)), tuple(split(key)))
    assert [int(word[0]) for word in out] == split(expected)


def test_known_answers_hold_for_numpy_scalars_without_a_warning(recwarn):
    counter, key, expected = KNOWN[2]
    out = philox(tuple(map(np.int64, split(counter))), tuple(split(key)))
    assert [int(word) for word in out] == split(expected)
    assert not recwarn


def test_numpy_and_torch_give_the_same_words():
    generator = np.random.default_rng(0)
    counter = tuple(generator.integers(0, 2**32, (4, 1000)))
    key = tuple(generator.integers(0, 2**32, (2, 1000)))
    ours = philox(counter, key)
    theirs = philox(tuple(map(torch.from_numpy, counter)), tuple(map(torch.from_numpy, key)))
    for a, b in zip(ours, theirs, strict=True):
        assert b.dtype == torch.int64
        np.testing.assert_array_equal(a, b.numpy())


def keys(count):
    return np.random.default_rng(1).integers(-(2**63), 2**63 - 1, count)


def test_uniform_is_the_same_number_in_numpy_and_torch():
    ours, theirs = uniform(keys(500), 3, 7), uniform(torch.from_numpy(keys(500)), 3, 7)
    assert ours.dtype == np.float64
    assert theirs.dtype == torch.float32
    np.testing.assert_array_equal(ours, theirs.double().numpy())
    assert uniform(keys(0), 3, 7).shape == (0, 7)


def test_uniform_is_uniform_and_below_one():
    draws = uniform(np.arange(20_000), 0, 5)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, 32, (0, 1))[0]
    expected = draws.size / 32
    assert ((counts - expected) ** 2 / expected).sum() < 70  # chi-square, 31 degrees: beyond p = 1e-4
    assert np.abs(np.corrcoef(draws.T) - np.eye(5)).max() < 0.03
    assert np.abs(np.corrcoef(draws[1:, 0], draws[:-1, 0])[0, 1]) < 0.03  # neighbouring keys


def test_largest_word_stays_below_one_in_float32(monkeypatch):
    monkeypatch.setattr("noisyssl.philox.words", lambda key, stream, count: key[:, None])
    assert uniform(torch.tensor([2**32 - 1]), 0, 1).item() == 1 - 2**-24
    assert uniform(np.array([2**32 - 1]), 0, 1).item() == 1 - 2**-24


def test_a_row_depends_on_its_key_and_stream_only():
    all_rows = words(keys(50), 2, 9)
    np.testing.assert_array_equal(words(keys(50)[7:8], 2, 9), all_rows[7:8])
    np.testing.assert_array_equal(words(keys(50), 2, 5), all_rows[:, :5])
    assert (words(keys(50), 3, 9) != all_rows).mean() > 0.99
    flipped = words(keys(50) ^ (1 << 40), 2, 9)  # the upper word of the key counts as well
    assert (flipped != all_rows).mean() > 0.99


def test_torch_compile_takes_it_in_one_graph():
    """A break in the midst of a method's step would cut what can be fused or captured."""
    whole = torch.compile(uniform, backend="eager", fullgraph=True)
    key = torch.arange(5) * 7919
    assert torch.equal(whole(key, 3, 6), uniform(key, 3, 6))


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_it_gives_the_same_numbers(device):
    """Its products wrap around in int64, which compilers might take for undefined."""
    from torch._inductor.utils import run_and_get_code

    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    generator = torch.Generator().manual_seed(0)
    key = torch.randint(-(2**62), 2**62, (4096,), generator=generator).to(device)
    found, code = run_and_get_code(torch.compile(uniform), key, 3, 6)
    assert torch.equal(found, uniform(key, 3, 6))
    # a multiple of a place in memory, which Triton would compute in 32 bits
    assert not any(re.search(r"\d{10}L? ?\* ?x\d", text) for text in code)
