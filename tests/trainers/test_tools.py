"""Tools in STaRTrainer, ReSTEMTrainer and IRPOTrainer: prompts, rows, settings, and what is refused."""

import inspect
import json
import re
import types
from types import SimpleNamespace

import pytest
import trl
from bigram_policy import (
    ACT,
    ASK,
    CHAT_STEPS,
    END,
    TEXT_STEPS,
    bigram_model,
    family_template,
    word_tokenizer,
)
from datasets import Dataset
from patience import ENDS_S
from plain_tools import Counter, Hides, Says, Silent, add, draw, look_up, rows_found
from tiny_trainers import QUIET, build_trainer

from trl_selfplay.disk import save_text
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rollouts.rendering import FewShotExample, PromptFormatter
from trl_selfplay.rollouts.stored import load_samples
from trl_selfplay.rounds.empty_round import EmptyRoundError
from trl_selfplay.rounds.identity import check_identity, describe_trainer
from trl_selfplay.tools.offer import describe
from trl_selfplay.tools.record import ToolCall
from trl_selfplay.tools.tool_set import ToolSet
from trl_selfplay.trainers.tool_setup import check_examples, choose_form

TEMPLATES = {
    "qwen2_5": family_template("qwen2_5"),
    "without tools": "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}",
}
SETTINGS = {
    **QUIET, "num_rounds": 1, "num_generations": 4, "temperature": 1.0, "max_completion_length": 60,
    "max_steps": 2, "save_strategy": "no", "bf16": False, "num_generations_eval": 0,
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
        tokenizer = word_tokenizer(TEMPLATES.get(template, template) if chat else None)
        settings = {**SETTINGS, **({"rationalize": False} if method == "STaR" else {})}
        given = {
            "train_dataset": rows_of(chat), "processing_class": tokenizer,
            "reward_funcs": says_yes, "tools": [add], **changes,
        }  # fmt: skip
        model = given.pop("model", bigram_model(tokenizer, CHAT_STEPS if chat else TEXT_STEPS))
        return build_trainer(method, model, tmp_path / folder, settings, **given)

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


def renamed(answer):
    def tool(a: int, b: int) -> str:
        """Add numbers.

        Args:
            a: One.
            b: Another.
        """
        return answer()

    tool.__name__ = "add"
    return tool


def test_calls_that_all_fail_are_warned_of(build, caplog) -> None:
    build(tools=[renamed(lambda: 1 / 0)], max_steps=1).train()
    assert "round 0: every call of a tool failed" in caplog.text
    caplog.clear()
    build(folder="other", max_steps=1).train()
    assert "every call" not in caplog.text


def test_results_without_room_are_named_where_nothing_is_left(build) -> None:
    trainer = build(
        tools=[renamed(lambda: "7 " * 100)],
        model=bigram_model(word_tokenizer(), {**TEXT_STEPS, ASK: {ACT[0]: 1.0}}),
    )
    with pytest.raises(EmptyRoundError, match="In 16 of them there was no room for the result"):
        trainer.train()


def test_each_reason_why_no_completion_ended_is_named_where_nothing_is_left(build) -> None:
    """Half begins with a call that can't be read; the other half never ends."""
    steps = {
        **TEXT_STEPS, ASK: {"Action:": 0.5, "=": 0.5}, "=": {"=": 1.0}, "Action:": {"no": 1.0},
        "no": {"Observation:": 1.0},
    }  # fmt: skip
    trainer = build(model=bigram_model(word_tokenizer(), steps))
    with pytest.raises(EmptyRoundError) as caught:
        trainer.train()
    text = str(caught.value)
    (cut,) = map(int, re.findall(r"(\d+) of them were cut at max_completion_length=60", text))
    (unread,) = map(int, re.findall(r"(\d+) of them ended with a call that can't be read", text))
    assert cut + unread == 16
    assert "All of them" not in text


@pytest.mark.slow
def test_held_out_prompts_and_hints_have_the_tools_too(build) -> None:
    heldout = Dataset.from_dict(
        {"prompt": [f"Q {i} + 5 = ?" for i in range(6)], "solution": ["no"] * 6}
    )
    trainer = build(
        eval_dataset=heldout, num_generations_eval=4, rationalize=True, hint_formatter=lambda p, _: p,
        leak_filter=lambda *_: None, num_generations=1, train_dataset=rows_of(False, 30),
    )  # fmt: skip
    trainer.train()
    assert "eval_tools/call_frequency" in trainer.evaluate()
    folder = trainer.run.folder(0)
    heldout = [r for path in folder.rglob("*sampled-*.parquet") for r in load_rollouts(path)]
    hinted = [r for r in load_samples(folder) if r.hinted]
    for rollouts in (heldout, hinted):
        assert any(m["role"] == "tool" for r in rollouts for m in r.messages)
        told = describe(ToolSet([add], 1.0).schemas)
        ids = tuple(trainer.processing_class.encode(f"{told}\n\nQ")[:-1])
        assert all(r.prompt_ids[: len(ids)] == ids for r in rollouts)


@pytest.mark.slow
def test_a_dry_run_calls_tools_and_changes_no_sample(build, capsys) -> None:
    trainer = build(dry_run=True)
    trainer.train()
    out = capsys.readouterr().out
    assert "nothing was trained" in out
    assert "Observation:" in out
    after, without = build(folder="after"), build(folder="without")
    for each in (after, without):
        each.train()
    own, others = (
        {(r.prompt_id, r.sample_index): r.completion_ids for r in load_samples(t.run.folder(0))}
        for t in (after, without)
    )
    assert own == others


def test_what_is_not_deterministic_is_told_in_log_and_card(build, tmp_path, caplog) -> None:
    trainer = build(tools=[add, draw])
    assert "draw: declared as not deterministic" in caplog.text
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "| Tools | add, draw |" in card
    assert "| Tools declared as not deterministic | draw |" in card


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


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (ToolSet([look_up], 1.0).schemas, "row 0: `tools` names 'look_up', and no tool"),
        ('[{"type": "function"}]', "row 0: `tools` has the schema {.*}, which has no name"),
        (["add", "add"], "row 0: `tools` names 'add' twice"),
        ("add", "row 0: `tools` is 'add', which is not JSON.*a list of tools' names or schemas"),
    ],
)
def test_a_row_s_tools_that_nothing_answers_are_refused_before_sampling(
    build, tools, message
) -> None:
    with pytest.raises(ValueError, match=message):
        build(chat=True, train_dataset=rows_of(True, tools=[tools] * 4))


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([lambda a: a], "needs a name|can't be described"),
        ([len], "can't be described"),
        ([add, add], "two tools are named 'add'"),
        ([3], "give a list of functions"),
        (add, "give a list of functions"),
        (3, "tools=3: give a list of functions"),
        (["my_tools.add"], "give a list of functions. Import paths are for the command line"),
        ([dict], "the tool 'dict' is a class: give a function"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_called_are_refused(build, tools, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        build(tools=tools)


@pytest.mark.parametrize(("most", "share", "without"), [(7, "0%", 1.0), (9, "11%", 0.0)])
def test_the_alarm_of_cut_completions_tells_the_room_that_results_take(
    build, caplog, most, share, without
) -> None:
    """A call has six tokens and its result one: the first has no room in 7, the second call none in 9."""
    trainer = build(max_completion_length=most, max_steps=1, num_generations=8)
    trainer.train()
    cut = [r for r in load_samples(trainer.run.folder(0)) if r.is_truncated]
    assert len(cut) > 3
    assert f"took {share} of the tokens of the cut ones" in caplog.text
    assert f"in {without * len(cut):.0f} of them the next result had no room" in caplog.text


def test_no_tools_are_none(build) -> None:
    """As for GRPOTrainer."""
    trainer = build(tools=[])
    assert trainer.self_play.collector.trajectories is None
    assert "tools" not in prompt_text(trainer)


def test_chat_messages_without_a_chat_template_are_refused(build, caplog) -> None:
    with pytest.raises(ValueError, match="has no chat template"):
        build(chat=True, template=None)
    assert "ReAct" not in caplog.text


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


def in_words(call, result="7"):
    return f"Action: {call}\nObservation: {result}\nyes"


def in_messages(arguments, result="7", name="add"):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    turns += [{"role": "tool", "name": name, "content": result}] if result else []
    return [*turns, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (in_words('sum_up({"a": 3})'), r"'sum_up\(.* would fail: no tool 'sum_up'; known: add"),
        (in_words('add({"a": 3})'), "would fail: wrong arguments: b is missing"),
        (in_words('add({"a": 3, "b": 4}) now'), r"4}\) now' would fail: it can't be read"),
        (in_words('add({"a": 3, "b": 4})') + "\nAction: add[x]\nObservation: 1", "b is missing"),
        (in_messages({"a": 3, "b": 4}, name="sum_up"), "no tool 'sum_up'"),
        (in_messages({"a": 3}), "b is missing"),
        (in_messages({"a": 3, "b": 4, "c": None}, result=None), "there is no argument 'c'"),
        (in_messages('{"a": 3}'), "b is missing"),
        (in_messages("3, 4"), "arguments are no mapping: '3, 4'"),
    ],
)
def test_an_example_whose_call_would_fail_is_refused(build, completion, message) -> None:
    """It would teach the policy to call what isn't there."""
    example = {"prompt": "Q 3 + 4 = ?", "completion": completion}
    with pytest.raises(ValueError, match=rf"few_shot_examples\[1\]: the call .*{message}"):
        build(
            chat=not isinstance(completion, str),
            few_shot_examples=[{"prompt": "Q", "completion": "yes"}, example],
        )


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ("call answer", "a call has no result"),
        ("call call result answer", "a call has no result"),
        ("answer call", "a call has no result"),
        ("call result", "the answer after its last result is missing"),
        ("result answer", "the result '7' follows no call"),
        ("call result result answer", "the result '7' follows no call"),
        ("calls result answer", "a call has no result"),
        ("calls result result call result answer", None),
        ("answer", None),
    ],
)
def test_an_example_shows_each_call_with_its_result_and_ends_with_an_answer(roles, message):
    """It would teach the policy to answer without the result, or to stop after it."""
    call, result, answer = in_messages({"a": 3, "b": 4})
    both = {**call, "tool_calls": call["tool_calls"] * 2}
    turns = {"call": call, "calls": both, "result": result, "answer": answer}
    examples = [FewShotExample("Q", [turns[role] for role in roles.split()], None)]
    check_refusal(examples, False, message)


def check_refusal(examples, in_words, message) -> None:
    """Check that the first example is refused with a message, or all are taken if that is None."""
    form = SimpleNamespace(toolbox=ToolSet([add], 1.0), in_words=in_words)
    if message is None:
        check_examples(examples, form)
        return
    with pytest.raises(ValueError, match=rf"few_shot_examples\[0\]: {message}"):
        check_examples(examples, form)


CALL = 'Action: add({"a": 3, "b": 4})\n'


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        (CALL + "yes", "a call has no result: Observation: must follow"),
        ("Action: Finish[yes]", "a call has no result: .* An answer has no Action:"),
        (CALL + CALL + "Observation: 7\nyes", "the answer after its last result is missing"),
        (CALL + CALL + "Observation: 7", "a call has no result: it must stand behind Observation:"),
        (CALL + "Observation:\n" + CALL + "Observation: 7\nyes", "a call has no result: it must"),
        (CALL + "Observation: " + CALL + "Observation: 7\nyes", "a call has no result: it must"),
        (CALL + "Observation:", "a call has no result"),
        (CALL + "Observation: 7\n", "the answer after its last result is missing"),
        ("I know.\nObservation: 7\nyes", "the result '7' follows no Action: line"),
        (CALL + "Observation: 7\nObservation: 7\nyes", "the result '7' follows no Action: line"),
        (CALL + "Observation: 7\nSo.\n" + CALL + "yes", "a call has no result: Observation: must"),
        (CALL + CALL + "Observation: 7\n7\nSo.\n" + CALL + "Observation: 7\nyes", None),
        ("yes", None),
    ],
)
def test_an_example_in_words_shows_each_result_and_ends_with_an_answer(completion, message) -> None:
    """As one in messages does."""
    examples = [FewShotExample("Q", completion, None)]
    check_refusal(examples, True, message)
    check_refusal(examples, False, None)  # no calls


def test_an_example_may_show_what_the_run_would_show(build) -> None:
    """Also a failed call, as the run tells it; and a text in the template's form has no calls."""
    failing = [in_words('add({"a": 3})', "Error: b is missing"), in_words("add[3]", "Error: no")]
    build(few_shot_examples=[{"prompt": "Q", "completion": text} for text in failing])
    shown = [
        in_messages({"a": 3}, "Error: b"), in_messages('{"a": 3, "b": 4}'), in_words("lo[3]")
    ]  # fmt: skip
    examples = [{"prompt": "Q", "completion": completion} for completion in shown]
    build(chat=True, folder="chat", few_shot_examples=examples)
    with pytest.raises(ValueError, match=r"\[0\]: it calls tools in messages, and this run"):
        build(chat=True, folder="words", tool_format="react", few_shot_examples=examples)


def test_the_policy_ends_where_its_template_does() -> None:
    """What these tests rest on: a turn ends with EOS, and the prompt with a word of its own."""
    tokenizer = word_tokenizer(family_template("qwen2_5"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Q"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith(f"{END}\n<|im_start|>assistant\n")


@pytest.mark.parametrize("change", ["name", "description", "type", "source", "none"])
def test_what_changed_of_a_tool_is_shown_on_resume(build, tmp_path, monkeypatch, change, caplog):
    path = tmp_path / "config.json"
    check_identity(describe_trainer(build()), path, 0, is_trained=False)
    other = types.FunctionType(add.__code__, add.__globals__, add.__name__)
    other.__annotations__, other.__doc__ = dict(add.__annotations__), add.__doc__
    if change == "name":
        other.__name__ = "sum_up"
    elif change == "description":
        other.__doc__ = add.__doc__.replace("Add two", "Add up two")
    elif change == "type":
        other.__annotations__["b"] = float
    elif change == "source":
        monkeypatch.setattr(inspect, "getsource", lambda function: "changed")
    given = {"tools": None, "tool_deadline": ENDS_S} if change == "none" else {"tools": [other]}
    again = describe_trainer(build(**given))
    if change == "source":
        check_identity(again, path, 0, is_trained=False)
        assert "the source of the tool add changed since. Completions that called it" in caplog.text
        monkeypatch.undo()
        check_identity(describe_trainer(build()), path, 1, is_trained=True)
        assert "the source of the tool add: '" in caplog.text
        assert "tools_source" not in caplog.text
        return
    # One line per tool, and no word about the source of one that is refused.
    begin, end = r"These may never change:\n  the tool ", r"\nRestore these values .*output_dir\.$"
    expected = {
        "name": "add: gone\n  the tool sum_up: new",
        "description": "add: description: 'Add two.*' → 'Add up two.*",
        "type": r"add: parameters\.properties\.b\.type: 'integer' → 'number'",
        "none": "add: gone",
    }
    with pytest.raises(ValueError, match=f"{begin}{expected[change]}{end}"):
        check_identity(again, path, 0, is_trained=False)


def test_a_run_of_before_there_were_tools_takes_none_on_resume(build, tmp_path) -> None:
    path = tmp_path / "config.json"
    check_identity(describe_trainer(build(tools=None)), path, 0, is_trained=False)
    record = json.loads(path.read_text())
    save_text(path, json.dumps({k: v for k, v in record.items() if not k.startswith("tools")}))
    check_identity(describe_trainer(build(tools=None)), path, 0, is_trained=False)
    save_text(path, json.dumps({k: v for k, v in record.items() if not k.startswith("tools")}))
    with pytest.raises(ValueError, match=r"the tool add: new"):
        check_identity(describe_trainer(build()), path, 0, is_trained=False)


def test_tools_that_return_lists_are_told_to_give_reward_functions_text(build, caplog) -> None:
    """GRPOTrainer gives them the list, so a reward function that tests for one would find none."""
    toolbox = build(tools=[add, rows_found]).self_play.toolbox
    assert (
        "rows_found: returns a list. The policy and reward functions get it as text" in caplog.text
    )
    result = toolbox.call(ToolCall("rows_found", {"word": "a"}))
    assert result.content == "[('a', 1)]"
    toolbox.close()


# --- environments ---


def test_an_environment_s_first_words_end_the_prompt_and_its_reward_grades(build) -> None:
    """As in GRPOTrainer; prompts are missing, and so are reward functions."""
    rows = Dataset.from_dict({"target": [5, 12]})
    trainer = build(
        chat=True, tools=None, environment_factory=Counter, reward_funcs=None, train_dataset=rows,
        num_generations=6,
    )  # fmt: skip
    play = trainer.self_play
    assert [row.prompt for row in sorted(play.rows, key=lambda row: row.row_index)] == [
        [{"role": "user", "content": " 5"}], [{"role": "user", "content": " 12"}],
    ]  # fmt: skip
    assert play.collector.scorer.names == ("Counter",)
    trainer.train()
    for r in load_samples(trainer.run.folder(0)):
        target = 5 if " 5 <|im_end|>" in r.prompt else 12
        if r.halt is None and r.finish != "length":
            num_calls = sum(m["role"] == "tool" for m in r.messages)
            assert r.rewards == (float(7 * num_calls >= target),)


def test_a_dict_of_environments_shows_each_row_its_own_tools(build) -> None:
    rows = rows_of(False, 3, environment=["count", "silent", "count"], target=[5, 6, 7])
    given = {"count": Counter, "silent": Silent}
    trainer = build(
        tools=None, environment_factory=given, reward_funcs=says_yes, reward_weights=[0.5], reward_threshold=0.5,
        train_dataset=rows,
    )  # fmt: skip
    texts = [prompt_text(trainer, place) for place in range(3)]
    encoded = [trainer.processing_class.encode(f"{describe([schema])}\n\nQ")[:-1] for schema in
               trainer.self_play.formatter.tool_form.toolbox.schemas]  # fmt: skip
    decoded = [trainer.processing_class.decode(ids) for ids in encoded]
    assert [[text.startswith(told) for told in decoded] for text in texts] == [
        [True, False], [False, True], [True, False],
    ]  # fmt: skip
    scorer = trainer.self_play.collector.scorer
    assert scorer.names == ("says_yes", "Counter")
    assert scorer.weighted([1.0, 1.0]) == 1.5
    trainer.train()
    for r in load_samples(trainer.run.folder(0)):
        [row] = [row for row in trainer.self_play.rows if row.prompt_id == r.prompt_id]
        if r.is_graded and r.halt is None:
            assert (r.rewards[1] is None) == (row.columns["environment"] == "silent")


def test_a_held_out_task_may_have_the_prompt_of_another_task(build) -> None:
    """RA-12: with an environment, its columns say which task it is, and the same one is refused."""
    rows, others = (Dataset.from_dict({"prompt": ["Q ?"] * 2, "seed": s}) for s in ([1, 2], [3, 4]))
    given = {"environment_factory": Hides, "tools": None, "train_dataset": rows}
    play = build(eval_dataset=others, **given).self_play
    assert len({row.prompt_id for row in [*play.rows, *play.heldout[""]]}) == 4
    with pytest.raises(ValueError, match="2 of 2 prompts of `eval_dataset` are in `train_dataset`"):
        build(eval_dataset=rows, **given)


def test_environments_with_rewards_of_their_own_count_as_one_reward(build) -> None:
    """A completion has one environment, so a threshold of 1 means its reward."""
    rows = rows_of(False, 3, environment=["count", "other", "count"], target=[0, 0, 0])
    given = {"count": Counter, "other": type("Other", (Counter,), {})}
    settings = {"tools": None, "environment_factory": given, "train_dataset": rows}
    trainer = build(reward_funcs=None, **settings)
    assert trainer.self_play.collector.scorer.names == ("Counter", "Other")
    trainer.train()
    with pytest.raises(ValueError, match=r"2 reward functions with .* Set reward_threshold=2.0"):
        build(**settings)
    with pytest.raises(ValueError, match=r"reward_weights has 2 entries for 1 reward functions;"):
        build(reward_weights=[1.0, 1.0], **settings)


@pytest.mark.parametrize("kind", [Hides, Says])
def test_equal_rows_are_tasks_of_their_own_with_an_environment(build, caplog, kind) -> None:
    """As in scripts for GRPOTrainer, which repeat a row for as many games as there are to be."""
    rows = Dataset.from_dict({"prompt": ["Q ?"] * 4 + ["A ?"], "word": ["a", "a", "a", "b", "a"]})
    play = build(environment_factory=kind, tools=None, train_dataset=rows).self_play
    assert "2 of 5 rows equal an earlier one. Each is a task of its own" in caplog.text
    assert len({row.prompt_id for row in play.rows}) == 5
    call = ToolCall("look_up", {"word": "a"})

    def numbers(key):
        sessions = {row.row_index: play.toolbox.open(row.task, key) for row in play.rows}
        found = {index: session.call(call).content for index, session in sessions.items()}
        for session in sessions.values():
            session.close()
        return found

    assert numbers(1) == numbers(2)  # all samples of a row begin alike
    assert len({*numbers(1).values()}) == 5
    if kind is Says:
        said = {row.row_index: row.prompt.rpartition(" ")[2] for row in play.rows}
        assert said == numbers(1)
    assert all({*row.columns} == {"prompt", "word"} for row in play.rows)  # for reward functions
    shuffled = rows.select([3, 4, 2, 0, 1])
    again = build(
        environment_factory=kind, tools=None, train_dataset=shuffled, folder="other"
    ).self_play
    assert [r.prompt_id for r in again.rows] == [r.prompt_id for r in play.rows]


def test_what_environments_cannot_do_is_refused(build) -> None:
    gold = Dataset.from_dict({"prompt": ["Q 1 + 4 = ?"], "completion": ["yes"]})
    with pytest.raises(ValueError, match="`gold_dataset` with an `environment_factory`"):
        build("ReST^EM", environment_factory=Silent, tools=None, gold_dataset=gold)
    with pytest.raises(ValueError, match="`reward_funcs` is missing"):
        build(environment_factory=Silent, tools=None, reward_funcs=None)
    for reset, message in (
        (lambda self, word: None, r"argument: 'word'"),
        (lambda self: None, r"unexpected keyword"),
    ):
        wrong = type("Wrong", (Silent,), {"reset": reset})
        with pytest.raises(TypeError, match=rf"`reset` of Wrong .*\*\*kwargs.*{message}"):
            build(environment_factory=wrong, tools=None)
    with pytest.raises(ValueError, match=r"`environment` is 'other'"):
        build(
            environment_factory={"silent": Silent}, tools=None,
            train_dataset=rows_of(False, environment=["other"] * 4),
        )  # fmt: skip


def test_template_arguments_of_rows_are_refused_where_results_are_shown_alike(build) -> None:
    rows = rows_of(True, chat_template_kwargs=[{"x": 1}] * 4)
    with pytest.raises(
        ValueError, match=r"row \d has `chat_template_kwargs` of its own, and tools"
    ):
        build(chat=True, train_dataset=rows)
    assert len(build(chat=True, train_dataset=rows, tool_format="react").self_play.rows) == 4
