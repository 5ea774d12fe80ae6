"""Log-probs of given completions under the trainer's own model, as an engine reports them.

In: prompts and completions as token ids, and the options they were sampled with. Out: for each completion
the sum of its tokens' log-probs after penalty, temperature and filters, renormalised.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trl_selfplay.generation.model_traits import ModelTraits, input_device, sampling_state
from trl_selfplay.generation.sampler import SamplingOptions
from trl_selfplay.generation.token_filters import (
    excluded_ids,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
)


def score_completions(
    model: nn.Module,
    accelerator: Accelerator | None,
    traits: ModelTraits,
    completions: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
    options: SamplingOptions,
    token_ids: Collection[int],
) -> list[float]:
    """Return the summed log-prob of each completion, in nats, in the precision of sampling.

    Each row is computed alone and without a cache. A token outside the support that its filters leave,
    which rounding lets in on one side of the boundary alone, is added to the support.

    Args:
        model: As the trainer holds it; its state is restored.
        accelerator: The trainer's accelerator, for unwrapping and mixed precision.
        traits: The model's traits.
        completions: (prompt ids, completion ids) of each, both with at least one token.
        options: What they were sampled with.
        token_ids: Ids that could be sampled, besides those that end a completion.
    """
    with sampling_state(model, accelerator) as ready, torch.no_grad():
        return [
            _score(ready, accelerator, traits, prompt, completion, options, token_ids)
            for prompt, completion in completions
        ]


def _score(
    model: Any,
    accelerator: Accelerator | None,
    traits: ModelTraits,
    prompt: tuple[int, ...],
    completion: tuple[int, ...],
    options: SamplingOptions,
    token_ids: Collection[int],
) -> float:
    device, count = input_device(model), len(completion)
    input_ids = torch.tensor([[*prompt, *completion]], device=device)
    kwargs = {"logits_to_keep": count + 1} if traits.takes_logits_to_keep else {}
    autocast = torch.autocast(device.type, enabled=False)
    with autocast if accelerator is None else accelerator.autocast():
        outputs = model(input_ids=input_ids, use_cache=False, **kwargs)
    logits = outputs.logits[0, -count - 1 : -1].float()  # (tokens, V)
    tokens = torch.tensor(completion, device=logits.device)
    logits[:, excluded_ids(logits.shape[1], token_ids, options)] = -torch.inf
    unfiltered = replace(options, top_k=0, top_p=1.0, min_p=None)
    scaled = filter_logits(logits, unfiltered, _seen(prompt, tokens, logits))
    kept = scaled.clone()
    if options.temperature > 0.0:  # in vLLM's order, which has min_p first
        kept = keep_min_p(kept, options.min_p or 0.0)
        kept = keep_top_k(kept, options.top_k or kept.shape[1])
        kept = kept if options.top_p == 1.0 else keep_top_p(kept, options.top_p)
    own = scaled.gather(1, tokens[:, None])
    kept.scatter_(1, tokens[:, None], own)
    return float((own[:, 0] - kept.logsumexp(dim=-1)).sum())


def _seen(prompt: tuple[int, ...], tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return, for each token, which ids occur before it: bool (tokens, V)."""
    known = [token for token in prompt if token < logits.shape[1]]
    seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    seen[:, known] = True
    for place, token in enumerate(tokens.tolist()):
        seen[place + 1 :, token] = True
    return seen
