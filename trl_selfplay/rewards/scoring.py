"""Call reward functions the way GRPOTrainer does, and keep each one's own score.

In: prompts, completions and the dataset's columns, repeated for every completion. Out: one tuple
of scores a completion, None where a function abstained. Several kinds of functions are taken:
callables, async callables, model ids and sequence classifiers.
"""

import asyncio
import functools
import inspect
import math
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from torch import nn

from trl_selfplay.rewards.reward_model import RewardModel

# Not forwarded: every function gets them under the names of GRPOTrainer's convention.
_RESERVED_COLUMNS = ("prompt", "completion", "completion_ids")


class Scorer:
    """Scores completions with one or more reward functions.

    Args:
        reward_funcs: A callable, a model id, a sequence classifier, or a sequence of these.
        reward_weights: One weight a function; None weighs all with 1.0.
        reward_processing_classes: Tokenizers of reward models, one for each function (None for
            callables), or a single one.
        device: Where reward models run.

    Raises:
        TypeError: An entry is neither callable nor a model.
        ValueError: The number of weights or tokenizers doesn't fit.
    """

    def __init__(
        self,
        reward_funcs: Any,
        reward_weights: Sequence[float] | None = None,
        reward_processing_classes: Any = None,
        device: Any = None,
    ) -> None:
        entries = list(reward_funcs) if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
        if not isinstance(reward_processing_classes, (list, tuple)):
            reward_processing_classes = [reward_processing_classes] * len(entries)
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
        self._functions: list[Callable[..., Any]] = []
        for entry, tokenizer in zip(entries, reward_processing_classes, strict=True):
            if isinstance(entry, (str, nn.Module)):
                self._functions.append(RewardModel(entry, tokenizer, device))
            elif callable(entry):
                self._functions.append(entry)
            else:
                raise TypeError(
                    f"reward_funcs holds {entry!r:.100}; give a callable, a model id or a model."
                )
        self.names = _unique_names(self._functions)
        self._weights = tuple(reward_weights or [1.0] * len(entries))

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[list[int]],
        columns: Mapping[str, list[Any]],
    ) -> list[tuple[float | None, ...]]:
        """Return each function's score of each completion, None where it abstained.

        A NaN counts as None, as for GRPOTrainer.

        Raises:
            RuntimeError: A function raised; the error names it.
            ValueError: A function returned another number of scores, or needs a column that is
                not there.
            TypeError: A function returned something else than numbers and None.
        """
        columns = {k: v for k, v in columns.items() if k not in _RESERVED_COLUMNS}
        arguments = {
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": list(completion_ids),
            **columns,
            "trainer_state": None,
            "log_extra": _ignore,
            "log_metric": _ignore,
        }
        answers: list[Any] = [None] * len(self._functions)
        waiting: dict[int, Coroutine[Any, Any, Any]] = {}
        for index, function in enumerate(self._functions):
            name = self.names[index]
            _check_columns(function, name, arguments, list(columns))
            given = _in_form_for(function, arguments)
            if _is_async(function):
                waiting[index] = function(**given)
            else:
                answers[index] = _call(name, functools.partial(function, **given))
        if waiting:
            for index, answer in _run_together(waiting).items():
                answers[index] = _call(self.names[index], functools.partial(_unwrap, answer))
        scores = [
            _check_scores(name, answer, len(completions))
            for name, answer in zip(self.names, answers, strict=True)
        ]
        return list(zip(*scores, strict=True))

    def weighted(self, rewards: Sequence[float | None]) -> float | None:
        """Return the weighted sum of what didn't abstain, or None if everything did."""
        present = [w * r for w, r in zip(self._weights, rewards, strict=True) if r is not None]
        return sum(present) if present else None


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Take what a GRPO reward function logs; the scores themselves are stored."""


def _unique_names(functions: Sequence[Callable[..., Any]]) -> tuple[str, ...]:
    names: list[str] = []
    for function in functions:
        while isinstance(function, functools.partial):
            function = function.func
        name = getattr(function, "__name__", type(function).__name__)
        taken = sum(n == name or n.startswith(f"{name}_") for n in names)
        names.append(f"{name}_{taken + 1}" if taken else name)
    return tuple(names)


def _is_async(function: Callable[..., Any]) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    call = getattr(function, "__call__", None)  # noqa: B004  # its own type decides, not whether it is there
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)


def _check_columns(
    function: Callable[..., Any], name: str, arguments: Mapping[str, Any], columns: list[str]
) -> None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some built-ins have no signature
        return
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and p.name not in arguments
    ]
    if missing:
        raise ValueError(
            f"reward function {name!r} needs {missing}, and the dataset has the columns "
            f"{['prompt', *columns]}. Rename or add a column."
        )
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"reward function {name!r} doesn't take **kwargs. It gets every column of the dataset "
            "by keyword, as for GRPOTrainer: add **kwargs to its parameters."
        )


def _in_form_for(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Wrap plain-text completions for TRL's own rewards, which take chat messages only."""
    given = dict(arguments)
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    if (getattr(inner, "__module__", None) or "").startswith("trl.rewards"):
        given["completions"] = [
            [{"role": "assistant", "content": c}] if isinstance(c, str) else c
            for c in arguments["completions"]
        ]
    return given


def _call(name: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        raise RuntimeError(
            f"reward function {name!r} raised {type(error).__name__}: {error}. The samples are on "
            "disk; mend the function and go on with train(resume_from_checkpoint=True)."
        ) from error


def _unwrap(answer: Any) -> Any:
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _run_together(waiting: Mapping[int, Coroutine[Any, Any, Any]]) -> dict[int, Any]:
    """Await coroutines together, on a loop of a thread's own: the caller's may be running."""
    outcome: list[Any] = []

    async def gather() -> list[Any]:
        return await asyncio.gather(*waiting.values(), return_exceptions=True)

    thread = threading.Thread(target=lambda: outcome.extend(asyncio.run(gather())), daemon=True)
    thread.start()
    thread.join()
    return dict(zip(waiting, outcome, strict=True))


def _check_scores(name: str, answer: Any, count: int) -> list[float | None]:
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if not isinstance(answer, (list, tuple)):
        raise TypeError(
            f"reward function {name!r} returned {type(answer).__name__}; return a list with one "
            "float or None for each completion."
        )
    if len(answer) != count:
        raise ValueError(
            f"reward function {name!r} returned {len(answer)} scores for {count} completions. "
            "Return one float or None for each completion."
        )
    scores: list[float | None] = []
    for index, value in enumerate(answer):
        if value is None:
            scores.append(None)
            continue
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"reward function {name!r} returned {value!r:.100} for completion {index}; return "
                "a float or None."
            ) from error
        scores.append(None if math.isnan(number) else number)
    return scores
