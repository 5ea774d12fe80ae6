"""The loss: the text's likelihood with and without thoughts, and REINFORCE on the thoughts.

In: log-probs of the text with and without thoughts, and of the thoughts. Out: advantages, and sums
that add up over rows, accumulated batches and processes. Source: arXiv 2403.09629, section 4.4.
"""

from dataclasses import dataclass

import torch

BASELINES = ("mean", "leave_one_out", "base")


@dataclass(frozen=True, slots=True)
class ObjectiveSums:
    """The three terms of the loss, summed over a batch.

    Attributes:
        base: −log p_base, summed over labelled tokens.
        talk: −log p_talk, averaged over thoughts and tokens ahead, summed over thinking columns.
        policy: −A·log π(thought), averaged over thoughts, summed over thinking columns.
    """

    base: torch.Tensor
    talk: torch.Tensor
    policy: torch.Tensor


def advantages(rewards: torch.Tensor, base: torch.Tensor, baseline: str) -> torch.Tensor:
    """Return the advantage A of each thought, (…, K), without gradient.

    The baselines for a reward r:

    - "mean", the paper's: A = max(r − mean over the column's thoughts, 0).
    - "base": A = max(r − log-likelihood without thoughts, 0).
    - "leave_one_out": A = r − mean over the other thoughts. It has a sign, and its REINFORCE
      gradient is unbiased.

    Args:
        rewards: Σ_t log p_talk(X_{j+t}) of each of the K thoughts, (…, K).
        base: Σ_t log p_base(X_{j+t}), (…, 1).
        baseline: One of `BASELINES`.

    Raises:
        ValueError: The baseline is unknown.

    Source: Quiet-STaR, arXiv 2403.09629, equations 6 and 7; leave-one-out as RLOO,
        arXiv 2402.14740.
    """
    # The likelihood terms of the loss train the rewards; REINFORCE must not do so again.
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
        base_log_probs: log p_base, with that of token j + 1 in column j, (B, S − 1).
        columns: Thinking columns, (B, U).
        num_ahead_tokens: n_true.
    """
    steps = torch.arange(num_ahead_tokens, device=columns.device)
    # Real columns have n_true tokens after them; the clamp is for columns that aren't real.
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
        base_log_probs: log p_base of each token, (B, S − 1).
        labelled: True for the tokens that count, bool (B, S − 1).
        talk_log_probs: log p_talk, 0 on columns that aren't real, (B, U, K, n_true).
        thought_log_probs: log π of each thought, 0 on columns that aren't real, (B, U, K).
        advantage: Advantage of each thought, 0 on columns that aren't real, (B, U, K).

    Source: Quiet-STaR, arXiv 2403.09629, equations 6 to 8. L_policy sums over a thought's tokens;
        the official code averages over them and scores them at temperature 3.
    """
    return ObjectiveSums(
        base=-(base_log_probs * labelled).sum(),
        talk=-talk_log_probs.mean((2, 3)).sum(),
        policy=-(advantage * thought_log_probs).mean(2).sum(),
    )
