"""Predict the next token after a thought: mixed logits of a text, and generation.

In: a text whose keys and values are in memory. Out: the logits of each column after its thoughts,
or new tokens. As in training, no later token sees a thought.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trl_selfplay.generation.random_streams import gumbel_noise, stream_key, token_words
from trl_selfplay.generation.sampler import SamplingOptions
from trl_selfplay.generation.token_filters import filter_logits
from trl_selfplay.trainers.quiet_star.backbone import bar, embed, last_states, project
from trl_selfplay.trainers.quiet_star.layout import ThoughtLayout, ThoughtMemory, new_text_layout
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, mix
from trl_selfplay.trainers.quiet_star.replaced_attention import thoughts_attend
from trl_selfplay.trainers.quiet_star.sampling import continue_thoughts
from trl_selfplay.trainers.quiet_star.storage import ThoughtSettings


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """How thoughts are sampled.

    Attributes:
        num_thoughts: Thoughts per token; the probabilities after several thoughts are averaged.
        thought_temperature: Temperature of the thoughts; 0.0 is greedy.
        seed: Seeds the thoughts, and the text if it is sampled.
    """

    num_thoughts: int = 1
    thought_temperature: float = 1.0
    seed: int = 0


@torch.no_grad()
def think_at(
    model: Any,
    settings: ThoughtSettings,
    options: DecodingOptions,
    memory: ThoughtMemory,
    text_mask: torch.Tensor,
    columns: torch.Tensor,
    base: torch.Tensor,
    by_row: bool = False,
) -> torch.Tensor:
    """Return the mixed states (B, U, K, d) of the given columns after K thoughts each.

    Call this inside `thoughts_attend(model)`, with the text in `memory`.

    Args:
        model: A causal language model without wrappers, in eval mode.
        settings: Length of the thoughts, and barred tokens.
        options: Number, temperature and seed of the thoughts.
        memory: Holds the text; its thoughts are overwritten.
        text_mask: True for text in memory and False for padding, bool (B, S).
        columns: Columns in ascending order, int64 (B, U).
        base: States of the columns without thoughts, (B, U, d).
        by_row: If True, equal rows think different thoughts. If False, a thought's noise depends only
            on its position and index, so that a row gets the same thoughts alone and in a batch.
    """
    length, num_thoughts = settings.thought_length, options.num_thoughts
    anchors = columns.repeat_interleave(num_thoughts, dim=1)  # (B, G), G = U·K
    start, end = getattr(model, ATTRIBUTE).start_and_end().to(base.dtype)
    memory.forget_thoughts(capacity=length + 2)
    positions = (text_mask.long().cumsum(1) - 1).clamp(min=0).gather(1, columns)
    keys = [
        stream_key(options.seed, 0, "eval", f"{b}/{position}" if by_row else str(position), s)
        for b, row in enumerate(positions.tolist())
        for position in row
        for s in range(num_thoughts)
    ]
    rest = [start.expand(*anchors.shape, 1, -1)]
    if length:
        thoughts = continue_thoughts(
            model, start, text_mask, anchors, memory, length, keys,
            temperature=options.thought_temperature, barred=settings.barred,
        )  # fmt: skip
        # Sampling never feeds the last token back, so it isn't in memory yet.
        rest = [embed(model, thoughts.tokens[:, :, -1:])]  # (B, G, 1, d)
    rest.append(end.expand(*anchors.shape, 1, -1))
    # Two tokens per block follow: the last thought token (or the start) and the end, which predicts
    # the next token of the text.
    layout = ThoughtLayout(text_mask, anchors, 0, 2, length, memory)
    after = last_states(model, torch.cat(rest, dim=2).flatten(1, 2), layout)  # (B, G·2, d)
    after = after.unflatten(1, (anchors.shape[1], 2))[:, :, -1]
    before = base.repeat_interleave(num_thoughts, dim=1)
    mixed, _ = mix(getattr(model, ATTRIBUTE), before, after)
    return mixed.unflatten(1, (columns.shape[1], num_thoughts))


def average_logits(model: Any, mixed: torch.Tensor) -> torch.Tensor:
    """Return logits (…, V) from states after K thoughts (…, K, d), averaging the probabilities."""
    if mixed.shape[-2] == 1:
        return project(model, mixed.squeeze(-2))
    # log of the mean over K of exp(log p)
    log_probs = project(model, mixed).float().log_softmax(-1)  # (…, K, V)
    return log_probs.logsumexp(-2) - torch.tensor(float(mixed.shape[-2])).log()


@torch.no_grad()
def mixed_logits(
    model: Any,
    settings: ThoughtSettings,
    options: DecodingOptions,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
) -> torch.Tensor:
    """Return the logits of every column after its thoughts, (B, S, V).

    They depend only on the text up to the column.
    """
    text_mask, memory = attention_mask.bool(), ThoughtMemory()
    num_columns = input_ids.shape[1]
    with thoughts_attend(model):
        layout = new_text_layout(text_mask, num_columns, memory)
        base = last_states(model, embed(model, input_ids), layout)
        columns = torch.arange(num_columns, device=base.device).expand(len(base), -1)
        mixed = think_at(model, settings, options, memory, text_mask, columns, base)
    return average_logits(model, mixed)


@torch.no_grad()
def generate_with_thoughts(
    model: Any,
    settings: ThoughtSettings,
    options: DecodingOptions,
    sampling: SamplingOptions,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    pad_token_id: int,
    should_stop: Callable[[torch.Tensor], torch.Tensor] | None = None,
    memory: ThoughtMemory | None = None,
) -> torch.Tensor:
    """Continue texts, thinking before each token; return (B, S + new tokens).

    Sampled rows, including their thoughts, are independent of each other. Greedy decoding uses
    thoughts whose noise depends only on the position, so a row is the same alone and in a batch.

    Args:
        model: A causal language model without wrappers, in eval mode.
        settings: Length of the thoughts, and barred tokens.
        options: Number, temperature and seed of the thoughts.
        sampling: How tokens are chosen, the maximum number of new tokens, and the EOS ids.
        input_ids: Prompts, (B, S); shorter rows are padded on the left.
        attention_mask: 1 on text, 0 on padding, (B, S).
        pad_token_id: Fills rows that have ended.
        should_stop: Maps all ids so far to the rows that end, bool (B,), in addition to EOS.
        memory: Receives keys and values of the text; None creates a new one.
    """
    memory = ThoughtMemory() if memory is None else memory
    text_mask, ids = attention_mask.bool(), input_ids
    words = token_words(model.config.get_text_config().vocab_size, ids.device)
    stops = torch.tensor(sampling.eos_token_ids, dtype=torch.long, device=ids.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    row_keys = [stream_key(options.seed, 1, "eval", f"row {b}", 0) for b in range(len(ids))]
    samples = sampling.temperature > 0.0
    seen = None
    if sampling.repetition_penalty != 1.0:
        seen = torch.zeros((len(ids), len(words)), dtype=torch.bool, device=ids.device)
        seen[text_mask.nonzero()[:, 0], ids[text_mask]] = True
    new = ids  # (B, S), then (B, 1): what isn't in memory yet
    with thoughts_attend(model):
        for step in range(sampling.max_completion_length):
            layout = new_text_layout(text_mask, new.shape[1], memory)
            base = last_states(model, embed(model, new), layout)[:, -1:]
            columns = torch.full((len(ids), 1), ids.shape[1] - 1, device=ids.device)
            mixed = think_at(model, settings, options, memory, text_mask, columns, base, samples)
            logits = bar(average_logits(model, mixed)[:, 0].float(), list(settings.barred))
            logits = filter_logits(logits, sampling, seen)
            if samples:
                logits = logits + gumbel_noise(words, row_keys, step)
            new = logits.argmax(-1, keepdim=True).masked_fill(ended[:, None], pad_token_id)
            if seen is not None:
                seen.scatter_(1, new, True)
            ids = torch.cat([ids, new], dim=1)
            text_mask = torch.nn.functional.pad(text_mask, (0, 1), value=True)
            ended |= torch.isin(new[:, 0], stops)
            if should_stop is not None:
                ended |= should_stop(ids)
            if bool(ended.all()):
                break
    return ids
