"""The steps of a trajectory: what the policy wrote and called, and what its tools answered.

In: a rollout with `messages` or a `completion_mask`, and the run's tokenizer from its folder. Out: texts in
turn, as they were: who shows them makes them safe.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rollouts.record import Rollout

Decode = Callable[[Sequence[int]], str]

_ENDS = {"eos": "ended by itself", "stop": "ended by a stop string", "length": "cut by length"}
_HALTS = {
    "malformed": "ended by a call that can't be read",
    "tool_limit": "ended by a call beyond the last one allowed",
}
# Where templates put what a model thinks.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_ASKING = "Observation:"  # how a turn ends that asks for a result in words, see tools/react.py
_FAILURE = "Error: "  # how the result of a failed call begins, see tools/tool_set.py


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a trajectory.

    Attributes:
        writer: "policy", "environment", or "failure": a tool that failed.
        name: What it is: "turn 2, call", "result of search".
        text: What was written.
    """

    writer: Literal["policy", "environment", "failure"]
    name: str
    text: str


def name_end(rollout: Rollout) -> str:
    """Return why a completion or a trajectory ended."""
    if _awaits_result(rollout):
        return "no room for the next result"
    return _ENDS[rollout.finish] if rollout.halt is None else _HALTS[rollout.halt]


def load_decoder(run: RunFolder) -> Decode | None:
    """Return a function from token ids to text, or None if the run has left no tokenizer on disk."""
    found = [run.output_dir / "tokenizer.json", *sorted(run.root.glob("**/tokenizer.json"))]
    path = next((path for path in found if path.exists()), None)
    if path is None:
        return None
    from tokenizers import Tokenizer  # only trajectories need it

    tokenizer = Tokenizer.from_file(str(path))
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def split_steps(rollout: Rollout, decode: Decode | None) -> list[Step]:
    """Return the steps in order; empty if the policy wrote everything in one turn without calls."""
    if rollout.completion_mask is None and rollout.halt is None and not _awaits_result(rollout):
        return []
    if rollout.messages:
        return list(_of_messages(rollout))
    return [
        Step("policy", "policy", text) if is_own else Step("environment", "environment", text)
        for is_own, text in split_tokens(rollout, decode)
    ]


def split_tokens(rollout: Rollout, decode: Decode | None) -> list[tuple[bool, str]]:
    """Return (whether the policy wrote it, text) of each run of tokens, with special tokens.

    Without a tokenizer the text is the number of tokens. Empty if the policy wrote everything.
    """
    if rollout.completion_mask is None:
        return []
    found = []
    marked = zip(rollout.completion_mask, rollout.completion_ids, strict=True)
    for is_own, tokens in groupby(marked, key=lambda pair: pair[0]):
        ids = [token for _, token in tokens]
        found.append((is_own, f"({len(ids)} tokens)" if decode is None else decode(ids)))
    return found


def _awaits_result(rollout: Rollout) -> bool:
    """Return whether a trajectory was cut after a call, whose result had no room."""
    if not rollout.is_truncated or not rollout.messages:
        return False
    last = rollout.messages[-1]
    return bool(last.get("tool_calls")) or _text(last.get("content")).rstrip().endswith(_ASKING)


def _of_messages(rollout: Rollout) -> Iterator[Step]:
    turn = 0
    for message in rollout.messages:
        text = _text(message.get("content"))
        if message.get("role") != "assistant":
            name = message.get("name") or message.get("role")
            # A tool may return such a text itself, so it has failed only where calls have.
            if rollout.num_failed_calls and text.startswith(_FAILURE):
                yield Step("failure", f"failed call of {name}", text)
            else:
                yield Step("environment", f"result of {name}", text)
            continue
        turn += 1
        thoughts = next((message[key] for key in _THOUGHTS if message.get(key)), None)
        calls = message.get("tool_calls") or ()
        if thoughts is not None:
            yield Step("policy", f"turn {turn}, thoughts", _text(thoughts))
        if text or not calls:
            yield Step("policy", f"turn {turn}", text)
        for call in calls:
            yield Step("policy", f"turn {turn}, call", _call(call))


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping):
        return _text(function)
    return f"{function.get('name')}({_text(function.get('arguments'))})"


def _text(content: Any) -> str:
    """Return text as it is, and anything else as JSON."""
    if content is None:
        return ""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
