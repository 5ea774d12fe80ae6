"""Find calls that a turn attempts and that its parser doesn't read.

In: a tokenizer's `response_template`, which says between which tags calls, thoughts and the answer stand, and the
tokens of a turn. Out: whether a tag of calls is left where there is no call, or a call was never closed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_CALLS, _ANSWER, _REST = "tool_calls", "content", "rest"
_DELIMITERS = ("open", "open_pattern", "close", "close_pattern")
_GROUP = re.compile(r"\(\?(?:P?<\w+>|[:=!]|<[=!])")  # the head of a group in a pattern
_ESCAPED = re.compile(r"\\(\W)")
_HEAD = re.compile(r"[a-z][\w=.:]+[=.:]")  # as in to=functions.add
_TAG = re.compile(r"<[^\s<>()\[\]\\*+?{}^$]+>?")
# Follows a turn, so that what the end of the text closed can be told from what a tag closed.
_END = "\0"
# What transformers' parser raises on text that a model wrote.
ERRORS_OF_PARSER = (ValueError, TypeError, AttributeError, LookupError, RecursionError)


class CallFormat:
    """How a model marks calls.

    A format in bare JSON, as Llama's, has no tags: what looks nearly like a call is an answer there.

    Args:
        tokenizer: With a `response_template`.

    Raises:
        ValueError: It has none, or none with calls.
    """

    def __init__(self, tokenizer: Any) -> None:
        template: Mapping[str, Any] = getattr(tokenizer, "response_template", None) or {}
        fields = template.get("fields", {})
        if _CALLS not in fields:
            raise ValueError(
                "the tokenizer has no `response_template` that tells calls of tools from text. Set one "
                "(trl.add_response_schema knows many models), or use tool_format='react'."
            )
        self._tokenizer = tokenizer
        others = (_tags(field) for name, field in fields.items() if name != _CALLS)
        self._tags = _tags(fields[_CALLS]).difference(*others) | _heads(fields[_CALLS])
        self._explicit = {n for n, f in fields.items() if "open" in f or "open_pattern" in f}
        # What no field takes would be dropped unseen.
        rest = (
            {_REST: {"content": "text", "repeats": True}}
            if len(self._explicit) == len(fields)
            else {}
        )
        self._template = {**template, "fields": {**fields, **rest}}

    def has_unread_call(
        self, turn_ids: Sequence[int], prefix_ids: Sequence[int], *, has_calls: bool
    ) -> bool:
        """Return whether a turn attempts a call that isn't read, though the parser read the turn.

        Tags in closed thoughts are no calls.

        Args:
            turn_ids: The turn.
            prefix_ids: All tokens before it.
            has_calls: Whether the parser found calls.
        """
        text = self._tokenizer.decode(list(turn_ids))
        if not has_calls and not any(tag in text for tag in self._tags):
            return False
        parser = self._tokenizer.get_response_parser(self._template, prefix=list(prefix_ids))
        try:
            events = [
                *parser.initial_events,
                *parser.feed(f"{text}\n{_END}"),
                *parser.finalize()[1],
            ]
        except ERRORS_OF_PARSER:  # a call that reaches the end isn't JSON
            return True
        field, said, seen = "", "", ""
        for event in events:
            if event["type"] == "region_open":
                field, said = event["field"], ""
            elif event["type"] == "region_chunk":
                said += event["text"]
            elif field == _CALLS and said.endswith(_END):
                return True
            elif field == _ANSWER or field not in self._explicit or said.endswith(_END):
                seen += said
        return any(tag in seen for tag in self._tags)


def _tags(field: Mapping[str, Any]) -> set[str]:
    """Return the tags in the delimiters of a field."""
    found: set[str] = set()
    for key in _DELIMITERS:
        value = field.get(key) or ()
        for text in [value] if isinstance(value, str) else value:
            plain = _ESCAPED.sub(r"\1", _GROUP.sub("(", text)) if "pattern" in key else text
            found |= {*_TAG.findall(plain)}
    return found


def _heads(field: Mapping[str, Any]) -> set[str]:
    """Return the plain text with which a call begins in a format that doesn't begin it with a tag."""
    opens = _ESCAPED.sub(r"\1", str(field.get("open_pattern", "")))
    return {*filter(None, [head[0] if (head := _HEAD.match(opens)) else ""])}
