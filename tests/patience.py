"""Time for calls that end on a machine that is busy, and an end for those that never do.

A short deadline is missed by a process that the machine has stopped for a while, a long one is waited for by
each call that hangs.
"""

from collections.abc import Callable
from typing import TypeVar

# For what ends by itself: no process is stopped for as long.
ENDS_S = 120.0

Found = TypeVar("Found")


def under_growing_deadlines(
    call: Callable[[float], Found], has_time: Callable[[Found], bool], first_s: float = 1.0
) -> Found:
    """Return what a call gives under the first deadline that is long enough, or else under the longest.

    Args:
        call: Gets a deadline in seconds.
        has_time: Whether all that ends by itself had time for it.
        first_s: The shortest deadline.
    """
    for deadline_s in (first_s, 8.0 * first_s, 64.0 * first_s):
        found = call(deadline_s)
        if has_time(found):
            break
    return found
