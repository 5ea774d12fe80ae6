"""Tools that do what tools shouldn't, in a module that a process imports quickly."""

import asyncio
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Optional

WITHOUT_ARGUMENTS: list[Callable[[], Any]] = []


def without_arguments(function):
    function.__doc__ = f"Do {function.__name__}."
    WITHOUT_ARGUMENTS.append(function)
    return function


class Unprintable:
    def __str__(self):
        raise LookupError("no text")


class UnprintableError(Exception):
    def __str__(self):
        raise LookupError("no text")


@without_arguments
def raise_unprintable():
    raise UnprintableError


@without_arguments
def interrupt():
    raise KeyboardInterrupt


@without_arguments
def exit_python():
    sys.exit("bye")


@without_arguments
def exit_process():
    os._exit(0)


@without_arguments
def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


@without_arguments
def recurse():
    return recurse()


@without_arguments
def use_all_memory():
    return "x" * 2**40


@without_arguments
def return_nothing():
    return None


@without_arguments
def return_blanks():
    return " \n"


@without_arguments
def return_dict():
    return {"a": [1, None]}


@without_arguments
def return_bytes():
    return b"\xff"


@without_arguments
def return_unprintable():
    return Unprintable()


@without_arguments
def return_object():
    return object()


@without_arguments
def generate():
    yield "a"


async def yield_later():
    """Yield a result."""
    yield "a"


class YieldsLater:
    async def __call__(self):
        """Yield a result."""
        yield "a"


@without_arguments
async def answer_later():
    await asyncio.sleep(0)
    return "later"


@without_arguments
def return_much():
    return "é" * 10_000_000


@without_arguments
def return_tensor():
    import torch

    return torch.tensor([1, 2])


@without_arguments
def return_surrogate():
    return "a\ud800b"


@without_arguments
def return_parts():
    return [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@without_arguments
def return_image():
    return [{"type": "image", "image": object()}]


@without_arguments
def print_much():
    sys.stdout.write("x" * 10_000_000)
    sys.stderr.write("y")
    os.write(1, b'{"content": "forged"}\n')
    return "printed"


@without_arguments
def read_input():
    return input()


@without_arguments
def close_streams():
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()
    os.closerange(0, 3)
    return "closed"


@without_arguments
def close_all_files():
    os.closerange(0, 1000)
    return "closed"


@without_arguments
def write_into_all_files():
    for descriptor in range(3, 30):
        try:
            os.write(descriptor, b'{"content"\n')
        except OSError:
            continue
    return "written"


@without_arguments
def fork():
    return "parent" if os.fork() else "child"


@without_arguments
def leave_processes():
    subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return "left"


@without_arguments
def start_threads():
    for _ in range(3):
        threading.Thread(target=time.sleep, args=(1000,)).start()
    return "started"


@without_arguments
def change_settings():
    os.chdir("/")
    os.environ["MARK"] = "changed"
    sys.setrecursionlimit(200)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return "changed"


@without_arguments
def change_mask():
    return f"{os.umask(0o67):o}"


@without_arguments
def ignore_signal():
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    return "ignored"


@without_arguments
def show_settings():
    mask = os.umask(0)
    os.umask(mask)
    return (
        f"{mask} {signal.getsignal(signal.SIGUSR1)} "
        f"{Path.cwd() == Path('/')} {os.environ.get('MARK')} {sys.getrecursionlimit()} {sys.stdout.closed}"
    )


@without_arguments
def hang():
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.pause()


@without_arguments
def draw_from_numpy():
    import numpy

    return numpy.random.rand()


@without_arguments
def draw_from_torch():
    import torch

    return torch.rand(1)


@without_arguments
def show_process():
    return str(os.getpid())


def typed(
    number: int,
    text: str = "t",
    either: Literal["x", "y"] = "x",
    numbers: list[int] = [],  # noqa: B006
    table: dict[str, float] = {},  # noqa: B006
    perhaps: Optional[str] = None,  # noqa: UP045
) -> str:
    """Show its arguments.

    Args:
        number: A number.
        text: A text.
        either: One of two.
        numbers: Numbers.
        table: Numbers by name.
        perhaps: A text or nothing.
    """
    return repr((number, text, either, numbers, table, perhaps))


class Shelf:
    def __init__(self, books: list[str]) -> None:
        self.books = books

    def find(self, letter: str) -> str:
        """Find books.

        Args:
            letter: With which they begin.
        """
        return ", ".join(book for book in self.books if book.startswith(letter))

    def __call__(self, index: int) -> str:
        """Return a book.

        Args:
            index: Its place.
        """
        return self.books[index]


shelf = Shelf(["Emma", "Evelina", "Dracula"])
seven = functools.partial(typed, 7, table={"a": 1.5})
