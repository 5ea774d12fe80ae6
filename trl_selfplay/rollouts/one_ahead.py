"""Let the next item of an iterator be made while the last one is worked on.

In: an iterator whose items take long. Out: the same items, each made in a second thread while the
caller has the one before it.
"""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def one_ahead(items: Iterator[Item], stop: Event) -> Generator[Item]:
    """Yield the items in order; the one after next is not begun before the next was asked for.

    What the iterator raises is raised here, in its turn. Closing, or an exception such as Ctrl-C,
    sets `stop`, waits for what is in progress, and closes the iterator.

    Args:
        items: Used in the second thread alone.
        stop: What makes the items looks at it, to end early.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as thread:
        try:
            coming = thread.submit(next, items, _END)
            while (item := coming.result()) is not _END:
                coming = thread.submit(next, items, _END)
                yield item  # type: ignore[misc]
        finally:
            stop.set()
            thread.submit(getattr(items, "close", int)).result()
