"""Sequences of rollouts that lie on disk and are read when they are needed.

In: shards, or rollouts in memory. Out: `Rollouts`, of which memory holds two numbers per rollout and,
while iterating, one shard or one band.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import W_OK, access
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from trl_selfplay.disk import BRING_BACK, DamagedFileError, naming_damage
from trl_selfplay.rollouts.record import (
    SCHEMA,
    Rollout,
    load_table,
    to_rollouts,
    to_table,
    to_values,
)

# Rollouts that are brought into another order together. More take more memory, fewer more files.
_BAND = 8192
# Rollouts that are turned into records together.
_SLICE = 1024
_PLACE = "place"


@dataclass(frozen=True, slots=True)
class StoredShard:
    """A shard on disk, and the prompts that were planned for it."""

    path: Path
    prompt_ids: tuple[str, ...]

    def load(self, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
        """Read it, or some of its columns.

        Raises:
            DamagedFileError: It is gone, can't be read, or lacks a prompt.
        """
        table = load_table(self.path, columns=columns)
        if "prompt_id" in columns:
            held = set(table.column("prompt_id").unique().to_pylist())
            if missing := set(self.prompt_ids) - held:
                plan = self.path.with_name(f"{self.path.stem.rstrip('0123456789')}plan.json")
                raise DamagedFileError(
                    f"{self.path} lacks {len(missing)} of the {len(self.prompt_ids)} prompts that {plan} "
                    f"says were sampled into it: one of the two is damaged. {BRING_BACK}"
                )
        return table

    def rollouts(self) -> list[Rollout]:
        """Read all of its rollouts.

        Raises:
            DamagedFileError: As `load`.
        """
        return to_rollouts(self.load())


class Rollouts(Sequence[Rollout]):
    """Rollouts in a fixed order, on disk or in memory; those on disk are read on demand.

    Iterating reads each shard once. In the order of the shards, one shard is in memory at a time; for
    any other order, tokens and texts pass through temporary files. A single index reads a whole shard.
    Two of them are equal if they have the same records in the same order.

    Raises:
        DamagedFileError: When read: a shard can't be read, lacks a prompt, or is gone.
    """

    def __init__(
        self,
        parts: Sequence[StoredShard | Sequence[Rollout]],
        part: np.ndarray,
        row: np.ndarray,
        numbers: np.ndarray | None = None,
    ) -> None:
        """Build from places: `part[i]` and `row[i]` say where rollout i lies.

        Args:
            parts: Shards, and rollouts in memory.
            part: Index in `parts` of each rollout.
            row: Index within its part.
            numbers: Replaces the `sample_index` of each; None leaves them.
        """
        self._parts = tuple(parts)
        self._part, self._row, self._numbers = part, row, numbers

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> "Rollouts":
        """Return rollouts as a `Rollouts`."""
        if isinstance(rollouts, Rollouts):
            return rollouts
        count = len(rollouts)
        return cls([rollouts], np.zeros(count, np.int32), np.arange(count, dtype=np.int32))

    @classmethod
    def stored(cls, shards: Iterable[StoredShard]) -> Self:
        """Return all rollouts of some shards, in their order.

        Raises:
            DamagedFileError: A shard can't be read.
        """
        parts, counts = list(shards), []
        for shard in parts:
            with naming_damage(shard.path, BRING_BACK):
                counts.append(pq.read_metadata(shard.path).num_rows)
        row = [np.arange(count, dtype=np.int32) for count in counts]
        part = np.repeat(np.arange(len(parts), dtype=np.int32), counts)
        return cls(parts, part, np.concatenate(row) if row else part)

    def __len__(self) -> int:
        return len(self._part)

    @overload
    def __getitem__(self, index: int) -> Rollout: ...
    @overload
    def __getitem__(self, index: slice) -> "Rollouts": ...
    def __getitem__(self, index: int | slice) -> "Rollout | Rollouts":
        """Return one rollout, or a part of them."""
        places = np.arange(len(self))[index]
        if isinstance(index, slice):
            return self.pick(places)
        return next(iter(self.pick(places[None])))

    def __add__(self, other: Sequence[Rollout]) -> "Rollouts":
        """Return these rollouts, followed by others.

        Raises:
            ValueError: Some of them are renumbered.
        """
        more = Rollouts.of(other)
        if not len(more):
            return self
        if self._numbers is not None or more._numbers is not None:
            raise ValueError("renumbered rollouts can't be joined with others.")
        part = np.concatenate([self._part, more._part + np.int32(len(self._parts))])
        row = np.concatenate([self._row, more._row])
        return Rollouts((*self._parts, *more._parts), part, row)

    def __radd__(self, other: Sequence[Rollout]) -> "Rollouts":
        """Return rollouts in memory, followed by these."""
        return Rollouts.of(other) + self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # like a list

    def __repr__(self) -> str:
        return f"<{len(self)} rollouts>"

    def pick(self, places: Sequence[int] | np.ndarray) -> "Rollouts":
        """Return the rollouts at these places, in this order; one may be there several times."""
        chosen = np.asarray(places, dtype=np.int64)
        numbers = None if self._numbers is None else self._numbers[chosen]
        return Rollouts(self._parts, self._part[chosen], self._row[chosen], numbers)

    def renumbered(self, numbers: np.ndarray) -> "Rollouts":
        """Return the rollouts with other values of `sample_index`."""
        return Rollouts(self._parts, self._part, self._row, numbers)

    def __iter__(self) -> Iterator[Rollout]:
        """Yield the rollouts in their order."""
        if not any(isinstance(self._parts[part], StoredShard) for part in np.unique(self._part)):
            yield from self._in_memory(range(len(self)))
        elif np.all(self._part[1:] >= self._part[:-1]):
            for _, rollout in self.scan():
                yield rollout
        else:
            yield from self._reordered()

    def scan(self) -> Iterator[tuple[int, Rollout]]:
        """Yield each place and its rollout, shard by shard: the fastest order to read them in."""
        for part, places in self._by_part():
            if isinstance(part, StoredShard):
                rollouts = to_rollouts(self._taken(part.load(), places))
            else:
                rollouts = self._in_memory(places.tolist())
            yield from zip(places.tolist(), rollouts, strict=True)

    def columns(self, *names: str) -> list[list[Any]]:
        """Return some fields of all rollouts, one list per field, reading nothing else from disk.

        Equal texts are one object.
        """
        found: list[list[Any]] = [[None] * len(self) for _ in names]
        known: dict[str, str] = {}
        for places, table in self._tables(names):
            for name, values in zip(names, found, strict=True):
                for place, value in zip(places.tolist(), to_values(table, name), strict=True):
                    values[place] = known.setdefault(value, value) if type(value) is str else value
        return found

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the policy wrote; reading it reads nothing else from disk."""
        count = 0
        for _, table in self._tables(["completion_ids", "completion_mask"]):
            count += count_values(table.column("completion_ids"))
            mask = table.column("completion_mask")
            if mask.null_count < len(mask):
                count -= pc.sum(pc.invert(pc.list_flatten(mask))).as_py() or 0
        return count

    def _by_part(self) -> Iterator[tuple[StoredShard | Sequence[Rollout], np.ndarray]]:
        """Yield each part that is used, and the places of its rollouts."""
        order = np.argsort(self._part, kind="stable")
        starts = np.flatnonzero(np.diff(self._part[order])) + 1
        for places in np.split(order, starts) if len(order) else ():
            yield self._parts[self._part[places[0]]], places

    def _in_memory(self, places: Iterable[int]) -> list[Rollout]:
        """Return rollouts of parts that are in memory."""
        found = []
        for place in places:
            part: Any = self._parts[self._part[place]]
            rollout = part[self._row[place]]
            if self._numbers is not None:
                rollout = replace(rollout, sample_index=int(self._numbers[place]))
            found.append(rollout)
        return found

    def _taken(self, table: pa.Table, places: np.ndarray) -> pa.Table:
        """Return the rows of a shard that lie at these places."""
        rows = self._row[places]
        if len(rows) != len(table) or not np.array_equal(rows, np.arange(len(rows))):
            table = table.take(pa.array(rows))
        if self._numbers is not None and "sample_index" in table.column_names:
            column = table.column_names.index("sample_index")
            numbers = pa.array(self._numbers[places], pa.int32())
            table = table.set_column(column, table.field(column), numbers)
        return table

    def _tables(self, columns: Sequence[str]) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Yield places, and the table of the rollouts there, part by part."""
        for part, places in self._by_part():
            if isinstance(part, StoredShard):
                yield places, self._taken(part.load(columns), places)
            else:
                yield places, to_table(self._in_memory(places.tolist())).select(list(columns))

    def _reordered(self) -> Iterator[Rollout]:
        """Yield the rollouts in their order, each band of places through a file of its own."""
        with ExitStack() as stack:
            bands = [
                stack.enter_context(_Band(self._writable_folder()))
                for _ in range(0, len(self), _BAND)
            ]
            for places, table in _in_batches(self._tables(SCHEMA.names)):
                numbers = places // _BAND
                table = table.append_column(_PLACE, pa.array(places))
                for number in np.unique(numbers):
                    bands[number].add(table.filter(pa.array(numbers == number)))
            for band in bands:
                table = band.take()
                for start in range(0, len(table), _SLICE):
                    yield from to_rollouts(table.slice(start, _SLICE))

    def _writable_folder(self) -> str | None:
        """Return a folder of the shards, whose disk has room for as much, or None for the system's."""
        for part in self._parts:
            if isinstance(part, StoredShard):
                folder = part.path.parent
                return str(folder) if access(folder, W_OK) else None
        return None


def count_values(column: pa.ChunkedArray) -> int:
    """Return the number of values in all lists of a column."""
    return pc.sum(pc.list_value_length(column)).as_py() or 0


class _Band:
    """Rollouts of consecutive places; a file that nobody else sees holds all but small ones."""

    def __init__(self, folder: str | None) -> None:
        self._file: Any = SpooledTemporaryFile(max_size=2**20, dir=folder)  # noqa: SIM115
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, table: pa.Table) -> None:
        """Add some of them."""
        if self._writer is None:
            self._writer = pa.ipc.new_stream(self._file, table.schema)
        self._writer.write_table(table)

    def take(self) -> pa.Table:
        """Return all of them in their order, and give up the file."""
        self._writer.close()
        self._file.seek(0)
        with pa.ipc.open_stream(self._file) as stream:
            table = stream.read_all().combine_chunks()
        self._file.close()
        return table.take(pc.sort_indices(table.column(_PLACE)))


def _in_batches(
    tables: Iterable[tuple[np.ndarray, pa.Table]],
) -> Iterator[tuple[np.ndarray, pa.Table]]:
    """Join small tables, since each takes time of its own."""
    places: list[np.ndarray] = []
    joined: list[pa.Table] = []
    for of_table, table in tables:
        places.append(of_table)
        joined.append(table)
        if sum(map(len, places)) >= _BAND:
            yield np.concatenate(places), pa.concat_tables(joined).combine_chunks()
            places, joined = [], []
    if joined:
        yield np.concatenate(places), pa.concat_tables(joined).combine_chunks()
