"""A user's own checker can neither hang nor end the run, wherever it was defined."""

import functools
import os
import pickle
import subprocess
import sys
import threading

import pytest
from checkers import LIMIT, Below, make_checker, misbehave, within_limit
from holdings import held
from patience import ENDS_S, under_growing_deadlines

from trl_selfplay.rewards import checker_reward
from trl_selfplay.rewards.functions import columns_read
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rewards.worker import close_workers


@pytest.fixture(scope="module", autouse=True)
def _end_the_workers():
    yield
    close_workers()


@pytest.fixture(scope="module")
def misbehaving():
    return checker_reward(misbehave, deadline=ENDS_S)


def test_a_number_a_bool_or_none_is_the_score(misbehaving) -> None:
    """VF-1."""
    answers = ["no", "yes", "half", "abstain", "above"]
    assert misbehaving([f"Answer: {answer}" for answer in answers]) == [0.0, 1.0, 0.5, None, 1.0]


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        ("hang", "no answer within the deadline"),
        ("exit", "the process died"),
        ("leave", "the process died"),
        ("unknown", "it raised KeyError"),
        ("text", "it raised TypeError"),
        ("numbers", "it raised TypeError"),
        ("nan", "it raised ValueError"),
    ],
)
@pytest.mark.parametrize("in_thread", [False, True])
def test_a_checker_that_fails_abstains_and_spares_the_others(
    misbehaving, answer, cause, in_thread, caplog
) -> None:
    """VF-3, VF-4: from any thread."""
    texts = ["Answer: yes", f"Answer: {answer}", "Answer: no"]

    def grade(deadline_s):
        found = []
        reward = checker_reward(misbehave, deadline=deadline_s) if answer == "hang" else misbehaving
        caplog.clear()
        if in_thread:
            thread = threading.Thread(target=lambda: found.append(reward(texts)))
            thread.start()
            thread.join()
        else:
            found.append(reward(texts))
        return found

    found = under_growing_deadlines(grade, lambda found: found[0][::2] == [1.0, 0.0])
    assert found == [[1.0, None, 0.0]]
    assert found[0].causes == {1: cause}
    assert f"misbehave: no score for 1 of 3 completions: {cause}" in caplog.text


def test_the_checker_gets_what_its_parameters_name() -> None:
    def compare(answer, completion, prompt, solution, unit="none"):
        found = (answer, completion, prompt, solution, unit)
        return found == ("7", "so <answer>7</answer>", "3 + 4?", 7, "m")

    reward = checker_reward(compare)
    rows = {"prompts": ["3 + 4?"], "completions": ["so <answer>7</answer>"], "solution": [7]}
    assert reward(**rows, unit=["m"], other=["x"], trainer_state=object()) == [1.0]
    assert reward(**rows, other=["x"]) == [0.0]
    assert columns_read(reward, ["prompt", "solution", "unit", "other"]) == ["solution", "unit"]

    def count(completion, **columns):
        return len(columns)

    reward = checker_reward(count)
    assert reward(**rows, unit=["m"], other=["x"], trainer_state=object()) == [3.0]
    assert columns_read(reward, ["prompt", "solution", "unit"]) == ["solution", "unit"]


def test_a_missing_column_is_found_before_sampling() -> None:
    scorer = Scorer(checker_reward(lambda answer, unit: True))
    scorer.check_columns(["prompt", "unit"], "train_dataset")
    with pytest.raises(ValueError, match=r"needs \['unit'\]"):
        scorer.check_columns(["prompt", "solution"], "train_dataset")


def test_messages_and_texts_score_alike(misbehaving) -> None:
    assert misbehaving([[{"role": "assistant", "content": "Answer: half"}]]) == [0.5]


@pytest.mark.parametrize(
    "checker",
    [
        within_limit,
        make_checker(10),
        lambda answer: int(answer) < LIMIT,
        Below(10),
        Below(10).method,
        functools.partial(lambda limit, answer: int(answer) < limit, 10),
        "checkers.within_limit",
    ],
    ids=["function", "closure", "lambda", "object", "method", "partial", "import path"],
)
def test_any_callable_can_be_sent(checker) -> None:
    reward = checker_reward(checker)
    assert reward(["Answer: 9", "Answer: 10"]) == [1.0, 0.0]
    reward.close()


SCRIPT = """
import re
from trl_selfplay.rewards import checker_reward

PATTERN = re.compile("[aeiou]")

class Counter:
    def count(self, text):
        return len(PATTERN.findall(text))

def has_two(completion):
    return Counter().count(completion) == 2

if True:  # no __main__ guard is needed
    print(checker_reward(has_two)(["a tree", "aha"]), checker_reward(lambda answer: 0.5)(["x"]))
"""


@pytest.mark.parametrize("how", [[], ["-m", "IPython", "--no-banner"]], ids=["script", "notebook"])
def test_a_checker_of_the_user_s_script_or_notebook_can_be_sent(how, tmp_path) -> None:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    outcome = subprocess.run(
        [sys.executable, *how, path], capture_output=True, text=True, check=True, timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "IPYTHONDIR": str(tmp_path)},
    )  # fmt: skip
    assert "[0.0, 1.0] [0.5]" in outcome.stdout


def test_a_large_variable_is_sent_once() -> None:
    """More than fits into a command line or a pipe."""
    words = {f"word{number}" for number in range(200_000)}
    reward = checker_reward(lambda answer: answer in words)
    assert reward(["Answer: word7", "Answer: Word7"]) == [1.0, 0.0]


def test_what_cannot_be_sent_is_refused_at_construction() -> None:
    numbers = (number for number in range(3))
    with pytest.raises(TypeError, match=r"can't be sent to another process: .*generator"):
        checker_reward(lambda answer: next(numbers))
    with pytest.raises(TypeError, match=r"takes \['text'\]\. Name a parameter `answer`"):
        checker_reward(lambda text: True)
    with pytest.raises(TypeError, match="by position"):
        checker_reward(lambda answer, *rest: True)
    with pytest.raises(TypeError, match="give a function"):
        checker_reward(7)
    with pytest.raises(TypeError, match=r"no signature|Name a parameter"):
        checker_reward(str.upper)
    with pytest.raises(ImportError, match="has no function 'nonesuch'"):
        checker_reward("checkers.nonesuch")
    with pytest.raises(ValueError, match="deadline=0"):
        checker_reward(within_limit, deadline=0)
    with pytest.raises(ValueError, match="up to 86400"):
        checker_reward(within_limit, deadline=float("inf"))

    async def waits(answer): ...

    with pytest.raises(TypeError, match="asynchronous"):
        checker_reward(waits)


def test_a_column_that_is_missing_or_has_another_length_is_an_error() -> None:
    def equals(answer, solution, level=0):
        return answer == solution

    reward = checker_reward(equals)
    with pytest.raises(ValueError, match=r"'equals' needs the columns \['solution'\]"):
        reward(["1"])
    for values in ([], ["1", "2"]):
        with pytest.raises(ValueError, match=f"'solution' has {len(values)} values for 1"):
            reward(["1"], solution=values)
    assert reward(["1"], solution=["1"]) == [1.0]


def test_a_function_of_a_module_that_is_nowhere_is_refused(monkeypatch) -> None:
    module = type(sys)("made_up")
    exec("def check(answer):\n    return True", module.__dict__)
    monkeypatch.setitem(sys.modules, "made_up", module)
    with pytest.raises(ImportError, match=r"can't be imported in another process: .*made_up"):
        checker_reward(module.check)


def test_it_pickles_and_has_the_checker_s_name() -> None:
    reward = pickle.loads(pickle.dumps(checker_reward(within_limit, deadline=60.0)))
    assert (reward.__name__, reward.deadline, reward.func) == ("within_limit", 60.0, within_limit)
    assert reward(["Answer: 3"]) == [1.0]


def test_after_closing_nothing_is_left() -> None:
    """VF-7."""
    close_workers()
    before = held()
    reward = checker_reward(within_limit)
    assert reward(["Answer: 3"]) == [1.0]
    reward.close()
    assert held() <= before
    assert reward(["Answer: 3"]) == [1.0]
    reward.close()
