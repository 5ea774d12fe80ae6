"""RA-2: in each family's template the sampled ids stay, and where rendering again changes them is counted."""

import pytest
from patience import ENDS_S
from simple_tools import add
from test_chat_dialogues import CALL, FAMILIES, TOLD, USER, byte_tokenizer_of
from trl import get_training_chat_template

from trl_selfplay.generation.sampler import SampledCompletion, SampleRequest, SamplingOptions
from trl_selfplay.tools.chat import ChatDialogue
from trl_selfplay.tools.react import ReActDialogue
from trl_selfplay.tools.record import ToolResult
from trl_selfplay.tools.tool_set import ToolSet
from trl_selfplay.tools.trajectories import Trajectories


class Turns:
    """A policy that writes given turns, as a `Sampler`."""

    def __init__(self, *turns) -> None:
        self.turns, self.prompts = turns, []

    def sample(self, requests, options, batch_size, on_tokens=None):
        for number, turn in enumerate(self.turns):
            self.prompts.append(next(requests).prompt_ids)
            yield number, SampledCompletion(tuple(turn), "eos")


def play(tokenizer, dialogue, prompt, *turns):
    policy = Turns(*turns)
    sampler = Trajectories(ToolSet([add], ENDS_S), dialogue).over(policy)
    options = SamplingOptions(4000, eos_token_ids=(tokenizer.eos_token_id,))
    [(_, found)] = sampler.sample([SampleRequest(tuple(prompt), 5)], options, 1)
    return found, policy.prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_sampled_stays_and_is_counted_where_the_template_changes_it(family) -> None:
    """The mask has exactly the policy's ids; each turn's prompt is all ids before it."""
    tokenizer = byte_tokenizer_of(family)
    template = get_training_chat_template(tokenizer) if family == "qwen3" else None
    dialogue = ChatDialogue(tokenizer, {tokenizer.eos_token_id}, template)
    how = {"tools": ToolSet([add], ENDS_S).schemas, "return_dict": False}
    how |= {} if template is None else {"chat_template": template}
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL]}

    def render(*messages, start):
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=start, **how)

    prompt, whole = render(USER, start=True), render(USER, calls, TOLD, start=True)
    shown = len(dialogue.observation_ids([tokenizer.eos_token_id], [ToolResult("add", "7")]))
    end = len(whole) - shown
    as_rendered, answer = whole[len(prompt) : end], [*tokenizer.encode("7"), tokenizer.eos_token_id]
    space = tokenizer.encode(" ", add_special_tokens=False)
    for turn, changed in ((as_rendered, False), ([*space, *as_rendered], True)):
        found, prompts = play(tokenizer, dialogue, prompt, turn, answer)
        own = [i for i, m in zip(found.completion_ids, found.completion_mask, strict=True) if m]
        assert own == [*turn, *answer]
        assert prompts[1] == (*prompt, *found.completion_ids[: -len(answer)])
        assert [m["content"] for m in found.messages if m["role"] == "tool"] == ["7"]
        if whole[: len(prompt)] == prompt:  # else the template changes even what begins a turn
            assert found.num_rerendered_turns == changed


def test_a_call_written_otherwise_than_the_template_writes_it_is_counted() -> None:
    """JSON without spaces, which the template puts there."""
    tokenizer = byte_tokenizer_of("qwen2_5")
    dialogue = ChatDialogue(tokenizer, {tokenizer.eos_token_id})
    schemas = ToolSet([add], ENDS_S).schemas
    prompt = tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, tools=schemas, return_dict=False
    )

    def turn(text):
        call = f"<tool_call>\n{text}\n</tool_call>"
        return [*tokenizer.encode(call, add_special_tokens=False), tokenizer.eos_token_id]

    spaced, dense = (
        turn('{"name": "add", "arguments": {"a": 3, "b": 4}}'),
        turn('{"name":"add","arguments":{"a":3,"b":4}}'),
    )
    found, _ = play(tokenizer, dialogue, prompt, spaced, dense, dense, turn("so 7")[:3])
    assert found.num_rerendered_turns == 2
    assert found.num_failed_calls == 0


def test_text_that_is_tokenized_otherwise_is_counted(byte_tokenizer) -> None:
    """ReAct's turns are text: of a tokenizer with merges, sampled ids need not be those of the text."""
    dialogue = ReActDialogue(byte_tokenizer)
    text = 'Action: add({"a": 1, "b": 2})\nObservation:'
    ids = byte_tokenizer.encode(text, add_special_tokens=False)
    assert not dialogue.read(ids, (), []).is_rerendered
    with_special = [*ids[:8], byte_tokenizer.pad_token_id, *ids[8:]]
    assert dialogue.read(with_special, (), []).is_rerendered
