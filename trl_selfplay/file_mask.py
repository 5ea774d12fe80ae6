"""The mask of new files, which decides who may read and write them.

In: nothing. Out: this process's mask.
"""

from pathlib import Path


def mask_of_new_files() -> int:
    """Return the mask without setting another, which files of other threads would get.

    Raises:
        OSError: This system doesn't tell it.
    """
    found = Path("/proc/self/status").read_text().partition("Umask:")[2].split()
    if not found:
        raise OSError("this system doesn't tell the mask of new files")
    return int(found[0], 8)
