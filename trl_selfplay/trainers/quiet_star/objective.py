"""What thoughts are trained for: the text's likelihood, and REINFORCE on the thoughts themselves.

In: log-probs of the text with and without thoughts, and of the thoughts. Out: advantages, and sums
that add up over rows, accumulated batches and processes. Source: arXiv 2403.09629, section 4.4.
"""

from dataclasses import dataclass

import torch

BASELINES = ("mean", "leave_one_out", "base")


@dataclass(frozen=True, slots=True)
class ObjectiveSums:
    """The three terms of the loss, summed over the labelled tokens or thinking columns of a batch.

    Attributes:
        base: Σ −log p_base over labelled tokens.
        talk: Σ over columns of the mean over thoughts and tokens ahead of −log p_talk.
        policy: Σ over columns of the mean over thoughts of −A·log π(thought).
    """

    base: torch.Tensor
    talk: torch.Tensor
    policy: torch.Tensor


def advantages(rewards: torch.Tensor, base: torch.Tensor, baseline: str) -> torch.Tensor:
    """Return the advantage A of each thought; no gradient flows through it.

    "mean": A = max(r − mean over the column's thoughts, 0), the paper's. "base": A =
    max(r − log-likelihood without thought, 0). "leave_one_out": A = r − mean of the others, signed,
    whose REINFORCE gradient is unbiased.

    Args:
        rewards: Σ_t log p_talk(X_{j+t}), (…, K).
        base: Σ_t log p_base(X_{j+t}), (…, 1).
        baseline: One of `BASELINES`.

    Source: Quiet-STaR, arXiv 2403.09629, equations 6 and 7; leave-one-out as RLOO,
        arXiv 2402.14740.
    """
    rewards, base = rewards.detach(), base.detach()
    if baseline == "mean":
        return (rewards - rewards.mean(-1, keepdim=True)).clamp(min=0.0)
    if baseline == "base":
        return (rewards - base).clamp(min=0.0)
    if baseline == "leave_one_out":
        others = (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)
        return rewards - others
    raise ValueError(f"unknown baseline {baseline!r}; choose one of {BASELINES}.")


def base_ahead(
    base_log_probs: torch.Tensor, columns: torch.Tensor, num_ahead_tokens: int
) -> torch.Tensor:
    """Return log p_base of the n_true tokens after each column, (B, U, n_true).

    Args:
        base_log_probs: Column j holds that of token j + 1, (B, S − 1).
        columns: (B, U).
        num_ahead_tokens: n_true.
    """
    steps = torch.arange(num_ahead_tokens, device=columns.device)
    index = (columns[:, :, None] + steps).clamp(max=base_log_probs.shape[1] - 1)
    return base_log_probs.gather(1, index.flatten(1)).unflatten(1, index.shape[1:])


def objective_sums(
    base_log_probs: torch.Tensor,
    labelled: torch.Tensor,
    talk_log_probs: torch.Tensor,
    thought_log_probs: torch.Tensor,
    advantage: torch.Tensor,
) -> ObjectiveSums:
    """Sum the terms of L = α·NLL_base + (1 − α)/n_true · Σ_t NLL_talk,t + λ·L_policy.

    Args:
        base_log_probs: (B, S − 1).
        labelled: Which of them count, bool (B, S − 1).
        talk_log_probs: 0 on columns that aren't real, (B, U, K, n_true).
        thought_log_probs: The same, (B, U, K).
        advantage: The same, (B, U, K).

    Source: Quiet-STaR, arXiv 2403.09629, equations 6 to 8. L_policy sums a thought's tokens; the
        official code takes their mean and scores them at temperature 3.
    """
    return ObjectiveSums(
        base=-(base_log_probs * labelled).sum(),
        talk=-talk_log_probs.mean((2, 3)).sum(),
        policy=-(advantage * thought_log_probs).mean(2).sum(),
    )
