"""SPIN's demo task: different questions, one style, held-out ones that are not trained on."""

import pytest

from trl_selfplay.demos.style import NUM_HELD_OUT, NUM_TRAIN, build_questions, style_split


def test_training_and_held_out_questions_are_disjoint_and_all_different() -> None:
    train, test, rows = style_split(seed=3)
    questions = [messages[1]["content"] for part in (train, test) for messages in part["messages"]]
    assert (len(train), len(test)) == (NUM_TRAIN, NUM_HELD_OUT)
    assert len(rows) == NUM_HELD_OUT
    assert len(set(questions)) == len(questions)


def test_the_result_ends_the_answer_and_is_right_for_arithmetic() -> None:
    checked = 0
    for row in build_questions(100, seed=0):
        question, answer = (message["content"] for message in row["messages"][1:])
        assert answer.endswith(f"Result: {row['result']}.")
        words = question.rstrip("?").split()
        if "plus" in words or "minus" in words:
            a, b = int(words[2]), int(words[4])
            assert int(row["result"]) == (a + b if "plus" in words else a - b)
            checked += 1
    assert checked > 20


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_the_seed_alone_decides_the_questions(seeds) -> None:
    first, second = (build_questions(20, seed) for seed in seeds)
    assert (first == second) == (seeds[0] == seeds[1])
