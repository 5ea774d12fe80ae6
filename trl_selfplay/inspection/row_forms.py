"""Rows of other trainers' datasets, each in the form that its readers expect.

In: a prompt of the dataset and completions of it. Out: one row: "trl" (`prompt` and `completion`, or `chosen`
and `rejected`, text or messages), "messages" (OpenAI's roles), "sharegpt" (`conversations`) or "alpaca".
Pure functions.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trl_selfplay.rollouts.kept_prompts import KeptPrompt

# What holds completions with calls of tools that follow a text prompt.
_TEXT_ROWS = (
    " Or give SFTTrainer the tokens that the run trained on, in which results have no loss: "
    "datasets.load_from_disk of `_rounds/round-000/dataset` in the run, and of its other rounds."
)
_TEXT_PAIRS = (
    "No form has a place for them behind text prompts: --as parquet writes every sample, with its tokens and "
    "which of them the policy wrote (`completion_mask`)."
)
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
        trajectories: By the same names, the messages of a completion of several turns: those of the policy,
            with their calls, and the results of tools.
    """

    prompt: KeptPrompt
    completions: Mapping[str, str]
    columns: Mapping[str, Any] = field(default_factory=dict)
    leads: Mapping[str, str] = field(default_factory=dict)
    trajectories: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @property
    def turns(self) -> list[dict[str, Any]]:
        """The prompt as messages, without a last assistant turn that the completion continues."""
        prompt = self.prompt.prompt
        if isinstance(prompt, str):
            return [{"role": "user", "content": prompt}]
        return prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt

    def answers(self) -> dict[str, list[dict[str, Any]]]:
        """Return each completion as messages: one of the assistant's, or the turns of a trajectory.

        The first is begun by the prompt's last one if that is the assistant's.
        """
        prompt = self.prompt.prompt
        begun: dict[str, Any] = {}
        if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
            begun = prompt[-1]
        texts = self.following() if begun.get("content") else self.completions
        found = {}
        for name, text in texts.items():
            first, *others = self.trajectories.get(name) or ({"content": text},)
            content = f"{begun.get('content') or ''}{first.get('content') or ''}"
            found[name] = [
                {**begun, **first, "role": "assistant", "content": content},
                *map(dict, others),
            ]
        return found

    def single_answers(self, form: str) -> dict[str, dict[str, Any]]:
        """Return each of two completions as one message.

        Raises:
            ValueError: One is a trajectory.
        """
        if self.trajectories:
            raise ValueError(
                f"pairs of completions with calls of tools have no place in --form {form}, which has one "
                f"message for each. {_instead(self)}"
            )
        return {name: message for name, (message,) in self.answers().items()}

    def following(self) -> dict[str, str]:
        """Return each completion as it follows other text."""
        return {name: self.leads.get(name, "") + text for name, text in self.completions.items()}


def _trl(example: Example) -> dict[str, Any]:
    """Return `prompt` and the completions, both text or both messages, and what renders them."""
    prompt = example.prompt.prompt
    if isinstance(prompt, str):
        _refuse_trajectories(example, "trl with text prompts")
        return {"prompt": prompt, **example.following()}
    arguments = {**example.prompt.template_arguments, **_tools(example)}
    return {"prompt": example.turns, **example.answers(), **arguments}


def _messages(example: Example) -> dict[str, Any]:
    """Return `messages` that end with the completion, or with the prompt beside two completions."""
    if "completion" in example.completions:
        answer = example.answers()["completion"]
        return {"messages": [*example.turns, *answer], **_tools(example)}
    return {"messages": example.turns, **example.single_answers("messages"), **_tools(example)}


def _sharegpt(example: Example) -> dict[str, Any]:
    """Return `conversations` of `from` and `value`, ended like `messages`."""

    def turn(message: Mapping[str, Any]) -> dict[str, str]:
        role, content = message["role"], message.get("content")
        if calls := message.get("tool_calls"):
            if content:
                raise ValueError(
                    f"a message with both text, {content!r:.60}, and calls of tools has no place in --form "
                    "sharegpt, which has turns of the one or the other. Use --form messages."
                )
            made = [call["function"] for call in calls]
            return {"from": "function_call", "value": json.dumps(made if made[1:] else made[0])}
        if role not in _SHAREGPT_ROLES or not isinstance(content, str):
            raise ValueError(
                f"a message of role {role!r} with content {content!r:.60} has no place in "
                "--form sharegpt, which knows text of user, assistant, system and tool alone. Use "
                "--form messages."
            )
        return {"from": _SHAREGPT_ROLES[role], "value": content}

    turns = [turn(message) for message in example.turns]
    if "completion" in example.completions:
        answer = map(turn, example.answers()["completion"])
        return {"conversations": [*turns, *answer], **_functions(example)}
    pair = {name: turn(message) for name, message in example.single_answers("sharegpt").items()}
    return {"conversations": turns, **pair, **_functions(example)}


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
    _refuse_trajectories(example, "alpaca")
    if _tools(example):
        raise ValueError(
            "a prompt that shows tools through the chat template has no place in --form alpaca, which would leave "
            "them out. Use --form messages."
        )
    texts = dict(example.completions)
    row = {"instruction": contents[-1], "input": ""}
    if "completion" in texts:
        texts = {"output": texts["completion"]}
    return {**row, **texts, **({"system": contents[0]} if len(contents) > 1 else {})}


def _refuse_trajectories(example: Example, form: str) -> None:
    """Raise ValueError for completions whose text alone lacks what tools answered in between."""
    if example.trajectories:
        raise ValueError(
            f"a completion with calls of tools has no place in --form {form}, whose text would either lack the "
            f"results or be trained on with them. {_instead(example)}"
        )


def _instead(example: Example) -> str:
    """Return what has a place for completions with calls of tools."""
    is_text = isinstance(example.prompt.prompt, str)
    if "completion" not in example.completions:
        return _TEXT_PAIRS if is_text else "Use --form trl."
    return "Use --form messages." + (
        _TEXT_ROWS if is_text and "label" not in example.columns else ""
    )


def _tools(example: Example) -> dict[str, Any]:
    """Return the column `tools`, if the chat template got any.

    Those of the run are JSON text, which TRL reads: a table would give each schema the keys of all.
    """
    if isinstance(example.prompt.tools, list):
        return {"tools": json.dumps(example.prompt.tools)}
    tools = example.prompt.template_arguments.get("tools")
    return {} if tools is None else {"tools": tools}


def _functions(example: Example) -> dict[str, str]:
    """Return the column `tools` as LLaMA-Factory has it: JSON text of the functions."""
    tools = _tools(example).get("tools") or []
    schemas = json.loads(tools) if isinstance(tools, str) else tools
    functions = [schema.get("function", schema) for schema in schemas]
    return {"tools": json.dumps(functions)} if functions else {}


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
