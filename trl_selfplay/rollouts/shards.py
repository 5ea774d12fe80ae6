"""Shards: the parts of a phase's work, planned before anything is sampled, and read back from disk.

In: assignments (a prompt's tokens and which of its samples to draw). Out: the prompts of each shard,
on disk as `plan.json`, and what a shard on disk holds.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from trl_selfplay.disk import BRING_BACK, DamagedFileError, naming_damage, save_text
from trl_selfplay.generation.sampler import Sampler
from trl_selfplay.rollouts.record import Rollout, load_rollouts

if TYPE_CHECKING:  # it brings datasets, which readers of a run do without
    from trl_selfplay.rollouts.prompts import PromptRow

logger = logging.getLogger(__name__)

# A shard is what a kill can cost. Several batches, so that rows freed by short completions can
# be filled again within it.
BATCHES_PER_SHARD = 4


@dataclass(frozen=True, slots=True)
class Assignment:
    """The samples to draw for one prompt: its row, its tokens, and the sample indices."""

    row: "PromptRow"
    prompt_ids: tuple[int, ...]
    sample_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """A fixed part of the work: prompt ids, and the maximum number of sequences decoded together."""

    prompt_ids: tuple[str, ...]
    batch_size: int


def plan_shards(
    assignments: Sequence[Assignment],
    max_completion_length: int,
    sampler: Sampler,
    held: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
    num_processes: int = 1,
) -> list[Shard]:
    """Divide the work into shards of about `BATCHES_PER_SHARD` batches.

    The longest prompts come first, so that running out of memory shows in the first minute. All
    samples of a prompt are in one shard, so that a reward function can compare them.

    Several processes end at about the same time if the last shards are small: each is half of an
    equal share of what is left, but not less than a batch, or than an equal share of the whole.

    Args:
        assignments: The work.
        max_completion_length: Maximum tokens per completion.
        sampler: Suggests batch sizes.
        held: Prompts of the shards on disk, by number, if their plan is lost. These shards keep
            their numbers and the others fill the gaps.
        num_processes: How many share the work. The order of the prompts doesn't depend on it.
    """
    done = {prompt_id for prompt_ids in held.values() for prompt_id in prompt_ids}
    lengths = {a.row.prompt_id: len(a.prompt_ids) for a in assignments}
    ordered = sorted(assignments, key=lambda a: (-len(a.prompt_ids), a.row.prompt_id))
    ordered = [a for a in ordered if a.row.prompt_id not in done]
    shards: list[Shard] = []
    start = 0
    left = total = sum(len(a.sample_indices) for a in ordered)
    while start < len(ordered):
        batch_size = sampler.suggest_batch_size(
            len(ordered[start].prompt_ids), max_completion_length
        )
        most = float(BATCHES_PER_SHARD * batch_size)
        if num_processes > 1:
            least = min(batch_size, total / num_processes)
            most = min(most, max(least, left / (2 * num_processes)))
        end, num_samples = start, 0
        while end < len(ordered) and num_samples < most:
            num_samples += len(ordered[end].sample_indices)
            end += 1
        left -= num_samples
        shards.append(Shard(tuple(a.row.prompt_id for a in ordered[start:end]), batch_size))
        start = end
    for number in sorted(held):
        longest = max((lengths[prompt_id] for prompt_id in held[number]), default=1)
        batch_size = sampler.suggest_batch_size(longest, max_completion_length)
        shards += [Shard((), 1)] * (number - len(shards))  # a number that is gone holds nothing
        shards.insert(number, Shard(held[number], batch_size))
    return shards


def save_plan(path: Path, shards: Sequence[Shard]) -> None:
    """Write the plan of a phase."""
    content = [{"prompt_ids": s.prompt_ids, "batch_size": s.batch_size} for s in shards]
    save_text(path, json.dumps(content))


def load_plan(path: Path, assignments: Sequence[Assignment]) -> list[Shard] | None:
    """Return the shards that are planned on disk; None without a plan, or if it can't be read.

    Raises:
        ValueError: The plan is for other prompts.
    """
    try:
        shards = read_plan(path, "The phase is planned anew around the shards that are there.")
    except DamagedFileError as error:
        logger.warning("%s", error)
        return None
    if shards is None:
        return None
    planned = {prompt_id for shard in shards for prompt_id in shard.prompt_ids}
    if planned != {a.row.prompt_id for a in assignments}:
        raise ValueError(
            f"{path} plans {len(planned)} prompts that are not the {len(assignments)} of this run: "
            "the dataset, `num_prompts_per_round` or what these prompts are made from changed. Use "
            f"another `output_dir`, or delete {path.parent} to sample this phase anew."
        )
    return shards


def read_plan(path: Path, remedy: str = BRING_BACK) -> list[Shard] | None:
    """Return the shards of a phase, by number; None without a plan on disk.

    Raises:
        DamagedFileError: It is there and can't be read; `remedy` says what to do.
    """
    if not path.exists():
        return None
    with naming_damage(path, remedy):
        plan = json.loads(path.read_text())
        return [Shard(tuple(map(str, s["prompt_ids"])), int(s["batch_size"])) for s in plan]


def sampled_prefixes(folder: Path) -> list[str]:
    """Return the prefixes of the plans in a folder of samples, those with hints after the others.

    An agent's steps have a plan each, in their order.
    """
    prefixes = [path.name.removesuffix("plan.json") for path in folder.glob("*plan.json")]
    return sorted(prefixes, key=lambda prefix: (prefix == "hint-", len(prefix), prefix))


def save_engine(path: Path, shard: str, record: Mapping[str, Any]) -> None:
    """Write down which engine sampled a shard, beside what is known of the phase's other shards."""
    save_text(path, json.dumps({**load_engines(path), shard: dict(record)}, indent=1))


def load_engines(path: Path) -> dict[str, dict[str, Any]]:
    """Return the record of the engine that sampled each shard last, by the shard's name.

    Returns:
        Nothing for shards that were sampled in the training process.

    Raises:
        DamagedFileError: The file can't be read.
    """
    if not path.exists():
        return {}
    with naming_damage(path, "Delete it; only reports read it."):
        return dict(json.loads(path.read_text()))


def held_prompts(
    folder: Path, prefix: str, assignments: Sequence[Assignment]
) -> dict[int, tuple[str, ...]]:
    """Return the planned prompts that shards on disk hold, by the shard's number."""
    left = {a.row.prompt_id for a in assignments}
    held: dict[int, tuple[str, ...]] = {}
    for path in sorted(folder.glob(f"{prefix}[0-9]*.parquet")):
        prompt_ids = tuple(dict.fromkeys(r.prompt_id for r in load_shard(path)))
        held[int(path.stem.removeprefix(prefix))] = tuple(p for p in prompt_ids if p in left)
        left -= set(prompt_ids)
    return held


def load_shard(path: Path) -> list[Rollout]:
    """Return what a shard holds; nothing if it isn't there or can't be read."""
    if not path.exists():
        return []
    try:
        return load_rollouts(path, "Its prompts are sampled again, the other shards are kept.")
    except DamagedFileError as error:
        logger.warning("%s", error)
        return []


def split_found(
    found: Sequence[Rollout], assignments: Sequence[Assignment]
) -> tuple[list[Rollout], list[Assignment]]:
    """Return the planned samples among those found, and what remains to be sampled."""
    by_key = {(r.prompt_id, r.sample_index, r.prompt_ids): r for r in found}
    kept: list[Rollout] = []
    missing = []
    for a in assignments:
        held = [by_key.get((a.row.prompt_id, i, a.prompt_ids)) for i in a.sample_indices]
        kept += [rollout for rollout in held if rollout is not None]
        rest = tuple(i for i, r in zip(a.sample_indices, held, strict=True) if r is None)
        if rest:
            missing.append(replace(a, sample_indices=rest))
    return kept, missing
