"""Rows are checked one by one, and say which one is wrong."""

import inspect
import os
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from trl_selfplay.rewards import exact_reward
from trl_selfplay.rollouts.completions import load_chosen_rows
from trl_selfplay.rollouts.prompts import check_template_kwargs, load_heldout_sets, load_prompt_rows
from trl_selfplay.rollouts.record import hash_prompt


def rows_of(*prompts):
    return load_prompt_rows(
        Dataset.from_list([{"prompt": p, "solution": "7"} for p in prompts]), "train_dataset"
    )


def test_repeated_rows_are_merged_with_one_notice(caplog) -> None:
    assert len(rows_of("Q 1", "Q 2", "Q 1", "Q 1")) == 2
    assert caplog.text.count("2 of 4 rows repeat") == 1


def test_what_is_no_dataset_of_prompts_is_refused_with_what_to_do() -> None:
    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "Q"}]}])
    for dataset, advice in (
        (DatasetDict(train=rows, test=rows), "Pass one of its splits, 'train', 'test'"),
        ([{"prompt": "Q"}], r"Dataset\.from_list\(rows\)"),
    ):
        with pytest.raises(TypeError, match=advice):
            load_prompt_rows(dataset, "train_dataset")
    with pytest.raises(ValueError, match=r"Make one of `messages`: `dataset\.map"):
        load_prompt_rows(rows, "train_dataset")


def test_the_order_of_rows_has_no_influence() -> None:
    assert [r.prompt_id for r in rows_of("a", "b", "c")] == [
        r.prompt_id for r in rows_of("c", "a", "b")
    ]


def test_prompt_ids_are_equal_in_every_process() -> None:
    code = (
        "from trl_selfplay.rollouts.record import hash_prompt; "
        "print(hash_prompt([{'role': 'user', 'content': 'x'}], '1'))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(found) == 1


USER = {"role": "user", "content": "hi"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "user", "content": 5}], "row 0, message 0 .*the content is 5"),
        ([USER, {"role": "assistant", "content": None}, USER], "message 1 .*content is None"),
        ([{"role": "user", "content": []}], r"message 0 .*content is \[\]"),
        (
            [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
            "Rounds work on text: images",
        ),
        ([{"role": "user"}], "row 0: the prompt is"),
        (["hi"], "row 0: the prompt is"),
        ([{"role": 1, "content": "x"}], "row 0: the prompt is"),
    ],
)
def test_content_that_no_template_reads_names_the_row(prompt, message) -> None:
    with pytest.raises(TypeError, match=message):
        load_prompt_rows(Listed([{"prompt": prompt, "solution": "1"}]), "train_dataset")


class Listed(Dataset):
    """A dataset that gives its records as they are, as one with a transform does."""

    def __init__(self, records):
        super().__init__(Dataset.from_dict({name: [0] * len(records) for name in records[0]}).data)
        self.records = records

    def __iter__(self):
        return iter(self.records)


def test_parts_of_text_and_tool_calls_without_content_are_messages() -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "hi"}]}
    tool = {"role": "tool", "name": "f", "content": "1"}
    prompts = [[parts], [USER, CALL, tool], [USER, {**CALL, "content": None}, tool]]
    rows = load_prompt_rows(
        Listed([{"prompt": p, "solution": "1"} for p in prompts]), "train_dataset"
    )
    assert len(rows) == 3


def test_a_lone_surrogate_names_the_row() -> None:
    for record in (
        {"prompt": "a\ud800b", "solution": "1"},
        {"prompt": "a", "solution": ["\udfff"]},
    ):
        with pytest.raises(ValueError, match=r"row 0: `(prompt|solution)` has a lone surrogate"):
            load_prompt_rows(Listed([record]), "train_dataset")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tools", "a hammer", "row 0: `tools` is 'a hammer', which is not JSON"),
        ("tools", "{}x", "not JSON"),
        ("tools", '{"a": 1}', "give a list of tools' names or schemas"),
        ("tools", "[1]", "row 0: `tools` has the entry 1; give names of tools, or their schemas"),
        ("tools", ["search"], "row 0: `tools` names 'search', and the run has no tools"),
        ("chat_template_kwargs", "x", "row 0: `chat_template_kwargs` is 'x'"),
        ("chat_template_kwargs", {"tokenize": False}, "has 'tokenize'=False"),
    ],
)
def test_arguments_of_the_template_that_cannot_work_name_the_row(column, value, message) -> None:
    record = {"prompt": [USER], "solution": "1", column: value}
    with pytest.raises((ValueError, TypeError), match=message):
        load_prompt_rows(Listed([record]), "train_dataset")


def test_keys_that_a_table_fills_with_none_are_no_arguments() -> None:
    record = {"prompt": [USER], "solution": "1", "chat_template_kwargs": {"a": None}, "tools": []}
    (row,) = load_prompt_rows(Listed([record]), "train_dataset")
    assert row.template_arguments == {}
    assert row.prompt_id == hash_prompt([USER], "1")


def test_what_rendering_passes_itself_is_no_argument_of_the_template() -> None:
    """Each name but those of the template's own variables, from the signature itself."""
    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    own = {n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD}
    for name in own - {"self", "documents"}:
        with pytest.raises(ValueError, match=f"'{name}'.*rendering decides itself"):
            check_template_kwargs({name: None}, "chat_template_kwargs")
    check_template_kwargs({"documents": [], "enable_thinking": False}, "chat_template_kwargs")


def test_rows_that_differ_in_a_column_that_is_read_are_different_prompts() -> None:
    """And all others have the ids that they have without these columns."""
    records = [
        {"prompt": "a", "solution": "1", "level": 1, "source": "x"},
        {"prompt": "a", "solution": "1", "level": 2, "source": "x"},
        {"prompt": "a", "solution": "1", "level": 2, "source": "y"},
        {"prompt": "b", "solution": "1", "level": 2, "source": "x"},
    ]

    def by_level(completions, level, **kwargs):
        return [0.0] * len(completions)

    def ids(records, reward_funcs):
        rows = load_prompt_rows(Dataset.from_list(records), "d", reward_funcs=reward_funcs)
        return {(r.prompt, r.columns["level"]): r.prompt_id for r in rows}

    found = ids(records, [by_level])
    assert set(found) == {("a", 1), ("a", 2), ("b", 2)}
    assert len(set(found.values())) == 3
    assert found["b", 2] == hash_prompt("b", "1")
    assert found == ids(records[::-1], [by_level])  # whatever the order
    # Where nothing reads the level the rows are one; with one level there is nothing to tell apart.
    assert set(ids(records, exact_reward).values()) == {hash_prompt(p, "1") for p in "ab"}
    assert ids(records[1:], by_level)["a", 2] == hash_prompt("a", "1")


def test_a_solution_is_needed_only_where_something_uses_it() -> None:
    dataset = Dataset.from_list([{"prompt": "a"}, {"prompt": "b"}])
    rows = load_prompt_rows(dataset, "train_dataset")
    assert [(row.solution, dict(row.columns)) for row in rows] == [(None, {}), (None, {})]
    with pytest.raises(ValueError, match=r"no column 'solution'.*The hint needs it"):
        load_prompt_rows(dataset, "train_dataset", needs_solution="The hint")


@pytest.mark.parametrize(
    "name",
    [
        *("../../x", "math/algebra", "a\\b", "a|b", "<script>", "a\nb", "", ".hidden", "end."),
        *(" ", 3, "x" * 101, "a:b", "a*"),
    ],
)
def test_a_held_out_set_whose_name_cannot_be_a_path_is_refused(name) -> None:
    sets = {name: Dataset.from_list([{"prompt": "a", "solution": "1"}])}
    with pytest.raises(ValueError, match=r"a set named .*becomes part of folders"):
        load_heldout_sets(sets, [])


def test_names_of_held_out_sets_are_told_apart_by_every_file_system() -> None:
    dataset = Dataset.from_list([{"prompt": "a", "solution": "1"}])
    names = ["math", "gsm8k-test", "held out", "Größe_2", "v1.5", "x" * 100]
    assert list(load_heldout_sets(dict.fromkeys(names, dataset), [])) == names
    with pytest.raises(ValueError, match="differ in case alone"):
        load_heldout_sets({"Math": dataset, "math": dataset}, [])


def test_a_held_out_prompt_with_other_tools_is_another_prompt() -> None:
    def rows(tools):
        record = {"prompt": [USER], "solution": "1", "tools": tools}
        return Dataset.from_list([record])

    train = load_prompt_rows(rows('[{"name": "f"}]'), "train_dataset")
    assert load_heldout_sets(rows('[{"name": "g"}]'), train)
    with pytest.raises(ValueError, match="as well"):
        load_heldout_sets(rows('[{"name": "f"}]'), train)


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
def test_the_format_of_a_dataset_has_no_influence(kind) -> None:
    """Else reward functions would get tensors, and a row another id."""
    dataset = Dataset.from_list([{"prompt": f"Q {i}", "solution": i, "n": [1.5]} for i in range(3)])
    plain = load_prompt_rows(dataset, "train_dataset")
    rows = load_prompt_rows(dataset.with_format(kind), "train_dataset")
    assert rows == plain
    assert {type(row.solution) for row in rows} == {int}


def test_what_makes_rows_as_they_are_read_stays() -> None:
    dataset = Dataset.from_list([{"prompt": "Q", "solution": "7"}])
    dataset.set_transform(lambda batch: {**batch, "prompt": [p + " 1" for p in batch["prompt"]]})
    (row,) = load_prompt_rows(dataset, "train_dataset")
    assert row.prompt == "Q 1"


@pytest.mark.parametrize("load", [load_prompt_rows, load_chosen_rows])
@pytest.mark.parametrize("is_circle", [True, False])
def test_a_value_that_is_nested_too_deeply_is_refused(load, is_circle) -> None:
    """Sending it to a reward function in another process would end in a RecursionError, once sampled."""
    value: list = []
    if is_circle:
        value.append(value)
    for _ in range(200):
        value = [value]
    rows = Dataset.from_dict({name: ["a"] for name in ("prompt", "completion", "note")})
    rows.set_transform(lambda batch: {**batch, "note": [value]})
    with pytest.raises(ValueError, match="`d` row 0: `note` is nested more than 100 levels deep"):
        load(rows, "d")


@pytest.mark.parametrize("load", [load_prompt_rows, load_chosen_rows])
def test_a_mapping_whose_keys_have_no_order_is_refused(load) -> None:
    rows = Dataset.from_dict({name: ["a"] for name in ("prompt", "completion", "note")})
    rows.set_transform(lambda batch: {**batch, "note": [[{1: 2, "a": 3}]]})
    with pytest.raises(
        TypeError, match=r"`d` row 0: `note` has a mapping with the keys \[1, 'a'\]"
    ):
        load(rows, "d")
    rows.set_transform(lambda batch: {**batch, "note": [{1: 2, 3: 4}]})
    load(rows, "d")
