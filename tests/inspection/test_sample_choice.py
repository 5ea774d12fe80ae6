"""Which samples of a round a report shows."""

import random
from collections import Counter

import pytest

from trl_selfplay.inspection.sample_choice import choose_samples, share_out


def prompts(make_rollout, count, per_prompt=3, outcome=lambda i: "kept", round_index=0):
    return [
        (make_rollout(prompt_id=f"{p:032x}", sample_index=i, round_index=round_index), outcome(i))
        for p in range(count)
        for i in range(per_prompt)
    ]


@pytest.mark.parametrize(
    ("counts", "limit", "expected"),
    [
        ({"a": 9, "b": 9, "c": 9}, 9, {"a": 3, "b": 3, "c": 3}),
        ({"a": 1, "b": 9, "c": 9}, 9, {"a": 1, "b": 4, "c": 4}),
        ({"a": 2, "b": 2}, 9, {"a": 2, "b": 2}),
        ({"a": 5, "b": 5, "c": 5}, 1, {"a": 1, "b": 0, "c": 0}),
        ({"a": 5}, 0, {"a": 0}),
        ({}, 5, {}),
    ],
)
def test_a_limit_is_shared_as_equally_as_the_numbers_allow(counts, limit, expected) -> None:
    assert share_out(counts, limit) == expected


def test_the_choice_doesnt_depend_on_the_order_of_the_shards(make_rollout) -> None:
    samples = prompts(make_rollout, 40)
    chosen = choose_samples(samples, 12).samples
    blocks = [samples[i : i + 3] for i in range(0, len(samples), 3)]
    random.Random(1).shuffle(blocks)
    assert choose_samples([pair for block in blocks for pair in block], 12).samples == chosen
    assert choose_samples(samples, 12, seed=1).samples != chosen


def test_rounds_show_the_same_prompts_and_at_most_two_samples_of_an_outcome(make_rollout) -> None:
    chosen = [
        choose_samples(prompts(make_rollout, 50, 6, round_index=index), 10) for index in (0, 1)
    ]
    counts = [Counter(r.prompt_id for r, _ in each.samples) for each in chosen]
    assert counts[0] == counts[1]
    assert max(counts[0].values()) == 2
    assert chosen[0].totals == {"kept": 300}


def test_hinted_and_unhinted_samples_of_an_outcome_both_have_their_share(make_rollout) -> None:
    samples = [
        (make_rollout(prompt_id=f"{p:032x}", hinted=p < 3), "kept" if p % 2 else "failed")
        for p in range(90)
    ]
    chosen = choose_samples(samples, 8).samples
    kinds = Counter((outcome, rollout.hinted) for rollout, outcome in chosen)
    assert kinds == {
        ("kept", False): 3, ("kept", True): 1, ("failed", False): 2, ("failed", True): 2,
    }  # fmt: skip
    assert [outcome for _, outcome in chosen][:4] == ["kept", "kept", "failed", "failed"]
