"""How many human completions a round trains on beside the model's own, and which.

Sources: ReST, arXiv 2308.08998, Algorithm 1 (the data stays in the mix and passes the same filter);
RFT, arXiv 2308.01825, section 3.3 (gold completions and accepted samples together).
"""

import random
from collections.abc import Sequence

from trl_selfplay.rollouts.record import Rollout


def draw_gold(
    rollouts: Sequence[Rollout], ratio: float | None, num_selected: int, seed: int
) -> list[Rollout]:
    """Return the gold completions that a round trains on, none of them twice, the best first.

    Of equally good ones a lot decides that depends on nothing but the seed and the completion, so
    that what a higher threshold of ReST draws is part of what a lower one does.

    Args:
        rollouts: Those to draw from.
        ratio: How many for each selected completion; None takes all.
        num_selected: Completions of the model's own that the round trains on.
        seed: Of the draw.
    """
    if ratio is None or (count := round(ratio * num_selected)) >= len(rollouts):
        return list(rollouts)

    def rank(rollout: Rollout) -> tuple[float, float]:
        lot = random.Random(f"gold/{seed}/{rollout.prompt_id}/{rollout.sample_index}").random()
        return -(rollout.reward or 0.0), lot

    return sorted(rollouts, key=rank)[:count]
