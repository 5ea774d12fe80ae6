"""A causal language model in two parts: hidden states of all tokens, and logits of selected ones.

In: embeddings and a layout, or states and target tokens. Out: states before the head, and
log-probs. Logits are vocabulary-sized, so they exist for one chunk of tokens at a time.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from trl_selfplay.trainers.quiet_star.layout import ThoughtLayout
from trl_selfplay.trainers.quiet_star.replaced_attention import WITHOUT_POSITION_IDS, mask_with

# Maximum number of logits at once: 4 MiB in float32 on a CPU, 256 MiB elsewhere.
CPU_CHUNK_LOGITS = 1 << 20
DEVICE_CHUNK_LOGITS = 1 << 26


def embed(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the input embeddings of tokens, (…, d)."""
    embedded: torch.Tensor = model.get_input_embeddings()(token_ids)
    return embedded


def last_states(model: Any, embeddings: torch.Tensor, layout: ThoughtLayout) -> torch.Tensor:
    """Run the backbone over tokens in the order of `layout`; return states (B, T + G·L, d).

    Call this inside `thoughts_attend(model)`. `model` is a causal language model without wrappers.
    """
    positions = {}
    if type(model).__name__ not in WITHOUT_POSITION_IDS:
        positions["position_ids"] = layout.position_ids()
    states: torch.Tensor = model.base_model(
        inputs_embeds=embeddings,
        attention_mask=mask_with(layout, embeddings.device),
        use_cache=False,
        **positions,
    ).last_hidden_state
    return states


def project(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Apply the model's head with its scale and soft cap to states (…, d); return logits (…, V)."""
    config = model.config.get_text_config()
    if type(model).__name__ == "ModernBertDecoderForCausalLM":
        states = model.lm_head(states)  # a dense layer and a norm before its output embeddings
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
    """Return the maximum number of tokens whose logits are computed at once."""
    budget = CPU_CHUNK_LOGITS if device.type == "cpu" else DEVICE_CHUNK_LOGITS
    return max(1, budget // vocab_size)


def bar(logits: torch.Tensor, barred: list[int]) -> torch.Tensor:
    """Set the logits of barred tokens to -inf; without any, return `logits` itself."""
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
    """Return the log-probs of tokens given the states that predict them, float32 (N,).

    Logits are computed chunk by chunk, and again in the backward pass.

    Args:
        model: A causal language model without wrappers.
        states: States that predict the tokens, (N, d).
        targets: Token ids, int64 (N,).
        temperature: Divides the logits.
        barred: Tokens excluded from the distribution.
        rows: Rows per chunk. None: chosen by the size of the vocabulary.
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
    """Return the log-probs of one chunk, (n,)."""
    logits = bar(project(model, states).float() / temperature, barred)
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")


@torch.no_grad()
def describe_predictions(
    model: Any, states: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each prediction's entropy in nats, float32 (N,), and whether it is right, bool (N,).

    Args:
        model: A causal language model without wrappers.
        states: States that predict the tokens, (N, d).
        targets: Token ids, int64 (N,), compared with the most likely token.
    """
    rows = chunk_rows(model.config.get_text_config().vocab_size, states.device)
    entropies, hits = [], []
    for first in range(0, max(len(states), 1), rows):
        logits = project(model, states[first : first + rows]).float()
        entropies.append(entropy(logits.log_softmax(-1)))
        hits.append(logits.argmax(-1) == targets[first : first + rows])
    return torch.cat(entropies), torch.cat(hits)


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats of log-probs (…, V), some of which may be -inf."""
    # The clamp avoids 0 · -inf, which is NaN.
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)
