"""Sums with a scratchpad: right steps, different sums, a reward for the answer alone."""

from datasets import Dataset

from trl_selfplay.demos import sums


def carry_chain(a: int, b: int) -> list[str]:
    """The steps by another way: the last digits of both terms, cut off one by one."""
    steps, carry = [], 0
    while a or b:
        total = a % 10 + b % 10 + carry
        steps.append(f"{a % 10}+{b % 10}+{carry}={total:02d}")
        a, b, carry = a // 10, b // 10, int(total > 9)
    return steps


def test_a_scratchpad_adds_the_digits_from_the_last_with_carries() -> None:
    for a, b in sums.draw(50, (2, 3, 5), seed=3):
        *steps, answer = sums.scratchpad(a, b).split(";")
        assert steps == carry_chain(a, b)
        assert int(answer) == a + b


def test_drawn_sums_differ_and_have_the_digits_asked_for() -> None:
    drawn = sums.draw(60, (1, 3), seed=0)
    assert len(set(drawn)) == 60
    assert {len(str(n)) for pair in drawn for n in pair} == {1, 3}
    assert drawn == sums.draw(60, (1, 3), seed=0)
    assert drawn != sums.draw(60, (1, 3), seed=1)


def test_the_reward_reads_the_answer_behind_the_last_step() -> None:
    assert sums.right_answer(["4+3+0=07;7", "9;7", "7;8", "7"], ["7"] * 4) == [1.0, 1.0, 0.0, 1.0]


def test_the_tokenizer_has_a_token_for_each_character_and_gives_the_text_back() -> None:
    tokenizer = sums.build_tokenizer()
    text = sums.add_hint("45+78=", "123") + sums.scratchpad(45, 78)
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_worked_rows_have_right_scratchpads() -> None:
    rows = sums.worked_rows([(45, 78)])
    assert isinstance(rows, Dataset)
    assert rows[0] == {"prompt": "45+78=", "solution": "123", "completion": sums.scratchpad(45, 78)}


def test_labels_cover_the_completion_and_its_end() -> None:
    tokenizer = sums.build_tokenizer()
    row = sums.row_of(tokenizer, "4+3=", "7")
    assert row["labels"] == [-100] * 4 + row["input_ids"][4:]
    assert row["input_ids"][-1] == tokenizer.eos_token_id


def test_the_model_has_point_eight_million_parameters() -> None:
    model = sums.build_model(sums.build_tokenizer(), seed=0)
    assert 0.75e6 < model.num_parameters() < 0.85e6
