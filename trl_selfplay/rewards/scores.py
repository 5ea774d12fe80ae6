"""The scores of one call of a reward function, with the cause of each abstention.

In: a score per completion, and why those that are None are None. Out: a list, as GRPOTrainer takes
it, that also knows the causes.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping

logger = logging.getLogger(__name__)


class Scores(list[float | None]):
    """A list of scores that knows why some of them are None.

    Args:
        scores: One float or None per completion.
        causes: The cause of abstentions, by index: a few words, the same for all of a kind, since
            they are counted.

    >>> scores = Scores([1.0, None], {1: "no answer within the deadline"})
    >>> scores == [1.0, None], scores.causes
    (True, {1: 'no answer within the deadline'})
    """

    def __init__(
        self, scores: Iterable[float | None] = (), causes: Mapping[int, str] | None = None
    ) -> None:
        super().__init__(scores)
        self.causes = dict(causes or {})

    def count_causes(self) -> Counter[str]:
        """Return the number of abstentions by cause."""
        return Counter(self.causes.values())

    def log_causes(self, name: str) -> None:
        """Log one warning per cause, with its count and the reward function's name."""
        for cause, count in self.count_causes().items():
            logger.warning(
                "%s: no score for %d of %d completions: %s", name, count, len(self), cause
            )
