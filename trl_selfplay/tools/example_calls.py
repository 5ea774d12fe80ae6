"""Check the calls that a worked example shows against the tools of a run.

In: a few-shot example's completion, and the schemas of what may be called. Out: the first call in it that would
fail, and what is missing between its turns. An example of a failed call shows, as a run does, a result that
begins with "Error: ".
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise, takewhile, zip_longest
from typing import Any

from trl_selfplay.tools.chat import read_call
from trl_selfplay.tools.offer import ACTION
from trl_selfplay.tools.react import OBSERVATION, read_actions
from trl_selfplay.tools.record import ToolCall
from trl_selfplay.tools.sessions import ERROR, refuse_call
from trl_selfplay.tools.tool_set import by_name

# A call as it is written, what it says if it can be read, and the result that follows.
_Shown = tuple[Any, ToolCall | None, str]
_NO_ANSWER = "the answer after its last result is missing"


def find_failing_call(
    completion: str | Sequence[Mapping[str, Any]],
    schemas: Sequence[dict[str, Any]],
    in_words: bool,
) -> str | None:
    """Return which call of an example would fail and why, or None.

    Args:
        completion: Text, or messages with calls.
        schemas: Of the run's tools.
        in_words: Whether calls are lines of text (ReAct); otherwise text has none.
    """
    if not isinstance(completion, str):
        shown = _calls_of_messages(completion)
        if in_words and any(shown):
            return "it calls tools in messages, and this run calls them in plain text (ReAct)"
    else:
        shown = _calls_of_text(completion, schemas) if in_words else iter(())
    known = by_name(schemas)
    for written, call, result in shown:
        why = "it can't be read" if call is None else refuse_call(call, known)
        if why and not result.startswith(ERROR):
            return f"the call {written!r:.200} would fail: {why}"
    return None


def find_missing_turn(completion: str | Sequence[Mapping[str, Any]], in_words: bool) -> str | None:
    """Return what an example lacks, or None: each call has a result, and an answer follows.

    Args:
        completion: As in `find_failing_call`.
        in_words: As in `find_failing_call`.
    """
    if not isinstance(completion, str):
        return _missing_in_messages(completion)
    return _missing_in_text(completion) if in_words else None


def _calls_of_text(text: str, schemas: Sequence[dict[str, Any]]) -> Iterator[_Shown]:
    turns = text.split(OBSERVATION)
    for turn, after in pairwise(turns):
        actions = read_actions(turn, schemas)
        results = [*after.lstrip(" ").split("\n"), *[""] * len(actions)]
        for (written, call), result in zip(actions, results, strict=False):
            yield written.strip(), call, result


def _missing_in_text(text: str) -> str | None:
    first, *others = text.split(OBSERVATION)
    num_open = _num_calls(first)
    for after in others:
        if not num_open:
            return (
                f"the result {after.strip().partition(chr(10))[0]!r:.200} follows no {ACTION} line"
            )
        shown = takewhile(lambda line: not _num_calls(line), after.split("\n"))
        num_lines = sum(map(bool, map(str.strip, shown)))
        if num_lines < num_open:
            return f"a call has no result: it must stand behind {OBSERVATION}, that of each further call on a line of its own"
        num_results, num_open = num_open, _num_calls(after)
    if num_open:
        return f"a call has no result: {OBSERVATION} must follow on the next line. An answer has no {ACTION}"
    if others and num_lines == num_results:
        return _NO_ANSWER
    return None


def _num_calls(text: str) -> int:
    return len(read_actions(text, ()))


def _missing_in_messages(messages: Sequence[Mapping[str, Any]]) -> str | None:
    without_result = "a call has no result: a message of role 'tool' must follow for each"
    num_open, is_result = 0, False  # calls whose results come next
    for message in messages:
        is_result = message.get("role") == "tool"
        if is_result and not num_open:
            return f"the result {message.get('content')!r:.200} follows no call"
        if num_open and not is_result:
            return without_result
        num_open = num_open - 1 if is_result else len(message.get("tool_calls") or ())
    if num_open:
        return without_result
    return _NO_ANSWER if is_result else None


def _calls_of_messages(messages: Sequence[Mapping[str, Any]]) -> Iterator[_Shown]:
    for place, message in enumerate(messages):
        calls = message.get("tool_calls") or ()
        after = [str(m.get("content")) for m in messages[place + 1 : place + 1 + len(calls)]]
        for written, result in zip_longest(calls, after, fillvalue=""):
            yield written, _read(written), result


def _read(written: Any) -> ToolCall | None:
    """Return a call of a message, whose arguments may be JSON text."""
    function = written.get("function", written) if isinstance(written, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        with suppress(ValueError):
            function = {**function, "arguments": json.loads(function["arguments"])}
    return read_call({"function": function})
