"""Rows of other trainers' datasets, each in the form that its readers expect.

In: a prompt of the dataset and completions of it. Out: one row: "trl" (`prompt` and `completion`, or `chosen`
and `rejected`, text or messages), "messages" (OpenAI's roles), "sharegpt" (`conversations`) or "alpaca".
Pure functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trl_selfplay.rollouts.kept_prompts import KeptPrompt

_SHAREGPT_ROLES = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with one completion, or with a chosen and a rejected one.

    Attributes:
        prompt: As in the run's dataset: without few-shot examples, hint and template.
        completions: Their texts, by the name of their column: `completion`, or `chosen` and
            `rejected`.
        columns: What else the row has: a label, where the completions come from.
        leads: By the same names, a space that decoding dropped before a completion. It is put back
            where the completion follows the prompt's text.
    """

    prompt: KeptPrompt
    completions: Mapping[str, str]
    columns: Mapping[str, Any] = field(default_factory=dict)
    leads: Mapping[str, str] = field(default_factory=dict)

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The prompt as messages, without a last assistant turn that the completion continues."""
        prompt = self.prompt.prompt
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        return prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt

    def answers(self) -> dict[str, dict[str, Any]]:
        """Return each completion as an assistant message, begun by the prompt's last one if there is any."""
        prompt = self.prompt.prompt
        begun: dict[str, Any] = {}
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            begun = prompt[-1]
        texts = self.following() if begun.get("content") else self.completions
        return {
            name: {**begun, "role": "assistant", "content": f"{begun.get('content') or ''}{text}"}
            for name, text in texts.items()
        }

    def following(self) -> dict[str, str]:
        """Return each completion as it follows other text."""
        return {name: self.leads.get(name, "") + text for name, text in self.completions.items()}


def _trl(example: Example) -> dict[str, Any]:
    """Return `prompt` and the completions, both text or both messages, and what renders them."""
    prompt = example.prompt.prompt
    if isinstance(prompt, str):
        return {"prompt": prompt, **example.following()}
    answers = {name: [message] for name, message in example.answers().items()}
    return {"prompt": example.turns, **answers, **example.prompt.template_arguments}


def _messages(example: Example) -> dict[str, Any]:
    """Return `messages` that end with the completion, or with the prompt beside two completions."""
    answers = example.answers()
    if "completion" in answers:
        return {"messages": [*example.turns, answers["completion"]], **_tools(example)}
    return {"messages": example.turns, **answers, **_tools(example)}


def _sharegpt(example: Example) -> dict[str, Any]:
    """Return `conversations` of `from` and `value`, ended like `messages`."""

    def turn(message: Mapping[str, Any]) -> dict[str, str]:
        role, content = message["role"], message.get("content")
        if role not in _SHAREGPT_ROLES or not isinstance(content, str):
            raise ValueError(
                f"a message of role {role!r} with content {content!r:.60} has no place in "
                "--form sharegpt, which knows text of user, assistant, system and tool alone. Use "
                "--form messages."
            )
        return {"from": _SHAREGPT_ROLES[role], "value": content}

    answers = {name: turn(message) for name, message in example.answers().items()}
    turns = [turn(message) for message in example.turns]
    if "completion" in answers:
        return {"conversations": [*turns, answers["completion"]]}
    return {"conversations": turns, **answers}


def _alpaca(example: Example) -> dict[str, Any]:
    """Return `instruction`, an empty `input`, and `output` or the two completions."""
    prompt = example.prompt.prompt
    roles = [] if isinstance(prompt, str) else [message["role"] for message in prompt]
    contents = [prompt] if isinstance(prompt, str) else [m.get("content") for m in prompt]
    if roles not in ([], ["user"], ["system", "user"]) or not all(
        isinstance(content, str) for content in contents
    ):
        raise ValueError(
            f"a prompt of {', '.join(roles)} turns has no place in --form alpaca, which has one "
            "instruction as text, after a system text or none. Use --form messages."
        )
    texts = dict(example.completions)
    row = {"instruction": contents[-1], "input": ""}
    if "completion" in texts:
        texts = {"output": texts["completion"]}
    return {**row, **texts, **({"system": contents[0]} if len(contents) > 1 else {})}


def _tools(example: Example) -> dict[str, Any]:
    tools = example.prompt.template_arguments.get("tools")
    return {} if tools is None else {"tools": tools}


FORMS: dict[str, Callable[[Example], dict[str, Any]]] = {
    "trl": _trl,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}


def to_row(example: Example, form: str) -> dict[str, Any]:
    """Return an example as a row of a form, with its other columns last.

    Raises:
        ValueError: The prompt can't be told in this form.
    """
    return {**FORMS[form](example), **example.columns}
