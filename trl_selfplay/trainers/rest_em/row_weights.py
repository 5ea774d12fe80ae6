"""Weight each row's log-likelihood instead of counting all rows equally.

In: rewards, and the parent's collator and model. Out: a weight per row, and a collator and model that
apply it, so that the parent's own loss over the rows j of an optimizer step, with T_j tokens to learn,
becomes

    L = − Σ_j w_j Σ_t log p(y_{j,t} | …) / Σ_j T_j

Weights are computed once per round, so a row's weight doesn't depend on its batch.

Source: ReST^EM, arXiv 2312.06585, Eq. 3: argmax E[r(x, y) log p(y | x)], r ≥ 0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trl_selfplay.rollouts.rows import WEIGHT


def relative_weights(rewards: Sequence[float | None], lengths: Sequence[int]) -> list[float]:
    """Return each row's weight w_j = r_j Σ_i T_i / Σ_i r_i T_i: its reward divided by the mean.

    The mean is over the tokens to learn, so over a whole round the loss is

        L = − Σ_j r_j Σ_t log p(y_{j,t} | …) / Σ_j r_j T_j

    Weights don't depend on the scale of rewards, and are 1 if all rewards are equal.

    Args:
        rewards: Rewards of at least 0; None for an ungraded row, which has weight 1.0 and isn't part
            of the mean.
        lengths: Number of tokens to learn in each row, T_j.
    """
    graded = [(r, n) for r, n in zip(rewards, lengths, strict=True) if r is not None]
    tokens = sum(length for _, length in graded)
    mean = sum(reward * (length / tokens) for reward, length in graded)
    return [1.0 if r is None else (r / mean if mean > 0.0 else 0.0) for r in rewards]


class WeightCollator:
    """Adds the rows' weights, shape (rows,), to the batch of another collator."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch; a row without a weight counts once."""
        batch = self.collator(rows)
        batch[WEIGHT] = torch.tensor([float(row.get(WEIGHT, 1.0)) for row in rows])
        return batch


def weigh_log_probs(model: Callable[..., Any], weights: torch.Tensor) -> Callable[..., Any]:
    """Return a forward whose `log_probs` are multiplied by the weight of their row.

    Args:
        model: Returns `log_probs` of shape (rows, tokens) when called with `fused_lm_head=True`.
        weights: Shape (rows,).
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = model(*args, **kwargs)
        if kwargs.get("fused_lm_head"):  # else it is asked for logits, after the loss
            outputs.log_probs = outputs.log_probs * weights[:, None]
        return outputs

    return forward
