"""What one trajectory may call, from its first call to its last.

In: calls, from any thread, one after the other. Out: results, whatever happens in a tool. Plain tools run in
processes that all trajectories share; an environment lives in a process of its own, which begins with the first
call and ends with the session.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_selfplay.tools.arguments import find_wrong
from trl_selfplay.tools.called import clean
from trl_selfplay.tools.record import ToolCall, ToolResult
from trl_selfplay.tools.tool_processes import ProcessEnded, ToolProcess, ToolProcesses

logger = logging.getLogger(__name__)

ERROR = "Error: "  # begins what a failed call comes to


def seed_of(*parts: Any) -> int:
    """Return a 64-bit seed that depends on these parts alone, which are numbers and strings."""
    canonical = json.dumps(parts, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment of a row.

    Attributes:
        name: Of its factory; None for the only one.
        columns: What its `reset` gets.
        seed: Of the random numbers during `reset`, the same for all samples of a row.
        methods: Names of the tools that it has.
        has_reward: Whether it has `get_reward`.
        check: Called with what `reset` returned; raises ValueError if the prompt shows something else.
        warned: What was said before of all environments of the run, which isn't said again.
    """

    name: str | None
    columns: Mapping[str, Any]
    seed: int
    methods: frozenset[str]
    has_reward: bool
    check: Callable[[Any], None]
    warned: set[str] = field(default_factory=set)


class Session:
    """The tools of one trajectory.

    Args:
        processes: Where they run.
        schemas: Of what may be called, by name.
        deadline_s: Seconds per call.
        key: The trajectory's: what tools draw at random depends on it and on the number of the call.
        environment: The trajectory's, if it has one.
    """

    def __init__(
        self,
        processes: ToolProcesses,
        schemas: Mapping[str, Mapping[str, Any]],
        deadline_s: float,
        key: int,
        environment: Environment | None = None,
    ) -> None:
        self._processes = processes
        self._schemas = schemas
        self._deadline_s = deadline_s
        self._key = key
        self._environment = environment
        self._num_calls = 0
        self._past: list[tuple[ToolCall, ToolResult, int]] = []  # to be repeated in the environment
        self._own: ToolProcess | None = None  # the environment's
        self._shared: ToolProcess | None = None  # at work for a call of a plain tool
        self._end: str | None = None  # of the environment: why it is gone
        self._is_closed = False

    def call(self, call: ToolCall) -> ToolResult:
        """Return what a call comes to.

        Raises:
            ValueError: `reset` returns something else than when the prompt was rendered.
            ImportError: A tool needs a package that isn't installed.
            RuntimeError: The tools can't be loaded, or no process can be started.
        """
        seed = self._next_seed()
        if refusal := refuse_call(call, self._schemas):
            return ToolResult(call.name, f"{ERROR}{refusal}", failed=True)
        request = ("call", call.name, dict(call.arguments))
        is_of_environment = self._is_of_environment(call)
        try:
            if is_of_environment:
                answer = self._ask_environment(*request, seed=seed)
            else:
                answer = self._ask_shared(*request, seed=seed)
        except ProcessEnded as error:
            return ToolResult(call.name, f"{ERROR}{error}", True, has_ended=is_of_environment)
        return _result(call.name, answer)

    def replay(self, call: ToolCall, result: ToolResult) -> None:
        """Take note of a call that was made before this session, and whose result is known.

        It isn't made again, but in an environment, which has to get into the same state. One that had ended
        isn't begun again.
        """
        seed = self._next_seed()
        if result.has_ended:
            self._end = self._end or result.content.removeprefix(ERROR)
        elif self._is_of_environment(call) and not refuse_call(call, self._schemas):
            self._past.append((call, result, seed))

    def reward(self) -> float | None:
        """Return what the environment's `get_reward` gives for the trajectory; None if it gives nothing."""
        if not self.has_reward:
            return None
        try:
            answer = self._ask_environment("reward", seed=seed_of(self._key, "reward"))
        except ProcessEnded as error:
            answer = {"error": str(error)}
        reward = answer.get("reward")
        if isinstance(reward, float) and math.isfinite(reward):
            return reward
        cause = answer.get("error", f"it returned {reward!r}")
        self._warn(f"get_reward of an environment gave no reward: {cause}. The rollout is without.")
        return None

    @property
    def has_reward(self) -> bool:
        """Whether there is an environment that gives one."""
        return self._environment is not None and self._environment.has_reward

    def close(self) -> None:
        """End what runs for the trajectory, also from another thread than that of a call."""
        self._is_closed = True
        for process in (self._own, self._shared):
            if process is not None:
                process.close()

    def _next_seed(self) -> int:
        self._num_calls += 1
        return seed_of(self._key, "call", self._num_calls)

    def _is_of_environment(self, call: ToolCall) -> bool:
        return self._environment is not None and call.name in self._environment.methods

    def _ask_shared(self, *request: Any, seed: int) -> dict[str, Any]:
        process = self._shared = self._processes.take()
        try:
            if self._is_closed:
                raise ProcessEnded("the trajectory has ended")
            answer = process.ask(*request, seed=seed, deadline_s=self._deadline_s)
        except BaseException:
            process.close()
            raise
        finally:
            self._shared = None
        if answer.get("is_spent", True):
            process.close()
        else:
            self._processes.give_back(process)
        return answer

    def _ask_environment(self, *request: Any, seed: int) -> dict[str, Any]:
        if self._end is not None:
            raise ProcessEnded(f"the environment has ended: {self._end}")
        try:
            if self._own is None:
                self._begin_environment()
            assert self._own is not None
            return self._own.ask(*request, seed=seed, deadline_s=self._deadline_s)
        except ProcessEnded as error:
            self._end = str(error)
            if self._own is not None:
                self._own.close()
            raise

    def _begin_environment(self) -> None:
        """Start the environment, and repeat the calls of an interrupted run."""
        assert self._environment is not None
        self._own = self._processes.start()
        if self._is_closed:
            raise ProcessEnded("the trajectory has ended")
        reset_environment(self._own, self._environment, self._deadline_s)
        for call, result, seed in self._past:
            answer = self._own.ask(
                "call", call.name, dict(call.arguments), seed=seed, deadline_s=self._deadline_s
            )
            if _result(call.name, answer) != result:
                self._warn(
                    f"the environment's {call.name!r} returned something else when a call was repeated to resume: "
                    "declare it with @tool(deterministic=False), or let it depend on its arguments and on "
                    "seeded random numbers alone. The recorded result stands."
                )

    def _warn(self, text: str) -> None:
        assert self._environment is not None
        if text not in self._environment.warned:
            self._environment.warned.add(text)
            logger.warning("%s", text)


def refuse_call(call: ToolCall, schemas: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return why a call isn't made, as the policy is told, or None.

    Args:
        call: The call.
        schemas: Of what may be called, by name.
    """
    if call.error is not None:
        return f"wrong arguments: {clean(call.error)}"
    if call.name not in schemas:
        return f"no tool {clean(call.name)!r:.100}; known: {', '.join(schemas)}"
    wrong = find_wrong(call.arguments, schemas[call.name])
    return wrong and f"wrong arguments: {clean(wrong)}"


def reset_environment(process: ToolProcess, environment: Environment, deadline_s: float) -> None:
    """Make an environment in a new process and reset it; the process is closed if that fails.

    Raises:
        ProcessEnded: It couldn't be made or reset, and why.
        ValueError: See `Session.call`.
    """
    try:
        answer = process.ask(
            "reset",
            environment.name,
            dict(environment.columns),
            seed=environment.seed,
            deadline_s=deadline_s,
        )
        if "error" in answer:
            failed = "its reset failed" if answer["is_made"] else "making it failed"
            raise ProcessEnded(f"{failed}: {answer['error']}")
        environment.check(answer["observation"])
    except BaseException:
        process.close()
        raise


def _result(name: str, answer: Mapping[str, Any]) -> ToolResult:
    if "error" in answer:
        return ToolResult(name, f"{ERROR}{answer['error']}", failed=True)
    return ToolResult(name, answer["content"])
