"""Compare an engine's log-probs with those of the trainer's model: same policy, and the newest one?

In: summed log-probs of the same completions from the engine, under the current weights and under those
before. Out: `Agreement`, or an error if the engine samples from another policy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Largest mean difference of log-probs, in nats per token, that rounding explains: between two float32
# computations, between others, and where one side is quantized, which is another policy.
LIMIT_FLOAT32, LIMIT_REDUCED, LIMIT_QUANTIZED = 1e-3, 0.05, 1.0
# With fewer completions, a larger standard error of the place, or a place within so many standard errors
# of the middle, nothing is told. A current engine is then taken for a stale one once in 5,000 times.
_LEAST_COMPLETIONS, _LARGEST_ERROR, _STANDARD_ERRORS = 4, 0.2, 2.0


class EngineMismatchError(RuntimeError):
    """The engine samples from another policy than the one that is trained."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well an engine's log-probs agree with the trainer's.

    Attributes:
        gap: Mean over completions of the absolute difference of their log-probs per token, in nats.
        limit: The largest gap that is accepted.
        tokens: Tokens that were compared.
        place: Where the engine's log-probs lie on the line from those under the current weights (0) to
            those under the weights before (1); None if there are none to compare with.
        place_error: Standard error of `place`.
    """

    gap: float
    limit: float
    tokens: int
    place: float | None = None
    place_error: float | None = None

    @property
    def tells_rounds_apart(self) -> bool:
        """Whether it is certain which of the two sets of weights the engine has."""
        if self.place is None or self.place_error is None:
            return False
        is_clear = abs(self.place - 0.5) > _STANDARD_ERRORS * self.place_error
        return is_clear and self.place_error <= _LARGEST_ERROR

    def check(self) -> None:
        """Raise EngineMismatchError if the engine has other weights than the trainer."""
        if self.tells_rounds_apart and self.place is not None and self.place > 0.5:
            raise EngineMismatchError(
                f"the engine samples with the weights of the last hand-over and not with the current "
                f"ones: its log-probs of {self.tokens} tokens lie {self.place:.2f} of the way from "
                "the current weights (0) to the last ones (1). Nothing was kept of what it sampled. "
                "If a server samples, it ignored the new adapter; otherwise please report this."
            )
        if not self.gap <= self.limit:
            raise EngineMismatchError(
                f"the engine's log-probs differ from those of the trainer's model by {self.gap:.3g} "
                f"per token over {self.tokens} tokens, and {self.limit:g} can be rounding: it samples "
                "from another policy. Nothing was kept of what it sampled. Does the model's source "
                "hold the weights that the trainer has, and the engine support the model (its "
                "scaling of positions, for example)? A server must run with --logprobs-mode "
                "processed_logprobs. Otherwise set use_vllm=False."
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers for a record, rounded."""
        return {
            "gap": _rounded(self.gap),
            "limit": self.limit,
            "tokens": self.tokens,
            "place": None if self.place is None else _rounded(self.place),
            "nearer_to": self.nearer_to,
        }

    @property
    def nearer_to(self) -> str:
        """Which weights the engine has, in a word: "current", "last" or "not told"."""
        if not self.tells_rounds_apart or self.place is None:
            return "not told"
        return "last" if self.place > 0.5 else "current"


def compare(
    engine: Sequence[float],
    current: Sequence[float],
    last: Sequence[float] | None,
    lengths: Sequence[int],
    limit: float,
) -> Agreement:
    """Compare summed log-probs of the same completions.

    `place` is the slope of a regression through the origin of (engine - current) on (last - current).
    What lies beside the line, rounding and quantization, gives its standard error.

    Args:
        engine: From the engine.
        current: Under the current weights.
        last: Under the weights before, or None.
        lengths: Tokens of each completion.
        limit: Largest gap that is accepted.
    """
    offsets = [e - c for e, c in zip(engine, current, strict=True)]
    gaps = [abs(offset) / length for offset, length in zip(offsets, lengths, strict=True)]
    gap, tokens = sum(gaps) / len(gaps), sum(lengths)
    if last is None or len(offsets) < _LEAST_COMPLETIONS:
        return Agreement(gap, limit, tokens)
    steps = [p - c for p, c in zip(last, current, strict=True)]
    length = sum(step * step for step in steps)
    if not length > 0.0 or not math.isfinite(length):  # the weights are the same
        return Agreement(gap, limit, tokens)
    place = sum(o * s for o, s in zip(offsets, steps, strict=True)) / length
    beside = sum((o - place * s) ** 2 for o, s in zip(offsets, steps, strict=True))
    error = math.sqrt(beside / (len(offsets) - 1) / length)
    return Agreement(gap, limit, tokens, place, error)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
