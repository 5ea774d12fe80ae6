"""A round's data on disk: its rollouts, shard by shard, and the outcome of each.

In: a round's folder. Out: its rollouts, or those with certain outcomes; of a run's folder, the samples
of all rounds.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from trl_selfplay.disk import BRING_BACK, DamagedFileError, naming_damage, save_table
from trl_selfplay.rollouts.record import Rollout, load_rollouts, save_rollouts
from trl_selfplay.rollouts.selection import Selection
from trl_selfplay.rollouts.shards import read_plan


@dataclass(frozen=True, slots=True)
class StoredRollouts:
    """All rollouts that a round sampled; iterating reads one shard at a time.

    Samples with hints come after those without. Within a shard the order is that of the plan.

    Args:
        folder: Folder of the round that sampled them.

    Raises:
        DamagedFileError: On iteration: a shard that was planned can't be read, lacks a prompt, or
            is gone.
        FileNotFoundError: The round has no samples on disk.
    """

    folder: Path

    def __iter__(self) -> Iterator[Rollout]:
        """Yield the rollouts, shard by shard."""
        for path, planned in self.shards():
            held = load_rollouts(path)
            if missing := set(planned) - {r.prompt_id for r in held}:
                raise DamagedFileError(
                    f"{path} lacks {len(missing)} of the {len(planned)} prompts that were sampled "
                    f"into it. {BRING_BACK}"
                )
            yield from held

    def __len__(self) -> int:
        """Return how many there are, from the files' metadata alone."""
        count = 0
        for path, _ in self.shards():
            with naming_damage(path, BRING_BACK):
                count += pq.read_metadata(path).num_rows
        return count

    def shards(self) -> Iterator[tuple[Path, tuple[str, ...]]]:
        """Yield each shard's file and the ids of its prompts."""
        samples = self.folder / "samples"
        plans = {prefix: read_plan(samples / f"{prefix}plan.json") for prefix in ("", "hint-")}
        if plans[""] is None:
            raise FileNotFoundError(
                f"{samples} has no samples of that round, which this one needs too. {BRING_BACK}"
            )
        for prefix, shards in plans.items():
            for number, shard in enumerate(shards or ()):
                if shard.prompt_ids:
                    yield samples / f"{prefix}{number:05d}.parquet", shard.prompt_ids


def load_samples(folder: Path) -> list[Rollout]:
    """Return all rollouts that a round sampled, sorted by (prompt_id, sample_index).

    Raises:
        DamagedFileError, FileNotFoundError: As `StoredRollouts`.
    """
    return sorted(StoredRollouts(folder), key=lambda r: (r.prompt_id, r.sample_index))


def load_all_samples(root: Path) -> list[Rollout]:
    """Return what all rounds of a run sampled without hints, as the samples of one round.

    A prompt's samples are numbered from 0 in the order of the rounds.

    Args:
        root: The run's folder, `_rounds`.

    Raises:
        DamagedFileError, FileNotFoundError: As `StoredRollouts`.
    """
    found: list[Rollout] = []
    counts: Counter[str] = Counter()
    for folder in sorted(root.glob("round-*")):
        if not (folder / "samples").exists():
            continue  # it trained on an earlier round's samples
        for rollout in load_samples(folder):
            if rollout.phase == "train":
                found.append(replace(rollout, sample_index=counts[rollout.prompt_id]))
                counts[rollout.prompt_id] += 1
    return sorted(found, key=lambda r: (r.prompt_id, r.sample_index))


def rewrite_samples(folder: Path, change: Callable[[Rollout], Rollout]) -> None:
    """Change each of a round's samples on disk, shard by shard.

    Raises:
        DamagedFileError, FileNotFoundError: As `StoredRollouts`.
    """
    for path, _ in StoredRollouts(folder).shards():
        held = load_rollouts(path)
        changed = list(map(change, held))
        if changed != held:
            save_rollouts(path, changed)


def save_selection(path: Path, selection: Selection) -> None:
    """Write the outcome of each rollout: prompt_id, sample_index, hinted, outcome."""
    rollouts, outcomes = zip(*selection.outcomes, strict=True) if selection.outcomes else ((), ())
    save_table(
        path,
        pa.table(
            {
                "prompt_id": pa.array([r.prompt_id for r in rollouts], pa.string()),
                "sample_index": pa.array([r.sample_index for r in rollouts], pa.int32()),
                "hinted": pa.array([r.hinted for r in rollouts], pa.bool_()),
                "outcome": pa.array(list(outcomes), pa.string()),
            }
        ),
    )


def load_outcomes(folder: Path, outcomes: Collection[str]) -> list[Rollout]:
    """Return the rollouts of a round with one of these outcomes, from its folder.

    Raises:
        DamagedFileError, FileNotFoundError: As `StoredRollouts`.
    """
    rollouts = load_samples(folder)
    path = folder / "selection.parquet"
    with naming_damage(path, BRING_BACK):
        selection = pq.read_table(path).to_pylist()
        chosen = {
            (s["prompt_id"], s["sample_index"]) for s in selection if s["outcome"] in outcomes
        }
    return [r for r in rollouts if (r.prompt_id, r.sample_index) in chosen]


def load_kept(folder: Path) -> list[Rollout]:
    """Return the rollouts that an earlier round kept, from its folder."""
    return load_outcomes(folder, ("kept",))
