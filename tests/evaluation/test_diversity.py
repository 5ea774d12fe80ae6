"""Detectors of poorer samples: what they count, when they speak. Invariants CD-1 to CD-4."""

from itertools import combinations
from statistics import fmean

import numpy as np
import pytest

from trl_selfplay.evaluation.diversity import (
    distinct_correct,
    distinct_ratios,
    diversity_metrics,
    rarefied,
    solved_by_difficulty,
    summarize_samples,
    warn_poorer_samples,
    warn_sharpening,
)
from trl_selfplay.rollouts.selection import default_normal_form as form


def summary(rollouts, threshold=1.0):
    return summarize_samples(rollouts, form, threshold)


def sample_set(make_rollout, texts, rewards=None, length=4):
    """Summarize rollouts made from a list of texts for each prompt."""
    rollouts = [
        make_rollout(
            prompt_id=f"p{p}", sample_index=s, completion=text, completion_ids=(5,) * length,
            reward=1.0 if rewards is None else rewards[p][s],
        )
        for p, group in enumerate(texts)
        for s, text in enumerate(group)
    ]  # fmt: skip
    return summary(rollouts)


def test_distinct_ratio_is_1_for_all_different_and_1_over_n_for_all_equal(make_rollout) -> None:
    """CD-3."""
    rollouts = sample_set(make_rollout, [["a", "b", "c", "d"], ["x", "X ", " x", "x"]])
    assert distinct_ratios(rollouts) == {"p0": 1.0, "p1": 0.25}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_rarefaction_is_the_mean_over_all_draws(size) -> None:
    counts = [3, 1, 2]
    kinds = [kind for kind, count in enumerate(counts) for _ in range(count)]
    expected = fmean(len({kinds[i] for i in draw}) for draw in combinations(range(6), size))
    assert rarefied(counts, size) == pytest.approx(expected)


def test_newly_solved_prompts_do_not_look_like_lost_paths(make_rollout) -> None:
    """CD-4: only prompts solved in both rounds count."""
    texts = [[f"path {i}" for i in range(8)], [f"way {i}" for i in range(8)]]
    before = sample_set(make_rollout, texts, [[1.0] * 8, [0.0] * 8])
    now = sample_set(make_rollout, texts, [[1.0] * 8, [1.0] + [0.0] * 7])
    first, second = distinct_correct(before, now)
    assert first == second == {"p0": pytest.approx(8.0)}


def test_solved_share_by_base_success() -> None:
    base = {"a": 1.0, "b": 0.75, "c": 0.6, "d": 0.3, "e": 0.1, "f": 0.0}
    now = {"a": 1.0, "b": 0.0, "c": 0.1, "d": 0.5, "e": 0.0, "f": 0.2}
    assert solved_by_difficulty(base, now) == {
        "easy": 0.5, "medium": 1.0, "hard": 1.0, "very_hard": 0.5,
    }  # fmt: skip


def random_round(make_rollout, rng, prompts=40, samples=8, kinds=6):
    texts = rng.integers(kinds, size=(prompts, samples))
    rewards = (rng.random((prompts, samples)) < rng.random((prompts, 1))).astype(float).tolist()
    return sample_set(make_rollout, [[f"t{t}" for t in row] for row in texts], rewards)


def test_copies_of_one_round_are_silent(make_rollout) -> None:
    """CD-1: at most 5 % of 200 simulated pairs of rounds."""
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        first, now = (random_round(make_rollout, rng, prompts=20) for _ in range(2))
        alarms += bool(warn_poorer_samples(first, now, 1))
        alarms += warn_sharpening(first, now, 1) is not None
    assert alarms <= 10


def test_a_collapse_onto_one_text_is_told(make_rollout) -> None:
    rng = np.random.default_rng(0)
    first = random_round(make_rollout, rng)
    now = sample_set(make_rollout, [["same"] * 8] * 40)
    warnings = warn_poorer_samples(first, now, 2)
    assert len(warnings) == 2
    assert all("round 2" in warning for warning in warnings)


@pytest.mark.parametrize(("length", "speaks"), [(4, False), (9, True), (1, True), (7, False)])
def test_lengths_are_told_beyond_half_and_double(make_rollout, length, speaks) -> None:
    texts = [[f"{p} {s}" for s in range(4)] for p in range(10)]
    first = sample_set(make_rollout, texts)
    warnings = warn_poorer_samples(first, sample_set(make_rollout, texts, length=length), 1)
    assert bool([w for w in warnings if "tokens on average" in w]) is speaks


def test_sharpening_is_pass_at_1_up_and_pass_at_k_down(make_rollout) -> None:
    """CD-2: half of the prompts solved always, the others lost; silent where both rise."""
    rng = np.random.default_rng(0)
    texts = [[str(s) for s in range(8)] for _ in range(60)]
    before = sample_set(make_rollout, texts, (rng.random((60, 8)) < 0.3).astype(float).tolist())
    lost = [[0.9 if p % 2 else 0.0] * 8 for p in range(60)]
    sharp = (rng.random((60, 8)) < np.array(lost)).astype(float).tolist()
    warning = warn_sharpening(before, sample_set(make_rollout, texts, sharp), 2)
    assert warning is not None
    assert "round 2" in warning
    assert "pass@8" in warning
    better = (rng.random((60, 8)) < 0.8).astype(float).tolist()
    assert warn_sharpening(before, sample_set(make_rollout, texts, better), 2) is None


def test_the_rounds_numbers_for_the_log(make_rollout) -> None:
    rollouts = sample_set(make_rollout, [["a", "b"], ["c", "c"]], [[1.0, 1.0], [0.0, 0.0]])
    assert diversity_metrics(rollouts, rollouts) == {
        "play/distinct": 0.75,
        "play/coverage": 0.5,
        "play/distinct_correct": 2.0,
        "play/solved_easy": 1.0,
        "play/solved_very_hard": 0.0,
    }


def test_rewards_with_degrees_are_told_by_the_best_of_a_prompt(make_rollout) -> None:
    """Counts by a threshold that nothing reaches are left out; where something does they stay."""
    rewards = {"a": [0.2, 0.6], "b": [0.3, 0.1]}
    rollouts = [
        make_rollout(prompt_id=i, sample_index=k, reward=r, completion=f"{i} {k}")
        for i, values in rewards.items()
        for k, r in enumerate(values)
    ]
    cut = make_rollout(prompt_id="a", sample_index=2, reward=0.9, finish="length")
    with_cut = summary([*rollouts, cut])
    numbers = diversity_metrics(with_cut, with_cut, has_degrees=True)
    assert numbers == {"play/distinct": 1.0, "play/best_reward": pytest.approx(0.45)}
    reached = summary(rollouts, threshold=0.5)
    counted = diversity_metrics(reached, reached, has_degrees=True)
    assert counted["play/coverage"] == 0.5
    assert counted["play/solved_medium"] == 1.0
