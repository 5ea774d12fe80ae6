"""Measure on held-out prompts how well the policy tells the data's completions from the opponent's.

In: held-out prompts with the data's completions, the opponent's samples for them, log-probs of
both under opponent and policy. Out: metrics and each prompt's score, as `HeldOutScores`.

Source: SPIN, arXiv 2401.01335, equations 4.6 and 4.7. The loss of any policy is at least ln 2 minus
the Jensen-Shannon divergence between data and opponent (each way round), whatever beta is; so
ln 2 minus the held-out loss is a lower bound of how far the opponent still is from the data.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from datasets import Dataset

from trl_selfplay.disk import DamagedFileError, naming_damage, save_text
from trl_selfplay.evaluation.estimates import bootstrap_interval
from trl_selfplay.evaluation.heldout import HeldOutScores
from trl_selfplay.rollouts.completions import ChosenTokens
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.record import Rollout

LN_2 = math.log(2.0)

logger = logging.getLogger(__name__)


def build_heldout_rows(
    rows: Sequence[PromptRow], chosen: Mapping[str, ChosenTokens], rollouts: Sequence[Rollout]
) -> Dataset:
    """Return one row a finished opponent completion, or a prompt's own row without one.

    Completions that equal the data's stay: that they can't be told apart is the finding. Where the
    opponent's was cut by length the row has `has_opponent` False and one token as `rejected_ids`.

    Args:
        rows: The held-out prompts.
        chosen: The tokens of each prompt id.
        rollouts: The opponent's; none if there is no opponent, as before round 0.
    """
    finished: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        if not rollout.is_truncated:
            finished.setdefault(rollout.prompt_id, []).append(rollout)
    records = []
    for row in rows:
        tokens = chosen[row.prompt_id]
        sampled = [list(r.completion_ids) for r in finished.get(row.prompt_id, ())]
        for rejected_ids in sampled or [list(tokens.chosen_ids[-1:])]:
            records.append(
                {
                    "prompt_id": row.prompt_id,
                    "prompt_ids": list(tokens.prompt_ids),
                    "chosen_ids": list(tokens.chosen_ids),
                    "rejected_ids": rejected_ids,
                    "has_opponent": bool(sampled),
                }
            )
    return Dataset.from_list(records)


def measure_heldout(
    rows: Dataset, logps: Sequence[tuple[float, float]], beta: float, prefix: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the metrics of one held-out set, and each prompt's log-prob a token.

    Args:
        rows: Of `build_heldout_rows`, with `ref_chosen_logps` and `ref_rejected_logps` where an
            opponent was scored.
        logps: (chosen, rejected) of each row under the policy, in nats.
        beta: Of the round.
        prefix: Of the metrics.

    Returns:
        `…_logps`, the mean log-prob a token of the data's completions (over prompts), and, where
        there is an opponent: `…_win_rate`, the share of pairs in which the policy prefers the
        data's completion to the opponent's more than the opponent did, ties as half; `…_margin`,
        the mean of beta times the difference of log-ratios; `…_loss`, the logistic loss; and
        `…_distance`, ln 2 minus that loss. Intervals (95 %, bootstrap) end in _low and _high.
    """
    lengths = [len(ids) for ids in rows["chosen_ids"]]
    per_prompt = {
        prompt_id: chosen / length
        for prompt_id, (chosen, _), length in zip(rows["prompt_id"], logps, lengths, strict=True)
    }
    metrics = {f"{prefix}_logps": fmean(per_prompt.values())}
    metrics |= _interval(f"{prefix}_logps", list(per_prompt.values()))
    if "ref_chosen_logps" not in rows.column_names:
        return metrics, per_prompt
    margins = [
        beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
        for (chosen, rejected), ref_chosen, ref_rejected, has_opponent in zip(
            logps,
            rows["ref_chosen_logps"],
            rows["ref_rejected_logps"],
            rows["has_opponent"],
            strict=True,
        )
        if has_opponent
    ]
    if margins:
        wins = [0.5 if margin == 0.0 else float(margin > 0.0) for margin in margins]
        loss = fmean(logistic_loss(margin) for margin in margins)
        metrics |= {
            f"{prefix}_win_rate": fmean(wins),
            **_interval(f"{prefix}_win_rate", wins),
            f"{prefix}_margin": fmean(margins),
            f"{prefix}_loss": loss,
            f"{prefix}_distance": LN_2 - loss,
            f"{prefix}_pairs": float(len(margins)),
        }
    return metrics, per_prompt


def _interval(name: str, values: Sequence[float]) -> dict[str, float]:
    low, high = bootstrap_interval(values)
    return {f"{name}_low": low, f"{name}_high": high}


def save_scores(path: Path, scores: HeldOutScores) -> None:
    """Write held-out scores down, for a run that goes on when the weights are other ones."""
    save_text(path, json.dumps(asdict(scores)))


def load_scores(path: Path) -> HeldOutScores | None:
    """Read back what `save_scores` wrote; None, to be scored again, if it is not there whole."""
    if not path.exists():
        return None
    try:
        with naming_damage(path, "The pairs are scored again."):
            return HeldOutScores(**json.loads(path.read_text()))
    except DamagedFileError as error:
        logger.warning("%s", error)
        return None


def logistic_loss(margin: float) -> float:
    """Return log(1 + exp(-margin)), without overflow.

    Source: SPIN, arXiv 2401.01335, section 4.1.
    """
    return max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))
