from importlib.util import find_spec

import pytest

from trl_selfplay.rewards import (
    choice_reward,
    exact_reward,
    extract_answer,
    final_answer,
    math_reward,
)
from trl_selfplay.rewards.answer import answers_agree, text_of


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("\\boxed{1} or rather \\boxed{2}", "2"),
        ("\\boxed{3}, #### 4, the answer is 5", ""),
        ("#### 3\nWait, one more.\n#### 4", "4"),
        ("<answer>a</answer> <answer> b </answer>", ""),
        ("<answer>a</answer> Wait. <answer> b </answer>", "b"),
        ("the answer is 5. No, the answer is 6.", "6"),
        ("Answer: c, b, a\n", "c, b, a"),
        ("The final answer is: 12", "12"),
        ("ANSWER: x", "x"),
        ("no marker, 7 or 8", None),
        ("The answer is **72**.", "72"),
        ("**Answer:** 72", "72"),
        ("Answer: 3.5", "3.5"),
        ("Answer:\n72", "72"),
        ("Answer:\n", ""),
        ("", None),
        ("\\boxed{1} then \\boxed{unbalanced", ""),
        ("<answer>1</answer> <answer>open", ""),
        ("####", ""),
    ],
)
def test_the_last_marker_of_the_first_kind_counts(text, answer) -> None:
    """VF-10's first half."""
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("48/2 = <<48/2=24>>24\n#### 72", "72"),
        ("72", "72"),
        ("so $\\boxed{72}$", "72"),
        (72, "72"),
        ("c, b, a", "c, b, a"),
        ("", ""),
    ],
)
def test_the_final_answer_of_a_solution(solution, answer) -> None:
    assert final_answer(solution) == answer


@pytest.mark.parametrize(
    ("first", "second", "agree"),
    [
        ("1,000", "1000", True),
        ("1000.0", "1,000", True),
        ("1000", "1,0000", False),
        ("5%", "5", False),
        ("72.", "72", True),
        ("$3.50", "3.5", True),
        ("1/2", "0.5", True),
        ("-5", "5", False),
        ("x-5", "-5", False),
        ("Paris", "  paris ", True),
        ("a, b", "a,  b", True),
        ("a, b", "b, a", False),
        ("", "", False),
        ("0.1", "0.10000000000000001", False),
        ("1/0", "0", False),
        ("\u0661", "1", False),
        ("９", "9", True),
        ("2000", "2024", False),
        ("$x + 1$", "x + 1", True),
        ("\\$72", "72", True),
        ("-$5", "-5", True),
        ("+5", "5", True),
        ("--1/2", "1/2", False),
        ("5 %", "5.0\\%", True),
        ("5%", "0.05", False),
        ("72\x00", "72", False),
        (".", ".", False),
        ("1,000,000", "1000000", True),
        ("1,000,00", "100000", False),
    ],
)
def test_answers_agree_by_value_and_not_by_accident(first, second, agree) -> None:
    """VF-9."""
    assert answers_agree(first, second) is agree
    assert answers_agree(second, first) is agree


def test_the_reward_takes_text_and_messages() -> None:
    """VF-1, VF-2: gold in the documented form scores 1, another row's gold 0."""
    golds = ["72", "0.5", "c, b, a"]
    texts = [f"Some steps.\nAnswer: {gold}" for gold in golds]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert exact_reward(texts, golds) == exact_reward(chats, golds) == [1.0, 1.0, 1.0]
    assert exact_reward(texts, golds[1:] + golds[:1]) == [0.0, 0.0, 0.0]


def test_a_tool_s_result_is_no_answer_of_the_policy_s() -> None:
    call = {"role": "assistant", "content": "I look it up.", "tool_calls": [{"type": "function"}]}
    result = {"role": "tool", "name": "search", "content": "The answer is 7."}
    answer = {"role": "assistant", "content": "The answer is 8."}
    assert text_of([call, result, answer]) == answer["content"]
    assert text_of([call, result]) == call["content"]  # cut behind the result
    assert text_of([result]) == result["content"]  # of a prompt, in the transcript for a judge
    assert text_of([{**call, "content": None}]) == ""


def test_a_solution_that_cannot_be_used_is_no_verdict() -> None:
    """VF-11's second half."""
    assert exact_reward(["Answer: 1"] * 3, [None, "", "  "]) == [None, None, None]


def test_without_a_marker_the_last_sentence_counts_if_it_has_one_number() -> None:
    texts = ["72", "it is 72", "72 or 73", "It isn't 72.", "24 + 48 = 72.\nSo she has 72 clips.",
             "She has 72 clips.\nThen she buys", "Is it 72?", "3 friends have 72 clips."]  # fmt: skip
    assert exact_reward(texts, ["72"] * 8) == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]


def test_percent_is_a_unit_only_when_asked() -> None:
    """VF-9."""
    assert answers_agree("5%", "5", percent_is_unit=True)
    assert not answers_agree("5%", "6", percent_is_unit=True)


def test_messages_may_hold_parts_or_nothing() -> None:
    chats = [
        [{"role": "assistant", "content": [{"type": "text", "text": "Answer: 72"}]}],
        [{"role": "assistant", "content": "Answer: 7"}, {"role": "assistant", "content": "72"}],
        [{"role": "assistant", "content": None}],
        [],
    ]
    assert exact_reward(chats, ["72"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_an_answer_in_closed_thoughts_is_none() -> None:
    wrong = "<think>maybe \\boxed{4}</think> The answer is 3."
    assert exact_reward([wrong, wrong], ["4", "3"]) == [0.0, 1.0]
    for thoughts in ("<think>#### 4</think>", "the answer is 4</think>", "<thinking>4</thinking>",
                     "<think><answer>4</answer></THINK>", "</think>\\boxed{4}</think>"):  # fmt: skip
        assert extract_answer(f"{thoughts} So \\boxed{{5}}.") == "5"
        assert extract_answer(thoughts) is None
        assert exact_reward([f"{thoughts}5", f"{thoughts}5"], ["5", "4"]) == [1.0, 0.0]
    assert final_answer("<think>4</think>\n5") == "5"


@pytest.mark.parametrize("solution", [["72"], ("72",), {"answer": "72"}, {"72"}, b"72"])
def test_a_solution_that_is_no_single_answer_is_refused(solution) -> None:
    """Its text would be "['72']", which no completion says."""
    functions = [exact_reward, choice_reward]
    if find_spec("math_verify"):
        functions.append(math_reward)
    for function in functions:
        with pytest.raises(TypeError, match=r"a solution is .*72.*give one answer"):
            function(["The answer is 72."], [solution])


def test_a_missing_number_is_no_solution() -> None:
    assert exact_reward(["nan", "72"], [float("nan"), 72]) == [None, 1.0]
    assert choice_reward(["nan"], [float("nan")]) == [None]


def test_half_a_surrogate_pair_is_a_wrong_answer() -> None:
    """Python text may hold one, where an encoder was cut short; UTF-8 may not."""
    functions = [exact_reward, choice_reward]
    if find_spec("math_verify"):
        functions.append(math_reward)
    for function in functions:
        assert function(["Answer: \ud800", "Answer: B"], solution=["B", "B"])[0] == 0.0
        assert function(["Answer: B"], solution=["\ud800"])[0] in (0.0, None)


def test_words_of_our_patterns_are_words_in_an_answer() -> None:
    """A list of words is read to its end, whatever they are."""
    words = """if not wait no so with for where which as because since right found required correct
        wrong answer result output thinks or and maybe may the foundation actually sorry first"""
    for word in words.split():
        for gold in (f"{word}, laws, abide", f"abide, {word}, laws", f"abide, laws, {word}"):
            texts = [f"1. {word}\nAnswer: {gold}", f"\\boxed{{{gold}}}", f"#### {gold}"]
            assert exact_reward(texts, [gold] * 3) == [1.0] * 3, gold


@pytest.mark.parametrize(
    "text",
    [
        "\\boxed{72} is incorrect",
        "\\boxed{72}, which is wrong.",
        "<answer>72</answer> is not correct.",
        "Answer: 72 (wrong)",
        "\\boxed{72} ✗",
        "It's not true that \\boxed{72}.",
        "I doubt the answer is 72.",
        "Bob's answer is 72.",
        "Die Antwort ist nicht 72.",
    ],
)
def test_an_answer_that_the_text_calls_wrong_is_none(text) -> None:
    assert exact_reward([text], ["72"]) == [0.0]


@pytest.mark.parametrize(
    "text",
    [
        "Twice the answer is 72",
        "10% of the answer is 72.",
        "The answer squared is 72.",
        "\\frac{1}{\\boxed{72}}",
        "2^{\\boxed{72}}",
        "\\boxed{72} \\times 10^3",
        "\\boxed{72}^2",
        "3 \\times \\boxed{72}",
        "x \\neq \\boxed{72}",
        "\\boxed{72}\\sqrt{2}",
        "\\boxed{72},000",
        "\\boxed{72} thousand",
        "\\boxed{>72}",
        "The answer is 72 squared.",
        "The answer is 72k.",
    ],
)
def test_a_part_or_a_multiple_of_the_answer_is_none(text) -> None:
    assert exact_reward([text], ["72"]) == [0.0]


def test_a_box_in_an_equation_is_an_answer() -> None:
    texts = ["24 + 48 = \\boxed{72}", "24 + \\boxed{72} = 96", "\\boxed{72} is the answer.",
             "- \\boxed{72}", "{\\color{red}\\boxed{72}}", "\\boxed{72}, not 71", "\\boxed{72} clips",
             "\\boxed{72}. It is not prime."]  # fmt: skip
    assert exact_reward(texts, ["72"] * 8) == [1.0] * 8
    assert exact_reward(["\\boxed{72} \\times 10^3"], ["72000"]) == [1.0]


def test_yes_or_no_must_not_contradict_its_sentence() -> None:
    texts = ["Yes, it is not", "Yes, it isn't.", "No, it is.", "Yes, it is prime", "No, it is not.",
             "Yes. There is no smaller divisor."]  # fmt: skip
    golds = ["yes", "yes", "no", "yes", "no", "yes"]
    assert exact_reward(texts, golds) == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_the_word_for_an_answer_may_be_in_another_language() -> None:
    texts = ["Antwort: 72", "La respuesta es 72.", "Ответ: 72", "所以答案是 72。", "答えは 72 個です。",
             "정답은 72입니다.", "La réponse est: **72**"]  # fmt: skip
    assert exact_reward(texts, ["72"] * 7) == [1.0] * 7


def test_a_last_sentence_may_name_a_word() -> None:
    rows = [("It is **Lisbon**.", "Lisbon"), ('The missing word is "umbrella".', "umbrella"),
            ("The statement is false.", "False"), ("Ottawa. Some say Toronto.", "Ottawa"),
            ("Are all squares rectangles? Yes.", "yes"), ("| Chile | **Santiago** |", "Santiago"),
            ("The author is George Eliot (born Mary Ann Evans).", "George Eliot")]  # fmt: skip
    texts, golds = zip(*rows, strict=True)
    assert exact_reward(texts, golds) == [1.0] * len(rows)
    wrong = ["It is not **Lisbon**.", "Lisbon. Actually, Porto.", "It is false that it is Lisbon."]
    assert exact_reward(wrong, ["Lisbon"] * 3) == [0.0] * 3


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1. the\n2. his\n3. that\nAnswer: that, on, his, the\n\n", "that, on, his, the"),
        ("Answer: About, then, now", "About, then, now"),
        ("1. Archive\n2. answer\n3. is\nAnswer: is, answer, Archive", "is, answer, Archive"),
        ("The answer is therefore, 5.", "5"),
    ],
)
def test_words_of_a_list_are_no_fillers_and_no_markers(text, answer) -> None:
    assert extract_answer(text) == answer
