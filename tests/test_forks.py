"""Functions are called in the processes that are forked within their context, and in no others."""

import os
from functools import partial
from pathlib import Path

from processes import call

from trl_selfplay.forks import in_forks


def fork_twice() -> None:
    """Fork a process that forks another one."""
    child = os.fork()
    if child == 0:
        if grandchild := os.fork():
            os.waitpid(grandchild, 0)
        os._exit(0)
    os.waitpid(child, 0)


def fork_everywhere(path: str) -> None:
    def note(words: str) -> None:
        with Path(path).open("a") as file:
            print(words, file=file)

    with in_forks(partial(note, "outer")):
        with in_forks(partial(note, "inner")):
            fork_twice()
        note("inner has ended")
        fork_twice()
    note("outer has ended")
    fork_twice()


def test_a_fork_calls_the_functions_of_the_contexts_it_begins_in_the_innermost_first(
    tmp_path,
) -> None:
    assert call(fork_everywhere, str(tmp_path / "calls")) == 0
    called = (tmp_path / "calls").read_text().splitlines()
    assert called == ["inner", "outer", "inner has ended", "outer", "outer has ended"]
