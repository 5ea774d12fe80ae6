"""How much of `max_completion_length` the results of tools take in completions that were cut.

In: rollouts, one by one. Out: a clause for what is said of truncated completions.
"""

from dataclasses import dataclass

from trl_selfplay.rollouts.record import Rollout


@dataclass(slots=True)
class RoomOfResults:
    """Truncated completions with tools, counted.

    Attributes:
        num_completions: How many there are.
        num_tokens: Their tokens, results included.
        num_result_tokens: Those that results took.
        num_without_room: How many were cut because their next result didn't fit; its tokens aren't in them.
    """

    num_completions: int = 0
    num_tokens: int = 0
    num_result_tokens: int = 0
    num_without_room: int = 0

    def add(self, rollout: Rollout, max_completion_length: int) -> None:
        """Count a rollout if it is such a completion.

        Args:
            rollout: Any.
            max_completion_length: What it was sampled with.
        """
        if not rollout.is_truncated or not rollout.messages:
            return
        length = len(rollout.completion_ids)
        self.num_completions += 1
        self.num_tokens += length
        self.num_result_tokens += length - len(rollout.own_ids)
        # A turn of the policy is cut at the very end of the room.
        self.num_without_room += length < max_completion_length

    def describe(self) -> str:
        """Return what to add to a sentence about truncated completions; "" without such ones."""
        if not self.num_completions:
            return ""
        share = self.num_result_tokens / max(self.num_tokens, 1)
        return (
            f"; results of tools, which count too, took {share:.0%} of the tokens of the cut ones, and in "
            f"{self.num_without_room} of them the next result had no room"
        )
