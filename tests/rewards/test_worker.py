"""Processes that can be killed: what is left of them, and what can't confuse them."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from trl_selfplay.rewards.worker import WorkerFailure, WorkerPool, close_workers


# What the processes run, imported there by this module's name.
def double(number):
    return 2 * number


def misbehave(how):
    print("not an answer", flush=True)  # noqa: T201
    if how == "raise":
        raise ValueError("no")
    if how == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if how == "exit":
        os._exit(0)
    if how == "read":
        return sys.stdin.read()
    if how == "eat memory":
        return len(bytearray(64 * 2**30))
    return how


@pytest.fixture(autouse=True)
def _no_worker_before():
    close_workers()


@pytest.fixture
def pool():
    made = WorkerPool(__name__, "misbehave")
    yield made
    made.close()


def workers(process=None):
    children = (process or psutil.Process()).children()
    return [c for c in children if any("rewards.worker" in part for part in c.cmdline())]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "ValueError: no"),
        ("hang", "no answer within the deadline"),
        ("exit", "the process died"),
        ("eat memory", "MemoryError"),
    ],
)
def test_a_call_that_fails_leaves_the_pool_alive(pool, how, message) -> None:
    """VF-3: and what the function prints is no answer."""
    with pytest.raises(WorkerFailure, match=message):
        pool.call(how, deadline_s=3.0)
    assert pool.call("fine", deadline_s=10.0) == "fine"


def test_a_failed_call_is_counted_and_the_others_have_values(pool) -> None:
    calls = [("a",), ("raise",), ("b",), ("exit",), ("raise",)]
    values, reasons = pool.call_each(calls, deadline_s=10.0)
    assert values == ["a", None, "b", None, None]
    assert reasons == {"ValueError: no": 2, "the process died": 1}


def test_the_function_cannot_read_requests(pool) -> None:
    assert pool.call("read", deadline_s=10.0) == ""


def test_a_stopped_process_does_not_block_a_long_request(pool) -> None:
    """VF-4: writing is under the deadline, too."""
    pool.call("fine", deadline_s=10.0)
    (worker,) = workers()
    worker.suspend()
    started = time.monotonic()
    with pytest.raises(WorkerFailure, match="deadline"):
        pool.call("x" * 10_000_000, deadline_s=0.5)
    assert time.monotonic() - started < 1.5
    assert not psutil.pid_exists(worker.pid)


def test_a_process_that_was_killed_is_replaced(pool) -> None:
    """VF-3."""
    pool.call("fine", deadline_s=10.0)
    (worker,) = workers()
    worker.kill()
    worker.wait()
    assert pool.call("fine", deadline_s=10.0) == "fine"


def test_after_closing_nothing_is_left(pool) -> None:
    """VF-7: no process, no thread, no open file."""
    this = psutil.Process()
    before = (threading.active_count(), this.num_fds())
    pool.call("fine", deadline_s=10.0)
    assert len(workers()) == 1
    close_workers()
    assert workers() == []
    assert (threading.active_count(), this.num_fds()) == before


def test_a_forked_process_does_not_use_its_parent_s_pipes() -> None:
    pool = WorkerPool(__name__, "double")
    assert pool.call(1, deadline_s=10.0) == 2
    (worker,) = workers()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(pool.call(2, deadline_s=10.0) != 4)
            pool.close()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert workers() == [worker]
    assert pool.call(3, deadline_s=10.0) == 6
    pool.close()


def python(code):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def wait_for_end(pid) -> bool:
    """Say whether a process ended within 15 s."""
    ends = time.monotonic() + 15
    while psutil.pid_exists(pid) and time.monotonic() < ends:
        if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True  # nobody reaps it here: its parent is gone
        time.sleep(0.05)
    return not psutil.pid_exists(pid)


START = (
    "import psutil, os, threading, time; from trl_selfplay.rewards.worker import WorkerPool; "
    "pool = WorkerPool('test_worker', 'misbehave'); pool.call('fine', deadline_s=60.0); "
    "print(psutil.Process().children()[0].pid, flush=True); "
)


def test_a_program_that_ends_leaves_no_process() -> None:
    """VF-7."""
    with python(START) as parent:
        pid = int(parent.stdout.readline())
        assert parent.wait(timeout=60) == 0
    assert wait_for_end(pid)


@pytest.mark.parametrize("work", ["pass", "pool.call('hang', deadline_s=1.0)"])
def test_a_process_ends_after_its_parent_is_killed(work) -> None:
    """VF-7: idle, and at work on something that never ends."""
    code = (
        START + f"threading.Timer(0.5, os.kill, (os.getpid(), 9)).start(); {work}; time.sleep(60)"
    )
    with python(code) as parent:
        pid = int(parent.stdout.readline())
        assert parent.wait(timeout=60) == -signal.SIGKILL
    assert wait_for_end(pid)


def test_a_function_whose_package_is_missing_says_so() -> None:
    pool = WorkerPool("no_such_module", "f")
    with pytest.raises(ImportError, match="no_such_module"):
        pool.call(1, deadline_s=1.0)


def test_a_process_that_cannot_start_is_an_error_and_no_verdict() -> None:
    """A broken set-up must not look like completions without a verdict."""
    pool = WorkerPool(__name__, "no_such_function")
    with pytest.raises(RuntimeError, match="didn't start"):
        pool.call(1, deadline_s=1.0)
