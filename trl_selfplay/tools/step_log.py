"""The steps of unfinished trajectories, on disk as they happen.

In: turns and results of calls. Out: a file with one line per event, from which an interrupted trajectory goes
on without calling a tool or sampling a turn twice.
"""

import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from trl_selfplay.generation.sampler import Finish
from trl_selfplay.tools.record import ToolResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """A turn of the policy, and what its calls came to.

    Attributes:
        turn_ids: The turn's tokens.
        finish: Why it ended.
        logprob: The sum of its tokens' log-probs, or None.
        results: None while its calls have no results, or if it has none.
    """

    turn_ids: tuple[int, ...]
    finish: Finish
    logprob: float | None
    results: tuple[ToolResult, ...] | None = None


class StepLog:
    """Appends events to a file, and reads those of an earlier process.

    A line is written whole before the next event; the last one may be cut off by a kill, and is then dropped.

    Args:
        path: The file; it begins where there is none.
    """

    def __init__(self, path: Path) -> None:
        self._steps = _read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("ab")
        if self._file.tell() and not _ends_a_line(path):
            self._file.write(b"\n")

    def steps_of(self, key: int) -> tuple[Step, ...]:
        """Return the recorded steps of the trajectory with a stream key."""
        return tuple(self._steps.get(key, ()))

    def add(self, key: int, step: Step) -> None:
        """Record a turn."""
        self._write(
            {"key": key, "ids": step.turn_ids, "finish": step.finish, "logprob": step.logprob}
        )

    def add_results(self, key: int, results: tuple[ToolResult, ...]) -> None:
        """Record the results of the last turn's calls, on the disk before the policy reads them."""
        told = [[r.name, r.content, r.failed] for r in results]
        self._write({"key": key, "results": told})
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(json.dumps(event).encode() + b"\n")
        self._file.flush()


def _read(path: Path) -> dict[int, list[Step]]:
    steps: dict[int, list[Step]] = {}
    if not path.exists():
        return steps
    for number, text in enumerate(path.read_bytes().splitlines()):
        try:
            event = json.loads(text)
            of_key = steps.setdefault(int(event["key"]), [])
            if "results" in event:
                results = tuple(ToolResult(*each) for each in event["results"])
                of_key[-1] = replace(of_key[-1], results=results)
            else:
                of_key.append(Step(tuple(event["ids"]), event["finish"], event["logprob"]))
        except (ValueError, LookupError, TypeError) as error:
            logger.warning(
                "line %d of %s can't be read (%s) and is left out: what it tells is done again.",
                number + 1, path, error,
            )  # fmt: skip
    return steps


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
