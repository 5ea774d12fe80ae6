import pytest

from trl_selfplay.rollouts.rows import (
    build_pair_rows,
    build_training_rows,
    pair_of,
    training_completion_ids,
)

EOS = 9


@pytest.mark.parametrize(
    ("finish", "sampled", "trained"),
    [("eos", (5, 6, EOS), (5, 6, EOS)), ("stop", (5, 6), (5, 6, EOS)), ("length", (5, 6), (5, 6))],
)
def test_eos_is_learnt_only_where_it_was_sampled_or_a_stop_string_ended(
    make_rollout, finish, sampled, trained
) -> None:
    """ST-22."""
    rollout = make_rollout(completion_ids=sampled, finish=finish)
    assert training_completion_ids(rollout, EOS) == trained


def test_the_loss_covers_every_completion_token_and_no_prompt_token(make_rollout) -> None:
    """ST-14, ST-5: the ids trained on are the ids sampled, EOS once at the end."""
    rollouts = [
        make_rollout(prompt_id=f"{i:032x}", completion_ids=(20 + i, 30 + i, EOS), finish="eos")
        for i in range(7)
    ]
    prompts = {r.prompt_id: (1, 2, 3)[: 1 + i % 3] for i, r in enumerate(rollouts)}
    rows = build_training_rows(rollouts, prompts, EOS, seed=0)
    by_completion = {tuple(row["input_ids"][-3:]): row for row in rows}
    assert set(by_completion) == {r.completion_ids for r in rollouts}
    for r in rollouts:
        row, prompt = by_completion[r.completion_ids], prompts[r.prompt_id]
        assert row["input_ids"] == [*prompt, *r.completion_ids]
        assert row["labels"] == [-100] * len(prompt) + list(r.completion_ids)
        assert row["labels"].count(EOS) == 1


def test_rows_are_in_a_new_order_each_round_and_the_same_for_one_seed(make_rollout) -> None:
    rollouts = [
        make_rollout(prompt_id=f"{i:032x}", completion_ids=(i,), finish="eos") for i in range(40)
    ]
    prompts = {r.prompt_id: (1,) for r in rollouts}
    orders = [
        list(build_training_rows(rollouts, prompts, EOS, seed=seed)["input_ids"])
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2])


def test_prompts_are_learnt_where_the_loss_is_not_on_completions_alone(make_rollout) -> None:
    rollout = make_rollout(completion_ids=(7, EOS), finish="eos")
    prompts = {rollout.prompt_id: (1, 2)}
    rows = build_training_rows([rollout], prompts, EOS, seed=0, completion_only=False)
    assert rows[0]["labels"] == rows[0]["input_ids"] == [1, 2, 7, EOS]


def test_what_the_policy_did_not_write_is_not_learnt(make_rollout) -> None:
    """RA-2. An EOS that is added after a stop string is learnt all the same."""
    rollout = make_rollout(
        completion_ids=(5, 6, 7, 8), completion_mask=(True, False, False, True), finish="stop"
    )
    row = build_training_rows(
        [rollout], {rollout.prompt_id: (1, 2)}, EOS, 0, weigh=lambda _, lengths: lengths
    )[0]
    assert row["input_ids"] == [1, 2, 5, 6, 7, 8, EOS]
    assert row["labels"] == [-100, -100, 5, -100, -100, 8, EOS]
    assert row["weight"] == 3  # tokens to learn


def test_pairs_of_rollouts_carry_what_the_policy_wrote(make_rollout) -> None:
    """RA-2. A column of masks is there only if a pair has one."""
    chosen = make_rollout(completion_ids=(5, 6), completion_mask=(True, False), finish="stop")
    rejected = make_rollout(sample_index=1, completion_ids=(7, EOS), finish="eos")
    pair = pair_of(chosen, rejected, (1, 2), EOS)
    assert (pair.chosen_ids, pair.chosen_mask) == ((5, 6, EOS), (True, False, True))
    (row,) = build_pair_rows([pair]).to_list()
    assert row == {
        "prompt_id": chosen.prompt_id, "prompt_ids": [1, 2], "chosen_ids": [5, 6, EOS],
        "rejected_ids": [7, EOS], "chosen_mask": [True, False, True],
        "length": 2 + 3,
    }  # fmt: skip
    plain = pair_of(rejected, rejected, (1, 2), EOS)
    assert "chosen_mask" not in build_pair_rows([plain]).column_names
