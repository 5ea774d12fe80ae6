"""Sample trajectories: the policy writes a turn, its calls are made, it reads the results and goes on.

In: a sampler of single turns, tools, and the dialogue in which they are called. Out: `TrajectorySampler`, a
`Sampler` whose completions have several turns, with a mask of what the policy wrote. Trajectories run side by
side: while one waits for its tools, others are decoded.
"""

import hashlib
import json
import queue
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from trl_selfplay.generation.sampler import (
    Finish,
    Halt,
    Requests,
    SampledCompletion,
    Sampler,
    SampleRequest,
    SamplingOptions,
)
from trl_selfplay.tools.environments import Environments
from trl_selfplay.tools.offer import offered
from trl_selfplay.tools.record import Dialogue, ToolCall, ToolResult
from trl_selfplay.tools.sessions import Session
from trl_selfplay.tools.step_log import Step, StepLog
from trl_selfplay.tools.tool_set import MOST_CALLS_AT_ONCE, ToolSet

_LONGEST_WAIT_S = 0.2  # until it is asked whether the run goes on


def turn_key(key: int, turn: int) -> int:
    """Return the key of the random stream of a trajectory's turn; that of the first is the trajectory's."""
    if turn == 0:
        return key
    canonical = json.dumps([key, "turn", turn], separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "big")


@dataclass(frozen=True, slots=True)
class Trajectories:
    """How trajectories are sampled, constant over a run.

    Attributes:
        tools: What the policy may call.
        dialogue: How it calls them and is shown results.
        max_tool_calling_iterations: Most turns of a trajectory whose calls are made; None: no limit.
        context_length: Most tokens of a prompt with its completion, or None.
    """

    tools: ToolSet | Environments
    dialogue: Dialogue
    max_tool_calling_iterations: int | None = None
    context_length: int | None = None

    def over(
        self,
        sampler: Sampler,
        rows: Sequence[Mapping[str, Any]] | None = None,
        step_log: StepLog | None = None,
    ) -> "TrajectorySampler":
        """Return a sampler of trajectories over one of single turns.

        Args:
            sampler: Samples a turn.
            rows: The dataset's columns of each request, for environments.
            step_log: Keeps steps as they happen, and gives back those of an interrupted run; None keeps
                nothing.
        """
        return TrajectorySampler(sampler, self, rows, step_log)

    def step_log(self, path: Path) -> StepLog:
        """Return the file of these trajectories' steps; an earlier one is read if its tools were the same."""
        return StepLog(path, self.tools.identity)


class TrajectorySampler:
    """Adds turns with tools to a sampler.

    A trajectory ends with a turn without calls, with a call that can't be read (halt "malformed"), with one
    after `max_tool_calling_iterations` turns of calls (halt "tool_limit"), or where it would exceed
    `max_completion_length` tokens, results included, or the model's context: it is then truncated. A trajectory
    depends on its key, its prompt, the weights and its tools' results alone.

    Args:
        sampler: Samples a turn.
        how: The tools, and how they are called.
        rows: See `Trajectories.over`.
        step_log: See `Trajectories.over`.
    """

    def __init__(
        self,
        sampler: Sampler,
        how: Trajectories,
        rows: Sequence[Mapping[str, Any]] | None = None,
        step_log: StepLog | None = None,
    ) -> None:
        self._sampler = sampler
        self.how = how
        self.rows = rows
        self.step_log = step_log

    def suggest_batch_size(self, longest_prompt: int, max_completion_length: int) -> int:
        """Return how many trajectories of this length fit in memory at once."""
        return self._sampler.suggest_batch_size(longest_prompt, max_completion_length)

    def release(self) -> None:
        """Free what sampling holds besides the model."""
        self._sampler.release()

    def sample(
        self,
        requests: Requests,
        options: SamplingOptions,
        batch_size: int,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        """Yield `(request index, trajectory)` as trajectories finish: see `Sampler.sample`.

        Raises:
            ValueError: The dialogue can't show results to this model.
        """
        stops = tuple(dict.fromkeys((*options.stop_strings, *self.how.dialogue.stop_strings)))
        of_turns = replace(options, stop_strings=stops)
        course = _Course(self, requests, options, on_tokens)
        try:
            for number, turn in self._sampler.sample(
                course.turns(), of_turns, batch_size, on_tokens
            ):
                course.take(number, turn)
                yield from course.finished()
            yield from course.finished()
        finally:
            course.stop()


@dataclass(slots=True)
class _Trajectory:
    """A trajectory on its way: what has been written so far, and by whom."""

    number: int
    request: SampleRequest
    session: Session
    schemas: Sequence[Mapping[str, Any]]  # of what it may call
    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    logprob: float | None = 0.0
    messages: list[dict[str, Any]] = field(default_factory=list)
    num_turns: int = 0  # of the policy
    num_failed: int = 0
    num_rerendered: int = 0  # turns
    rewards: list[float | None] = field(default_factory=list)  # one, once it is known


class _Course:
    """Leads trajectories from turn to turn: what is sampled next, what waits, what has finished."""

    def __init__(
        self,
        sampler: TrajectorySampler,
        requests: Requests,
        options: SamplingOptions,
        on_tokens: Callable[[int], None] | None,
    ) -> None:
        self._sampler = sampler
        self._source: Iterator[SampleRequest | None] | None = iter(requests)
        self._options = options
        self._on_tokens = on_tokens
        self._pool = ThreadPoolExecutor(MOST_CALLS_AT_ONCE, thread_name_prefix="tools")
        self._num_begun = 0
        self._sent: list[_Trajectory] = []  # by the number of the turn's request
        self._next: deque[_Trajectory] = deque()  # have their results
        self._num_decoding = self._num_calling = 0
        self._done: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._under_way: dict[int, _Trajectory] = {}
        self._is_stopped = False
        self._finished: deque[tuple[int, SampledCompletion]] = deque()

    def turns(self) -> Iterator[SampleRequest | None]:
        """Yield the turns to sample: of trajectories under way before new ones."""
        while True:
            self._carry_on()
            trajectory = self._next.popleft() if self._next else self._begin()
            if trajectory is not None:
                yield self._send(trajectory)
            elif self._num_decoding:
                yield None
            elif self._num_calling:
                self._carry_on(wait=True)
            elif self._source is None:
                return
            else:
                yield None  # the source has none now, and says so

    def finished(self) -> Iterator[tuple[int, SampledCompletion]]:
        """Yield what has finished since the last call."""
        while self._finished:
            yield self._finished.popleft()

    def _begin(self) -> _Trajectory | None:
        """Return a new trajectory, or one whose steps are on disk, at its next turn."""
        while self._source is not None:
            try:
                request = next(self._source)
            except StopIteration:
                self._source = None
                break
            if request is None:
                break
            trajectory = self._open(request)
            if self._replay(trajectory):
                return trajectory
        return None

    def _open(self, request: SampleRequest) -> _Trajectory:
        number = self._num_begun
        self._num_begun += 1
        how, rows = self._sampler.how, self._sampler.rows
        columns = {} if rows is None else rows[number]
        session = how.tools.open(columns, request.stream_key)
        trajectory = _Trajectory(
            number, request, session, offered(how.tools.schemas_of(columns), columns)
        )
        self._under_way[number] = trajectory
        return trajectory

    def _replay(self, trajectory: _Trajectory) -> bool:
        """Repeat recorded steps; return whether a turn is to be sampled next."""
        log = self._sampler.step_log
        if log is None:
            return True
        recorded = log.recorded(trajectory.request.stream_key)
        trajectory.rewards += recorded.rewards
        for step in recorded.steps:
            turn = SampledCompletion(step.turn_ids, step.finish, step.logprob)
            calls = self._add_turn(trajectory, turn)
            if not calls:
                return False
            for call, result in zip(calls, step.results, strict=False):
                trajectory.session.replay(call, result)
            if len(step.results) < len(calls):
                self._call(trajectory, calls, step.results)
                return False
            if not self._add_results(trajectory, step.results):
                return False
        return True

    def _send(self, trajectory: _Trajectory) -> SampleRequest:
        self._sent.append(trajectory)
        self._num_decoding += 1
        request = trajectory.request
        return SampleRequest(
            (*request.prompt_ids, *trajectory.ids),
            turn_key(request.stream_key, trajectory.num_turns),
            self._options.max_completion_length - len(trajectory.ids),
        )

    def take(self, number: int, turn: SampledCompletion) -> None:
        """Take a sampled turn: make its calls, or finish the trajectory."""
        self._num_decoding -= 1
        trajectory = self._sent[number]
        if self._sampler.step_log is not None:
            step = Step(turn.completion_ids, turn.finish, turn.logprob)
            self._sampler.step_log.add(trajectory.request.stream_key, step)
        if calls := self._add_turn(trajectory, turn):
            self._call(trajectory, calls)

    def _add_turn(self, trajectory: _Trajectory, turn: SampledCompletion) -> tuple[ToolCall, ...]:
        """Add a turn to its trajectory; return the calls to make, none where it has ended."""
        how, request = self._sampler.how, trajectory.request
        prefix = (*request.prompt_ids, *trajectory.ids)
        trajectory.ids += turn.completion_ids
        trajectory.mask += [True] * len(turn.completion_ids)
        trajectory.num_turns += 1
        if turn.logprob is None or trajectory.logprob is None:
            trajectory.logprob = None
        else:
            trajectory.logprob += turn.logprob
        reply = how.dialogue.read(turn.completion_ids, prefix, trajectory.schemas)
        trajectory.messages.append(reply.message)
        most = how.max_tool_calling_iterations
        is_last = most is not None and trajectory.num_turns > most
        if turn.finish == "length":
            self._finish(trajectory, "length")
        elif reply.malformed:
            self._finish(trajectory, turn.finish, "malformed")
        elif not reply.calls:
            self._finish(trajectory, turn.finish)
        elif is_last:
            self._finish(trajectory, turn.finish, "tool_limit")
        else:
            trajectory.num_rerendered += reply.is_rerendered
            return reply.calls
        return ()

    def _call(
        self,
        trajectory: _Trajectory,
        calls: tuple[ToolCall, ...],
        known: tuple[ToolResult, ...] = (),
    ) -> None:
        """Have calls made, one after the other, and then go on; `known` are the results of the first ones."""

        def make() -> Callable[[], None]:
            results = [*known]
            for call in calls[len(known) :]:
                result = trajectory.session.call(call)
                if self._is_stopped:  # which is why the call failed
                    break
                if self._sampler.step_log is not None:
                    self._sampler.step_log.add_result(trajectory.request.stream_key, result)
                results.append(result)
            return partial(self._go_on, trajectory, tuple(results))

        self._submit(make)

    def _go_on(self, trajectory: _Trajectory, results: tuple[ToolResult, ...]) -> None:
        if self._add_results(trajectory, results):
            self._next.append(trajectory)

    def _submit(self, work: Callable[[], Callable[[], None]]) -> None:
        """Do work in another thread, and what it returns in this one."""
        self._num_calling += 1

        def do() -> None:
            try:
                self._done.put(work())
            except BaseException as error:  # raised by whoever iterates
                self._done.put(partial(_raise, error))

        self._pool.submit(do)

    def _carry_on(self, wait: bool = False) -> None:
        """Do what follows from finished work; `wait` waits for the first, as long as the run goes on."""
        while self._num_calling:
            try:
                then = self._done.get(block=wait, timeout=_LONGEST_WAIT_S)
            except queue.Empty:
                if not wait:
                    return
                if self._on_tokens is not None:
                    self._on_tokens(0)  # raises if the run has ended
                continue
            wait = False
            self._num_calling -= 1
            then()

    def stop(self) -> None:
        """End what still runs, without waiting for it."""
        self._is_stopped = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        for trajectory in self._under_way.values():
            trajectory.session.close()

    def _add_results(self, trajectory: _Trajectory, results: tuple[ToolResult, ...]) -> bool:
        """Show results to the policy; return whether there is room for its next turn."""
        how, request = self._sampler.how, trajectory.request
        shown = how.dialogue.observation_ids(trajectory.ids, results)
        length = len(trajectory.ids) + len(shown)
        limit = how.context_length
        if length >= self._options.max_completion_length or (
            limit is not None and len(request.prompt_ids) + length >= limit
        ):
            self._finish(trajectory, "length")
            return False
        trajectory.ids += shown
        trajectory.mask += [False] * len(shown)
        trajectory.num_failed += sum(result.failed for result in results)
        trajectory.messages += [
            {"role": "tool", "name": r.name, "content": r.content} for r in results
        ]
        return True

    def _finish(self, trajectory: _Trajectory, finish: Finish, halt: Halt | None = None) -> None:
        if trajectory.rewards or not trajectory.session.has_reward:
            self._close(trajectory, finish, halt)
            return

        def ask() -> Callable[[], None]:
            reward = trajectory.session.reward()
            if not self._is_stopped and self._sampler.step_log is not None:
                self._sampler.step_log.add_reward(trajectory.request.stream_key, reward)
            trajectory.rewards.append(reward)
            return partial(self._close, trajectory, finish, halt)

        self._submit(ask)

    def _close(self, trajectory: _Trajectory, finish: Finish, halt: Halt | None) -> None:
        trajectory.session.close()
        del self._under_way[trajectory.number]
        is_single = trajectory.num_turns == 1 and all(trajectory.mask)
        completion = SampledCompletion(
            tuple(trajectory.ids),
            finish,
            trajectory.logprob,
            None if is_single else tuple(trajectory.mask),
            tuple(trajectory.messages),
            environment_reward=trajectory.rewards[0] if trajectory.rewards else None,
            halt=halt,
            num_failed_calls=trajectory.num_failed,
            num_rerendered_turns=trajectory.num_rerendered,
        )
        self._finished.append((trajectory.number, completion))


def _raise(error: BaseException) -> None:
    raise error
