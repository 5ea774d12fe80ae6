"""The programming demo: its tests are right, and its sets have nothing in common."""

import pytest

from trl_selfplay.demos.programs import programs_split
from trl_selfplay.rewards import code_reward
from trl_selfplay.rewards.worker import close_workers


@pytest.fixture(scope="module", autouse=True)
def _end_the_workers():
    yield
    close_workers()


@pytest.fixture(scope="module")
def split():
    return programs_split(seed=3)


def test_reference_programs_pass_their_tests_and_other_tasks_programs_do_not(split) -> None:
    rows = [*split.train.select(range(20)), *split.report.select(range(10))]
    tests = [row["tests"] + row["hidden_tests"] for row in rows]
    solutions = [row["solution"] for row in rows]
    assert code_reward(solutions, tests=tests) == [1.0] * len(rows)
    others = code_reward(solutions[1:] + solutions[:1], tests=tests)
    assert sum(others) <= 1


def test_examples_continue_their_prompts_as_completions_do(split) -> None:
    for example in split.few_shot:
        assert example["prompt"] + example["completion"] + "\n" == example["solution"]
        assert "\n\n" not in example["completion"]  # the demo's stop string
    texts = [example["completion"] for example in split.few_shot]
    assert len({text.split("for")[0] for text in texts}) == len(texts) == 5


def test_sets_and_tests_are_apart(split) -> None:
    sets = [split.train, split.select, split.report, split.few_shot]
    prompts = [{row["prompt"] for row in rows} for rows in sets]
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == 192 + 64 + 200 + 5
    for row in split.train:
        assert not set(row["tests"]) & set(row["hidden_tests"])
    for rows in (split.select, split.report):
        assert all(row["tests"] == row["hidden_tests"] for row in rows)


def test_a_seed_draws_other_tasks(split) -> None:
    assert set(programs_split(seed=4).train["prompt"]) != set(split.train["prompt"])
    assert programs_split(seed=3).train.to_list() == split.train.to_list()
    assert len(programs_split(smoke=True).report) == 8
