"""Weigh samples by percentiles of round 0's scores, where a reward function asks for it.

In: a round's graded samples. Out: the same samples with other weighted sums, on disk too. The scores
themselves stay as they are, so that an interrupted run weighs them again alike.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl_selfplay.disk import BRING_BACK, naming_damage, save_text
from trl_selfplay.peers import wait_for_all
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.sequence import Rollouts
from trl_selfplay.rollouts.stored import rewrite_samples


def weigh_calibrated(play: Any, rollouts: Rollouts, folder: Path) -> Rollouts:
    """Return samples with their calibrated rewards.

    Args:
        play: The `SelfPlay` that sampled them.
        rollouts: Of a round. Those of a run's first become what all others are compared with.
        folder: The round's.

    Raises:
        ValueError: A function abstained on all samples of the first round.
    """
    scorer, accelerator = play.collector.scorer, play.collector.accelerator
    if scorer is None or not scorer.calibration.names or not rollouts:
        return rollouts
    path = play.run.calibration_path
    if accelerator.is_main_process and not path.exists():
        save_text(path, json.dumps(scorer.calibration.scores_of(rollouts.columns("rewards")[0])))
    wait_for_all(accelerator)
    with naming_damage(path, BRING_BACK):
        scores = json.loads(path.read_text())
    scorer.calibration.compare_with(scores)

    def weigh(rollout: Rollout) -> Rollout:
        return replace(rollout, reward=scorer.weighted(rollout.rewards))

    if accelerator.is_main_process:
        rewrite_samples(folder, weigh)
    wait_for_all(accelerator)
    return rollouts  # as they are on disk now
