"""Trajectories: exact tokens, limits, tools that fail, many at once, and what is read back from disk."""

import functools
import json
import os
from contextlib import closing
from itertools import count

import pytest
import torch
from patience import ENDS_S
from simple_tools import add, fail, note, wait_for

from trl_selfplay.generation.sampler import SampledCompletion, SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.tools.react import ReActDialogue
from trl_selfplay.tools.step_log import StepLog
from trl_selfplay.tools.tool_set import ToolSet
from trl_selfplay.tools.trajectories import Trajectories, turn_key

OPTIONS = SamplingOptions(400, return_logprobs=True)


class Script:
    """A policy whose next turn is a function of the text before it, as a `Sampler`."""

    def __init__(self, tokenizer, respond) -> None:
        self.tokenizer, self.respond = tokenizer, respond
        self.sampled = []
        self.most_at_once = 0

    def suggest_batch_size(self, longest_prompt, max_completion_length):
        return 4

    def release(self) -> None:
        pass

    def sample(self, requests, options, batch_size, on_tokens=None):
        numbers, source, decoding, is_open = count(), iter(requests), [], True
        while is_open or decoding:
            while is_open and len(decoding) < batch_size:
                try:
                    request = next(source)
                except StopIteration:
                    is_open = False
                    break
                if request is None:
                    break
                decoding.append((next(numbers), request))
            if not decoding:
                continue
            self.most_at_once = max(self.most_at_once, len(decoding))
            number, request = decoding.pop(0)
            self.sampled.append(request)
            text = self.tokenizer.decode(list(request.prompt_ids))
            ids = self.tokenizer.encode(self.respond(text), add_special_tokens=False)
            limit = min(options.max_completion_length, request.max_completion_length or 10**9)
            is_cut = len(ids) > limit
            finish = "length" if is_cut else "stop" if text_ends(self, ids) else "eos"
            yield number, SampledCompletion(tuple(ids[:limit]), finish, -float(len(ids)))


def text_ends(script, ids):
    return script.tokenizer.decode(ids).endswith("Observation:")


def adds_twice(text):
    _, *observations = text.split("Observation:")
    if len(observations) < 2:
        return f'Thought: on.\nAction: add({{"a": {len(observations)}, "b": 2}})\nObservation:'
    return f"So {observations[-1].split()[0]}."


@functools.cache
def tools_of(functions):
    """Return a tool set that tests with the same functions share, with its processes."""
    return ToolSet(list(functions), ENDS_S)


@pytest.fixture
def build(byte_tokenizer):
    def build_one(respond, tools=(add, fail), rows=None, step_log=None, **options):
        dialogue = ReActDialogue(byte_tokenizer)
        script = Script(byte_tokenizer, respond)
        how = Trajectories(tools_of(tools), dialogue, **options)
        found = how.over(script, rows, step_log)
        return found, script

    return build_one


def ask(tokenizer, text, key=5):
    return SampleRequest(tuple(tokenizer.encode(text, add_special_tokens=False)), key)


def written(tokenizer, completion):
    """Return the text of the policy's tokens, and that of the others."""
    mask = completion.completion_mask or (True,) * len(completion.completion_ids)
    pairs = list(zip(completion.completion_ids, mask, strict=True))
    return tuple(
        tokenizer.decode([i for i, own in pairs if own is wanted]) for wanted in (True, False)
    )


def test_the_context_grows_by_what_was_sampled_and_by_observations_alone(build, byte_tokenizer):
    sampler, script = build(adds_twice)
    [(number, found)] = sampler.sample([ask(byte_tokenizer, "Q")], OPTIONS, 4)
    assert number == 0
    whole = byte_tokenizer.decode(list(found.completion_ids))
    action = 'Thought: on.\nAction: add({"a": %d, "b": 2})\nObservation:'
    assert whole == f"{action % 0} 2\n{action % 1} 3\nSo 3."
    assert written(byte_tokenizer, found) == (f"{action % 0}{action % 1}So 3.", " 2\n 3\n")
    # Each turn was sampled from exactly the ids before it.
    for request in script.sampled[1:]:
        end = len(request.prompt_ids) - len(script.sampled[0].prompt_ids)
        assert request.prompt_ids[-end:] == found.completion_ids[:end]
    assert found.logprob == -float(sum(found.completion_mask))
    assert [m["role"] for m in found.messages] == ["assistant", "tool"] * 2 + ["assistant"]
    assert [m["content"] for m in found.messages if m["role"] == "tool"] == ["2", "3"]


def test_each_turn_has_a_stream_of_its_own_and_the_first_that_of_a_single_turn(
    build, byte_tokenizer
):
    sampler, script = build(adds_twice)
    list(sampler.sample([ask(byte_tokenizer, "Q", 77)], OPTIONS, 4))
    keys = [request.stream_key for request in script.sampled]
    assert keys[0] == 77
    assert len(set(keys)) == 3
    assert keys == [turn_key(77, turn) for turn in range(3)]


def test_no_more_turns_of_calls_than_allowed(build, byte_tokenizer) -> None:
    """RA-7."""

    def endless(text):
        return 'Action: add({"a": 1, "b": 1})\nObservation:'

    for most in (0, 1, 3):
        sampler, script = build(endless, max_tool_calling_iterations=most)
        [(_, found)] = sampler.sample([ask(byte_tokenizer, "Q")], OPTIONS, 4)
        assert len(script.sampled) == most + 1
        assert sum(m["role"] == "tool" for m in found.messages) == most
        assert (found.halt, found.finish) == ("tool_limit", "stop")


def test_a_trajectory_that_fills_its_length_is_truncated(build, byte_tokenizer) -> None:
    def endless(text):
        return 'Action: add({"a": 1, "b": 1})\nObservation:'

    sampler, _ = build(endless)
    for length in range(20, 120, 7):
        [(_, found)] = sampler.sample([ask(byte_tokenizer, "Q")], SamplingOptions(length), 4)
        assert found.finish == "length"
        assert len(found.completion_ids) <= length
    sampler, script = build(endless, context_length=130)  # of the model; a turn takes 42 of them
    [(_, found)] = sampler.sample([ask(byte_tokenizer, "Q")], OPTIONS, 4)
    assert found.finish == "length"
    assert max(len(request.prompt_ids) for request in script.sampled) < 130


@pytest.mark.parametrize(
    ("action", "observation"),
    [
        ("Action: fail[luck]", "Error: LookupError: no luck"),
        ("Action: nothing[x]", "Error: no tool 'nothing'; known: add, fail"),
        ("Action: add([1, 2])", "Error: wrong arguments: the arguments are no JSON object"),
        ('Action: add({"c": 1})', "Error: wrong arguments: "),
    ],
)
def test_what_fails_is_an_observation(build, byte_tokenizer, action, observation) -> None:
    def once(text):
        return "Done." if "Error" in text else f"{action}\nObservation:"

    sampler, _ = build(once)
    [(_, found)] = sampler.sample([ask(byte_tokenizer, "Q")], OPTIONS, 4)
    assert found.finish == "eos"
    assert (found.halt, found.num_failed_calls) == (None, 1)
    assert found.messages[1]["content"].startswith(observation)
    assert observation in written(byte_tokenizer, found)[1]


@pytest.mark.parametrize(
    "turn",
    [
        "I think so.\nObservation:",
        "Action: add({'a': 1})\nObservation:",
        'Action: add({"a": 1\nObservation:',
        "Action: add 1 2\nObservation:",
        "Action: fail[x]\nAction: add\nObservation:",
        f"Action: add({'[' * 100_000})\nObservation:",
        f"Action: add({'[' * 100 + ']' * 100})\nObservation:",
        "So.\nAction: fail[x]",
        "Action: fail[x] \n",
    ],
)
def test_a_call_that_cannot_be_read_ends_the_trajectory(build, byte_tokenizer, turn) -> None:
    """RA-11: it is not repaired, and nothing is called."""
    sampler, script = build(lambda text: turn)
    options = SamplingOptions(10**6)
    [(_, found)] = sampler.sample([ask(byte_tokenizer, "Q")], options, 4)
    assert (found.halt, len(script.sampled)) == ("malformed", 1)
    assert found.finish in ("stop", "eos")
    assert byte_tokenizer.decode(list(found.completion_ids)) == turn
    assert [m["role"] for m in found.messages] == ["assistant"]
    [(_, cut)] = sampler.sample([ask(byte_tokenizer, "Q")], SamplingOptions(len(turn) - 1), 4)
    assert (cut.halt, cut.finish) == (None, "length")


def test_several_calls_of_a_turn_are_made_in_their_order(build, byte_tokenizer) -> None:
    def respond(text):
        if "Observation" in text:
            return "Done."
        return 'Action: add({"a": 1, "b": 1})\nAction: fail[x]\nAction: add({"a": 2, "b": 2})\nObservation:'

    sampler, _ = build(respond)
    [(_, found)] = sampler.sample([ask(byte_tokenizer, "Q")], OPTIONS, 4)
    told = [m["content"] for m in found.messages if m["role"] == "tool"]
    assert told == ["2", "Error: LookupError: no x", "4"]
    assert written(byte_tokenizer, found)[1] == " 2\nError: LookupError: no x\n4\n"
    assert found.num_failed_calls == 1


def test_others_are_decoded_while_one_waits_for_its_tool(build, byte_tokenizer, tmp_path) -> None:
    order, others, pipe = [], 5, tmp_path / "pipe"
    os.mkfifo(pipe)

    def respond(text):
        order.append(text[:2])
        if not text.startswith("Q0") or "Observation" in text:
            return "So 1."
        return f"Action: wait_for[{pipe}]\nObservation:"

    sampler, _ = build(respond, (wait_for,))
    requests = [ask(byte_tokenizer, f"Q{i}", i) for i in range(1 + others)]
    finished = []
    for number, _ in sampler.sample(requests, OPTIONS, 1):
        finished.append(number)
        if len(finished) == others:  # all but the one that waits
            pipe.write_text("on")
    assert sorted(finished) == list(range(1 + others))
    assert finished[-1] == 0
    assert order == ["Q0", *(f"Q{i}" for i in range(1, 1 + others)), "Q0"]


def test_while_all_wait_for_tools_it_is_asked_whether_the_run_goes_on(
    build, byte_tokenizer, tmp_path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # nobody will write into it
    sampler, _ = build(lambda text: f"Action: wait_for[{pipe}]\nObservation:", (wait_for,))

    def end(num_tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(sampler.sample([ask(byte_tokenizer, "Q")], OPTIONS, 1, end))


def test_white_space_of_a_degenerate_policy_is_read_in_linear_time(byte_tokenizer) -> None:
    spaces = " " * 300_000  # of quadratic time it would be hours
    for turn in (f"Action: a{spaces}b\nObservation:", f"Action: a{spaces}b"):
        ids = byte_tokenizer.encode(turn, add_special_tokens=False)
        assert ReActDialogue(byte_tokenizer).read(ids, [], []).malformed
    ids = byte_tokenizer.encode(
        f"Action: \t add[1]{spaces}\nObservation:", add_special_tokens=False
    )
    (call,) = ReActDialogue(byte_tokenizer).read(ids, [], []).calls
    assert call.arguments == {"argument": "1"}


def test_steps_on_disk_are_neither_sampled_nor_called_again(
    build, byte_tokenizer, tmp_path
) -> None:
    """RA-15: wherever the file ends, the trajectories are those of an uninterrupted run."""
    requests = [ask(byte_tokenizer, f"Q{i}", i) for i in range(4)]
    called = tmp_path / "called.txt"

    def notes_twice(text):
        number = text.count("Observation:")
        if number == 2:
            return "So."
        call = json.dumps({"file": str(called), "text": f"{text[:2]} {number}"})
        return f"Action: note({call})\nAction: note({call})\nObservation:"

    def run(path):
        called.write_text("")
        with closing(StepLog(path)) as log:
            sampler, script = build(notes_twice, (note,), step_log=log)
            found = dict(sampler.sample(requests, SamplingOptions(2000), 2))
        return found, len(script.sampled), len(called.read_text().splitlines())

    whole, *counts = run(tmp_path / "whole.jsonl")
    assert counts == [12, 16]
    header, *lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 28
    path = tmp_path / "torn.jsonl"
    for kept in range(29):
        torn = lines[kept][: len(lines[kept]) // 2] if kept < 28 else b""
        path.write_bytes(b"".join([header, *lines[:kept], torn]))
        turns = sum(b'"ids"' in line for line in lines[:kept])
        assert run(path) == (whole, 12 - turns, 16 - (kept - turns))
        assert run(path) == (whole, 0, 0)


def test_a_real_model_writes_the_same_trajectories_in_any_batch(byte_tokenizer, tiny_model) -> None:
    """A random model calls nothing, so a dialogue that takes each turn for a call stands in for ReAct."""

    class EachTurnCalls(ReActDialogue):
        stop_strings = ("e", "t")

        def read(self, turn_ids, prefix_ids, schemas):
            reply = super().read(turn_ids, prefix_ids, schemas)
            from trl_selfplay.tools.record import Reply, ToolCall

            return Reply(reply.message, (ToolCall("add", {"a": len(turn_ids), "b": 1}),))

    model = tiny_model(byte_tokenizer)
    dialogue = EachTurnCalls(byte_tokenizer)
    tools = ToolSet([add], ENDS_S)

    def run(batch_size, order):
        requests = [ask(byte_tokenizer, "Q" * (1 + i % 3), i) for i in order]
        sampler = Trajectories(tools, dialogue, 3, 512).over(
            TransformersSampler(model, byte_tokenizer)
        )
        found = sampler.sample(requests, SamplingOptions(60, return_logprobs=True), batch_size)
        return {order[number]: completion for number, completion in found}

    torch.manual_seed(0)
    alone = {i: run(1, [i])[i] for i in range(6)}
    together = run(6, list(range(6)))
    backwards = run(4, list(range(5, -1, -1)))
    for i, completion in alone.items():
        for other in (together[i], backwards[i]):
            assert other.completion_ids == completion.completion_ids
            assert other.completion_mask == completion.completion_mask
            assert other.finish == completion.finish
    assert any(len(c.messages) > 2 for c in alone.values())
