"""Completions that repeat themselves, and those that don't."""

import random

import pytest

from trl_selfplay.evaluation.repetition import is_repetitive

TEXT = " ".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=200))  # compresses badly


def naive(ids: list[int]) -> bool:
    """Count every gram of 8 without overlap."""
    for start in range(len(ids) - 7):
        count = place = 0
        while place <= len(ids) - 8:
            found = ids[place : place + 8] == ids[start : start + 8]
            count, place = count + found, place + (8 if found else 1)
        if count >= 4:
            return True
    return False


@pytest.mark.parametrize("seed", range(20))
def test_repeated_grams_are_found_as_by_a_loop_over_all_of_them(seed) -> None:
    rng = random.Random(seed)
    ids = [rng.randrange(1000) for _ in range(80)]
    gram = [rng.randrange(3) for _ in range(8)]
    for _ in range(rng.randrange(2, 6)):
        place = rng.randrange(len(ids))
        ids[place:place] = gram
    assert is_repetitive(ids, TEXT) == naive(ids)


def test_overlapping_repeats_count_once() -> None:
    assert not is_repetitive([5] * 31 + [6], TEXT)
    assert is_repetitive([5] * 32, TEXT)


def test_order_matters_and_large_ids_do_not_overflow() -> None:
    gram = [10**6 + i for i in range(8)]
    others = [random.Random(i).sample(gram, 8) for i in range(4)]
    assert not is_repetitive([token for other in others for token in other], TEXT)
    assert is_repetitive(gram * 4, TEXT)


def test_text_that_compresses_fivefold_is_repetitive_and_short_text_never() -> None:
    ids = list(range(100))
    assert is_repetitive(ids, "the same again, " * 20)
    assert not is_repetitive(ids, TEXT)
    assert not is_repetitive(ids[:31], "a" * 1000)
    assert not is_repetitive((), "")
