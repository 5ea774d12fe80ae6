import pytest

from trl_selfplay.rewards import choice_reward

OPTIONS = ["a cat", "a dog", "the moon"]


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        ("The answer is (B).", 1.0),
        ("answer: b", 1.0),
        ("\\boxed{B}", 1.0),
        ("B", 1.0),
        ("(B) a dog", 1.0),
        ("A dog barks, so (B).", 1.0),
        ("It must be a dog.", 1.0),
        ("The answer is a dog.", 1.0),
        ("(A) or (B)", 0.0),
        ("the answer is (A) or (B)", 0.0),
        ("a cat and a dog", 0.0),
        ("(A)", 0.0),
        ("A bird", 0.0),
        ("", 0.0),
        ("(A) (B) (C)", 0.0),
    ],
)
@pytest.mark.parametrize("gold", ["B", "(b)", "a dog"])
def test_one_choice_counts_and_two_are_none(completion, score, gold) -> None:
    """VF-10: two different choices score 0."""
    assert choice_reward([completion], [gold], choices=[OPTIONS]) == [score]


def test_a_solution_that_is_no_option_is_no_verdict() -> None:
    """VF-11."""
    assert choice_reward(["(A)"] * 2, ["a fish", None], choices=[OPTIONS] * 2) == [None, None]


def test_letters_need_no_options() -> None:
    chat = [[{"role": "assistant", "content": "I choose (C)."}]]
    assert choice_reward(chat, ["c"]) == [1.0]
