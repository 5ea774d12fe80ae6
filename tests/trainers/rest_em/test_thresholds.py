"""Thresholds of ReST: strict, nested, a prompt's own. Invariants RE-3, RE-4, RE-5, RE-8, RE-9."""

from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_selfplay.trainers.rest_em.thresholds import above_threshold, check_thresholds, threshold_of

REWARDS = st.lists(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.7, 0.7, 1.0]), min_size=1, max_size=8)
LEVELS = {"value": (-0.5, 1.5), "percentile": (0.0, 100.0), "interpolate": (0.0, 1.0)}


def rollouts_of(make_rollout, rewards, prompt_id="p"):
    return [
        make_rollout(prompt_id=prompt_id, sample_index=i, reward=r, rewards=(r,))
        for i, r in enumerate(rewards)
    ]


def selected(rollouts, kind, level):
    is_above = above_threshold(rollouts, kind, level)
    return {(r.prompt_id, r.sample_index) for r in rollouts if is_above(r)}


def test_a_reward_equal_to_the_value_is_not_selected(make_rollout) -> None:
    """RE-4: strict; -inf selects everything, a reward of 0 included."""
    rollouts = rollouts_of(make_rollout, [0.0, 0.7, 0.71])
    assert selected(rollouts, "value", 0.7) == {("p", 2)}
    assert selected(rollouts, "value", 0.0) == {("p", 1), ("p", 2)}
    assert len(selected(rollouts, "value", -inf)) == 3


@pytest.mark.parametrize("kind", LEVELS)
def test_a_higher_threshold_selects_a_part_of_what_a_lower_one_does(make_rollout, kind) -> None:
    """RE-3, and for the kinds of a prompt's own no prompt is left without."""

    @given(REWARDS, st.floats(*LEVELS[kind]), st.floats(*LEVELS[kind]))
    def check(rewards, one, other) -> None:
        rollouts = rollouts_of(make_rollout, rewards)
        low, high = sorted((one, other))
        larger, smaller = selected(rollouts, kind, low), selected(rollouts, kind, high)
        assert smaller <= larger
        assert smaller or kind == "value"

    check()


def test_a_prompts_own_best_is_selected_at_every_percentile(make_rollout) -> None:
    """RE-8: computed inside a prompt, whatever the other prompts' rewards are."""
    rollouts = [
        *rollouts_of(make_rollout, [0.0, 0.1, 0.2], "poor"),
        *rollouts_of(make_rollout, [0.8, 0.9, 1.0], "rich"),
    ]
    for level in (0.0, 10.0, 50.0, 90.0, 99.9, 100.0):
        assert {("poor", 2), ("rich", 2)} <= selected(rollouts, "percentile", level)
    assert selected(rollouts, "percentile", 50.0) == {("poor", 2), ("rich", 2)}
    assert threshold_of([0.0, 0.1, 0.2], "percentile", 25.0) == np.percentile([0.0, 0.1, 0.2], 25.0)


def test_interpolation_runs_from_the_mean_to_the_maximum(make_rollout) -> None:
    """RE-9."""
    rollouts = rollouts_of(make_rollout, [0.0, 0.5, 0.7, 0.8])  # mean 0.5
    assert selected(rollouts, "interpolate", 0.0) == {("p", 2), ("p", 3)}
    assert selected(rollouts, "interpolate", 1.0) == {("p", 3)}
    assert threshold_of([0.0, 0.5, 1.0], "interpolate", 0.5) == pytest.approx(0.75)


def test_equal_rewards_are_all_the_maximum(make_rollout) -> None:
    rollouts = rollouts_of(make_rollout, [0.1, 0.1, 0.1])
    for kind, level in (("percentile", 0.0), ("percentile", 90.0), ("interpolate", 0.0)):
        assert len(selected(rollouts, kind, level)) == 3


def test_what_was_cut_or_abstained_on_sets_no_threshold(make_rollout) -> None:
    rollouts = rollouts_of(make_rollout, [0.2, 0.4])
    cut = make_rollout(prompt_id="p", sample_index=7, reward=1.0, finish="length")
    unknown = make_rollout(prompt_id="p", sample_index=8, reward=None, rewards=(None,))
    assert selected([*rollouts, cut, unknown], "percentile", 90.0) & {("p", 1)}


@pytest.mark.parametrize(
    ("thresholds", "kind", "message"),
    [
        ([0.5, 0.5], "value", "doesn't rise"),
        ([0.7, 0.5], "value", "doesn't rise"),
        ([0.5, nan], "value", "doesn't rise"),
        ([], "value", "empty"),
        ([50.0, 101.0], "percentile", "between 0 and 100"),
        ([-1.0], "percentile", "between 0 and 100"),
        ([0.5, 1.5], "interpolate", "between 0 and 1"),
        ([0.5, inf], "value", "inf"),
        ([0.5], "mean", "threshold_kind='mean'"),
    ],
)
def test_thresholds_that_can_not_work_are_refused(thresholds, kind, message) -> None:
    """RE-5."""
    with pytest.raises(ValueError, match=message):
        check_thresholds(thresholds, kind)


def test_no_filter_may_come_first() -> None:
    check_thresholds([-inf, 0.0, 0.5], "value")
    check_thresholds([-inf, 50.0, 100.0], "percentile")
