"""Thoughts one at a time, each written into an ordinary sequence: what everything must equal."""

from typing import Any, NamedTuple

import torch

from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE


class Scores(NamedTuple):
    """One thought's log p_talk and mixing weights (n_true,), and its tokens' log π (n,)."""

    talk: torch.Tensor
    weights: torch.Tensor
    thought: torch.Tensor


def states_of(model: Any, embeddings: torch.Tensor) -> torch.Tensor:
    """Run the stock backbone on one sequence (S, d)."""
    return model.base_model(inputs_embeds=embeddings[None], use_cache=False).last_hidden_state[0]


def logits_of(model: Any, states: torch.Tensor) -> torch.Tensor:
    """Let the model's own forward apply its head to states (N, d) or (d,), in place of its backbone's."""

    backbone = model.base_model
    if type(model).__name__ == "OPTForCausalLM":  # its forward calls the inner module
        backbone = backbone.decoder

    def replace(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = states[None]
        return output

    if states.ndim == 1:
        return logits_of(model, states[None])[0]
    if not len(states):
        return states.new_empty((0, model.get_output_embeddings().weight.shape[0]))
    hook = backbone.register_forward_hook(replace)
    ids = torch.zeros((1, len(states)), dtype=torch.long)
    logits = model(input_ids=ids, use_cache=False).logits[0].float()
    hook.remove()
    return logits


def naive_scores(
    model: Any,
    row: torch.Tensor,
    column: int,
    tokens: torch.Tensor,
    num_ahead: int,
    temperature: float = 1.0,
    barred: tuple[int, ...] = (),
) -> Scores:
    """Score a thought after a column of a row (S,) of token ids without padding."""
    embed, extra = model.get_input_embeddings(), getattr(model, ATTRIBUTE)
    start, end = extra.vectors * extra.scale
    true = row[column + 1 : column + num_ahead]
    prefix = embed(row[: column + 1])
    sequence = torch.cat([prefix, start[None], embed(tokens), end[None], embed(true)])
    after = states_of(model, sequence)[column + 1 :]
    before = states_of(model, embed(row))[column : column + num_ahead]
    own = logits_of(model, after[: len(tokens)]) / temperature
    own[:, list(barred)] = float("-inf")
    talking = after[len(tokens) + 1 :]
    weights = extra.head(torch.cat([before, talking], -1))
    mixed = (1 - weights) * before + weights * talking
    targets = row[column + 1 : column + 1 + num_ahead]
    talk = logits_of(model, mixed).log_softmax(-1)
    return Scores(
        talk[torch.arange(num_ahead), targets],
        weights[:, 0],
        own.log_softmax(-1)[torch.arange(len(tokens)), tokens],
    )


def dense_mask(
    num_text: int, anchors: list[int], block: int, window: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mask over all pairs, bool (1, 1, N, N), and position ids (1, N)."""
    total = num_text + len(anchors) * block
    mask = torch.zeros((total, total), dtype=torch.bool)
    positions = torch.zeros(total, dtype=torch.long)
    for i in range(num_text):
        mask[i, : i + 1] = True
        positions[i] = i
    for g, anchor in enumerate(anchors):
        first = num_text + g * block
        for i in range(block):
            mask[first + i, : anchor + 1] = True
            mask[first + i, first : first + i + 1] = True
            positions[first + i] = anchor + 1 + i
    if window is not None:
        mask &= positions[None, :] > positions[:, None] - window
    return mask[None, None], positions[None]
