"""Files of a run: written whole or not at all, named when they can't be read, held by one process.

In: what is to be kept, and where. Out: files and folders that are there whole, also after a power
cut: written under a temporary name, synced and renamed. What was damaged since is an error that
names it and says what to do.
"""

import errno
import json
import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from trl_selfplay.forks import in_forks

# What readers of JSON, text, Parquet, safetensors and pickles raise for files of another content.
_DAMAGE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    SyntaxError,
    EOFError,
    pa.ArrowException,
    SafetensorError,
    UnpicklingError,
    zipfile.BadZipFile,
)


# A full disk, or a quota that is used up; safetensors and torch.save tell it in words.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left", "Disk quota exceeded", "inline_container", "file write failed")
# Why a folder can't be written, and what to do, by the number of the error.
_UNWRITABLE = {
    **dict.fromkeys(_FULL, ("the disk is full", "free some space")),
    errno.EROFS: ("the file system is read-only", "make it writable"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM),
        ("this user may not write", "give it the rights, or choose another output_dir"),
    ),
    errno.EIO: ("the disk fails", "look at it"),
    errno.ENAMETOOLONG: ("a path is too long", "choose a shorter output_dir"),
    **dict.fromkeys(
        (errno.ENOTDIR, errno.EEXIST),
        ("a file is in the place of a folder", "move it, or choose another output_dir"),
    ),
}
# For pyarrow's readers of Parquet: compare with the checksums that `save_table` writes.
CHECKED = {"page_checksum_verification": True}
_CHECKSUMS = "checksums.json"
# Files whose readers take a changed number for the right one. Those of `torch.save` have checksums of
# their own, and several processes write them.
_SUMMED = (".safetensors", ".arrow")
_CHUNK = 1 << 20
# What to do about a file that nothing else on disk tells again.
BRING_BACK = "Bring it back from a copy, or start anew in another output_dir."
# How a run goes on that stopped, in words that follow "then" or "and".
RESUME = "resume with train(resume_from_checkpoint=True) (on the command line: --resume)"


class DamagedFileError(RuntimeError):
    """A file of a run is there and can't be read, or is gone and needed."""


class NewerFormatError(RuntimeError):
    """A file of a run was written by a later version of the package than this one."""


def refuse_missing_path(name: str, what: str) -> None:
    """Raise FileNotFoundError for text that can only be a path, and nothing is there.

    A Hub id is a name, or two with a slash between them; for other text, libraries would ask the Hub,
    for as long as half a minute, and then say that it has no such model.

    Args:
        name: A Hub id or a path.
        what: What it was given as, such as "model_name_or_path".
    """
    is_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if is_path and "://" not in name and "*" not in name and not Path(name).exists():
        raise FileNotFoundError(
            f"{what}={name!r}: there is nothing at {str(Path(name).absolute())!r}. Give the path of a "
            "folder from here or from the root, or a Hub id."
        )


@contextmanager
def naming_damage(path: Path, remedy: str) -> Iterator[None]:
    """Name a file or folder, and what to do, where reading it fails inside.

    Raises:
        DamagedFileError: In place of the reader's own error.
    """
    try:
        yield
    except DamagedFileError:
        raise
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {error}"
        raise DamagedFileError(f"{path} can't be read ({reason[:300]}). {remedy}") from error


def save_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file that is there whole or not at all."""
    _save(path, lambda file: pq.write_table(table, file, write_page_checksum=True))


def save_text(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all."""
    _save(path, lambda file: file.write(text.encode()))


def _save(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        _, remedy = _UNWRITABLE.get(error.errno or 0, ("", "look at the disk"))
        raise OSError(
            error.errno,
            f"could not write {path} ({error.strerror or error}). What was written before is "
            f"intact: {remedy}, then {RESUME}",
        ) from error
    _sync(path.parent)
    tell_written(path)


def is_found(path: Path, seconds: float = 90.0) -> bool:
    """Return whether a file is there that another process has written.

    A network file system may remember for a minute that there was none.
    """
    ends = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() >= ends:
            return False
        time.sleep(1.0)
    return True


def save_file_with(path: Path, write: Callable[[Path], object]) -> None:
    """Let a function write a file that is there whole or not at all."""
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)
    tell_written(path)


def replace_folder(temporary: Path, final: Path) -> None:
    """Sync a finished folder and rename it to its final name; an older one of that name goes."""
    for path in (*sorted(temporary.rglob("*")), temporary):
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(final.parent)
    tell_written(final)


def save_checksums(folder: Path, suffixes: tuple[str, ...] = _SUMMED) -> None:
    """Write the checksums of a folder's files with these endings into it.

    By default they are its weights and data sets. JSON files may be edited by hand, and what a disk has
    changed in them is seldom read without an error.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix in suffixes and p.name != _CHECKSUMS)
    sums = {path.relative_to(folder).as_posix(): checksum(_chunks(path)) for path in files}
    (folder / _CHECKSUMS).write_text(json.dumps(sums, indent=1))


def refuse_changed(folder: Path) -> None:
    """Raise an error if a file isn't what `save_checksums` saw; a folder without checksums is taken as it is.

    Raises:
        FileNotFoundError: A file is gone.
        ValueError: A file's content has changed, or the checksums can't be read.
    """
    path = folder / _CHECKSUMS
    for name, written in json.loads(path.read_text()).items() if path.exists() else ():
        if checksum(_chunks(folder / name)) != written:
            raise ValueError(f"{name} has changed since it was written")


def checksum(chunks: Iterable[bytes | memoryview]) -> str:
    """Return the CRC-32 of bytes that come in parts, as eight hexadecimal digits."""
    value = 0
    for chunk in chunks:
        value = zlib.crc32(chunk, value)
    return f"{value:08x}"


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def delete(path: Path) -> None:
    """Delete a file or folder, if it is there; whoever follows the folder is told before."""
    tell_gone(path)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def unused_aside(root: Path) -> Path:
    """Return the path beside a run's folder of one, not there yet, for what counts no more."""
    aside, number = root.with_name(f"{root.name}_aside"), 1
    while aside.exists():
        number += 1
        aside = root.with_name(f"{root.name}_aside_{number}")
    return aside


class Follower(Protocol):
    """Is told what becomes of the files below a folder."""

    def written(self, path: Path) -> None:
        """Take note of a file or folder that is now there whole."""

    def gone(self, path: Path) -> None:
        """Take note of a file or folder that will be deleted, or counts no more."""


_FOLLOWERS: dict[Path, Follower] = {}


@contextmanager
def followed(folder: Path, follower: Follower) -> Iterator[None]:
    """Tell `follower` of each file and folder below `folder` that is written or deleted in here.

    It is told in the thread that wrote, before this goes on; temporary names are left out.
    """
    _FOLLOWERS[folder.absolute()] = follower
    try:
        yield
    finally:
        del _FOLLOWERS[folder.absolute()]


def tell_gone(path: Path) -> None:
    """Tell those that follow a folder that a file or folder in it counts no more."""
    for follower in _followers_of(path):
        follower.gone(path)


def tell_written(path: Path) -> None:
    """Tell those that follow a folder that a file or folder in it is there whole."""
    for follower in _followers_of(path):
        follower.written(path)


def _followers_of(path: Path) -> list[Follower]:
    whole = path.absolute()
    return [
        follower
        for folder, follower in _FOLLOWERS.items()
        if whole.is_relative_to(folder)
        and not any(part.startswith(".") for part in whole.relative_to(folder).parts)
    ]


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they survive a power cut."""
    missing = list(takewhile(lambda each: not each.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync(made.parent)


def _sync(path: Path) -> None:
    """Make a file's content, or renames in a folder, survive a power cut."""
    if os.name == "nt":  # Windows can't open folders, and syncs files opened for writing alone
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def saying_what_is_kept(folder: Path) -> Iterator[None]:
    """Say, where a folder can't be written, why, that what was written is kept, and how to go on.

    Raises:
        OSError: In place of the writer's own error, which may name neither file nor reason.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        number = _number_of(error, folder)
        if number is None or RESUME in str(error):
            raise
        what, remedy = _UNWRITABLE[number]
        raise OSError(
            number,
            f"{what} in {folder} ({str(error)[:200]}). Samples, scores, finished rounds "
            f"and complete checkpoints are kept: {remedy}, then {RESUME}",
        ) from error


def _number_of(error: Exception, folder: Path) -> int | None:
    """Return the number of an error that comes from writing into a folder."""
    number = getattr(error, "errno", None)
    if any(text in str(error) for text in _FULL_TEXTS):
        return number if number in _FULL else errno.ENOSPC
    if number not in _UNWRITABLE:
        return None
    path = getattr(error, "filename", None)
    is_ours = isinstance(path, str) and Path(path).absolute().is_relative_to(folder.absolute())
    return number if number in _FULL or is_ours else None


@contextmanager
def held_by_this_process(folder: Path, is_main: bool = True) -> Iterator[None]:
    """Hold a folder while this lasts, so that no other run trains into it.

    Of several processes of a run the main one holds it for all.

    The system lets go of it when this process ends, however it ends, and even if processes that it
    has forked go on. Where it has no such locks (Windows, some network file systems) nothing is held.

    Raises:
        RuntimeError: Another process holds it.
    """
    try:
        import fcntl  # Unix alone
    except ImportError:
        is_main = False
    if not is_main:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as holding:
        descriptor = os.open(folder, os.O_RDONLY)
        holding.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeError(
                f"another process is training into {str(folder)!r}, and two runs would overwrite "
                "each other's files. Wait until it has ended, or choose another output_dir."
            ) from error
        except OSError:
            pass
        with in_forks(holding.close):  # the lock lasts as long as any copy of the descriptor
            yield
