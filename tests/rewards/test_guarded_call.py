"""What a reward function does to its process, or to its arguments, ends with the call."""

import asyncio
import locale
import logging
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from trl_selfplay.rewards.guarded_call import own_copy
from trl_selfplay.rewards.scoring import Scorer


class Own(BaseException):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def score(function, prompts=("p",)):
    completions = ["c"] * len(prompts)
    return Scorer(function).score(list(prompts), completions, [[1]] * len(prompts), {})


@pytest.mark.parametrize(
    "error", [Own(), GeneratorExit(), asyncio.CancelledError(), SystemExit(0), MemoryError()]
)
@pytest.mark.parametrize("is_async", [False, True])
def test_whatever_a_function_raises_is_told_with_its_name(error, is_async) -> None:
    def plain(completions, **kwargs):
        raise error

    async def later(completions, **kwargs):
        raise error

    function = later if is_async else plain
    with pytest.raises(
        RuntimeError, match=rf"'{function.__name__}' raised {type(error).__name__}: .* are on disk"
    ) as raised:
        score(function)
    assert raised.value.__cause__ is error


def test_a_wrong_answer_is_told_with_what_is_kept() -> None:
    with pytest.raises(
        ValueError, match=r"returned 2 scores for 1 .* The samples are on disk; fix"
    ):
        score(lambda completions, **kwargs: [1.0, 1.0])
    with pytest.raises(TypeError, match=r"returned 'a' for .* The samples are on disk; fix"):
        score(lambda completions, **kwargs: ["a"])


def test_functions_that_change_their_arguments_change_neither_rows_nor_each_other() -> None:
    prompt, column = [{"role": "user", "content": "p"}], [{"inner": [1]}]
    seen = []

    def changes(prompts, completions, completion_ids, facts, **kwargs):
        seen.append(
            (own_copy(prompts), list(completions), own_copy(facts), own_copy(completion_ids))
        )
        prompts[0].append({"role": "assistant"})
        prompts[1][0]["content"] = "other"
        completions.clear()
        completion_ids[0].append(9)
        facts[0]["inner"].append(2)
        return [1.0, 1.0]

    given = ([prompt, prompt], ["a", "b"], [[1], [2]])
    Scorer([changes, changes]).score(*given, {"facts": [column[0], column[0]]})
    assert seen[0] == seen[1] == ([prompt, prompt], ["a", "b"], [column[0]] * 2, [[1], [2]])
    assert prompt == [{"role": "user", "content": "p"}]
    assert column == [{"inner": [1]}]
    assert given[2] == [[1], [2]]


def _alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 60.0)


CHANGES = {
    "the working directory": (lambda: os.chdir("/"), Path.cwd),
    "the locale": (lambda: locale.setlocale(locale.LC_ALL, "C"), lambda: locale.setlocale(0)),
    "sys.stdout": (lambda: setattr(sys, "stdout", None), lambda: sys.stdout),
    "the mask of new files": (
        lambda: os.umask(0o777), lambda: f"{(mask := os.umask(0))}{os.umask(mask)}",
    ),
    "torch's number of threads": (
        lambda: torch.set_num_threads(torch.get_num_threads() + 1), torch.get_num_threads,
    ),
    "logging.disable": (logging.disable, lambda: logging.root.manager.disable),
    "torch's default dtype": (
        lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype,
    ),
    "torch's gradient mode": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "the handler of SIGINT": (
        lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        lambda: signal.getsignal(signal.SIGINT),
    ),
    "the timer of signal.setitimer": (_alarm, lambda: signal.getitimer(signal.ITIMER_REAL)[0]),
}  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such timer")
@pytest.mark.parametrize("name", CHANGES)
def test_what_a_function_changes_of_the_process_is_put_back_and_said_once(name, caplog) -> None:
    change, read = CHANGES[name]
    if name == "the locale":
        locale.setlocale(locale.LC_ALL, "C.UTF-8")
    before = read()

    def function(completions, **kwargs):
        change()
        return [1.0] * len(completions)

    scorer = Scorer(function)
    for _ in range(2):
        scorer.score(["p"], ["c"], [[1]], {})
        assert read() == before
    (record,) = caplog.records
    assert record.getMessage().startswith(f"reward function function changed {name}, which")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_a_function_closes_is_opened_again(name, capfd, caplog, monkeypatch) -> None:
    number = {"stdout": 1, "stderr": 2}[name]
    with open(number, "w", closefd=False) as stream:
        monkeypatch.setattr(sys, name, stream)

        def function(completions, **kwargs):
            getattr(sys, name).close()
            return [1.0]

        assert score(function) == [[1.0]]
        with getattr(sys, name) as opened:
            print("here", file=opened)
    assert getattr(capfd.readouterr(), name[3:]) == "here\n"
    assert f"function function changed sys.{name}, which" in caplog.text


def test_a_working_directory_that_is_gone_is_left(tmp_path, monkeypatch) -> None:
    def function(completions, **kwargs):
        gone = tmp_path / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()
        return [1.0]

    monkeypatch.chdir(tmp_path)
    assert score(function) == [[1.0]]
    assert Path.cwd() == tmp_path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows can't fork")
def test_a_process_that_a_function_forks_doesnt_go_on_with_the_run(capfd) -> None:
    children = []

    def forks(completions, **kwargs):
        children.append(os.fork())
        return [1.0]

    assert score(forks) == [[1.0]]
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1
    assert "reward function 'forks' forked this process" in capfd.readouterr().err
