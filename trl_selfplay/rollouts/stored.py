"""A round's data on disk: its rollouts, shard by shard, and the outcome of each.

In: a round's folder. Out: its rollouts, or those with certain outcomes; of a run's folder, the samples
of all rounds.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trl_selfplay.disk import (
    BRING_BACK,
    CHECKED,
    DamagedFileError,
    delete,
    naming_damage,
    save_table,
)
from trl_selfplay.rollouts.record import Rollout, load_rollouts, save_rollouts
from trl_selfplay.rollouts.selection import Selection
from trl_selfplay.rollouts.sequence import Rollouts, StoredShard
from trl_selfplay.rollouts.shards import read_plan, sampled_prefixes

_HISTORY = pa.schema(
    [("round_index", pa.int32()), ("prompt_id", pa.string()), ("sample_index", pa.int32())]
)


def load_samples(folder: Path) -> Rollouts:
    """Return all rollouts that a round sampled, in the order of its shards.

    Samples with hints come after those without. Within a shard the order is that of the plan.

    Args:
        folder: Folder of the round that sampled them.

    Raises:
        DamagedFileError: A shard that was planned can't be read or is gone, or the plan of the hinted
            ones is.
        FileNotFoundError: The round has no plan of its samples on disk.
    """
    refuse_lost_hints(folder)
    return Rollouts.stored(_shards(folder))


def load_steps_of(samples: Path, prefix: str) -> Rollouts:
    """Return the samples of an agent's steps whose files begin with a prefix and the step's number.

    Raises:
        DamagedFileError: As `load_samples`.
    """
    of_steps = re.compile(rf"{re.escape(prefix)}step\d+-")
    found = filter(of_steps.fullmatch, sampled_prefixes(samples))
    return Rollouts.stored(_planned(samples, found))


def refuse_lost_hints(folder: Path) -> None:
    """Raise DamagedFileError if a round has selected among hinted samples whose plan is gone."""
    plan, path = folder / "samples" / "hint-plan.json", folder / "selection.parquet"
    has_shards = any(plan.parent.glob("hint-[0-9]*.parquet"))  # some may be left over
    if plan.exists() or not has_shards or not path.exists():
        return
    has_hinted = False
    # Where it can't be read, that is told by whoever needs more of it.
    with suppress(DamagedFileError), naming_damage(path, BRING_BACK):
        has_hinted = pc.any(
            pq.read_table(path, columns=["hinted"], **CHECKED).column("hinted")
        ).as_py()
    if has_hinted:
        raise DamagedFileError(
            f"{plan} is gone, which says which shards hold that round's samples with hints. {BRING_BACK}"
        )


def load_all_samples(root: Path) -> Rollouts:
    """Return what all rounds of a run sampled without hints, as the samples of one round.

    A prompt's samples are numbered from 0 in the order of the rounds. They are sorted by prompt and
    number.

    Args:
        root: The run's folder, `_rounds`.

    Raises:
        DamagedFileError, FileNotFoundError: As `load_samples`.
    """
    found = Rollouts.of(())
    for folder in sorted(root.glob("round-*")):
        if (folder / "samples").exists():  # else it trained on an earlier round's samples
            found += load_samples(folder)
    phases, prompt_ids, indices, rounds = found.columns(
        "phase", "prompt_id", "sample_index", "round_index"
    )
    are_chosen = np.array([phase == "train" for phase in phases], dtype=bool)
    order = _sorted_places(prompt_ids, rounds, indices)
    chosen = order[are_chosen[order]]
    numbers = [
        number
        for _, same in groupby(chosen.tolist(), key=prompt_ids.__getitem__)
        for number, _ in enumerate(same)
    ]
    return found.pick(chosen).renumbered(np.array(numbers, np.int32))


def rewrite_samples(folder: Path, change: Callable[[Rollout], Rollout]) -> None:
    """Change each of a round's samples on disk, shard by shard.

    Raises:
        DamagedFileError, FileNotFoundError: As `load_samples`.
    """
    for shard in _shards(folder):
        held = load_rollouts(shard.path)
        changed = list(map(change, held))
        if changed != held:
            save_rollouts(shard.path, changed)


def save_selection(path: Path, selection: Selection) -> None:
    """Write the outcome of each rollout: prompt_id, sample_index, hinted, outcome."""
    facts = selection.facts
    prompt_ids = pa.DictionaryArray.from_arrays(
        facts.prompts, pa.array(facts.prompt_ids, pa.string())
    )
    save_table(
        path,
        pa.table(
            {
                "prompt_id": prompt_ids.cast(pa.string()),
                "sample_index": pa.array(facts.sample_indices, pa.int32()),
                "hinted": pa.array(facts.hinted, pa.bool_()),
                "outcome": pa.array(selection.outcomes, pa.string()),
            }
        ),
    )


def read_selection(path: Path) -> Iterator[tuple[str, int, str]]:
    """Yield prompt_id, sample_index and outcome of each rollout, as `save_selection` wrote them.

    Raises:
        DamagedFileError: The file can't be read.
    """
    with naming_damage(path, BRING_BACK), pq.ParquetFile(path, **CHECKED) as file:
        for batch in file.iter_batches(columns=["prompt_id", "sample_index", "outcome"]):
            yield from zip(*map(pa.Array.to_pylist, batch), strict=True)


def save_history(path: Path, history: Sequence[Rollout]) -> None:
    """Write which rollouts of earlier rounds a round trains on; no file if there are none."""
    if not history:
        delete(path)
        return
    columns = Rollouts.of(history).columns(*_HISTORY.names)
    save_table(path, pa.table(columns, _HISTORY))


def read_history(path: Path) -> Iterator[tuple[int, str, int]]:
    """Yield round, prompt_id and sample_index of each rollout, as `save_history` wrote them.

    Raises:
        DamagedFileError: The file can't be read.
    """
    with naming_damage(path, BRING_BACK):
        table = pq.read_table(path, columns=_HISTORY.names, **CHECKED)
    yield from zip(*map(pa.ChunkedArray.to_pylist, table.columns), strict=True)


def load_outcomes(folder: Path, outcomes: Collection[str]) -> Rollouts:
    """Return the rollouts of a round with one of these outcomes, by (prompt_id, sample_index).

    Raises:
        DamagedFileError, FileNotFoundError: As `load_samples`.
    """
    rollouts = load_samples(folder)
    chosen: dict[str, set[int]] = {}
    for prompt_id, index, outcome in read_selection(folder / "selection.parquet"):
        if outcome in outcomes:
            chosen.setdefault(prompt_id, set()).add(index)
    prompt_ids, indices = rollouts.columns("prompt_id", "sample_index")
    order = _sorted_places(prompt_ids, indices)
    return rollouts.pick([i for i in order.tolist() if indices[i] in chosen.get(prompt_ids[i], ())])


def load_history(folders: Iterable[Path]) -> Rollouts:
    """Return what rounds selected before the cap, from their folders.

    Raises:
        DamagedFileError, FileNotFoundError: As `load_samples`.
    """
    history = Rollouts.of(())
    for folder in folders:
        history += load_outcomes(folder, ("kept", "capped"))
    return history


def load_kept(folder: Path) -> Rollouts:
    """Return the rollouts that an earlier round kept, from its folder."""
    return load_outcomes(folder, ("kept",))


def count_kept(folder: Path) -> Counter[str]:
    """Return how many rollouts of each prompt a round selected, from its folder.

    Raises:
        DamagedFileError: The outcomes can't be read.
    """
    path = folder / "selection.parquet"
    with naming_damage(path, BRING_BACK), pq.ParquetFile(path, **CHECKED) as file:
        table = file.read(["prompt_id", "outcome"])
    pairs = zip(*map(pa.ChunkedArray.to_pylist, table.columns), strict=True)
    return Counter(prompt_id for prompt_id, outcome in pairs if outcome == "kept")


def _shards(folder: Path) -> Iterator[StoredShard]:
    """Yield a round's shards that hold anything.

    Raises:
        FileNotFoundError: The round has no plan of its samples on disk.
    """
    samples = folder / "samples"
    prefixes = sampled_prefixes(samples)
    if set(prefixes) <= {"hint-"}:
        raise FileNotFoundError(
            f"{samples / 'plan.json'} is gone, which says which shards hold that round's samples. "
            f"{BRING_BACK}"
        )
    yield from _planned(samples, prefixes)


def _planned(samples: Path, prefixes: Iterable[str]) -> Iterator[StoredShard]:
    """Yield the shards of some plans in a folder of samples."""
    for prefix in prefixes:
        for number, shard in enumerate(read_plan(samples / f"{prefix}plan.json") or ()):
            if shard.prompt_ids:
                yield StoredShard(samples / f"{prefix}{number:05d}.parquet", shard.prompt_ids)


def _sorted_places(prompt_ids: list[str], *numbers: list[int]) -> np.ndarray:
    """Return the places of rollouts by prompt, then by these numbers."""
    ranks = {prompt_id: rank for rank, prompt_id in enumerate(sorted(set(prompt_ids)))}
    keys = [np.array([ranks[prompt_id] for prompt_id in prompt_ids], np.int32)]
    keys += [np.array(values, np.int32) for values in numbers]
    return np.lexsort(keys[::-1])
