"""The training prompts as the dataset has them, kept beside a run for what reads it later.

In: `PromptRow`s. Out: one Parquet file, and the prompts by id. Rollouts have only the rendered prompt, with
special tokens, few-shot examples and hints; rows for other trainers need the dataset's own.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from trl_selfplay.disk import BRING_BACK, CHECKED, naming_damage, save_table

if TYPE_CHECKING:
    from trl_selfplay.rollouts.prompts import Prompt, PromptRow

_COLUMNS = ("prompt", "solution", "template_arguments")
_TOOLS = "tools"  # of a run without any there is no such column


@dataclass(frozen=True, slots=True)
class KeptPrompt:
    """A prompt of the dataset.

    Attributes:
        prompt: Text or chat messages.
        solution: The ground truth, or for SPIN the data's completion; None without one. What JSON
            doesn't know is text.
        template_arguments: The row's own `tools` and `chat_template_kwargs`, if any.
        tools: What it shows of the run's tools: their schemas, which the chat template gets, or text
            before it; None for nothing.
    """

    prompt: "Prompt"
    solution: Any
    template_arguments: Mapping[str, Any]
    tools: list[Any] | str | None = None


class KeptPrompts:
    """The prompts of a run, decoded when they are asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._columns = [table.column(name).combine_chunks() for name in _COLUMNS]
        if _TOOLS in table.column_names:
            self._columns.append(table.column(_TOOLS).combine_chunks())
        self._places = {p: i for i, p in enumerate(table.column("prompt_id").to_pylist())}

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self._places

    def __getitem__(self, prompt_id: str) -> KeptPrompt:
        """Return a prompt.

        Raises:
            KeyError: There is none with this id.
        """
        place = self._places[prompt_id]
        return KeptPrompt(*(json.loads(column[place].as_py()) for column in self._columns))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)


def keep_prompts(
    path: Path,
    rows: "Sequence[PromptRow]",
    tools_shown: "Callable[[PromptRow], list[Any] | str | None]" = lambda row: None,
) -> None:
    """Write the prompts once; a file that is there stays.

    Args:
        path: The file.
        rows: The prompts.
        tools_shown: Returns what a prompt shows of the run's tools: see `KeptPrompt.tools`.
    """
    if path.exists():
        return
    places: dict[str, int] = {}  # most prompts show the same
    indices = pa.array(
        [places.setdefault(_as_json(shown), len(places)) for shown in map(tools_shown, rows)],
        pa.int32(),
    )
    texts = pa.array([*places], pa.string())
    shows_any = {*places} - {"null"}
    save_prompts(
        path, rows, {_TOOLS: pa.DictionaryArray.from_arrays(indices, texts)} if shows_any else {}
    )


def save_prompts(
    path: Path, rows: "Sequence[PromptRow]", more: Mapping[str, pa.Array] = MappingProxyType({})
) -> None:
    """Write prompts, and further columns."""
    columns = {name: [_as_json(getattr(row, name)) for row in rows] for name in _COLUMNS}
    ids = pa.array([row.prompt_id for row in rows], pa.string())
    texts = {name: pa.array(values, pa.string()) for name, values in columns.items()}
    save_table(path, pa.table({"prompt_id": ids, **texts, **more}))


def load_prompts(path: Path, steps: Iterable[Path] = ()) -> KeptPrompts:
    """Read the prompts.

    Args:
        path: Their file.
        steps: Files of the steps of an agent, whose prompts are read as well.

    Raises:
        FileNotFoundError: An earlier version of the package made the run and kept none.
        DamagedFileError: The file can't be read.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} isn't there: the run was made by a version that didn't keep the dataset's "
            "prompts. Resume it once with train(resume_from_checkpoint=True), also if all its rounds are "
            "finished: that writes the file."
        )
    tables = []
    for each in (path, *steps):
        with naming_damage(each, BRING_BACK):
            names = ["prompt_id", *_COLUMNS, *({_TOOLS} & {*pq.read_schema(each).names})]
            tables.append(pq.read_table(each, columns=names, **CHECKED))
    return KeptPrompts(pa.concat_tables(tables))


def read_questions(path: Path) -> dict[str, str]:
    """Return the prompt id of each step's question, by the step's own; nothing if there is no file.

    Raises:
        DamagedFileError: The file can't be read.
    """
    if not path.exists():
        return {}
    with naming_damage(path, BRING_BACK):
        table = pq.read_table(path, columns=["prompt_id", "question_id"], **CHECKED)
    return dict(zip(*map(pa.ChunkedArray.to_pylist, table.columns), strict=True))


def _as_json(value: Any) -> str:
    """Return JSON in ASCII, which also holds lone surrogates."""
    return json.dumps(value, default=str)
