"""What happens in a run, event by event, and the end of its process at a chosen one.

In: a trainer, before it trains. Out: a line per event in a log, which outlives the process, and a
signal to the process at the event that a `Fault` names.

An event is a finished sample ("sample train", or "sample eval in training"), a call of a reward function ("grade"), an optimizer
step or a part of one ("step"), or a change in the output directory: "open", "rename", "remove",
"rmtree", "mkdir" and "save" (before `torch.save`), followed by the file's name from the round's
folder on, with "0" for numbers, as in "rename samples/0.parquet".
"""

import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

import trl_selfplay.rollouts.collection as collection

_CHANGES = {
    "os.rename": "rename", "os.remove": "remove", "shutil.rmtree": "rmtree", "os.mkdir": "mkdir",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """The end of a process.

    Attributes:
        event: The name of the event; "" for any; "seconds" for a time of the processor.
        after: How many such events pass before it, or how many seconds.
        torn: Whether the file that was written last, if it is one that isn't yet complete, loses its
            second half, as where the signal comes in the middle of writing it.
        number: The signal.
        to: What gets it: the process ("self"), also those that it has started ("group"), or all
            processes of the run ("ranks").
    """

    event: str
    after: float = 0
    torn: bool = False
    number: int = signal.SIGKILL
    to: Literal["self", "group", "ranks"] = "self"


class Events:
    """Logs the events of this process in order, and ends the process at one of them.

    Attributes:
        process_number: How many processes have logged to the file so far, with this one.
    """

    def __init__(self, folder: Path, log: Path, fault: Fault | None) -> None:
        self._folder, self._fault, self._count = str(folder.absolute()) + os.sep, fault, 0
        self._path = log
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.happen("begin", os.getpid())
        self.process_number = len(read_events(log))
        if fault is not None and fault.event == "seconds":
            threading.Thread(target=self._end_by_time, args=(fault.after,), daemon=True).start()
        sys.addaudithook(self._audit)

    def happen(self, name: str, what: Any = None) -> None:
        """Log an event, and what it was about; end the process if its time has come."""
        line = {"event": name, "what": what, "seconds": time.process_time()}
        os.write(self._log, (json.dumps(line) + "\n").encode())
        if self._fault is not None and self._fault.event in (name, ""):
            self._count += 1
            if self._count > self._fault.after:
                self.end()

    def end(self) -> None:
        """Send this process the signal."""
        fault, self._fault = self._fault, None
        assert fault is not None
        if fault.torn:
            self._tear()
        self.happen("end", time.time())
        if fault.to == "group":
            os.killpg(0, fault.number)
        elif fault.to == "ranks":
            self._end_ranks(fault.number)
        else:
            os.kill(os.getpid(), fault.number)

    def _end_ranks(self, number: int) -> None:
        """Send all processes of the run a signal, before one of them can act on it."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(60.0)  # no other thread runs meanwhile
        for pid in self._pids():
            with suppress(ProcessLookupError):  # it has ended at another's signal
                os.kill(pid, number)
        sys.setswitchinterval(interval)

    def _pids(self) -> list[int]:
        """Return the processes of the run that have begun last."""
        begun = [process[0]["what"] for process in read_events(self._path)]
        return begun[-int(os.environ["WORLD_SIZE"]) :]

    def _end_by_time(self, seconds: float) -> None:
        started = time.process_time()
        while time.process_time() - started < seconds:
            time.sleep(0.002)
        self.end()

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
                self._changed("open", path)
        elif event in _CHANGES:
            self._changed(_CHANGES[event], arguments[1 if event == "os.rename" else 0])

    def _changed(self, change: str, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            name = str(Path(os.fsdecode(path)).absolute())
            if name.startswith(self._folder):
                self.happen(f"{change} {short_name(name.removeprefix(self._folder))}")

    def _tear(self) -> None:
        """Cut the newest file in half if a reader would not take it for complete."""
        files = [p for p in Path(self._folder).rglob("*") if p.is_file()]
        newest = max(files, key=lambda p: p.stat().st_mtime_ns, default=None)
        if newest is not None and re.search(r"/(\.|checkpoint-)", str(newest)):
            os.truncate(newest, newest.stat().st_size // 2)

    def watch(self, trainer: Any) -> None:
        """Log the samples, grades and steps of a trainer, and what `torch.save` writes."""
        save = torch.save

        def watched_save(content: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            self._changed("save", path)
            save(content, path, *args, **kwargs)

        torch.save = watched_save
        trainer.add_callback(_Steps(self, trainer))
        if hasattr(trainer, "self_play"):
            self._watch_samples(trainer)

    def _watch_samples(self, trainer: Any) -> None:
        sampler = trainer.self_play.collector.sampler
        keys: dict[int, list[Any]] = {}
        sample, stream_key = sampler.sample, collection.stream_key

        def watched_key(seed: int, *what: Any) -> int:
            key = stream_key(seed, *what)
            keys[key] = list(what)
            return key

        def watched_sample(requests: Any, options: Any, *args: Any) -> Iterator[Any]:
            asked: list[Any] = []

            def listed() -> Iterator[Any]:
                for request in requests:
                    if request is not None:
                        asked.append(request)
                    yield request

            is_list = isinstance(requests, list | tuple)
            for index, sampled in sample(requests if is_list else listed(), options, *args):
                what = keys.get((requests if is_list else asked)[index].stream_key)
                where = " in training" if trainer.is_in_train else ""
                if what is None:  # a later turn of a trajectory
                    self.happen(f"turn{where}")
                else:
                    # Held-out prompts have the same streams in each round: where they are kept differs.
                    what = [trainer.progress.round_index, *what[1:], options.temperature == 0.0]
                    self.happen(f"sample {what[1]}{where}", what)
                yield index, sampled

        collection.stream_key = watched_key
        sampler.sample = watched_sample

    def watch_reward(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a reward function whose calls are events, both as it begins and as it ends."""

        def watched(completions: Any, **kwargs: Any) -> Any:
            shown = [
                hashlib.blake2b(repr(c).encode(), digest_size=8).hexdigest() for c in completions
            ]
            self.happen("grade", shown)
            scores = function(completions, **kwargs)
            self.happen("graded", len(shown))
            return scores

        return watched


class _Steps(TrainerCallback):
    def __init__(self, events: Events, trainer: Any) -> None:
        self._events, self._trainer = events, trainer

    def _step(self, name: str, state: Any) -> None:
        progress = getattr(self._trainer, "progress", None)
        round_index = None if progress is None else progress.round_index
        self._events.happen(name, [round_index, state.global_step])

    def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        self._step("step", state)

    def on_substep_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        self._step("substep", state)

    def on_save(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        self._step("saved", state)


def short_name(path: str) -> str:
    """Return the last parts of a path in the output directory, without what differs between runs."""
    path = re.sub(r"(_rounds/)?(round-\d+|warm-up|before)/", "", path.removeprefix("_rounds/"))
    path = re.sub(r"(^|/)\.([^/]*?)(\.\d+)?\.tmp$", r"\1\2", path)
    return re.sub(r"\d+", "0", path)


def read_events(log: Path) -> list[list[dict[str, Any]]]:
    """Return the events of each process that wrote to a log, in order."""
    processes: list[list[dict[str, Any]]] = []
    for line in log.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "begin":
            processes.append([])
        processes[-1].append(event)
    return processes
