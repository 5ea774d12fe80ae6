"""Turn a step's logits into the logits to sample from, for the whole batch.

In: float32 logits (B, V) and the sampling options. Out: logits with penalty and temperature applied,
and -inf for filtered tokens. Semantics and order are those of transformers' `generate`: repetition
penalty, temperature, top_k, top_p, min_p.
"""

import math
from collections.abc import Collection

import torch

from trl_selfplay.generation.sampler import SamplingOptions

# First guess of the number of tokens that hold the mass top_p. Sorting a whole vocabulary takes
# longer than the model's forward. The guess grows for rows that need more tokens, so the result is
# exact. A device waits for the check whether it was enough, so its guess is larger.
_TOP_P_FIRST_GUESS = 64
_TOP_P_FIRST_GUESS_ON_DEVICE = 1024
_TOP_P_GROWTH = 32


def excluded_ids(
    vocab_size: int, token_ids: Collection[int], options: SamplingOptions
) -> list[int]:
    """Return, ascending, the ids that are never sampled.

    Args:
        vocab_size: Width of the logits.
        token_ids: Ids in the tokenizer's vocabulary.
        options: Say which other ids end a completion, and may be sampled.
    """
    return sorted(set(range(vocab_size)) - {*token_ids, *options.eos_token_ids})


def filter_logits(
    logits: torch.Tensor, options: SamplingOptions, seen: torch.Tensor | None
) -> torch.Tensor:
    """Apply all filters of the options in transformers' order; may change `logits` in place.

    Args:
        logits: Float32 (B, V).
        options: The sampling options. At temperature 0 only the penalty applies, as in `generate`
            without sampling.
        seen: Tokens of each row's prompt and completion, bool (B, V); needed if
            `repetition_penalty` isn't 1.

    Returns:
        Float32 (B, V); its softmax is the distribution to sample from.
    """
    if options.repetition_penalty != 1.0:
        assert seen is not None
        logits = apply_repetition_penalty(logits, seen, options.repetition_penalty)
    if options.temperature == 0.0:
        return logits
    if options.temperature != 1.0:
        logits = logits.div_(options.temperature)
    if options.top_k > 0:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p < 1.0:
        logits = keep_top_p(logits, options.top_p)
    if options.min_p is not None:
        logits = keep_min_p(logits, options.min_p)
    return logits


def apply_repetition_penalty(
    logits: torch.Tensor, seen: torch.Tensor, penalty: float
) -> torch.Tensor:
    """Divide positive logits of seen tokens by the penalty and multiply negative ones.

    Source: CTRL, arXiv 1909.05858, section 4.1, as transformers extends it to the prompt.
    """
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def keep_top_k(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Set all but the `top_k` largest logits of each row to -inf; ties with the last are kept."""
    smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill_(logits < smallest, -math.inf)


def keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of most likely tokens whose mass reaches `top_p`, at least one token.

    Source: nucleus sampling, arXiv 1904.09751, section 3.1.
    """
    vocab_size = logits.shape[-1]
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    kept = torch.full_like(logits, -math.inf)
    rows = torch.arange(logits.shape[0], device=logits.device)
    on_cpu = logits.device.type == "cpu"
    guess = _TOP_P_FIRST_GUESS if on_cpu else _TOP_P_FIRST_GUESS_ON_DEVICE
    count = min(guess, vocab_size)
    while True:
        # `rows` are those whose mass isn't reached yet, all of them at first.
        part = logits if len(rows) == len(logits) else logits[rows]
        values, indices = part.topk(count, dim=-1)  # (rows, count), descending
        probs = (values - log_total[rows]).exp_()
        mass = probs.cumsum(dim=-1)
        # Keep a token while the mass of the more likely ones is below top_p.
        dropped = (mass - probs) >= top_p
        dropped[:, 0] = False
        # Rows that need more tokens are overwritten in the next pass.
        kept[rows[:, None], indices] = values.masked_fill_(dropped, -math.inf)
        if count == vocab_size:
            return kept
        rows = rows[mass[:, -1] < top_p]
        if len(rows) == 0:
            return kept
        count = min(count * _TOP_P_GROWTH, vocab_size)


def keep_min_p(logits: torch.Tensor, min_p: float) -> torch.Tensor:
    """Keep tokens with at least `min_p` times the probability of the most likely token.

    Source: min-p sampling, arXiv 2407.01082, section 3.
    """
    if min_p <= 0.0:
        return logits
    smallest = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
    return logits.masked_fill_(logits < smallest, -math.inf)
