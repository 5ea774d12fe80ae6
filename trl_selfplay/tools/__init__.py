"""Trajectories: rollouts of several turns, in which the policy calls tools and reads their results."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_selfplay.tools.ready import calculator as calculator
    from trl_selfplay.tools.ready import python as python
    from trl_selfplay.tools.tool_set import tool as tool

_MODULE_OF = {"calculator": "ready", "python": "ready", "tool": "tool_set"}
__all__ = ["calculator", "python", "tool"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
