"""Processes that can be killed: what is left of them, and what can't confuse them."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress

import psutil
import pytest
from holdings import held
from patience import ENDS_S, under_growing_deadlines

from trl_selfplay.rewards.worker import WorkerFailure, WorkerPool, close_workers


# What the processes run, imported there by this module's name.
def double(number):
    return 2 * number


def own_pid(number):
    return os.getpid()


def meet(port, number):
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.recv(1)
    return number


def answer_in_pairs(server, pairs, others) -> None:
    for _ in range(pairs):
        (first, _), (second, _) = server.accept(), server.accept()
        first.close()
        second.close()
    for _ in range(others):  # one process may hold all calls that are left
        server.accept()[0].close()


def misbehave(how, *_):
    print("not an answer", flush=True)  # noqa: T201
    if how == "raise":
        raise ValueError("no")
    if how == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    if how == "exit":
        os._exit(0)
    if how == "set":
        return {1}
    if how == "start a process":
        return subprocess.Popen(["sleep", "600"]).pid
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
        ("raise", "it raised ValueError: no"),
        ("hang", "no answer within the deadline"),
        ("exit", "the process died"),
        ("eat memory", "MemoryError"),
    ],
)
def test_a_call_that_fails_leaves_the_pool_alive(pool, how, message) -> None:
    """VF-3: and what the function prints is no answer."""
    with pytest.raises(WorkerFailure, match=message):
        pool.call(how, deadline_s=1.0 if how == "hang" else ENDS_S)
    assert pool.call("fine", deadline_s=ENDS_S) == "fine"


def test_a_failed_call_has_its_cause_and_the_others_have_values(pool) -> None:
    calls = [("a",), ("raise",), ("b",), ("exit",), ("raise",), ("set",)]
    values, failures = pool.call_each(calls, deadline_s=ENDS_S)
    assert values == ["a", None, "b", None, None, None]
    assert {index: failure.cause for index, failure in failures.items()} == {
        1: "it raised ValueError",
        3: "the process died",
        4: "it raised ValueError",
        5: "it raised TypeError",  # sets aren't JSON
    }


@pytest.mark.parametrize("workers", [1, 3])
def test_values_depend_neither_on_the_order_of_calls_nor_on_the_number_of_processes(
    workers,
) -> None:
    """VF-5, with calls that fail among them, and more late ones than are waited for."""
    numbers = list(range(40))
    calls = [
        ("raise",),
        ("exit",),
        *(("hang", n) for n in range(6)),
        *((f"a{n}",) for n in numbers),
    ]
    groups = ["p" if n % 2 else "q" for n in range(len(calls))]
    groups[2:8] = ["q"] * 6
    rows = list(zip(calls, groups, strict=True))
    random.Random(workers).shuffle(rows)
    pool = WorkerPool(__name__, "misbehave", workers=workers)
    late = "no answer within the deadline"

    def call_each(deadline_s):
        found, failures = pool.call_each(calls_in_order, deadline_s, [row[1] for row in rows])
        return found, {rows[index][0]: failure.cause for index, failure in failures.items()}

    calls_in_order = [row[0] for row in rows]
    values, causes = under_growing_deadlines(
        call_each,
        lambda found: all(c != late or call[0] == "hang" for call, c in found[1].items()),
        first_s=0.4,
    )
    pool.close()
    assert causes == {
        ("raise",): "it raised ValueError",
        ("exit",): "the process died",
        **{("hang", n): late for n in range(4)},
        **{("hang", n): "not tried after 4 of the same prompt without an answer" for n in (4, 5)},
    }
    for (arguments, _), value in zip(rows, values, strict=True):
        assert value == (None if arguments in causes else arguments[0])


def test_several_processes_work_at_the_same_time() -> None:
    """Each of the first calls waits until another one is at work as well."""
    pool = WorkerPool(__name__, "meet", workers=2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        meeting = threading.Thread(target=answer_in_pairs, args=(server, 3, 6))
        meeting.start()
        port = server.getsockname()[1]
        values, failures = pool.call_each([(port, n) for n in range(12)], ENDS_S)
        meeting.join()
    assert (values, failures) == (list(range(12)), {})
    assert len(workers()) == 2
    pool.close()


def test_threads_share_the_bound_on_processes() -> None:
    before = len(workers())
    pool = WorkerPool(__name__, "double", workers=2)
    threads = [
        threading.Thread(target=pool.call_each, args=([(n,) for n in range(100)], ENDS_S))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # One thread may have both; each of the others has one in any case.
    assert len(workers()) - before <= 4
    pool.close()


def test_a_process_is_replaced_after_its_calls() -> None:
    pool = WorkerPool(__name__, "own_pid", workers=1, calls_per_worker=3)
    pids, failures = pool.call_each([(n,) for n in range(8)], deadline_s=ENDS_S)
    assert failures == {}
    assert sorted(Counter(pids).values()) == [2, 3, 3]
    assert len(workers()) == 1
    pool.close()


def test_what_a_call_started_ends_with_its_process(pool) -> None:
    pid = int(pool.call("start a process", deadline_s=ENDS_S))
    assert psutil.pid_exists(pid)
    with pytest.raises(WorkerFailure, match="deadline"):
        pool.call("hang", deadline_s=0.5)
    assert wait_for_end(pid)


def test_the_function_cannot_read_requests(pool) -> None:
    assert pool.call("read", deadline_s=ENDS_S) == ""


def test_a_stopped_process_does_not_block_a_long_request(pool) -> None:
    """VF-4: writing is under the deadline, too."""
    pool.call("fine", deadline_s=ENDS_S)
    (worker,) = workers()
    worker.suspend()
    with pytest.raises(WorkerFailure, match="deadline"):
        pool.call("x" * 10_000_000, deadline_s=0.5)
    assert not psutil.pid_exists(worker.pid)


def test_a_process_that_was_killed_is_replaced(pool) -> None:
    """VF-3."""
    pool.call("fine", deadline_s=ENDS_S)
    (worker,) = workers()
    worker.kill()
    worker.wait()
    assert pool.call("fine", deadline_s=ENDS_S) == "fine"


def test_after_closing_nothing_is_left(pool) -> None:
    """VF-7: no process, no thread, no open file."""
    before = held()
    pool.call("fine", deadline_s=ENDS_S)
    assert len(workers()) == 1
    close_workers()
    assert workers() == []
    assert held() <= before


def test_a_forked_process_does_not_use_its_parent_s_pipes() -> None:
    pool = WorkerPool(__name__, "double")
    assert pool.call(1, deadline_s=ENDS_S) == 2
    (worker,) = workers()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(pool.call(2, deadline_s=ENDS_S) != 4)
            pool.close()
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert workers() == [worker]
    assert pool.call(3, deadline_s=ENDS_S) == 6
    pool.close()


def python(code):
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def wait_for_end(pid) -> bool:
    """Say whether a process ends."""
    ends = time.monotonic() + ENDS_S
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while (
            process.status() != psutil.STATUS_ZOMBIE
        ):  # as where its parent is gone, and nobody reaps it
            if time.monotonic() >= ends:
                return False
            time.sleep(0.05)
    return True


START = (
    "import psutil, os, threading, time; from trl_selfplay.rewards.worker import WorkerPool; "
    "pool = WorkerPool('test_worker', 'misbehave'); pool.call('fine', deadline_s=60.0); "
    "print(psutil.Process().children()[0].pid, flush=True); "
)


def test_a_program_that_ends_leaves_no_process() -> None:
    """VF-7."""
    with python(START) as parent:
        pid = int(parent.stdout.readline())
        assert parent.wait(timeout=ENDS_S) == 0
    assert wait_for_end(pid)


@pytest.mark.parametrize("work", ["pass", "pool.call('hang', deadline_s=1.0)"])
def test_a_process_ends_after_its_parent_is_killed(work) -> None:
    """VF-7: idle, and at work on something that never ends."""
    code = (
        START + f"threading.Timer(0.5, os.kill, (os.getpid(), 9)).start(); {work}; time.sleep(600)"
    )
    with python(code) as parent:
        pid = int(parent.stdout.readline())
        assert parent.wait(timeout=ENDS_S) == -signal.SIGKILL
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


def test_settings_reach_the_processes_before_their_first_call(tmp_path, monkeypatch) -> None:
    (tmp_path / "prepared.py").write_text(
        "made = []\n"
        "def prepare(factor):\n"
        "    if factor < 0:\n"
        "        raise RuntimeError(f'no factor {factor}')\n"
        "    made.append(factor)\n"
        "def times(number):\n"
        "    return made[0] * number\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    pool = WorkerPool("prepared", "times", settings={"factor": 3})
    assert pool.call(4, deadline_s=ENDS_S) == 12
    pool.close()
    with pytest.raises(RuntimeError, match=r"^no factor -1$"):
        WorkerPool("prepared", "times", settings={"factor": -1}).call(4, deadline_s=ENDS_S)
