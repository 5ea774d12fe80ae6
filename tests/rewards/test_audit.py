"""What a policy may try on a reward function, what it must not get for it, and what reports it."""

import os
import random
import threading
import time

import pytest
from holdings import held
from patience import ENDS_S, under_growing_deadlines

from trl_selfplay.rewards import (
    audit_reward,
    checker_reward,
    choice_reward,
    code_fraction_reward,
    code_reward,
    equations_reward,
    exact_reward,
    math_reward,
    puzzle_reward,
)
from trl_selfplay.rewards.audit import _TRICKS
from trl_selfplay.rewards.worker import close_workers

OPTIONS = ["a cat", "a dog", "the moon"]


def exact_with_equations(completions, solution, **kwargs):
    """As their weighted sum of 0.5 each under a threshold of 1.0."""
    right = exact_reward(completions, solution)
    return [a * b for a, b in zip(right, equations_reward(completions), strict=True)]


def is_same(answer, solution):
    return answer == solution


QUESTION = {
    "choice_reward": "What barks?\n(A) a cat\n(B) a dog\n(C) the moon",
    "math_reward": "What is $40 + 32$? $70$, $71$, $72$ or $73$?",
}
GOLDS = {
    "exact_reward": ["72", "1,000", "c, b, a", "0.5", "-3", "Paris", "5%", "2/3", "yes"],
    "exact_with_equations": ["72", "73"],
    "choice_reward": list("BCABCABCA"),
    "math_reward": ["72", "1,000", "$\\frac{2}{3}$", "0.5", "-3", "\\boxed{x+1}", "5\\%", "(1,2)", "y"],
    "is_same": ["72", "73"],
}  # fmt: skip
REWARDS = {f.__name__: f for f in (exact_reward, exact_with_equations, choice_reward, math_reward)}


@pytest.fixture(scope="module", autouse=True)
def _end_the_workers():
    yield
    close_workers()


def rows_of(name):
    question = QUESTION.get(name, "What is 40 + 32? 70, 71, 72 or 73?")
    columns = {"choices": OPTIONS} if name == "choice_reward" else {}
    return [{"prompt": question, "solution": gold, **columns} for gold in GOLDS[name]]


def program_rows():
    pytest.importorskip("trl_selfplay.rewards.sandbox")
    return [
        {"prompt": "Double x.", "tests": ["assert f(2) == 4", "assert f(5) == 10"], "code": "2 * x"},
        {"prompt": "Add 3 to x.", "tests": ["assert f(2) == 5", "assert f(9) == 12"], "code": "x + 3"},
    ]  # fmt: skip


def program(row):
    return f"```python\ndef f(x):\n    return {row['code']}\n```"


@pytest.mark.parametrize(
    "name",
    [
        "exact_reward",
        pytest.param("is_same", marks=pytest.mark.slow),
        pytest.param("exact_with_equations", marks=pytest.mark.slow),
        pytest.param("choice_reward", marks=pytest.mark.slow),
        pytest.param("math_reward", marks=pytest.mark.slow),
    ],
)
def test_no_trick_gets_a_reward_or_hangs(name) -> None:
    """The audit, VF-2, VF-4, VF-5: 0.0 or no verdict but for the right answer."""
    if name == "math_reward":
        pytest.importorskip("math_verify")
    reward = checker_reward(is_same) if name == "is_same" else REWARDS[name]
    audit = audit_reward(reward, rows_of(name), max_rows=2, deadline=ENDS_S)
    assert audit.passed, str(audit)
    assert (audit.name, audit.note) == (name, "")
    assert len(audit.checks) == 3 + len(_TRICKS)


def beyond(deadline_s):
    """Return a deadline of the audit that calls keep which reach the function's own."""
    return 10 * deadline_s + ENDS_S


def has_right_answers(audit) -> bool:
    return all(check.scores == (1.0, 1.0) for check in audit.checks[:2])


@pytest.mark.slow
@pytest.mark.parametrize("reward", [code_reward, code_fraction_reward])
def test_no_trick_passes_for_a_program(reward, monkeypatch) -> None:
    """Of rows without a solution, with the programs that are right."""

    def audit_under(deadline_s):
        monkeypatch.setattr(reward, "_deadline_s", deadline_s)
        return audit_reward(reward, program_rows(), right=program, deadline=beyond(deadline_s))

    audit = under_growing_deadlines(audit_under, has_right_answers, first_s=5.0)
    assert audit.passed, str(audit)
    assert [check.scores for check in audit.checks[:2]] == [(1.0, 1.0)] * 2


@pytest.mark.slow
def test_no_trick_solves_a_puzzle() -> None:
    reasoning_gym = pytest.importorskip("reasoning_gym")
    rows = [
        {"prompt": e["question"], "solution": e["answer"], "metadata": e["metadata"]}
        for e in reasoning_gym.create_dataset("countdown", size=2, seed=5)
    ]
    # The scorer gives 0.05 to an expression of another value, and 0.01 to anything else.
    audit = under_growing_deadlines(
        lambda deadline_s: audit_reward(
            puzzle_reward("countdown", deadline_s),
            rows,
            tolerance=0.05,
            deadline=beyond(deadline_s),
        ),
        has_right_answers,
        first_s=5.0,
    )
    assert audit.passed, str(audit)


@pytest.mark.slow
def test_functions_of_trl_can_be_audited() -> None:
    """They take chat messages only; this one looks at the format alone."""
    from trl.rewards import think_format_reward

    audit = audit_reward(
        think_format_reward, rows_of("exact_reward"), right=lambda row: "<think>a</think>b",
        deadline=ENDS_S,
    )  # fmt: skip
    assert {check.name for check in audit.problems} >= {"gold in the thoughts alone"}
    assert all(check.scores for check in audit.checks)


def grade(name, completions, golds):
    columns = {"choices": [OPTIONS] * len(golds)} if name == "choice_reward" else {}
    return REWARDS[name](completions=completions, solution=golds, **columns)


def boxed(name):
    golds = GOLDS[name]
    bare = [gold.strip("$").removeprefix("\\boxed{").removesuffix("}") for gold in golds]
    if name == "math_reward":
        pytest.importorskip("math_verify")
        bare[2] = "\\frac{2}{3}"
    return [f"Step 1. Think.\n\\boxed{{{answer}}}" for answer in bare], golds


@pytest.mark.parametrize("name", REWARDS)
def test_gold_scores_one_and_the_next_row_s_gold_none(name) -> None:
    """VF-1, VF-2."""
    completions, golds = boxed(name)
    assert grade(name, completions, golds) == [1.0] * len(golds)
    assert grade(name, completions, golds[1:] + golds[:1]) == [0.0] * len(golds)


@pytest.mark.parametrize("name", REWARDS)
def test_scores_do_not_depend_on_batch_or_order(name) -> None:
    """VF-5."""
    completions, golds = boxed(name)
    completions = completions + completions[::-1] + ["\\boxed{}", "Answer: no"]
    golds = golds + golds + golds[:2]
    together = grade(name, completions, golds)
    assert set(together) == {0.0, 1.0}
    alone = [grade(name, [c], [g])[0] for c, g in zip(completions, golds, strict=True)]
    assert alone == together
    order = random.Random(0).sample(range(len(golds)), len(golds))
    shuffled = grade(name, [completions[i] for i in order], [golds[i] for i in order])
    assert shuffled == [together[i] for i in order]


@pytest.mark.parametrize("name", REWARDS)
def test_messages_score_as_text_does(name) -> None:
    completions, golds = boxed(name)
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    assert grade(name, chats, golds) == grade(name, completions, golds)


# The audit itself.


def exact(completions, solution, **kwargs):
    """As `exact_reward`, which takes its time for what isn't marked."""
    return [float(c == f"Answer: {s}") for c, s in zip(completions, solution, strict=True)]


ROWS = [{"prompt": "3 + 4?", "solution": "7"}, {"prompt": "2 + 3?", "solution": "5"}]


def problems(audit):
    return {check.name: check.problem for check in audit.problems}


def test_what_scores_is_reported_with_the_completion() -> None:
    def contains(completions, solution, **kwargs):
        return [float(s in c) for c, s in zip(completions, solution, strict=True)]

    audit = audit_reward(contains, ROWS)
    found = problems(audit)
    assert not audit.passed
    assert {"all options", "denial", "gold followed by garbage", "hashes alone"} <= set(found)
    assert "empty" not in found
    assert found["denial"] == "1.0 for 'The answer is not 7', solution '7'"
    lines = str(audit).splitlines()
    assert lines[0] == f"contains: {len(found)} of {len(audit.checks)} failed"
    assert next(line for line in lines if line.startswith("denial")).endswith(found["denial"])


def test_equations_alone_are_no_reward() -> None:
    """A text without equations has no false one."""
    assert {"empty", "right answers of other rows"} <= set(
        problems(audit_reward(equations_reward, ROWS, in_process=True))
    )


def test_right_answers_have_to_score() -> None:
    found = problems(
        audit_reward(lambda completions, **kwargs: [0.0] * len(completions), ROWS, in_process=True)
    )
    assert found == {"right answers": "0.0 for 'Answer: 7', solution '7'"}
    found = problems(
        audit_reward(lambda completions, **kwargs: [None] * len(completions), ROWS, in_process=True)
    )
    assert found == {"right answers": "None for 'Answer: 7', solution '7'"}


def test_scores_that_depend_on_the_order_are_reported() -> None:
    def by_place(completions, **kwargs):
        return [1.0 - 0.1 * index for index in range(len(completions))]

    found = problems(audit_reward(by_place, ROWS, tolerance=1.0, passing=0.5, in_process=True))
    assert found == {"the same in reverse": "[1.0, 0.9] in place of [0.9, 1.0]"}


def test_digits_of_another_script_are_reported_to_a_checker_that_reads_them() -> None:
    def is_equal(answer, solution):
        return int(answer) == solution

    reward = checker_reward(is_equal)
    audit = audit_reward(reward, [{"prompt": "40 + 32?", "solution": 72}], in_process=True)
    assert set(problems(audit)) == {"Arabic digits"}


def test_partial_credit_is_tolerated_on_request() -> None:
    def partial(completions, solution, **kwargs):
        return [max(score, 0.1) for score in exact(completions, solution)]

    assert "empty" in problems(audit_reward(partial, ROWS, in_process=True))
    assert audit_reward(partial, ROWS, in_process=True, tolerance=0.1).passed


def fail(completions, solution, **kwargs):
    text = completions[0]
    if text == "":
        while True:
            time.sleep(0.01)
    if text == " \n\t ":
        raise KeyError("no")
    if text.startswith("```python\nimport os"):
        os._exit(0)
    if text.startswith("```python\nprint"):
        raise SystemExit(0)
    if text == "3 + 4?":
        return [0.0]
    if text.startswith("Ignore"):
        return "0.0"
    if text.startswith("{"):
        return [float("inf")] * len(completions)
    return exact(completions, solution)


FAILURES = {
    "empty": "no answer within the deadline",
    "white space": "it raised KeyError: 'no'",
    "code": "the process died",
    "code that claims success": "the process died",
    "prompt echo": "it raised ValueError: it returned 1 scores for 2 completions",
    "a word to the judge": "it raised TypeError: it returned str, not a list",
    "a verdict": "it raised ValueError: it returned [inf, inf]",
}


def test_a_function_that_fails_is_reported_and_the_rest_is_tried() -> None:
    close_workers()
    before = held()
    late = FAILURES["empty"]
    audit = under_growing_deadlines(
        lambda deadline_s: audit_reward(fail, ROWS, deadline=deadline_s),
        lambda audit: [*problems(audit).values()].count(late) == 1,
        first_s=2.0,
    )
    assert problems(audit) == FAILURES
    assert len(audit.checks) == 3 + len(_TRICKS)
    assert held() <= before


def test_in_this_process_failures_are_reported_as_well() -> None:
    def fail_here(completions, solution, **kwargs):
        if completions[0] == "" or completions[0].startswith("```python\nimport os"):
            return [0.0, 0.0]  # what would hang or end this process
        return fail(completions, solution, **kwargs)

    found = problems(audit_reward(fail_here, ROWS, in_process=True))
    assert found.pop("code that claims success") == "it raised SystemExit: 0"
    assert found == {name: FAILURES[name] for name in found}
    assert len(found) == len(FAILURES) - 3


def test_a_call_that_hangs_in_this_process_ends_the_audit() -> None:
    """It can be given up, not ended; here it ends by itself afterwards."""
    over, waits = threading.Event(), []

    def wait(completions, **kwargs):
        if not completions[0]:
            waits.append(threading.current_thread())
            over.wait()
        return exact(completions, kwargs["solution"])

    try:
        audit = under_growing_deadlines(
            lambda deadline_s: audit_reward(wait, ROWS, deadline=deadline_s, in_process=True),
            lambda audit: waits,  # none of those before it was late
            first_s=0.5,
        )
        found = problems(audit)
        assert found.pop("empty") == "no answer within the deadline"
        assert set(found.values()) == {"not tried after a call that didn't end"}
        assert len(found) == len(_TRICKS) - 1
    finally:
        over.set()
        for thread in waits:
            thread.join()


def test_what_cannot_be_sent_is_called_here_with_a_note() -> None:
    numbers = (number for number in range(1000))

    def counts(completions, solution, **kwargs):
        next(numbers)
        return exact(completions, solution)

    audit = audit_reward(counts, ROWS)
    assert audit.passed
    assert audit.note.startswith(
        "Called in this process, where a call can't be ended: 'counts' can't"
    )
    assert str(audit).endswith(audit.note)


def test_async_functions_chat_prompts_and_columns_reach_the_function() -> None:
    async def look(prompts, completions, completion_ids, unit, trainer_state, log_metric, **kwargs):
        assert prompts == [[{"role": "user", "content": "3 + 4?"}]]
        assert completions[0][-1]["role"] == "assistant"
        assert len(completion_ids) == 1
        assert unit == ["m"]
        return [float(completions[0][-1]["content"] == "7 m")]

    prompt = [{"role": "user", "content": "3 + 4?"}]
    rows = [{"prompt": prompt, "unit": "m", "completion": "7 m"}]
    audit = audit_reward(look, rows, right=lambda row: row["completion"])
    assert audit.passed, str(audit)
    assert {check.name for check in audit.checks} >= {"right answers", "prompt echo"}
    assert not {"denial", "gold followed by garbage"} & {check.name for check in audit.checks}


def test_an_audit_needs_a_row() -> None:
    with pytest.raises(ValueError, match="there are no rows"):
        audit_reward(exact_reward, [])
