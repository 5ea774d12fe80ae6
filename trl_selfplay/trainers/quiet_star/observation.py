"""Observe thoughts: metrics for the logs, the most helpful thoughts, and a plot.

In: log-probs with and without thoughts. Out: sums that can be averaged over processes, lines of
text, and a PNG of the gain of thinking along a text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE
from trl_selfplay.trainers.quiet_star.model import QuietSTaRModel
from trl_selfplay.trainers.quiet_star.objective import ObjectiveSums, base_ahead
from trl_selfplay.trainers.quiet_star.sampling import (
    SampledThoughts,
    ThinkingColumns,
    can_think,
    choose_columns,
    sample_thoughts,
    thought_keys,
)
from trl_selfplay.trainers.quiet_star.unrolled import ThoughtBatch, think_and_talk

QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True, slots=True)
class ThoughtScores:
    """Log-probs of a batch by column; 0 on columns that aren't real.

    Attributes:
        base: Log-probs of the n_true tokens ahead without thoughts, (B, U, n_true).
        talk: Log-probs of the n_true tokens ahead after each thought, (B, U, K, n_true).
        thought: Log-prob of each thought, (B, U, K).
        advantage: Advantage of each thought, (B, U, K).
        weights: Mixing weights, (B, U, K, n_true).
    """

    base: torch.Tensor
    talk: torch.Tensor
    thought: torch.Tensor
    advantage: torch.Tensor
    weights: torch.Tensor

    def gains(self) -> torch.Tensor:
        """Return by how many nats each thought raised the log-likelihood of its tokens, (B, U, K)."""
        return (self.talk - self.base[:, :, None]).detach().sum(-1)


@torch.no_grad()
def thought_sums(
    scores: ThoughtScores,
    sums: ObjectiveSums,
    num_tokens: torch.Tensor,
    thinking: ThinkingColumns,
    thoughts: SampledThoughts,
) -> dict[str, torch.Tensor]:
    """Return the metrics of a batch, each as (numerator, denominator) so that batches add up.

    - base_loss, talk_loss: loss without and with thoughts, in nats per token.
    - gain: what thoughts add to a token's log-prob at thinking columns, in nats per token.
    - reward: what a thought adds to the log-probs of all its tokens together, in nats.
    - helped: share of columns whose thoughts have a positive gain on average.
    - reinforced: share of thoughts with an advantage above 0.
    - spread: standard deviation of the rewards of a column.
    - entropy: mean entropy of the distributions that thoughts were drawn from.
    - all_equal: share of columns whose thoughts are all the same.
    - weight_*: mixing weights of the thoughts; the quantiles are those of this batch.
    """
    real = thinking.is_real
    columns, num_thoughts = real.sum().float(), scores.talk.shape[2]
    gains = scores.gains()
    mean_gain = gains.mean(2)
    weights = scores.weights[real]
    tokens = thoughts.tokens.unflatten(1, (-1, num_thoughts))
    same = (tokens == tokens[:, :, :1]).all(-1).all(-1)
    entropies = thoughts.entropies.unflatten(1, (-1, num_thoughts)).mean(2)
    pairs = {
        "base_loss": (sums.base, num_tokens),
        "talk_loss": (sums.talk, columns),
        "policy_loss": (sums.policy, columns),
        "gain": (mean_gain.sum() / scores.talk.shape[3], columns),
        "reward": (mean_gain.sum(), columns),
        "helped": (((mean_gain > 0) & real).sum(), columns),
        "advantage": (scores.advantage.mean(2).sum(), columns),
        "reinforced": ((scores.advantage > 0).float().mean(2).sum(), columns),
        "spread": ((gains.std(2, correction=0)).sum(), columns),
        "entropy": ((entropies * real).sum(), columns),
        "all_equal": ((same & real).sum(), columns),
        "weight_mean": (weights.sum(), torch.tensor(float(weights.numel()))),
    }
    # Present even if no column is real, so that all processes reduce the same names; it then
    # counts 0.
    counts = (columns > 0).float()
    spread_of = weights.flatten() if len(weights) else torch.zeros(1, device=real.device)
    levels = torch.tensor(QUANTILES, device=real.device)
    # A part is enough; `quantile` takes at most 16 million numbers.
    found = spread_of[: 1 << 20].float().quantile(levels)
    for level, value in zip(QUANTILES, found, strict=True):
        pairs[f"weight_p{round(100 * level):02d}"] = (value * counts, counts)
    for name, value in (("weight_min", spread_of.min()), ("weight_max", spread_of.max())):
        pairs[name] = (value * counts, counts)
    device = real.device
    return {
        f"thought/{name}": torch.stack([a.to(device).float(), b.to(device).float()])
        for name, (a, b) in pairs.items()
    }


@dataclass(frozen=True, slots=True)
class HelpfulThought:
    """A thought and its context, as token ids.

    Attributes:
        before: The text up to the thinking token.
        thought: The thought without start and end.
        after: The tokens to predict.
        gain: What the thought added to their log-likelihood, in nats.
    """

    before: tuple[int, ...]
    thought: tuple[int, ...]
    after: tuple[int, ...]
    gain: float


def most_helpful(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    thinking: ThinkingColumns,
    thoughts: SampledThoughts,
    gains: torch.Tensor,
    num_ahead_tokens: int,
    limit: int = 3,
) -> list[HelpfulThought]:
    """Return the most helpful thoughts, best first, at most one per row and column."""
    best, which = gains.masked_fill(~thinking.is_real[:, :, None], float("-inf")).max(-1)
    found = []
    width = best.shape[1]
    tokens = thoughts.tokens.unflatten(1, (width, -1))
    for place in best.flatten().argsort(descending=True)[:limit].tolist():
        b, u = divmod(place, width)
        if not thinking.is_real[b, u]:
            break
        column = int(thinking.columns[b, u])
        before = input_ids[b, : column + 1][attention_mask[b, : column + 1].bool()]
        after = input_ids[b, column + 1 : column + 1 + num_ahead_tokens]
        found.append(
            HelpfulThought(
                tuple(before.tolist()),
                tuple(tokens[b, u, which[b, u]].tolist()),
                tuple(after.tolist()),
                float(best[b, u]),
            )
        )
    return found


def describe_thoughts(found: Sequence[HelpfulThought], tokenizer: Any, width: int = 60) -> str:
    """Return a line per thought: its gain, the text before, the thought, and the text after.

    Texts are printed as Python literals, so that no control character reaches the terminal.
    """
    lines = []
    for thought in found:
        before, inside, after = (
            tokenizer.decode(list(ids)) for ids in (thought.before, thought.thought, thought.after)
        )
        lines.append(f"{thought.gain:+.2f} nats  …{before[-width:]!r} ⟨{inside!r}⟩ {after!r}")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class TextGains:
    """The gain of thinking along one text.

    Attributes:
        tokens: The S tokens of the text.
        base: Log-prob of each token without thoughts; 0 for the first, which isn't predicted.
        gains: What thinking before each token adds to its log-prob, in nats; 0 for the first.
        helpful: The most helpful thoughts.
    """

    tokens: tuple[int, ...]
    base: tuple[float, ...]
    gains: tuple[float, ...]
    helpful: tuple[HelpfulThought, ...]


@torch.no_grad()
def measure_gains(
    model: QuietSTaRModel, token_ids: Sequence[int], num_thoughts: int = 2, seed: int = 0
) -> TextGains:
    """Think before every token of a text, and compare its log-prob with and without thoughts.

    The gain of a token is the mean over its thoughts.

    Args:
        model: The model.
        token_ids: The text, at least two tokens.
        num_thoughts: Thoughts per token.
        seed: Seeds the thoughts.
    """
    causal_lm, settings = model.causal_lm, model.settings
    ids = torch.tensor([list(token_ids)], device=model.device)
    mask = torch.ones_like(ids)
    thinking = choose_columns(can_think(ids, mask, 1), mask, 1.0, seed, 0, "eval", [0])
    anchors = thinking.columns.repeat_interleave(num_thoughts, dim=1)
    thoughts = sample_thoughts(
        causal_lm, getattr(causal_lm, ATTRIBUTE).start_and_end()[0], ids, mask, anchors,
        settings.thought_length, thought_keys(thinking, num_thoughts, seed, 0, "eval", [0]),
        temperature=settings.thought_temperature, barred=settings.barred,
    )  # fmt: skip
    batch = ThoughtBatch(
        anchors, thoughts.tokens, torch.ones_like(anchors, dtype=torch.bool), 1,
        scores_thoughts=False,
    )  # fmt: skip
    outputs = think_and_talk(causal_lm, ids, mask, batch)
    base = base_ahead(outputs["base_log_probs"], thinking.columns, 1)  # (1, S − 1, 1)
    talk = outputs["talk_log_probs"].unflatten(1, (-1, num_thoughts))  # (1, S − 1, K, 1)
    gains = (talk - base[:, :, None]).sum(-1)
    return TextGains(
        tuple(token_ids),
        (0.0, *base[0, :, 0].tolist()),
        (0.0, *gains.mean(2)[0].tolist()),
        tuple(most_helpful(ids, mask, thinking, thoughts, gains, 1)),
    )


def plot_gains(gains: TextGains, tokenizer: Any, path: str | Path) -> None:
    """Plot the gain of thinking before each token, below the token's loss, to a PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('The plot needs matplotlib: pip install "trl-selfplay[demo]".') from error
    count = len(gains.tokens)
    figure = Figure(figsize=(max(6.0, 0.22 * count), 4.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    places = range(count)
    upper.bar(places, [-x for x in gains.base], color="#8a8a8a")
    upper.set_ylabel("−log p without\nthought (nats)")
    colors = ["#1b7837" if x > 0 else "#b2182b" for x in gains.gains]
    lower.bar(places, gains.gains, color=colors)
    lower.axhline(0.0, color="black", linewidth=0.6)
    lower.set_ylabel("gain of thinking\n(nats)")
    # Fonts have no glyphs for control characters, and a dollar sign would start a formula.
    labels = [repr(tokenizer.decode([t]))[1:-1].replace("$", r"\$") for t in gains.tokens]
    lower.set_xticks(list(places), labels, rotation=90, fontsize=7)
    figure.savefig(path, dpi=120)
