import itertools

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
        ("B. a dog", 1.0),
        ("The answer is B, because (A) is wrong", 1.0),
        ("A cat doesn't bark, see (A). The answer is (B).", 1.0),
        ("The answer is (A). The answer is (B).", 0.0),
        ("The answer is (A). Wait, the answer is (B).", 1.0),
        ("The answer is (B). Yes, the answer is B.", 1.0),
        ("\\boxed{A} \\boxed{B}", 0.0),
        ("\\boxed{\\text{B}}", 1.0),
        ("<answer>B</answer>", 1.0),
        ("#### B", 1.0),
        ("**Answer: B**", 1.0),
        ("Answer: B because it barks", 1.0),
        ("My answer is a dog", 1.0),
        ("A. a cat\nB. a dog\nC. the moon", 0.0),
        ("Answer: A. a cat B. a dog", 0.0),
        ("Answer: A dog or (B)", 0.0),
        ("f(x) barks: a dog.", 1.0),
        ("a dogma", 0.0),
        ("(Z)", 0.0),
    ],
)
@pytest.mark.parametrize("gold", ["B", "(b)", "a dog"])
def test_one_choice_counts_and_two_are_none(completion, score, gold) -> None:
    """VF-10: two different choices score 0."""
    assert choice_reward([completion], [gold], choices=[OPTIONS]) == [score]


def test_a_solution_that_is_no_option_is_no_verdict() -> None:
    """VF-11."""
    golds = ["a fish", None, "", "(Z)"]
    assert choice_reward(["(A)"] * 4, golds, choices=[OPTIONS] * 4) == [None] * 4


def test_letters_need_no_options() -> None:
    chat = [[{"role": "assistant", "content": "I choose (C)."}]]
    assert choice_reward(chat, ["c"]) == [1.0]


def test_an_option_is_named_by_whole_words_and_the_longest_counts() -> None:
    options = ["5", "15", "a dog", "a dog house"]
    texts = ["it is 15", "-5 it is", "it is 1.5", "it is a dog house", "it is 5."]
    scores = [choice_reward([text], ["5"], choices=[options])[0] for text in texts]
    assert scores == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert choice_reward(["it is a dog house"], ["D"], choices=[options]) == [1.0]


def test_where_options_are_letters_the_option_s_letter_counts() -> None:
    """Option A is the text "B": a bare B is option B, whose text is "A"."""
    assert choice_reward(["(B)", "(A)"], ["B"] * 2, choices=[["B", "A"]] * 2) == [1.0, 0.0]


def test_a_row_may_have_no_options() -> None:
    assert choice_reward(["(B)", "a dog"], ["B", "B"], choices=[None, OPTIONS]) == [1.0, 1.0]


FORMS = [
    "{}",
    "**{}**",
    "({})",
    "Option {}",
    "Option {}.",
    "I choose option {}, which fits.",
    "The answer is {} because it fits.",
    "The answer is {}, because it fits.",
    "The answer is {}; it fits.",
    "The answer is {} since nothing else does.",
    "The answer is {} - it fits.",
    "The answer is {} (it fits).",
    "The answer is **{}** as it fits.",
    "The answer is: {}",
    "The answer is option {}.",
    "The answer is \\boxed{{{}}}.",
    "The correct option is {}.",
    "The right choice is ({}).",
    "{} is correct.",
    "({}) is correct.",
    "Option {} is correct.",
    "{} is the right answer.",
    "So {} is the answer.",
    "**Answer**: {}",
    "**Answer:** {}",
    "**Final Answer**: ({})",
    "Answer: **{}**",
    "Answer: {} is the one that fits",
    "My choice is {}.",
    "<think>Is it (A) or (B)? Option C?</think> The answer is {}.",
]
NO_CHOICE = [
    "The answer is {} or {other}.",
    "The answer is {} and {other}.",
    "{}/{other}",
    "Answer: {}, {other}",
    "Either {} or {other}.",
    "Option {} or option {other}.",
    "({}) is not correct.",
    "The answer is not {}.",
    "The answer is neither {} nor {other}.",
    "the answer is {} thing",
    "{} fits",
]


LETTERS = "ABCDEFGHIJ"


@pytest.mark.parametrize("form", FORMS)
def test_every_letter_has_the_same_verdict_in_every_form(form) -> None:
    """Also A, which is an article, and I: or a model would learn to avoid these answers."""
    options = [f"the {letter.lower()}" for letter in LETTERS]
    for letter in LETTERS:
        for choices in (None, [options] * len(LETTERS)):
            scores = choice_reward([form.format(letter)] * len(LETTERS), LETTERS, choices=choices)
            assert scores == [float(gold == letter) for gold in LETTERS], letter


@pytest.mark.parametrize("form", NO_CHOICE)
def test_no_letter_is_chosen_by_what_chooses_none(form) -> None:
    for letter in LETTERS:
        text = form.format(letter, other="D" if letter == "C" else "C")
        assert choice_reward([text] * len(LETTERS), LETTERS) == [0.0] * len(LETTERS), letter


@pytest.mark.parametrize(
    "form",
    [
        "The answer is ({}) {}.",
        "The answer is {}. {}",
        "**{}) {}**",
        "({}) {}",
        "Answer: {}: {}, clearly",
        "\\boxed{{{}. {}}}",
        "Option {}: {}.",
        "The correct option is {}, {}.",
    ],
)
def test_a_letter_with_another_option_s_text_is_no_choice(form) -> None:
    """Which of the two is meant can't be known; with its own text it is the choice."""
    cities = dict(zip("ABCD", ["Paris", "Paris, Texas", "Rome", "-5"], strict=True))
    choices = [list(cities.values())] * 4
    for letter, (own, city) in itertools.product(cities, cities.items()):
        scores = choice_reward([form.format(letter, city)] * 4, "ABCD", choices=choices)
        assert scores == [float(letter == own == gold) for gold in "ABCD"], (letter, city)


def test_an_article_is_no_letter_before_an_option_s_text() -> None:
    texts = ["The answer is a dog.", "The answer is A dog.", "A dog barks.", "\\boxed{A dog}"]
    assert choice_reward(texts, ["B"] * 4, choices=[OPTIONS] * 4) == [1.0] * 4
    assert choice_reward(texts, ["A"] * 4, choices=[OPTIONS] * 4) == [0.0] * 4
    assert choice_reward(["The answer is A dog."], ["A"], choices=[["dog", "cat"]]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "Answer: not London",
        "London is wrong.",
        "The answer is other than London.",
        "London? No.",
        "Is it London?",
        "I ruled out London.",
        "Everything but London",
        "Answer: A (wrong)",
        "\\boxed{A} is incorrect.",
        "(A)? No.",
        "<answer>not London</answer>",
        "The incorrect option is A.",
        "Some would choose A.",
        "Answer: A ❌",
    ],
)
def test_an_option_that_the_text_denies_is_not_chosen(text) -> None:
    assert choice_reward([text], ["A"], choices=[["London", "Paris"]]) == [0.0]


def test_the_opposite_of_an_option_is_not_the_option() -> None:
    for options in (["true", "false"], ["yes", "no"]):
        for text in (f"not {options[0]}", f"Answer: not {options[0]}", f"It is not {options[0]}."):
            assert choice_reward([text], ["A"], choices=[options]) == [0.0]


def test_an_option_counts_beside_a_denied_one() -> None:
    texts = [
        "London. It is not Paris.",
        "London, not Paris",
        "The capital is London. Paris is wrong.",
    ]
    assert choice_reward(texts, ["A"] * 3, choices=[["London", "Paris"]] * 3) == [1.0] * 3
    assert choice_reward(["答案:A", "Ａ", "Die richtige Antwort ist A."], ["A"] * 3) == [1.0] * 3


def test_solutions_that_name_no_option_are_listed_before_sampling() -> None:
    solutions = ["B", 1, "a bird", None, "the moon"]
    errors = choice_reward.find_data_errors(solution=solutions, choices=[OPTIONS] * 5)
    assert set(errors) == {1, 2, 3}
    assert errors[1] == "the solution 1 names no option; give its letter or its text"
    scores = choice_reward(["(B)"] * 5, solutions, [OPTIONS] * 5)
    assert scores == [1.0, None, None, None, 0.0]
    assert set(scores.causes.values()) == {"the solution names no option"}


@pytest.mark.parametrize("choices", [{"label": ["A", "B"], "text": OPTIONS}, "a cat, a dog"])
def test_options_that_are_no_list_are_refused(choices) -> None:
    with pytest.raises(TypeError, match="give a list of texts"):
        choice_reward(["(B)"], ["B"], [choices])
