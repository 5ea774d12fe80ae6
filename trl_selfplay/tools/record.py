"""What passes between the parts of a trajectory.

In: nothing. Out: a call as the policy wrote it, a tool's result, and the interface of a dialogue, which reads
calls and renders results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a tool as the policy wrote it.

    Attributes:
        name: The tool's name.
        arguments: Named arguments, as JSON has them.
        error: Why the call can't be made: its arguments are no mapping.
    """

    name: str
    arguments: Mapping[str, Any]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call came to.

    Attributes:
        name: The tool's name.
        content: The text that the policy reads; of a failed call, what failed.
        failed: Whether the tool raised, missed its deadline, died, or isn't there.
        has_ended: Whether the trajectory's environment has ended, with this call or before it.
    """

    name: str
    content: str
    failed: bool = False
    has_ended: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """A turn of the policy, read.

    Attributes:
        message: The turn as an assistant's message, for reward functions and readers.
        calls: The calls in it, in their order; none if the turn is an answer.
        malformed: Whether a call in it can't be read. It is never repaired.
        is_rerendered: Whether its message, rendered again as part of a longer conversation, would have other
            tokens than those that were sampled, which stay. Told of turns with calls.
    """

    message: dict[str, Any]
    calls: tuple[ToolCall, ...] = ()
    malformed: bool = False
    is_rerendered: bool = False


# Deeper arguments can't be read: Python's own limit on recursion depends on who calls.
_DEEPEST = 64


def is_too_deep(value: Any, left: int = _DEEPEST) -> bool:
    """Return whether a value of JSON is nested more deeply than any tool needs."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, list):
        return False
    return left == 0 or any(is_too_deep(each, left - 1) for each in value)


class Dialogue(Protocol):
    """The form in which a policy calls tools, and in which it is shown their results."""

    stop_strings: tuple[str, ...]  # what ends a turn besides EOS

    def read(self, turn_ids: Sequence[int], prefix_ids: Sequence[int], schemas: Any) -> Reply:
        """Return what a turn says.

        Args:
            turn_ids: Its tokens, with EOS if it was sampled.
            prefix_ids: All tokens before them.
            schemas: The tools that the prompt showed.
        """
        ...

    def observation_ids(
        self, turn_ids: Sequence[int], results: Sequence[ToolResult]
    ) -> tuple[int, ...]:
        """Return the tokens between the last token of a turn and the first of the next one."""
        ...
