"""The record of one completion, and the Parquet files that store such records.

In: completions from a sampler. Out: `Rollout`s, which are all that passes between the stages of a
round, and shards on disk, which are either complete or absent.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import compress, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trl_selfplay.disk import BRING_BACK, CHECKED, NewerFormatError, naming_damage, save_table
from trl_selfplay.generation.sampler import Finish, Halt, Phase


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion of one prompt, with the exact sampled tokens.

    Attributes:
        round_index: The round that sampled it, counted from 0; -1 is the untrained model.
        phase: "train", "hint", "eval", "gold" (a human completion, `round_index` -1), or "judge"
            (what the policy says of other completions, which isn't graded).
        prompt_id: 128-bit hash, as 32 hex digits, of the canonical JSON of (prompt, solution) and of
            the row's `tools` and `chat_template_kwargs` if it has any. If rows differ only in columns
            that reward functions read, these columns are hashed as well.
        sample_index: Index among the prompt's samples; hinted ones start at `num_generations`.
        prompt_ids: Tokens of the prompt as sampled from, with few-shot examples and hint; empty for the
            answer of an agent's trajectory, which has no prompt of its own.
        completion_ids: Sampled tokens, with EOS only if it was sampled; of an agent's answer, those of its
            text.
        prompt: `prompt_ids` as text, for readers; of an agent's answer, the last step's. Training never
            reads it.
        completion: What the policy wrote as text without special tokens, for graders and readers.
            Of a trajectory, its turns in order, each beginning on a line of its own; what its tools
            answered stands in `messages` alone.
        finish: "eos", "stop" (a stop string) or "length" (truncated).
        hinted: True if sampled with the answer as a hint (rationalization).
        logprob: Sum of the log-probs of the policy's own tokens under the distribution that they
            were sampled from, or None.
        reward: Weighted sum of `rewards`, or None if every function abstained.
        rewards: Score of each function, None if it abstained; empty while ungraded.
        causes: Why each function abstained; None for one that scored it or named no cause. Empty if
            no cause is known.
        completion_mask: For each of `completion_ids`, whether the policy wrote it. Other tokens come
            from a tool or an environment and are never trained on. None: it wrote all of them.
        messages: The turns of a trajectory as chat messages, those of tools among them; empty for
            a single turn without tools.
        environment_reward: What the trajectory's environment gave for it, or None.
        halt: Why the trajectory ended before the policy gave an answer: "malformed" (a call that
            can't be read) or "tool_limit" (a call after the last one allowed); None if it didn't.
        num_failed_calls: How many of `num_calls` failed.
        num_rerendered_turns: How many turns with calls would have other tokens if their messages were
            rendered again; the sampled ones stay.

    Raises:
        ValueError: `completion_mask` and `completion_ids` differ in length.
    """

    round_index: int
    phase: Phase
    prompt_id: str
    sample_index: int
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    prompt: str
    completion: str
    finish: Finish
    hinted: bool = False
    logprob: float | None = None
    reward: float | None = None
    rewards: tuple[float | None, ...] = ()
    completion_mask: tuple[bool, ...] | None = None
    causes: tuple[str | None, ...] = ()
    messages: tuple[Mapping[str, Any], ...] = ()
    environment_reward: float | None = None
    halt: Halt | None = None
    num_failed_calls: int = 0
    num_rerendered_turns: int = 0

    def __post_init__(self) -> None:
        """Check the length of the mask."""
        mask, count = self.completion_mask, len(self.completion_ids)
        if mask is not None and len(mask) != count:
            raise ValueError(
                f"completion_mask has {len(mask)} entries for {count} completion_ids; give one per "
                "token, or None where the policy wrote all of them."
            )

    @property
    def own_ids(self) -> tuple[int, ...]:
        """The tokens that the policy wrote."""
        if self.completion_mask is None:
            return self.completion_ids
        return tuple(compress(self.completion_ids, self.completion_mask))

    @property
    def num_calls(self) -> int:
        """The number of calls whose results the policy read."""
        return sum(message.get("role") == "tool" for message in self.messages)

    @property
    def is_graded(self) -> bool:
        """Whether reward functions have graded it."""
        return len(self.rewards) > 0

    @property
    def is_truncated(self) -> bool:
        """Whether it is truncated; truncated completions are never trained on."""
        return self.finish == "length"

    @property
    def is_finished(self) -> bool:
        """Whether the policy came to an end; completions without one are never trained on."""
        return not self.is_truncated and self.halt is None

    @property
    def cause(self) -> str | None:
        """Why it has no reward: the first cause that a function named, or None."""
        known = (cause for cause in self.causes if cause is not None)
        return next(known, None) if self.reward is None else None

    def passes(self, threshold: float) -> bool:
        """Return whether it is finished and its reward is at least the threshold."""
        return self.is_finished and self.reward is not None and self.reward >= threshold


# The format of the files, in their metadata. 1, which files without a number have, lacks
# `completion_mask`; 2 lacks `causes`; 3 lacks the columns of trajectories.
FORMAT = 4
_FORMAT_KEY = b"trl_selfplay_rollouts_format"
# The columns that later formats brought: since which, and what earlier rollouts have there.
_BROUGHT: dict[str, tuple[int, Any]] = {
    "completion_mask": (2, None),
    "causes": (3, []),
    "messages": (4, None),
    "environment_reward": (4, None),
    "halt": (4, None),
    "num_failed_calls": (4, 0),
    "num_rerendered_turns": (4, 0),
}
SCHEMA = pa.schema(
    [
        ("round_index", pa.int32()),
        ("phase", pa.string()),
        ("prompt_id", pa.string()),
        ("sample_index", pa.int32()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("finish", pa.string()),
        ("hinted", pa.bool_()),
        ("logprob", pa.float64()),
        ("reward", pa.float64()),
        ("rewards", pa.list_(pa.float64())),
        ("completion_mask", pa.list_(pa.bool_())),
        ("causes", pa.list_(pa.string())),
        ("messages", pa.string()),  # JSON, null if there are none
        ("environment_reward", pa.float64()),
        ("halt", pa.string()),
        ("num_failed_calls", pa.int32()),
        ("num_rerendered_turns", pa.int32()),
    ],
    metadata={_FORMAT_KEY: str(FORMAT).encode()},
)


def hash_prompt(
    prompt: Any,
    solution: Any,
    template_arguments: Mapping[str, Any] | None = None,
    columns: Mapping[str, Any] | None = None,
) -> str:
    """Return a row's `prompt_id`: 32 hex digits, equal everywhere.

    Args:
        prompt: Text or messages.
        solution: The ground truth, or None.
        template_arguments: The row's other arguments for the chat template; if empty, the id is that
            of prompt and solution.
        columns: Other columns that distinguish the row; if empty, they don't change the id.
    """
    row = [prompt, solution]
    if template_arguments or columns:
        row.append(dict(template_arguments or {}))
    if columns:
        row.append(dict(columns))
    canonical = json.dumps(
        row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str
    )
    # A lone surrogate, which Python text may contain, can't be encoded as UTF-8.
    encoded = canonical.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def save_rollouts(path: Path, rollouts: Sequence[Rollout]) -> None:
    """Write one shard atomically.

    Raises:
        OSError: The disk is full or the folder isn't writable. The shard is then absent or unchanged.
    """
    save_table(path, to_table(rollouts))


def load_rollouts(path: Path, remedy: str = BRING_BACK) -> list[Rollout]:
    """Read one shard.

    Raises:
        DamagedFileError: The file is truncated, isn't Parquet or lacks a column.
        NewerFormatError: A later version of the package wrote it.
    """
    table = load_table(path, remedy)
    with naming_damage(path, remedy):
        return to_rollouts(table)


def load_table(
    path: Path, remedy: str = BRING_BACK, columns: Sequence[str] = SCHEMA.names
) -> pa.Table:
    """Read one shard, or some of its columns, as a table of the newest format.

    Raises:
        DamagedFileError, NewerFormatError: As `load_rollouts`.
    """
    with naming_damage(path, remedy), pq.ParquetFile(path, **CHECKED) as file:
        version = int((file.schema_arrow.metadata or {}).get(_FORMAT_KEY, b"1"))
        if version > FORMAT:
            raise NewerFormatError(
                f"{path} has format {version} of rollouts, and this version of trl-selfplay reads "
                f"formats up to {FORMAT}. Go on with the version that wrote it, or a later one: "
                "pip install --upgrade trl-selfplay."
            )
        brought = {name: since for name, (since, _) in _BROUGHT.items()}
        table = file.read([name for name in columns if version >= brought.get(name, 1)])
        for name in set(columns) - set(table.column_names):
            if version >= brought.get(name, 1):
                raise KeyError(f"there is no column {name!r}")
            _, nothing = _BROUGHT[name]
            absent = pa.array([nothing] * len(table), SCHEMA.field(name).type)
            table = table.append_column(name, absent)
        schema = pa.schema([SCHEMA.field(name) for name in columns], SCHEMA.metadata)
        return table.select(list(columns)).cast(schema)


def to_table(rollouts: Sequence[Rollout]) -> pa.Table:
    """Return rollouts as a table with one column per field."""
    columns = {
        field.name: pa.array(
            [to_stored(field.name, getattr(r, field.name)) for r in rollouts],
            type=SCHEMA.field(field.name).type,
        )
        for field in fields(Rollout)
    }
    return pa.table(columns, schema=SCHEMA)


def to_stored(name: str, value: Any) -> Any:
    """Return the value of a field of `Rollout` as files have it: tuples as lists, messages as JSON."""
    if name == "messages":  # in ASCII: a lone surrogate can't be written as UTF-8
        return json.dumps(value, default=str) if value else None
    return list(value) if isinstance(value, tuple) else value


def to_rollouts(table: pa.Table) -> list[Rollout]:
    """Return the rollouts of a table with the columns of `SCHEMA`."""
    columns = (to_values(table, field.name) for field in fields(Rollout))
    return list(map(Rollout, *columns))


def to_values(table: pa.Table, name: str) -> list[Any]:
    """Return the values of a table's column as fields of `Rollout` have them."""
    column = table.column(name)
    if name == "messages":
        return [tuple(json.loads(text)) if text else () for text in column.to_pylist()]
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    if column.type.value_type != pa.int32() or column.null_count:
        return [value if value is None else tuple(value) for value in column.to_pylist()]
    values: list[Any] = []
    for chunk in column.chunks:  # of token ids: all of them at once, since one by one is slow
        offsets = chunk.offsets.to_numpy().tolist()
        tokens = chunk.values.to_numpy().tolist()
        values += [tuple(tokens[start:end]) for start, end in pairwise(offsets)]
    return values
