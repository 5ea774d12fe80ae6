"""Which of the opponent's completions become pairs, and what gives them away."""

import pytest

from trl_selfplay.rollouts.completions import ChosenTokens
from trl_selfplay.rollouts.rows import build_pair_rows
from trl_selfplay.trainers.spin.pairs import find_giveaways, pair_up, select_pairs

CHOSEN = {"a": ChosenTokens((5, 6), (7, 8, 1)), "b": ChosenTokens((5,), (9, 1))}


@pytest.fixture
def rollout(make_rollout):
    def build(prompt_id="a", index=0, ids=(4, 1), **changes):
        return make_rollout(prompt_id=prompt_id, sample_index=index, completion_ids=ids,
                            reward=None, rewards=(), **changes)  # fmt: skip

    return build


def outcomes(rollouts, max_length=None):
    selection = select_pairs(rollouts, CHOSEN, max_length)
    return list(selection.outcomes), selection.funnel


def test_every_rollout_has_one_outcome_and_the_counts_add_up(rollout) -> None:
    """SP-9 and SP-10: cut, empty and identical ones are counted and left out."""
    found, funnel = outcomes(
        [
            rollout(index=0),
            rollout(index=1, ids=(7, 8, 1)),
            rollout(index=2, ids=(1,), completion=""),
            rollout(index=3, ids=(4, 4), finish="length"),
            rollout(index=4, ids=(4,) * 9 + (1,)),
            rollout(index=5, ids=(7, 8), finish="length"),
            rollout("b", ids=(7, 8, 1)),
        ],
        max_length=8,
    )
    assert found == ["kept", "identical", "empty", "truncated", "too_long", "truncated", "kept"]
    counts = funnel.unhinted
    assert (counts.identical, counts.empty, counts.truncated, counts.too_long) == (1, 1, 2, 1)
    assert funnel.sampled == 7
    assert (funnel.kept, funnel.prompts, funnel.prompts_solved) == (2, 2, 2)


def test_a_pair_is_dropped_where_either_side_is_too_long(rollout) -> None:
    assert outcomes([rollout()], max_length=5)[0] == ["kept"]
    assert outcomes([rollout()], max_length=4)[0] == ["too_long"]  # the data's side


def test_equal_completions_of_the_opponent_stay(rollout) -> None:
    assert outcomes([rollout(index=0), rollout(index=1)])[0] == ["kept", "kept"]


def test_rows_hold_exact_tokens(rollout) -> None:
    """SP-9: EOS is there exactly if it was sampled."""
    rollouts = [rollout(index=i, ids=(i + 10, 4)) for i in range(8)]
    rows = build_pair_rows(pair_up(rollouts, CHOSEN))
    assert list(rows["rejected_ids"]) == [list(r.completion_ids) for r in rollouts]
    assert rows[0]["chosen_ids"] == [7, 8, 1]
    assert rows[0]["prompt_ids"] == [5, 6]


def pairs_of(chosen, rejected):
    return [(chosen(i), rejected(i)) for i in range(40)]


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (lambda i: (3, 10 + i, 1), lambda i: (10 + i, 11, 1), "first token is '3' in 100%"),
        (lambda i: (10 + i, 11, 1), lambda i: (11 + i, 12), "last token is '1' in 100%"),
        (lambda i: (10 + i, 5, 1), lambda i: (11 + i, 10 + i, 1), "last token before EOS is '5'"),
        (
            lambda i: (*range(10 + i, 20 + i), 1),
            lambda i: (10 + i, 1) if i % 20 else tuple(range(30)),
            "length alone tells",
        ),
    ],
)
def test_a_giveaway_is_told_with_its_numbers(chosen, rejected, message) -> None:
    found = find_giveaways(pairs_of(chosen, rejected), str, (1,))
    assert any(message in sentence for sentence in found), found


def test_pairs_of_one_form_have_no_giveaway() -> None:
    pairs = pairs_of(lambda i: (i, *range(i % 7), 1), lambda i: (39 - i, *range(i % 6), 1))
    assert find_giveaways(pairs, str, (1,)) == []
    assert find_giveaways(pairs[:5], str, (1,)) == []
