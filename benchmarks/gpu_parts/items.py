"""What is measured, one item at a time, and the file of a part that holds what was found.

In: items in the order of their value. Out: `<part>.json`, complete after every item.
"""

import datetime
import fcntl
import gc
import json
import platform
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trl_selfplay.disk import save_text

_PACKAGES = ("trl", "transformers", "peft", "bitsandbytes", "torch")
# The exit status of a process that must not go on: its device is in an unknown state.
BROKEN = 3


@dataclass(frozen=True, slots=True)
class Item:
    """Something to measure.

    Attributes:
        name: Of its record.
        run: Returns the record.
        seconds: What it may take on a data-centre card; it isn't begun with less time left.
        is_wanted: Whether it is still of use, given the records so far.
        is_alone: No other item may run on the card at the same time.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    seconds: float = 30.0
    is_wanted: Callable[[Mapping[str, Any]], bool] = lambda records: True
    is_alone: bool = True


class Records:
    """The records of a part on one card, in a file that several processes write.

    The file may have `notes` beside them, sentences for the tables; they stay.

    Args:
        path: The part's JSON file.
        session: Of the command that runs; an item is tried once in a session.
    """

    def __init__(self, path: Path, session: str = "") -> None:
        self.path, self.session = path, session

    def load(self) -> dict[str, Any]:
        """Return records by item."""
        if not self.path.exists():
            return {}
        items: dict[str, Any] = json.loads(self.path.read_text())["items"]
        return items

    def save(self, name: str, record: dict[str, Any]) -> None:
        """Write down a record."""
        with self._locked():
            items = self.load()
            items[name] = record | {"session": self.session}
            self._write(items)

    def begin(self, name: str) -> bool:
        """Note that an item is being measured; return False if another process does so."""
        with self._locked():
            items = self.load()
            found = items.get(name, {})
            if found.get("session") == self.session:
                return False
            items[name] = {"state": "begun", "session": self.session, "began": time.time()}
            if "error" in found:
                items[name]["error"] = found["error"]
            self._write(items)
            return True

    def end_begun(self, why: str | None) -> None:
        """Turn what was begun in this session, and not finished, into errors; None: it was stopped."""
        with self._locked():
            items = self.load()
            for name, record in items.items():
                if record.get("state") == "begun" and record["session"] == self.session:
                    seconds = round(time.time() - record["began"], 1)
                    stopped = {"state": "stopped", "after_seconds": seconds}
                    items[name] = stopped if why is None else {"error": why}
                    items[name]["session"] = self.session
            self._write(items)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        key = zlib.crc32(str(self.path.resolve()).encode())
        with (Path(tempfile.gettempdir()) / f"trl-selfplay-gpu-{key:08x}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _write(self, items: dict[str, Any]) -> None:
        notes = json.loads(self.path.read_text()).get("notes") if self.path.exists() else None
        content = {
            **({"notes": notes} if notes else {}),
            "date": datetime.date.today().isoformat(),
            "python": platform.python_version(),
            "versions": {name: _version(name) for name in _PACKAGES},
            "items": items,
        }
        save_text(self.path, json.dumps(content, indent=1) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def is_done(record: Mapping[str, Any] | None) -> bool:
    """Return whether an item was measured."""
    return record is not None and "error" not in record and "state" not in record


def is_out_of_memory(record: Mapping[str, Any]) -> bool:
    """Return whether an item failed for want of memory."""
    return "out of memory" in record.get("error", "")


def open_items(items: Sequence[Item], records: Records) -> list[Item]:
    """Return what is to be measured: first what is missing, then what failed in other sessions."""
    found = records.load()
    wanted = [item for item in items if not is_done(found.get(item.name)) and item.is_wanted(found)]
    tried = [item for item in wanted if found.get(item.name, {}).get("session") == records.session]
    wanted = [item for item in wanted if item not in tried]
    return sorted(wanted, key=lambda item: "error" in found.get(item.name, {}))


def run_items(
    build: Callable[[], Sequence[Item]],
    records: Records,
    deadline: float,
    is_broken: Callable[[], bool],
    forget: Callable[[], None],
    shares_card: bool = False,
) -> int:
    """Measure items in this process until none is left or there is no time; return an exit status.

    Args:
        build: Returns the items.
        records: Where they are kept.
        deadline: By `time.time`.
        is_broken: Whether the device is unusable after a failure.
        forget: Frees what items keep for each other.
        shares_card: Measure the items that needn't be alone on the card; else those that must.
    """
    items = build()
    while True:
        left = deadline - time.time()
        left_open = [i for i in open_items(items, records) if i.is_alone != shares_card]
        fitting = [item for item in left_open if item.seconds <= left]
        if not fitting:
            return 0
        item = fitting[0]
        if not records.begin(item.name):
            continue
        started = time.time()
        try:
            with redirect_stdout(sys.stderr):  # what trainers print
                record = item.run()
        except Exception as error:
            text = traceback.format_exc()[-1500:]
            error.__traceback__ = None  # its frames hold tensors
            record = {"error": text}
            print(text, file=sys.stderr)
        record["took_seconds"] = round(time.time() - started, 1)
        records.save(item.name, record)
        shown = record.get("error", "done").strip().splitlines()[-1]
        print(f"{records.path.stem} {item.name}: {shown} ({record['took_seconds']} s)", flush=True)
        if "error" in record:
            forget()
            if is_broken():
                return BROKEN
        gc.collect()
