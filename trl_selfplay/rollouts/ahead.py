"""Make items in a second thread while the caller works on those made before.

In: a generator, such as one that samples. Out: its items in order, in lists of all that have been
made since the last list, at most so many that memory stays bounded.
"""

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from threading import Condition, Event
from typing import TypeVar

Item = TypeVar("Item")


def run_ahead(items: Generator[Item], stop: Event, most: int) -> Generator[list[Item]]:
    """Yield lists of items, in order: all that a second thread has made since the last list.

    What the generator raises is raised here, after the items before it. Closing, or an exception such
    as Ctrl-C, sets `stop`, waits for the item in progress, and closes the generator in its thread.

    Args:
        items: Used only in the second thread.
        stop: The generator checks it, to end early.
        most: Number of items at which the second thread waits until they are taken.
    """
    made: deque[Item] = deque()
    changed = Condition()
    ended = Event()

    def make() -> None:
        try:
            with closing(items):
                for item in items:
                    with changed:
                        changed.wait_for(lambda: len(made) < most or stop.is_set())
                        made.append(item)
                        changed.notify_all()
                    if stop.is_set():
                        break
        finally:
            with changed:
                ended.set()
                changed.notify_all()

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as thread:
        try:
            making = thread.submit(make)
            while True:
                with changed:
                    changed.wait_for(lambda: made or ended.is_set())
                    taken = list(made)
                    made.clear()
                    changed.notify_all()
                if not taken:
                    break
                yield taken
            making.result()
        finally:
            stop.set()
            with changed:
                changed.notify_all()
