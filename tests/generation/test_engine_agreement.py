"""Whether an engine has the policy's weights, judged by log-probs alone."""

import random

import pytest

from trl_selfplay.generation.engine_agreement import EngineMismatchError, compare

LENGTHS = [32] * 16


def drawn(noise, moved, engine_has, seed=0):
    """Log-probs under current weights and last ones, and those of an engine that has either."""
    rng = random.Random(seed)
    current = [-40.0 + rng.gauss(0, 5) for _ in LENGTHS]
    last = [c + rng.gauss(0, moved) for c in current]
    held = {"current": current, "last": last}[engine_has]
    return [h + rng.gauss(0, noise) for h in held], current, last


def test_the_gap_is_the_mean_difference_per_token() -> None:
    agreement = compare([-1.0, -8.0], [-2.0, -4.0], None, [4, 8], limit=1.0)
    assert agreement.gap == pytest.approx((1 / 4 + 4 / 8) / 2)
    assert agreement.tokens == 12
    assert agreement.nearer_to == "not told"


@pytest.mark.parametrize("seed", range(20))
def test_the_last_weights_are_found_out_within_the_limit(seed) -> None:
    """Rounding of .01 per token, a round that moved log-probs by .03 per token: both are small."""
    fresh = compare(*drawn(0.3, 1.0, "current", seed), LENGTHS, limit=0.05)
    fresh.check()
    assert fresh.nearer_to == "current"
    stale = compare(*drawn(0.3, 1.0, "last", seed), LENGTHS, limit=0.05)
    assert stale.gap < stale.limit
    with pytest.raises(EngineMismatchError, match="weights of the last hand-over"):
        stale.check()


def test_a_current_engine_is_not_taken_for_a_stale_one() -> None:
    """At every ratio of a round's step to rounding, the smallest included."""
    for seed in range(3000):
        moved = 10 ** random.Random(-seed).uniform(-1.5, 0.5)
        compare(*drawn(0.3, moved, "current", seed), LENGTHS, limit=0.05).check()


@pytest.mark.parametrize("engine_has", ["current", "last"])
def test_where_a_round_moved_less_than_rounding_nothing_is_told(engine_has) -> None:
    agreement = compare(*drawn(1.0, 0.1, engine_has), LENGTHS, limit=0.05)
    agreement.check()
    assert agreement.nearer_to == "not told"
    assert agreement.to_dict()["nearer_to"] == "not told"


def test_equal_weights_and_few_completions_tell_nothing() -> None:
    same = compare([-1.0] * 16, [-1.0] * 16, [-1.0] * 16, LENGTHS, limit=0.05)
    few = compare([-1.0] * 3, [-1.0] * 3, [-2.0] * 3, LENGTHS[:3], limit=0.05)
    assert {same.nearer_to, few.nearer_to} == {"not told"}


@pytest.mark.parametrize("value", [-9.0, float("nan"), float("-inf")])
def test_another_policy_is_refused(value) -> None:
    agreement = compare([value] * 4, [-1.0] * 4, None, [10] * 4, limit=0.05)
    with pytest.raises(EngineMismatchError, match="samples from another policy"):
        agreement.check()
