"""Find samples of a run: by outcome, hint, prompt and reward.

In: a run's folder and what is wanted. Out: rollouts with their outcomes, streamed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rounds.run import UNTRAINED


@dataclass(frozen=True, slots=True)
class SampleSearch:
    """Which samples are wanted; None wants all.

    Attributes:
        outcome: As in `rollouts/funnel.py: OutcomeCounts`, or "unfinished".
        hinted: Whether they were sampled with a hint.
        prompt: How the prompt's id begins.
        reward_above: The least reward.
        reward_below: The highest reward. Samples without a reward match neither.
        held_out: Held-out samples instead of those of training prompts. Their outcome is the name of
            their set.
    """

    outcome: str | None = None
    hinted: bool | None = None
    prompt: str | None = None
    reward_above: float | None = None
    reward_below: float | None = None
    held_out: bool = False

    def find(self, run: RunFolder, round_index: int) -> Iterator[tuple[Rollout, str]]:
        """Yield each sample of a round that matches, with its outcome.

        Raises:
            DamagedFileError, FileNotFoundError: As `RunFolder.rollouts`.
        """
        found = run.evaluation(round_index) if self.held_out else run.rollouts(round_index)
        return (pair for pair in found if self._matches(*pair))

    def _matches(self, rollout: Rollout, outcome: str) -> bool:
        reward, above, below = rollout.reward, self.reward_above, self.reward_below
        return (
            self.outcome in (None, outcome)
            and self.hinted in (None, rollout.hinted)
            and rollout.prompt_id.startswith(self.prompt or "")
            and (above is None or (reward is not None and reward >= above))
            and (below is None or (reward is not None and reward <= below))
        )


def known_rounds(run: RunFolder, held_out: bool) -> list[int]:
    """Return the rounds that a run has samples of, -1 for the untrained model's held-out ones."""
    rounds = sorted({*run.rounds, *(line["round"] for line in run.lines)})
    if not held_out:
        return [index for index in rounds if run.rounds and index >= run.rounds[0]]
    return [index for index in (UNTRAINED, *rounds) if (run.folder(index) / "evaluation").is_dir()]
