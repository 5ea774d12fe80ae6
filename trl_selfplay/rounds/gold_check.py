"""Do the reward functions call right answers right?

In: a trainer's stages, and training prompts. Out: how many gold completions, or solutions written as a
completion, get the reward that a right completion needs. A verifier that misses the gold misses the
model's right answers as well.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_selfplay.rewards.judge import JudgeReward
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.record import Rollout

# Ways to write an answer, the most usual ones first. Reward functions of other packages and of the
# user's own often read one of them alone.
FORMS = (
    "{}",
    "The answer is {}.",
    "\\boxed{{{}}}",
    "#### {}",
    "<answer>{}</answer>",
    "<think>\nso\n</think>\n<answer>\n{}\n</answer>",
    "<think>\nso\n</think>\n\\boxed{{{}}}",
    "Answer: {}",
    "```python\n{}\n```",
)
_MOST_GRADED = 256


@dataclass(frozen=True, slots=True)
class GoldCheck:
    """What reward functions say of right completions.

    Attributes:
        form: How they were written; None for those of `gold_dataset`, as they are.
        count: Number of right completions.
        num_passed: Number that pass.
        missed: Of those that don't, the name of the row, the completion and the reward.
    """

    form: str | None
    count: int
    num_passed: int
    missed: tuple[tuple[str, str, float | None], ...]


def check_gold(trainer: Any, rows: Sequence[PromptRow]) -> GoldCheck | None:
    """Grade right completions: those of `gold_dataset`, else the solutions of some prompts.

    Solutions are written in each of `FORMS`, and that of which most pass counts.

    Returns:
        None where there is nothing to grade, or no function that could: without solutions, with
        rewards of degrees, and where models or a prompt's other samples decide.
    """
    play = trainer.self_play
    scorer = play.collector.scorer
    if scorer is None or play.config.rewards_have_degrees or scorer.comparing:
        return None
    if scorer.has_models or any(isinstance(f, JudgeReward) for f in scorer.callables):
        return None
    gold = getattr(trainer, "gold", None)
    if gold is not None and gold.rollouts:
        return _graded(play, gold.rollouts[:_MOST_GRADED], gold.rows, None)
    solved = [row for row in rows if isinstance(row.solution, str | int | float)]
    if not solved:
        return None
    by_id = {row.prompt_id: row for row in solved}
    best: GoldCheck | None = None
    for form in FORMS:
        found = _graded(play, [_as_rollout(play, row, form) for row in solved], by_id, form)
        if best is None or found.num_passed > best.num_passed:
            best = found
        if best.num_passed == best.count:
            break
    return best


def _graded(
    play: Any, rollouts: Sequence[Rollout], rows: Mapping[str, PromptRow], form: str | None
) -> GoldCheck:
    graded = play.collector.grade(rollouts, rows)
    play.collector.scorer.take_metrics()  # they aren't a round's
    missed = [r for r in graded if not r.passes(play.collector.reward_threshold)]
    return GoldCheck(
        form,
        len(graded),
        len(graded) - len(missed),
        tuple((rows[r.prompt_id].where, r.completion, r.reward) for r in missed),
    )


def _as_rollout(play: Any, row: PromptRow, form: str) -> Rollout:
    text = form.format(row.solution)
    ids = tuple(play.formatter.continuation_ids(text))
    return Rollout(
        round_index=-1,
        phase="gold",
        prompt_id=row.prompt_id,
        sample_index=-1,
        prompt_ids=(),
        completion_ids=(*ids, play.eos_token_id),
        prompt=str(row.prompt),
        completion=text,
        finish="eos",
    )
