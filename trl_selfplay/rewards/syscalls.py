"""System calls of Linux that Python's standard library lacks, and a filter that denies others.

In: numbers and paths. Out: nothing, or an OSError. Only the standard library is imported, because
this also runs in interpreters that have nothing else.
"""

import ctypes
import os
import platform
import struct
from typing import Any

# Flags of clone and unshare.
NEW_MOUNTS, NEW_UTS, NEW_IPC = 0x00020000, 0x04000000, 0x08000000
NEW_USER, NEW_PIDS, NEW_NET = 0x10000000, 0x20000000, 0x40000000
_NEW_ANY = 0x7E020000
# Flags of mount and umount2.
NO_SUID, NO_DEVICES, NO_EXEC, BIND, RECURSIVE, PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
_DETACH = 2
# Attributes of mount_setattr.
READ_ONLY_ATTRIBUTE, NO_SUID_ATTRIBUTE, NO_DEVICES_ATTRIBUTE = 1, 2, 4
# Options of prctl.
_PARENT_DEATH_SIGNAL, _DUMPABLE, _SECCOMP, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 4, 22, 36, 38
_AT_RECURSIVE = 0x8000
_SIGCHLD = 17
_UNIX_SOCKET = 1

# PyDLL keeps the interpreter's lock, so that a cloned process has it as well.
_libc = ctypes.PyDLL(None, use_errno=True)
# Looked up here and not in each child, where it would touch many pages.
_before_fork = ctypes.pythonapi.PyOS_BeforeFork
_after_fork_in_child = ctypes.pythonapi.PyOS_AfterFork_Child
_after_fork_in_parent = ctypes.pythonapi.PyOS_AfterFork_Parent
_syscall, _prctl_call, _mount = _libc.syscall, _libc.prctl, _libc.mount

# The number of each machine in audit records, and of its calls.
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NUMBERS = {
    "add_key": {"x86_64": 248, "aarch64": 217},
    "bpf": {"x86_64": 321, "aarch64": 280},
    "capset": {"x86_64": 126, "aarch64": 91},
    "chroot": {"x86_64": 161, "aarch64": 51},
    "clone": {"x86_64": 56, "aarch64": 220},
    "fanotify_init": {"x86_64": 300, "aarch64": 262},
    "fcntl": {"x86_64": 72, "aarch64": 25},
    "ioctl": {"x86_64": 16, "aarch64": 29},
    "kcmp": {"x86_64": 312, "aarch64": 272},
    "kill": {"x86_64": 62, "aarch64": 129},
    "keyctl": {"x86_64": 250, "aarch64": 219},
    "memfd_create": {"x86_64": 319, "aarch64": 279},
    "mount": {"x86_64": 165, "aarch64": 40},
    "mq_open": {"x86_64": 240, "aarch64": 180},
    "msgget": {"x86_64": 68, "aarch64": 186},
    "name_to_handle_at": {"x86_64": 303, "aarch64": 264},
    "perf_event_open": {"x86_64": 298, "aarch64": 241},
    "personality": {"x86_64": 135, "aarch64": 92},
    "pivot_root": {"x86_64": 155, "aarch64": 41},
    "prctl": {"x86_64": 157, "aarch64": 167},
    "prlimit64": {"x86_64": 302, "aarch64": 261},
    "process_vm_readv": {"x86_64": 310, "aarch64": 270},
    "process_vm_writev": {"x86_64": 311, "aarch64": 271},
    "ptrace": {"x86_64": 101, "aarch64": 117},
    "request_key": {"x86_64": 249, "aarch64": 218},
    "rt_sigqueueinfo": {"x86_64": 129, "aarch64": 138},
    "rt_tgsigqueueinfo": {"x86_64": 297, "aarch64": 240},
    "setns": {"x86_64": 308, "aarch64": 268},
    "setpgid": {"x86_64": 109, "aarch64": 154},
    "setsid": {"x86_64": 112, "aarch64": 157},
    "shmget": {"x86_64": 29, "aarch64": 194},
    "socket": {"x86_64": 41, "aarch64": 198},
    "socketpair": {"x86_64": 53, "aarch64": 199},
    "tgkill": {"x86_64": 234, "aarch64": 131},
    "tkill": {"x86_64": 200, "aarch64": 130},
    "umount2": {"x86_64": 166, "aarch64": 39},
    "unshare": {"x86_64": 272, "aarch64": 97},
    "userfaultfd": {"x86_64": 323, "aarch64": 282},
}
# Calls whose numbers are the same on all machines: those since Linux 5.0.
_SINCE_5 = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "clone3": 435,
    "pidfd_getfd": 438,
    "mount_setattr": 442,
    "memfd_secret": 447,
}
# Not denied as a whole: what `build_filter` treats apart, and what can only give up privileges.
_TREATED_APART = ("clone", "clone3", "socket", "socketpair", "prctl", "capset")
# What leaves a process's group, and signals to any process.
_LEAVING = ("setsid", "setpgid")
_SIGNALS = ("tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_send_signal")
# Arguments that name a process, and may be 0 for the own one.
_OWN_ALONE = ("kill", "tgkill", "prlimit64")
# Requests to signal a process when a file is ready: F_SETOWN, F_SETOWN_EX, FIOSETOWN, SIOCSPGRP.
_OWNERS = {"fcntl": (8, 15), "ioctl": (0x8901, 0x8902)}
_NOT_DENIED = {*_TREATED_APART, *_LEAVING, *_SIGNALS, *_OWN_ALONE, *_OWNERS}


def _number(name: str) -> int:
    machine = platform.machine()
    if machine not in _AUDIT:
        raise OSError(f"the numbers of the system calls of {machine} aren't known")
    return _SINCE_5.get(name) or _NUMBERS[name][machine]


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _call(name: str, *arguments: Any) -> int:
    result = _syscall(ctypes.c_long(_number(name)), *map(_as_word, arguments))
    return _check(result, name)


def _as_word(argument: Any) -> Any:
    return ctypes.c_long(argument) if isinstance(argument, int) else argument


def unshare(flags: int) -> None:
    """Move this process into new namespaces."""
    _call("unshare", flags)


def fork_into(flags: int) -> int:
    """Fork into new namespaces, as `os.fork`; the process must have one thread.

    With NEW_PIDS the child is process 1 there, and all others die with it.
    """
    _before_fork()
    # The C library's fork can't pass flags. Zero for the stack: it is copied, as by fork.
    pid = _syscall(
        ctypes.c_long(_number("clone")), ctypes.c_long(flags | _SIGCHLD), *[ctypes.c_long(0)] * 4
    )
    if pid == 0:
        _after_fork_in_child()
    else:
        _after_fork_in_parent()
    return _check(pid, "clone")


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount a file system, or a folder at a second place."""
    words = [text.encode() for text in (source, target, kind)]
    _check(
        _mount(*words, ctypes.c_ulong(flags), options.encode()),
        f"mounting {source} on {target}",
    )


def restrict_mounts(path: str, attributes: int) -> None:
    """Set attributes of a mount and of all below it."""
    packed = struct.pack("QQQQ", attributes, 0, 0, 0)
    _call("mount_setattr", -100, path.encode(), _AT_RECURSIVE, packed, len(packed))


def pivot(new_root: str, old_root: str) -> None:
    """Make a mount the root folder, and mount the former one below it."""
    _call("pivot_root", new_root.encode(), old_root.encode())
    os.chdir("/")


def enter_root(path: str) -> None:
    """Make a mount the root folder, and let go of the former one."""
    os.chdir(path)
    _call("pivot_root", b".", b".")
    _check(_libc.umount2(b".", _DETACH), "leaving the root folder")
    os.chdir("/")


def _prctl(option: int, *arguments: Any) -> None:
    padded = (*arguments, 0, 0, 0, 0)[:4]
    _check(_prctl_call(option, *map(_as_word, padded)), f"prctl {option}")


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    _prctl(_PARENT_DEATH_SIGNAL, 9)


def adopt_orphans() -> None:
    """Become the parent of descendants whose parents end."""
    _prctl(_SUBREAPER, 1)


def set_visible(is_visible: bool) -> None:
    """Say whether this process, and others of its user, may write its files in /proc."""
    _prctl(_DUMPABLE, int(is_visible))


def drop_privileges() -> None:
    """Give up all capabilities, for good: no program that is executed brings any back.

    Nor is this process dumped when it crashes, which the system's handler would be asked to do.
    """
    _prctl(_NO_NEW_PRIVILEGES, 1)
    _prctl(_DUMPABLE, 0)
    _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))


def filter_calls(program: bytes) -> None:
    """Deny system calls to this process and its descendants; needs `drop_privileges`."""
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
    _prctl(_SECCOMP, 2, header)


def build_filter(own: int | None = None) -> bytes:
    """Return a seccomp filter against what limits and namespaces don't cover.

    Denied are sockets other than Unix sockets, namespaces, mounts, memory that belongs to no
    process (memfd, System V), tracing, keys, and interfaces of the kernel that programs under test
    don't need: io_uring, bpf, perf, userfaultfd.

    Args:
        own: Where there are no namespaces, the process: it can then signal itself and its group
            alone, its descendants their group, and none leaves that.
    """
    allow, deny, missing, kill = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000

    def line(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("HBBI", code, if_true, if_false, value)

    def load(offset: int) -> bytes:
        return line(0x20, offset)

    def answer(value: int) -> bytes:
        return line(0x06, value)

    def unless_equal(value: int, skip: int) -> bytes:
        return line(0x15, value, 0, skip)

    def by_argument(
        name: str, offset: int, values: tuple[int, ...], among: int, otherwise: int
    ) -> list[bytes]:
        jumps = [line(0x15, value, len(values) - i) for i, value in enumerate(values)]
        start = [unless_equal(_number(name), len(values) + 3), load(offset)]
        return [*start, *jumps, answer(otherwise), answer(among)]

    parts = [load(4), line(0x15, _AUDIT[platform.machine()], 1, 0), answer(kill), load(0)]
    if platform.machine() == "x86_64":  # the same calls by other numbers
        parts += [line(0x35, 0x40000000, 0, 1), answer(deny)]
    denied = {*_NUMBERS, *_SINCE_5} - _NOT_DENIED
    if own is not None:
        denied |= {*_LEAVING, *_SIGNALS}
        for name in _OWN_ALONE:
            parts += by_argument(name, 16, (0, own), allow, deny)
        for name, requests in _OWNERS.items():
            parts += by_argument(name, 24, requests, deny, allow)
    for name in sorted(denied):
        parts += [unless_equal(_number(name), 1), answer(deny)]
    # The C library falls back to clone, whose flags can be read here.
    parts += [unless_equal(_number("clone3"), 1), answer(missing)]
    parts += [unless_equal(_number("clone"), 4), load(16), line(0x45, _NEW_ANY, 0, 1)]
    parts += [answer(deny), answer(allow)]
    parts += by_argument("prctl", 16, (_DUMPABLE,), deny, allow)
    for name in ("socket", "socketpair"):
        parts += by_argument(name, 16, (_UNIX_SOCKET,), allow, deny)
    return b"".join([*parts, answer(allow)])
