"""Every form of TRL's datasets becomes the tokens that TRL's own class makes of it."""

import copy
import json

import pytest
from datasets import Dataset

TEMPLATE = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{% if m.thinking %}<thoughts>{{ m.thinking }}{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{% endfor %}<eos>"
    "{% endgeneration %}{% else %}{{ m.content }}{% if shout %}!{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALL = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


CHAT = [[user(f"what is {i}"), assistant(f"it is {i}")] for i in range(3)]
LONG = [
    [
        {"role": "system", "content": "be brief"},
        user("1?"),
        assistant("1"),
        user("2?"),
        assistant("2"),
    ]
]
SFT = {
    "language modelling": ({"text": ["a text", "another"]}, {}),
    "another text column": ({"body": ["a text"]}, {"dataset_text_field": "body"}),
    "prompt and completion": ({"prompt": ["1 + 1 ="], "completion": [" 2"]}, {}),
    "whole prompt and completion": (
        {"prompt": ["1 + 1 ="], "completion": [" 2"]}, {"completion_only_loss": False}
    ),
    "messages": ({"messages": CHAT + LONG}, {}),
    "conversational prompt and completion": (
        {"prompt": [c[:1] for c in CHAT], "completion": [c[1:] for c in CHAT]}, {}
    ),
    "assistant_only_loss": ({"messages": LONG}, {"assistant_only_loss": True}),
    "tools": ({"messages": CHAT[:1], "tools": [json.dumps([TOOL])]}, {}),
    "chat_template_kwargs": ({"messages": CHAT[:1], "chat_template_kwargs": [{"shout": True}]}, {}),
    "tool calls": ({"messages": [[user("1 + 1?"), assistant(None, tool_calls=CALL)]]}, {}),
    "thinking, as in harmony": ({"messages": [[user("1?"), assistant("1", thinking="easy")]]}, {}),
    "other columns": ({"text": ["a text"], "source": ["web"], "score": [0.5]}, {}),
    "token ids": ({"input_ids": [[5, 6, 7, 1], [8, 9, 1]]}, {}),
    "formatting_func": ({"q": ["1?"], "a": ["1"]}, {"formatting_func": lambda r: r["q"] + r["a"]}),
    "eos_token": ({"text": ["a text"]}, {"eos_token": "e"}),
    "max_length": ({"text": ["a text that is long enough to be cut"]}, {"max_length": 24}),
}  # fmt: skip
REJECTED = {"rejected": [c[1:] for c in CHAT[::-1]]}
DPO = {
    "text": {"prompt": ["1 + 1 =", "2 + 2 ="], "chosen": [" 2", " 4"], "rejected": [" 3", " 3"]},
    "implicit prompts as text": {"chosen": ["1 + 1 = 2"], "rejected": ["1 + 1 = 3"]},
    "conversational": {
        "prompt": [c[:1] for c in CHAT], "chosen": [c[1:] for c in CHAT], **REJECTED
    },
    "implicit prompts": {
        "chosen": LONG, "rejected": [[*LONG[0][:-1], assistant("3")]]
    },
    "tools": {
        "prompt": [c[:1] for c in CHAT], "chosen": [c[1:] for c in CHAT], **REJECTED,
        "tools": [json.dumps([TOOL])] * 3,
    },
    "chat_template_kwargs": {
        "prompt": [c[:1] for c in CHAT], "chosen": [c[1:] for c in CHAT], **REJECTED,
        "chat_template_kwargs": [{"shout": True}, {"shout": False}, {"shout": True}],
    },
    "tool calls": {
        "prompt": [[user("1 + 1?")]], "chosen": [[assistant(None, tool_calls=CALL)]],
        "rejected": [[assistant("3", tool_calls=None)]],
    },
    "thinking, as in harmony": {
        "prompt": [[user("1?")]], "chosen": [[assistant("1", thinking="easy")]],
        "rejected": [[assistant("2", thinking="hard")]],
    },
    "other columns": {
        "prompt": ["1 + 1 ="], "chosen": [" 2"], "rejected": [" 3"], "score_chosen": [0.9],
    },
}  # fmt: skip


@pytest.fixture
def chat_parts(parts, chat_tokenizer):
    """The parts of trainers, with a tokenizer whose template reads all of TRL's columns."""
    chat_tokenizer.chat_template = TEMPLATE
    parts.tokenizer = chat_tokenizer
    return parts


@pytest.mark.parametrize("num_thoughts", [0, 2])
@pytest.mark.parametrize("form", SFT)
def test_quiet_star_reads_what_sft_reads(build, chat_parts, form, num_thoughts) -> None:
    columns, changes = SFT[form]
    rows = Dataset.from_dict(columns)
    parent = build("SFT", "parent", **{"max_length": 128, **changes}, train_dataset=rows)
    ours = build("Quiet-STaR", **changes, train_dataset=rows, num_thoughts=num_thoughts)
    columns = parent.train_dataset.column_names
    assert set(columns) <= set(ours.train_dataset.column_names)
    assert ours.train_dataset.select_columns(columns).to_list() == parent.train_dataset.to_list()


@pytest.mark.parametrize("form", DPO)
def test_spin_s_prompts_and_chosen_completions_are_dpo_s(build, chat_parts, form) -> None:
    rows = Dataset.from_dict(DPO[form])
    reference = build("SFT", "reference", train_dataset=Dataset.from_dict({"text": ["x"]})).model
    parent = build("DPO", "parent", train_dataset=rows, ref_model=reference)
    ours = build("SPIN", train_dataset=rows)
    theirs = {(*row["prompt_ids"], *row["chosen_ids"]) for row in parent.train_dataset}
    prompts = ours.self_play.training_prompt_ids(ours.self_play.rows)
    own = {(*prompts[name], *tokens.chosen_ids) for name, tokens in ours.chosen.items()}
    assert len(own) == len(rows)
    assert own == theirs


@pytest.mark.parametrize("form", ["text", "messages", "tools", "chat_template_kwargs"])
def test_star_s_prompts_are_rendered_as_grpo_renders_them(build, chat_parts, form) -> None:
    prompt = "what is 1?" if form == "text" else [user("what is 1?")]
    given = {"tools": [json.dumps([TOOL])]} if form == "tools" else {}
    if form == "chat_template_kwargs":
        given = {"chat_template_kwargs": [{"shout": True}]}
    rows = Dataset.from_dict({"prompt": [prompt], "solution": ["1"], **given})
    ours = build("STaR", train_dataset=rows)
    [row] = ours.self_play.rows
    tokenizer = chat_parts.tokenizer
    if form == "text":
        expected = tokenizer(prompt)["input_ids"]
    else:
        expected = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False,
            tools=[TOOL] if form == "tools" else None,
            **({"shout": True} if form == "chat_template_kwargs" else {}),
        )  # fmt: skip
    assert list(ours.self_play.training_prompt_ids([row])[row.prompt_id]) == expected


@pytest.mark.parametrize("method", ["STaR", "Quiet-STaR"])
@pytest.mark.parametrize(
    "field", ["eos_token", pytest.param("chat_template_path", marks=pytest.mark.slow)]
)
def test_the_tokenizer_is_changed_as_by_the_parent(
    build, chat_parts, tmp_path, method, field
) -> None:
    tokenizer = chat_parts.tokenizer
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE.replace("<{{", "[{{")
    other.save_pretrained(tmp_path / "other")
    value = {"eos_token": "e", "chat_template_path": str(tmp_path / "other")}[field]
    rows = Dataset.from_dict({"messages": CHAT})
    parent = build("SFT", "parent", train_dataset=rows, processing_class=copy.deepcopy(tokenizer),
                   **{field: value})  # fmt: skip
    if method == "STaR":
        prompts = [conversation[:1] for conversation in CHAT]
        rows = Dataset.from_dict({"prompt": prompts, "solution": list("012")})
    ours = build(method, train_dataset=rows, **{field: value})
    for name in ("eos_token", "pad_token", "chat_template"):
        assert getattr(ours.processing_class, name) == getattr(parent.processing_class, name)
    config, theirs = ours.model.config, parent.model.config
    assert (config.eos_token_id, config.vocab_size) == (theirs.eos_token_id, theirs.vocab_size)
    if method == "STaR":
        play = ours.self_play
        assert play.eos_token_id == parent.processing_class.eos_token_id
        assert play.eos_token_id in play.eos_token_ids
        [text] = {tokenizer.decode(ids)[0] for ids in play.training_prompt_ids(play.rows).values()}
        assert text == ("[" if field == "chat_template_path" else "<")


def test_spin_leaves_out_kto_s_undesirable_completions(build, parts, caplog) -> None:
    rows = parts.rows.select_columns(["prompt", "completion"])
    ours = build("SPIN", train_dataset=rows.add_column("label", [True, False] * 4))
    assert {row.row_index for row in ours.self_play.rows} == {0, 2, 4, 6}
    assert "4 of 8 rows of `train_dataset` have label=False" in caplog.text
