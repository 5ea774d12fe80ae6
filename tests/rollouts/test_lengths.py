"""Prompts that leave no room for a completion."""

import pytest
from datasets import Dataset

from trl_selfplay.rollouts.lengths import check_training_lengths
from trl_selfplay.rollouts.prompts import load_prompt_rows


def test_prompts_that_leave_no_room_for_a_completion_are_refused_by_row(caplog) -> None:
    dataset = Dataset.from_dict({"prompt": ["Q" * n for n in (3, 9, 4, 12)]})
    rows = load_prompt_rows(dataset, "train_dataset")

    def render(row):
        return tuple(row.prompt)

    with pytest.raises(ValueError, match=r"2 of 4 prompts.*have 9 tokens or more.*\(rows 1, 3\)"):
        check_training_lengths(rows, render, 9, 5, rows)
    check_training_lengths(rows, render, 17, 5, rows)
    check_training_lengths(rows, render, None, 5, rows)
    assert not caplog.records
    check_training_lengths(rows, render, 16, 5, rows)
    assert "Set max_length=17 to keep all" in caplog.text
    assert "completions of more than 4 tokens" in caplog.text
