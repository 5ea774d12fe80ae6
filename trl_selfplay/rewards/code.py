"""Grade programs by running them on tests, apart from everything that they must not see or touch.

In: completions with a program, and tests in the column `tests`. Out: 1.0 if all tests hold or else
0.0, or the share that holds; None if the tests can't be used. A worker process reads and runs the
tests; the program runs in a sandbox of the worker's, and gets nothing but the arguments of calls, or
its standard input. So it can neither look up what is expected nor report a success of its own. The
tests themselves are trusted: the worker has the user's rights.
"""

import ast
import builtins
import functools
import pickle
import re
import secrets
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trl_selfplay.rewards.answer import text_of, without_thoughts
from trl_selfplay.rewards.code_checks import (
    NotAValue,
    ProgramOver,
    Unsendable,
    read_outcome,
    run_calls,
    together,
)
from trl_selfplay.rewards.code_tests import (
    CallTests,
    InputTests,
    last_function,
    parse,
    read_tests,
    same_output,
)
from trl_selfplay.rewards.isolation import Limits
from trl_selfplay.rewards.literals import LiteralError
from trl_selfplay.rewards.sandbox import ProgramEnded, Sandbox, Session
from trl_selfplay.rewards.scores import Scores
from trl_selfplay.rewards.worker import WorkerPool

DEADLINE_S = 5.0
_MOST_SECONDS = 86_400  # the system's timers take no more than 24 days
# The worker's own time besides the program's, before it is ended. The sandbox takes a part of it where a
# program doesn't end, and on a busy machine each of its processes has to get its turn.
_GRACE_S = 2.0
# Longer answers aren't programs of any task, and parsing takes a multiple of their size.
_MOST_CHARACTERS = 200_000
_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*$", re.MULTILINE)
_PYTHON = ("python", "py", "python3")
# How often a reference program is run, since some tests draw numbers at random.
_REFERENCE_RUNS = 3
_UNUSABLE = "the tests can't be used"
_NEEDS_TRUST = "the tests need trusted_tests=True"
_NEVER_CALL = "the tests never call the program"
_TRIAL = ("print(1)", "", InputTests((("", "1"),)))


class CodeReward:
    """The reward function of programs that are checked by tests; `code_reward` is one.

    Programs aren't trusted, tests are: they run outside the sandbox and may do what the user may. So
    the column `tests` has to come from a source whose code you would run.

    Args:
        share: Return the share of tests that hold in place of 1.0 or 0.0.
        deadline_s: Seconds for all tests of a completion together, the start of its program
            included. What isn't finished then doesn't hold.
        limits: What a program may use.
        trusted_tests: Run tests that can't run apart from the program, such as those of classes, in
            the program's own interpreter. The program can then read the tests and forge its verdict;
            it still can't leave the sandbox.
        allow_weak_isolation: Run programs where the system offers neither bubblewrap nor namespaces,
            with limits alone.
    """

    def __init__(
        self,
        share: bool = False,
        deadline_s: float = DEADLINE_S,
        limits: Limits | None = None,
        trusted_tests: bool = False,
        allow_weak_isolation: bool = False,
    ) -> None:
        if not 0 < deadline_s <= _MOST_SECONDS:
            raise ValueError(
                f"deadline_s={deadline_s}; give seconds above 0 and up to {_MOST_SECONDS}, a day."
            )
        self.__name__ = "code_fraction_reward" if share else "code_reward"
        self._share = share
        self._deadline_s = deadline_s
        self._trusted_tests = trusted_tests
        self._limits = limits or Limits()
        self._pool = _pool_for(self._limits, allow_weak_isolation)

    @property
    def identity(self) -> dict[str, Any]:
        """What the scores depend on."""
        return {
            "deadline_s": self._deadline_s,
            "limits": asdict(self._limits),
            "trusted_tests": self._trusted_tests,
        }

    def __call__(
        self,
        completions: Sequence[Any],
        tests: Sequence[Any],
        entry_point: Sequence[str | None] | None = None,
        starter_code: Sequence[str | None] | None = None,
        prompts: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> Scores:
        """Score each completion's program on its tests.

        The program is the last code block of the answer, of those marked as Python if any is, or
        else the whole answer. After a starter that is Python code up to the head of a function, an
        answer that doesn't define this function continues it.

        Args:
            completions: Text, or messages, the last of which counts.
            tests: See `read_tests`.
            entry_point: Name of the tested function. By default the tests or the starter say it, or
                it is the last function of the program.
            starter_code: Code that the program starts with; by default the prompt, if that is code.
            prompts: The prompt of each completion.
            **kwargs: Other columns, unused.

        Raises:
            RuntimeError: This machine offers no isolation, and `allow_weak_isolation` isn't set.
        """
        rows = _rows(len(completions), tests, entry_point, starter_code, prompts)
        read = [_read(*row) for row in rows]
        causes = {i: c for i, found in enumerate(read) if (c := self._refusal(found)) is not None}
        jobs = {
            index: (without_thoughts(text_of(completions[index])), row[2], read[index])
            for index, row in enumerate(rows)
            if index not in causes
        }
        groups = [pickle.dumps(rows[i] if prompts is None else prompts[i]) for i in jobs]
        scores: list[float | None] = [None] * len(completions)
        for index, held in zip(jobs, self._grade(list(jobs.values()), groups), strict=True):
            if isinstance(held, str):
                causes[index] = held
            else:
                scores[index] = sum(held) / len(held) if self._share else float(all(held))
        graded = Scores(scores, causes)
        graded.log_causes(self.__name__)
        return graded

    def find_data_errors(
        self,
        prompts: Sequence[Any],
        tests: Sequence[Any],
        entry_point: Sequence[str | None] | None = None,
        starter_code: Sequence[str | None] | None = None,
        solution: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> dict[int, str]:
        """Return the rows whose tests can't be used, or fail on the program in `solution`, and why.

        Tests that an empty answer passes are no use either.

        Raises:
            RuntimeError: This machine offers no isolation, and `allow_weak_isolation` isn't set.
            ValueError: The tests of no row can be used.
        """
        errors, usable = {}, {}
        for index, row in enumerate(_rows(len(prompts), tests, entry_point, starter_code, prompts)):
            found = _read(*row)
            if isinstance(found, ValueError):
                errors[index] = str(found)
            elif self._refusal(found) is not None:
                errors[index] = f"{found.obstacle}; {_NEEDS_TRUST}"  # type: ignore[union-attr]
            else:
                usable[index] = (row[2], found)
        if errors and not usable:
            raise ValueError(
                f"{self.__name__} can use the tests of no row. Row 0: {errors[0]}. The forms of tests "
                "that it takes are in docs/verifiers.md."
            )
        self._grade([_TRIAL], None)  # raises if programs can't be run here
        outcomes = self._grade([("", *row) for row in usable.values()], None)
        for index, held in zip(usable, outcomes, strict=True):
            if not isinstance(held, str) and all(held):
                errors[index] = "the tests hold for an empty answer"
        references = enumerate([] if solution is None else solution)
        errors |= {
            index: f"its solution is {program!r:.80}, of type {type(program).__name__}; give a program "
            "as text, or None"
            for index, program in references
            if program is not None and not isinstance(program, str)
        }
        known = [i for i in usable if i not in errors and solution and (solution[i] or "").strip()]
        runs = range(_REFERENCE_RUNS)
        outcomes = self._grade(
            [(solution[index], *usable[index], run) for index in known for run in runs],  # type: ignore[index]
            None,
        )
        for position, index in enumerate(known):
            held_by_run = outcomes[position * _REFERENCE_RUNS : (position + 1) * _REFERENCE_RUNS]
            if (why := _describe_reference(held_by_run)) is not None:
                errors[index] = why
        return errors

    def _grade(
        self, jobs: Sequence[tuple[Any, ...]], groups: Sequence[Any] | None
    ) -> list[list[bool] | str]:
        """Return per job, which are arguments of `grade`, which checks hold, or a cause."""
        values, failures = self._pool.call_each(
            [(self._deadline_s, not self._share, *job) for job in jobs],
            self._deadline_s + _GRACE_S,
            groups,
        )
        return [
            failures[index].cause if index in failures else value
            for index, value in enumerate(values)
        ]

    def _refusal(self, found: CallTests | InputTests | ValueError) -> str | None:
        if isinstance(found, ValueError):
            return _UNUSABLE
        has_obstacle = isinstance(found, CallTests) and found.obstacle is not None
        return _NEEDS_TRUST if has_obstacle and not self._trusted_tests else None


@functools.cache
def _pool_for(limits: Limits, allow_weak_isolation: bool) -> WorkerPool:
    settings = {"limits": asdict(limits), "allow_weak_isolation": allow_weak_isolation}
    return WorkerPool(__name__, "grade", settings=settings)


code_reward = CodeReward()
code_fraction_reward = CodeReward(share=True)


def _rows(
    count: int,
    tests: Sequence[Any],
    entry_point: Sequence[str | None] | None,
    starter_code: Sequence[str | None] | None,
    prompts: Sequence[Any] | None,
) -> list[tuple[Any, str | None, str]]:
    """Return the tests, the tested function and the starter of each row."""
    nothing = [None] * count
    columns = zip(
        tests, entry_point or nothing, starter_code or nothing, prompts or nothing, strict=True
    )
    return [
        (test, name or None, starter or ("" if prompt is None else _as_starter(text_of(prompt))))
        for test, name, starter, prompt in columns
    ]


@functools.lru_cache(maxsize=4096)
def _as_starter(prompt: str) -> str:
    """Return a prompt that is Python code up to the head of a function; "" for any other."""
    return "" if last_function(_completed(prompt)) is None else prompt


def _completed(starter: str) -> str:
    """Return a starter with a body for its last function, if it has none."""
    if not starter.strip():
        return ""
    try:
        parse(starter)
    except ValueError:
        return f"{starter}\n    pass\n"
    return starter


def _read(tests: Any, entry_point: str | None, starter: str) -> CallTests | InputTests | ValueError:
    try:
        return _read_once(pickle.dumps(tests), entry_point, starter)
    except ValueError as error:
        return error


@functools.lru_cache(maxsize=4096)
def _read_once(tests: bytes, entry_point: str | None, starter: str) -> CallTests | InputTests:
    """Read tests once for all completions of a prompt."""
    return read_tests(pickle.loads(tests), entry_point, _completed(starter))


def _describe_reference(outcomes: Sequence[list[bool] | str]) -> str | None:
    """Return what is wrong with tests after several runs on a reference program, or None."""
    failed = [held for held in outcomes if isinstance(held, str) or not all(held)]
    if not failed:
        return None
    if len(failed) < len(outcomes):
        return "its solution passes the tests only sometimes"
    if isinstance(failed[0], str):
        return f"its solution can't be graded: {failed[0]}"
    return f"its solution fails the tests, check {failed[0].index(False)} among them"


def program_of(
    answer: str, starter: str, entry_point: str | None, names: Sequence[str] = ()
) -> str:
    """Return the program of an answer.

    Args:
        answer: What the model wrote, without thoughts. The last code block counts, of those marked
            as Python if any is, also if it isn't closed; without one, all of the text.
        starter: Code that the program starts with. An answer that defines the tested function follows
            it; any other continues it, up to the first line that isn't indented if the whole isn't
            Python.
        entry_point: The tested function; by default the starter's last one.
        names: Functions that the tests call. A block that defines none of them, nor the tested one,
            counts only if no block does: it shows a use.
    """
    blocks = _code_blocks(answer)
    marked = [code for language, code in blocks if language in _PYTHON]
    codes = marked or [code for _, code in blocks] or [answer]
    tested = entry_point or last_function(_completed(starter))
    sought = {*names, *([tested] if tested else [])}
    code = next((c for c in reversed(codes) if not _is_use(c, sought)), codes[-1])
    if not starter.strip():
        return textwrap.dedent(code)
    if tested in _functions(textwrap.dedent(code)):
        return f"{_completed(starter)}\n{textwrap.dedent(code)}"
    joint = "\n" if blocks and not starter.endswith("\n") else ""
    whole = f"{starter}{joint}{code}"
    if _functions(whole):
        return whole
    first_line, newline, rest = code.partition("\n")
    outside = re.search(r"^[^\s#)\]}]", rest, re.MULTILINE)
    return f"{starter}{joint}{first_line}{newline}{rest[: outside.start()] if outside else rest}"


def _is_use(code: str, names: set[str]) -> bool:
    """Return whether a text is Python that sets none of these names, and no function's body."""
    try:
        tree = parse(textwrap.dedent(code))
    except ValueError:
        return False
    stored = {
        n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
    }
    stored |= {getattr(statement, "name", "") for statement in tree.body}
    return not (names & stored or any(isinstance(s, ast.Return) for s in tree.body))


def _functions(code: str) -> set[str]:
    """Return the names of the functions at the top level of a text; none if it isn't Python."""
    try:
        body = parse(code).body
    except ValueError:
        return set()
    return {s.name for s in body if isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef))}


def _code_blocks(text: str) -> list[tuple[str, str]]:
    """Return the language and the text of each fenced block; the last one may lack its end."""
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    for fence in _FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]) and not fence[2]:
            blocks.append((opening[2].lower(), text[opening.end() + 1 : fence.start()]))
            opening = None
    if opening is not None:
        blocks.append((opening[2].lower(), text[opening.end() + 1 :]))
    return blocks


def grade(
    deadline_s: float,
    stop_early: bool,
    answer: str,
    starter: str,
    tests: CallTests | InputTests,
    run: int = 0,
) -> list[bool] | str:
    """Run one answer on its tests in this process's sandbox.

    Args:
        deadline_s: Seconds for all checks.
        stop_early: Leave out the checks after one that doesn't hold.
        answer: The completion without thoughts.
        starter: See `program_of`.
        tests: Its tests.
        run: Tells apart runs of one program that are otherwise the same.

    Returns:
        Whether each check holds, or why there is no verdict.
    """
    ends = time.monotonic() + deadline_s
    none_hold = [False] * tests.num_checks
    if len(answer) > _MOST_CHARACTERS:
        return none_hold
    if isinstance(tests, InputTests):
        return _run_on_inputs(program_of(answer, starter, None), tests, ends, stop_early)
    program = program_of(answer, starter, tests.entry_point, tests.names)
    candidate = None
    if tests.takes_candidate:
        candidate = tests.entry_point or last_function(program)
        if candidate is None:
            return none_hold
    if tests.obstacle is not None:
        nonce = secrets.token_hex(16)
        source = together(tests, program, candidate, nonce)
        ran = _sandbox().run(source, deadline_s=ends - time.monotonic())
        return read_outcome(tests, ran.stdout, nonce)
    try:
        with _sandbox().session(program, deadline_s=ends - time.monotonic()) as session:
            call = functools.partial(_call, session)
            held, calls = run_calls(tests, call, candidate, stop_early)
    except ProgramEnded:  # before any call
        return none_hold
    except Unsendable:
        return _NEEDS_TRUST
    return held if calls else _NEVER_CALL


def _call(session: Session, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function of the program as if it were one of this process's."""
    try:
        called = session.call(name, args, kwargs)
    except LiteralError as error:
        raise Unsendable from error
    except ProgramEnded as error:
        raise ProgramOver from error
    if called.raised is None:
        return called.value
    if called.raised.kind == LiteralError.__name__:
        raise NotAValue(called.raised.message)
    raise _exception(called.raised.kind)(called.raised.message)


def _exception(kind: str) -> type[Exception]:
    """Return the built-in exception of a name, or Exception, if it takes a message alone."""
    found = getattr(builtins, kind, None)
    if isinstance(found, type) and issubclass(found, Exception):
        return Exception if issubclass(found, UnicodeError) else found
    return Exception


def _run_on_inputs(program: str, tests: InputTests, ends: float, stop_early: bool) -> list[bool]:
    held = [False] * tests.num_checks
    for index, (given, expected) in enumerate(tests.pairs):
        left = ends - time.monotonic()
        if left <= 0:
            break
        ran = _sandbox().run(program, given, deadline_s=left)
        held[index] = ran.ending == "ok" and same_output(ran.stdout, expected)
        if stop_early and not held[index]:
            break
    return held


def prepare(**settings: Any) -> None:
    """Start this process's sandbox."""
    _sandboxes.append(
        Sandbox(
            Limits(**settings["limits"]),
            workers=1,
            allow_weak_isolation=settings["allow_weak_isolation"],
        )
    )


_sandboxes: list[Sandbox] = []


def _sandbox() -> Sandbox:
    return _sandboxes[0]
