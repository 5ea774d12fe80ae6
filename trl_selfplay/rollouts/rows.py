"""Turn selected rollouts into the rows that the parent trains on.

In: selected rollouts and their training prompts without hints, or pairs of completions. Out: a dataset
of `input_ids` and `labels`, or of both sides of pairs. It is final: nothing tokenizes, truncates or
masks it again.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import Accelerator
from datasets import Dataset, load_from_disk

from trl_selfplay.disk import is_found, replace_folder, save_checksums
from trl_selfplay.peers import wait_for_all
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.sequence import Rollouts

IGNORE_INDEX = -100
WEIGHT = "weight"
LENGTH = "length"  # the default of `length_column_name`
_TOKENS = pa.list_(pa.int32())
_BATCH = 1000  # rows that are written together
# (reward of each row, number of tokens to learn of each row) → weight of each row.
RowWeights = Callable[[Sequence[float | None], Sequence[int]], list[float]]


def training_completion_ids(rollout: Rollout, eos_token_id: int) -> tuple[int, ...]:
    """Return the tokens to learn after the prompt: exactly the sampled ones.

    A completion that ended with a stop string has no EOS, so one is added for the model to learn to
    stop there.
    """
    if rollout.finish == "stop":
        return (*rollout.completion_ids, eos_token_id)
    return rollout.completion_ids


def build_training_rows(
    rollouts: Sequence[Rollout],
    prompt_ids: Mapping[str, tuple[int, ...]],
    eos_token_id: int,
    seed: int,
    weigh: RowWeights | None = None,
    completion_only: bool = True,
    folder: Path | None = None,
) -> Dataset:
    """Build the dataset of one round, shuffled under `seed`.

    Args:
        rollouts: The selected rollouts, in an order that doesn't depend on sampling.
        prompt_ids: The tokens of each prompt as trained on, by prompt id: without the hint, and
            without few-shot examples unless configured.
        eos_token_id: Added after completions that ended with a stop string.
        seed: Seed of the shuffle. The parent draws the same row order in every round, so the rows
            themselves must be shuffled.
        completion_only: If True, only completions are learned; else prompts as well.
        weigh: Returns the values of a column `weight`; None adds no column.
        folder: Where the dataset is written, so that it isn't in memory; None keeps it there.

    Returns:
        Columns `input_ids` and `labels` (-100 on prompt tokens that aren't learned and on completion
        tokens that the policy didn't write), and `weight` if requested.

    Source: STaR, arXiv 2203.14465, Eq. 2: the gradient is that of log p(rationale, answer | x),
    with x unhinted, so prompt tokens carry no loss.
    """

    def row_of(rollout: Rollout) -> tuple[list[int], list[int]]:
        prompt = prompt_ids[rollout.prompt_id]
        completion = training_completion_ids(rollout, eos_token_id)
        learnt = [IGNORE_INDEX] * len(prompt) if completion_only else prompt
        return [*prompt, *completion], [*learnt, *_own_tokens(rollout, completion)]

    examples = Rollouts.of(rollouts)
    order = shuffled_order(len(examples), seed)
    schema = pa.schema([("input_ids", _TOKENS), ("labels", _TOKENS)])
    weights: list[float] = []
    if weigh is not None:
        schema = schema.append(pa.field(WEIGHT, pa.float64()))
        rewards: list[float | None] = [None] * len(examples)
        lengths = [0] * len(examples)
        for place, rollout in examples.scan():
            rewards[place] = rollout.reward
            lengths[place] = sum(label != IGNORE_INDEX for label in row_of(rollout)[1][1:])
        weights = weigh(rewards, lengths)

    def rows() -> Iterator[tuple[Any, ...]]:
        for place, rollout in zip(order, examples.pick(order), strict=True):
            yield (*row_of(rollout), *weights[place : place + 1])

    return _collect(rows(), schema, folder)


def _own_tokens(rollout: Rollout, completion: tuple[int, ...]) -> tuple[int, ...]:
    """Return a training completion with -100 for tokens that the policy didn't write."""
    mask = _training_mask(rollout, completion)
    if mask is None:
        return completion
    return tuple(t if own else IGNORE_INDEX for t, own in zip(completion, mask, strict=True))


def _training_mask(rollout: Rollout, completion: tuple[int, ...]) -> tuple[bool, ...] | None:
    """Return which tokens of a training completion are learned, or None for all."""
    mask = rollout.completion_mask
    if mask is None:
        return None
    return (*mask, *[True] * (len(completion) - len(mask)))  # an EOS that was added is learnt


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen and a rejected completion of one prompt, as tokens.

    A mask says which tokens of a completion the policy wrote; None: all of them.
    """

    prompt_id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_mask: tuple[bool, ...] | None = None
    rejected_mask: tuple[bool, ...] | None = None


def pair_of(
    chosen: Rollout, rejected: Rollout, prompt_ids: tuple[int, ...], eos_token_id: int
) -> Pair:
    """Return two rollouts of one prompt as a pair; `prompt_ids` is the prompt as trained on."""
    chosen_ids, rejected_ids = (
        training_completion_ids(r, eos_token_id) for r in (chosen, rejected)
    )
    return Pair(
        prompt_id=chosen.prompt_id,
        prompt_ids=prompt_ids,
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        chosen_mask=_training_mask(chosen, chosen_ids),
        rejected_mask=_training_mask(rejected, rejected_ids),
    )


def build_pair_rows(pairs: Iterable[Pair], folder: Path | None = None) -> Dataset:
    """Build the rows of DPOTrainer, still without the reference's log-probs.

    Args:
        pairs: Pairs in the order of the rows.
        folder: Where the dataset is written, so that it isn't in memory; None keeps it there.

    Returns:
        The fields of `Pair` as columns, masks only if a pair has one; and `length`, the tokens of the
        longer side, by which the parent can group rows.
    """
    names = [field.name for field in fields(Pair)]
    unused = {name for name in names if name.endswith("_mask")}

    def rows() -> Iterator[tuple[Any, ...]]:
        for pair in pairs:
            values = tuple(getattr(pair, name) for name in names)
            unused.difference_update(n for n, v in zip(names, values, strict=True) if v is not None)
            longer = max(len(pair.chosen_ids), len(pair.rejected_ids))
            yield len(pair.prompt_ids) + longer, *values

    types = {"prompt_id": pa.string(), **dict.fromkeys(unused, pa.list_(pa.bool_()))}
    schema = pa.schema(
        [(LENGTH, pa.int64()), *((name, types.get(name, _TOKENS)) for name in names)]
    )
    return _collect(rows(), schema, folder).remove_columns(sorted(unused))


def shuffled_order(count: int, seed: int) -> list[int]:
    """Return the order of `count` rows that `Dataset.shuffle` gives them."""
    return list(Dataset.from_dict({"place": range(count)}).shuffle(seed=seed)["place"])


def count_values(rows: Dataset, column: str) -> np.ndarray:
    """Return the length of each list of a column."""
    tables = rows.select_columns([column]).with_format("arrow").iter(_BATCH)
    lengths = [pc.list_value_length(table.column(column)).to_numpy() for table in tables]
    return np.concatenate([np.zeros(0, np.int32), *lengths])


def build_on_main(
    accelerator: Accelerator, folder: Path, build: Callable[[Path], Dataset]
) -> Dataset:
    """Return rows that the main process builds in a folder, and the others read from there.

    Args:
        accelerator: Of the process.
        folder: Of the dataset.
        build: Writes the dataset into the folder and returns it.
    """
    rows = build(folder) if accelerator.is_main_process else None
    wait_for_all(accelerator)
    if rows is None:
        is_found(folder / "state.json")
        rows = cast("Dataset", load_from_disk(str(folder)))
    return rows


def save_dataset(folder: Path, rows: Dataset) -> Dataset:
    """Write a dataset atomically; return it as it is read from disk."""
    tables = rows.with_format("arrow").iter(_BATCH)
    return save_rows(folder, tables, rows.features.arrow_schema)


def save_rows(folder: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> Dataset:
    """Write a dataset atomically, table by table; return it as it is read from disk."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    # Saved whole, a dataset would pass through memory: only what describes it is saved so.
    described = Dataset(
        pa.table([pa.nulls(1, field.type) for field in schema], schema=schema),
        fingerprint=uuid4().hex[:16],
    )
    described.save_to_disk(str(temporary))
    (path,) = temporary.glob("*.arrow")
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for table in tables:
            writer.write_table(table)
    save_checksums(temporary)
    replace_folder(temporary, folder)
    return cast("Dataset", load_from_disk(str(folder)))


def _collect(rows: Iterable[tuple[Any, ...]], schema: pa.Schema, folder: Path | None) -> Dataset:
    """Return rows as a dataset in memory, or in a folder."""

    def tables() -> Iterator[pa.Table]:
        left = iter(rows)
        while batch := list(islice(left, _BATCH)):
            columns = zip(zip(*batch, strict=True), schema, strict=True)
            yield pa.table([pa.array(values, field.type) for values, field in columns], schema)

    if folder is not None:
        return save_rows(folder, tables(), schema)
    return Dataset(pa.concat_tables([schema.empty_table(), *tables()]).combine_chunks())
