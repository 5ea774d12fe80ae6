"""Grade on all machines of a Ray cluster.

In: a reward function that can be sent to other processes. Out: one with the same name and scores, which
divides its completions into tasks of Ray's. Functions that hold a model stay with the trainer.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trl_selfplay.generation.ray_cluster import RayCluster
from trl_selfplay.rewards.functions import is_async

# Of the trainer's process.
_NOT_SENT = ("trainer_state", "log_extra", "log_metric")


def on_ray(
    function: Callable[..., Any], address: str | None = None, completions_per_task: int = 64
) -> Callable[..., list[Any]]:
    """Return a reward function that lets the machines of a Ray cluster call this one.

    All samples of a prompt that are graded together are in one call. A task that is lost with its
    machine is done again by another. Tasks reserve no CPUs, so that they never wait for workers that
    have reserved all, and at most as many run at a time as the cluster has CPUs.

    Args:
        function: With TRL's signature, without `trainer_state`, `log_extra` and `log_metric`; one of a
            module that is installed on all machines, or of the script.
        address: The cluster's, as `ray_address`.
        completions_per_task: Completions that are worth a task.

    Raises:
        TypeError: The function is async, or isn't callable, such as the name of a model.
        ValueError: It needs what only the trainer's process has.
    """
    if not callable(function) or is_async(function):
        raise TypeError(
            f"on_ray({function!r:.100}) takes a plain function; reward models and async functions are "
            "called by the trainer."
        )
    if getattr(function, "grading_model", None) is not None:
        raise TypeError(f"{function!r:.100} holds a model, which stays on the trainer's machine.")
    if needed := [name for name in inspect.signature(function).parameters if name in _NOT_SENT]:
        raise ValueError(
            f"{function!r:.100} has the parameter {needed[0]!r}, which only the trainer's process has. "
            "Leave it out, or pass the function without on_ray."
        )
    cluster = RayCluster(address)

    @functools.wraps(function)
    def graded(prompts: Sequence[Any], completions: Sequence[Any], **others: Any) -> list[Any]:
        ray = cluster.connect()
        sent = ray.put(function)
        call = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_call)
        columns = {name: value for name, value in others.items() if name not in _NOT_SENT}
        arguments = {"prompts": prompts, "completions": completions, **columns}
        most = max(1, int(ray.cluster_resources().get("CPU", 1)))
        tasks: list[Any] = []
        running: list[Any] = []
        for part in _parts(prompts, completions_per_task):
            if len(running) == most:
                _, running = ray.wait(running)
            tasks.append(call.remote(sent, _cut(arguments, part, len(completions))))
            running.append(tasks[-1])
        try:
            return [score for scores in ray.get(tasks) for score in scores]
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    graded.called_functions = [function]  # type: ignore[attr-defined]
    return graded


def _parts(prompts: Sequence[Any], least: int) -> list[slice]:
    """Divide completions between prompts, into parts of at least so many, but for the last."""
    ends = [i for i in range(1, len(prompts)) if prompts[i] != prompts[i - 1]] + [len(prompts)]
    parts, start = [], 0
    for end in ends:
        if end - start >= least or end == len(prompts):
            parts.append(slice(start, end))
            start = end
    return [part for part in parts if part.stop > part.start]


def _cut(arguments: Mapping[str, Any], part: slice, length: int) -> dict[str, Any]:
    """Return what belongs to a part; lists have a value per completion."""
    return {
        name: value[part] if isinstance(value, (list, tuple)) and len(value) == length else value
        for name, value in arguments.items()
    }


def _call(function: Callable[..., Any], arguments: dict[str, Any]) -> list[Any]:
    return list(function(**arguments))
