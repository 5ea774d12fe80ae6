"""Calls and results in the chat templates that TRL ships: what the policy wrote stays as it is."""

import json
from pathlib import Path

import pytest
import trl
from jinja2 import TemplateError
from simple_tools import add
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import add_response_schema, get_training_chat_template

from trl_selfplay.tools.arguments import find_wrong
from trl_selfplay.tools.chat import ChatDialogue
from trl_selfplay.tools.record import ToolResult
from trl_selfplay.tools.tool_set import ToolSet

FOLDER = Path(trl.__file__).parent / "chat_templates"
# Each family's templates, and what ends a turn there.
FAMILIES = {
    "gemma4_v5": "<turn|>", "glm4moe": "<|user|>", "gptoss": "<|return|>", "lfm2_v2": "<|im_end|>",
    "llama3_1": "<|eot_id|>", "llama3_2": "<|eot_id|>", "nemotron_3_nano": "<|im_end|>",
    "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "qwen3_5_think": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
}  # fmt: skip
USER = {"role": "user", "content": "3 + 4?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOLD = {"role": "tool", "name": "add", "content": "7"}


def byte_tokenizer_of(family):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_alone = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_alone, eos_token=FAMILIES[family], pad_token="<pad>"
    )
    tokenizer.chat_template = (FOLDER / f"{family}.jinja").read_text()
    return add_response_schema(tokenizer)


@pytest.fixture(params=FAMILIES)
def family(request):
    """The tokenizer, its dialogue, the tools' schemas, and a function that renders messages."""
    tokenizer = byte_tokenizer_of(request.param)
    template = get_training_chat_template(tokenizer) if request.param == "qwen3" else None
    schemas = ToolSet([add], 5.0).schemas
    how = {"tools": schemas, "tokenize": True, "return_dict": False}
    if template is not None:
        how["chat_template"] = template

    def render(*messages, start_turn):
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=start_turn, **how)
        return list(found)

    return tokenizer, ChatDialogue(tokenizer, {tokenizer.eos_token_id}, template), schemas, render


def test_a_turn_and_its_results_are_what_the_template_renders(family) -> None:
    tokenizer, dialogue, schemas, render = family
    prompt, whole = render(USER, start_turn=True), render(USER, CALLS, TOLD, start_turn=True)
    shown = list(dialogue.observation_ids([tokenizer.eos_token_id], [ToolResult("add", "7")]))
    assert whole[-len(shown) :] == shown
    turn = whole[len(prompt) : -len(shown)]
    [call] = dialogue.read(turn, prompt, schemas).calls
    assert (call.name, call.arguments, call.error) == ("add", {"a": 3, "b": 4}, None)


def test_two_results_follow_each_other(family) -> None:
    tokenizer, dialogue, _, render = family
    results = [ToolResult("add", "7"), ToolResult("add", "8")]
    shown = list(dialogue.observation_ids([tokenizer.eos_token_id], results))
    calls = {**CALLS, "tool_calls": [CALL, CALL]}
    try:
        whole = render(USER, calls, TOLD, {**TOLD, "content": "8"}, start_turn=True)
    except TemplateError as error:  # Llama's render one call per turn, but all results
        if "single tool-calls" not in str(error):
            raise
        assert "8" in tokenizer.decode(shown)
        return
    assert whole[-len(shown) :] == shown


def test_a_turn_that_a_stop_string_ended_is_closed(family) -> None:
    tokenizer, dialogue, _, _ = family
    (letter,) = tokenizer.encode("x", add_special_tokens=False)
    result = [ToolResult("add", "7")]
    closed = dialogue.observation_ids([tokenizer.eos_token_id], result)
    shown = dialogue.observation_ids([letter], result)
    assert shown in (closed, (tokenizer.eos_token_id, *closed))


def test_a_call_that_cannot_be_read_is_malformed(family) -> None:
    """RA-11: whatever is cut off a call's end, or changed in it, no other call is read from it."""
    tokenizer, dialogue, schemas, render = family
    prompt, whole = render(USER, start_turn=True), render(USER, CALLS, TOLD, start_turn=True)
    shown = dialogue.observation_ids([tokenizer.eos_token_id], [ToolResult("add", "7")])
    turn = whole[len(prompt) : -len(shown)]
    text = tokenizer.decode(turn)
    eos = text[-1:] and tokenizer.eos_token
    body = text.removesuffix(eos).rstrip()
    start = body.index("add")

    def read(changed):
        ids = tokenizer.encode(changed, add_special_tokens=False)
        return dialogue.read(ids, prompt, schemas)

    whole_call = read(text).calls
    assert [call.arguments for call in whole_call] == [{"a": 3, "b": 4}]
    is_bare_json = body.startswith("{")  # a call that isn't begun is an answer there
    for end in range(start + 1, len(body)):
        reply = read(f"{body[:end]}{eos}")
        assert (
            reply.malformed or (end > body.index("4") and reply.calls == whole_call) or is_bare_json
        )
        assert reply.malformed or not is_bare_json or reply.calls == ()
        assert not reply.malformed or "tool_calls" not in reply.message


def test_an_answer_is_not_malformed(family) -> None:
    tokenizer, dialogue, schemas, render = family
    prompt = render(USER, start_turn=True)
    for text in ("So 7.", "", "[1, 2]", '{"name": 3}', "1 < 2 > 0", "to=functions"):
        ids = tokenizer.encode(f"{text}{tokenizer.eos_token}", add_special_tokens=False)
        reply = dialogue.read(ids, prompt, schemas)
        assert not reply.malformed
        assert reply.calls == ()


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3_5_think", "nemotron_3_nano"], indirect=True)
def test_tags_left_in_the_text_are_malformed_but_not_in_closed_thoughts(family) -> None:
    tokenizer, dialogue, schemas, render = family
    prompt = render(USER, start_turn=True)

    def is_malformed(text):
        ids = tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False)
        return dialogue.read(ids, prompt, schemas).malformed

    assert is_malformed("so\n<tool_call>")
    assert is_malformed('{"name": "add"}\n</tool_call>')
    assert is_malformed("<tool_call>[1, 2]</tool_call>")
    assert is_malformed('<tool_call>{"arguments": {}}</tool_call>')
    thought = "" if tokenizer.decode(prompt).endswith("<think>\n") else "<think>"
    assert not is_malformed(f"{thought}Shall I write <tool_call>?</think>\n7")


def test_arguments_nested_beyond_reason_are_malformed(family) -> None:
    tokenizer, dialogue, schemas, render = family
    prompt, whole = render(USER, start_turn=True), render(USER, CALLS, TOLD, start_turn=True)
    shown = dialogue.observation_ids([tokenizer.eos_token_id], [ToolResult("add", "7")])
    text = tokenizer.decode(whole[len(prompt) : -len(shown)])
    # Nemotron's pattern takes quadratic time in transformers' parser.
    for depth in (100, 100_000 if text.startswith("<tool_call>") else 2_000):
        deep = "[" * depth + "]" * depth
        ids = tokenizer.encode(text.replace("3", deep), add_special_tokens=False)
        reply = dialogue.read(ids, prompt, schemas)
        assert reply.malformed or all(
            json.dumps(dict(c.arguments)) and find_wrong(c.arguments, schemas[0])
            for c in reply.calls
        )
