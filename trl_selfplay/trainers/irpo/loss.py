"""The second term of IRPO's loss: the likelihood of the chosen completions, with equal weight per row.

In: a model that DPOTrainer calls. Out: the same model with its log-probs kept, and the term.

Source: IRPO, arXiv 2404.19733, equation 1. TRL's "sft" loss differs: it gives each token of the batch
the same weight, so that a long completion counts more.
"""

from collections.abc import Callable
from typing import Any

import torch


class KeptLogProbs:
    """A model's forward that keeps the log-probs of the one call in which the parent asks for them."""

    def __init__(self, model: Callable[..., Any]) -> None:
        self.model = model
        self.log_probs = torch.empty(0)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's outputs."""
        outputs = self.model(*args, **kwargs)
        if kwargs.get("fused_lm_head"):  # the other call, after the loss, is for logits
            self.log_probs = outputs.log_probs
        return outputs


def chosen_nll(log_probs: torch.Tensor, completion_mask: torch.Tensor) -> torch.Tensor:
    """Return −log π(y_w) / |y_w|, averaged over the rows of a batch.

    Args:
        log_probs: Log-prob of each next token, 0 outside of completions; shape
            (2 * rows, tokens - 1), the chosen completions first.
        completion_mask: 1 on the tokens of completions that the policy wrote; shape
            (2 * rows, tokens).
    """
    chosen, _ = log_probs.chunk(2)
    mask, _ = completion_mask[:, 1:].chunk(2)
    return -(chosen.sum(dim=1) / mask.sum(dim=1)).mean()
