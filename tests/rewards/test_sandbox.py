"""Programs in isolated processes: what they give back, how they end, and what is left of them."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from holdings import held
from patience import ENDS_S

from trl_selfplay.rewards.literals import LiteralError
from trl_selfplay.rewards.sandbox import Called, Limits, ProgramEnded, Raised, Ran, Sandbox


@pytest.fixture(autouse=True)
def _patience_with_zygotes(monkeypatch):
    """A zygote that is slow to say how a program ended isn't ended with it."""
    monkeypatch.setattr("trl_selfplay.rewards.sandbox._GRACE_S", ENDS_S)


@pytest.fixture(scope="module")
def sandbox():
    made = Sandbox(Limits(output_bytes=2**16), workers=2)
    yield made
    made.close()


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def test_a_program_reads_its_input_and_prints(sandbox) -> None:
    source = "import sys\nif __name__ == '__main__':\n    print(sum(map(int, sys.stdin)))"
    assert sandbox.run(source, "1\n2\n39\n", deadline_s=ENDS_S) == Ran("42\n", "ok")


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
        ("import time; time.sleep(600)", "late"),
        ("while True: print('x' * 1000)", "too much output"),
    ],
)
def test_the_ending_of_a_program_is_known(sandbox, source, ending) -> None:
    deadline_s = 0.7 if ending == "late" else ENDS_S
    assert sandbox.run(source, deadline_s=deadline_s).ending == ending


def test_functions_are_called_and_arguments_come_back(sandbox) -> None:
    source = "def add(row, item, *, twice=False):\n    row.append(item)\n    return len(row) / item"
    with sandbox.session(source, deadline_s=ENDS_S) as session:
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
    with sandbox.session(source, deadline_s=ENDS_S) as session:
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
    endings = []
    deadline_s = 0.7 if ending == "late" else ENDS_S
    try:
        with sandbox.session(f"def f():\n    {body}", deadline_s=deadline_s) as session:
            session.call("f")
    except ProgramEnded as error:
        endings.append(error.ending)
    assert endings == ([] if ending is None else [ending])
    assert sandbox.run("print(1)", deadline_s=ENDS_S) == Ran("1\n", "ok")


def test_a_program_that_cannot_be_loaded_has_no_session(sandbox) -> None:
    with (
        pytest.raises(ProgramEnded, match="NameError"),
        sandbox.session("f(1)", deadline_s=ENDS_S),
    ):
        pass


def test_after_closing_nothing_is_left() -> None:
    """VF-7: no process, no thread, no open file."""
    before, others = held(), children()
    made = Sandbox(workers=1)
    made.run("print(1)", deadline_s=ENDS_S)
    (monitor,) = children() - others
    started = monitor.children(recursive=True)
    made.close()
    assert held() <= before
    assert psutil.wait_procs(started, timeout=ENDS_S)[1] == []


def test_a_session_that_has_ended_stays_so(sandbox) -> None:
    with sandbox.session("import os\ndef f(): os._exit(0)", deadline_s=ENDS_S) as session:
        for _ in range(2):
            with pytest.raises(ProgramEnded, match="killed"):
                session.call("f")


def test_arguments_that_cannot_be_sent_are_refused(sandbox) -> None:
    with sandbox.session("def f(x): return x", deadline_s=ENDS_S) as session:
        with pytest.raises(LiteralError, match="object"):
            session.call("f", [object()])
        assert session.call("f", [1]) == Called(1)


def test_threads_share_the_processes(sandbox) -> None:
    """VF-5: more threads than processes; each gets its own answer."""
    with ThreadPoolExecutor(6) as threads:
        rans = threads.map(
            lambda n: sandbox.run(f"print(input(), {n})", str(n), deadline_s=ENDS_S), range(30)
        )
    assert [ran.stdout for ran in rans] == [f"{n} {n}\n" for n in range(30)]


def test_every_program_hashes_text_alike(sandbox) -> None:
    """VF-5: the order of a set doesn't depend on the process."""
    source = "print({str(n) for n in range(100)})"
    other = Sandbox(workers=1)
    assert sandbox.run(source, deadline_s=ENDS_S) == other.run(source, deadline_s=ENDS_S)
    other.close()


def test_an_interpreter_is_replaced_after_many_programs(monkeypatch) -> None:
    monkeypatch.setattr("trl_selfplay.rewards.sandbox._MOST_PROGRAMS", 2)
    before = children()
    sandbox = Sandbox(workers=1)  # its trial program is the first
    first = children() - before
    assert len(first) == 1
    for n in range(4):
        assert sandbox.run(f"print({n})", deadline_s=ENDS_S) == Ran(f"{n}\n", "ok")
    assert first.isdisjoint(children())
    sandbox.close()
    assert children() <= before


def test_an_interpreter_that_was_killed_is_replaced() -> None:
    """VF-3."""
    before = children()
    sandbox = Sandbox(workers=1)
    (monitor,) = children() - before
    for process in monitor.children():
        process.kill()
    assert sandbox.run("print(1)", deadline_s=ENDS_S) == Ran("1\n", "ok")
    sandbox.close()


def test_an_interrupted_program_answers_no_later_call() -> None:
    """As after Ctrl-C in a notebook."""

    def interrupt(*_):
        raise KeyboardInterrupt

    def run_interrupted():
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        sandbox.run("import time; print('late'); time.sleep(600)", deadline_s=600.0)

    sandbox = Sandbox(workers=1)
    former = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_interrupted()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    assert sandbox.run("print(1)", deadline_s=ENDS_S) == Ran("1\n", "ok")
    sandbox.close()


def test_a_forked_process_starts_interpreters_of_its_own(sandbox) -> None:
    assert sandbox.run("print(1)", deadline_s=ENDS_S).stdout == "1\n"
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(sandbox.run("print(2)", deadline_s=ENDS_S) != Ran("2\n", "ok"))
            sandbox.close()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert sandbox.run("print(3)", deadline_s=ENDS_S) == Ran("3\n", "ok")


@pytest.mark.parametrize("deadline_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_deadline_that_is_none_is_refused(sandbox, deadline_s) -> None:
    with pytest.raises(ValueError, match="deadline_s"):
        sandbox.run("", deadline_s=deadline_s)


def test_the_smallest_limits_are_enough_for_the_interpreter() -> None:
    limits = Limits(
        memory_bytes=64 * 2**20 + 1, open_files=9, processes=1, file_bytes=1, output_bytes=2
    )
    sandbox = Sandbox(limits, workers=1)
    assert sandbox.run("print(1)", deadline_s=ENDS_S) == Ran("1\n", "ok")
    sandbox.close()


def test_limits_of_the_grader_itself_stay() -> None:
    script = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from trl_selfplay.rewards.sandbox import Sandbox
sandbox = Sandbox(workers=1)
print(sandbox.run("import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE))", deadline_s=60.0))
sandbox.close()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    assert done.stdout.decode().strip() == str(Ran("(40, 40)\n", "ok"))
