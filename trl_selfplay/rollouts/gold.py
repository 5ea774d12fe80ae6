"""Human completions, to train on in addition to the model's own.

In: a dataset with prompts and completions. Out: `Rollout`s of the phase "gold", with tokens as if they
had been sampled.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from datasets import Dataset

from trl_selfplay.rollouts.completions import load_chosen_rows, tokenize_chosen
from trl_selfplay.rollouts.prompts import PromptRow, as_plain_rows, message_text
from trl_selfplay.rollouts.record import Rollout, hash_prompt
from trl_selfplay.rollouts.rendering import PromptFormatter

# Sample indices of gold completions count down from here: those of samples start at 0.
_FIRST_INDEX = -1


@dataclass(frozen=True, slots=True)
class Gold:
    """The human completions as ungraded rollouts, and the row of each prompt."""

    rollouts: tuple[Rollout, ...]
    rows: Mapping[str, PromptRow]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Prompt id and completion of each, sorted: what a run knows them by."""
        return sorted((r.prompt_id, r.completion) for r in self.rollouts)

    def of_prompts(self, prompt_ids: Collection[str]) -> Self:
        """Return the completions of these prompts."""
        return replace(
            self,
            rollouts=tuple(r for r in self.rollouts if r.prompt_id in prompt_ids),
            rows={name: row for name, row in self.rows.items() if name in prompt_ids},
        )


def load_gold(
    dataset: Any,
    train_rows: Sequence[PromptRow],
    formatter: PromptFormatter,
    eos_token_ids: Sequence[int],
    eos_token_id: int,
    *,
    needs_solutions: bool,
) -> Gold:
    """Return the human completions of a dataset, without duplicates.

    A prompt that is also a training prompt gets that row's id, solution and columns (of several such
    rows, those of one that agrees with the solution and columns given here); another prompt keeps
    its own.

    Args:
        dataset: In one of the forms of `load_chosen_rows`: `prompt` and `completion`, or
            `messages`; `solution` as well if the prompt isn't a training prompt.
        train_rows: The training prompts.
        formatter: Renders prompts.
        eos_token_ids: Tokens that end a completion.
        eos_token_id: Added to completions that don't end with one of them.
        needs_solutions: Whether the completions will be graded.

    Raises:
        TypeError, ValueError: As `load_chosen_rows`; or a row is to be graded and has no solution.
    """
    name = "gold_dataset"
    form = formatter.tool_form
    if form is not None and form.toolbox.has_environments:
        raise ValueError(
            f"`{name}` with an `environment_factory`: prompts end with what the environment says, and human "
            "completions have no environment that could give a reward. Leave one out."
        )
    chosen = load_chosen_rows(dataset, name)
    if chosen[0].is_conversational != train_rows[0].is_conversational:
        raise ValueError(
            f"`{name}` and `train_dataset` differ: one has chat messages as prompts and the other "
            "plain text. Use one kind for both."
        )
    formatter.warn_control_tokens(chosen, with_solutions=True)
    tokens = tokenize_chosen(formatter, chosen, eos_token_ids, eos_token_id)
    twins: dict[str, list[PromptRow]] = {}
    for row in train_rows:
        twins.setdefault(row.question, []).append(row)
    rollouts: list[Rollout] = []
    rows: dict[str, PromptRow] = {}
    counts: dict[str, int] = {}
    for row in chosen:
        prompt_row = (
            _twin_of(dataset, row, twins[row.question])
            if row.question in twins
            else _own_row(dataset, row, train_rows[0].columns)
        )
        has_solutions = "solution" in train_rows[0].columns
        if needs_solutions and has_solutions and prompt_row.solution is None:
            raise ValueError(
                f"`{name}` row {row.row_index} has a prompt that is not in `train_dataset`, and no "
                "`solution`: gold completions are graded here like the model's own. "
                "Add the column `solution`, or leave such rows out."
            )
        missing = sorted(train_rows[0].columns.keys() - prompt_row.columns.keys())
        if needs_solutions and missing:
            raise ValueError(
                f"`{name}` row {row.row_index} has a prompt that is not in `train_dataset`, and "
                f"lacks its columns {missing}, which the reward functions get. Add them, or leave such "
                "rows out."
            )
        prompt_id = prompt_row.prompt_id
        rows[prompt_id] = prompt_row
        place = counts.setdefault(prompt_id, 0)
        counts[prompt_id] += 1
        ids = tokens[row.prompt_id]
        text = row.solution if isinstance(row.solution, str) else message_text(row.solution[0])
        if not text:  # a tool call
            text = str(formatter.tokenizer.decode(list(ids.chosen_ids), skip_special_tokens=True))
        rollouts.append(
            Rollout(
                round_index=-1,
                phase="gold",
                prompt_id=prompt_id,
                sample_index=_FIRST_INDEX - place,
                prompt_ids=ids.prompt_ids,
                completion_ids=ids.chosen_ids,
                prompt=str(row.prompt),
                completion=text,
                finish="eos",
            )
        )
    return Gold(tuple(sorted(rollouts, key=lambda r: (r.prompt_id, -r.sample_index))), rows)


def _twin_of(dataset: Dataset, row: PromptRow, twins: Sequence[PromptRow]) -> PromptRow:
    """Return the training row with this prompt; of several, one that agrees with its columns."""
    if len(twins) == 1:
        return twins[0]
    record = as_plain_rows(dataset)[row.row_index]
    agreeing = [t for t in twins if all(record.get(c, v) == v for c, v in t.columns.items())]
    return (agreeing or twins)[-1]


def _own_row(dataset: Dataset, row: PromptRow, train_columns: Collection[str]) -> PromptRow:
    """Return the row of a prompt that isn't a training prompt."""
    record = as_plain_rows(dataset)[row.row_index]
    solution = record.get("solution")
    columns = {k: v for k, v in record.items() if k in train_columns}
    prompt_id = hash_prompt(row.prompt, solution, row.template_arguments)
    return replace(row, prompt_id=prompt_id, solution=solution, columns=columns)
