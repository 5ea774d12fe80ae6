"""Tell whether a completion repeats itself.

In: a completion's tokens and text. Out: True or False. Both checks take time in proportion to its length.
"""

import zlib
from collections.abc import Sequence

import numpy as np

GRAM, FEWEST_REPEATS, LEAST_ZLIB_RATIO = 8, 4, 0.2
# Odd multipliers, so that the sum of eight products modulo 2^64 distinguishes the order of tokens.
_MULTIPLIERS = np.array(
    [0x9E3779B97F4A7C15 * (2 * i + 1) ** 3 % 2**64 | 1 for i in range(GRAM)], np.uint64
)


def is_repetitive(token_ids: Sequence[int], text: str) -> bool:
    """Return whether 8 tokens in a row occur 4 times without overlap, or the text compresses fivefold.

    Short completions are never repetitive: four times 8 tokens are at least 32.
    """
    if len(token_ids) < GRAM * FEWEST_REPEATS:
        return False
    encoded = text.encode("utf-8", "surrogatepass")
    if encoded and len(zlib.compress(encoded, 1)) < LEAST_ZLIB_RATIO * len(encoded):
        return True
    return _repeats_a_gram(np.asarray(token_ids, np.uint64))


def _repeats_a_gram(token_ids: np.ndarray) -> bool:
    """Return whether some gram occurs often enough without overlap, by hashes of 64 bits."""
    grams = np.lib.stride_tricks.sliding_window_view(token_ids, GRAM)  # (T − 7, 8)
    hashes = (grams * _MULTIPLIERS).sum(axis=1, dtype=np.uint64)
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    # Whether the same gram stands three places further on: only then can it occur four times.
    if not (ordered[FEWEST_REPEATS - 1 :] == ordered[: 1 - FEWEST_REPEATS]).any():
        return False
    starts = np.flatnonzero(np.diff(ordered)) + 1
    for places in np.split(order, starts):
        count, end = 0, 0
        for place in places.tolist():
            if place >= end:
                count, end = count + 1, place + GRAM
        if count >= FEWEST_REPEATS:
            return True
    return False
