"""Tools in the form of the model's chat template.

In: the tokens of a turn. Out: its calls, read by the tokenizer's `response_template` as GRPOTrainer reads
them, and the tokens with which the template shows results. Nothing that the policy wrote is rendered again.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import parse_response

from trl_selfplay.tools.record import Reply, ToolCall, ToolResult


class ChatDialogue:
    """Reads calls and renders results with a chat template that knows tools.

    Args:
        tokenizer: With a `response_template`, see `trl.add_response_schema`.
        chat_template: A template in place of the tokenizer's own, or None.
        chat_template_kwargs: Further arguments of the template.
    """

    stop_strings: tuple[str, ...] = ()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._arguments = {
            "tokenize": True,
            "return_dict": False,
            **({} if chat_template is None else {"chat_template": chat_template}),
            **(chat_template_kwargs or {}),
        }

    def read(self, turn_ids: Sequence[int], prefix_ids: Sequence[int], schemas: Any) -> Reply:
        """See `Dialogue.read`."""
        message = parse_response(
            self._tokenizer, list(turn_ids), prefix=list(prefix_ids), tools=schemas
        )
        return Reply(message, tuple(map(_read_call, message.get("tool_calls") or ())))

    def observation_ids(
        self, turn_ids: Sequence[int], results: Sequence[ToolResult]
    ) -> tuple[int, ...]:
        """See `Dialogue.observation_ids`.

        The template renders a short conversation with and without the results; what it adds follows the end
        of the assistant's turn, of which the policy wrote what it wrote.

        Raises:
            ValueError: The template renders the turn before the results otherwise where results follow.
        """
        function = {"name": results[0].name, "arguments": {}}
        calling: list[dict[str, Any]] = [
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": function}],
            },
        ]
        told = [{"role": "tool", "name": r.name, "content": r.content} for r in results]
        before = self._render(calling, add_generation_prompt=False)
        after = self._render([*calling, *told], add_generation_prompt=True)
        ends = [i for i, token in enumerate(before) if token == self._tokenizer.eos_token_id]
        if ends:  # a line break behind EOS belongs to what follows the turn
            before = before[: ends[-1] + 1]
        if after[: len(before)] != before:
            raise ValueError(
                "the chat template renders a turn with calls otherwise where results follow, so the tokens of "
                "the results can't be told. Use a prefix-preserving template: trl.get_training_chat_template "
                "has one for many models."
            )
        added = after[len(before) :]
        if ends and turn_ids[-1] != self._tokenizer.eos_token_id:  # ended by another token
            added = [self._tokenizer.eos_token_id, *added]
        return tuple(added)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> list[int]:
        return list(
            self._tokenizer.apply_chat_template(
                messages, add_generation_prompt=add_generation_prompt, **self._arguments
            )
        )


def _read_call(call: Any) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return ToolCall("unknown", {}, f"no function call: {call!r:.200}")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, dict):
        return ToolCall(function["name"], {}, f"arguments are no mapping: {arguments!r:.200}")
    return ToolCall(function["name"], arguments)
