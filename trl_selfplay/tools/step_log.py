"""The steps of unfinished trajectories, on disk as they happen.

In: turns, results of calls and rewards. Out: a file with one line per event, from which an interrupted
trajectory goes on without calling a tool or sampling a turn twice.
"""

import logging
import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from trl_selfplay.generation.sampler import Finish
from trl_selfplay.tools.checked_lines import from_line, to_line
from trl_selfplay.tools.record import ToolResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """A turn of the policy, and what its calls came to.

    Attributes:
        turn_ids: The turn's tokens.
        finish: Why it ended.
        logprob: The sum of its tokens' log-probs, or None.
        results: Of its first calls, as many as have been made.
    """

    turn_ids: tuple[int, ...]
    finish: Finish
    logprob: float | None
    results: tuple[ToolResult, ...] = ()


@dataclass(slots=True)
class Recorded:
    """What is known of a trajectory.

    Attributes:
        steps: In their order.
        rewards: What its environment gave for it, once it has ended: one value, which may be None.
    """

    steps: list[Step]
    rewards: list[float | None]
    num_events: int = 0


class StepLog:
    """Appends events to a file, from any thread, and reads those of an earlier process.

    Each line has a checksum, and each event its number within its trajectory. The last line may be cut off by a
    kill: what it tells is done again. So is what follows a line that can't be read, in the same trajectory.

    Args:
        path: The file; it begins where there is none.
        identity: Of the tools. The steps of a run with others aren't taken up.
    """

    def __init__(self, path: Path, identity: str = "") -> None:
        self._recorded = _read(path, identity)
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = path.open("ab" if self._recorded is not None else "wb")
        if self._recorded is None:
            self._recorded = {}
            self._write({"tools": identity})
        else:
            self._file.write(b"\n")  # behind a line that was cut off
        self._num_events = {key: found.num_events for key, found in self._recorded.items()}

    def recorded(self, key: int) -> Recorded:
        """Return what an earlier process recorded of the trajectory with a stream key."""
        assert self._recorded is not None
        return self._recorded.get(key) or Recorded([], [])

    def add(self, key: int, step: Step) -> None:
        """Record a turn."""
        told = {"ids": step.turn_ids, "finish": step.finish, "logprob": step.logprob}
        self._add(key, told)

    def add_result(self, key: int, result: ToolResult) -> None:
        """Record the result of the last turn's next call, on the disk before the policy reads it."""
        told = [result.name, result.content, result.failed, result.has_ended]
        self._add(key, {"result": told})
        os.fsync(self._file.fileno())

    def add_reward(self, key: int, reward: float | None) -> None:
        """Record what the environment gave for the trajectory."""
        self._add(key, {"reward": reward})

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._file.close()

    def _add(self, key: int, told: dict[str, Any]) -> None:
        with self._lock:
            number = self._num_events.get(key, 0)
            self._num_events[key] = number + 1
            self._write({"key": key, "n": number, **told})

    def _write(self, event: dict[str, Any]) -> None:
        self._file.write(to_line(event) + b"\n")
        self._file.flush()


def _read(path: Path, identity: str) -> dict[int, Recorded] | None:
    """Return what a file tells by trajectory; None if there is none, or one of other tools."""
    if not path.exists() or not path.stat().st_size:
        return None
    found: dict[int, Recorded] = {}
    of_tools = None
    for number, line in enumerate(path.read_bytes().split(b"\n")):
        try:
            event = from_line(line)
        except ValueError as error:
            if line:
                logger.warning(
                    "line %d of %s can't be read (%s): what it tells is done again.",
                    number + 1, path, error,
                )  # fmt: skip
            continue
        if "tools" in event:
            of_tools = event["tools"]
        else:
            _take(found.setdefault(event["key"], Recorded([], [])), event)
    if of_tools != identity:
        why = "the tools aren't those with which it began"
        if of_tools is None:
            why = "the line that names its tools can't be read"
        logger.warning("the steps in %s are done again: %s.", path, why)
        return None
    return found


def _take(found: Recorded, event: dict[str, Any]) -> None:
    """Add an event to its trajectory, if it is the next one there."""
    if event["n"] != found.num_events:
        return
    found.num_events += 1
    if "ids" in event:
        found.steps.append(Step(tuple(event["ids"]), event["finish"], event["logprob"]))
    elif "reward" in event:
        found.rewards.append(event["reward"])
    else:
        last = found.steps[-1]
        found.steps[-1] = replace(last, results=(*last.results, ToolResult(*event["result"])))
