"""Tools in STaRTrainer, ReSTEMTrainer and IRPOTrainer: prompts, rows, settings, and what is refused."""

import inspect
import types
from types import SimpleNamespace

import pytest
import trl
from bigram_policy import CHAT_STEPS, END, TEXT_STEPS, bigram_model, family_template, word_tokenizer
from datasets import Dataset
from plain_tools import add, look_up

from trl_selfplay import (
    IRPOConfig,
    IRPOTrainer,
    ReSTEMConfig,
    ReSTEMTrainer,
    STaRConfig,
    STaRTrainer,
)
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.rendering import PromptFormatter
from trl_selfplay.rollouts.stored import load_samples
from trl_selfplay.tools.offer import describe
from trl_selfplay.tools.tool_set import ToolSet
from trl_selfplay.trainers.tool_setup import choose_form

CLASSES = {
    "STaR": (STaRTrainer, STaRConfig), "ReST^EM": (ReSTEMTrainer, ReSTEMConfig),
    "IRPO": (IRPOTrainer, IRPOConfig),
}  # fmt: skip
TEMPLATES = {
    "qwen2_5": family_template("qwen2_5"),
    "without tools": "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}",
}
SETTINGS = {
    "num_rounds": 1, "num_generations": 4, "temperature": 1.0, "max_completion_length": 60,
    "max_steps": 2, "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    "bf16": False, "gradient_checkpointing": False, "num_generations_eval": 0,
}  # fmt: skip


def says_yes(completions, **kwargs):
    last = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(text.split()[-1:] == ["yes"]) for text in last]


def rows_of(chat, count=4, **columns):
    prompts = [f"Q {i} + 4 = ?" for i in range(count)]
    if chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Dataset.from_dict({"prompt": prompts, "solution": ["yes"] * count, **columns})


@pytest.fixture
def build(tmp_path):
    """Return a function that builds a trainer whose policy calls `add` or answers at once."""

    def build_one(method="STaR", chat=False, template="qwen2_5", folder="run", **changes):
        trainer_class, config_class = CLASSES[method]
        tokenizer = word_tokenizer(TEMPLATES.get(template, template) if chat else None)
        settings = {**SETTINGS, **({"rationalize": False} if method == "STaR" else {})}
        fields = {k: v for k, v in changes.items() if k in config_class.__dataclass_fields__}
        given = {k: v for k, v in changes.items() if k not in fields}
        arguments = {
            "train_dataset": rows_of(chat), "processing_class": tokenizer,
            "reward_funcs": says_yes, "tools": [add], **given,
        }  # fmt: skip
        model = bigram_model(tokenizer, CHAT_STEPS if chat else TEXT_STEPS)
        args = config_class(str(tmp_path / folder), **{**settings, **fields})
        return trainer_class(model, args=args, **arguments)

    return build_one


def prompt_text(trainer, place=0):
    play = trainer.self_play
    rows = sorted(play.rows, key=lambda row: row.row_index)
    [ids] = play.training_prompt_ids([rows[place]]).values()
    return play.formatter.tokenizer.decode(list(ids))


def test_a_round_trains_on_what_the_policy_wrote_beside_the_results(build) -> None:
    """RA-2, from the constructor to the rows of training."""
    trainer = build()
    trainer.train()
    samples = list(load_samples(trainer.run.folder(0)))
    called = [r for r in samples if r.completion_mask is not None]
    assert 0 < len(called) < len(samples)
    tokenizer = trainer.processing_class
    results = [
        tokenizer.decode(
            [i for i, own in zip(r.completion_ids, r.completion_mask, strict=True) if not own]
        )
        for r in called
    ]
    assert {text.strip() for result in results for text in result.split("\n")} == {"", "7"}
    dataset = Dataset.load_from_disk(str(trainer.run.folder(0) / "dataset"))
    result = tokenizer.convert_tokens_to_ids("7\n")
    masked = [
        label == -100
        for row in dataset
        for token, label in zip(row["input_ids"], row["labels"], strict=True)
        if token == result
    ]
    assert masked
    assert all(masked)


@pytest.mark.parametrize("method", ["STaR", pytest.param("IRPO", marks=pytest.mark.slow)])
def test_a_chat_template_that_knows_tools_shows_and_reads_them(build, method) -> None:
    trainer = build(method, chat=True)
    play = trainer.self_play
    expected = play.formatter.tokenizer.apply_chat_template(
        play.rows[0].prompt, tools=[add], add_generation_prompt=True, return_dict=False
    )
    assert list(play.formatter.token_ids(play.rows[0], few_shot=False)) == expected
    trainer.train()
    roles = {tuple(m["role"] for m in r.messages) for r in load_samples(trainer.run.folder(0))}
    assert ("assistant",) in roles
    assert ("assistant", "tool", "assistant") in roles


def test_plain_text_prompts_describe_the_tools_in_words(build) -> None:
    trainer = build()
    play = trainer.self_play
    told = describe(ToolSet([add], 1.0).schemas)
    assert "add(a: integer, b: integer): Add two numbers.\n  a: The first." in told
    expected = play.formatter.tokenizer.encode(f"{told}\n\n{play.rows[0].prompt}")
    assert list(play.formatter.token_ids(play.rows[0], few_shot=False)) == expected


def test_examples_that_call_tools_take_the_place_of_the_description(build) -> None:
    calling = 'Action: add({"a": 3, "b": 4})\nObservation: 7\nyes'
    for completion, is_told in ((calling, False), ("yes", True)):
        example = {"prompt": "Q 3 + 4 = ?", "completion": completion}
        play = build(few_shot_examples=[example]).self_play
        row = play.rows[0]
        told = f"{describe(ToolSet([add], 1.0).schemas)}\n\n" if is_told else ""
        for few_shot in (False, True):
            shown = f"Q 3 + 4 = ?{completion}\n\n" if few_shot else ""
            expected = play.formatter.tokenizer.encode(f"{told}{shown}{row.prompt}")
            assert list(play.formatter.token_ids(row, few_shot=few_shot)) == expected


def test_a_template_that_renders_turns_otherwise_is_replaced_for_the_run(byte_tokenizer, caplog):
    """Qwen3's leaves out the thoughts of a turn that results follow."""
    byte_tokenizer.eos_token = END
    byte_tokenizer.chat_template = own = family_template("qwen3")
    args = SimpleNamespace(tool_format=None, chat_template_kwargs=None)
    toolbox = ToolSet([add], 1.0)
    form = choose_form(args, byte_tokenizer, toolbox, True, [byte_tokenizer.eos_token_id])
    assert "TRL's training template" in caplog.text
    template = trl.get_training_chat_template(byte_tokenizer)
    formatter = PromptFormatter(byte_tokenizer, tool_form=form)
    assert formatter.rendering(True).chat_template == template
    assert byte_tokenizer.chat_template == own
    messages = [{"role": "user", "content": "1?"}]
    expected = byte_tokenizer.apply_chat_template(
        messages, tools=[add], chat_template=template, add_generation_prompt=True, return_dict=False
    )
    row = PromptRow.of(messages, "a row")
    assert list(formatter.token_ids(row, few_shot=False)) == expected


def test_a_template_without_tools_falls_back_on_words(build, caplog) -> None:
    trainer = build(chat=True, template="without tools")
    assert "called in plain text (ReAct)" in caplog.text
    assert "Action:" in prompt_text(trainer)
    with pytest.raises(ValueError, match="tool_format='chat', but the chat template"):
        build(chat=True, template="without tools", tool_format="chat")
    with pytest.raises(ValueError, match="tool_format='chat', but the prompts are plain text"):
        build(tool_format="chat")


def test_a_row_that_names_tools_is_shown_these(build) -> None:
    tools = [None, ["look_up"], ["look_up", "add"], None]
    trainer = build(tools=[add, look_up], train_dataset=rows_of(False, tools=tools))
    for place, names in enumerate((["add", "look_up"], ["look_up"], ["look_up", "add"])):
        ids = trainer.self_play.formatter.tokenizer.encode(
            describe(
                [
                    s
                    for n in names
                    for s in ToolSet([{"add": add, "look_up": look_up}[n]], 1.0).schemas
                ]
            )
        )
        play = trainer.self_play
        row = next(row for row in play.rows if row.row_index == place)
        assert list(play.formatter.token_ids(row, few_shot=False))[: len(ids) - 1] == ids[:-1]


def test_a_schema_that_nothing_answers_is_refused_before_sampling(build) -> None:
    schema = ToolSet([look_up], 1.0).schemas
    with pytest.raises(ValueError, match=r"row 0: `tools` names 'look_up', and no tool"):
        build(chat=True, train_dataset=rows_of(True, tools=[schema] * 4))


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([lambda a: a], "needs a name|can't be described"),
        ([len], "can't be described"),
        ([add, add], "two tools are named 'add'"),
        ([3], "give a list of functions"),
        (add, "give a list of functions"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_called_are_refused(build, tools, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build(tools=tools)


def test_no_tools_are_none(build) -> None:
    """As for GRPOTrainer."""
    trainer = build(tools=[])
    assert trainer.self_play.collector.trajectories is None
    assert "tools" not in prompt_text(trainer)


def test_chat_messages_without_a_chat_template_are_refused(build) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        build(chat=True, template=None)


def test_settings_of_tools_without_tools_are_warned_of(build, caplog) -> None:
    build(tools=None, max_tool_calling_iterations=3)
    assert "max_tool_calling_iterations=3: without effect without `tools`" in caplog.text


def test_examples_may_call_tools_in_messages(build) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}
    completion = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "7"},
        {"role": "assistant", "content": "yes"},
    ]
    example = {"prompt": "Q 3 + 4 = ?", "completion": completion}
    trainer = build(chat=True, few_shot_examples=[example])
    play = trainer.self_play
    row = play.rows[0]
    asked = [{"role": "user", "content": "Q 3 + 4 = ?"}, *completion, *row.prompt]
    expected = play.formatter.tokenizer.apply_chat_template(
        asked, tools=[add], add_generation_prompt=True, return_dict=False
    )
    assert list(play.formatter.token_ids(row, few_shot=True)) == expected
    with pytest.raises(ValueError, match="Write calls and results as text"):
        build(few_shot_examples=[example])


def test_the_policy_ends_where_its_template_does() -> None:
    """What these tests rest on: a turn ends with EOS, and the prompt with a word of its own."""
    tokenizer = word_tokenizer(family_template("qwen2_5"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith(f"{END}\n<|im_start|>assistant\n")


@pytest.mark.parametrize("change", ["name", "description", "source"])
def test_what_changed_of_a_tool_is_shown_on_resume(build, monkeypatch, change, caplog) -> None:
    trainer = build()
    trainer.train()
    other = types.FunctionType(add.__code__, add.__globals__, add.__name__)
    other.__annotations__, other.__doc__ = add.__annotations__, add.__doc__
    if change == "source":
        monkeypatch.setattr(inspect, "getsource", lambda function: "changed")
    elif change == "name":
        other.__name__ = "sum_up"
    else:
        other.__doc__ = add.__doc__.replace("Add two", "Add up two")
    again = build(tools=[other], num_rounds=2)
    if change == "source":
        again.train(resume_from_checkpoint=True)
        assert "tools_source.add: " in caplog.text
        return
    expected = {"name": r"tools\.sum_up\.description", "description": "'Add two.*' → 'Add up two"}
    with pytest.raises(ValueError, match=expected[change]):
        again.train(resume_from_checkpoint=True)
