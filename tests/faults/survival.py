"""End a run at chosen events, resume it, and compare it with one that nothing ended.

In: a name in `fault_runs.RUNS`, and faults. Out: the difference from the uninterrupted run, None if
there is none; and the work that was done twice.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from datasets import load_from_disk
from fault_events import Fault, read_events
from fault_runs import run
from processes import call
from safetensors.torch import load_file


@dataclass(frozen=True, slots=True)
class Repeated:
    """Work that a process did after one was ended, although that one had done it.

    Attributes:
        seconds: Of the processor, from the first event that came again to the end of that process.
        samples: Samples that came again, all of which were in a shard that wasn't complete.
        lost_samples: Those among them that had been in a complete shard.
        steps: Optimizer steps that came again.
    """

    seconds: float
    samples: int
    lost_samples: int
    steps: int


@dataclass(frozen=True, slots=True)
class Survivor:
    """A run that was ended and went on.

    Attributes:
        exit_codes: Of its processes; the last one reached the end.
        difference: What differs from the uninterrupted run; None if nothing does.
        repeated: For each process that was ended, what later ones repeated.
        seconds: Of the processor, for each process.
        leaving: Seconds from each signal to the end of the process.
    """

    exit_codes: list[int]
    difference: str | None
    repeated: list[Repeated]
    seconds: list[float]
    leaving: list[float]


def run_whole(base: Path, name: str) -> Path:
    """Run to the end without a fault, and return the output directory."""
    folder = base / f"{_plain(name)}-whole"
    log = folder.with_name(f"{folder.name}.log")
    code = call(run, str(folder), name, str(base / "inputs"), None, log=log)
    assert code == 0, log.read_text()[-3000:]
    return folder


def survive(
    base: Path, name: str, whole: Path, faults: Sequence[Fault], label: str = "killed"
) -> Survivor:
    """End one run by each fault in turn, let it go on to its end, and compare.

    A run that came to its end before a fault isn't resumed any more.
    """
    folder = base / f"{_plain(name)}-{label}"
    log = folder.with_name(f"{folder.name}.log")
    codes: list[int] = []
    ended_at: list[float] = []
    complete: list[set[tuple[Any, ...]]] = []
    for fault in (*faults, None):
        codes.append(call(run, str(folder), name, str(base / "inputs"), fault, log=log))
        ended_at.append(time.time())
        complete.append(set(_samples_on_disk(folder)))
        if codes[-1] == 0:
            break
        assert fault is not None, log.read_text()[-3000:]
    events = read_events(folder.with_name(f"{folder.name}.events"))
    repeated = [
        _repeated(ended, events[place + 1 :], complete[place])
        for place, ended in enumerate(events[:-1])
    ]
    seconds = [process[-1]["seconds"] for process in events]
    signals = [e["what"] for process in events for e in process if e["event"] == "end"]
    leaving = [end - sent for end, sent in zip(ended_at, signals, strict=False)]
    return Survivor(codes, find_difference(whole, folder), repeated, seconds, leaving)


def find_difference(whole: Path, folder: Path) -> str | None:
    """Return the first thing in which two runs differ, in words; None if they are equal."""
    for what, read in (("round lines", _lines), ("shards", _tables), ("rows", _rows)):
        expected, found = read(whole), read(folder)
        for key in sorted({*expected, *found}, key=str):
            if expected.get(key) != found.get(key):
                return f"{what}: {key}"
    expected_weights, found_weights = _weights(whole), _weights(folder)
    if expected_weights.keys() != found_weights.keys():
        return f"weights: {sorted(expected_weights.keys() ^ found_weights.keys())[0]}"
    for name, tensor in expected_weights.items():
        if not torch.equal(tensor, found_weights[name]):
            return f"weights: {name}"
    return None


def _lines(folder: Path) -> dict[Any, Any]:
    path = folder / "_rounds" / "rounds.jsonl"
    texts = path.read_text().splitlines() if path.exists() else []
    lines = [json.loads(text) for text in texts]
    return {line["round"]: {k: v for k, v in line.items() if k != "seconds"} for line in lines}


def _tables(folder: Path) -> dict[Any, Any]:
    paths = sorted((folder / "_rounds").rglob("*.parquet"))
    return {str(p.relative_to(folder)): pq.read_table(p).to_pylist() for p in paths}


def _rows(folder: Path) -> dict[Any, Any]:
    paths = sorted(folder.glob("_rounds/*/dataset"))
    return {str(p.relative_to(folder)): load_from_disk(str(p)).to_list() for p in paths}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {f"{p.name}: {n}": t for p in files for n, t in load_file(p).items()}


def _samples_on_disk(folder: Path) -> Iterator[tuple[Any, ...]]:
    """Yield round, phase, prompt and index of the samples in complete shards, and whether greedy."""
    for path in folder.glob("_rounds/*/*/**/*.parquet"):
        table = pq.read_table(path)
        columns = ("phase", "prompt_id", "sample_index")
        if set(columns) <= set(table.column_names):
            name = path.relative_to(folder / "_rounds").parts[0]
            round_index = None if name == "before" else int(name.removeprefix("round-"))
            for row in zip(*(table[c].to_pylist() for c in columns), strict=True):
                yield (round_index, *row, row[0] == "eval" and path.name.startswith("greedy"))


def _repeated(
    ended: Sequence[dict[str, Any]],
    later: Sequence[Sequence[dict[str, Any]]],
    complete: set[tuple[Any, ...]],
) -> Repeated:
    done_later = {_identity(event) for process in later for event in process} - {None}
    again = [event for event in ended if _identity(event) in done_later]
    samples = [tuple(event["what"]) for event in again if event["event"].startswith("sample ")]
    first = ended.index(again[0]) if again else len(ended) - 1
    return Repeated(
        seconds=ended[-1]["seconds"] - ended[max(first - 1, 0)]["seconds"],
        samples=len(samples),
        lost_samples=sum(sample in complete for sample in samples),
        steps=sum(event["event"] == "step" for event in again),
    )


def _identity(event: dict[str, Any]) -> str | None:
    name = event["event"]
    is_sample = name.startswith("sample ") and not name.endswith(" in training")
    is_work = is_sample or name in ("grade", "step", "saved")
    return json.dumps([name, event["what"]]) if is_work else None


def _plain(name: str) -> str:
    return "".join(c for c in name if c.isalnum())
