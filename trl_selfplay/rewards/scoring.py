"""Call reward functions the way GRPOTrainer does, and keep each one's own score.

In: prompts, completions and the dataset's columns, repeated for every completion. Out: the scores of
each completion, with None where a function abstained, and why. Functions may be callables, async
callables, model ids and sequence classifiers.
"""

import asyncio
import functools
import logging
import math
import queue
import re
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from trl_selfplay.rewards.calibration import Calibration
from trl_selfplay.rewards.functions import (
    NOT_FORWARDED,
    check_parameters,
    compares_samples,
    is_async,
    unique_names,
    without_partial,
)
from trl_selfplay.rewards.guarded_call import (
    MENDED,
    call_guarded,
    mentioned_if_slow,
    own_copy,
    settings_kept,
)
from trl_selfplay.rewards.judge import JudgeReward
from trl_selfplay.rewards.reward_model import RewardModel
from trl_selfplay.rewards.scores import Scores

logger = logging.getLogger(__name__)

# What functions get besides the columns; a column of the same name would replace it.
_GIVEN = {
    "prompts": "the prompts",
    "completions": "what the model wrote",
    "trainer_state": "the trainer's state",
    "log_extra": "a function to log with",
    "log_metric": "a function to log with",
}
# GRPOTrainer keeps scores in float32, where means and squares of larger scores overflow.
_LARGEST_SCORE = 3.4e38
# A metric's name, the completions of the call that logged it, and its values.
_Logged = tuple[str, int, list[float]]


class Scorer:
    """Scores completions with one or more reward functions.

    Args:
        reward_funcs: A callable, a model id, a sequence classifier, or a sequence of these.
        reward_weights: One weight per function; None means 1.0 for all.
        reward_processing_classes: Tokenizers of reward models, one per function (None for
            callables), or a single tokenizer if there is one function.
        device: Where reward models and other models that grade do so, unless one was chosen for
            them.
        model_init_kwargs: Keywords of `from_pretrained` for reward models given by id.
        get_trainer_state: Returns the `trainer_state` that functions get.

    Attributes:
        names: A unique name per function.
        calibration: Turns scores into percentiles of round 0's, for functions that ask for it.

    Raises:
        TypeError: An entry is neither callable nor a model.
        ValueError: There is no function, the number of weights or tokenizers doesn't match, or a
            weight is not finite.
    """

    def __init__(
        self,
        reward_funcs: Any,
        reward_weights: Sequence[float] | None = None,
        reward_processing_classes: Any = None,
        device: Any = None,
        model_init_kwargs: Mapping[str, Any] | None = None,
        get_trainer_state: Callable[[], Any] | None = None,
    ) -> None:
        entries = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not entries:
            raise ValueError("reward_funcs is empty; give at least one reward function.")
        if reward_processing_classes is None:
            reward_processing_classes = [None] * len(entries)
        elif not isinstance(reward_processing_classes, (list, tuple)):
            # As in GRPOTrainer; one tokenizer for several models would give some of them wrong ids.
            reward_processing_classes = [reward_processing_classes]
        if len(reward_processing_classes) != len(entries):
            raise ValueError(
                f"reward_processing_classes has {len(reward_processing_classes)} entries for "
                f"{len(entries)} reward functions; give one each (None for callables)."
            )
        if reward_weights is not None and len(reward_weights) != len(entries):
            raise ValueError(
                f"reward_weights has {len(reward_weights)} entries for {len(entries)} reward "
                "functions; give one each."
            )
        if not all(map(math.isfinite, reward_weights or ())):
            raise ValueError(
                f"reward_weights={list(reward_weights or ())} holds a number that isn't finite; give finite "
                "weights."
            )
        self._functions: list[Callable[..., Any]] = []
        for entry, tokenizer in zip(entries, reward_processing_classes, strict=True):
            is_function_name = isinstance(entry, str) and re.fullmatch(r"[\w.]+_reward", entry)
            if is_function_name and not Path(entry).is_dir():
                raise ValueError(
                    f"reward_funcs holds the string {entry!r}, but a string names a reward model. Pass the "
                    f"function itself: from trl_selfplay.rewards import {entry} (or trl.rewards)."
                )
            if isinstance(entry, (str, nn.Module)):
                self._functions.append(RewardModel(entry, tokenizer, None, model_init_kwargs))
            elif callable(entry):
                self._functions.append(entry)
            else:
                raise TypeError(
                    f"reward_funcs holds {entry!r:.100}; give a callable, a model id or a model."
                )
        # Those that hold a model of their own.
        held = [getattr(f, "grading_model", None) for f in self._functions]
        self._models = [model for model in held if model is not None]
        for grading_model in self._models if device is not None else ():
            grading_model.place(device)
        self.names = unique_names(self._functions)
        self.calibration = Calibration(self.named)
        self._get_trainer_state = get_trainer_state or _ignore
        self._logged: list[_Logged] = []
        self._weights = (1.0,) * len(entries) if reward_weights is None else tuple(reward_weights)
        self._told: set[tuple[str, str]] = set()  # warnings about what functions changed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end_loop: Callable[[], Any] = _ignore

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, list[Any]],
        where: str = "",
        groups: Sequence[Hashable] | None = None,
        environment_rewards: Sequence[float | None] = (),
    ) -> list[Scores]:
        """Return the functions' scores of each completion, with None where one abstained, and why.

        Functions run one after another, then all async functions concurrently. A warning is logged
        for a function that takes more than a minute.

        Args:
            prompts: The prompt of each completion.
            completions: Text, or messages.
            completion_ids: The tokens of each completion.
            columns: The dataset's columns, one value per completion.
            where: Names these completions in the log, such as by their file.
            groups: What the samples of one prompt have in common, for functions that compare them
                (with an attribute `compares_samples` that is true).
            environment_rewards: What each completion's environment gave, for functions with an
                attribute `takes_environment_rewards`.

        Raises:
            RuntimeError: A function raised or tried to exit; the error names it.
            ValueError: A function returned the wrong number of scores or one that isn't finite,
                gave the cause of an abstention that isn't one, needs a missing column, or a column
                has the name of another argument.
            TypeError: A function returned something other than numbers and None.
        """
        self.check_columns(columns, "the dataset")
        columns = {k: v for k, v in columns.items() if k not in NOT_FORWARDED}
        logged: dict[str, list[float]] = defaultdict(list)
        arguments = {
            **columns,
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": list(completion_ids),
            "trainer_state": self._get_trainer_state(),
            "log_extra": _ignore,
            "log_metric": lambda name, value: logged[name].append(float(value)),
        }
        calls: list[Callable[[], Any]] = [
            functools.partial(
                function, **_in_form_for(function, arguments, groups, environment_rewards)
            )
            for function in self._functions
        ]
        about = f"{len(completions)} completions{where and f' of {where}'}"
        are_async = [is_async(function) for function in self._functions]
        answers: dict[int, Any] = {}
        for index, call in enumerate(calls):
            if not are_async[index]:
                name = self.names[index]
                with mentioned_if_slow(name, about), settings_kept(name, self._told):
                    answers[index] = call_guarded(name, call)
        waiting = [index for index, waits in enumerate(are_async) if waits]
        names = ", ".join(self.names[index] for index in waiting)
        with mentioned_if_slow(names, about), settings_kept(names, self._told):
            outcomes = self._run_together([calls[index] for index in waiting])
        for index, outcome in zip(waiting, outcomes, strict=True):
            answers[index] = call_guarded(self.names[index], functools.partial(_unwrap, outcome))
        for name, values in logged.items():
            self._logged.append((name, len(completions), values))
        scores = [
            _read_scores(name, answers[index], prompts, completions)
            for index, name in enumerate(self.names)
        ]
        return [
            Scores(row, {i: s.causes[index] for i, s in enumerate(scores) if index in s.causes})
            for index, row in enumerate(zip(*scores, strict=True))
        ]

    def check_columns(self, columns: Collection[str], where: str) -> None:
        """Raise ValueError if the functions can't be called with a dataset's columns.

        Args:
            columns: Names of the columns, without `prompt`.
            where: Name of the dataset, for the error.
        """
        for name in sorted(_GIVEN.keys() & set(columns)):
            raise ValueError(
                f"`{where}` has a column {name!r}, the name under which reward functions get "
                f"{_GIVEN[name]}. Rename it, for example "
                f"`dataset.rename_column({name!r}, 'dataset_{name}')`, or remove it."
            )
        forwarded = [name for name in columns if name not in NOT_FORWARDED]
        given = {*forwarded, *_GIVEN, "completion_ids"}
        for function, name in zip(self._functions, self.names, strict=True):
            check_parameters(function, name, given, forwarded, where)
            calls = getattr(function, "called_functions", [])
            for called, inner in zip(calls, unique_names(calls), strict=True):
                check_parameters(called, inner, given, forwarded, where)

    @property
    def callables(self) -> list[Callable[..., Any]]:
        """The given functions without reward models."""
        return [f for f in self._functions if not isinstance(f, RewardModel)]

    @property
    def named(self) -> dict[str, Callable[..., Any]]:
        """The functions by name."""
        return dict(zip(self.names, self._functions, strict=True))

    @property
    def with_identity(self) -> dict[str, Any]:
        """The functions whose attribute `identity` says what scores depend on, by name."""
        return {name: f for name, f in self.named.items() if hasattr(f, "identity")}

    @property
    def policy_judges(self) -> list[JudgeReward]:
        """The judges that ask the model that is being trained."""
        return [f for f in self._functions if isinstance(f, JudgeReward) and f.asks_policy]

    @property
    def comparing(self) -> list[str]:
        """The names of the functions whose scores depend on a prompt's other samples."""
        return [name for name, function in self.named.items() if compares_samples(function)]

    def take_metrics(
        self, gather: Callable[[list[_Logged]], list[_Logged]] = list
    ) -> dict[str, float]:
        """Return the mean of each metric given to `log_metric` since the last call.

        What is logged once per call of a function weighs as much as the call's completions, since
        calls differ in size. Values that aren't finite are left out, since JSON can't represent them.

        Args:
            gather: Returns what all processes have logged; by default only this one's.
        """
        means = {}
        logged: dict[str, list[tuple[int, list[float]]]] = defaultdict(list)
        for name, size, values in gather(self._logged):
            logged[name].append((size, values))
        for name, calls in sorted(logged.items()):
            is_per_call = all(len(values) == 1 for _, values in calls)
            weighted = [
                (size if is_per_call else 1, value)
                for size, values in calls
                for value in values
                if math.isfinite(value)
            ]
            if weighted:  # exact sums don't depend on the order of the calls
                total = math.fsum(size * value for size, value in weighted)
                means[name] = total / sum(size for size, _ in weighted)
        self._logged.clear()
        return means

    @property
    def solution_readers(self) -> tuple[str, ...]:
        """The names of the functions that compare completions with the column `solution`."""
        return tuple(
            name
            for function, name in zip(self._functions, self.names, strict=True)
            if getattr(without_partial(function), "abstains_without_solution", False)
        )

    def find_data_errors(
        self, prompts: Sequence[Any], columns: Mapping[str, list[Any]]
    ) -> dict[str, dict[int, str]]:
        """Return, by function, the rows on which it can grade no completion, with the reason.

        A function that knows such rows has an attribute `find_data_errors`: a function that gets
        `prompts` and the dataset's columns by keyword, as lists, and returns a reason by index. One
        with `abstains_without_solution` instead is asked to grade each solution as if it were a
        completion, and abstains if it can't read it.

        Args:
            prompts: The prompt of each row.
            columns: The dataset's columns, one value per row.
        """
        arguments = {k: v for k, v in columns.items() if k not in NOT_FORWARDED}
        arguments["prompts"] = list(prompts)
        found = {}
        for function, name in zip(self._functions, self.names, strict=True):
            inner = without_partial(function)
            find = getattr(inner, "find_data_errors", None)
            if find is not None:
                errors = find(**{**arguments, **getattr(function, "keywords", {})})
            elif getattr(inner, "abstains_without_solution", False):
                errors = _unreadable_solutions(function, columns.get("solution", []))
            else:
                continue
            if errors:
                found[name] = dict(sorted(errors.items()))
        return found

    def weighted(self, rewards: Sequence[float | None]) -> float | None:
        """Return the weighted sum of the rewards that aren't None, or None if all are.

        Those of calibrated functions count as percentiles.

        Raises:
            ValueError: The sum overflows float32.
        """
        present = [
            w * self.calibration.apply(name, r)
            for w, name, r in zip(self._weights, self.names, rewards, strict=True)
            if r is not None
        ]
        total = sum(present) if present else None
        if total is not None and not abs(total) <= _LARGEST_SCORE:
            raise ValueError(
                f"the rewards {dict(zip(self.names, rewards, strict=True))} with reward_weights="
                f"{list(self._weights)} sum to {total}, beyond float32. Give smaller weights."
            )
        return total

    @property
    def has_models(self) -> bool:
        """Whether a function holds a model of its own."""
        return bool(self._models)

    def models_on(self, device: Any) -> list[nn.Module]:
        """Return the models that grade on this device."""
        return [each.model for each in self._models if each.grades_on(device)]

    def park_models(self) -> None:
        """Move the models that grade off the device on which another is to be trained.

        They return when they next grade.
        """
        for grading_model in self._models:
            grading_model.park()

    def close(self) -> None:
        """End the thread of the async functions, if any. Also done when the scorer is collected."""
        self._end_loop()
        self._loop, self._end_loop = None, _ignore

    def _run_together(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """Return what each coroutine returned, or the exception that it raised.

        They run on an event loop in a separate thread, because the caller's loop may be running. It
        is the same loop every time, because clients and locks belong to the loop of their first use.
        """
        if not calls:
            return []
        if self._loop is None:
            self._loop, end_loop = _start_loop()
            self._end_loop = weakref.finalize(self, end_loop)
        together = asyncio.run_coroutine_threadsafe(_gather(calls), self._loop)
        try:
            return together.result()
        except BaseException:  # Ctrl-C while waiting
            together.cancel()
            raise


async def _gather(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    async def attempt(call: Callable[[], Any]) -> Any:
        try:
            return await call()
        except BaseException as error:  # interrupts must reach the waiting thread as well
            return _Raised(error)

    return list(await asyncio.gather(*map(attempt, calls)))


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


def _unwrap(outcome: Any) -> Any:
    if isinstance(outcome, _Raised):
        raise outcome.error
    return outcome


def _start_loop() -> tuple[asyncio.AbstractEventLoop, Callable[[], None]]:
    """Start an event loop in a daemon thread; return it, and a function that ends both."""
    started: queue.Queue[asyncio.AbstractEventLoop] = queue.Queue()

    def serve() -> None:
        with asyncio.Runner() as runner:  # cancels pending tasks when the loop stops
            loop = runner.get_loop()
            started.put(loop)
            loop.run_forever()

    thread = threading.Thread(target=serve, name="async-reward-functions", daemon=True)
    thread.start()
    loop = started.get()

    def end() -> None:
        loop.call_soon_threadsafe(loop.stop)
        if thread is not threading.current_thread():
            thread.join(timeout=5.0)  # a blocking function must not keep the program alive

    return loop, end


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Accept a table column that a GRPO reward function logs; there is no such table here."""


def _unreadable_solutions(function: Callable[..., Any], solutions: Sequence[Any]) -> dict[int, str]:
    """Return the solutions that a function abstains on when they are the completion too."""
    texts = ["" if s is None else str(s) for s in solutions]
    scores = function(completions=texts, solution=list(solutions))
    return {
        i: f"the solution {str(solutions[i])[:80]!r} can't be read"
        for i, score in enumerate(scores)
        if score is None
    }


def _in_form_for(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    groups: Sequence[Hashable] | None,
    environment_rewards: Sequence[float | None],
) -> dict[str, Any]:
    """Wrap plain-text completions for TRL's own rewards, which only take chat messages."""
    given = {name: own_copy(value) for name, value in arguments.items()}
    if groups is not None and compares_samples(function):
        given["groups"] = list(groups)
    if hasattr(function, "takes_environment_rewards"):
        given["environment_rewards"] = list(environment_rewards)
    module = getattr(without_partial(function), "__module__", None) or ""
    if module.startswith("trl.rewards"):
        given["completions"] = [
            [{"role": "assistant", "content": c}] if isinstance(c, str) else c
            for c in given["completions"]
        ]
    return given


def _read_scores(name: str, answer: Any, *given: Sequence[Any]) -> Scores:
    try:
        return _check_scores(name, answer, *given)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{error} {MENDED}") from error


def _check_scores(
    name: str, answer: Any, prompts: Sequence[Any], completions: Sequence[Any]
) -> Scores:
    count = len(completions)
    causes = answer.causes if isinstance(answer, Scores) else {}
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple)):
        raise TypeError(
            f"reward function {name!r} returned {type(answer).__name__}; return a list with one "
            "float or None per completion."
        )
    if len(answer) != count:
        raise ValueError(
            f"reward function {name!r} returned {len(answer)} scores for {count} completions. "
            "Return one float or None per completion."
        )
    scores: list[float | None] = []
    for index, value in enumerate(answer):
        if value is None:
            scores.append(None)
            continue
        returned = (
            f"reward function {name!r} returned {value!r:.100} for completion {index}, "
            f"{completions[index]!r:.200} to the prompt {prompts[index]!r:.200}"
        )
        if isinstance(value, (str, bytes)):  # float() would parse some
            raise TypeError(f"{returned}; return a float or None.")
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"{returned}; return a float or None.") from error
        except OverflowError:  # a large integer
            number = math.inf
        if abs(number) > _LARGEST_SCORE:
            raise ValueError(
                f"{returned}; return a number within the range of float32, or None if there is no "
                "score."
            )
        # GRPOTrainer keeps scores in a tensor, where NaN represents None.
        scores.append(None if math.isnan(number) else number)
    for index, cause in causes.items():
        if not 0 <= index < count or scores[index] is not None or not isinstance(cause, str):
            raise ValueError(
                f"reward function {name!r} gave {cause!r:.100} as the cause why it abstained on "
                f"completion {index} of {count}, which it didn't abstain on, or which isn't text. "
                "Give causes by the index of a score that is None."
            )
    # Printed and counted; what acts on a terminal is shown as an escape.
    return Scores(scores, {i: c if c.isprintable() else repr(c)[1:-1] for i, c in causes.items()})
