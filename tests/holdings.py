"""What a process holds and has to let go of: threads, open files and child processes."""

import gc
import os
import threading
from collections.abc import Hashable

import psutil


def held() -> set[Hashable]:
    """Return what this process holds. A test leaves nothing behind if `held() <= before`.

    What others let go of in the meantime doesn't count.
    """
    gc.collect()  # of what earlier tests have dropped, nothing is closed later
    files = {f"file {number}" for number in os.listdir("/dev/fd")}  # noqa: PTH208  # strings
    return {*threading.enumerate(), *files, *psutil.Process().children()}
