"""What a row is offered: which tools of the run, and how its prompt tells of them in words.

In: the schemas of a run's tools, and a row's columns. Out: the schemas that the row's prompt shows and whose
tools answer its calls, and a text about them for models whose chat template doesn't know tools.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Schema = Mapping[str, Any]
ACTION = "Action:"  # what a call in words begins with
COPY = "\0copy"  # no dataset's column


def as_copy(columns: Mapping[str, Any], copy: int) -> Mapping[str, Any]:
    """Return a row's columns with the number of equal rows before it, which `reset` doesn't get; 0 changes nothing."""
    return {**columns, COPY: copy} if copy else columns


class Toolbox(Protocol):
    """What a run's rows call: tools, or environments with their methods.

    Attributes:
        schemas: Of all tools, each name once.
        sources: What a call runs, by name, for digests of its source.
        nondeterministic: Names of tools that may answer the same call differently.
        has_environments: Whether `reset` of an environment begins each rollout.
        rewarding: By the name of an environment's class with `get_reward`, the names under which the
            column `environment` knows it; None for the only one.
    """

    schemas: list[dict[str, Any]]
    sources: Mapping[str, Any]
    nondeterministic: Sequence[str]
    has_environments: bool
    rewarding: Mapping[str, frozenset[str | None]]

    def schemas_of(self, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the schemas of what a row may call, whatever its own column `tools` says."""
        ...

    def observation(self, columns: Mapping[str, Any]) -> Any:
        """Return what a row's environment says at its start: text, parts of a message, or None."""
        ...


@dataclass(frozen=True, slots=True)
class ToolForm:
    """How the prompts of a run tell of its tools.

    Attributes:
        toolbox: The tools.
        in_words: As text (ReAct); otherwise the chat template gets their schemas.
        chat_template: A template in place of the tokenizer's own, or None.
    """

    toolbox: Toolbox
    in_words: bool
    chat_template: str | None = None


def name_of_schema(schema: Schema) -> str:
    """Return the name of a tool's schema, with or without the outer level of its type."""
    return str(schema.get("function", schema).get("name"))


def read_tools(columns: Mapping[str, Any], where: str) -> list[Any]:
    """Return a row's own column `tools`, names or schemas; an empty list if it has none.

    Args:
        columns: The row's.
        where: Name of the row for errors.

    Raises:
        TypeError: It is no list, or an entry is neither a name nor a schema.
        ValueError: It is text that isn't JSON.
    """
    tools = columns.get("tools")
    if isinstance(tools, str):  # JSON, where tools differ too much for one table
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where}: `tools` is {tools!r:.200}, which is not JSON ({error}). Give a list of "
                "tools' names or schemas, or that list as JSON text."
            ) from error
    if tools and not isinstance(tools, list):
        raise TypeError(
            f"{where}: `tools` is {tools!r:.200}; give a list of tools' names or schemas."
        )
    for entry in tools or ():
        if not isinstance(entry, str | Mapping):
            raise TypeError(
                f"{where}: `tools` has the entry {entry!r:.200}; give names of tools, or their schemas."
            )
    return tools or []


def read_schemas(columns: Mapping[str, Any], where: str) -> list[Any]:
    """Return a row's own column `tools`, all schemas, since the run has no tools that names could stand for.

    Raises:
        TypeError: As `read_tools`, or an entry is a name.
        ValueError: As `read_tools`.
    """
    tools = read_tools(columns, where)
    for entry in tools:
        if isinstance(entry, str):
            raise TypeError(
                f"{where}: `tools` names {entry!r:.200}, and the run has no tools. Give the tool's schema, "
                "or the function in the trainer's `tools`, if it takes them."
            )
    return tools


def offered(
    schemas: Sequence[dict[str, Any]], columns: Mapping[str, Any], where: str = "the row"
) -> list[dict[str, Any]]:
    """Return the schemas that a row is shown: all, or those that its own column `tools` names.

    Args:
        schemas: Of the tools that answer.
        columns: The row's. Its `tools` holds names, or schemas, which are shown as they stand.
        where: Name of the row for errors.

    Raises:
        TypeError, ValueError: As `read_tools`, or no tool answers to a name, or a name comes twice.
    """
    own = read_tools(columns, where)
    if not own:
        return list(schemas)
    known = {name_of_schema(schema): schema for schema in schemas}
    found = []
    names: set[str] = set()
    for entry in own:
        if isinstance(entry, Mapping) and not entry.get("function", entry).get("name"):
            raise ValueError(f"{where}: `tools` has the schema {entry!r:.200}, which has no name.")
        name = entry if isinstance(entry, str) else name_of_schema(entry)
        if name in names:
            raise ValueError(f"{where}: `tools` names {name!r} twice. Leave one out.")
        names.add(name)
        if name not in known:
            raise ValueError(
                f"{where}: `tools` names {name!r}, and no tool of this run answers to that; there are "
                f"{sorted(known)}. Pass the function in `tools`, or remove it from the row."
            )
        found.append(known[name] if isinstance(entry, str) else _without_none(entry))
    return found


def _without_none(value: Any) -> Any:
    """Return a schema without the keys that a table gave it because another row has them."""
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(each) for each in value]
    return value


def describe(schemas: Sequence[Schema]) -> str:
    """Return what a prompt says of tools that are called in plain text (ReAct); "" without tools.

    >>> print(describe([{"function": {"name": "add", "description": "Add numbers.", "parameters": {
    ...     "properties": {"a": {"type": "number", "description": "The first."}}}}}]))
    You can use these tools:
    add(a: number): Add numbers.
      a: The first.
    <BLANKLINE>
    To use one, write its call on a line of its own, as Action: name({"argument": value}), or with its first argument alone as Action: name[value], and Observation: on the next line. The result follows there. Write the answer when you have it, without Observation.
    """
    if not schemas:
        return ""
    lines = ["You can use these tools:"]
    for schema in schemas:
        function = schema.get("function", schema)
        arguments = function.get("parameters", {}).get("properties", {})
        typed = ", ".join(f"{name}: {_type(each)}" for name, each in arguments.items())
        lines.append(f"{name_of_schema(schema)}({typed}): {function.get('description', '')}")
        lines += [
            f"  {name}: {each['description']}"
            for name, each in arguments.items()
            if each.get("description")
        ]
    return "\n".join([*lines, "", _HOW])


def with_words(prompt: Any, told: str) -> Any:
    """Return a prompt with what it says of tools.

    Args:
        prompt: Text, which follows; or messages, of which the system message ends with it, or else the first
            of the user's begins with it.
        told: From `describe`; "" changes nothing.
    """
    if not told:
        return prompt
    if isinstance(prompt, str):
        return f"{told}\n\n{prompt}"
    places = [i for i, m in enumerate(prompt) if m["role"] in ("system", "user")]
    if not places:
        return [{"role": "user", "content": told}, *prompt]
    place = places[0]
    message = prompt[place]
    parts = message.get("content")
    pieces = [told, "\n\n"] if message["role"] == "user" else ["\n\n", told]
    added: Any = "".join(pieces)
    if isinstance(parts, list):
        added = [{"type": "text", "text": added}]
    content = added + parts if message["role"] == "user" else parts + added
    return [*prompt[:place], {**message, "content": content}, *prompt[place + 1 :]]


_HOW = (
    'To use one, write its call on a line of its own, as Action: name({"argument": value}), or with its '
    "first argument alone as Action: name[value], and Observation: on the next line. The result follows "
    "there. Write the answer when you have it, without Observation."
)


def _type(argument: Mapping[str, Any]) -> str:
    kind = argument.get("type", "any")
    return "|".join(kind) if isinstance(kind, list) else str(kind)
