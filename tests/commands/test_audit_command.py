"""`trl-selfplay audit`: which function it tries, on which rows, and its exit code."""

import json
import sys

import pytest

from trl_selfplay.commands.dispatch import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "audited_rewards.py").write_text(
        "def contains(completions, solution, **kwargs):\n"
        "    return [float(s in c) for c, s in zip(completions, solution)]\n"
        "def last_word(completions, solution, **kwargs):\n"
        "    return [float(c == f'Answer: {s}') for c, s in zip(completions, solution)]\n"
    )
    (tmp_path / "own_package").mkdir()
    for module in ("my_reward.py", "own_package/my_reward.py"):
        (tmp_path / module).write_text(
            "def score(completions, **kwargs):\n    return [0.0] * len(completions)\n"
        )
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"question": f"{a} + 1 = ?", "gold": str(a + 1)} for a in range(5)]
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("audited_rewards", "my_reward", "own_package", "own_package.my_reward"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["audited_rewards:contains", "audited_rewards.contains"])
def test_a_function_that_is_fooled_ends_with_1(folder, name, capsys) -> None:
    assert main(["audit", name, "--in_process"]) == 1
    said = capsys.readouterr().out
    assert said.startswith("contains: ")
    assert "1.0 for 'The answer is not 7', solution '7'" in said


def test_rows_of_a_dataset_are_used_and_nothing_found_ends_with_0(folder, capsys) -> None:
    flags = ["--dataset_name", "./data", "--prompt_column", "question", "--solution_column", "gold"]
    assert main(["audit", "audited_rewards:last_word", "--in_process", *flags]) == 0
    assert capsys.readouterr().out.startswith("last_word: passed")


@pytest.mark.parametrize("name", ["my_reward:score", "own_package.my_reward:score"])
def test_a_module_may_be_named_like_a_reward(folder, name, capsys) -> None:
    assert main(["audit", name, "--in_process"]) == 1
    assert capsys.readouterr().out.startswith("score: ")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["no_such"], "no reward function 'no_such'"),
        (["audited_rewards:absent"], "has no function 'absent'"),
        (["my_reward:absent"], "has no function 'absent'"),
        (
            ["checker_reward:absent"],
            "'absent' is no import path",
        ),  # what makes a reward function, and its argument
        (["a/reward-model"], "is a reward model"),
        (["exact_reward", "--dataset_name", "./nowhere"], "there is nothing at"),
    ],
)
def test_wrong_flags_end_with_2(folder, flags, said, capsys) -> None:
    assert main(["audit", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_missing_column_is_one_message_that_names_the_flag(folder, capsys) -> None:
    flags = ["--dataset_name", "data/train.jsonl", "--prompt_column", "question"]
    assert main(["audit", "audited_rewards:contains", *flags]) == 2
    said = capsys.readouterr().err
    assert "has no column 'solution'; its columns are ['question', 'gold']" in said
    assert "Name the column with --solution_column." in said
    assert main(["audit", "audited_rewards:contains", *flags, "--solution_column", "glod"]) == 2
    assert "--solution_column glod: the dataset has no such column" in capsys.readouterr().err
