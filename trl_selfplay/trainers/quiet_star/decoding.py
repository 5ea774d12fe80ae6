"""The next token after a thought: mixed logits of a text's columns, and text that is generated.

In: a text whose keys and values are in memory. Out: logits in which each column has thought, or
new tokens. A thought is dropped after its column: no later token sees it, as in training.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from trl_selfplay.generation.random_streams import gumbel_noise, stream_key, token_words
from trl_selfplay.generation.sampler import SamplingOptions
from trl_selfplay.generation.token_filters import filter_logits
from trl_selfplay.trainers.quiet_star.attention import thoughts_attend
from trl_selfplay.trainers.quiet_star.backbone import bar, embed, last_states, project
from trl_selfplay.trainers.quiet_star.layout import ThoughtLayout, ThoughtMemory, new_text_layout
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, mix
from trl_selfplay.trainers.quiet_star.sampling import continue_thoughts
from trl_selfplay.trainers.quiet_star.storage import ThoughtSettings


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """How thoughts are chosen.

    Attributes:
        num_thoughts: Thoughts a token; with several, their probabilities are averaged.
        thought_temperature: 0.0 takes the likeliest tokens.
        seed: Of the thoughts, and of text that is sampled.
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
    """Return the mixed states (B, U, K, d) of some columns after K thoughts each.

    Call it inside `thoughts_attend(model)`, with the text in `memory`.

    Args:
        model: A causal language model without wrappers, in eval mode.
        settings: How it thinks.
        options: How many thoughts, and their noise.
        memory: Holds the text; its thoughts are overwritten.
        text_mask: Of all text in memory, bool (B, S).
        columns: Rising in each row, int64 (B, U).
        base: The columns' states without thoughts, (B, U, d).
        by_row: Whether equal rows think different thoughts. If not, a thought's noise depends on
            its position and its index alone, so that a row is the same alone and in a batch.
    """
    length, num_thoughts = settings.thought_length, options.num_thoughts
    anchors = columns.repeat_interleave(num_thoughts, dim=1)  # (B, G)
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
        rest = [embed(model, thoughts.tokens[:, :, -1:])]  # not yet in memory
    rest.append(end.expand(*anchors.shape, 1, -1))
    layout = ThoughtLayout(text_mask, anchors, 0, 2, length, memory)
    after = last_states(model, torch.cat(rest, dim=2).flatten(1, 2), layout)  # (B, G·2, d)
    after = after.unflatten(1, (anchors.shape[1], 2))[:, :, -1]
    before = base.repeat_interleave(num_thoughts, dim=1)
    mixed, _ = mix(getattr(model, ATTRIBUTE), before, after)
    return mixed.unflatten(1, (columns.shape[1], num_thoughts))


def average_logits(model: Any, mixed: torch.Tensor) -> torch.Tensor:
    """Return logits (…, V) of states after K thoughts (…, K, d), whose probabilities are averaged."""
    if mixed.shape[-2] == 1:
        return project(model, mixed.squeeze(-2))
    log_probs = project(model, mixed).float().log_softmax(-1)
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

    Each column's depend on the text up to it alone.
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

    Rows of sampled text are independent of each other, thoughts included; greedy text thinks with
    noise that depends on the position alone, so a row is the same alone and in a batch.

    Args:
        model: A causal language model without wrappers, in eval mode.
        settings: How it thinks.
        options: How thoughts are chosen.
        sampling: How tokens are chosen, how many at most, and which of them end a row.
        input_ids: (B, S); shorter rows are padded on the left.
        attention_mask: 1 on text, (B, S).
        pad_token_id: What rows that have ended are filled with.
        should_stop: Says of all ids so far which rows end, bool (B,), beside EOS.
        memory: Takes the text's keys and values; None makes a new one.
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
    new = ids
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
