"""Which right and wrong completions are paired."""

import random
from dataclasses import replace
from itertools import product

import pytest

from trl_selfplay.rollouts.pairs import pair_rollouts


@pytest.fixture
def samples(make_rollout):
    """Build a prompt's rollouts from one letter each: right, wrong, cut, or without a reward."""

    def build(prompt_id, kinds, first=0):
        return [
            make_rollout(
                prompt_id=prompt_id,
                sample_index=first + i,
                completion_ids=(10 + first + i, 1),
                completion=f"{kind} {first + i}",
                reward={"r": 1.0, "w": 0.0, "R": 1.0, "W": 0.0, "-": None}[kind],
                rewards=({"r": 1.0, "w": 0.0, "R": 1.0, "W": 0.0, "-": None}[kind],),
                finish="length" if kind.isupper() else "eos",
            )
            for i, kind in enumerate(kinds)
        ]

    return build


def pair(rollouts, gold=(), **changes):
    settings = {"is_right": lambda rollout: rollout.passes(1.0), "max_pairs": 3,
                "deduplicate": False, "fits": lambda rollout: True, "seed": 0}  # fmt: skip
    return pair_rollouts(rollouts, gold, **settings | changes)


def keys(pairing):
    return [((r.prompt_id, r.sample_index), (w.prompt_id, w.sample_index))
            for r, w in zip(pairing.chosen, pairing.rejected, strict=True)]  # fmt: skip


def test_every_pair_is_a_right_and_a_wrong_completion_of_one_prompt(samples) -> None:
    """IR-1 and IR-4: at most K of them, none twice; what was cut or has no reward is in none."""
    rollouts = [*samples("a", "rrwwRW-"), *samples("b", "rwwww"), *samples("c", "rw")]
    found = keys(pair(rollouts))
    assert len(set(found)) == len(found) == 3 + 3 + 1
    rewards = {(r.prompt_id, r.sample_index): r for r in rollouts}
    for right, wrong in found:
        assert right[0] == wrong[0]
        assert rewards[right].reward == 1.0
        assert rewards[wrong].reward == 0.0
        assert not rewards[right].is_truncated
        assert not rewards[wrong].is_truncated
    every = keys(pair(rollouts, max_pairs=None))
    assert sorted(every) == sorted(
        (("a", i), ("a", j)) for i, j in product((0, 1), (2, 3))
    ) + [(("b", 0), ("b", j)) for j in (1, 2, 3, 4)] + [(("c", 0), ("c", 1))]  # fmt: skip


def test_the_draw_depends_on_seed_and_ids_alone(samples) -> None:
    """IR-1: neither on the order of the rollouts nor on the other prompts."""
    rollouts = [*samples("a", "rrrrwwww"), *samples("b", "rrrrwwww")]
    found = keys(pair(rollouts))
    for seed in range(5):
        shuffled = random.Random(seed).sample(rollouts, len(rollouts))
        assert keys(pair(shuffled)) == found
    assert keys(pair(rollouts[:8])) == found[:3]
    assert keys(pair(rollouts, seed=1)) != found
    assert [right[1] for right, _ in found[:3]] != [right[1] for right, _ in found[3:]]


def test_all_pairs_of_a_prompt_are_equally_likely(samples) -> None:
    rollouts = samples("a", "rrwww")
    drawn = [p for seed in range(600) for p in keys(pair(rollouts, max_pairs=2, seed=seed))]
    for right, wrong in product((0, 1), (2, 3, 4)):
        assert 160 < drawn.count((("a", right), ("a", wrong))) < 240


def test_a_prompt_solved_by_all_or_none_gives_no_pair_and_is_counted(samples) -> None:
    """IR-6."""
    rollouts = [*samples("a", "rr"), *samples("b", "ww"), *samples("c", "rwr"),
                *samples("d", "-W"), *samples("e", "rW")]  # fmt: skip
    found = pair(rollouts, max_pairs=1)
    assert {right[0] for right, _ in keys(found)} == {"c"}
    assert found.metrics == {"select/examples": 1, "select/prompts_paired": 1,
                             "select/prompts_without_right": 2,
                             "select/prompts_without_wrong": 2}  # fmt: skip
    counts = found.selection.funnel.unhinted
    assert (counts.kept, counts.capped, counts.unpaired) == (1, 1, 3)
    assert (counts.failed, counts.truncated, counts.abstained) == (3, 2, 1)
    assert found.selection.funnel.sampled == len(rollouts)
    assert found.selection.funnel.correct == 5
    assert found.selection.funnel.prompts_solved == 3


def test_what_does_not_fit_is_on_neither_side(samples) -> None:
    rollouts = samples("a", "rrww")
    found = pair(rollouts, max_pairs=None, fits=lambda rollout: rollout.sample_index not in (0, 3))
    assert keys(found) == [(("a", 1), ("a", 2))]
    assert found.selection.funnel.unhinted.too_long == 1


def test_equal_completions_are_paired_unless_duplicates_are_dropped(samples, make_rollout) -> None:
    rollouts = [
        make_rollout(
            prompt_id="a",
            sample_index=i,
            completion=text,
            reward=reward,
            rewards=(reward,),
            finish="eos",
        )
        for i, (text, reward) in enumerate([("x", 1.0), ("X ", 1.0), ("y", 0.0), ("y", 0.0)])
    ]
    assert len(pair(rollouts, max_pairs=None).chosen) == 4
    found = pair(rollouts, max_pairs=None, deduplicate=True)
    assert keys(found) == [(("a", 0), ("a", 2))]


def test_human_completions_are_chosen_where_they_are_right(samples) -> None:
    """A prompt that no sample solved has its pairs with them; a wrong one is on no side."""
    rollouts = [*samples("a", "ww"), *samples("b", "rw"), *samples("c", "ww"), *samples("d", "r")]
    gold = [*samples("a", "r", first=-1), *samples("b", "r", first=-1),
            *samples("c", "w", first=-1), *samples("d", "r", first=-1)]  # fmt: skip
    found = pair(rollouts, max_pairs=None, gold=gold)
    assert sorted(keys(found)) == [
        (("a", -1), ("a", 0)),
        (("a", -1), ("a", 1)),
        (("b", -1), ("b", 1)),
        (("b", 0), ("b", 1)),
    ]
    assert [r.prompt_id for r in found.selection.gold] == ["a", "b"]
    assert found.metrics["select/prompts_without_wrong"] == 1
    assert keys(pair(rollouts, max_pairs=None, gold=gold[::-1])) == keys(found)


def test_trajectories_without_an_end_are_on_neither_side(samples) -> None:
    """RA-11 and RA-7: not even as the wrong one of a pair."""
    right, wrong, malformed, limited = samples("a", "rwww")
    rollouts = [
        right, wrong, replace(malformed, halt="malformed"), replace(limited, halt="tool_limit"),
    ]  # fmt: skip
    found = pair(rollouts)
    assert keys(found) == [(("a", 0), ("a", 1))]
    assert found.selection.outcomes == ("kept", "failed", "malformed", "tool_limit")
