"""How two rounds are compared."""

import numpy as np
import pytest

from trl_selfplay.evaluation.evidence import parts_of, relative_fall, share_of


def test_a_relative_fall_is_that_of_the_ratio_of_sums() -> None:
    before = {"a": (10.0, 2.0), "b": (30.0, 2.0)}
    now = {"a": (5.0, 2.0), "b": (15.0, 2.0)}
    fall, error, first, last = relative_fall(before, now)
    assert (fall, first, last) == (0.5, 10.0, 5.0)
    assert error == pytest.approx(0.0)  # every prompt has fallen by half


@pytest.mark.parametrize("paired", [True, False])
def test_its_standard_error_is_that_of_repeated_draws(paired) -> None:
    rng = np.random.default_rng(0)
    falls, errors = [], []
    for _ in range(400):
        level = rng.gamma(4.0, 1.0, (2, 60))
        if paired:
            level[1] = level[0]
        sides = level * [[1.0], [0.7]] + rng.normal(0.0, 0.5, (2, 60))
        sizes = rng.integers(1, 5, (2, 60))
        names = [range(60), range(60) if paired else range(100, 160)]
        parts = [
            {str(i): (v * n, float(n)) for i, v, n in zip(ids, values, counts, strict=True)}
            for ids, values, counts in zip(names, sides, sizes, strict=True)
        ]
        fall, error, *_ = relative_fall(*parts)
        falls.append(fall)
        errors.append(error)
    assert np.mean(falls) == pytest.approx(0.3, abs=0.01)
    assert np.std(falls) == pytest.approx(np.mean(errors), rel=0.15)


def test_nothing_is_compared_with_nothing() -> None:
    """CD-10."""
    one = parts_of({"a": 1.0})
    assert relative_fall(one, one) is None
    assert relative_fall({}, {}) is None
    zero = parts_of({"a": 0.0, "b": 0.0})
    assert relative_fall(zero, zero) is None
    assert share_of(0, 0, "") is None
