"""Choose which human completions a round trains on besides the model's own, and how many.

Sources: ReST, arXiv 2308.08998, Algorithm 1 (the data stays in the mix and passes the same filter);
RFT, arXiv 2308.01825, section 3.3 (gold completions and accepted samples together).
"""

import random
from collections.abc import Sequence

from trl_selfplay.rollouts.record import Rollout


def draw_gold(
    rollouts: Sequence[Rollout], ratio: float | None, num_selected: int, seed: int
) -> list[Rollout]:
    """Return the gold completions that a round trains on, without repetitions, best first.

    Ties are broken at random, by a hash of the seed and the completion, so that the draw of a higher
    ReST threshold is a subset of that of a lower one.

    Args:
        rollouts: Completions to draw from.
        ratio: Gold completions per selected completion; None takes all.
        num_selected: Number of the model's own completions that the round trains on.
        seed: Seed of the draw.
    """
    if ratio is None or (count := round(ratio * num_selected)) >= len(rollouts):
        return list(rollouts)

    def rank(rollout: Rollout) -> tuple[float, float]:
        lot = random.Random(f"gold/{seed}/{rollout.prompt_id}/{rollout.sample_index}").random()
        return -(rollout.reward or 0.0), lot

    return sorted(rollouts, key=rank)[:count]
