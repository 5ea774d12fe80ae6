"""Hypothesis strategies of bad data: datasets, configs and completions that a run may meet.

In: nothing, or a config class. Out: strategies. What can't even be put into a `Dataset` comes as the
list, the data frame or the transform that a user would try instead.
"""

import datetime
import functools
import math
import types
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value, concatenate_datasets
from hypothesis import strategies as st

from trl_selfplay.trainers.field_checks import bounds_of

# --- text ----------------------------------------------------------------------------------------

ODD_TEXTS = (
    "", " ", "\n\t \u3000", "\x00", "a\x00b", "<eos>", "<pad>", "<unk>", "x <eos> y", "<assistant>",
    "<|im_end|>", "<|endoftext|>", "</s>", "[INST]", "{{ 7 * 7 }}", "{% for m in x %}", "%s %d {}",
    "\u202eabc", "\ufeffQ", "e\u0301", "\U0010ffff", "\U0001f468\u200d\U0001f469", "\ud7a3" * 9,
    "#### 7", "#### ", "\\boxed{", "\\boxed{7}", "(a) yes (b) no", "A) 1\nB) 2", "1e400", "nan", "-0.0",
    "None", "null", "\\", '"', "'", "\x1b[31mred", "\r\n\r\n", "Q: 1 + 1?\nA:", "A:",
)  # fmt: skip
LONG_TEXTS = ("x" * 100_000, "é " * 50_000, " " * 100_000, "(" * 100_000, "\\frac{" * 20_000)
TEXTS = st.one_of(
    st.sampled_from(ODD_TEXTS),
    st.text(st.characters(exclude_categories=("Cs",)), max_size=24),
)
ANY_TEXTS = st.one_of(TEXTS, st.sampled_from(LONG_TEXTS))
LONE_SURROGATES = st.sampled_from(("\ud800", "ok \udfff", "\udc00\ud800"))
COMPLETIONS = st.one_of(ANY_TEXTS, LONE_SURROGATES)

# --- values and messages -------------------------------------------------------------------------

JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.just(10**30), st.just(math.nan),
    st.just(math.inf), st.just(-0.0), st.just(b"\xff\x00"), st.just(datetime.date(2026, 1, 1)),
    st.just([]), st.just({}), st.just([None]), st.just([[]]), st.just(["text"]), st.just({"a": 1}),
    st.just([1, 2]), st.just([{"role": "user"}]), st.just(np.float32(1.5)), TEXTS,
)  # fmt: skip
ROLES = st.sampled_from(
    ("user", "assistant", "system", "tool", "User", "human", "gpt", "", None, 3)
)
CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
CONTENTS = st.one_of(
    TEXTS,
    st.none(),
    st.just([{"type": "text", "text": "Q 1"}]),
    st.just([{"type": "text", "text": "Q"}, {"type": "text", "text": ""}]),
    st.just([{"type": "image"}]),
    st.just([{"type": "text", "text": None}]),
    st.just([]),
    st.just(["Q"]),
    st.just(7),
    st.just({"text": "Q"}),
)
MESSAGE = st.one_of(
    st.builds(lambda role, content: {"role": role, "content": content}, ROLES, CONTENTS),
    st.builds(lambda text: {"role": "user", "content": text}, TEXTS),
    st.builds(lambda text: {"role": "user", "content": text, "name": None, "weight": 1}, TEXTS),
    st.just({"role": "assistant", "content": None, "tool_calls": [CALL]}),
    st.just({"role": "assistant", "tool_calls": [CALL]}),
    st.just({"role": "user"}),
    st.just({"content": "Q"}),
    st.just({"from": "human", "value": "Q"}),
    st.just({}),
    st.none(),
    st.just("user: Q"),
)
MESSAGES = st.lists(MESSAGE, max_size=4)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
TOOLS = st.sampled_from(
    (None, [], [TOOL], "[]", "not JSON", '{"a": 1}', "", "null", 7, [None], ["add"], "[1]")
)
TEMPLATE_KWARGS = st.sampled_from(
    (
        None,
        {},
        {"shout": True},
        {"tokenize": False},
        {"shout": None},
        "shout",
        7,
        [1],
        {"tools": []},
    )
)

# --- datasets ------------------------------------------------------------------------------------

RESERVED = (
    "prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "image",
    "images", "label", "labels", "input_ids", "length", "weight", "self", "text", "groups",
)  # fmt: skip
Rows = list[dict[str, Any]]


def sound_rows(count: int, chat: bool, first: int = 0) -> Rows:
    """Return rows that every trainer takes: prompt, solution, completion and text."""
    rows: Rows = []
    for i in range(first, first + count):
        question, answer = f"Q {i} + 1 = ?", str(i + 1)
        row: dict[str, Any] = {
            "prompt": question,
            "solution": answer,
            "completion": f" so {answer}",
        }
        if chat:
            row["prompt"] = [{"role": "user", "content": question}]
            row["completion"] = [{"role": "assistant", "content": f"so {answer}"}]
        rows.append(row)
    return rows


@st.composite
def _mutated_rows(draw: st.DrawFn) -> Rows:
    """Rows with up to two things wrong, in one row or in all."""
    chat = draw(st.booleans())
    rows = sound_rows(draw(st.integers(1, 5)), chat)
    for _ in range(draw(st.integers(0, 2))):
        rows = draw(st.sampled_from(_MUTATIONS))(draw, rows)
    return rows


def _of_some(draw: st.DrawFn, rows: Rows, column: str, values: st.SearchStrategy[Any]) -> Rows:
    """Give one row, or every row, another value in a column."""
    one = draw(st.none() | st.integers(0, max(len(rows) - 1, 0)))
    return [
        {**row, column: draw(values)} if one in (None, index) else row
        for index, row in enumerate(rows)
    ]


def _without(draw: st.DrawFn, rows: Rows) -> Rows:
    name = draw(st.sampled_from(("prompt", "solution", "completion")))
    return [{k: v for k, v in row.items() if k != name} for row in rows]


def _renamed(draw: st.DrawFn, rows: Rows) -> Rows:
    old = draw(st.sampled_from(("prompt", "solution", "completion")))
    new = draw(
        st.sampled_from(("Prompt", "question", "answer", "messages", "chosen", "", "a b", old))
    )
    return [{new if k == old else k: v for k, v in row.items()} for row in rows]


def _repeated(draw: st.DrawFn, rows: Rows) -> Rows:
    return rows * draw(st.integers(2, 4))


def _nearly_repeated(draw: st.DrawFn, rows: Rows) -> Rows:
    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return value + draw(st.sampled_from((" ", "\n", ".", "\u200b")))
        return value

    return [*rows, *({**row, "prompt": changed(row.get("prompt"))} for row in rows)]


def _contradicted(draw: st.DrawFn, rows: Rows) -> Rows:
    return [*rows, *({**row, "solution": "-1"} for row in rows)]


def _as_messages(draw: st.DrawFn, rows: Rows) -> Rows:
    return [
        {**{k: v for k, v in row.items() if k not in ("prompt", "completion")}, "messages": m}
        for row in rows
        for m in (draw(MESSAGES),)
    ]


def _with_rejected(draw: st.DrawFn, rows: Rows) -> Rows:
    return [
        {**row, "chosen": row.get("completion"), "rejected": draw(st.just(" no") | JUNK)}
        for row in rows
    ]


_MUTATIONS: tuple[Callable[[st.DrawFn, Rows], Rows], ...] = (
    _without,
    _renamed,
    _repeated,
    _nearly_repeated,
    _contradicted,
    _as_messages,
    _with_rejected,
    lambda draw, rows: _of_some(draw, rows, "prompt", ANY_TEXTS),
    lambda draw, rows: _of_some(draw, rows, "prompt", JUNK),
    lambda draw, rows: _of_some(draw, rows, "prompt", MESSAGES),
    lambda draw, rows: _of_some(draw, rows, "prompt", MESSAGES),
    lambda draw, rows: _of_some(draw, rows, "solution", JUNK),
    lambda draw, rows: _of_some(draw, rows, "solution", ANY_TEXTS),
    lambda draw, rows: _of_some(draw, rows, "completion", JUNK),
    lambda draw, rows: _of_some(draw, rows, "completion", ANY_TEXTS),
    lambda draw, rows: _of_some(draw, rows, "completion", MESSAGES),
    lambda draw, rows: _of_some(draw, rows, "text", JUNK),
    lambda draw, rows: _of_some(draw, rows, "tools", TOOLS),
    lambda draw, rows: _of_some(draw, rows, "chat_template_kwargs", TEMPLATE_KWARGS),
    lambda draw, rows: _of_some(draw, rows, draw(st.sampled_from(RESERVED)), JUNK),
    lambda draw, rows: [],
)


def as_dataset(rows: Rows) -> Any:
    """Return rows as a dataset; as they are if a table can't hold them."""
    try:
        return Dataset.from_list(rows)
    except Exception:  # what Arrow raises has a dozen types, and the user sees it before us
        return rows


def from_transform(rows: Rows) -> Dataset:
    """Return a dataset that makes its rows when they are read, so that they may hold anything."""
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["prompt"]
    table = Dataset.from_dict({name: list(range(len(rows))) for name in names})

    def transform(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        places = next(iter(batch.values()))
        return {name: [rows[p].get(name) for p in places] for name in names if name in batch}

    return table.with_transform(transform)


class Circle(list):
    """A list that holds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.append(self)


def deep(levels: int) -> Any:
    """Return lists within lists."""
    value: Any = "7"
    for _ in range(levels):
        value = [value]
    return value


UNTABLED = st.one_of(
    LONE_SURROGATES, JUNK, st.builds(Circle), st.just(deep(3000)), st.just({1: 2, "a": 3}),
    st.just({7}), st.just(object()), st.just(np.array([1, 2])), st.just(np.int64(3)),
    st.just(("a", "b")), st.just(complex(1, 2)), st.just(lambda: 7),
)  # fmt: skip


@st.composite
def _transformed(draw: st.DrawFn) -> Dataset:
    rows = sound_rows(draw(st.integers(1, 4)), draw(st.booleans()))
    column = draw(st.sampled_from(("prompt", "solution", "completion", "note")))
    return from_transform(_of_some(draw, rows, column, UNTABLED))


@st.composite
def _other_forms(draw: st.DrawFn) -> Any:
    """Sound rows in another form than a plain `Dataset`."""
    rows = sound_rows(3, draw(st.booleans()))
    table = Dataset.from_list(rows)
    forms: dict[str, Callable[[], Any]] = {
        "iterable": table.to_iterable_dataset,
        "dict": lambda: DatasetDict(train=table),
        "plain dict": lambda: {"train": table},
        "list": lambda: rows,
        "generator": lambda: iter(rows),
        "frame": lambda: pd.DataFrame(rows),
        "path": lambda: "rows.jsonl",
        "a path": lambda: Path("rows.jsonl"),
        "none": lambda: None,
        "number": lambda: 7,
        "arrow": lambda: table.data.table,
        "torch format": lambda: table.with_format("torch"),
        "numpy format": lambda: table.with_format("numpy"),
        "pandas format": lambda: table.with_format("pandas"),
        "some columns": lambda: table.with_format(None, columns=["solution"]),
        "no rows": lambda: table.select([]),
        "no columns": lambda: table.remove_columns(table.column_names),
        "shuffled": lambda: table.shuffle(seed=1),
        "class labels": lambda: (
            table.remove_columns("solution")
            .add_column("solution", [0, 1, 0])
            .cast_column("solution", ClassLabel(names=["no", "yes"]))
        ),
        "integers": lambda: table.cast_column("solution", Value("int64")),
        "doubles": lambda: table.cast_column("solution", Value("float64")),
        "binary": lambda: table.cast_column("solution", Value("binary")),
        "large strings": lambda: table.cast_column("solution", Value("large_string")),
        "nulls": lambda: Dataset.from_dict(
            {"prompt": [None, None], "solution": [None, None], "completion": [None, None]}
        ),
        "many": lambda: _many(),
        "concatenated": lambda: concatenate_datasets([table, table]),
        "empty with features": lambda: Dataset.from_dict(
            {"prompt": [], "solution": []},
            features=Features(prompt=Value("string"), solution=Value("string")),
        ),
    }
    return forms[draw(st.sampled_from(sorted(forms)))]()


@functools.cache
def _many() -> Dataset:
    return Dataset.from_list(sound_rows(10_000, chat=False))


DATASETS = st.one_of(
    _mutated_rows().map(as_dataset),
    _mutated_rows().map(as_dataset),
    _transformed(),
    _other_forms(),
)

# --- configs -------------------------------------------------------------------------------------

_NUMBERS = (
    0, 1, -1, 2, 3, 0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e-9, 1e9, 10**6, 2**31, 2**63, 10**400, 1e308,
    math.nan, math.inf, -math.inf, True, False,
)  # fmt: skip
_WRONG: tuple[Any, ...] = (
    None, "", "1", "0.5", "nan", "auto", "none", "True", "no", "steps", [], [1], [0.5, 0.5], [None],
    ["a"], [""], {}, {"a": 1}, (1,), {1}, b"1", object, np.int64(2), np.float64(0.5), np.bool_(True),
    Path("a"), 1j, "x" * 300, "\x00", "{}", "[1]", '{"a": 1}', "../..",
)  # fmt: skip
# Fields that start something else than a run on this machine, or say where it lies.
LEFT_ALONE = {
    "output_dir", "logging_dir", "report_to", "use_cpu", "push_to_hub", "hub_model_id", "hub_token",
    "deepspeed", "fsdp", "fsdp_config", "torch_compile", "torch_compile_backend", "tpu_num_cores",
    "torch_compile_mode", "parallelism_config", "debug", "jit_mode_eval", "use_vllm", "ddp_backend",
    "trackio_space_id", "log_completions_hub_repo", "dataloader_num_workers", "dataset_num_proc",
    "disable_tqdm", "log_level", "log_level_replica", "auto_find_batch_size", "local_rank",
    "dry_run", "rounds_dir", "use_ray", "chat_template_path", "dataloader_prefetch_factor", "dataloader_persistent_workers",
}  # fmt: skip


def changeable_fields(config_class: Any) -> dict[str, Any]:
    """Return the fields that the strategies change, with their types."""
    hints = get_type_hints(config_class)
    return {
        f.name: hints[f.name] for f in fields(config_class) if f.init and f.name not in LEFT_ALONE
    }


def field_values(config_class: Any, name: str) -> st.SearchStrategy[Any]:
    """Values of a field: its choices, its bounds and what lies beside them, and wrong types."""
    each = config_class.__dataclass_fields__[name]
    near: list[Any] = [
        *each.metadata.get("choices", ()),
        *_values_of(get_type_hints(config_class)[name]),
    ]
    limits = bounds_of(config_class).get(name)
    for edge in (limits.least, limits.most) if limits is not None else ():
        if math.isfinite(edge):
            near += [edge, edge - 1, edge + 1, int(edge), math.nextafter(edge, math.inf)]
    near = near or [None]
    return st.one_of(
        st.sampled_from(near), st.sampled_from(near), st.sampled_from(_NUMBERS + _WRONG)
    )


def _values_of(hint: Any) -> list[Any]:
    """Return values that a type allows."""
    if get_origin(hint) in (Union, types.UnionType):
        return [v for option in get_args(hint) for v in _values_of(option)]
    if get_origin(hint) is list:
        inner = _values_of(get_args(hint)[0])
        return [[], inner[:1], inner[:2], inner[:1] * 5]
    known: dict[Any, list[Any]] = {
        bool: [True, False],
        int: [0, 1, 2, 5, 100],
        float: [0.0, 0.1, 1.0, 2.5],
        str: ["steps", "epoch", "no", "linear", "x"],
        type(None): [None],
    }
    if hint in known:
        return known[hint]
    if isinstance(hint, type) and hasattr(hint, "__members__"):
        return [member.value for member in hint]
    if hint is dict or get_origin(hint) is dict:
        return [{}, {"a": 1}, '{"a": 1}']
    return [None]


def configs(config_class: Any) -> st.SearchStrategy[dict[str, Any]]:
    """One to three fields of a config with values that may be extreme, wrong or contradictory."""
    names = st.lists(
        st.sampled_from(sorted(changeable_fields(config_class))),
        min_size=1,
        max_size=3,
        unique=True,
    )
    return names.flatmap(
        lambda chosen: st.fixed_dictionaries({n: field_values(config_class, n) for n in chosen})
    )
