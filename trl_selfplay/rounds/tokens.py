"""Count the tokens that a round samples, trains on and is scored with, for rounds.jsonl.

In: what a round played, and its held-out scores. Out: a number by phase. It doesn't depend on where a
killed run was resumed.
"""

from typing import Any

from datasets import Dataset

from trl_selfplay.evaluation.heldout import HeldOutScores
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.sequence import Rollouts, count_values
from trl_selfplay.rounds.plan import RoundPlan

# How often a row's tokens go through the model, by column: a pair's prompt stands before both sides.
_TIMES = {"input_ids": 1, "prompt_ids": 2, "chosen_ids": 1, "rejected_ids": 1}
_ROWS = 4096


def tokens_by_phase(
    plan: RoundPlan, played: PlayedRound, epochs: float | None, scores: HeldOutScores | None
) -> dict[str, int]:
    """Return the number of tokens of each phase, by the names of `seconds`.

    Args:
        plan: The round. One that trains on an earlier round's samples samples no tokens.
        played: The round's samples and rows.
        epochs: How often the rows were trained on; None if not at all.
        scores: The round's held-out scores, or None.

    Returns:
        "sample" and "evaluate" count the tokens of completions. "train" counts those of rows, prompts
        included and padding not, times the epochs.
    """
    samples = plan.sampling_round == plan.round_index
    return {
        "sample": Rollouts.of(played.rollouts).num_tokens if samples else 0,
        "train": round(_count_tokens(played.training_rows) * epochs) if epochs else 0,
        "evaluate": 0 if scores is None else scores.num_tokens,
    }


def _count_tokens(rows: Dataset) -> int:
    columns = [name for name in _TIMES if name in rows.column_names]
    if "input_ids" in columns:
        columns = ["input_ids"]
    total = 0
    # As stored: turned into lists of Python, a round's rows take long.
    batches: Any = rows.select_columns(columns).with_format("arrow").iter(_ROWS)
    for batch in batches:
        total += sum(_TIMES[name] * count_values(batch.column(name)) for name in columns)
    return total
