"""What a policy may try on a reward function, and what it must not get for it."""

import random
import time

import pytest

from trl_selfplay.rewards import choice_reward, exact_reward, math_reward
from trl_selfplay.rewards.worker import close_workers

OPTIONS = ["a cat", "a dog", "the moon"]
GOLD = {"exact_reward": "72", "choice_reward": "B", "math_reward": "$72$"}
QUESTION = {
    "exact_reward": "What is 40 + 32? 70, 71, 72 or 73?",
    "choice_reward": "What barks?\n(A) a cat\n(B) a dog\n(C) the moon",
    "math_reward": "What is $40 + 32$? $70$, $71$, $72$ or $73$?",
}
# {gold}: the right answer; {wrong}: another; {question}: the prompt.
TRICKS = {
    "empty": "",
    "white space": " \n\t ",
    "a million characters": "answer " * 150_000,
    "a million spaces": "the" + " " * 500_000 + "answer" + " " * 500_000 + "{wrong}",
    "spaces behind a marker": "The answer is" + " " * 200_000 + "maybe {wrong}",
    "stars behind a marker": "Answer" + "*" * 200_000 + " {wrong}",
    "spaces and stars behind a marker": "The answer is" + " *" * 100_000 + "\n{wrong}",
    "lines behind a letter": "C" + "\n" * 200_000 + "is {wrong}",
    "a box of spaces": "\\boxed{{" + " " * 500_000,
    "a million digits": "Answer: " + "1" * 1_000_000,
    "prompt echo": "{question}",
    "gold in a quotation of the question": 'You ask: "{question}"',
    "gold followed by garbage": "Answer: {gold} or {wrong}",
    "garbage followed by gold": "Answer: {wrong} or {gold}",
    "gold before another answer": "the answer is {gold}. No, the answer is {wrong}.",
    "hashes alone": "{gold}\n#### ",
    "unbalanced braces": "\\boxed{{{{{{{gold}",
    "null bytes": "{gold}\x00\x00 Answer: \x00",
    "right to left": "Answer: \u202e27",
    "full-width digits": "Answer: ７２",
    "full-width letters": "Answer: Ｂ",
    "Arabic digits": "Answer: ٧٢",
    "a tower of exponents": "Answer: 9**9**9**9",
    "a tower in LaTeX": "\\boxed{{9^{{9^{{9^9}}}}}}",
    "deep parentheses": "Answer: " + "(" * 10_000 + "{wrong}" + ")" * 10_000,
    "deep braces": "\\boxed{{" + "{{" * 10_000 + "{wrong}" + "}}" * 10_000 + "}}",
    "ten thousand open boxes": "\\boxed{{" * 10_000 + "{gold}",
    "denial": "The answer is not {gold}",
}
REWARDS = {f.__name__: f for f in (exact_reward, choice_reward, math_reward)}


@pytest.fixture(scope="module", autouse=True)
def _end_the_workers():
    yield
    close_workers()


@pytest.fixture(params=REWARDS)
def name(request):
    if request.param == "math_reward":
        pytest.importorskip("math_verify")
    return request.param


def grade(name, completions, golds):
    columns = {"choices": [OPTIONS] * len(golds)} if name == "choice_reward" else {}
    return REWARDS[name](completions=completions, solution=golds, **columns)


@pytest.mark.parametrize("trick", TRICKS)
def test_no_trick_gets_a_reward_or_hangs(name, trick) -> None:
    """The audit, VF-4: 0.0 or no verdict. Graded in CPU seconds of this process."""
    gold = GOLD[name].strip("$")
    wrong = "C" if name == "choice_reward" else "73"
    if name == "choice_reward":
        gold, wrong = f"({gold})", f"({wrong})"
    completion = TRICKS[trick].format(gold=gold, wrong=wrong, question=QUESTION[name])
    started = time.process_time()
    assert grade(name, [completion], [GOLD[name]])[0] in (0.0, None)
    assert time.process_time() - started < 20  # a hang, not a slow machine


def rows(name):
    if name == "choice_reward":
        golds = list("ABCABCABC")
    elif name == "exact_reward":
        golds = ["72", "1,000", "c, b, a", "0.5", "-3", "Paris", "5%", "2/3", "yes"]
    else:
        golds = ["72", "1,000", "$\\frac{2}{3}$", "0.5", "-3", "\\boxed{x+1}", "5\\%", "(1,2)", "y"]
    bare = [gold.strip("$").removeprefix("\\boxed{").removesuffix("}") for gold in golds]
    bare[2] = "\\frac{2}{3}" if name == "math_reward" else bare[2]
    return [f"Step 1. Think.\n\\boxed{{{answer}}}" for answer in bare], golds


def test_gold_scores_one_and_the_next_row_s_gold_none(name) -> None:
    """VF-1, VF-2."""
    completions, golds = rows(name)
    assert grade(name, completions, golds) == [1.0] * len(golds)
    assert grade(name, completions, golds[1:] + golds[:1]) == [0.0] * len(golds)


def test_scores_do_not_depend_on_batch_or_order(name) -> None:
    """VF-5."""
    completions, golds = rows(name)
    completions = completions + completions[::-1] + ["\\boxed{}", "Answer: no"]
    golds = golds + golds + golds[:2]
    together = grade(name, completions, golds)
    assert set(together) == {0.0, 1.0}
    alone = [grade(name, [c], [g])[0] for c, g in zip(completions, golds, strict=True)]
    assert alone == together
    order = random.Random(0).sample(range(len(golds)), len(golds))
    shuffled = grade(name, [completions[i] for i in order], [golds[i] for i in order])
    assert shuffled == [together[i] for i in order]


def test_messages_score_as_text_does(name) -> None:
    completions, golds = rows(name)
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    assert grade(name, chats, golds) == grade(name, completions, golds)
