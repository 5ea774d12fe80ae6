"""Programs in isolated processes: what they give back, how they end, and what is left of them."""

import threading
import time

import psutil
import pytest

from trl_selfplay.rewards.sandbox import Called, Limits, ProgramEnded, Raised, Ran, Sandbox


@pytest.fixture(scope="module")
def sandbox():
    made = Sandbox(Limits(output_bytes=2**16), workers=2)
    yield made
    made.close()


def test_a_program_reads_its_input_and_prints(sandbox) -> None:
    source = "import sys\nif __name__ == '__main__':\n    print(sum(map(int, sys.stdin)))"
    assert sandbox.run(source, "1\n2\n39\n", deadline_s=10.0) == Ran("42\n", "ok")


@pytest.mark.parametrize(
    ("source", "ending"),
    [
        ("import sys; sys.exit(0)", "ok"),
        ("import sys; sys.exit('no')", "raised"),
        ("def f(:", "raised"),
        ("1 / 0", "raised"),
        ("bytearray(2**40)", "raised"),
        ("import os; os._exit(3)", "raised"),
        ("import ctypes; ctypes.string_at(0)", "killed"),
        ("while True: pass", "late"),
        ("import time; time.sleep(60)", "late"),
        ("while True: print('x' * 1000)", "too much output"),
    ],
)
def test_the_ending_of_a_program_is_known(sandbox, source, ending) -> None:
    started = time.monotonic()
    assert sandbox.run(source, deadline_s=0.7).ending == ending
    assert time.monotonic() - started < 1.7


def test_functions_are_called_and_arguments_come_back(sandbox) -> None:
    source = "def add(row, item, *, twice=False):\n    row.append(item)\n    return len(row) / item"
    with sandbox.session(source, deadline_s=10.0) as session:
        row = [1, 2]
        assert session.call("add", [row, 3]) == Called(1.0)
        assert session.call("add", [row, 0], {"twice": True}) == Called(
            raised=Raised("ZeroDivisionError", "division by zero")
        )
        assert row == [1, 2, 3, 0]
        assert session.call("other").raised.kind == "AttributeError"


def test_an_exception_is_known_by_its_nearest_built_in_type(sandbox) -> None:
    source = (
        "import json\nclass Low(KeyError): __module__ = 'builtins'\nclass LiteralError(Low): pass\n"
        "def f(): raise LiteralError(1)\ndef g(): json.loads('')\ndef h(): return object()"
    )
    with sandbox.session(source, deadline_s=10.0) as session:
        assert session.call("f").raised == Raised("KeyError", "1")
        assert session.call("g").raised.kind == "ValueError"
        assert session.call("h").raised == Raised("LiteralError", "a value of type object")


@pytest.mark.parametrize(
    ("body", "ending"),
    [
        ("import os; os._exit(0)", "killed"),
        ("raise SystemExit(0)", None),
        ("while True: pass", "late"),
        ("import os; os.kill(1, 9); os.kill(-1, 9); return 1", None),
        ("return 'x' * 2**20", "too much output"),
    ],
)
def test_a_call_ends_within_the_deadline(sandbox, body, ending) -> None:
    with sandbox.session(f"def f():\n    {body}", deadline_s=0.7) as session:
        if ending is None:
            session.call("f")
        else:
            with pytest.raises(ProgramEnded) as caught:
                session.call("f")
            assert caught.value.ending == ending
    assert sandbox.run("print(1)", deadline_s=10.0) == Ran("1\n", "ok")


def test_a_program_that_cannot_be_loaded_has_no_session(sandbox) -> None:
    with (
        pytest.raises(ProgramEnded, match="NameError"),
        sandbox.session("f(1)", deadline_s=5.0),
    ):
        pass


def test_after_closing_nothing_is_left() -> None:
    """VF-7: no process, no thread, no open file."""
    this = psutil.Process()
    before = (threading.active_count(), this.num_fds(), len(this.children(recursive=True)))
    made = Sandbox(workers=1)
    made.run("print(1)", deadline_s=10.0)
    made.close()
    after = (threading.active_count(), this.num_fds(), len(this.children(recursive=True)))
    assert after == before
