"""What is known of reward functions before they are called: names, columns, kinds.

In: functions with TRL's signature, and partials of them. Out: the columns that they read, whether
they must be awaited, whether they compare samples, and errors for those that can't be called.
"""

import dis
import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import nn

from trl_selfplay.rewards.reward_model import RewardModel

# Columns that aren't forwarded: functions get them under GRPOTrainer's names (`prompts`, …).
NOT_FORWARDED = ("prompt", "completion", "completion_ids")


def columns_read(reward_funcs: Any, columns: Collection[str]) -> list[str]:
    """Return those of a dataset's columns that reward functions read, sorted.

    A function reads its named parameters, and all columns if its code uses its `**kwargs`. One
    that has them for no other reason than that every column is passed reads no more than it names.
    Reward models read no columns. A function that calls others reads what these read, if they are
    in its attribute `called_functions`.

    Args:
        reward_funcs: As `Scorer` takes them; None reads nothing.
        columns: The dataset's.
    """
    entries = reward_funcs if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    passed = {name for name in columns if name not in NOT_FORWARDED}
    found: set[str] = set()
    for entry in entries:
        if hasattr(entry, "called_functions"):
            found |= {*columns_read(entry.called_functions, passed)}
        elif callable(entry) and not isinstance(entry, (nn.Module, RewardModel)):
            named = _names_read(entry)
            found |= passed if named is None else passed & named
    return sorted(found)


def _names_read(function: Callable[..., Any]) -> set[str] | None:
    """Return the columns that a function may read; None for all there are."""
    try:
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # some built-ins have no signature
        return None
    if any(p.kind is p.VAR_KEYWORD and _uses(function, p.name) for p in parameters):
        return None
    return {p.name for p in parameters}


def _uses(function: Callable[..., Any], parameter: str) -> bool:
    """Return whether a function's code mentions one of its parameters."""
    inner = without_partial(function)
    code = getattr(inner, "__code__", None) or getattr(type(inner).__call__, "__code__", None)
    if code is None or parameter in code.co_cellvars or "locals" in code.co_names:
        return True
    for instruction in dis.get_instructions(code):
        named = instruction.argval  # a tuple where one instruction loads two variables
        if parameter == named or (isinstance(named, tuple) and parameter in named):
            return True
    return False


def check_parameters(
    function: Callable[..., Any], name: str, given: set[str], columns: list[str], where: str
) -> None:
    """Raise ValueError if a function can't be called with what it is given.

    Args:
        function: The reward function.
        name: Its name, for the error.
        given: All names that it is given by keyword.
        columns: Those of them that are the dataset's columns.
        where: Name of the dataset, for the error.
    """
    try:
        # The signature of a decorated function counts, not that of the function it wraps.
        parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    except (TypeError, ValueError):  # some built-ins have no signature
        return
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in given
    ]
    if missing:
        advice = "Rename or add a column"
        if "solution" in columns:
            advice += (
                ", or rename the argument: the column of --solution_column is called 'solution'"
            )
        raise ValueError(
            f"reward function {name!r} needs {missing}, and {where} has the columns "
            f"{['prompt', *columns]}. {advice}."
        )
    unknown = sorted(given - {p.name for p in parameters})
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"reward function {name!r} doesn't take {unknown}. It gets every column of the dataset "
            "by keyword, as for GRPOTrainer: add **kwargs to its parameters."
        )


def compares_samples(function: Callable[..., Any]) -> bool:
    """Return whether a function's scores depend on the prompt's other samples."""
    return bool(getattr(without_partial(function), "compares_samples", False))


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether a reward function has to be awaited."""
    inner = without_partial(function)
    call = getattr(inner, "__call__", None)  # noqa: B004  # we need its type, not whether it exists
    return inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(call)


def unique_names(functions: Sequence[Callable[..., Any]]) -> tuple[str, ...]:
    """Return a name per function, with a number where several have the same."""
    names: list[str] = []
    for function in functions:
        inner = without_partial(function)
        name = getattr(inner, "__name__", type(inner).__name__)
        candidates = (name, *(f"{name}_{number}" for number in range(2, len(functions) + 2)))
        names.append(next(c for c in candidates if c not in names))
    return tuple(names)


def without_partial(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function itself, without the options that `functools.partial` gave it."""
    while isinstance(function, functools.partial):
        function = function.func
    return function
