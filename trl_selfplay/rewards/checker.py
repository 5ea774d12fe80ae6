"""Any checker as a reward function, in processes that can be killed.

In: a function that checks one answer, and completions with the dataset's columns. Out: its score, or
None if it abstained, raised, hung or died. It may be defined in a script, in a notebook or inside
another function.
"""

import inspect
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

from trl_selfplay.rewards.answer import answer_in, text_of
from trl_selfplay.rewards.scores import Scores
from trl_selfplay.rewards.sent_function import (
    import_function,
    loaded_function,
    name_of,
    pool_for,
    prepare,
)
from trl_selfplay.rewards.worker import WorkerFailure

__all__ = ["check", "checker_reward", "prepare"]  # a process calls `prepare` and `check`

# What a checker is given besides the dataset's columns.
_GIVEN = ("answer", "completion", "prompt")
_FIRST_CALL_S = 60.0
_MOST_SECONDS = 86_400  # a day


class checker_reward:
    """The reward function of a checker, `f(answer, **columns) -> float | bool | None`.

    The checker gets what its parameters name: `answer`, the marked final answer or else the whole
    text without thoughts; `completion`, the whole text; `prompt`; and columns of the dataset, the
    solution among them, one row's value each. With `**kwargs` it gets all columns. None is an
    abstention, as are an exception, a wrong type and a missed deadline.

    A checker is trusted: a process of its own keeps it from hanging, not from doing harm. It has 4 GiB
    of address space, and what it prints is dropped. What it keeps in globals is kept per process.

    Args:
        func: The checker, or its import path, such as "my_checks.is_sorted".
        deadline: Seconds per completion. After four timeouts on one prompt, its other completions
            aren't checked.

    Raises:
        TypeError: The function isn't callable, takes neither `answer` nor `completion`, or can't be
            sent to another process.
        ImportError: There is no such function, or the process can't import its module.

    >>> def is_even(answer):
    ...     return int(answer) % 2 == 0
    >>> checker_reward(is_even)(["Answer: 4", "The answer is 5.", "Answer: four"])
    [1.0, 0.0, None]
    """

    def __init__(self, func: Callable[..., Any] | str, deadline: float = 5.0) -> None:
        self.func = import_function(func) if isinstance(func, str) else func
        if not callable(self.func):
            raise TypeError(f"a checker is {self.func!r:.100}; give a function of `answer`.")
        if inspect.iscoroutinefunction(self.func):
            raise TypeError(f"the checker {self.func!r:.100} is asynchronous; give a function.")
        if not 0 < deadline <= _MOST_SECONDS:
            raise ValueError(
                f"deadline={deadline!r}; give seconds above 0 and up to {_MOST_SECONDS}."
            )
        self.deadline = float(deadline)
        self.__name__ = name_of(self.func)
        self._parameters = _parameters_of(self.func, self.__name__)
        self.__signature__ = _signature_of(self._parameters)
        self._pool = pool_for(self.func, __name__, "check")
        self._try_start()

    def __reduce__(self) -> tuple[Any, ...]:
        return checker_reward, (self.func, self.deadline)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Score each completion; None, and a logged count, where there is no score.

        Raises:
            ValueError: A column that the checker names is missing, or has another length.
        """
        prompts = columns.pop("prompts", None)
        named = {p.name for p in self._parameters}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in self._parameters)
        passed = {
            name: values
            for name, values in columns.items()
            if name in named or (takes_all and _is_column(values, completions))
        }
        if "prompt" in named:
            passed["prompt"] = [None] * len(completions) if prompts is None else prompts
        needed = {p.name for p in self._parameters if p.default is p.empty} - {*_GIVEN}
        needed -= {p.name for p in self._parameters if p.kind is p.VAR_KEYWORD}
        if missing := sorted(needed - passed.keys()):
            raise ValueError(f"the checker {self.__name__!r} needs the columns {missing}.")
        for name, values in passed.items():
            if len(values) != len(completions):
                raise ValueError(
                    f"the column {name!r} has {len(values)} values for {len(completions)} completions."
                )
        calls = []
        for index, completion in enumerate(completions):
            text = text_of(completion)
            arguments = {name: values[index] for name, values in passed.items()}
            if "answer" in named:
                arguments["answer"] = answer_in(text)
            if "completion" in named:
                arguments["completion"] = text
            calls.append((arguments,))
        groups = None if prompts is None else list(map(pickle.dumps, prompts))
        values, failures = self._pool.call_each(calls, self.deadline, groups)
        scores = Scores(values, {index: failure.cause for index, failure in failures.items()})
        scores.log_causes(self.__name__)
        return scores

    def close(self) -> None:
        """End the function's processes; the next call starts new ones. Also done at exit."""
        self._pool.close()

    def _try_start(self) -> None:
        """Find out now whether a process can load the function."""
        try:
            self._pool.call(None, deadline_s=_FIRST_CALL_S)
        except ImportError as error:
            raise ImportError(
                f"the checker {self.__name__!r} can't be imported in another process: {error}. Put "
                "it into a module on the path, or define it in the script or notebook itself."
            ) from error
        except (RuntimeError, WorkerFailure) as error:
            raise TypeError(
                f"the checker {self.__name__!r} can't be loaded in another process: {error}."
            ) from error


def _is_column(values: Any, completions: Sequence[Any]) -> bool:
    """Return whether an argument holds one value per completion, unlike a trainer's state."""
    return isinstance(values, (list, tuple)) and len(values) == len(completions)


def _parameters_of(function: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise TypeError(f"the checker {name!r} has no signature; wrap it in a function.") from error
    if not {"answer", "completion"} & {parameter.name for parameter in parameters}:
        raise TypeError(
            f"the checker {name!r} takes {[p.name for p in parameters]}. Name a parameter `answer` (the "
            "marked final answer) or `completion` (the whole text); others are columns of the dataset."
        )
    if unnamed := [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)]:
        raise TypeError(
            f"the checker {name!r} takes {unnamed} by position; arguments come by name."
        )
    return parameters


def _signature_of(parameters: Sequence[inspect.Parameter]) -> inspect.Signature:
    """Return the reward function's signature, by which a trainer finds missing columns."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    columns = [
        p.replace(kind=keyword, annotation=p.empty)
        for p in parameters
        if p.kind is not p.VAR_KEYWORD and p.name not in _GIVEN
    ]
    # Columns that aren't named are read only if the checker takes them all: `columns` is the name in
    # `__call__`, and a name that isn't used there says that they are dropped.
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return inspect.Signature(
        [
            inspect.Parameter("completions", inspect.Parameter.POSITIONAL_OR_KEYWORD),
            inspect.Parameter("prompts", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None),
            *columns,
            inspect.Parameter("columns" if takes_all else "dropped", inspect.Parameter.VAR_KEYWORD),
        ]
    )


def check(arguments: dict[str, Any] | None) -> float | None:
    """Return the checker's score for one completion; None as arguments asks nothing.

    Raises:
        TypeError: It returned something other than a number, a bool or None.
        ValueError: The number isn't finite.
    """
    if arguments is None:
        return None
    score = loaded_function()(**arguments)
    if score is None:
        return None
    if isinstance(score, (str, bytes)):
        raise TypeError(f"the checker returned {score!r:.100}")
    number = float(score)
    if not math.isfinite(number):
        raise ValueError(f"the checker returned {number}")
    return number
