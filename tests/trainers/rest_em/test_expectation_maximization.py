"""The algorithm by itself, on tables: EM-5, EM-13, EM-14, RF-7, and stored rewards (RE-12)."""

import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from trl_selfplay.rollouts.record import load_rollouts, save_rollouts
from trl_selfplay.rollouts.selection import (
    SelectionRules,
    default_normal_form,
    reasoning_path,
    select,
)


def run_select(rollouts, *, cap=None, seed=0, form=default_normal_form, history=()):
    rules = SelectionRules(
        is_correct=lambda r: r.passes(1.0), seed=seed, normal_form=form, max_per_prompt=cap
    )
    return select(rollouts, rules, history=history)


def test_exact_steps_never_lower_the_expected_reward() -> None:
    """EM-13: E: q ∝ r · p. M: p := q, the exact minimum of KL(q ‖ p) over tables."""
    rng = np.random.default_rng(0)
    for binary in (True, False):
        reward = (rng.random(8) < 0.4).astype(float) if binary else rng.random(8)
        reward[0] = 1.0
        policy = rng.dirichlet(np.ones(8))
        expected = [policy @ reward]
        for _ in range(5):
            posterior = reward * policy / (reward @ policy)
            assert np.allclose(posterior / posterior.sum(), posterior)
            policy = posterior
            expected.append(policy @ reward)
        assert all(b >= a - 1e-12 for a, b in pairwise(expected))
        if binary:
            assert expected[1] == pytest.approx(1.0)


def test_selected_samples_follow_the_exact_e_step(make_rollout) -> None:
    """EM-13: what the filter keeps of many samples is q ∝ r · p."""
    rng = np.random.default_rng(1)
    policy, reward = rng.dirichlet(np.ones(8)), np.array([1.0, 0.0] * 4)
    draws = rng.choice(8, size=20_000, p=policy)
    rollouts = [
        make_rollout(sample_index=i, completion=str(o), reward=float(reward[o]))
        for i, o in enumerate(draws)
    ]
    kept = Counter(int(r.completion) for r in run_select(rollouts, form=None).kept)
    shares = np.array([kept[o] for o in range(8)]) / sum(kept.values())
    assert shares == pytest.approx(reward * policy / (reward @ policy), abs=0.02)


def test_the_kept_count_follows_the_binomial(make_rollout) -> None:
    """EM-14: min(cap, correct), its mean over seeds as predicted; all completions differ."""
    samples, rate, cap = 8, 0.3, 3
    counts = []
    for seed in range(2000):
        rng = np.random.default_rng(seed)
        rollouts = [
            make_rollout(sample_index=i, completion=f"path {i}", reward=float(rng.random() < rate))
            for i in range(samples)
        ]
        counts.append(len(run_select(rollouts, cap=cap, seed=seed).kept))
    from math import comb

    expected = sum(
        min(cap, c) * comb(samples, c) * rate**c * (1 - rate) ** (samples - c)
        for c in range(samples + 1)
    )
    assert np.mean(counts) == pytest.approx(expected, abs=4 * np.std(counts) / 2000**0.5)


def test_the_cap_draws_by_the_seed_alone(make_rollout) -> None:
    """EM-5: whatever the order; and not the first ones."""
    rollouts = [make_rollout(sample_index=i, completion=f"path {i}") for i in range(12)]
    kept = {}
    for seed in range(8):
        kept[seed] = [r.sample_index for r in run_select(rollouts, cap=3, seed=seed).kept]
        shuffled = random.Random(seed).sample(rollouts, 12)
        again = [r.sample_index for r in run_select(shuffled, cap=3, seed=seed).kept]
        assert kept[seed] == again
    assert len({tuple(k) for k in kept.values()}) > 1
    assert not {i for k in kept.values() for i in k} <= {0, 1, 2}


def test_deduplication_is_idempotent_and_blind_to_order(make_rollout) -> None:
    """RF-7: as a set of paths."""
    rng = random.Random(0)
    rollouts = [
        make_rollout(sample_index=i, completion=f"<<{a}+{b}={a + b}>> said in way {i}")
        for i, (a, b) in enumerate((rng.randint(1, 3), rng.randint(1, 3)) for _ in range(30))
    ]
    once = run_select(rollouts, form=reasoning_path).kept
    assert run_select(once, form=reasoning_path).kept == once
    backwards = [
        make_rollout(sample_index=29 - r.sample_index, completion=r.completion) for r in rollouts
    ]
    paths = [
        {reasoning_path(r.completion) for r in run_select(s, form=reasoning_path).kept}
        for s in (rollouts, backwards)
    ]
    assert paths[0] == paths[1]
    assert len(once) == len(paths[0]) < 30


def test_stored_rewards_come_back_bit_for_bit(make_rollout, tmp_path) -> None:
    """RE-12: a resumed selection reads the scores and asks no reward model again."""
    rng = np.random.default_rng(0)
    rollouts = [
        make_rollout(sample_index=i, reward=float(r), rewards=(float(r),))
        for i, r in enumerate(rng.normal(size=50))
    ]
    save_rollouts(tmp_path / "shard.parquet", rollouts)
    assert load_rollouts(tmp_path / "shard.parquet") == rollouts


def test_history_joins_before_the_cap_and_gives_way_to_newer_copies(make_rollout) -> None:
    """EM-15."""
    new = [make_rollout(round_index=2, sample_index=i, completion=f"new {i}") for i in range(2)]
    old = [
        make_rollout(round_index=1, sample_index=0, completion="new 0"),
        make_rollout(round_index=1, sample_index=1, completion="old 1"),
        make_rollout(round_index=0, sample_index=1, completion="OLD 1"),
    ]
    selection = run_select(new, history=old)
    assert [r.completion for r in selection.history] == ["old 1"]
    assert selection.funnel.history == 1
    capped = run_select(new, cap=2, history=old)
    assert len(capped.kept) + len(capped.history) == 2
    assert capped.funnel.sampled == 2
