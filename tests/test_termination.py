"""SIGTERM ends what runs within the context, and nothing else."""

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import call

from trl_selfplay import termination
from trl_selfplay.termination import EXIT_CODE, Terminated, ends_at_sigterm


def interrupt_twice() -> None:
    with ends_at_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # what cleans up isn't interrupted


def test_sigterm_is_raised_once_and_has_its_own_action_again_afterwards() -> None:
    with pytest.raises(Terminated) as raised:
        interrupt_twice()
    assert raised.value.code == EXIT_CODE == 143
    assert isinstance(raised.value, SystemExit)
    assert isinstance(raised.value, KeyboardInterrupt)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
    assert not [thread for thread in threading.enumerate() if thread.name == "sigterm"]


def test_a_handler_that_is_there_stays() -> None:
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with ends_at_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]


def test_another_thread_has_no_say_in_signals() -> None:
    handlers = []

    def run() -> None:
        with ends_at_sigterm():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [signal.SIG_DFL]


def end_uncaught() -> None:
    with ends_at_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)


def end_within_foreign_code() -> None:
    """Lock a lock twice, in C: the handler never gets to run."""
    termination._PATIENCE_S = 0.0
    with ends_at_sigterm():
        lock, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        library.pthread_mutex_lock(lock)
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGTERM)).start()
        library.pthread_mutex_lock(lock)


def end_where_all_is_caught() -> None:
    termination._PATIENCE_S = 0.0
    with ends_at_sigterm():
        while True:
            try:
                signal.raise_signal(signal.SIGTERM)
            except BaseException:
                continue


@pytest.mark.parametrize(
    "function", [end_uncaught, end_within_foreign_code, end_where_all_is_caught]
)
def test_a_process_ends_with_the_code_of_sigterm(function) -> None:
    assert call(function) == EXIT_CODE


def let_a_fork_end() -> None:
    with ends_at_sigterm():
        child = os.fork()
        if child == 0:  # which must not wake the watcher of its parent
            if signal.set_wakeup_fd(-1) == -1:
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_a_fork_ends_as_before_and_its_parent_goes_on() -> None:
    assert call(let_a_fork_end) == 0


def fork_in_foreign_code() -> int:
    return ctypes.PyDLL(None).fork()


def leave_a_fork_behind(fork: Callable[[], int], stopped: bool) -> None:
    termination._PATIENCE_S = 600.0
    child = 0
    try:
        with ends_at_sigterm():
            child = fork()
            if child == 0:
                ctypes.PyDLL(None).pause()
            if stopped:
                os.kill(os.getpid(), signal.SIGTERM)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("fork", [os.fork, fork_in_foreign_code])
@pytest.mark.parametrize(("stopped", "code"), [(False, 0), (True, EXIT_CODE)])
def test_a_fork_that_lives_on_keeps_its_parent_from_nothing(fork, stopped, code) -> None:
    assert call(leave_a_fork_behind, fork, stopped) == code


def let_a_fork_leave() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with ends_at_sigterm():
        child = os.fork()
        if child == 0:
            assert len(list(Path("/proc/self/fd").iterdir())) == before
        else:
            assert os.waitpid(child, 0)[1] == 0
            assert [thread.name for thread in threading.enumerate()].count("sigterm") == 1
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the list of open files")
def test_a_fork_has_no_open_file_of_the_context_and_may_leave_it() -> None:
    assert call(let_a_fork_leave) == 0
