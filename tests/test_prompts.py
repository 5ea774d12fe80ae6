import os
import subprocess
import sys

import pytest
from datasets import Dataset

from trl_selfplay.prompts import PromptFormatter, load_few_shot_examples, load_prompt_rows
from trl_selfplay.rationalization import add_hint

EXAMPLES = [
    {"prompt": "Q 1 + 1 = ?", "completion": " so 2", "solution": "2"},
    {"prompt": "Q 2 + 3 = ?", "completion": " so 5", "solution": "5"},
]


def rows_of(*prompts):
    return load_prompt_rows(
        Dataset.from_list([{"prompt": p, "solution": "7"} for p in prompts]), "train_dataset"
    )


def text_of(formatter, row, **kwargs):
    return formatter.tokenizer.decode(list(formatter.token_ids(row, **kwargs)))


def test_few_shot_examples_stand_before_the_prompt_while_sampling(byte_tokenizer) -> None:
    (row,) = rows_of("Q 3 + 4 = ?")
    formatter = PromptFormatter(byte_tokenizer, load_few_shot_examples(EXAMPLES, False), add_hint)
    assert text_of(formatter, row, few_shot=False) == "Q 3 + 4 = ?"
    assert (
        text_of(formatter, row, few_shot=True)
        == "Q 1 + 1 = ? so 2\n\nQ 2 + 3 = ? so 5\n\nQ 3 + 4 = ?"
    )


def test_hinted_prompts_have_hinted_examples(byte_tokenizer) -> None:
    (row,) = rows_of("Q 3 + 4 = ?")
    formatter = PromptFormatter(byte_tokenizer, load_few_shot_examples(EXAMPLES, False), add_hint)
    hinted = text_of(formatter, row, few_shot=True, hinted=True)
    assert hinted == "Q 1 + 1 = ? (2) so 2\n\nQ 2 + 3 = ? (5) so 5\n\nQ 3 + 4 = ? (7)"


def test_an_example_equal_to_the_row_is_left_out_of_its_prompt(byte_tokenizer) -> None:
    """ST-25."""
    own, other = sorted(rows_of("Q 1 + 1 = ?", "Q 3 + 4 = ?"), key=lambda row: row.prompt)
    formatter = PromptFormatter(byte_tokenizer, load_few_shot_examples(EXAMPLES, False))
    assert text_of(formatter, own, few_shot=True) == "Q 2 + 3 = ? so 5\n\nQ 1 + 1 = ?"
    assert text_of(formatter, other, few_shot=True).startswith("Q 1 + 1 = ? so 2")


def test_chat_examples_are_turns_after_the_system_message(chat_tokenizer) -> None:
    system = {"role": "system", "content": "S"}
    (row,) = rows_of([system, {"role": "user", "content": "U"}])
    formatter = PromptFormatter(chat_tokenizer, load_few_shot_examples(EXAMPLES[:1], True))
    expected = chat_tokenizer.apply_chat_template(
        [
            system,
            {"role": "user", "content": "Q 1 + 1 = ?"},
            {"role": "assistant", "content": " so 2"},
            {"role": "user", "content": "U"},
        ],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(formatter.token_ids(row, few_shot=True)) == expected


def test_repeated_rows_are_merged_with_one_notice(caplog) -> None:
    assert len(rows_of("Q 1", "Q 2", "Q 1", "Q 1")) == 2
    assert caplog.text.count("2 of 4 rows repeat") == 1


def test_the_order_of_rows_has_no_influence() -> None:
    assert [r.prompt_id for r in rows_of("a", "b", "c")] == [
        r.prompt_id for r in rows_of("c", "a", "b")
    ]


def test_prompt_ids_are_equal_in_every_process() -> None:
    code = (
        "from trl_selfplay.rollouts import hash_prompt; "
        "print(hash_prompt([{'role': 'user', 'content': 'x'}], '1'))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"prompt": "Q"}, "lacks"),
        (
            {"prompt": [{"role": "user", "content": "Q"}], "completion": "A", "solution": "1"},
            "text",
        ),
    ],
)
def test_an_example_that_does_not_fit_is_refused(example, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_few_shot_examples([example], conversational=False)
