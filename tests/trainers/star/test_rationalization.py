"""Hints show the final answer and no more; the leak filter drops quotes and keeps reasoning."""

import re
import time
from copy import deepcopy
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_selfplay.rollouts.prompts import load_prompt_rows
from trl_selfplay.trainers.star.rationalization import (
    _forms_of_answer,
    _opening,
    add_hint,
    find_leak,
    leaks_of_rows,
)

CQA = (
    "Q: What can be used to carry a small dog?\n"
    "Answer Choices:\n(a) swimming pool\n(b) basket\n(c) dog show\n(d) backyard\n(e) own home\nA:"
)
GSM8K = "Q: Natalia sold 48 clips in April and half as many in May. How many altogether?\nA:"
REVERSAL = "Reverse this list of words: cat, dog, bird"
YES_NO = "Is 91 a prime number? Answer yes or no."


# --- hints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("solution", ["b", "(b)", "B", "basket", "Basket", "(b) basket"])
def test_the_right_option_is_marked(solution: str) -> None:
    """STaR, figure 2."""
    assert add_hint(CQA, solution) == CQA.replace("(b) basket", "(b) basket (CORRECT)")


@pytest.mark.parametrize(
    ("prompt", "solution", "hinted"),
    [
        ("Which?\nA) red\nB) blue", "B", "Which?\nA) red\nB) blue (CORRECT)"),
        ("Which?\nA. red\nB. blue\nAnswer:", "A", "Which?\nA. red (CORRECT)\nB. blue\nAnswer:"),
        (
            "Which? (a) red (b) blue (c) green",
            "b",
            "Which? (a) red (b) blue (CORRECT) (c) green",
        ),
        ("Which?\n(A) red.\n(B) blue.", "blue", "Which?\n(A) red.\n(B) blue. (CORRECT)"),
    ],
)
def test_option_lists_are_known_in_their_usual_forms(
    prompt: str, solution: str, hinted: str
) -> None:
    assert add_hint(prompt, solution) == hinted


def test_only_the_last_of_several_option_lists_is_the_questions() -> None:
    worked = "Q: Hot?\n(a) sun\n(b) ice\nA: (a)\n\n"
    prompt = worked + "Q: Cold?\n(a) sun\n(b) ice\nA:"
    assert add_hint(prompt, "b") == worked + "Q: Cold?\n(a) sun\n(b) ice (CORRECT)\nA:"


def test_a_solution_that_is_no_option_is_shown_as_text() -> None:
    assert add_hint("Pick.\n(a) red\n(b) blue\nA:", "green").endswith("(b) blue (green)\nA:")


@pytest.mark.parametrize("prompt", ["What did A. Smith and B. Jones eat?", "Sum (a) alone: 3 + 4"])
def test_initials_and_a_single_letter_are_no_option_list(prompt: str) -> None:
    assert add_hint(prompt, "a") == f"{prompt} (a)"


@pytest.mark.parametrize(
    ("prompt", "hinted"),
    [
        ("What is 48 + 24?", "What is 48 + 24? (72)"),
        ("Q: What is 48 + 24?\nA:", "Q: What is 48 + 24? (72)\nA:"),
        ("Q: What is 48 + 24? A:", "Q: What is 48 + 24? (72) A:"),
        ("What is 48 + 24?\n\nAnswer: ", "What is 48 + 24? (72)\n\nAnswer: "),
        ("Input:\n4 8 + 2 4\nTarget:\n", "Input:\n4 8 + 2 4 (72)\nTarget:\n"),
        ("48 + 24?\n### Response:\n", "48 + 24? (72)\n### Response:\n"),
        (
            "Q: 48 + 24?\nA: Let's think step by step.",
            "Q: 48 + 24? (72)\nA: Let's think step by step.",
        ),
        ("What is 48 + 24?\n", "What is 48 + 24? (72)\n"),
        ("Answer:", "Answer: (72)"),
    ],
)
def test_a_free_answer_stands_after_the_question_and_before_the_cue(
    prompt: str, hinted: str
) -> None:
    assert add_hint(prompt, "72") == hinted


@pytest.mark.parametrize(
    "solution",
    [
        "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = 72 clips.\n#### 72",
        "She sold $24$ in May, so $\\boxed{72}$.",
        "72",
        72,
    ],
)
def test_a_hint_shows_no_more_than_the_final_answer(solution: Any) -> None:
    """ST-24."""
    assert add_hint(GSM8K, solution) == GSM8K.replace("altogether?", "altogether? (72)")


def test_a_chat_prompt_gets_the_hint_in_the_last_user_turn_of_a_copy() -> None:
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "48 + 24?"},
        {"role": "assistant", "content": "Let me see:"},
    ]
    original = deepcopy(prompt)
    hinted = add_hint(prompt, "72")
    assert prompt == original
    assert hinted == [*original[:3], {"role": "user", "content": "48 + 24? (72)"}, original[4]]


def test_a_chat_prompt_of_parts_gets_the_hint_in_its_last_text() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    prompt = [{"role": "user", "content": parts}]
    assert add_hint(prompt, "3") == [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many? (3)"}]}
    ]
    assert parts[1]["text"] == "How many?"


def test_a_chat_prompt_without_user_turn_is_an_error() -> None:
    with pytest.raises(ValueError, match="last text turn of the user"):
        add_hint([{"role": "assistant", "content": "Hello"}], "72")


@pytest.mark.parametrize("solution", [None, "", "  "])
def test_without_an_answer_there_is_no_hint(solution: str | None) -> None:
    assert add_hint("Why?", solution) == "Why?"


# --- leaks ---------------------------------------------------------------------------------------

LEAKING = [
    # repeats the marker
    (CQA, "b", "The answer is (b) basket (CORRECT).", "hint_marker"),
    (
        CQA,
        "b",
        "It must hold a dog. (b) basket (CORRECT) does. So the answer is (b).",
        "hint_marker",
    ),
    # speaks of the hint
    (GSM8K, "72", "As the hint says, the sum is 72. Answer: 72", "mentions_hint"),
    (GSM8K, "72", "According to the hint we should get 72.\nAnswer: 72", "mentions_hint"),
    (GSM8K, "72", "She sold clips. The answer given above is 72. Answer: 72", "mentions_hint"),
    (GSM8K, "72", "48 and some more make the given answer. Answer: 72", "mentions_hint"),
    (GSM8K, "72", "We add numbers until we reach the provided answer, 72.", "mentions_hint"),
    (GSM8K, "72", "Half is 24. The answer is already given as 72. #### 72", "mentions_hint"),
    (GSM8K, "72", "We are told the answer is 72. So 48 + 24 = 72. #### 72", "mentions_hint"),
    (GSM8K, "72", "May was less. Since the answer is 72, May must be 24. #### 72", "mentions_hint"),
    (GSM8K, "72", "We need 72, as shown in parentheses. #### 72", "mentions_hint"),
    (GSM8K, "72", "The question says the answer is 72, so #### 72", "mentions_hint"),
    (CQA, "b", "Since the answer is marked, it is the basket. Answer: (b)", "mentions_hint"),
    (CQA, "b", "The basket is marked as correct. So the answer is (b).", "mentions_hint"),
    (CQA, "b", "Option (b) was labeled as the correct answer. Answer: (b)", "mentions_hint"),
    (REVERSAL, "bird, dog, cat", "1. Take the hint.\nAnswer: bird, dog, cat", "mentions_hint"),
    (REVERSAL, "bird, dog, cat", "We copy the answer above: bird, dog, cat", "mentions_hint"),
    # nothing but the answer
    (GSM8K, "72", "72", "answer_only"),
    (GSM8K, "1072", " #### 1,072\n", "answer_only"),
    (GSM8K, "72", "The answer is $72.", "answer_only"),
    (GSM8K, "72", "**Final answer:** \\boxed{72}", "answer_only"),
    (GSM8K, "72", "<answer>72</answer>", "answer_only"),
    (CQA, "b", "(b)", "answer_only"),
    (CQA, "b", "The correct answer is (b) basket.", "answer_only"),
    (CQA, "basket", "A basket.", "answer_only"),
    (REVERSAL, "bird, dog, cat", "Answer: bird, dog, cat", "answer_only"),
    # the answer before any reasoning
    (GSM8K, "72", "72. Half of 48 is 24, and 48 + 24 = 72.", "answer_first"),
    (GSM8K, "72", "The answer is 72 because 48 + 24 = 72. #### 72", "answer_first"),
    (GSM8K, "72", "Answer: 72\nHalf of 48 is 24. 48 + 24 = 72.", "answer_first"),
    (GSM8K, "72", "Sure! Let's think step by step. It is 72. Half of 48 is 24.", "answer_first"),
    (GSM8K, "72", "$\\boxed{72}$\n\nTo see this, halve 48.", "answer_first"),
    (CQA, "b", "(b) basket. A basket is carried in a hand.", "answer_first"),
    (CQA, "b", "The answer must be (b), since dogs fit in baskets.", "answer_first"),
    (CQA, "b", "Basket is the right option because it has a handle. Answer: (b)", "answer_first"),
    (YES_NO, "no", "No, because 7 times 13 is 91. Answer: no", "answer_first"),
    (REVERSAL, "bird, dog, cat", "bird, dog, cat\n1. The last word is bird.", "answer_first"),
]

CLEAN = [
    # maths
    ("What is 3 + 4?", "7", "First we add 3 and 4 to get 7. Answer: 7"),
    ("What is 3 + 4?", "7", "3 + 4 = 7\n#### 7"),
    ("What is 3 * 4 - 5?", "7", "The answer is given by 3 * 4 - 5 = 12 - 5 = 7. Answer: 7"),
    ("Tom has 3 apples, gets 4.", "7", "Given that Tom has 3 apples and gets 4, he has 7. #### 7"),
    (GSM8K, "72", "In May she sold 48 / 2 = 24 clips. 48 + 24 = 72. The answer is 72."),
    (GSM8K, "72", "The answer is the sum of April and May. May is 24, so it is 72."),
    (GSM8K, "48", "48 - 24 = 24 is wrong; she sold 48 in April. #### 48"),
    ("What is 7 * 8 - 49?", "7", "7 * 8 = 56 and 56 - 49 = 7. The answer is 7."),
    ("Sides of a right triangle?", "3", "3, 4 and 5 fit, since 9 + 16 = 25. Answer: 3"),
    ("Steps?", "1", "1. Halve 2 to get 1.\n2. Check that 1 + 1 = 2.\nAnswer: 1"),
    ("Steps?", "1", "1. Halve 2. 2. Get 1. Answer: 1"),
    ("x + 1 = 3?", "2", "Using the given equation, x = 3 - 1 = 2 (correct, as 2 + 1 = 3). #### 2"),
    ("Half of 2.5?", "1.25", "1.25 * 2 = 2.5, so half of 2.5 is 1.25. The answer is 1.25."),
    ("3/4 of 8?", "6", "It is 8 divided by 4, times 3: 2 * 3 = 6. The answer is 6."),
    ("Simplify 6/8.", "3/4", "Divide by 2: 3/4. The answer is already in lowest terms. #### 3/4"),
    ("What is 2 + 1?", "3", "The answer is 3 minus nothing: 2 + 1 = 3. Answer: 3"),
    ("Area?", "12", "From the stated lengths 3 and 4 the area is 3 * 4 = 12. Final answer: 12"),
    ("Sum?", "5", "We know that the answer is a sum of 2 and 3. 2 + 3 = 5. #### 5"),
    # words
    (REVERSAL, "bird, dog, cat", "1. Reverse the list: bird, dog, cat.\nAnswer: bird, dog, cat"),
    (REVERSAL, "bird, dog, cat", "1. bird\n2. dog\n3. cat\nAnswer: bird, dog, cat"),
    (
        REVERSAL,
        "bird, dog, cat",
        "The last word is bird, then dog, then cat. Answer: bird, dog, cat",
    ),
    ("Reverse: hint, dog", "dog, hint", "The hint is first, dog is last.\nAnswer: dog, hint"),
    (
        "Grade this: is the given answer 4 to 2 + 2 right?",
        "yes",
        "2 + 2 is 4, and the given answer is 4, so they agree. Answer: yes",
    ),
    (YES_NO, "no", "91 = 7 * 13, so it has divisors. No. Answer: no"),
    (YES_NO, "no", "No even number above 2 is prime; 91 is odd, yet 91 = 7 * 13. Answer: no"),
    # multiple choice
    (CQA, "b", "The answer must be something used to carry a dog. Baskets are. Therefore (b)."),
    (CQA, "b", "A basket has a handle and can hold a small dog. So the answer is (b)."),
    (CQA, "b", "Of the given answer choices, only a basket can be carried. Answer: (b)"),
    (CQA, "a", "(a) swimming pool: holds water. (b) basket: is carried. Still, (a)."),
    (CQA, "a", "a) is too big, but b) is worse. The correct answer is (a)."),
    (CQA, "b", "Since the answer must be a container, the basket fits. The right answer is (b)."),
    (CQA, "b", "Given the options, a basket is the one to carry. Answer: b"),
    # a solution that the filter knows nothing of
    ("Write a poem.", None, "Roses are red. The answer is 72."),
]


@pytest.mark.parametrize(("prompt", "solution", "completion", "reason"), LEAKING)
def test_a_leaking_rationale_is_found(
    prompt: str, solution: str, completion: str, reason: str
) -> None:
    """ST-23, one way."""
    assert find_leak(prompt, completion, solution) == reason


@pytest.mark.parametrize(("prompt", "solution", "completion"), CLEAN)
def test_a_clean_rationale_is_kept(prompt: str, solution: str | None, completion: str) -> None:
    """ST-23, the other way."""
    assert find_leak(prompt, completion, solution) is None


def test_the_lists_are_as_long_as_promised() -> None:
    """ST-23."""
    assert len(LEAKING) >= 15
    assert len(CLEAN) >= 25


def test_chat_prompts_and_worked_solutions_are_judged_alike() -> None:
    chat = [{"role": "user", "content": GSM8K}]
    solution = "48/2 = 24. 48 + 24 = 72. #### 72"
    assert find_leak(chat, "72", solution) == "answer_only"
    assert find_leak(chat, "As the hint says. #### 72", solution) == "mentions_hint"
    assert find_leak(chat, "Half of 48 is 24, together 72. #### 72", solution) is None


def test_a_long_completion_is_judged_in_no_time() -> None:
    """Patterns must not backtrack without end: 300,000 characters of near misses."""
    assert find_leak(GSM8K, "the answer is given " * 15_000 + "\n" * 20_000, "72") is not None
    assert find_leak(GSM8K, "so " * 50_000 + " " * 50_000 + "x", "72") is None
    assert add_hint(" \n" * 20_000 + "Why?" + " \n" * 20_000, "72").count("(72)") == 1


def test_a_long_solution_that_is_not_quoted_takes_no_time() -> None:
    solution, started = " ".join(map(str, range(100_000))), time.process_time()
    assert find_leak(GSM8K, "Half of 48 is 24. The answer is 72.", solution) is None
    assert time.process_time() - started < 3  # compiling its pattern takes a minute


@st.composite
def answers_and_completions(draw: st.DrawFn) -> tuple[str, str]:
    """An answer, and a completion that may write it in another of the ways that its pattern matches."""
    answer = draw(
        st.text("aAkKsSiI\u0130\u0131\u017f\u212a\u00df.1234567 ,*_`", min_size=1, max_size=7)
    ).strip()
    ways = {" ": [" ", ",", ", ", "\n "], ",": [",", "", " "], "4": ["4", ",4", "**4", "_4"]}
    for letters in ("iI\u0130\u0131", "sS\u017f", "kK\u212a", "aA"):
        ways |= {letter: [*letters, f"{letter}**", f"`{letter}"] for letter in letters}
    written = "".join(draw(st.sampled_from(ways.get(c, [c]))) for c in answer)
    return answer, draw(st.sampled_from(["", "So ", "**"])) + written + draw(
        st.sampled_from(["", ".", "**"])
    )


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(answers_and_completions(), st.sampled_from(["Q?", "Q?\n(a) {}\n(b) no"]))
def test_only_forms_of_the_answer_that_match_nowhere_are_left_out(pair, prompt):
    """What is searched for beside them doesn't change, so neither does what is found."""
    answer, completion = pair
    prompt = prompt.format(answer)
    all_forms = _forms_of_answer(prompt, answer, answer)
    left_out = {*all_forms} - {*_forms_of_answer(prompt, answer, completion)}
    for text in (completion, _opening(completion)):
        assert not [form for form in left_out if re.search(form, text, re.I | re.S)]


def test_the_filter_is_asked_with_the_unhinted_prompt_and_the_solution(make_rollout) -> None:
    asked = []
    rows = load_prompt_rows(Dataset.from_list([{"prompt": "Q", "solution": "7"}]), "train")
    leak_reason = leaks_of_rows(lambda *given: asked.append(given), rows)
    rollout = make_rollout(prompt_id=rows[0].prompt_id, prompt="Q (7)", completion="so 7")
    assert leak_reason(rollout) is None
    assert asked == [("Q", "so 7", "7")]


def test_a_leak_filter_that_returns_a_verdict_in_place_of_a_reason_is_an_error(
    make_rollout,
) -> None:
    rows = load_prompt_rows(Dataset.from_list([{"prompt": "Q"}]), "train")
    with pytest.raises(TypeError, match="leak_filter returned True"):
        leaks_of_rows(lambda *_: True, rows)(make_rollout(prompt_id=rows[0].prompt_id))
