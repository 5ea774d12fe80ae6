"""Ends of a process that others work with: `main(case, folder)`, in processes of a group."""

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path
from threading import Event

from accelerate import Accelerator

from trl_selfplay import peers
from trl_selfplay.peers import check_peers, from_main, together, wait_for_all
from trl_selfplay.rollouts.hand_out import take_shards


def kill(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_with_a_child(folder: Path) -> None:
    """Leave a process behind that has copies of all open files."""
    if child := os.fork():
        (folder / "child").write_text(str(child))
        kill(folder)
    signal.pause()


def fail(folder: Path) -> None:
    raise ValueError("row 7 has\nno solution")


def wait(accelerator: Accelerator) -> None:
    wait_for_all(accelerator)


def meet(accelerator: Accelerator) -> None:
    accelerator.wait_for_everyone()


def work(accelerator: Accelerator) -> None:
    while True:
        check_peers()
        Event().wait(0.01)


def hang(accelerator: Accelerator) -> None:
    peers._GRACE_S = 0.5
    Event().wait()


ENDS: dict[str, Callable[[Path], None]] = {
    f.__name__: f for f in (kill, kill_with_a_child, fail)
}  # fmt: skip
DOES: dict[str, Callable[[Accelerator], None]] = {f.__name__: f for f in (wait, meet, work, hang)}


def end(how: str, meanwhile: str, folder: str, rank: int) -> None:
    """End the process of a rank, while the others do something."""
    peers._NEWS_S = 120.0  # however late a busy machine lets the thread run that hears of an end
    accelerator = Accelerator(cpu=True)
    with together(accelerator):
        wait_for_all(accelerator)
        if accelerator.process_index == rank:
            ENDS[how](Path(folder))
        DOES[meanwhile](accelerator)


def leave_with_a_child(folder: str) -> None:
    """End the work together while a process that this one forked has copies of all open files."""
    accelerator = Accelerator(cpu=True)
    with together(accelerator):
        child = ctypes.PyDLL(None).fork()  # Python's own would call the functions for forks
        if child == 0:
            ctypes.PyDLL(None).pause()
        (Path(folder) / f"child-{accelerator.process_index}").write_text(str(child))


def go_on(folder: str) -> None:
    """Fail in all processes at once, then work together again; leave at different times."""
    accelerator = Accelerator(cpu=True)
    for _ in range(3):
        try:
            with together(accelerator):
                wait_for_all(accelerator)
                fail(Path(folder))
        except (ValueError, peers.PeerError):  # whichever comes first
            pass
        with together(accelerator):
            taken = list(take_shards(50, peers.shared_counter()))
            assert from_main(accelerator, {"rank": accelerator.process_index}) == {"rank": 0}
    (Path(folder) / f"{accelerator.process_index}.txt").write_text(" ".join(map(str, taken)))
