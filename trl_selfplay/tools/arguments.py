"""Check a call's arguments against the schema that the prompt showed.

In: arguments as JSON has them, and a tool's schema, as transformers derives it from type hints. Out: what is
wrong with them. A function gets what was checked, and nothing that was converted.
"""

from collections.abc import Mapping
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "array": (list,),
    "boolean": (bool,),
    "integer": (int, float),
    "null": (type(None),),
    "number": (int, float),
    "object": (dict,),
    "string": (str,),
}


def json_types(schema: Any) -> set[str]:
    """Return the JSON types that a value may have by its schema; an empty set if any will do."""
    if not isinstance(schema, Mapping):
        return set()
    own = schema.get("type")
    found = {own} if isinstance(own, str) else {*(own or ())}
    choices = [json_types(choice) for choice in schema.get("anyOf") or ()]
    if not all(choices):
        return set()
    found = found.union(*choices)
    return found | {"null"} if found and schema.get("nullable") else found


def find_wrong(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a call's arguments, or None.

    Args:
        arguments: By name.
        schema: The tool's.
    """
    described = schema.get("function", schema).get("parameters") or {}
    known = described.get("properties") or {}
    for name in described.get("required") or ():
        if name not in arguments:
            return f"{name} is missing"
    for name, value in arguments.items():
        if name not in known:
            return f"there is no argument {name!r:.100}; known: {', '.join(known)}"
        if wrong := _find_wrong(value, known[name], name):
            return wrong
    return None


def _find_wrong(value: Any, schema: Any, where: str) -> str | None:
    if not isinstance(schema, Mapping):
        return None
    kinds = json_types(schema)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"{where} is {value!r:.100}, not of type {' or '.join(sorted(kinds))}"
    if value is None:
        return None
    if schema.get("enum") and value not in schema["enum"]:
        return f"{where} is {value!r:.100}, not one of {schema['enum']}"
    parts: list[tuple[Any, Any, Any]] = []
    if isinstance(value, list):
        parts = [(i, each, schema.get("items")) for i, each in enumerate(value)]
    elif isinstance(value, dict):
        parts = [(key, each, schema.get("additionalProperties")) for key, each in value.items()]
    for place, each, of_part in parts:
        if wrong := _find_wrong(each, of_part, f"{where}[{place!r}]"):
            return wrong
    return None


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()  # 3.0 is an integer of JSON
    return isinstance(value, _TYPES.get(kind, (object,)))
