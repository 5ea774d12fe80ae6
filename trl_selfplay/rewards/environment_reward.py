"""The reward that an environment gives by itself, as one more reward function.

In: what `get_reward` of each completion's environment returned when the completion ended. Out: scores.
"""

from collections.abc import Sequence
from typing import Any


class EnvironmentReward:
    """Scores the completions whose environment is of one class, and abstains from all others.

    As in GRPOTrainer it is named after the class and weighs 1.

    Args:
        name: The class's name.
        environments: The values of the column `environment` that stand for it; None for the only
            environment of a run.
    """

    takes_environment_rewards = True

    def __init__(self, name: str, environments: frozenset[str | None]) -> None:
        self.__name__ = name
        self._environments = environments

    def __call__(
        self,
        environment_rewards: Sequence[float | None] = (),
        environment: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """Return a score per completion; None without one.

        Args:
            environment_rewards: What `get_reward` returned.
            environment: The column of that name.
            **kwargs: All else that reward functions get.
        """
        del kwargs
        of_all = None in self._environments
        names = [None] * len(environment_rewards) if of_all else environment or ()
        return [
            reward if name in self._environments else None
            for reward, name in zip(environment_rewards, names, strict=True)
        ]
