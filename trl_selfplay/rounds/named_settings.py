"""Name the settings that a foreign error may come from.

In: a config, and code of a parent class or a library that reads it. Out: the error that it raises, with the
settings that differ from their defaults. One that says nothing by itself, such as a KeyError, becomes a
ValueError.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl_selfplay.confidential import shown

# Raised where something else goes wrong than what the message says.
_SPEECHLESS = (
    AssertionError, AttributeError, LookupError, RecursionError, StopIteration, TypeError,
    ZeroDivisionError,
)  # fmt: skip
_SHOWN = 100  # characters of a value


@contextmanager
def naming_settings(config: Any, when: str) -> Iterator[None]:
    """Add the settings that differ from their defaults to an error.

    Args:
        config: A dataclass.
        when: A sentence that says when the error came up.

    Raises:
        ValueError: In place of an error that says nothing by itself.
    """
    try:
        yield
    except Exception as error:
        about = f"{when} Settings that differ from their defaults: {_changed(config)}."
        if isinstance(error, _SPEECHLESS):
            # Not a TypeError: the settings together are wrong, not an argument of ours.
            raise ValueError(  # noqa: TRY004
                f"{type(error).__name__}: {error}. {about}"
            ) from error
        error.add_note(about)
        raise


def _changed(config: Any) -> str:
    values = {
        each.name: value
        for each in dataclasses.fields(config)
        if each.init and (value := getattr(config, each.name, None)) != _default(each)
    }
    given = (f"{name}={shown(value, name, most=_SHOWN)}" for name, value in values.items())
    return ", ".join(given) or "none"


def _default(each: "dataclasses.Field[Any]") -> Any:
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return each.default
