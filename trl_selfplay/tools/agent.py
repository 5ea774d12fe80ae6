"""Agents: policies whose prompt is written anew at each step.

In: a question, then the text of each action and the result of each call. Out: the prompt of the next step,
and in the end an answer. An agent is a pure function of these, so that a trajectory can be replayed from what
was sampled. rounds/stepwise.py plays it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trl_selfplay.tools.record import ToolCall, ToolResult


class MalformedAction(ValueError):
    """The text of an action can't be parsed: its trajectory ends, and it is never trained on."""


@dataclass(frozen=True, slots=True)
class StepPrompt:
    """What the policy is asked at a step.

    Attributes:
        kind: The kind of step, such as "decision", by which metrics are reported.
        prompt: Text, or chat messages.
    """

    kind: str
    prompt: Any


@dataclass(frozen=True, slots=True)
class Move:
    """What an action leads to.

    Attributes:
        state: The state after it; with a call, the one that waits for the result.
        call: The call to make, if any.
    """

    state: Any
    call: ToolCall | None = None


class Agent(Protocol):
    """A state machine whose steps are prompts. States are values that its methods never change.

    Attributes:
        tools: Functions as GRPOTrainer takes them.
        num_step_samples: Samples per step, of which the one with the highest mean log-prob per token goes on.
        stop_strings: What ends an action besides EOS.
        has_examples: Whether its prompts can have few-shot examples.
        identity: What its prompts depend on, for the record of the run.
    """

    tools: Sequence[Callable[..., Any]]
    num_step_samples: int
    stop_strings: tuple[str, ...]
    has_examples: bool

    @property
    def identity(self) -> Mapping[str, Any]:
        """What its prompts depend on, as JSON has it."""
        ...

    def begin(self, question: Any) -> Any:
        """Return the first state for a question: a dataset's prompt, text or messages."""
        ...

    def next_step(self, state: Any, *, few_shot: bool) -> StepPrompt | None:
        """Return what the policy is asked in a state; None if the trajectory is finished."""
        ...

    def act(self, state: Any, action: str) -> Move:
        """Return what the text of an action leads to.

        Special tokens that the text spells out have a space in them. An agent that decodes escapes has to refuse
        those that would put them together again, since its prompts are read with special tokens.

        Raises:
            MalformedAction: It can't be parsed.
        """
        ...

    def observe(self, state: Any, result: ToolResult) -> Any:
        """Return the state after the result of a call, a failed one too."""
        ...

    def answer(self, state: Any) -> str:
        """Return the answer of a finished trajectory."""
        ...
