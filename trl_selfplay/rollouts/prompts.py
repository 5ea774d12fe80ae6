"""Read dataset rows and check them one by one.

In: a dataset with `prompt` (text or chat messages), and optionally `solution`, and `tools` and
`chat_template_kwargs` for the chat template. Out: `PromptRow`s, and held-out sets of them.
rendering.py turns them into tokens.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

from datasets import Dataset, DatasetDict, IterableDataset

from trl_selfplay.confidential import shown
from trl_selfplay.generation.control_tokens import control_tokens, split_tokens
from trl_selfplay.rewards.functions import columns_read
from trl_selfplay.rollouts.record import hash_prompt
from trl_selfplay.tools.offer import Toolbox, as_copy, offered, read_schemas, read_tools

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Prompt = str | Messages
HintFormatter = Callable[[Any, Any], Any]

# Arguments of `apply_chat_template` that rendering decides itself, and how to choose them.
_OWN_ARGUMENTS = {
    "chat_template": "set `tokenizer.chat_template`",
    "tools": "give each row its `tools` in a column of that name",
    "sanitize_control_tokens": "set the config's field of that name, if it has one",
    **dict.fromkeys(
        (
            "conversation",
            "messages",
            "add_generation_prompt",
            "continue_final_message",
            "tokenize",
            "tokenizer_kwargs",
            "padding",
            "truncation",
            "max_length",
            "return_tensors",
            "return_dict",
            "return_assistant_tokens_mask",
        ),
        "leave it out",
    ),
}
_MOST_LEVELS = 100
# Names of held-out sets become parts of paths and metric names, and stand in the model card.
_SET_NAME = re.compile(r"\w(?:[\w .+-]{0,98}[\w+-])?")


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt of the dataset.

    Attributes:
        prompt_id: See `Rollout.prompt_id`.
        prompt: Text or chat messages, as in the dataset.
        solution: The ground truth, as in the dataset; None without the column.
        columns: All columns except `prompt`, for the reward functions.
        row_index: Index of the row in the user's dataset, for error messages.
        source: Name of the dataset, for error messages.
        template_arguments: The row's own `tools` and `chat_template_kwargs`, if any.
        observation: What the row's environment says at its start, which is the end of `prompt`, or None.
        copy: With an environment, where each row is a task of its own: how many equal rows come before it.
    """

    prompt_id: str
    prompt: Prompt
    solution: Any
    columns: Mapping[str, Any]
    row_index: int
    source: str = "train_dataset"
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    observation: Any = None
    copy: int | None = None

    @classmethod
    def of(cls, prompt: Prompt, source: str) -> Self:
        """Return a row of a prompt that is in no dataset, and what to call it in errors."""
        return cls(hash_prompt(prompt, None), prompt, None, {}, 0, source)

    @property
    def is_conversational(self) -> bool:
        """Whether the prompt is chat messages."""
        return not isinstance(self.prompt, str)

    @property
    def task(self) -> Mapping[str, Any]:
        """What its tools and its environment get: the columns, which tell equal rows apart."""
        return as_copy(self.columns, self.copy or 0)

    @property
    def where(self) -> str:
        """Name of the row for error messages."""
        return f"`{self.source}` row {self.row_index}"

    @property
    def question(self) -> str:
        """Text that is equal for rows with the same prompt, or the same task, whatever their solutions."""
        if self.copy is not None:
            task = {name: value for name, value in self.task.items() if name != "solution"}
            return hash_prompt(self.prompt, None, self.template_arguments, task)
        if self.template_arguments:
            return canonical_prompt([self.prompt, self.template_arguments])
        return canonical_prompt(self.prompt)


def load_prompt_rows(
    dataset: Any,
    name: str,
    needs_solution: str | None = None,
    reward_funcs: Any = None,
    toolbox: Toolbox | None = None,
) -> list[PromptRow]:
    """Check a dataset row by row and return its prompts, sorted by `prompt_id`.

    Rows are merged, with one log line, if their prompt, solution, arguments of the chat template and
    columns that reward functions read are equal; with environments, they are tasks of their own, for each of
    which `reset` draws other random numbers. The order of the rows doesn't affect anything later.

    Args:
        dataset: A `datasets.Dataset` with the column `prompt`.
        name: Name of the dataset for errors, such as "train_dataset".
        needs_solution: What uses the column `solution`, for the error; None if nothing does.
        reward_funcs: What grades completions of these prompts, as a trainer takes it.
        toolbox: What completions of these prompts may call. An environment's first words are appended to
            the prompt, which may then be missing, as in GRPOTrainer.

    Raises:
        TypeError: Not a `Dataset`, or a row whose prompt is neither text nor messages.
        ValueError: A column is missing, the dataset is empty, or prompts are of mixed kinds.
    """
    starts = toolbox is not None and toolbox.has_environments
    if dataset is None and starts:
        raise ValueError(
            f"`{name}` is missing. Each round returns to the same prompts, so an environment needs rows that "
            "say which task it is to set: pass a dataset with a column for `reset`, such as "
            'Dataset.from_dict({"seed": range(100)}) for `def reset(self, seed, **kwargs)`.'
        )
    check_dataset(dataset, name, "`prompt`")
    if "prompt" not in dataset.column_names and not starts:
        advice = (
            'Make one of `messages`: `dataset.map(lambda row: {"prompt": row["messages"][:-1]})`.'
            if "messages" in dataset.column_names
            else 'Rename a column with `dataset.rename_column("question", "prompt")`, or on the '
            "command line with --prompt_column question."
        )
        raise ValueError(
            f"`{name}` has no column 'prompt'; its columns are {dataset.column_names}. Each row "
            f"needs a `prompt`: text or chat messages. {advice}"
        )
    if needs_solution and "solution" not in dataset.column_names:
        raise ValueError(
            f"`{name}` has no column 'solution'; its columns are {dataset.column_names}. "
            f"{needs_solution} needs it. Rename a column with "
            '`dataset.rename_column("answer", "solution")`, or on the command line with '
            "--solution_column answer."
        )
    read = columns_read(reward_funcs, dataset.column_names)
    if starts:  # what `reset` draws at random depends on all of them
        read = sorted({*dataset.column_names} - {"prompt", "solution"})
    records = enumerate(as_plain_rows(dataset))
    return collect_rows(((i, r, {c: r[c] for c in read}) for i, r in records), name, toolbox)


def as_plain_rows(dataset: Dataset) -> Dataset:
    """Return a dataset whose rows have text and numbers even if `set_format` makes tensors."""
    return dataset if dataset.format["type"] == "custom" else dataset.with_format(None)


def check_dataset(dataset: Any, name: str, columns: str) -> None:
    """Raise unless this is a finite dataset with rows."""
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"`{name}` is an IterableDataset. Every round samples all prompts again and a resumed "
            "run must find the same ones, so rounds need a finite set: pass a `Dataset`, for "
            "example `Dataset.from_list(list(iterable.take(10_000)))`."
        )
    if not isinstance(dataset, Dataset):
        advice = ""
        if isinstance(dataset, DatasetDict):
            advice = f" Pass one of its splits, {', '.join(map(repr, dataset))}."
        elif isinstance(dataset, list):
            advice = " A list of rows becomes one with `Dataset.from_list(rows)`."
        raise TypeError(
            f"`{name}` must be a `datasets.Dataset` with {columns}; got {type(dataset).__name__}."
            f"{advice}"
        )
    if pictures := sorted({"image", "images"} & set(dataset.column_names)):
        raise ValueError(
            f"`{name}` has a column {pictures[0]!r}, and rounds work on text: no image would reach the "
            "model. Remove the column, or keep to GRPOTrainer for models that read images."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty: there is no prompt to sample from.")


def collect_rows(
    records: Iterable[tuple[int, Mapping[str, Any], Mapping[str, Any]]],
    name: str,
    toolbox: Toolbox | None = None,
) -> list[PromptRow]:
    """Check records one by one and return them as rows, sorted by `prompt_id`.

    Columns that graders read are part of a row's id only if another row would otherwise have the same
    id, or an environment reads them too. All other ids are the same with and without these columns.

    Args:
        records: Tuples of the index in the user's dataset, the record, and what graders read of it
            besides prompt and solution.
        name: What to call the dataset in errors.
        toolbox: What completions of the prompts may call.

    Raises:
        TypeError, ValueError: As `load_prompt_rows`.
    """
    same: dict[str, dict[str, PromptRow]] = {}  # by id, and by the id with what graders read
    kinds: dict[bool, int] = {}
    seen: Counter[str] = Counter()
    count = 0
    for index, record, read in records:
        count += 1
        copy = None
        if toolbox is not None and toolbox.has_environments:
            plain = hash_prompt(record.get("prompt"), record.get("solution"), None, read)
            copy, read = seen[plain], as_copy(read, seen[plain])
            seen[plain] += 1
        row = _build_row(record, index, name, toolbox, copy)
        kinds.setdefault(isinstance(row.prompt, str), index)
        if len(kinds) == 2:
            raise ValueError(
                f"`{name}` mixes plain-text prompts (row {kinds[True]}) and chat messages (row "
                f"{kinds[False]}). Use one kind for all rows."
            )
        full_id = hash_prompt(row.prompt, row.solution, row.template_arguments, read)
        same.setdefault(row.prompt_id, {}).setdefault(full_id, row)
    rows = {
        prompt_id: replace(row, prompt_id=prompt_id)
        for plain_id, by_full_id in same.items()
        for full_id, row in by_full_id.items()
        for prompt_id in (plain_id if len(by_full_id) == 1 and row.copy is None else full_id,)
    }
    if len(rows) < count:
        logger.warning(
            "%s: %d of %d rows repeat an earlier prompt and solution; each is used once.",
            name,
            count - len(rows),
            count,
        )
    if num_copies := count - len(seen) if seen else 0:
        logger.warning(
            "%s: %d of %d rows equal an earlier one. Each is a task of its own, for which the environment draws "
            "other random numbers; drop them if it draws none.",
            name,
            num_copies,
            count,
        )
    return [rows[prompt_id] for prompt_id in sorted(rows)]


def _build_row(
    record: Mapping[str, Any], index: int, name: str, toolbox: Toolbox | None, copy: int | None
) -> PromptRow:
    where = f"`{name}` row {index}"
    check_nesting(record, where)
    columns = {key: value for key, value in record.items() if key != "prompt"}
    observation = None
    if toolbox is not None and copy is not None:
        given = record.get("prompt", [{"role": "user", "content": ""}])
        check_prompt(given, where)
        columns["prompt"] = given  # which `reset` gets as well
        observation = toolbox.observation(as_copy(columns, copy))
        record = {**record, "prompt": _with_observation(given, observation)}
    prompt, solution = record["prompt"], record.get("solution")
    check_prompt(prompt, where)
    for column in ("prompt", "solution"):
        check_encodable(record.get(column), f"{where}: `{column}`")
    arguments = {} if isinstance(prompt, str) else _template_kwargs(record, where)
    if tools := _own_tools(record, where, toolbox, isinstance(prompt, str)):
        arguments["tools"] = tools
    return PromptRow(
        hash_prompt(prompt, solution, arguments),
        prompt,
        solution,
        columns,
        index,
        name,
        arguments,
        observation,
        copy,
    )


def _with_observation(prompt: Any, observation: Any) -> Any:
    """Return a prompt with what its environment says appended to its last message, as in GRPOTrainer."""
    if observation is None:
        return prompt
    if isinstance(prompt, str):
        if not isinstance(observation, str):
            raise TypeError(
                f"an environment's `reset` returned {observation!r:.200}, and the prompts are plain text: "
                "return text, or give chat messages as prompts."
            )
        return prompt + observation
    content = prompt[-1]["content"]
    if isinstance(observation, list) and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if isinstance(observation, str) and isinstance(content, list):
        observation = [{"type": "text", "text": observation}]
    return [*prompt[:-1], {**prompt[-1], "content": content + observation}]


def plain_prompt(row: PromptRow, tokenizer: Any) -> Prompt:
    """Return a row's prompt, with control tokens that its environment spells out split, so that they are text."""
    said = row.observation
    if said is None:
        return row.prompt
    plain = partial(split_tokens, tokens=control_tokens(tokenizer))
    if isinstance(row.prompt, str):
        return row.prompt.removesuffix(said) + plain(said)
    content = row.prompt[-1]["content"]
    if isinstance(content, str):
        content = content.removesuffix(said) + plain(said)
    else:
        count = 1 if isinstance(said, str) else len(said)
        ends = [{**part, "text": plain(part["text"])} for part in content[len(content) - count :]]
        content = content[: len(content) - count] + ends
    return [*row.prompt[:-1], {**row.prompt[-1], "content": content}]


def _own_tools(
    record: Mapping[str, Any], where: str, toolbox: Toolbox | None, is_text: bool
) -> list[Any]:
    """Return the tools that a row names itself; none where it leaves that to the run."""
    if toolbox is not None:
        own = read_tools(record, where)
        return offered(toolbox.schemas_of(record), record, where) if own else []
    return [] if is_text else read_schemas(record, where)


def _template_kwargs(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a row's `chat_template_kwargs`, read as TRL reads them."""
    arguments: dict[str, Any] = {}
    kwargs = record.get("chat_template_kwargs")
    if kwargs:
        check_template_kwargs(kwargs, f"{where}: `chat_template_kwargs`")
        # A table gives every row the keys of all rows, None where a row has none.
        if given := {key: value for key, value in kwargs.items() if value is not None}:
            arguments["chat_template_kwargs"] = given
    return arguments


def check_template_kwargs(kwargs: Any, where: str) -> None:
    """Raise unless these can be passed to the chat template beside what rendering passes itself."""
    if not isinstance(kwargs, Mapping):
        raise TypeError(
            f"{where} is {kwargs!r:.200}; expected a mapping such as {{'enable_thinking': False}}, "
            "empty for none."
        )
    for key in kwargs:
        if not isinstance(key, str):
            raise TypeError(
                f"{where} has the key {key!r:.100}; expected names of arguments as text."
            )
        if key in _OWN_ARGUMENTS:
            raise ValueError(
                f"{where} has {key!r}={shown(kwargs[key], key)}, which rendering decides itself: "
                f"{_OWN_ARGUMENTS[key]}."
            )


def check_prompt(prompt: Any, where: str) -> None:
    """Raise unless `prompt` is non-empty text or a list of messages that can be continued."""
    if isinstance(prompt, str) and prompt.strip():
        return
    if not (isinstance(prompt, list) and prompt and all(_is_message(m) for m in prompt)):
        raise TypeError(
            f"{where}: the prompt is {prompt!r:.200}; expected non-empty text or a non-empty list "
            'of messages such as [{"role": "user", "content": "…"}].'
        )
    for index, message in enumerate(prompt):
        check_message(message, f"{where}, message {index}")
    if prompt[-1]["role"] not in ("user", "assistant", "tool"):
        raise ValueError(
            f"{where}: the last message has the role {prompt[-1]['role']!r}; a chat prompt "
            "ends with a user turn (or an assistant turn to continue)."
        )


def _is_message(message: Any) -> bool:
    return (
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and ("content" in message or bool(message.get("tool_calls")))
    )


def check_message(message: Mapping[str, Any], where: str) -> None:
    """Raise TypeError unless a message's content is text, parts of text, or None beside tool calls."""
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    if isinstance(content, list) and content:
        other = next((p for p in content if not _is_text_part(p)), None)
        if other is None:
            return
        content = f"a list with the part {other!r:.200}"
    else:
        content = f"{content!r:.200}"
    raise TypeError(
        f"{where} (role {message.get('role')!r}): the content is {content}; expected text, or parts "
        'such as {"type": "text", "text": "…"}. Rounds work on text: images and audio are not '
        "supported. Only an assistant turn with `tool_calls` may have no content."
    )


def _is_text_part(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and part.get("type", "text") == "text"
        and isinstance(part.get("text"), str)
    )


def check_embedded(
    ids: list[int], tokenizer: Any, num_embeddings: int | None, where: str
) -> list[int]:
    """Return the tokens, or raise ValueError for those that the model has no embedding for."""
    if num_embeddings is not None and max(ids, default=0) >= num_embeddings:
        unknown = sorted({i for i in ids if i >= num_embeddings})
        raise ValueError(
            f"{where} has the tokens {tokenizer.convert_ids_to_tokens(unknown)}, for which the model "
            f"has no embedding: it has {num_embeddings}, the tokenizer {len(tokenizer)} tokens. Call "
            "`model.resize_token_embeddings(len(tokenizer))` first, or use the tokenizer that the "
            "model was trained with."
        )
    return ids


def texts_of(value: Any) -> Iterator[str]:
    """Yield every text in a prompt, a solution or the parts of one; keys are left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from texts_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts_of(item)


def message_text(message: Mapping[str, Any]) -> str:
    """Return the text of a message's content, its parts joined; "" if it has none."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or ())


def check_encodable(value: Any, where: str) -> None:
    """Raise ValueError for text that no tokenizer can read."""
    for text in texts_of(value):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where} has a lone surrogate ({text[error.start]!r} at character {error.start}), "
                "which is no valid Unicode text. Clean it with "
                '`text.encode("utf-8", "replace").decode()`.'
            ) from error


def check_nesting(record: Mapping[str, Any], where: str) -> None:
    """Raise for a value of a row that can't be written down, hashed or sent to another process.

    Raises:
        TypeError: The keys of a mapping aren't all text or all numbers, so they have no order.
        ValueError: It holds itself, or is nested too deeply for Python's recursion limit.
    """
    for column, value in record.items():
        level = {id(value): value}
        for _ in range(_MOST_LEVELS):
            for outer in level.values():
                _check_keys(outer, f"{where}: `{column}`")
            level = {id(inner): inner for outer in level.values() for inner in _parts_of(outer)}
            if not level:
                break
        else:
            raise ValueError(
                f"{where}: `{column}` is nested more than {_MOST_LEVELS} levels deep, or holds itself. "
                "Flatten it, or remove the column."
            )


def _check_keys(value: Any, where: str) -> None:
    keys = list(value) if isinstance(value, Mapping) else []
    if not any(all(isinstance(key, kind) for key in keys) for kind in (str, int | float)):
        raise TypeError(
            f"{where} has a mapping with the keys {keys!r:.200}; expected keys that are all text, as in JSON, "
            "or all numbers. Change them, or remove the column."
        )


def _parts_of(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def canonical_prompt(prompt: Any) -> str:
    """Return a text that is equal for equal prompts, regardless of the order of keys."""
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)


def load_heldout_sets(
    eval_dataset: Any,
    train_rows: list[PromptRow],
    load_rows: Callable[..., list[PromptRow]] = load_prompt_rows,
    reward_funcs: Any = None,
) -> dict[str, list[PromptRow]]:
    """Return the held-out sets by name ("" for a single one), checked against training prompts.

    Args:
        eval_dataset: A dataset, a dict of them, or None.
        train_rows: The prompts that are trained on.
        load_rows: `load_prompt_rows` or another function with its first two parameters and
            `reward_funcs`.
        reward_funcs: What grades completions of held-out prompts, as a trainer takes it.

    Raises:
        ValueError: A held-out prompt is also a training prompt, whatever its solution, or a set
            has a name that can't be part of a path.
    """
    if eval_dataset is None:
        return {}
    if isinstance(eval_dataset, dict):
        _check_set_names(eval_dataset)
        named = eval_dataset
    else:
        named = {"": eval_dataset}
    sets = {
        name: load_rows(dataset, _heldout_label(name), reward_funcs=reward_funcs)
        for name, dataset in named.items()
    }
    refuse_seen_heldout(sets, train_rows, "train_dataset")
    return sets


def _check_set_names(sets: Mapping[Any, Any]) -> None:
    for name in sets:
        if not isinstance(name, str) or not _SET_NAME.fullmatch(name):
            raise ValueError(
                f"`eval_dataset` has a set named {name!r:.200}. The name becomes part of folders "
                "and metrics: use up to 100 letters, digits, spaces, '_', '-', '+' and '.', such "
                "as 'math_algebra'."
            )
    folded = [name.casefold() for name in sets]
    if len(set(folded)) < len(folded):
        raise ValueError(
            f"`eval_dataset` has sets whose names differ in case alone: {sorted(sets)}. Some file "
            "systems can't tell them apart: rename one."
        )


def _heldout_label(name: str) -> str:
    return f"eval_dataset[{name!r}]" if name else "eval_dataset"


def refuse_seen_heldout(
    sets: Mapping[str, Sequence[PromptRow]], rows: Sequence[PromptRow], source: str
) -> None:
    """Raise ValueError if a held-out prompt is among those that are trained on.

    Args:
        sets: Held-out prompts by name.
        rows: Prompts that are trained on.
        source: Name of their dataset, for the error.
    """
    trained_on = {row.question: row for row in rows}
    for name, heldout in sets.items():
        label = _heldout_label(name)
        shared = [row for row in heldout if row.question in trained_on]
        if shared:
            twin = trained_on[shared[0].question]
            raise ValueError(
                f"{len(shared)} of {len(heldout)} prompts of `{label}` are in `{source}` "
                f"as well (row {shared[0].row_index} is row {twin.row_index} there). A held-out "
                "score on them means nothing: remove them from one of the two."
            )
