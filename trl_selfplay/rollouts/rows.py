"""Turn selected rollouts into the rows that the parent trains on.

In: selected rollouts and their training prompts without hints, or pairs of completions. Out: a dataset
of `input_ids` and `labels`, or of both sides of pairs. It is final: nothing tokenizes, truncates or
masks it again.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_selfplay.disk import replace_folder
from trl_selfplay.rollouts.record import Rollout

IGNORE_INDEX = -100
WEIGHT = "weight"
LENGTH = "length"  # the default of `length_column_name`
# (reward of each row, number of tokens to learn of each row) → weight of each row.
RowWeights = Callable[[Sequence[float | None], Sequence[int]], list[float]]


def training_completion_ids(rollout: Rollout, eos_token_id: int) -> tuple[int, ...]:
    """Return the tokens to learn after the prompt: exactly the sampled ones.

    A completion that ended with a stop string has no EOS, so one is added for the model to learn to
    stop there.
    """
    if rollout.finish == "stop":
        return (*rollout.completion_ids, eos_token_id)
    return rollout.completion_ids


def build_training_rows(
    rollouts: Sequence[Rollout],
    prompt_ids: Mapping[str, tuple[int, ...]],
    eos_token_id: int,
    seed: int,
    weigh: RowWeights | None = None,
    completion_only: bool = True,
) -> Dataset:
    """Build the dataset of one round, shuffled under `seed`.

    Args:
        rollouts: The selected rollouts, in an order that doesn't depend on sampling.
        prompt_ids: The tokens of each prompt as trained on, by prompt id: without the hint, and
            without few-shot examples unless configured.
        eos_token_id: Added after completions that ended with a stop string.
        seed: Seed of the shuffle. The parent draws the same row order in every round, so the rows
            themselves must be shuffled.
        completion_only: If True, only completions are learned; else prompts as well.
        weigh: Returns the values of a column `weight`; None adds no column.

    Returns:
        Columns `input_ids` and `labels` (-100 on prompt tokens that aren't learned and on completion
        tokens that the policy didn't write), and `weight` if requested.

    Source: STaR, arXiv 2203.14465, Eq. 2: the gradient is that of log p(rationale, answer | x),
    with x unhinted, so prompt tokens carry no loss.
    """
    input_ids, labels = [], []
    for rollout in rollouts:
        prompt = prompt_ids[rollout.prompt_id]
        completion = training_completion_ids(rollout, eos_token_id)
        input_ids.append([*prompt, *completion])
        learnt = [IGNORE_INDEX] * len(prompt) if completion_only else prompt
        labels.append([*learnt, *_own_tokens(rollout, completion)])
    columns: dict[str, list[Any]] = {"input_ids": input_ids, "labels": labels}
    if weigh is not None:
        lengths = [sum(label != IGNORE_INDEX for label in row[1:]) for row in labels]
        columns[WEIGHT] = weigh([r.reward for r in rollouts], lengths)
    rows = Dataset.from_dict(columns)
    return rows.shuffle(seed=seed).flatten_indices()


def _own_tokens(rollout: Rollout, completion: tuple[int, ...]) -> tuple[int, ...]:
    """Return a training completion with -100 for tokens that the policy didn't write."""
    mask = _training_mask(rollout, completion)
    if mask is None:
        return completion
    return tuple(t if own else IGNORE_INDEX for t, own in zip(completion, mask, strict=True))


def _training_mask(rollout: Rollout, completion: tuple[int, ...]) -> tuple[bool, ...] | None:
    """Return which tokens of a training completion are learned, or None for all."""
    mask = rollout.completion_mask
    if mask is None:
        return None
    return (*mask, *[True] * (len(completion) - len(mask)))  # an EOS that was added is learnt


@dataclass(frozen=True, slots=True)
class Pair:
    """A chosen and a rejected completion of one prompt, as tokens.

    A mask says which tokens of a completion the policy wrote; None: all of them.
    """

    prompt_id: str
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    chosen_mask: tuple[bool, ...] | None = None
    rejected_mask: tuple[bool, ...] | None = None


def pair_of(
    chosen: Rollout, rejected: Rollout, prompt_ids: tuple[int, ...], eos_token_id: int
) -> Pair:
    """Return two rollouts of one prompt as a pair; `prompt_ids` is the prompt as trained on."""
    chosen_ids, rejected_ids = (
        training_completion_ids(r, eos_token_id) for r in (chosen, rejected)
    )
    return Pair(
        prompt_id=chosen.prompt_id,
        prompt_ids=prompt_ids,
        chosen_ids=chosen_ids,
        rejected_ids=rejected_ids,
        chosen_mask=_training_mask(chosen, chosen_ids),
        rejected_mask=_training_mask(rejected, rejected_ids),
    )


def build_pair_rows(pairs: Sequence[Pair], seed: int | None) -> Dataset:
    """Build the rows of DPOTrainer, still without the reference's log-probs.

    Args:
        pairs: Pairs in an order that doesn't depend on sampling.
        seed: Seed of the shuffle (the parent draws the same row order in every round); None keeps
            the order.

    Returns:
        The fields of `Pair` as columns, masks only if a pair has one; and `length`, the tokens of the
        longer side, by which the parent can group rows.
    """
    columns = {f.name: [getattr(pair, f.name) for pair in pairs] for f in fields(Pair)}
    longer = [max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    rows = Dataset.from_dict(
        {
            LENGTH: [len(p.prompt_ids) + n for p, n in zip(pairs, longer, strict=True)],
        }
        | {
            name: [list(value) if isinstance(value, tuple) else value for value in values]
            for name, values in columns.items()
            if not name.endswith("_mask") or any(value is not None for value in values)
        }
    )
    return rows if seed is None else rows.shuffle(seed=seed).flatten_indices()


def save_rows(folder: Path, rows: Dataset) -> None:
    """Write a dataset atomically."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    rows.save_to_disk(str(temporary))
    replace_folder(temporary, folder)
