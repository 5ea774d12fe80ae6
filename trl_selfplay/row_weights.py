"""Weigh each row's log-likelihood, in place of counting all rows alike.

In: the parent's collator, batches and model. Out: the same, with a weight a row, so that the
parent's own loss comes out as

    L = − Σ_j r_j Σ_t log p(y_{j,t} | …) / Σ_j r_j T_j

over the rows j of a global batch with T_j completion tokens. With weights of 0 and 1 that is the
parent's loss on the rows of weight 1; the scale of the weights has no influence.

Source: ReST^EM, arXiv 2312.06585, Eq. 3: argmax E[r(x, y) log p(y | x)], r ≥ 0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trl_selfplay.training_data import IGNORE_INDEX

WEIGHT = "weight"


class WeightCollator:
    """Adds the rows' weights, shape (rows,), to the batch of another collator."""

    def __init__(self, collator: Callable[..., Any]) -> None:
        self.collator = collator

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch; a row without a weight counts once."""
        batch = self.collator(rows)
        batch[WEIGHT] = torch.tensor([float(row.get(WEIGHT, 1.0)) for row in rows])
        return batch


def normalize_weights(
    batches: Sequence[dict[str, Any]], device: torch.device, gather: Callable[..., Any] | None
) -> None:
    """Scale the weights in place so that they sum to one a token over one optimizer step.

    The parent divides by the number of tokens Σ_j T_j; weights times Σ_j T_j / Σ_j r_j T_j make
    that the division by Σ_j r_j T_j.

    Args:
        batches: Of one optimizer step in this process.
        device: Where to sum.
        gather: Collects a tensor from all processes; None if each divides by its own tokens.
    """
    tokens = torch.zeros(2, device=device)
    for batch in batches:
        counts = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(1).to(device)
        tokens += torch.stack([counts.sum(), (counts * batch[WEIGHT].to(device)).sum()])
    total = tokens if gather is None else gather(tokens).view(-1, 2).sum(0)
    scale = (total[0] / total[1]).item() if total[1] > 0 else 0.0
    for batch in batches:
        batch[WEIGHT] = batch[WEIGHT] * scale


def weigh_log_probs(model: Callable[..., Any], weights: torch.Tensor) -> Callable[..., Any]:
    """Return a forward whose `log_probs` are multiplied by the weight of their row.

    Args:
        model: Returns `log_probs` of shape (rows, tokens) when called with `fused_lm_head=True`.
        weights: Shape (rows,).
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        outputs = model(*args, **kwargs)
        outputs.log_probs = outputs.log_probs * weights[:, None]
        return outputs

    return forward
