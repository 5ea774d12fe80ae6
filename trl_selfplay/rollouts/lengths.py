"""Refuse prompts that leave no room for their completions.

In: rows with their prompts as tokens, and the limits of model and training. Out: an error that names the
rows, or a warning of little room.
"""

import logging
from collections.abc import Callable, Sequence

from trl_selfplay.rollouts.prompts import PromptRow

logger = logging.getLogger(__name__)


def check_lengths(
    rows: Sequence[PromptRow],
    lengths: Sequence[int],
    max_completion_length: int,
    context_length: int | None,
    name: str,
    whose: str = "the model's context",
) -> None:
    """Raise if a prompt and its completion can't fit the context.

    Args:
        rows: The prompts.
        lengths: Their lengths in tokens, as sampled from (few-shot examples and hint included).
        max_completion_length: Maximum tokens per completion.
        context_length: Maximum tokens of a prompt with its completion, None without a limit.
        name: Name of the dataset, for the error.
        whose: What sets that maximum, for the error.

    Raises:
        ValueError: With the number of such rows, the longest one and the remedy.
    """
    if context_length is None:
        return
    pairs = zip(lengths, rows, strict=True)
    too_long = [pair for pair in pairs if pair[0] + max_completion_length > context_length]
    if too_long:
        length, row = max(too_long, key=lambda pair: pair[0])
        raise ValueError(
            f"{len(too_long)} of {len(rows)} prompts of `{name}` don't fit {whose} of "
            f"{context_length} tokens: row {row.row_index} has {length} (few-shot examples and hint "
            f"included), and `max_completion_length` is {max_completion_length}. Lower that, use fewer "
            "few-shot examples, or filter such rows out."
        )


def check_training_lengths(
    rows: Sequence[PromptRow],
    render: Callable[[PromptRow], tuple[int, ...]],
    max_length: int | None,
    max_completion_length: int,
    sample: Sequence[PromptRow],
) -> None:
    """Refuse prompts that leave no room for a completion in training; warn of little room.

    Args:
        rows: All prompts.
        render: Returns a prompt's tokens as trained on.
        max_length: Maximum tokens of prompt and completion in training; None for no limit.
        max_completion_length: Maximum tokens per completion.
        sample: The rows that are likely the longest; all rows are checked if one of these is too
            long.

    Raises:
        ValueError: With the indices of such rows and the remedy.
    """
    if max_length is None or not sample:
        return
    lengths = [len(render(row)) for row in sample]
    if max(lengths) >= max_length:
        too_long = sorted(row.row_index for row in rows if len(render(row)) >= max_length)
        shown = ", ".join(map(str, too_long[:10])) + (", …" if len(too_long) > 10 else "")
        raise ValueError(
            f"{len(too_long)} of {len(rows)} prompts of `{sample[0].source}` have {max_length} "
            f"tokens or more by themselves (rows {shown}), and max_length={max_length} must hold "
            "prompt and completion: nothing that is sampled for them could be trained on. Raise "
            "max_length, or remove these rows."
        )
    if max(lengths) + max_completion_length > max_length:
        logger.warning(
            "max_length=%d holds prompt and completion, and prompts have up to %d tokens beside "
            "max_completion_length=%d: completions of more than %d tokens will be sampled and "
            "left out. Set max_length=%d to keep all, or lower max_completion_length.",
            max_length,
            max(lengths),
            max_completion_length,
            max_length - max(lengths),
            max(lengths) + max_completion_length,
        )
