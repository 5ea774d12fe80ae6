"""Progress while a phase is sampled: a bar that moves with every token, and one forecast of its time.

In: counts of decoded tokens and of finished samples. Out: text on the terminal, and lines of the log.
"""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import ClassVar, Self

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

FORECAST_AFTER_S = 60.0
# By then a forecast comes even if most tokens are still those of unfinished samples.
_FORECAST_BY_S = 300.0

_BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"


class SamplingProgress:
    """A progress bar over samples with tokens/s, the share of prompts solved so far, and abstentions.

    The bar counts what is certainly done: the finished samples, or the decoded tokens if that is more
    when every sample becomes as long as it may. So it moves while the first samples are decoded.

    It logs once how long the whole phase will take: after a minute at the earliest, when half of the
    decoded tokens are those of finished samples. Until then, the finished ones are few and short, and
    say little about the others. After five minutes it logs an upper bound.

    Args:
        total: Number of samples in the phase that this process is expected to finish.
        description: Label of the bar and the forecast, such as "round 0".
        max_completion_length: Maximum tokens per sample.
        disable: Show and log nothing.
        settings: Names of config fields that affect the time, for the forecast.
        clock: Returns the time in seconds; tests pass their own.

    Attributes:
        current: The progress of the phase that is being sampled, None between phases.
    """

    current: ClassVar["SamplingProgress | None"] = None

    def __init__(
        self,
        total: float,
        description: str,
        max_completion_length: int,
        disable: bool = False,
        settings: Sequence[str] = ("num_prompts_per_round", "num_generations"),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self.description = description
        self.settings = tuple(settings)
        self._max_completion_length = max_completion_length
        self._clock = clock
        self._started = clock()
        self._num_restored = 0
        self._num_finished = 0
        self._tokens_of_finished = 0
        self._num_decoded = 0  # tokens
        self._solved: float | None = None
        self._abstained = ""
        self._tells_forecast = not disable
        self._outer: SamplingProgress | None = None  # a judge is asked within its phase
        # A log file gets a line for every refresh; on a terminal they overwrite each other.
        refresh_s = 0.2 if sys.stderr.isatty() else 30.0
        self._bar = tqdm(
            total=round(total),
            desc=description,
            bar_format=_BAR,
            disable=disable,
            mininterval=refresh_s,
            miniters=0,
        )

    def __enter__(self) -> Self:
        self._outer, SamplingProgress.current = SamplingProgress.current, self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        SamplingProgress.current = self._outer
        self._bar.close()

    def expect(self, num_more: float) -> None:
        """Raise, or lower, the number of samples that this process will finish."""
        self.total += num_more
        self._bar.total = round(self.total)
        self._show()

    def decode(self, num_tokens: int) -> None:
        """Count tokens as they are decoded, those of unfinished samples too."""
        self._num_decoded += num_tokens
        self._show()

    def update(self, num_samples: int, num_tokens: int, restored: bool = False) -> None:
        """Count finished samples and their completion tokens.

        Args:
            num_samples: Samples finished since the last call.
            num_tokens: Tokens of their completions. What a sampler doesn't report to `decode` is
                counted here.
            restored: They were read from disk: they advance the bar but don't count for the speed.
        """
        if restored:
            self._num_restored += num_samples
        else:
            self._num_finished += num_samples
            self._tokens_of_finished += num_tokens
            self._num_decoded = max(self._num_decoded, self._tokens_of_finished)
        self._show()

    def set_solved(self, share: float) -> None:
        """Show the share of prompts, among those graded so far, with a passing sample."""
        self._solved = share
        self._show()

    def set_abstained(self, count: int, cause: str | None) -> None:
        """Show how many of the samples graded so far have no reward, and the most frequent cause."""
        self._abstained = f"{count:,} abstained" + (f" ({cause})" if cause else "")
        self._show()

    @property
    def share(self) -> float:
        """The share of the phase that is certainly done, from 0 to 1."""
        return (self._num_restored + self._done) / self.total if self.total else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens decoded in this process, per second."""
        seconds = self._clock() - self._started
        return self._num_decoded / seconds if seconds > 0 else 0.0

    @property
    def _done(self) -> float:
        """The number of samples that what was decoded here amounts to, at least."""
        to_sample = self.total - self._num_restored
        at_least = self._num_decoded / self._max_completion_length
        return min(max(at_least, self._num_finished), to_sample)

    def _show(self) -> None:
        self._tell_forecast()
        parts = [f"{self._num_restored + self._num_finished:,}/{round(self.total):,} samples"]
        if self._num_decoded:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        if self._solved is not None:
            parts.append(f"{self._solved:.0%} solved")
        if self._abstained:
            parts.append(self._abstained)
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        # Samples are counted in one thread and graded in another: set, since both would add.
        self._bar.n = self._num_restored + self._done
        self._bar.update(0)

    def _tell_forecast(self) -> None:
        seconds = self._clock() - self._started
        to_sample = self.total - self._num_restored
        is_reliable = self._tokens_of_finished >= self._num_decoded / 2
        if (
            not self._tells_forecast
            or seconds < FORECAST_AFTER_S
            or not (is_reliable or seconds >= _FORECAST_BY_S)
            or self._done == 0
            or self._num_finished >= to_sample
        ):
            return
        self._tells_forecast = False
        logger.warning(
            "%s: %s completions, %s %s; see %s",
            self.description,
            f"{round(to_sample):,}",
            "about" if is_reliable else "at most",
            format_duration(forecast(self._done, to_sample, seconds)),
            ", ".join(f"`{name}`" for name in self.settings),
        )


def forecast(done: float, total: float, seconds: float) -> float:
    """Return the time in seconds for `total` samples if `done` took `seconds`.

    Raises:
        ValueError: Nothing is done yet.
    """
    if done <= 0:
        raise ValueError("a forecast needs something that is done.")
    return seconds * total / done


def format_duration(seconds: float) -> str:
    """Return a duration in a readable unit.

    >>> format_duration(111_600)
    '31 h'
    """
    for unit, size, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72)):
        if seconds < most * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"


def say(text: str) -> None:
    """Print a status line above any progress bar."""
    tqdm.write(text)
