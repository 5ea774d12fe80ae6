"""The rounds of a run on an object store: what lies there, put, fetched and deleted.

In: a URL that fsspec knows, such as s3://bucket/run, and files and folders by their names below
`_rounds`. Out: the same names on the store. A file is one object, there whole once its put has
returned. A folder that is whole or not at all on disk (a model, a dataset, a checkpoint) is there once
its list of files is, which is put last; without it nothing of the folder counts.
"""

import base64
import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from trl_selfplay.confidential import MASK, masked
from trl_selfplay.disk import replace_folder

logger = logging.getLogger(__name__)

FORMAT = 1
# The list of a folder's files, in the folder; put last, deleted first.
_LIST = "_files.json"
# Folders that are whole or not at all, by name; all other files are so by themselves.
_WHOLE_FOLDER = re.compile(r"model|dataset|pairs|checkpoint-\d+")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_PASSWORD = re.compile(r"://[^@\s]*:[^@\s]*@")  # secret keys may have slashes in them
_LOCAL_SCHEMES = ("file", "local", "memory")
_PAUSES_S = (1.0, 4.0)  # beside the retries of the store's own client
# What no second try mends; the names are botocore's, whose errors have no such class in Python.
_PERMANENT = (PermissionError, FileNotFoundError, ImportError, ValueError)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError")
_PERMANENT_NAMES = (*_NO_CREDENTIALS, "ParamValidationError")


class StoreError(RuntimeError):
    """The store of `rounds_dir` didn't do what was asked of it.

    Attributes:
        is_permanent: No second try helps: no such bucket, no credentials, no right.
    """

    def __init__(self, text: str, is_permanent: bool = False) -> None:
        super().__init__(text, is_permanent)  # both, so that it can be pickled
        self.is_permanent = is_permanent

    def __str__(self) -> str:
        return str(self.args[0])


def check_rounds_dir(url: str) -> None:
    """Raise ValueError for a `rounds_dir` that isn't a URL of one folder, or that holds a secret."""
    from fsspec import available_protocols  # comes with datasets

    parts = urlsplit(url)
    if _PASSWORD.search(url) or parts.query or parts.fragment:
        raise ValueError(
            f"rounds_dir={without_url_secrets(url)!r} has more than the place of a folder in it. Give "
            "s3://bucket/folder alone, and credentials where the store's client looks for them "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials)."
        )
    if not parts.scheme or "://" not in url or "::" in url:
        raise ValueError(
            f"rounds_dir={url!r} isn't a URL. Give one such as 's3://bucket/folder'; on this "
            "machine's disks rounds lie in output_dir, and rounds_dir stays None."
        )
    if parts.scheme not in _LOCAL_SCHEMES and not parts.path.strip("/"):
        place = f"{parts.scheme}://{parts.netloc or 'bucket'}/run"
        raise ValueError(f"rounds_dir={url!r}: name a folder in the bucket, as in {place}.")
    if parts.scheme not in available_protocols():
        raise ValueError(
            f"rounds_dir={url!r}: no kind of store is called {parts.scheme!r}. Give a URL that begins "
            "with s3://, gs://, or another scheme that fsspec knows."
        )


def without_url_secrets(text: str) -> str:
    """Return a text without user names, passwords and queries of URLs, and without other secrets."""
    text = re.sub(r"(://[^?#\s'\"]*)[?#][^\s'\"]*", rf"\1?{MASK}", text)
    return str(masked(_PASSWORD.sub(f"://{MASK}@", text)))


def is_whole_folder(name: str) -> bool:
    """Return whether a folder of this name is whole or not at all."""
    return _WHOLE_FOLDER.fullmatch(PurePosixPath(name).name) is not None


def is_checkpoint(name: str) -> bool:
    """Return whether a folder of this name is a checkpoint of the parent's training."""
    return _CHECKPOINT.fullmatch(PurePosixPath(name).name) is not None


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or a whole folder, on disk or on the store.

    Attributes:
        files: Size in bytes of each file, by its name within the folder; "" for a file by itself.
        digests: MD5 of each, in hexadecimal, as far as it is known.
    """

    files: Mapping[str, int]
    digests: Mapping[str, str] = field(default_factory=dict)


def scan(root: Path) -> dict[str, Path]:
    """Return the files and whole folders below `root`, by name; temporary ones are left out."""
    found: dict[str, Path] = {}

    def walk(folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            name = path.relative_to(root).as_posix()
            if path.name.startswith("."):
                continue
            if path.is_dir() and not is_whole_folder(name):
                walk(path)
            else:
                found[name] = path

    if root.is_dir():
        walk(root)
    return found


def describe(path: Path) -> Entry:
    """Return sizes and digests of a file, or of all files in a folder."""
    files = {_within(path, each): each for each in _files_of(path)}
    return Entry(
        {name: each.stat().st_size for name, each in files.items()},
        {name: _digest(each) for name, each in files.items()},
    )


def _files_of(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())


def _within(path: Path, file: Path) -> str:
    return "" if path == file else file.relative_to(path).as_posix()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.md5(usedforsecurity=False)
        ).hexdigest()  # as S3 and GCS tell it


class RoundsStore:
    """The folder of a run on a store, through fsspec.

    Args:
        url: Of the folder, as `check_rounds_dir` takes it. How the store is reached, and as whom, is
            read from the environment and from the files of its client.
        pauses_s: Seconds between tries, beside those of the store's client.

    Raises:
        StoreError: By every method, where the store fails.
    """

    def __init__(self, url: str, pauses_s: tuple[float, ...] = _PAUSES_S) -> None:
        check_rounds_dir(url)
        self.url = url.rstrip("/")
        self.pauses_s = pauses_s
        self._fs: Any = None
        self._root = ""

    def check_answers(self) -> None:
        """See that the store can be reached and listed."""
        self._objects("")

    def read(self, name: str) -> bytes | None:
        """Return the content of an object; None if there is none."""
        try:
            content: bytes = self._call("read", name, lambda fs, at: fs.cat_file(at))
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Put an object."""
        self._call("write", name, lambda fs, at: fs.pipe_file(at, content))

    def put(self, name: str, path: Path) -> int:
        """Put a file or a whole folder; return its bytes."""
        files = _files_of(path)
        if path.is_file():
            self._put_file(name, path)
            return path.stat().st_size
        entry = describe(path)
        old = self._objects(name)
        self._delete_objects([name for name in old if name.endswith(f"/{_LIST}")])
        for file in files:
            self._put_file(f"{name}/{_within(path, file)}", file)
        new = {f"{name}/{inner}" for inner in entry.files}
        self._delete_objects([other for other in old if other not in new])
        listed = {"format": FORMAT, "files": dict(entry.files), "md5": dict(entry.digests)}
        self.write(f"{name}/{_LIST}", json.dumps(listed, indent=1).encode())
        return sum(entry.files.values())

    def delete(self, name: str) -> None:
        """Delete a file or folder; nothing happens if there is none."""
        objects = self._objects(name)
        self._delete_objects(sorted(objects, key=lambda other: not other.endswith(f"/{_LIST}")))

    def entries(self) -> dict[str, Entry]:
        """Return what is there and whole, by name."""
        objects = self._objects("")
        entries: dict[str, Entry] = {}
        for name, info in objects.items():
            folder = next(
                (str(p) for p in PurePosixPath(name).parents if is_whole_folder(str(p))), ""
            )
            if folder and name == f"{folder}/{_LIST}":
                entry = self._listed(folder)
                there = {
                    inner: objects.get(f"{folder}/{inner}", {}).get("size") for inner in entry.files
                }
                if there == entry.files:
                    entries[folder] = entry
            elif not folder and "/" not in name and name.startswith("_"):
                continue  # the lease and the like
            elif not folder:
                digest = _told_digest(info)
                entries[name] = Entry({"": info["size"]}, {} if digest is None else {"": digest})
        return entries

    def _listed(self, folder: str) -> Entry:
        name = f"{folder}/{_LIST}"
        listed = read_record(self.read(name), f"{self.url}/{name}", _lists_files)
        if not listed:
            return Entry({"": -1})  # as nothing is
        for inner in listed["files"]:
            self._check_stays_within(f"{folder}/{inner}")
        return Entry(listed["files"], listed["md5"])

    def fetch(self, name: str, entry: Entry, path: Path) -> int:
        """Bring a file or whole folder onto the disk; return its bytes.

        Raises:
            StoreError: What came isn't what the store says it has.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.fetched")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for inner, size in entry.files.items():
            file = temporary / inner if inner else temporary / path.name
            file.parent.mkdir(parents=True, exist_ok=True)
            source = f"{name}/{inner}" if inner else name
            self._get_file(source, file)
            # What the store tells of a single file isn't its MD5 where the store encrypts.
            wanted = entry.digests.get(inner) if inner else None
            if file.stat().st_size != size or wanted not in (None, _digest(file)):
                raise StoreError(
                    f"{self.url}/{source} came otherwise than it was put ({file.stat().st_size:,} of "
                    f"{size:,} bytes): bring it back on the store, or delete it there; what can be "
                    "made again is."
                )
        if "" in entry.files:
            (temporary / path.name).replace(path)
            temporary.rmdir()
        else:
            replace_folder(temporary, path)
        return sum(entry.files.values())

    def _get_file(self, name: str, path: Path) -> None:
        self._call("fetch", name, lambda fs, at: fs.get_file(at, str(path)))

    def _put_file(self, name: str, path: Path) -> None:
        self._call("put", name, lambda fs, at: fs.put_file(str(path), at))

    def _objects(self, below: str) -> dict[str, Any]:
        """Return what the store tells of each object, by name."""

        def find(fs: Any, at: str) -> dict[str, Any]:
            fs.invalidate_cache()
            return dict(fs.find(at, detail=True))

        try:
            found = self._call("list", below, find)
        except FileNotFoundError as error:
            raise StoreError(
                f"rounds_dir={self.url!r}: {error or 'there is no such bucket'}. Make the bucket, or "
                "give the URL of a folder in one that is there.",
                is_permanent=True,
            ) from error
        prefix = self._root.rstrip("/") + "/"
        objects = {
            path.removeprefix(prefix): info
            for path, info in sorted(found.items())
            if not path.endswith("/")  # by such an object, consoles of stores mark a folder
        }
        for name in objects:
            self._check_stays_within(name)
        return objects

    def _check_stays_within(self, name: str) -> None:
        """Refuse a name that leads elsewhere on a disk: others may be able to write to the store.

        Raises:
            StoreError: It does.
        """
        if "\0" in name or not {"", ".", ".."}.isdisjoint(name.split("/")):
            raise StoreError(
                f"rounds_dir={self.url!r}: the object {name!r} was not put there by a run, and its name "
                "leads out of its folder on a disk. Nothing was fetched. Find out who may write to the "
                "store, and delete the object.",
                is_permanent=True,
            )

    def _delete_objects(self, names: list[str]) -> None:
        for name in names:
            try:
                self._call("delete", name, lambda fs, at: fs.rm_file(at))
            except FileNotFoundError:
                continue

    def _call(self, verb: str, name: str, call: Callable[[Any, str], Any]) -> Any:
        """Call the file system, more than once where that may help.

        Raises:
            FileNotFoundError: There is nothing to read or delete, or no bucket.
            StoreError: For all other errors.
        """
        for pause_s in (*self.pauses_s, None):
            try:
                fs = self._connect()
                return call(fs, f"{self._root}/{name}" if name else self._root)
            except FileNotFoundError as error:
                if verb not in ("put", "write"):
                    raise
                raise self._error(verb, name, error) from error
            # Each file system raises the errors of its own library.
            except Exception as error:
                told = self._error(verb, name, error)
                if told.is_permanent or pause_s is None:
                    raise told from error
                time.sleep(pause_s)
        raise AssertionError("unreachable")

    def _connect(self) -> Any:
        if self._fs is None:
            from fsspec.core import url_to_fs  # comes with datasets

            scheme = urlsplit(self.url).scheme
            options = {"auto_mkdir": True} if scheme in ("file", "local") else {}
            # Of its own: another one in this process may have been told of other credentials.
            self._fs, self._root = url_to_fs(
                self.url, skip_instance_cache=True, use_listings_cache=False, **options
            )
        return self._fs

    def _error(self, verb: str, name: str, error: Exception) -> StoreError:
        is_permanent = isinstance(error, _PERMANENT) or type(error).__name__ in _PERMANENT_NAMES
        reason = without_url_secrets(f"{type(error).__name__}: {error}")[:300]
        if isinstance(error, ImportError):
            extra = urlsplit(self.url).scheme == "s3"
            remedy = (
                'Install it: pip install "trl-selfplay[s3]".' if extra else "Install what it names."
            )
        elif type(error).__name__ in _NO_CREDENTIALS:
            remedy = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write ~/.aws/credentials."
        elif is_permanent:
            remedy = "See that the bucket is there, and that the credentials may list, read, write and delete in it."
        else:
            remedy = "Try again once the store answers."
        return StoreError(
            f"rounds_dir={self.url!r}: could not {verb} {name or 'what is there'} ({reason}). {remedy}",
            is_permanent,
        )


def read_record(
    content: bytes | None, place: str, is_whole: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Return the JSON object of a file that has a `format`; an empty one where it can't be read.

    Args:
        content: Of the file; None if there is none.
        place: Of the file, for messages.
        is_whole: Returns whether an object of this version holds what it should.

    Raises:
        StoreError: A later version of trl-selfplay has written it.
    """
    if content is None:
        return {}
    try:
        record = json.loads(content)
    except (ValueError, RecursionError):
        record = None
    written = record.get("format") if isinstance(record, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise StoreError(
            f"{place} was written by a later version of trl-selfplay (format {written}; this one reads "
            f"{FORMAT}). Install that version to go on with this run.",
            is_permanent=True,
        )
    if written == FORMAT and is_whole(record):
        return dict(record)
    logger.warning("%s can't be read, and counts for nothing.", place)
    return {}


def _lists_files(record: dict[str, Any]) -> bool:
    return _maps_to(int, record.get("files")) and _maps_to(str, record.get("md5"))


def _maps_to(kind: type, value: Any) -> bool:
    """Return whether a value from JSON is an object with values of one type."""
    return isinstance(value, dict) and all(isinstance(each, kind) for each in value.values())


def _told_digest(info: Mapping[str, Any]) -> str | None:
    """Return the MD5 that S3 or GCS tells of an object; None for one put in parts."""
    etag = str(info.get("ETag", "")).strip('"')
    if re.fullmatch(r"[0-9a-f]{32}", etag):
        return etag
    if (encoded := info.get("md5Hash")) is not None:
        return base64.b64decode(encoded).hex()
    return None


def is_same(local: Path, stored: Entry) -> bool:
    """Return whether a file or folder on disk is known to be what the store has."""
    sizes = {_within(local, file): file.stat().st_size for file in _files_of(local)}
    if sizes != dict(stored.files) or stored.digests.keys() != sizes.keys():
        return False
    return describe(local).digests == dict(stored.digests)
