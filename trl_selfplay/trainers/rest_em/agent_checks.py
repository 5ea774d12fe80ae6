"""What an agent's rounds can't be combined with, told before anything is loaded.

In: ReSTEMTrainer's arguments. Out: an error that says what to do.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from trl_selfplay.trainers.config import sampling_temperatures
from trl_selfplay.trainers.construction import Grading

# Fields that would have no effect on the steps of an agent.
_WITHOUT_EFFECT = (
    "improve_thresholds", "loss_weighting", "history_rounds", "max_per_prompt", "deduplicate",
    "max_tool_calling_iterations", "tool_format",
)  # fmt: skip
_INSTEAD = {
    "gold_dataset": "its steps have no human completions. Train on these first, and pass that model.",
    "few_shot_examples": "give them to the agent, by kind of step.",
    "normal_form": "each step is one example, and none is a duplicate.",
    "tools": "give them to the agent.",
    "environment_factory": "its tools are functions.",
}
_METHODS = ("begin", "next_step", "act", "observe", "answer")
_ATTRIBUTES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "tools": (lambda value: _is_list(value, callable), "a list of functions"),
    "num_step_samples": (lambda value: type(value) is int and value >= 1, "1 or more"),
    "stop_strings": (lambda value: _is_list(value, _is_text), "a tuple of texts"),
    "has_examples": (lambda value: isinstance(value, bool), "True or False"),
    "identity": (lambda value: isinstance(value, Mapping), "a mapping"),
}


def read_agent_grading(
    agent: Any, args: Any, grading: Grading, eval_dataset: Any, **given: Any
) -> Grading:
    """Return what grades the steps of an agent, or its answers.

    Args:
        agent: As the trainer got it; None: `grading` is returned.
        args: The config.
        grading: What grades single completions.
        eval_dataset: Held-out prompts.
        **given: Arguments of the trainer, of which each must be None.

    Raises:
        TypeError: `agent` isn't one.
        ValueError: One of its attributes can't work. Something can't be combined with it, or nothing would grade answers.
    """
    if agent is None:
        if args.agent_rewards != "steps":
            raise ValueError(
                f"agent_rewards={args.agent_rewards!r} needs an `agent`; there is none."
            )
        return grading
    missing = [name for name in _METHODS if not callable(getattr(agent, name, None))]
    if missing:
        raise TypeError(
            f"agent is {agent!r:.100}, which has no {', '.join(missing)}; see trl_selfplay.tools.agent.Agent."
        )
    _check_attributes(agent)
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"`{name}` has no effect with an `agent`: {_INSTEAD[name]}")
    for name in _WITHOUT_EFFECT:
        each = args.__dataclass_fields__.get(name)
        if each is not None and (value := getattr(args, name)) != each.default:
            raise ValueError(
                f"{name}={value!r} has no effect with an `agent`, each of whose steps is one example. Leave "
                "it out."
            )
    if agent.num_step_samples > 1 and 0.0 in sampling_temperatures(args):
        raise ValueError(
            f"num_step_samples={agent.num_step_samples} at temperature 0.0 would sample copies of one action. "
            "Set temperatures above 0, or num_step_samples=1."
        )
    if not args.ranks_steps:
        return grading
    if eval_dataset is not None and grading.eval_reward_funcs is None:
        raise ValueError(
            "`eval_dataset` with an `agent` needs `eval_reward_funcs`, which grade its answers: "
            "`reward_funcs` rank the samples of each step."
        )
    return replace(grading, num_compared=("num_step_samples", agent.num_step_samples))


def _check_attributes(agent: Any) -> None:
    for name, (is_right, what) in _ATTRIBUTES.items():
        if not hasattr(agent, name):
            raise TypeError(f"agent is {agent!r:.100}, which has no {name}; give it {what}.")
        if not is_right(value := getattr(agent, name)):
            raise ValueError(f"{name} of the agent is {value!r:.100}; give {what}.")


def _is_list(value: Any, is_one: Callable[[Any], bool]) -> bool:
    return isinstance(value, list | tuple) and all(map(is_one, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
