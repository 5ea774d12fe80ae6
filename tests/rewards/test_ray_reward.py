"""Grading on a Ray cluster: the same scores, whoever calls the function."""

import pytest

from trl_selfplay.rewards import exact_reward, on_ray
from trl_selfplay.rewards.functions import columns_read
from trl_selfplay.rewards.ray_reward import _parts
from trl_selfplay.rewards.scoring import Scorer


async def awaited(prompts, completions, **kwargs):
    return [0.0] * len(completions)


def logs(prompts, completions, log_metric, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("org/reward-model", TypeError, "plain function"),
        (awaited, TypeError, "plain function"),
        (logs, ValueError, "log_metric"),
    ],
)
def test_what_can_not_be_sent_is_refused(function, error, message) -> None:
    with pytest.raises(error, match=message):
        on_ray(function)


def test_samples_of_a_prompt_stay_together() -> None:
    prompts = ["a"] * 3 + ["b"] * 2 + ["c"] * 4
    assert _parts(prompts, 1) == [slice(0, 3), slice(3, 5), slice(5, 9)]
    assert _parts(prompts, 4) == [slice(0, 5), slice(5, 9)]
    assert _parts(prompts, 100) == [slice(0, 9)]
    assert _parts([], 4) == []


def test_it_reads_the_columns_that_the_function_reads() -> None:
    graded = on_ray(exact_reward)
    assert graded.__name__ == "exact_reward"
    assert columns_read(graded, ["solution", "level"]) == ["solution"]


@pytest.mark.slow
def test_scores_and_errors_are_those_of_the_function(local_ray) -> None:
    def length(prompts, completions, solution, **kwargs):
        if "boom" in completions:
            raise ZeroDivisionError("no grade")
        return [float(len(c)) - float(s) for c, s in zip(completions, solution, strict=True)]

    completions = ["a" * (i % 7) for i in range(40)]
    arguments = {
        "prompts": [f"prompt {i // 4}" for i in range(40)],
        "completion_ids": [[1]] * 40,
        "columns": {"solution": [str(i) for i in range(40)]},
    }
    graded = on_ray(length, completions_per_task=6)
    direct, spread = Scorer(length), Scorer(graded)
    assert spread.names == direct.names == ("length",)
    expected = direct.score(completions=completions, **arguments)
    assert spread.score(completions=completions, **arguments) == expected
    with pytest.raises(RuntimeError, match=r"length.*no grade"):
        spread.score(completions=["boom", *completions[1:]], **arguments)
