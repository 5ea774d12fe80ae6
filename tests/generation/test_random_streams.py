"""The noise is uniform where it should be, independent where it should be, and pure."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from trl_selfplay.generation.random_streams import gumbel_noise, stream_key, token_words


def uniforms(keys, step, vocab_size) -> np.ndarray:
    """Invert the Gumbel distribution function: u = exp(-exp(-noise))."""
    noise = gumbel_noise(token_words(vocab_size, "cpu"), keys, step)
    return np.exp(-np.exp(-noise.double().numpy()))


def test_the_stream_key_depends_on_every_argument_and_on_nothing_else() -> None:
    base = (1, 2, "train", "ab" * 16, 3)
    keys = {stream_key(*base)}
    for place, other in enumerate((2, 3, "eval", "cd" * 16, 4)):
        keys.add(stream_key(*base[:place], other, *base[place + 1 :]))
    assert len(keys) == 6
    assert stream_key(*base) == stream_key(*base)
    assert all(0 <= key < 2**64 for key in keys)


def test_the_stream_key_is_the_same_in_every_release() -> None:
    """A resumed run must find the streams of the run that was killed."""
    assert stream_key(42, 0, "train", "0" * 32, 0) == 0xDEF3C547CFA8E094


@pytest.mark.parametrize("step", [0, 1, 777])
def test_the_noise_is_gumbel_distributed(step) -> None:
    keys = [stream_key(0, 0, "train", "p", i) for i in range(4)]
    u = uniforms(keys, step, 50_000)
    for row in u:
        assert stats.kstest(row, "uniform").pvalue > 1e-3
    noise = -np.log(-np.log(u))
    # standard error of the mean: 1.28 / sqrt(200,000) = 0.003
    assert noise.mean() == pytest.approx(0.57722, abs=0.01)
    assert noise.std() == pytest.approx(math.pi / math.sqrt(6), abs=0.015)


def test_one_token_over_many_steps_and_keys_is_uniform() -> None:
    words = token_words(3, "cpu")
    by_step = np.stack([gumbel_noise(words, [99], step)[0].numpy() for step in range(4000)])
    by_key = gumbel_noise(words, list(range(20_000)), 5).numpy()
    for noise in (by_step, by_key):
        u = np.exp(-np.exp(-noise.astype(np.float64)))
        for token in range(3):
            assert stats.kstest(u[:, token], "uniform").pvalue > 1e-3


def test_neighbouring_tokens_rows_steps_and_keys_are_uncorrelated() -> None:
    vocab_size = 100_000
    here = uniforms([10, 11], 3, vocab_size)
    later = uniforms([10], 4, vocab_size)[0]
    pairs = {
        "token": (here[0][:-1], here[0][1:]),
        "key": (here[0], here[1]),
        "step": (here[0], later),
        "key and step": (here[1], later),
        "token and key": (here[0][:-1], here[1][1:]),
    }
    for name, (a, b) in pairs.items():
        # five standard errors of a correlation over 100,000 pairs
        assert abs(np.corrcoef(a, b)[0, 1]) < 5 / math.sqrt(vocab_size), name
        # and jointly uniform on a 16 x 16 grid, which sees more than linear dependence
        counts = np.histogram2d(a, b, bins=16, range=[[0, 1], [0, 1]])[0]
        assert stats.chisquare(counts.ravel()).pvalue > 1e-4, name


def test_a_single_flipped_key_bit_changes_half_of_the_noise_bits() -> None:
    base = gumbel_noise(token_words(2000, "cpu"), [123456789], 0)[0].numpy()
    for bit in range(64):
        other = gumbel_noise(token_words(2000, "cpu"), [123456789 ^ (1 << bit)], 0)[0].numpy()
        u, v = np.exp(-np.exp(-base)), np.exp(-np.exp(-other))
        # top bits agree for half of 2,000 tokens: standard error 0.011
        assert abs(((u < 0.5) == (v < 0.5)).mean() - 0.5) < 0.06, bit


def test_the_argmax_with_noise_draws_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -6.0])
    words = token_words(5, "cpu")
    draws = torch.cat(
        [
            (gumbel_noise(words, range(start, start + 10_000), 7) + logits).argmax(dim=1)
            for start in range(0, 60_000, 10_000)
        ]
    )
    counts = np.bincount(draws.numpy(), minlength=5)
    expected = torch.softmax(logits.double(), 0).numpy() * counts.sum()
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_a_row_has_the_same_noise_alone_and_in_a_batch() -> None:
    words = token_words(1237, "cpu")  # not a multiple of any vector width
    keys = [stream_key(3, 1, "eval", f"p{i}", i) for i in range(9)]
    together = gumbel_noise(words, keys, 12)
    for row, key in enumerate(keys):
        assert torch.equal(gumbel_noise(words, [key], 12)[0], together[row])


@pytest.mark.parametrize("chunk_elements", [1, 1000, 2500, 4000, 10**6])
def test_chunking_does_not_change_the_noise(chunk_elements) -> None:
    words = token_words(999, "cpu")
    keys = list(range(7))
    expected = gumbel_noise(words, keys, 2)
    assert torch.equal(gumbel_noise(words, keys, 2, chunk_elements=chunk_elements), expected)


def test_a_token_has_the_same_noise_in_any_vocabulary() -> None:
    small = gumbel_noise(token_words(100, "cpu"), [5], 1)
    large = gumbel_noise(token_words(50_000, "cpu"), [5], 1)
    assert torch.equal(small[0], large[0, :100])


def test_the_noise_is_written_where_asked_and_is_always_finite() -> None:
    words = token_words(200_000, "cpu")
    out = torch.full((4, 200_000), float("nan"))
    returned = gumbel_noise(words, [1, 2, 3, 2**64 - 1], 10**6, out=out)
    assert returned.data_ptr() == out.data_ptr()
    assert bool(torch.isfinite(out).all())
    # of 800,000 draws the largest is about ln 800,000 = 13.6, the smallest about -2.6
    assert 11 < float(out.max()) < 22.2
    assert -2.82 < float(out.min()) < -2.3


def test_the_noise_equals_a_plain_integer_computation() -> None:
    """Against Python integers, so that wrap-around and logical shifts are what they should be."""
    mask64, mask32 = 2**64 - 1, 2**32 - 1
    gamma = 0x9E3779B97F4A7C15

    def splitmix64(z) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask64
        return z ^ (z >> 31)

    def noise(key, step, token) -> float:
        row = splitmix64((key + (step + 1) * gamma) & mask64)
        first, second = row & mask32, row >> 32
        x = (splitmix64(token * gamma & mask64) >> 32) ^ first
        x ^= x >> 16
        x = (x * 0x7FEB352D & mask32) ^ second
        x ^= x >> 15
        x = x * 0x846CA68B & mask32
        x = (x ^ (x >> 16)) & 0x7FFFFFFF
        return -math.log(-math.log1p(-(x + 0.5) / 2**31))

    keys = [0, 1, 2**63, stream_key(0, 0, "train", "p", 0)]
    got = gumbel_noise(token_words(50, "cpu"), keys, 17)
    for row, key in enumerate(keys):
        expected = [noise(key, 17, token) for token in range(50)]
        assert got[row].tolist() == pytest.approx(expected, rel=2e-6, abs=2e-6)
