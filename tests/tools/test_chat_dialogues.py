"""Calls and results in the chat templates that TRL ships: what the policy wrote stays as it is."""

from pathlib import Path

import pytest
import trl
from jinja2 import TemplateError
from simple_tools import add
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import add_response_schema, get_training_chat_template

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


def test_a_call_that_cannot_be_read_is_text(family) -> None:
    tokenizer, dialogue, schemas, render = family
    for text in ("<tool_call>\n{'name': ", "<tool_call>[1, 2]</tool_call>", '{"name": 3}', "7"):
        turn = tokenizer.encode(text, add_special_tokens=False)
        reply = dialogue.read(
            [*turn, tokenizer.eos_token_id], render(USER, start_turn=True), schemas
        )
        assert all(call.error is not None or call.name != "add" for call in reply.calls)
        assert reply.message["role"] == "assistant"
