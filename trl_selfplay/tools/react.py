"""Tools as plain text: Thought, Action, Observation.

In: the text of a turn, which ends before an observation. Out: its call, and the observation's tokens.
Source: ReAct, arXiv 2210.03629, section 3 and appendix C.
"""

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_selfplay.generation.control_tokens import continuation_ids, plain_ids
from trl_selfplay.tools.arguments import json_types
from trl_selfplay.tools.record import Reply, ToolCall, ToolResult, is_too_deep

OBSERVATION = "Observation:"
_ACTION = re.compile(r"^[ \t]*Action:(.*)$", re.MULTILINE)
# `search[who was it]`, or `search({"query": "who was it"})`.
_CALL = re.compile(r"(\w+)[ \t]*(?:\[(.*)\]|\((.*)\))")


class ReActDialogue:
    """Reads `Action: tool[argument]` lines and writes results behind `Observation:`.

    A turn ends with `Observation:`, which the policy writes, and calls what the `Action:` lines before it
    say. In brackets stands the tool's first argument, as text, or as JSON if it isn't a string; in
    parentheses a JSON object with all of them.

    Args:
        tokenizer: Decodes turns and encodes observations.
    """

    stop_strings: tuple[str, ...] = (OBSERVATION,)

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def read(self, turn_ids: Sequence[int], prefix_ids: Sequence[int], schemas: Any) -> Reply:
        """See `Dialogue.read`.

        An `Action:` line that is no call is malformed, and so is one that ends the turn: nobody was asked to
        answer it.
        """
        text = self._tokenizer.decode(list(turn_ids), skip_special_tokens=True)
        assert isinstance(text, str)
        message = {"role": "assistant", "content": text}
        said, stop, _ = text.partition(OBSERVATION)
        if not stop:
            last = said.rstrip().rpartition("\n")[2]
            return Reply(message, malformed=_ACTION.fullmatch(last) is not None)
        calls = [call for _, call in read_actions(said, schemas)]
        if not calls or None in calls:
            return Reply(message, malformed=True)
        again = self._tokenizer.encode(text, add_special_tokens=False)
        return Reply(
            message,
            tuple(call for call in calls if call is not None),
            is_rerendered=again != list(turn_ids),
        )

    def observation_ids(
        self, turn_ids: Sequence[int], results: Sequence[ToolResult]
    ) -> tuple[int, ...]:
        """See `Dialogue.observation_ids`."""
        text = "\n".join(result.content for result in results)
        encode = partial(plain_ids, self._tokenizer)
        return tuple(continuation_ids(encode, f" {text}\n"))


def read_actions(
    text: str, schemas: Sequence[Mapping[str, Any]]
) -> list[tuple[str, ToolCall | None]]:
    """Return the `Action:` lines of a text, each with its call, or None if it can't be read."""
    return [(action, _read_action(action, schemas)) for action in _ACTION.findall(text)]


def _read_action(action: str, schemas: Sequence[Mapping[str, Any]]) -> ToolCall | None:
    """Return the call of an `Action:` line, or None if it can't be read."""
    call = _CALL.fullmatch(action.strip(" \t"))
    if call is None:
        return None
    name, bracketed, in_json = call.groups()
    if bracketed is not None:
        argument, is_text = _first_argument(name, schemas)
        value: Any = bracketed.strip()
        if not is_text:
            with contextlib.suppress(ValueError, RecursionError):  # else its type is wrong
                value = json.loads(value)
        arguments: Any = {argument: value}
    else:
        try:
            arguments = json.loads(in_json or "{}")
        except (ValueError, RecursionError):
            return None
    if is_too_deep(arguments):
        return None
    if not isinstance(arguments, dict):
        return ToolCall(name, {}, f"the arguments are no JSON object: {in_json:.200}")
    return ToolCall(name, arguments)


def _first_argument(name: str, schemas: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """Return the name of a tool's first argument, and whether it may be a string."""
    for schema in schemas:
        function = schema.get("function", schema)
        if function.get("name") == name:
            for argument, described in function.get("parameters", {}).get("properties", {}).items():
                kinds = json_types(described)
                return argument, not kinds or "string" in kinds
    return "argument", True
