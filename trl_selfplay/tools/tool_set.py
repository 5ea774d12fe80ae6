"""The tools of a run: their schemas for the prompt, and calls under a deadline.

In: Python functions with type hints and docstrings, as GRPOTrainer takes them. Out: `ToolSet`, which turns a
call into a result, whatever happens in the tool.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from transformers.utils import get_json_schema

from trl_selfplay.rewards.sent_function import name_of, pool_for
from trl_selfplay.rewards.worker import WorkerFailure, WorkerPool
from trl_selfplay.tools.record import ToolCall, ToolResult

_NAME = re.compile(r"\w+")


class ToolSet:
    """Tools by name.

    Each tool runs in processes of its own, which are killed if a call misses its deadline, so that a tool can
    neither hang nor end a run. State that a tool changes isn't shared between calls.

    Args:
        tools: Functions, sync or async, with a type hint for each argument and a Google-style docstring that
            describes tool and arguments.
        deadline_s: Seconds per call.

    Attributes:
        schemas: What the chat template gets as `tools`.

    Raises:
        TypeError: A tool is no function, or can't be sent to another process.
        ValueError: A tool has no type hints or no docstring, or two have one name.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]], deadline_s: float) -> None:
        if callable(tools) or not all(callable(tool) for tool in tools):
            raise TypeError(f"tools={tools!r:.200}: give a list of functions.")
        self._deadline_s = deadline_s
        self.schemas: list[dict[str, Any]] = []
        self._pools: dict[str, WorkerPool] = {}
        for tool in tools:
            name = name_of(tool)
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"the tool {name!r} needs a name to be called by: give a function."
                )
            if name in self._pools:
                raise ValueError(f"two tools are named {name!r}; rename one.")
            try:
                self.schemas.append(get_json_schema(tool))
            except Exception as error:  # of transformers' own classes, with what is missing
                raise ValueError(
                    f"the tool {name!r} can't be described to the model: {error} Give each argument a type "
                    "hint, and a Google-style docstring that describes tool and arguments."
                ) from error
            self._pools[name] = pool_for(tool, "trl_selfplay.tools.calling", "call_loaded_tool")

    @property
    def names(self) -> list[str]:
        """The tools' names, in the order in which they were given."""
        return list(self._pools)

    def call(self, call: ToolCall) -> ToolResult:
        """Return what a call comes to, from any thread."""
        if call.error is not None:
            return ToolResult(call.name, f"Error: {call.error}", failed=True)
        pool = self._pools.get(call.name)
        if pool is None:
            known = ", ".join(self.names)
            return ToolResult(
                call.name, f"Error: no tool {call.name!r}; known: {known}", failed=True
            )
        try:
            found = pool.call(dict(call.arguments), deadline_s=self._deadline_s)
        except WorkerFailure as failure:
            return ToolResult(call.name, f"Error: {failure.cause}", failed=True)
        if "error" in found:
            return ToolResult(call.name, f"Error: {found['error']}", failed=True)
        return ToolResult(call.name, found["content"])
