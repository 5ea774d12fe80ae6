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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from datasets import Dataset

from trl_selfplay.disk import DamagedFileError, naming_damage, save_text
from trl_selfplay.evaluation.estimates import bootstrap_interval, interval_of_shares
from trl_selfplay.evaluation.heldout import HeldOutScores
from trl_selfplay.rollouts.completions import ChosenTokens
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.record import Rollout

LN_2 = math.log(2.0)
# The name that files written before had.
_EARLIER_NAMES = {"greedy": "by_prompt"}

logger = logging.getLogger(__name__)


def build_heldout_rows(
    rows: Sequence[PromptRow], chosen: Mapping[str, ChosenTokens], rollouts: Iterable[Rollout]
) -> Dataset:
    """Return one row per finished opponent completion, and one for each prompt without any.

    Completions equal to the data's are kept, because indistinguishable pairs matter here. If the
    opponent's completion is truncated, the row has `has_opponent` False and one token as
    `rejected_ids`.

    Args:
        rows: The held-out prompts.
        chosen: Tokens of the data's completions by prompt id.
        rollouts: The opponent's rollouts; empty without an opponent, as before round 0.
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
    """Return the metrics of one held-out set, and each prompt's log-prob per token.

    Args:
        rows: Rows of `build_heldout_rows`, with `ref_chosen_logps` and `ref_rejected_logps` if an
            opponent was scored.
        logps: Log-probs (chosen, rejected) of each row under the policy, in nats.
        beta: The round's beta.
        prefix: Prefix of the metrics' names.

    Returns:
        `…_logps`, the mean log-prob per token of the data's completions (over prompts). With an
        opponent also `…_win_rate`, the share of pairs in which the policy prefers the data's
        completion more strongly than the opponent did, ties as 1/2; `…_margin`, the mean of beta
        times the difference of log-ratios; `…_loss`, the logistic loss; and `…_distance`, ln 2 minus
        that loss. 95 % intervals end in _low and _high.
    """
    lengths = [len(ids) for ids in rows["chosen_ids"]]
    per_prompt = {
        prompt_id: chosen / length
        for prompt_id, (chosen, _), length in zip(rows["prompt_id"], logps, lengths, strict=True)
    }
    metrics = {f"{prefix}_logps": fmean(per_prompt.values())}
    low, high = bootstrap_interval(list(per_prompt.values()))
    metrics |= {f"{prefix}_logps_low": low, f"{prefix}_logps_high": high}
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
        low, high = interval_of_shares(wins)
        loss = fmean(logistic_loss(margin) for margin in margins)
        metrics |= {
            f"{prefix}_win_rate": fmean(wins),
            f"{prefix}_win_rate_low": low,
            f"{prefix}_win_rate_high": high,
            f"{prefix}_margin": fmean(margins),
            f"{prefix}_loss": loss,
            f"{prefix}_distance": LN_2 - loss,
            f"{prefix}_pairs": float(len(margins)),
        }
    return metrics, per_prompt


def warn_falling_likelihood(
    before: Mapping[str, float],
    metrics: Mapping[str, float],
    round_index: int,
    prefix: str = "eval",
) -> str | None:
    """Return a warning if a round separates data and opponent but makes the data less likely, or None.

    SPIN's loss only increases the margin between the two, so both log-probs often fall. Selecting by
    `…_logps` then returns an earlier model, however well the rounds work.

    Args:
        before: Metrics of the untrained model.
        metrics: The round's metrics from `measure_heldout`.
        round_index: The round, for the warning.
        prefix: Prefix of the held-out set that selects the best round.
    """
    logps, win_rate = f"{prefix}_logps", f"{prefix}_win_rate"
    if metrics[logps] >= before[logps] or metrics.get(f"{win_rate}_low", 0.0) <= 0.5:
        return None
    return (
        f"round {round_index}: {logps} is {metrics[logps]:.3f}, below the untrained model's "
        f"{before[logps]:.3f}, while the policy tells the data from its opponent ({win_rate} "
        f"{metrics[win_rate]:.2f}). Chosen by {logps}, an earlier model is loaded at the end, perhaps "
        "the untrained one. Let a score of your task choose (`eval_reward_funcs`), or keep the last "
        "round with load_best_round_at_end=False."
    )


def save_scores(path: Path, scores: HeldOutScores) -> None:
    """Save held-out scores, for a resumed run whose weights have changed."""
    save_text(path, json.dumps(asdict(scores)))


def load_scores(path: Path) -> HeldOutScores | None:
    """Load saved scores; None, to be scored again, if they are absent or incomplete."""
    if not path.exists():
        return None
    try:
        with naming_damage(path, "The pairs are scored again."):
            values = json.loads(path.read_text())
            return HeldOutScores(**{_EARLIER_NAMES.get(k, k): v for k, v in values.items()})
    except DamagedFileError as error:
        logger.warning("%s", error)
        return None


def logistic_loss(margin: float) -> float:
    """Return log(1 + exp(-margin)) without overflow.

    Source: SPIN, arXiv 2401.01335, section 4.1.
    """
    return max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))
