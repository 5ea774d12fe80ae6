"""Which isolation this machine offers to programs that aren't trusted, and their limits.

In: limits, and an isolation by name. Out: the command and the settings that start an isolated
interpreter (`zygote.py`), or the reason why this machine can't.
"""

import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

# The third has a new interpreter per program, which is many times slower: for machines that forbid
# namespaces within bubblewrap's. The last has limits alone.
Isolation = Literal["bubblewrap", "namespaces", "bubblewrap per program", "weak"]
# Shared libraries and time zones, where they exist.
_SYSTEM_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_BUBBLEWRAP = "bwrap"
_INSIDE = "/zygote"
_HERE = Path(__file__).parent
_SCRIPTS = ("zygote.py", "processes.py", "program.py", "syscalls.py", "literals.py")

# What the interpreter itself takes.
_LEAST = {"memory_bytes": 64 * 2**20, "open_files": 8}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use, with all processes that it starts.

    Attributes:
        cpu_s: CPU seconds per process. None: the deadline, rounded up, and one second more.
        memory_bytes: Memory of all its processes together, without its files, and the address
            space of each.
        file_bytes: Size of its temporary folder, and of each file.
        processes: Processes and threads.
        open_files: Open files per process.
        output_bytes: Bytes of standard output, or of one message from a session.
    """

    cpu_s: float | None = None
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 16 * 2**20
    processes: int = 40
    open_files: int = 64
    output_bytes: int = 2**20

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), _LEAST.get(field.name, 0)
            if value is None and field.default is None:
                continue
            is_number = isinstance(value, (int, float) if field.default is None else int)
            if not is_number or not least < value < math.inf:
                raise ValueError(
                    f"{field.name} is {value!r}; it must be a "
                    f"{'' if field.default is None else 'whole '}number of more than {least}."
                )


def candidates(allow_weak_isolation: bool) -> Iterator[Isolation]:
    """Return the isolations to try, best first."""
    if shutil.which(_BUBBLEWRAP):
        yield "bubblewrap"
    yield "namespaces"
    if shutil.which(_BUBBLEWRAP):
        yield "bubblewrap per program"
    if allow_weak_isolation:
        yield "weak"


def describe(isolation: Isolation, limits: Limits, folder: str) -> dict[str, Any]:
    """Return the settings of the isolated interpreter, which are data that JSON can hold.

    Args:
        isolation: One of the `candidates`.
        limits: What each program may use.
        folder: Where to put programs' temporary folders if they have no file system of their own.
    """
    folders, links = _visible_folders()
    return {
        "isolation": isolation,
        "parent": os.getpid(),
        "folder": folder,
        "limits": {field.name: getattr(limits, field.name) for field in fields(limits)},
        "folders": folders,
        "links": links,
        "hidden": [str(path) for folder in folders for path in _packages_in(folder)],
        "devices": [device for device in _DEVICES if Path(device).exists()],
        "command": _bubblewrap(isolation, limits, folders, links),
    }


def command() -> list[str]:
    """Return the command of a clean interpreter that runs `zygote.py`."""
    return [sys.executable, *_FLAGS, str(_HERE / "zygote.py")]


# As -I, which would ignore PYTHONHASHSEED: a program's verdict must not depend on its worker.
_FLAGS = ["-B", "-P", "-s", "-S", "-X", "utf8"]
ENVIRONMENT = {"HOME": "/tmp", "TMPDIR": "/tmp", "PYTHONHASHSEED": "0", "LANG": "C.UTF-8"}


def _visible_folders() -> tuple[dict[str, str], dict[str, str]]:
    """Return the folders that programs can read, with what is shown there, and links to them."""
    libraries = [os.path.join(sys.base_prefix, name) for name in ("lib", "lib64")]  # noqa: PTH118  # strings
    folders: dict[str, str] = {}
    links: dict[str, str] = {}
    for folder in (*_SYSTEM_FOLDERS, *libraries):
        place = Path(folder)
        if place.is_symlink():
            links[folder] = str(place.readlink())
        elif place.is_dir() and not any(place.is_relative_to(outer) for outer in folders):
            folders[folder] = os.path.realpath(folder)
    return folders, links


def _packages_in(folder: str) -> Iterator[Path]:
    for path in Path(folder).glob("python*/*-packages"):
        if path.is_dir() and not path.is_symlink():
            yield path


def _bubblewrap(
    isolation: Isolation, limits: Limits, folders: dict[str, str], links: dict[str, str]
) -> list[str]:
    """Return the command that starts the interpreter in bubblewrap, without its last argument."""
    if isolation not in ("bubblewrap", "bubblewrap per program"):
        return []
    words = [
        shutil.which(_BUBBLEWRAP) or _BUBBLEWRAP,
        "--die-with-parent",
        "--as-pid-1",
        "--unshare-pid",
        "--unshare-net",
    ]
    words += ["--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:  # it changes to another user itself
        words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        words += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    # Folders that it makes on the way to the others can be entered by nobody but root.
    interpreter = os.path.realpath(sys.executable)
    for path in _parents([*folders, *links, *_DEVICES, f"{_INSIDE}/x", interpreter, "/tmp/x"]):
        words += ["--perms", "0755", "--dir", path]
    for folder, source in folders.items():
        words += ["--ro-bind", source, folder]
        for packages in map(str, _packages_in(folder)):
            words += ["--tmpfs", packages, "--remount-ro", packages]
    for link, target in links.items():
        words += ["--symlink", target, link]
    for device in _DEVICES:
        words += ["--dev-bind-try", device, device]
    for script in _SCRIPTS:
        words += ["--ro-bind", str(_HERE / script), f"{_INSIDE}/{script}"]
    words += ["--ro-bind", interpreter, interpreter, "--remount-ro", "/"]
    if isolation == "bubblewrap per program":
        words += ["--size", str(limits.file_bytes), "--perms", "1777", "--tmpfs", "/tmp"]
    return [*words, "--chdir", "/", interpreter, *_FLAGS, f"{_INSIDE}/zygote.py"]


def _parents(paths: list[str]) -> list[str]:
    return sorted({str(parent) for path in paths for parent in Path(path).parents} - {"/"})
