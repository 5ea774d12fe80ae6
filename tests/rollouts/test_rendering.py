"""Prompts become tokens: as the chat template has them, the same for a whole run."""

import json
from datetime import datetime
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from trl_selfplay.rollouts.completions import load_chosen_rows, tokenize_chosen
from trl_selfplay.rollouts.prompts import load_prompt_rows
from trl_selfplay.rollouts.record import hash_prompt
from trl_selfplay.rollouts.rendering import (
    PromptFormatter,
    keep_rendering,
    load_few_shot_examples,
    read_start,
)
from trl_selfplay.trainers.star.rationalization import add_hint

USER, ASSISTANT = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yo")))

EXAMPLES = [
    {"prompt": "Q 1 + 1 = ?", "completion": " so 2", "solution": "2"},
    {"prompt": "Q 2 + 3 = ?", "completion": " so 5", "solution": "5"},
]


def rows_of(*prompts):
    return load_prompt_rows(
        Dataset.from_list([{"prompt": p, "solution": "7"} for p in prompts]), "train_dataset"
    )


def text_of(formatter, row, **kwargs):
    return formatter.tokenizer.decode(list(formatter.token_ids(row, **kwargs)))


def test_few_shot_examples_stand_before_the_prompt_while_sampling(byte_tokenizer) -> None:
    (row,) = rows_of("Q 3 + 4 = ?")
    formatter = PromptFormatter(byte_tokenizer, load_few_shot_examples(EXAMPLES, False), add_hint)
    assert text_of(formatter, row, few_shot=False) == "Q 3 + 4 = ?"
    assert (
        text_of(formatter, row, few_shot=True)
        == "Q 1 + 1 = ? so 2\n\nQ 2 + 3 = ? so 5\n\nQ 3 + 4 = ?"
    )


def test_hinted_prompts_have_hinted_examples(byte_tokenizer) -> None:
    (row,) = rows_of("Q 3 + 4 = ?")
    formatter = PromptFormatter(byte_tokenizer, load_few_shot_examples(EXAMPLES, False), add_hint)
    hinted = text_of(formatter, row, few_shot=True, hinted=True)
    assert hinted == "Q 1 + 1 = ? (2) so 2\n\nQ 2 + 3 = ? (5) so 5\n\nQ 3 + 4 = ? (7)"


def test_an_example_equal_to_the_row_is_left_out_of_its_prompt(byte_tokenizer) -> None:
    """ST-25."""
    own, other = sorted(rows_of("Q 1 + 1 = ?", "Q 3 + 4 = ?"), key=lambda row: row.prompt)
    formatter = PromptFormatter(byte_tokenizer, load_few_shot_examples(EXAMPLES, False))
    assert text_of(formatter, own, few_shot=True) == "Q 2 + 3 = ? so 5\n\nQ 1 + 1 = ?"
    assert text_of(formatter, other, few_shot=True).startswith("Q 1 + 1 = ? so 2")


def test_chat_examples_are_turns_after_the_system_message(chat_tokenizer) -> None:
    system = {"role": "system", "content": "S"}
    (row,) = rows_of([system, {"role": "user", "content": "U"}])
    formatter = PromptFormatter(chat_tokenizer, load_few_shot_examples(EXAMPLES[:1], True))
    expected = chat_tokenizer.apply_chat_template(
        [
            system,
            {"role": "user", "content": "Q 1 + 1 = ?"},
            {"role": "assistant", "content": " so 2"},
            {"role": "user", "content": "U"},
        ],
        add_generation_prompt=True,
        return_dict=False,
    )
    assert list(formatter.token_ids(row, few_shot=True)) == expected


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"prompt": "Q"}, "lacks"),
        (
            {"prompt": [{"role": "user", "content": "Q"}], "completion": "A", "solution": "1"},
            "text",
        ),
    ],
)
def test_an_example_that_does_not_fit_is_refused(example, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_few_shot_examples([example], conversational=False)


def test_an_example_needs_a_solution_only_where_hints_show_it() -> None:
    example = {"prompt": "Q", "completion": "A"}
    assert load_few_shot_examples([example], False)[0].solution is None
    with pytest.raises(ValueError, match=r"lacks \['solution'\]"):
        load_few_shot_examples([example], False, needs_solution=True)


# --- the time of the run ---

DATED = "{{ strftime_now('%-d') }} {{ strftime_now('100%% %Y') }} " + (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    "format",
    ["%d %b %Y", "%Y-%m-%d", "%A, %-d %B %y %H:%M:%S %p", "100%% of %j %%d", "no directive"],
)
def test_a_template_sees_one_time_in_the_form_that_it_asks_for(chat_tokenizer, format) -> None:
    """Compared with Python's own strftime; the format may be computed in the template."""
    start = datetime(2024, 2, 3, 4, 5, 6)
    (row,) = rows_of([{"role": "user", "content": format}])
    chat_tokenizer.chat_template = (
        "{% macro date(f) %}{{ strftime_now(f) }}{% endmacro %}"
        "{% if strftime_now is defined %}{% for m in messages %}{{ date(m['content']) }}{% endfor %}"
        "{% endif %}"
    )
    formatter = PromptFormatter(chat_tokenizer, start=start)
    assert text_of(formatter, row, few_shot=False) == start.strftime(format)


def test_a_template_without_a_clock_is_passed_on_as_it_is(chat_tokenizer) -> None:
    (row,) = rows_of([{"role": "user", "content": "Q"}])
    expected = chat_tokenizer.apply_chat_template(
        row.prompt, add_generation_prompt=True, return_dict=False
    )
    assert list(PromptFormatter(chat_tokenizer).token_ids(row, few_shot=False)) == expected


def test_prompt_and_completion_are_rendered_at_one_time(chat_tokenizer) -> None:
    chat_tokenizer.chat_template = DATED
    formatter = PromptFormatter(chat_tokenizer, start=datetime(2024, 2, 3))
    rows = load_chosen_rows(
        Dataset.from_list([{"messages": [USER, ASSISTANT], "solution": "x"}]), "train_dataset"
    )
    (tokens,) = tokenize_chosen(formatter, rows, (1,), 1).values()
    assert chat_tokenizer.decode(list(tokens.prompt_ids)) == "3 100% 2024 <user>hi<eos><assistant>"
    assert chat_tokenizer.decode(list(tokens.chosen_ids)) == "yo<eos>"


def test_what_renders_a_run_is_written_once_and_checked(chat_tokenizer, tmp_path) -> None:
    path, start = tmp_path / "rendering.json", datetime(2024, 2, 3, 4, 5, 6)
    assert read_start(path) <= datetime.now()
    rendering = PromptFormatter(chat_tokenizer, start=start).rendering(True)
    keep_rendering(rendering, path)
    assert read_start(path) == start
    later = PromptFormatter(chat_tokenizer, start=datetime(2025, 1, 1)).rendering(True)
    keep_rendering(later, path)
    assert read_start(path) == start
    chat_tokenizer.chat_template = DATED
    with pytest.raises(ValueError, match="not the one that this run began with"):
        keep_rendering(PromptFormatter(chat_tokenizer, start=start).rendering(True), path)
    keep_rendering(PromptFormatter(chat_tokenizer, start=start).rendering(False), path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"rendering\.json can't be read"):
        read_start(path)


# --- tools and other arguments of the template ---

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
}
WITH_TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}{% endif %}{{ mood | default('calm') }}"
    "{% for m in messages %}<{{ m['role'] }}>{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% for call in m['tool_calls'] or [] %}<call>{{ call['function'] | tojson }}{% endfor %}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_keyword_arguments_of_a_row_reach_the_template(chat_tokenizer, as_text) -> None:
    """As TRL does: a list of schemas or its JSON; a row's own arguments win over the config's."""
    chat_tokenizer.chat_template = WITH_TOOLS
    tools = json.dumps([TOOL]) if as_text else [TOOL]
    record = {
        "prompt": [USER],
        "solution": "1",
        "tools": tools,
        "chat_template_kwargs": {"mood": "gay"},
    }
    (row,) = load_prompt_rows(Dataset.from_list([record]), "train_dataset")
    formatter = PromptFormatter(chat_tokenizer, chat_template_kwargs={"mood": "grim"})
    expected = chat_tokenizer.apply_chat_template(
        [USER], tools=[TOOL], mood="gay", add_generation_prompt=True, return_dict=False
    )
    assert list(formatter.token_ids(row, few_shot=False)) == expected
    assert row.columns["tools"] == record["tools"]  # reward functions get the column


def test_rows_that_differ_in_tools_are_different_prompts() -> None:
    records = [
        {"prompt": [USER], "solution": "1", "tools": tools, "chat_template_kwargs": kwargs}
        for tools in (None, json.dumps([TOOL]))
        for kwargs in (None, {"mood": "gay"}, {"mood": "grim"})
    ]
    rows = load_prompt_rows(Dataset.from_list(records), "train_dataset")
    assert len({row.prompt_id for row in rows}) == len({row.question for row in rows}) == 6
    assert hash_prompt([USER], "1") in {row.prompt_id for row in rows}


def test_the_id_of_prompt_and_solution_alone_stays_what_it_was() -> None:
    """Runs on disk know their samples by it."""
    assert hash_prompt("Q 1 + 2 = ?", "3") == "195c7962cce4f38a571a635458399b96"
    assert hash_prompt([USER], "1", {}) == "44069bafebc3f66f958332a1d3ded61c"


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    ("template", "completion", "settings"),
    [
        (None, {"tool_calls": [CALL]}, [{"mood": "gay"}, {"mood": "grim"}]),
        ("gptoss", {"content": "4", "thinking": "2 and 2"}, [{"reasoning_effort": "low"}, {}]),
        ("gptoss", {"tool_calls": [CALL]}, [{"reasoning_effort": "high"}, {}]),
        ("qwen3", {"content": "", "tool_calls": [CALL]}, [{"enable_thinking": True}, {}]),
    ],
)
def test_spin_and_dpo_see_the_same_tokens(
    chat_tokenizer, tiny_model, tmp_path, template, completion, settings
) -> None:
    """TRL's DPOTrainer is the independent computation: tools, calls without content, harmony."""
    folder = Path(trl.__file__).parent / "chat_templates"
    chat_tokenizer.chat_template = (
        (folder / f"{template}.jinja").read_text() if template else WITH_TOOLS
    )
    answer = [{"role": "assistant", **completion}]
    records = [
        {
            "prompt": [USER],
            "chosen": answer,
            "rejected": answer,
            "tools": [TOOL],
            "chat_template_kwargs": kwargs,
        }
        for kwargs in settings
    ]
    config = DPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to=[], max_length=None)
    # A row of its own for each, since a table gives all rows the keys of all.
    for record in records:
        dpo = DPOTrainer(
            tiny_model(chat_tokenizer),
            tiny_model(chat_tokenizer),
            args=config,
            train_dataset=Dataset.from_list([record]),
            processing_class=chat_tokenizer,
        )
        rows = load_chosen_rows(Dataset.from_list([record]), "train_dataset")
        (ours,) = tokenize_chosen(PromptFormatter(chat_tokenizer), rows, (1,), 1).values()
        (expected,) = dpo.train_dataset
        assert list(ours.prompt_ids) == expected["prompt_ids"]
        theirs = expected["chosen_ids"]
        assert list(ours.chosen_ids) == (theirs if 1 in theirs else [*theirs, 1])


def test_what_a_template_does_not_read_is_said_once(chat_tokenizer, caplog) -> None:
    records = [
        {"prompt": [USER], "solution": str(i), "tools": [TOOL], "chat_template_kwargs": {"tone": 1}}
        for i in range(3)
    ]
    rows = load_prompt_rows(Dataset.from_list(records), "train_dataset")
    formatter = PromptFormatter(chat_tokenizer, chat_template_kwargs={"enable_thinkin": False})
    formatter.check_rows(rows, few_shot=False)
    messages = [r.message for r in caplog.records]
    assert len(messages) == 3
    for what in ("column `tools`", "chat_template_kwargs 'tone'", "'enable_thinkin'"):
        assert any(what in m for m in messages)
    caplog.clear()
    chat_tokenizer.chat_template = WITH_TOOLS.replace("mood", "tone")
    PromptFormatter(chat_tokenizer).check_rows(rows, few_shot=False)
    assert not caplog.records


def test_columns_for_templates_beside_plain_text_are_said(byte_tokenizer, caplog) -> None:
    records = [{"prompt": "Q", "solution": "1", "tools": "a hammer"}]
    rows = load_prompt_rows(Dataset.from_list(records), "train_dataset")
    formatter = PromptFormatter(byte_tokenizer, chat_template_kwargs={"mood": "gay"})
    formatter.check_rows(rows, few_shot=False)
    assert "column `tools`" in caplog.text
    assert "has no effect: the prompts are plain text" in caplog.text


# --- what a template drops ---

THOUGHTLESS = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].split('</think>')[-1] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_an_example_whose_thoughts_the_template_removes_is_refused(chat_tokenizer) -> None:
    examples = [EXAMPLES[0], {**EXAMPLES[1], "completion": "<think>2 and 3</think> so 5"}]
    rows = rows_of([USER])
    formatter = PromptFormatter(chat_tokenizer, load_few_shot_examples(examples, True))
    formatter.check_rows(rows, few_shot=True)
    chat_tokenizer.chat_template = THOUGHTLESS
    formatter.check_rows(rows, few_shot=False)
    with pytest.raises(ValueError, match=r"few_shot_examples\[1\]: the chat template leaves out"):
        formatter.check_rows(rows, few_shot=True)


def test_content_as_parts_works_where_the_template_reads_it(chat_tokenizer) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    rows = rows_of(parts)
    with pytest.raises(ValueError, match="row 0: the chat template leaves out what the user says"):
        PromptFormatter(chat_tokenizer).check_rows(rows, few_shot=False)
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "{{ message['content'] }}",
        "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}",
    )
    formatter = PromptFormatter(chat_tokenizer)
    formatter.check_rows(rows, few_shot=False)
    assert text_of(formatter, rows[0], few_shot=False) == "<user>hi<eos><assistant>"
    with pytest.raises(ValueError, match="Give the message's content as a list of parts"):
        formatter.check_rows(rows_of([USER]), few_shot=False)


def test_a_prompt_that_the_template_refuses_names_the_row(chat_tokenizer) -> None:
    chat_tokenizer.chat_template = "{{ raise_exception('no tools here') }}"
    with pytest.raises(ValueError, match=r"`train_dataset` row 0: .*no tools here"):
        PromptFormatter(chat_tokenizer).token_ids(rows_of([USER])[0], few_shot=False)


def test_a_dropped_system_message_is_said(chat_tokenizer, caplog) -> None:
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "in messages %}", "in messages if message['role'] != 'system' %}"
    )
    rows = rows_of([{"role": "system", "content": "Be brief."}, USER])
    PromptFormatter(chat_tokenizer).check_rows(rows, few_shot=False)
    assert "doesn't use messages with the role 'system'" in caplog.text


def test_a_tokenizer_that_renders_in_code_has_a_chat_template(byte_tokenizer, caplog) -> None:
    """As Mistral's own class: `chat_template` is None, and `apply_chat_template` works."""

    class CodeTokenizer(PreTrainedTokenizerFast):
        def get_chat_template(self, chat_template=None, tools=None):
            raise NotImplementedError("renders in code")

        def apply_chat_template(self, conversation, tools=None, tokenize=True, **kwargs):
            text = "".join(f"[INST]{m['content']}[/INST]" for m in conversation)
            return self(text)["input_ids"] if tokenize else text

    tokenizer = CodeTokenizer(
        tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<eos>", pad_token="<pad>"
    )
    assert tokenizer.chat_template is None
    formatter = PromptFormatter(tokenizer)
    rows = rows_of([USER])
    formatter.check_rows(rows, few_shot=False)
    formatter.warn_control_tokens(rows, with_solutions=False)
    assert text_of(formatter, rows[0], few_shot=False) == "[INST]hi[/INST]"
    assert formatter.rendering(True).chat_template is None
    assert not caplog.records
    with pytest.raises(ValueError, match="has no chat template"):
        PromptFormatter(byte_tokenizer).token_ids(rows[0], few_shot=False)


# --- special tokens ---


def test_text_that_was_rendered_before_begins_once(byte_tokenizer) -> None:
    byte_tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos, eos = byte_tokenizer.bos_token_id, byte_tokenizer.eos_token_id
    byte_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    formatter = PromptFormatter(byte_tokenizer)
    for text in ("hi", "<bos>hi"):
        (row,) = rows_of(text)
        assert text_of(formatter, row, few_shot=False) == "<bos>hi"


def test_control_tokens_in_a_rows_text_are_counted_and_can_be_split(byte_tokenizer, caplog) -> None:
    """Split, they come back as the text that they are, and never as the token."""
    records = [
        {"prompt": "say <eos> twice", "solution": "1"},
        {"prompt": "a", "solution": "done<eos>"},
        {"prompt": "b", "solution": "<eos>done"},
    ]
    rows = load_prompt_rows(Dataset.from_list(records), "train_dataset")
    eos = byte_tokenizer.eos_token_id
    (row,) = [r for r in rows if r.row_index == 0]
    plain = PromptFormatter(byte_tokenizer)
    plain.warn_control_tokens(rows, with_solutions=False)
    assert "`train_dataset`: 1 of 3 rows have special tokens" in caplog.text
    assert "row 0: '<eos>'" in caplog.text
    plain.warn_control_tokens(rows, with_solutions=True)
    assert "2 of 3 rows" in caplog.text
    assert eos in plain.token_ids(row, few_shot=False)
    caplog.clear()
    split = PromptFormatter(byte_tokenizer, sanitize_control_tokens=True)
    split.warn_control_tokens(rows, with_solutions=True)
    assert not caplog.records
    assert eos not in split.token_ids(row, few_shot=False)
    assert text_of(split, row, few_shot=False) == "say <eos> twice"


def test_only_the_template_writes_control_tokens_where_text_is_split(chat_tokenizer) -> None:
    eos = chat_tokenizer.eos_token_id
    message = {"role": "user", "content": "say <eos>"}
    rows = load_chosen_rows(
        Dataset.from_list([{"messages": [message, {**ASSISTANT, "content": "no <eos>!"}]}]), "train"
    )
    formatter = PromptFormatter(chat_tokenizer, sanitize_control_tokens=True)
    (tokens,) = tokenize_chosen(formatter, rows, (eos,), eos).values()
    assert tokens.prompt_ids.count(eos) == tokens.chosen_ids.count(eos) == 1
    assert text_of(formatter, rows[0], few_shot=False) == "<user>say <eos><eos><assistant>"
    assert chat_tokenizer.decode(list(tokens.chosen_ids)) == "no <eos>!<eos>"


def test_a_control_token_in_a_few_shot_example_is_said(byte_tokenizer, caplog) -> None:
    examples = load_few_shot_examples(
        [{"prompt": "a", "completion": "b<eos>"}, {"prompt": "c <eos> d", "completion": "e"}], False
    )
    PromptFormatter(byte_tokenizer, examples).warn_control_tokens_of_examples()
    assert "few_shot_examples[1] has the special token '<eos>'" in caplog.text
    caplog.clear()
    split = PromptFormatter(byte_tokenizer, examples, sanitize_control_tokens=True)
    split.warn_control_tokens_of_examples()
    assert not caplog.records
