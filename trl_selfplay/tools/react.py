"""Tools as plain text: Thought, Action, Observation.

In: the text of a turn, which ends before an observation. Out: its call, and the observation's tokens.
Source: ReAct, arXiv 2210.03629, section 3 and appendix C.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_selfplay.tools.record import Reply, ToolCall, ToolResult

OBSERVATION = "Observation:"
# The last of a turn counts: `Action: search[who was it]`, or `Action: search({"query": "who was it"})`.
_ACTION = re.compile(r"^[ \t]*Action:[ \t]*(\w+)[ \t]*(?:\[(.*)\]|\((.*)\))[ \t]*$", re.MULTILINE)


class ReActDialogue:
    """Reads `Action: tool[argument]` lines and writes results behind `Observation:`.

    A turn ends with `Observation:`, which the policy writes. In brackets stands the tool's first argument as
    text; in parentheses a JSON object with all of them.

    Args:
        tokenizer: Decodes turns and encodes observations.
        first_argument: The name of each tool's first argument, by the tool's name.
    """

    stop_strings = (OBSERVATION,)

    def __init__(self, tokenizer: PreTrainedTokenizerBase, first_argument: dict[str, str]) -> None:
        self._tokenizer = tokenizer
        self._first_argument = first_argument

    def read(self, turn_ids: Sequence[int], prefix_ids: Sequence[int], schemas: Any) -> Reply:
        """See `Dialogue.read`."""
        text = self._tokenizer.decode(list(turn_ids), skip_special_tokens=True)
        assert isinstance(text, str)
        message = {"role": "assistant", "content": text}
        if OBSERVATION not in text:
            return Reply(message)
        actions = list(_ACTION.finditer(text[: text.index(OBSERVATION)]))
        if not actions:
            return Reply(message, (ToolCall("unknown", {}, "no line `Action: tool[argument]`"),))
        return Reply(message, (self._read_action(actions[-1]),))

    def _read_action(self, action: re.Match[str]) -> ToolCall:
        name, bracketed, in_json = action.groups()
        if bracketed is not None:
            return ToolCall(name, {self._first_argument.get(name, "argument"): bracketed.strip()})
        try:
            arguments = json.loads(in_json or "{}")
        except ValueError as error:
            return ToolCall(name, {}, f"the arguments are no JSON: {error}")
        if not isinstance(arguments, dict):
            return ToolCall(name, {}, f"the arguments are no JSON object: {in_json:.200}")
        return ToolCall(name, arguments)

    def observation_ids(
        self, turn_ids: Sequence[int], results: Sequence[ToolResult]
    ) -> tuple[int, ...]:
        """See `Dialogue.observation_ids`."""
        text = "\n".join(result.content for result in results)
        return tuple(self._tokenizer.encode(f" {text}\n", add_special_tokens=False))
