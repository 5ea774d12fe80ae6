"""Turn dataset rows into the token ids that a model is conditioned on.

In: a dataset with `prompt` (text or chat messages) and `solution`, few-shot examples, a hint
formatter. Out: `PromptRow`s, checked one by one, and token ids: with or without the few-shot
examples, with or without the hint (STaR, arXiv 2203.14465, sections 3.1 and 3.3).
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from trl_selfplay.rollouts import hash_prompt

logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]
Prompt = str | Messages
HintFormatter = Callable[[Any, Any], Any]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt of the dataset.

    Attributes:
        prompt_id: See `Rollout.prompt_id`.
        prompt: Text or chat messages, as the dataset has it.
        solution: The ground truth, as the dataset has it.
        columns: Every column but `prompt`, for the reward functions.
        row_index: Where the row stands in the user's dataset, for error messages.
    """

    prompt_id: str
    prompt: Prompt
    solution: Any
    columns: Mapping[str, Any]
    row_index: int

    @property
    def is_conversational(self) -> bool:
        """Whether the prompt is chat messages."""
        return not isinstance(self.prompt, str)


def load_prompt_rows(dataset: Any, name: str) -> list[PromptRow]:
    """Check a dataset row by row and return its prompts, sorted by `prompt_id`.

    Rows with equal prompt and solution are merged, with one notice. The order of the rows has no
    influence on anything that follows.

    Args:
        dataset: A `datasets.Dataset` with the columns `prompt` and `solution`.
        name: What to call it in errors, such as "train_dataset".

    Raises:
        TypeError: Not a `Dataset`, or a row whose prompt is neither text nor messages.
        ValueError: A column is missing, the dataset is empty, or prompts are of mixed kinds.
    """
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            f"`{name}` is an IterableDataset. Every round samples all prompts again and a resumed "
            "run must find the same ones, so rounds need a finite set: pass a `Dataset`, for "
            "example `Dataset.from_list(list(iterable.take(10_000)))`."
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"`{name}` must be a `datasets.Dataset` with the columns `prompt` and `solution`, got "
            f"{type(dataset).__name__}."
        )
    if missing := [c for c in ("prompt", "solution") if c not in dataset.column_names]:
        raise ValueError(
            f"`{name}` has no column {' and no column '.join(map(repr, missing))}; its columns are "
            f"{dataset.column_names}. Each row needs a `prompt` (text or chat messages) and the "
            "`solution` that the reward functions compare with, as for GRPOTrainer; rename with "
            '`dataset.rename_column("answer", "solution")`.'
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty: there is no prompt to sample from.")
    rows: dict[str, PromptRow] = {}
    kinds: dict[bool, int] = {}
    for index, record in enumerate(dataset):
        prompt = record["prompt"]
        check_prompt(prompt, f"`{name}` row {index}")
        kinds.setdefault(isinstance(prompt, str), index)
        if len(kinds) == 2:
            raise ValueError(
                f"`{name}` mixes plain-text prompts (row {kinds[True]}) and chat messages (row "
                f"{kinds[False]}). Use one kind for all rows."
            )
        prompt_id = hash_prompt(prompt, record["solution"])
        columns = {key: value for key, value in record.items() if key != "prompt"}
        rows.setdefault(prompt_id, PromptRow(prompt_id, prompt, record["solution"], columns, index))
    if len(rows) < len(dataset):
        logger.warning(
            "%s: %d of %d rows repeat an earlier prompt and solution; each is used once.",
            name,
            len(dataset) - len(rows),
            len(dataset),
        )
    return [rows[prompt_id] for prompt_id in sorted(rows)]


def check_prompt(prompt: Any, where: str) -> None:
    """Raise unless `prompt` is non-empty text or a list of `{"role", "content"}` messages."""
    if isinstance(prompt, str) and prompt.strip():
        return
    if (
        isinstance(prompt, list)
        and prompt
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in prompt)
    ):
        if prompt[-1]["role"] not in ("user", "assistant", "tool"):
            raise ValueError(
                f"{where}: the last message has the role {prompt[-1]['role']!r}; a chat prompt "
                "ends with a user turn (or an assistant turn to continue)."
            )
        return
    raise TypeError(
        f"{where}: the prompt is {prompt!r:.200}; expected non-empty text or a non-empty list of "
        'messages such as [{"role": "user", "content": "…"}].'
    )


@dataclass(frozen=True, slots=True)
class FewShotExample:
    """A worked example that stands before the prompt while sampling."""

    prompt: Prompt
    completion: str
    solution: Any


def load_few_shot_examples(
    examples: Sequence[Mapping[str, Any]] | None, conversational: bool
) -> tuple[FewShotExample, ...]:
    """Check few-shot examples and bring them into the dataset's form.

    Args:
        examples: Mappings with `prompt`, `completion` and `solution`.
        conversational: Whether the dataset's prompts are chat messages. A plain-text example is
            then made a user turn and an assistant turn.

    Raises:
        ValueError: A key is missing, or an example is chat messages where the dataset is text.
    """
    checked = []
    for index, example in enumerate(examples or ()):
        if missing := {"prompt", "completion", "solution"} - set(example):
            raise ValueError(
                f"few_shot_examples[{index}] lacks {sorted(missing)}; each example needs `prompt`, "
                "`completion` (the rationale with its answer) and `solution`."
            )
        prompt, completion = example["prompt"], example["completion"]
        check_prompt(prompt, f"few_shot_examples[{index}]")
        if not isinstance(completion, str):
            completion = completion[-1]["content"]
        if conversational and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not conversational and not isinstance(prompt, str):
            raise ValueError(
                f"few_shot_examples[{index}] is a list of chat messages, but the dataset's prompts "
                "are plain text. Give the example's prompt as text."
            )
        checked.append(FewShotExample(prompt, completion, example["solution"]))
    return tuple(checked)


class PromptFormatter:
    """Renders prompts as token ids.

    Plain text: the examples' `prompt + completion`, each followed by a blank line, then the
    prompt. Chat: the examples as user and assistant turns after a leading system message, then
    the conversation, through the model's chat template. An example whose prompt is the row's own
    is left out for that row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        few_shot_examples: Sequence[FewShotExample] = (),
        hint_formatter: HintFormatter | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.few_shot_examples = tuple(few_shot_examples)
        self.hint_formatter = hint_formatter
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def token_ids(self, row: PromptRow, *, few_shot: bool, hinted: bool = False) -> tuple[int, ...]:
        """Return the prompt's token ids, with the generation prompt of a chat template.

        Args:
            row: The prompt.
            few_shot: Put the few-shot examples before it.
            hinted: Show the answer, in the examples as in the prompt itself.

        Raises:
            ValueError: A chat prompt and a tokenizer without chat template.
        """
        examples = [e for e in self.few_shot_examples if e.prompt != row.prompt] if few_shot else []
        prompt = self._with_hint(row.prompt, row.solution) if hinted else row.prompt
        shown = [
            (self._with_hint(e.prompt, e.solution) if hinted else e.prompt, e.completion)
            for e in examples
        ]
        if isinstance(prompt, str):
            text = "".join(f"{before}{after}\n\n" for before, after in shown) + prompt
            ids = self.tokenizer(text)["input_ids"]
            # Some tokenizers end every text with EOS; a prompt that ends there can't go on.
            if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]
            return tuple(ids)
        return tuple(self._chat_ids(prompt, shown))

    def _with_hint(self, prompt: Prompt, solution: Any) -> Prompt:
        if self.hint_formatter is None:
            raise ValueError("a hinted prompt needs a hint_formatter")
        return self.hint_formatter(prompt, solution)

    def _chat_ids(self, prompt: Messages, shown: Sequence[tuple[Prompt, str]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                "the prompts are chat messages, but the tokenizer of "
                f"{self.tokenizer.name_or_path!r} has no chat template. Use an instruct model, set "
                "`chat_template_path`, or give the prompts as plain text."
            )
        system = prompt[:1] if prompt[0]["role"] == "system" else []
        turns: Messages = list(system)
        for before, after in shown:
            turns += [m for m in _messages(before) if m["role"] != "system"]
            turns.append({"role": "assistant", "content": after})
        turns += prompt[len(system) :]
        continues = prompt[-1]["role"] == "assistant"
        tokenizer: Any = self.tokenizer  # its stubs don't follow `tokenize` and `return_dict`
        return tokenizer.apply_chat_template(
            turns,
            tokenize=True,
            return_dict=False,
            add_generation_prompt=not continues,
            continue_final_message=continues,
            **self.chat_template_kwargs,
        )


def _messages(prompt: Prompt) -> Messages:
    """Return a prompt that `load_few_shot_examples` has brought into chat form."""
    assert not isinstance(prompt, str)
    return prompt


def check_lengths(
    rows: Sequence[PromptRow],
    lengths: Sequence[int],
    max_completion_length: int,
    context_length: int | None,
    name: str,
) -> None:
    """Raise if a prompt and its completion can't fit the model's context.

    Args:
        rows: The prompts.
        lengths: Their lengths in tokens, as sampled from (few-shot examples and hint included).
        max_completion_length: Most tokens of a completion.
        context_length: Most positions of the model, None if it has no limit.
        name: What to call the dataset in the error.

    Raises:
        ValueError: With the number of such rows, the longest one and the remedy.
    """
    if context_length is None:
        return
    too_long = [
        (length, row)
        for length, row in zip(lengths, rows, strict=True)
        if length + max_completion_length > context_length
    ]
    if too_long:
        length, row = max(too_long, key=lambda pair: pair[0])
        raise ValueError(
            f"{len(too_long)} of {len(rows)} prompts of `{name}` don't fit the model's context of "
            f"{context_length} tokens: row {row.row_index} has {length} tokens (few-shot examples "
            f"and hint included) and `max_completion_length` is {max_completion_length}. Filter "
            "such rows out, use fewer few-shot examples, or lower `max_completion_length`."
        )


def canonical_prompt(prompt: Prompt) -> str:
    """Return a text that is equal for equal prompts, whatever the order of keys."""
    return json.dumps(prompt, sort_keys=True, ensure_ascii=False, default=str)


def load_heldout_sets(
    eval_dataset: Any,
    train_rows: list[PromptRow],
    load_rows: Callable[[Any, str], list[PromptRow]] = load_prompt_rows,
) -> dict[str, list[PromptRow]]:
    """Return the held-out sets by name ("" for a single one), none of them seen in training.

    Raises:
        ValueError: A held-out prompt is also a training prompt, whatever its solution.
    """
    if eval_dataset is None:
        return {}
    named = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    sets = {name: load_rows(dataset, _heldout_label(name)) for name, dataset in named.items()}
    refuse_seen_heldout(sets, train_rows, "train_dataset")
    return sets


def _heldout_label(name: str) -> str:
    return f"eval_dataset[{name!r}]" if name else "eval_dataset"


def refuse_seen_heldout(
    sets: Mapping[str, Sequence[PromptRow]], rows: Sequence[PromptRow], source: str
) -> None:
    """Raise ValueError if a held-out prompt is among those that are trained on.

    Args:
        sets: Held-out prompts by name.
        rows: Those trained on.
        source: What to call the dataset that they are from.
    """
    trained_on = {canonical_prompt(row.prompt): row for row in rows}
    for name, heldout in sets.items():
        label = _heldout_label(name)
        shared = [row for row in heldout if canonical_prompt(row.prompt) in trained_on]
        if shared:
            twin = trained_on[canonical_prompt(shared[0].prompt)]
            raise ValueError(
                f"{len(shared)} of {len(heldout)} prompts of `{label}` are in `{source}` "
                f"as well (row {shared[0].row_index} is row {twin.row_index} there). A held-out "
                "score on them means nothing: remove them from one of the two."
            )
