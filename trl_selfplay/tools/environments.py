"""Environments: tools with a state that belongs to one trajectory, as GRPOTrainer's `environment_factory`.

In: a factory of environments, or several by name, whose instances have `reset`, methods that the policy calls,
and perhaps `get_reward`. Out: `Environments`, whose sessions each have an instance in a process of its own.
"""

import hashlib
import inspect
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

from trl_selfplay.tools.offer import COPY, offered
from trl_selfplay.tools.sessions import Environment, Session, reset_environment, seed_of
from trl_selfplay.tools.tool_processes import ProcessEnded, ToolProcesses
from trl_selfplay.tools.tool_set import (
    by_name,
    check_deadline,
    describe_tool,
    describe_tools,
    digest_of_schemas,
    find_nondeterministic,
)

_RESERVED = ("reset", "get_reward")
Factory = Callable[[], Any]


class Environments:
    """Tools of which each trajectory has its own instance.

    All public methods of an environment but `reset` and `get_reward` are tools. Each trajectory calls them on a new
    instance, after `reset` with its row's columns, in a process that is killed if a call misses its deadline: the
    environment has then ended, and the policy is told so. During `reset` the random numbers of Python, NumPy and
    torch are the same for all samples of a row; during a call they depend on the trajectory and the number of
    the call.

    Args:
        factory: Makes an instance; or several factories by name, of which a row's column `environment` names
            its own.
        tools: Functions that all trajectories may call besides, see `ToolSet`.
        deadline_s: Seconds per call, and for making and resetting an instance.

    Attributes:
        schemas: Of all tools, each name once.
        sources: Tools by name, and the environments' classes by the factories' names, or "environment".
        nondeterministic: Names of tools that may answer the same call differently.
        has_environments: True.
        rewarding: By the name of a class with `get_reward`, the names of its factories; None for the only one.
        is_dict: Whether there are several factories by name.

    Raises:
        TypeError: A factory can't be called, or sent to another process.
        ValueError: A class has no `reset`, or a method isn't described, or has the name of another tool.
    """

    def __init__(
        self,
        factory: Factory | Mapping[str, Factory],
        tools: Sequence[Callable[..., Any]],
        deadline_s: float,
    ) -> None:
        self._deadline_s = check_deadline(deadline_s)
        self.is_dict = isinstance(factory, Mapping)
        factories: dict[str | None, Any] = (
            dict(factory.items()) if isinstance(factory, Mapping) else {None: factory}
        )
        if not factories or not all(map(callable, factories.values())):
            raise TypeError(
                f"environment_factory={factory!r:.200}: give a class or another function that makes an "
                "environment, or a dict of such with names."
            )
        functions, own = describe_tools(tools)
        self.sources: dict[str, Any] = dict(functions)
        self.has_environments = True
        self.rewarding: dict[str, frozenset[str | None]] = {}
        self.nondeterministic = find_nondeterministic(functions)
        self._schemas: dict[str | None, list[dict[str, Any]]] = {}
        self._methods: dict[str | None, frozenset[str]] = {}
        self._rewarding: set[str | None] = set()
        for name, each in factories.items():
            kind = _class_of(each)
            methods = _methods_of(kind)
            if both := functions.keys() & methods.keys():
                raise ValueError(
                    f"a tool and a method of {kind.__name__} are both named {sorted(both)[0]!r}; rename one."
                )
            self._schemas[name] = [*own, *(describe_tool(f, n) for n, f in methods.items())]
            self._methods[name] = frozenset(methods)
            self.sources[name or "environment"] = kind
            self.nondeterministic += find_nondeterministic(methods)
            if hasattr(kind, "get_reward"):
                self._rewarding.add(name)
                before = self.rewarding.get(kind.__name__, frozenset())
                self.rewarding[kind.__name__] = before | {name}
        self.schemas = [*by_name([s for each in self._schemas.values() for s in each]).values()]
        self._observed: dict[str, str] = {}
        self._warned: set[str] = set()
        self._processes = ToolProcesses(functions, factories)

    @property
    def identity(self) -> str:
        """A digest of what the prompts show of the tools."""
        return digest_of_schemas(self.schemas)

    def schemas_of(self, columns: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return what a row may call: its environment's methods, and the tools.

        Raises:
            ValueError: The row names no environment, or one that isn't there.
        """
        return self._schemas[self._name_of(columns)]

    def observation(self, columns: Mapping[str, Any]) -> Any:
        """Return what `reset` says of a row: text, parts of a message, or None.

        Raises:
            ValueError: `reset` fails, or the row names no environment.
        """
        found: list[Any] = []
        environment = self._environment(columns, found.append)
        try:
            process = self._processes.start()
            reset_environment(process, environment, self._deadline_s)
            process.close()
        except ProcessEnded as error:
            raise ValueError(
                f"the environment of a row can't be made: {error}. The row's columns are {environment.columns!r:.400}."
            ) from error
        self._observed[_canonical(columns)] = _canonical(found[0])
        return found[0]

    def open(self, columns: Mapping[str, Any], key: int) -> Session:
        """Return the tools of one trajectory, with an environment of its own.

        Args:
            columns: Its row's, as `observation` got them.
            key: Of its random stream.
        """
        schemas = offered(self.schemas_of(columns), columns)
        environment = self._environment(columns, partial(self._check, _canonical(columns)))
        return Session(self._processes, by_name(schemas), self._deadline_s, key, environment)

    def close(self) -> None:
        """End the processes; a later call starts new ones. Also done at exit."""
        self._processes.close()

    def _environment(self, columns: Mapping[str, Any], check: Callable[[Any], None]) -> Environment:
        name = self._name_of(columns)
        own = {COPY, *({"environment"} if self.is_dict else ())}
        given = {k: v for k, v in columns.items() if k not in own}
        seed = seed_of(_canonical(columns))
        kind = self.sources[name or "environment"]
        try:
            inspect.signature(_bound(kind, "reset")).bind(**given)
        except TypeError as error:
            raise TypeError(
                f"`reset` of {kind.__name__} gets each row's columns by name. Let it take **kwargs, and give a default "
                f"to what a row may lack ({error})."
            ) from error
        return Environment(
            name, given, seed, self._methods[name], name in self._rewarding, check, self._warned
        )

    def _name_of(self, columns: Mapping[str, Any]) -> str | None:
        name = columns.get("environment") if self.is_dict else None
        if name not in self._schemas:
            raise ValueError(
                f"a row's column `environment` is {name!r}, and there are {list(self._schemas)}: give each row "
                "the name of its environment."
            )
        return name

    def _check(self, row: str, found: Any) -> None:
        """Raise if `reset` returned something else than when the row's prompt was rendered."""
        if self._observed.get(row, _canonical(found)) != _canonical(found):
            raise ValueError(
                f"the environment's reset returned {found!r:.200} for a row, and something else before, when its "
                "prompt was rendered. All samples of a row begin alike: let reset depend on its arguments and "
                "on random numbers of Python, NumPy and torch alone, which are seeded."
            )


def _class_of(factory: Any) -> type:
    """Return the class of what a factory makes."""
    return factory if isinstance(factory, type) else type(factory())


def _methods_of(kind: type) -> dict[str, Callable[..., Any]]:
    """Return the methods that are tools, as GRPOTrainer finds them, without their first argument."""
    found = dict(inspect.getmembers(kind, predicate=inspect.isfunction))
    if "reset" not in found:
        raise ValueError(
            f"environments need a method `reset`, and {kind.__name__} has none; it gets the row's columns."
        )
    return {
        name: _bound(kind, name)
        for name in found
        if name not in _RESERVED and not name.startswith("_")
    }


def _bound(kind: type, name: str) -> Callable[..., Any]:
    """Return a method without its first argument."""
    each = getattr(kind, name)
    is_static = isinstance(inspect.getattr_static(kind, name), staticmethod)
    return each if is_static else MethodType(each, kind)


def _canonical(value: Any) -> str:
    """Return a short text that is the same for equal columns or observations."""
    text = json.dumps(value, sort_keys=True, default=lambda each: pickle.dumps(each).hex())
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
