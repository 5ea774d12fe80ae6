"""RA-2, RA-11: whatever a policy writes and a tool answers, the context is what was sampled and shown, exactly."""

import re
from itertools import chain, count

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from simple_tools import add
from test_chat_dialogues import CALLS, FAMILIES, TOLD, USER, byte_tokenizer_of
from trl import get_training_chat_template

from trl_selfplay.generation.sampler import SampledCompletion, SampleRequest, SamplingOptions
from trl_selfplay.tools.agent import MalformedAction
from trl_selfplay.tools.chat import ChatDialogue
from trl_selfplay.tools.react import OBSERVATION, ReActDialogue
from trl_selfplay.tools.record import ToolCall, ToolResult
from trl_selfplay.tools.search_agent import parse_action
from trl_selfplay.tools.tool_set import describe_tools
from trl_selfplay.tools.trajectories import Trajectories

pytestmark = pytest.mark.slow

PROFILE = settings(
    derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
_, SCHEMAS = describe_tools([add])
MOST = 400  # tokens of a trajectory
# What a model that calls in plain text puts together, rightly or not.
WORDS = [
    'Action: add({"a": 3, "b": 4})\n', "Action: add[3]\nAction: add({})\n", "Action: ", "add", "add[3]", '({"a": 3, "b": 4})', 'add({"a": 3, "b": 4})', "[", "]", "(", ")",
    "{", "}", '"a"', ": ", "3", ", ", "\n", OBSERVATION, "Observation", "Thought: so\n", "NaN",
    "1e999", '"\\ud800"', "[" * 70, '{"a":' * 70,
]  # fmt: skip


class AnyTurns:
    """A policy that writes what it is given, as a `Sampler`, within the room that it has."""

    def __init__(self, turns, eos, stop) -> None:
        self.turns, self.eos, self.stop = turns, eos, stop
        self.asked, self.written = [], []

    def sample(self, requests, options, batch_size, on_tokens=None):
        requests = iter(requests)
        for number, turn in enumerate(chain(self.turns, [[self.eos]] * MOST)):
            while (request := next(requests, count())) is None:
                pass
            if not isinstance(request, SampleRequest):
                return
            own = turn[: request.max_completion_length]
            ends = {self.eos: "eos"} | ({self.stop[-1]: "stop"} if self.stop else {})
            finish = ends.get(own[-1], "length")
            if finish == "length" and len(own) < request.max_completion_length:
                own, finish = [*own, self.eos], "eos"
            self.asked.append(request.prompt_ids)
            self.written.append(tuple(own))
            yield number, SampledCompletion(tuple(own), finish)


class Answering:
    """Tools whose results are given."""

    has_reward = False

    def __init__(self, results) -> None:
        self.results, self.made = iter(results), []

    def schemas_of(self, columns):
        return SCHEMAS

    def open(self, columns, key):
        return self

    def call(self, call):
        assert isinstance(call, ToolCall)
        assert isinstance(call.arguments, dict)
        self.made.append(ToolResult(call.name, next(self.results)))
        return self.made[-1]

    def close(self) -> None:
        pass


def try_trajectories(tokenizer, dialogue, prompt, fragments, examples) -> None:
    """Play trajectories of any turns and results, and put each together again from its parts.

    The first two fragments are whole calls.
    """
    eos, stop = tokenizer.eos_token_id, None
    if dialogue.stop_strings:
        stop = tokenizer.encode(OBSERVATION, add_special_tokens=False)
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in fragments if text]
    piece = st.one_of(
        st.sampled_from(encoded),
        st.text(max_size=6).map(lambda text: tokenizer.encode(text, add_special_tokens=False)),
        st.integers(0, len(tokenizer) - 1).map(lambda token: [token]),
    )

    def pieces(least, most):
        return st.lists(piece, min_size=least, max_size=most).map(lambda found: [*chain(*found)])

    around = st.tuples(pieces(0, 1), st.sampled_from(encoded[:2]), pieces(0, 1))
    whole = st.one_of(pieces(1, 12), around.map(lambda parts: [*chain(*parts)])).filter(len)
    ends = [[eos]] if stop is None else [[eos], stop]
    turns = st.lists(
        st.tuples(whole, st.sampled_from(ends)).map(lambda parts: parts[0] + parts[1]), max_size=4
    )
    result = st.one_of(st.text(max_size=20), st.sampled_from(fragments))

    @settings(PROFILE, max_examples=examples)
    @given(turns, st.lists(result, min_size=30, max_size=30))
    def attempt(turns, results) -> None:
        for own in turns:
            reply = dialogue.read(own, prompt, SCHEMAS)
            assert not (reply.malformed and reply.calls)
            assert reply.message["role"] == "assistant"
        policy, tools = AnyTurns(turns, eos, stop), Answering(results * 20)
        sampler = Trajectories(tools, dialogue, 6).over(policy)
        options = SamplingOptions(MOST, eos_token_ids=(eos,))
        [(_, found)] = sampler.sample([SampleRequest(tuple(prompt), 5)], options, 1)
        ids, mask = (
            found.completion_ids,
            found.completion_mask or (True,) * len(found.completion_ids),
        )
        assert len(ids) == len(mask) <= MOST
        # Between two turns stands what was shown, and nothing else.
        place, at = 0, []
        for asked, own in zip(policy.asked, policy.written, strict=True):
            assert asked == (*prompt, *ids[: len(asked) - len(prompt)])
            start = len(asked) - len(prompt)
            at += [False] * (start - place) + [True] * len(own)
            assert ids[start : start + len(own)] == own
            place = start + len(own)
        assert place == len(ids)
        assert mask == tuple(at)
        own_ids = [i for i, m in zip(ids, mask, strict=True) if m]
        assert own_ids == list(chain(*policy.written))
        told = [m["content"] for m in found.messages if m["role"] == "tool"]
        assert told == [r.content for r in tools.made][: len(told)]
        # No result ends a turn, whatever it spells out.
        plain, shown = (
            dialogue.observation_ids([eos], [ToolResult("add", text)]) for text in ("7", results[0])
        )
        assert shown.count(eos) == plain.count(eos)

    attempt()


@pytest.mark.parametrize("family", FAMILIES)
def test_any_text_in_a_chat_template_is_read_and_kept(family) -> None:
    tokenizer = byte_tokenizer_of(family)
    template = get_training_chat_template(tokenizer) if family == "qwen3" else None
    dialogue = ChatDialogue(tokenizer, {tokenizer.eos_token_id}, template)
    how = {"tools": SCHEMAS} | ({} if template is None else {"chat_template": template})
    prompt, whole = (
        tokenizer.apply_chat_template(messages, add_generation_prompt=start, tokenize=False, **how)
        for messages, start in (([USER], True), ([USER, CALLS, TOLD], False))
    )
    call = whole[len(prompt) : whole.rindex("7")]
    fragments = [
        call,
        call,
        *re.findall(r"<[^<>]*>|\w+|\s+|.", call),
        "<think>",
        "</think>",
        "{",
        "\\",
    ]
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    try_trajectories(tokenizer, dialogue, ids, fragments, 25)


def test_any_text_in_plain_words_is_read_and_kept(byte_tokenizer) -> None:
    prompt = byte_tokenizer.encode("3 + 4?\n", add_special_tokens=False)
    try_trajectories(byte_tokenizer, ReActDialogue(byte_tokenizer), prompt, WORDS, 150)


# What a model that acts in Python puts together.
CODE = [
    "Search(thoughts='so', query='who')", "Terminate()", "Search", "query=", "thoughts", "(", ")",
    ", ", "'", '"', "\\", "\\x41", "\\u0041", "\\N{BULLET}", "\\777", "\\\n", "f'", "b'", "r'",
    "'who'", "\n", "\0", "\x0c", "\ufeff", "\u2028", "*", "**", "#", "[" * 300, "-" * 300,
    "lambda: ", "'''", "é", "\ud800",
]  # fmt: skip


def test_any_text_is_an_action_or_malformed() -> None:
    """RA-11: all that an argument shows is written in the text."""
    actions = {"Search": "query", "Terminate": None}
    texts = st.lists(st.one_of(st.sampled_from(CODE), st.text(max_size=4)), max_size=9).map("".join)
    quoted = st.tuples(texts, texts).map(lambda parts: f"Search(query='{parts[0]}'{parts[1]})")

    @settings(PROFILE, max_examples=300)
    @given(st.one_of(texts, quoted))
    def attempt(text) -> None:
        try:
            name, argument = parse_action(text, actions)
        except MalformedAction:
            return
        assert name in actions
        assert bool(argument.strip()) == (name == "Search")
        assert all(letter in text for letter in argument if letter.isprintable())

    attempt()
