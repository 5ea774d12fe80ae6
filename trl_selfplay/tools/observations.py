"""The results of a run's calls, on disk as they come, with their dates.

In: calls and their results. Out: a file with one line per call, from which no call is made twice: neither on
resume nor where another trajectory makes the same one.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

from trl_selfplay.disk import tell_written
from trl_selfplay.tools.checked_lines import from_line, to_line
from trl_selfplay.tools.record import ToolCall, ToolResult

logger = logging.getLogger(__name__)

_FIELDS = {"step", "arguments", "date", *(each.name for each in fields(ToolResult))}


class Observations:
    """Remembers the result of each call.

    A failed call is remembered for its own step alone, so that a trajectory can be replayed; others try again.

    Args:
        path: The file; it begins where there is none. None keeps results in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = Lock()
        self._has_grown = False
        self._by_step: dict[tuple[str, str], ToolResult] = {}
        self._by_call: dict[str, ToolResult] = {}
        if path is not None and path.exists():
            self._read(path)

    def of_step(self, step: str, call: ToolCall) -> ToolResult | None:
        """Return the result that a step's call had, if it was this call."""
        return self._by_step.get((step, _canonical(call.name, call.arguments)))

    def of_call(self, call: ToolCall) -> ToolResult | None:
        """Return the result that an equal call had and that didn't fail."""
        return self._by_call.get(_canonical(call.name, call.arguments))

    def add(self, step: str, call: ToolCall, result: ToolResult) -> None:
        """Remember a result, from any thread; it is on the disk when this returns."""
        event = {
            "step": step,
            "arguments": dict(call.arguments),
            **asdict(result),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self._lock:
            self._take(event)
            if self._path is not None:
                self._write(self._path, event)

    def tell(self) -> None:
        """Tell those that follow the folder, such as a store, that the file has grown."""
        if self._has_grown and self._path is not None:
            self._has_grown = False
            tell_written(self._path)

    def _write(self, path: Path, event: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.seek(0, os.SEEK_END) and not _ends_a_line(file):
                file.write(b"\n")
            file.write(to_line(event) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._has_grown = True

    def _read(self, path: Path) -> None:
        for number, text in enumerate(path.read_bytes().splitlines()):
            try:
                self._take(_event_of(text))
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                logger.warning(
                    "line %d of %s can't be read (%s): its call is made again.",
                    number + 1, path, error,
                )  # fmt: skip

    def _take(self, event: Mapping[str, Any]) -> None:
        result = ToolResult(event["name"], event["content"], event["failed"])
        call = _canonical(result.name, event["arguments"])
        self._by_step[event["step"], call] = result
        if not result.failed:
            self._by_call.setdefault(call, result)


def _event_of(line: bytes) -> dict[str, Any]:
    event: dict[str, Any] = json.loads(line)
    is_unchecked = event.keys() == _FIELDS  # of an earlier version
    return event if is_unchecked else from_line(line)


def _canonical(name: str, arguments: Mapping[str, Any]) -> str:
    return json.dumps([name, dict(arguments)], sort_keys=True)


def _ends_a_line(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
