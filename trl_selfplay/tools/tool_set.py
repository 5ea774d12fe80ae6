"""The tools of a run: their schemas for the prompt, and calls under a deadline.

In: Python functions with type hints and docstrings, as GRPOTrainer takes them. Out: `ToolSet`, whose sessions
turn calls into results, whatever happens in a tool.
"""

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from transformers.utils import get_json_schema

from trl_selfplay.tools.offer import name_of_schema, offered
from trl_selfplay.tools.record import ToolCall, ToolResult
from trl_selfplay.tools.sessions import Session
from trl_selfplay.tools.tool_processes import ToolProcesses

MOST_CALLS_AT_ONCE = 32
_NAME = re.compile(r"\w+")
_Function = TypeVar("_Function", bound=Callable[..., Any])


def tool(*, deterministic: bool = True) -> Callable[[_Function], _Function]:
    """Return a decorator that describes a tool.

    Args:
        deterministic: Whether equal calls have equal results. The log and the model card name tools that say
            False: a run with them can't be repeated exactly.
    """

    def describe(function: _Function) -> _Function:
        function.deterministic = deterministic  # type: ignore[attr-defined]
        return function

    return describe


class ToolSet:
    """Tools by name.

    Tools run in processes of their own, which are killed if a call misses its deadline, so that a tool can
    neither hang nor end a run. State that a tool changes isn't shared between calls: that is what environments
    are for.

    Args:
        tools: Functions, sync or async, with a type hint for each argument and a Google-style docstring that
            describes tool and arguments.
        deadline_s: Seconds per call.

    Attributes:
        schemas: What the chat template gets as `tools`.
        sources: The functions by name.
        nondeterministic: Names of tools that may answer the same call differently.
        has_environments: False.
        rewarding: Nothing, as there are no environments.

    Raises:
        TypeError: A tool is no function, or can't be sent to another process.
        ValueError: A tool has no type hints or no docstring, needs an instance, or yields its results in async
            steps; or two have one name.
        RuntimeError: A ready tool can't run on this machine.
    """

    def __init__(self, tools: Sequence[Callable[..., Any]], deadline_s: float) -> None:
        self._deadline_s = check_deadline(deadline_s)
        self.sources, self.schemas = describe_tools(tools)
        self.nondeterministic = find_nondeterministic(self.sources)
        self.has_environments = False
        self.rewarding: dict[str, frozenset[str | None]] = {}
        self._processes = ToolProcesses(self.sources, {})

    @property
    def identity(self) -> str:
        """A digest of what the prompt shows of the tools."""
        return digest_of_schemas(self.schemas)

    def schemas_of(self, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what any row may call: all tools."""
        del columns
        return self.schemas

    def observation(self, columns: Mapping[str, Any]) -> None:
        """Return None: tools say nothing before they are called."""
        del columns

    def open(self, columns: Mapping[str, Any], key: int) -> Session:
        """Return the tools of one trajectory.

        Args:
            columns: Its row's. A column `tools` there says which ones may be called.
            key: Of its random stream.
        """
        schemas = offered(self.schemas, columns)
        return Session(self._processes, by_name(schemas), self._deadline_s, key)

    def call(self, call: ToolCall, key: int = 0) -> ToolResult:
        """Return what a call comes to that belongs to no trajectory, from any thread.

        Args:
            call: The call.
            key: Of its random stream.
        """
        return self.open({}, key).call(call)

    def close(self) -> None:
        """End the processes; a later call starts new ones. Also done at exit."""
        self._processes.close()


def describe_tools(
    tools: Sequence[Callable[..., Any]],
) -> tuple[dict[str, Callable[..., Any]], list[dict[str, Any]]]:
    """Return tools by name, and their schemas; see `ToolSet`."""
    if not isinstance(tools, Sequence) or not all(callable(each) for each in tools):
        raise TypeError(
            f"tools={tools!r:.200}: give a list of functions. Import paths are for the command line."
        )
    functions: dict[str, Callable[..., Any]] = {}
    schemas = []
    for each in tools:
        name = _name_of(each)
        if not _NAME.fullmatch(name):
            raise ValueError(f"the tool {name!r} needs a name to be called by: give a function.")
        if name in functions:
            raise ValueError(f"two tools are named {name!r}; rename one, by its `__name__`.")
        schemas.append(describe_tool(each, name))
        first = next(iter(inspect.signature(each).parameters.values()), None)
        if first and first.name in ("self", "cls") and first.annotation is first.empty:
            raise ValueError(
                f"the tool {name!r} is a method without its instance, which nobody gives as {first.name!r}: give "
                f"the method of an instance, such as Shop().{name} in place of Shop.{name}."
            )
        functions[name] = each
        getattr(each, "check_machine", bool)()  # of a ready tool: whether this machine can run it
    return functions, schemas


def describe_tool(function: Callable[..., Any], name: str) -> dict[str, Any]:
    """Return the schema of a function, a method, an object with `__call__`, or a partial of one.

    Raises:
        ValueError: Its docstring or its type hints don't say enough.
    """
    inner = _inner(function)
    if inspect.isclass(inner):
        raise ValueError(
            f"the tool {name!r} is a class: give a function, a method or an instance with `__call__`."
        )
    called = inner if inspect.isroutine(inner) else getattr(inner, "__call__", inner)  # noqa: B004
    if inspect.isasyncgenfunction(called):
        raise ValueError(
            f"the tool {name!r} is an async generator, which has no result: return a value in place of yielding it."
        )
    try:
        schema: dict[str, Any] = get_json_schema(called)
    except Exception as error:  # of transformers' own classes, with what is missing
        raise ValueError(
            f"the tool {name!r} can't be described to the model: {str(error).rstrip('.')}. Give each argument a type "
            "hint, and a Google-style docstring that describes tool and arguments."
        ) from error
    schema["function"]["name"] = name
    arguments = schema["function"]["parameters"]
    for bound in _bound_by_partial(function):
        arguments["properties"].pop(bound, None)
        if bound in arguments.get("required", ()):
            arguments["required"].remove(bound)
    return schema


def find_nondeterministic(functions: Mapping[str, Callable[..., Any]]) -> list[str]:
    """Return the names of functions that say that they aren't deterministic."""
    return [
        name for name, each in functions.items() if not getattr(_inner(each), "deterministic", True)
    ]


def by_name(schemas: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return schemas by the names of their tools."""
    return {name_of_schema(schema): schema for schema in schemas}


def digest_of_schemas(schemas: Sequence[dict[str, Any]]) -> str:
    """Return a digest of schemas."""
    return hashlib.blake2b(json.dumps(schemas).encode(), digest_size=8).hexdigest()


def check_deadline(deadline_s: float) -> float:
    """Return a deadline, or raise ValueError if it is none."""
    if not 0 < deadline_s < 86_400:  # the system's timers take no more than 24 days
        raise ValueError(
            f"tool_deadline={deadline_s}: give seconds above 0 and below 86400, a day."
        )
    return deadline_s


def _name_of(function: Callable[..., Any]) -> str:
    inner = _inner(function)
    return str(getattr(inner, "__name__", type(inner).__name__))


def _inner(function: Any) -> Any:
    while isinstance(function, functools.partial):
        function = function.func
    return function


def _bound_by_partial(function: Any) -> list[str]:
    """Return the names of arguments that a partial has filled in."""
    if not isinstance(function, functools.partial):
        return []
    names = [*inspect.signature(function.func).parameters]
    return [*_bound_by_partial(function.func), *names[: len(function.args)], *function.keywords]
