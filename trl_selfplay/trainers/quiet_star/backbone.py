"""A causal language model in two parts: states of all tokens, and logits of those that matter.

In: embeddings and a layout, or states and target tokens. Out: states before the head, and
log-probs whose vocabulary-sized logits exist for one chunk of tokens at a time.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from trl_selfplay.trainers.quiet_star.layout import ThoughtLayout

# Logits that exist at once, in elements: 4 MiB in float32 on a CPU, 512 MiB elsewhere.
CPU_CHUNK_LOGITS = 1 << 20
DEVICE_CHUNK_LOGITS = 1 << 27


def embed(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the input embeddings of tokens, (…, d)."""
    embedded: torch.Tensor = model.get_input_embeddings()(token_ids)
    return embedded


def last_states(model: Any, embeddings: torch.Tensor, layout: ThoughtLayout) -> torch.Tensor:
    """Run the backbone over tokens as `layout` orders them; return (B, T + G·L, d).

    Call it inside `thoughts_attend(model)`. `model` is a causal language model without wrappers.
    """
    # transformers hands a mask of four dimensions on as it is. This one is empty, so attention
    # other than ours, which doesn't look at it, would fail instead of seeing too much.
    no_mask = torch.empty((1, 1, 0, 0), dtype=torch.bool, device=embeddings.device)
    states: torch.Tensor = model.base_model(
        inputs_embeds=embeddings,
        position_ids=layout.position_ids(),
        attention_mask=no_mask,
        use_cache=False,
        thought_layout=layout,
    ).last_hidden_state
    return states


def project(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Apply the model's head to states (…, d), with its scale and soft cap; return (…, V)."""
    config = model.config.get_text_config()
    logits: torch.Tensor = model.get_output_embeddings()(states)
    scale = getattr(config, "logit_scale", None)
    if scale is not None:
        logits = logits * scale
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """Return how many tokens' logits may exist at once."""
    budget = CPU_CHUNK_LOGITS if device.type == "cpu" else DEVICE_CHUNK_LOGITS
    return max(1, budget // vocab_size)


def bar(logits: torch.Tensor, barred: list[int]) -> torch.Tensor:
    """Give the barred tokens no probability; returns `logits` itself if there are none."""
    if not barred:
        return logits
    index = torch.tensor(barred, device=logits.device)
    return logits.index_fill(-1, index, float("-inf"))


def token_log_probs(
    model: Any,
    states: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    barred: list[int] | None = None,
    rows: int | None = None,
) -> torch.Tensor:
    """Return the log-probs of tokens from the states that predict them, float32 (N,).

    Logits are computed for some rows at a time, and again in the backward pass.

    Args:
        model: A causal language model without wrappers.
        states: (N, d).
        targets: Token ids, int64 (N,).
        temperature: What logits are divided by.
        barred: Tokens that are left out of the distribution.
        rows: Rows at a time; None chooses by the vocabulary's size.
    """
    config = model.config.get_text_config()
    rows = chunk_rows(config.vocab_size, states.device) if rows is None else rows
    parts = []
    for first in range(0, max(len(states), 1), rows):
        piece = slice(first, first + rows)
        arguments = (model, states[piece], targets[piece], temperature, barred or [])
        if torch.is_grad_enabled():
            parts.append(
                checkpoint(_score, *arguments, use_reentrant=False, preserve_rng_state=False)
            )
        else:
            parts.append(_score(*arguments))
    return torch.cat(parts)


def _score(
    model: Any, states: torch.Tensor, targets: torch.Tensor, temperature: float, barred: list[int]
) -> torch.Tensor:
    """Return the log-probs of one chunk."""
    logits = bar(project(model, states).float() / temperature, barred)
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


@torch.no_grad()
def describe_predictions(
    model: Any, states: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the entropies of predictions in nats, float32 (N,), and whether they hit, bool (N,).

    Args:
        model: A causal language model without wrappers.
        states: (N, d).
        targets: Token ids, int64 (N,), which the likeliest token hits or not.
    """
    rows = chunk_rows(model.config.get_text_config().vocab_size, states.device)
    entropies, hits = [], []
    for first in range(0, max(len(states), 1), rows):
        logits = project(model, states[first : first + rows]).float()
        entropies.append(entropy(logits.log_softmax(-1)))
        hits.append(logits.argmax(-1) == targets[first : first + rows])
    return torch.cat(entropies), torch.cat(hits)


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats of log-probs (…, V), of which some may be -inf."""
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)
