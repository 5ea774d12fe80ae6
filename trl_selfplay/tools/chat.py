"""Tools in the form of the model's chat template.

In: the tokens of a turn. Out: its calls, read by the tokenizer's `response_template` as GRPOTrainer reads
them, and the tokens with which the template shows results. Nothing that the policy wrote is rendered again.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from trl_selfplay.generation.control_tokens import control_tokens, split_tokens
from trl_selfplay.tools.call_format import ERRORS_OF_PARSER, CallFormat
from trl_selfplay.tools.record import Reply, ToolCall, ToolResult, is_too_deep


class ChatDialogue:
    """Reads calls and renders results with a chat template that knows tools.

    Args:
        tokenizer: With a `response_template`, see `trl.add_response_schema`.
        eos_token_ids: What ends a turn.
        chat_template: A template in place of the tokenizer's own, or None.
        chat_template_kwargs: Further arguments of the template.

    Raises:
        ValueError: The tokenizer has no `response_template` with calls.
    """

    stop_strings: tuple[str, ...] = ()

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: Collection[int],
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._format = CallFormat(tokenizer)
        self._arguments = {
            "tokenize": True,
            "return_dict": False,
            **({} if chat_template is None else {"chat_template": chat_template}),
            **(chat_template_kwargs or {}),
        }

    def read(self, turn_ids: Sequence[int], prefix_ids: Sequence[int], schemas: Any) -> Reply:
        """See `Dialogue.read`."""
        message = parse_message(self._tokenizer, turn_ids, prefix_ids, schemas)
        calls = [] if message is None else [*map(read_call, message.get("tool_calls") or ())]
        if (
            message is None
            or None in calls
            or self._format.has_unread_call(turn_ids, prefix_ids, has_calls=bool(calls))
        ):
            text = self._tokenizer.decode(list(turn_ids), skip_special_tokens=True)
            return Reply({"role": "assistant", "content": text}, malformed=True)
        read = tuple(call for call in calls if call is not None)
        return Reply(
            message, read, is_rerendered=bool(read) and self._changes(turn_ids, message, read)
        )

    def _changes(
        self, turn_ids: Sequence[int], message: Mapping[str, Any], calls: Sequence[ToolCall]
    ) -> bool:
        """Return whether the template renders a turn before results with other tokens than its own."""
        asking: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
        turn = {**message, "role": "assistant"}
        told = [{"role": "tool", "name": call.name, "content": "?"} for call in calls]
        try:
            begun = self._render(asking, add_generation_prompt=True)
            rendered = self._render([*asking, turn, *told], add_generation_prompt=True)
        except (TemplateError, *ERRORS_OF_PARSER):  # such a turn can't be rendered at all
            return True
        own = [*begun, *turn_ids]
        return rendered[: len(own)] != own

    def observation_ids(
        self, turn_ids: Sequence[int], results: Sequence[ToolResult]
    ) -> tuple[int, ...]:
        """See `Dialogue.observation_ids`.

        The template renders a short conversation with and without the results; what it adds follows the end
        of the assistant's turn, of which the policy wrote what it wrote. Control tokens that a result spells out
        are text.

        Raises:
            ValueError: The template renders the turn before the results otherwise where results follow.
        """
        function = {"name": results[0].name, "arguments": {}}
        asking: list[dict[str, Any]] = [{"role": "user", "content": "?"}]
        calling = [
            *asking,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": function}],
            },
        ]
        start = len(self._render(asking, add_generation_prompt=False))
        before = self._render(calling, add_generation_prompt=False)
        try:
            after = self._render([*calling, *map(_told, results)], add_generation_prompt=True)
        except ValueError:  # the tokenizer can't read a control token as text
            tokens = control_tokens(self._tokenizer)
            split = [replace(r, content=split_tokens(r.content, tokens)) for r in results]
            after = self._render([*calling, *map(_told, split)], add_generation_prompt=True)
        ends = [i for i in range(start, len(before)) if before[i] in self._eos_token_ids]
        if ends:  # a line break behind EOS belongs to what follows the turn
            before = before[: ends[-1] + 1]
        if after[: len(before)] != before:
            raise ValueError(
                "the chat template renders a turn with calls otherwise where results follow, so the tokens of "
                "the results can't be told. Use a prefix-preserving template: trl.get_training_chat_template "
                "has one for many models."
            )
        added = after[len(before) :]
        if turn_ids[-1] == added[0] and turn_ids[-1] in self._eos_token_ids:
            return tuple(added[1:])  # a turn of GLM's ends with the token that begins the results
        if ends and turn_ids[-1] not in self._eos_token_ids:  # a stop string ended it
            return (before[-1], *added)
        return tuple(added)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> list[int]:
        return list(
            self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=add_generation_prompt,
                sanitize_control_tokens=True,
                **self._arguments,
            )
        )


def parse_message(
    tokenizer: Any, turn_ids: Sequence[int], prefix_ids: Sequence[int], schemas: Any = None
) -> dict[str, Any] | None:
    """Return a turn as the assistant's message, divided by the tokenizer's `response_template`.

    Returns:
        None if it can't be divided, as with a malformed call, or if nothing was left of it.
    """
    tools = {} if schemas is None else {"tools": schemas}
    try:
        message = tokenizer.parse_response(list(turn_ids), prefix=list(prefix_ids), **tools)
    except ERRORS_OF_PARSER:
        return None
    if not isinstance(message, dict):
        return None
    content = message.get("content") or ""
    if isinstance(content, str):
        content = content.removesuffix(tokenizer.eos_token)
    return {**message, "content": content}


def _told(result: ToolResult) -> dict[str, Any]:
    return {"role": "tool", "name": result.name, "content": result.content}


def read_call(call: Any) -> ToolCall | None:
    """Return a call as it was parsed, or None if it is none."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return None
    arguments = function.get("arguments")
    if arguments is None:  # templates leave it out of calls without arguments
        arguments = {}
    if is_too_deep(arguments):
        return None
    if not isinstance(arguments, dict):
        return ToolCall(function["name"], {}, f"arguments are no mapping: {arguments!r:.200}")
    return ToolCall(function["name"], arguments)
