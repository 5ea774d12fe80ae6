"""Tools of tests, in a module that a process imports quickly."""

import os
import random
import signal
from pathlib import Path


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return str(a + b)


def fail(text: str) -> str:
    """Fail.

    Args:
        text: Anything.
    """
    raise LookupError(f"no {text}")


def note(file: str, text: str) -> str:
    """Write a line into a file.

    Args:
        file: Its path.
        text: The line.
    """
    with Path(file).open("a") as opened:
        opened.write(f"{text}\n")
    return text


def wait_for(path: str) -> str:
    """Wait for a pipe's other end.

    Args:
        path: Of the pipe.
    """
    return Path(path).read_text()


class Counter:
    """An environment that counts, and gives what it has counted to."""

    def reset(self, start: int = 0, **columns: object) -> str:
        self.count = start
        return f"It stands at {start}."

    def increase(self, by: int) -> str:
        """Count on.

        Args:
            by: How far.
        """
        self.count += by
        return f"{self.count} in {os.getpid()}" if by == 0 else str(self.count)

    def die(self) -> str:
        """End the process."""
        os._exit(3)

    def hold(self, file: str) -> None:
        """Write the number of this process into a file, and wait for ever.

        Args:
            file: Its path.
        """
        Path(file).write_text(str(os.getpid()))
        signal.pause()

    def get_reward(self) -> float:
        return float(self.count)


class Dice:
    """Draws at random, with a target drawn by `reset`."""

    def reset(self, **columns: object) -> None:
        self.target = random.random()

    def throw(self) -> str:
        """Throw it."""
        return f"{self.target} {random.random()}"


class Undescribed:
    def reset(self) -> None:
        pass

    def go(self, where):
        pass


class Holds:
    """An environment whose `reset` says what the row says, or waits for ever."""

    def reset(
        self, says: str | None = None, file: str | None = None, **columns: object
    ) -> str | None:
        if file is not None:
            Path(file).write_text(str(os.getpid()))
            signal.pause()
        return says

    def go(self) -> str:
        """Go."""
        return "on"


class Unmakeable:
    def __init__(self) -> None:
        raise LookupError("no key")

    def reset(self) -> None:
        pass


class ResetsToDict:
    def reset(self) -> dict[str, int]:
        return {"a": 1}


class Adds:
    def reset(self) -> None:
        pass

    def add(self) -> str:
        """Add."""
        return "1"


class Moody:
    """An environment whose `reset` depends on a file."""

    def reset(self, file: str | None, **columns: object) -> str:
        if file is None:
            raise LookupError("no mood")
        with Path(file).open("a+") as opened:
            opened.seek(0)
            was_here = opened.read() != ""
            opened.write("here")
        return "cross" if was_here else "calm"

    def sigh(self) -> str:
        """Sigh."""
        return "oh"

    def get_reward(self) -> None:
        return None
