"""Score how well a model follows the pointers of pointers.py, with and without thoughts.

In: lines, a model, thoughts. Out: the loss of each completion token, which answers are right, and
the summary and plot at the end of the recipe.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trl_selfplay.trainers.quiet_star.backbone import project
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, barred_token_ids, mix
from trl_selfplay.trainers.quiet_star.model import QuietSTaRModel
from trl_selfplay.trainers.quiet_star.observation import measure_gains, plot_gains
from trl_selfplay.trainers.quiet_star.replaced_attention import thoughts_attend
from trl_selfplay.trainers.quiet_star.sampling import ThinkingColumns, sample_thoughts, thought_keys
from trl_selfplay.trainers.quiet_star.storage import ThoughtSettings
from trl_selfplay.trainers.quiet_star.unrolled import ThoughtBatch, gather_columns, unroll

# Maximum number of tokens shown in the plot.
_PICTURE_TOKENS = 200


@dataclass(frozen=True, slots=True)
class EncodedLines:
    """B tokenized lines, padded on the right, on the CPU.

    Attributes:
        ids: Token ids, int64 (B, S).
        mask: 1 on text, 0 on padding, int64 (B, S).
        columns: The column before each of the U completion tokens, where the model thinks, int64
            (B, U).
        is_real: False where `columns` is padding, bool (B, U).
        is_answer: True if the token after a column is an answer, bool (B, U).
        hops: Number of pointers to follow in each line, int64 (B,).
        candidates: All tokens that are an answer in some line, int64 (C,).
    """

    ids: torch.Tensor
    mask: torch.Tensor
    columns: torch.Tensor
    is_real: torch.Tensor
    is_answer: torch.Tensor
    hops: torch.Tensor
    candidates: torch.Tensor

    def part(self, first: int, count: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return ids, mask, columns and is_real of `count` lines on a device."""
        rows = slice(first, first + count)
        tensors = (self.ids, self.mask, self.columns, self.is_real)
        return tuple(tensor[rows].to(device) for tensor in tensors)


@dataclass(frozen=True, slots=True)
class LineScores:
    """How well completion tokens are predicted, one value per column of `EncodedLines`.

    Attributes:
        nll: −log p of the token, float32 (B, U).
        is_right: True if it is the most likely of the candidates, bool (B, U). Only meaningful for
            answers.
    """

    nll: torch.Tensor
    is_right: torch.Tensor


def encode_lines(tokenizer: Any, rows: Sequence[dict[str, Any]]) -> EncodedLines:
    """Tokenize lines, and locate their completion tokens and the answers among them."""
    rows_of_ids, rows_of_columns, rows_of_answers = [], [], []
    for row in rows:
        text = row["prompt"] + row["completion"]
        encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        spans = encoded["offset_mapping"]
        answers = {i + 2 for i, sign in enumerate(text) if sign == "=" and text[i + 2] != "-"}
        predicted = [i for i, (_, stop) in enumerate(spans) if stop > len(row["prompt"])]
        rows_of_ids.append(torch.tensor(encoded["input_ids"]))
        rows_of_columns.append(torch.tensor([i - 1 for i in predicted]))
        rows_of_answers.append(
            torch.tensor([any(spans[i][0] <= a < spans[i][1] for a in answers) for i in predicted])
        )
    pad = torch.nn.utils.rnn.pad_sequence
    ids, columns = pad(rows_of_ids, batch_first=True), pad(rows_of_columns, batch_first=True)
    mask = pad([torch.ones_like(row) for row in rows_of_ids], batch_first=True)
    is_real = pad([torch.ones_like(row) for row in rows_of_columns], batch_first=True).bool()
    columns = columns.where(is_real, columns.amax(1, keepdim=True))
    is_answer = pad(rows_of_answers, batch_first=True)
    found = ids.gather(1, columns + 1)[is_answer & is_real]
    hops = torch.tensor([row["hops"] for row in rows])
    return EncodedLines(ids, mask, columns, is_real, is_answer, hops, found.unique())


@torch.no_grad()
def think_about(
    causal_lm: Any,
    lines: EncodedLines,
    settings: ThoughtSettings,
    num_thoughts: int,
    seed: int = 0,
    rows: int = 64,
) -> torch.Tensor:
    """Sample K thoughts of n tokens before each completion token, int64 (B, U·K, n), on the CPU.

    Args:
        causal_lm: A model with a thought module, in eval mode.
        lines: The lines to think about.
        settings: Length n and temperature of the thoughts, and the barred tokens.
        num_thoughts: K, the number of thoughts per token.
        seed: Seeds the thoughts.
        rows: Number of lines per forward pass.
    """
    start = getattr(causal_lm, ATTRIBUTE).start_and_end()[0]
    device, parts = start.device, []
    for first in range(0, len(lines.ids), rows):
        ids, mask, columns, is_real = lines.part(first, rows, device)
        thinking = ThinkingColumns(columns, is_real, columns)
        places = range(first, first + len(columns))
        sampled = sample_thoughts(
            causal_lm, start, ids, mask, columns.repeat_interleave(num_thoughts, dim=1),
            settings.thought_length, thought_keys(thinking, num_thoughts, seed, 0, "eval", places),
            temperature=settings.thought_temperature, barred=settings.barred,
        )  # fmt: skip
        parts.append(sampled.tokens.cpu())
    return torch.cat(parts)


@torch.no_grad()
def score_lines(
    causal_lm: Any, lines: EncodedLines, thoughts: torch.Tensor | None, rows: int = 64
) -> LineScores:
    """Score completion tokens without thoughts, or by the mean probability over the given thoughts.

    Args:
        causal_lm: A model in eval mode, with a thought module if `thoughts` are given.
        lines: The lines to score.
        thoughts: (B, U·K, n) from `think_about`, or None.
        rows: Number of lines per forward pass.
    """
    device = causal_lm.get_input_embeddings().weight.device
    candidates = lines.candidates.to(device)
    nll, right = [], []
    for first in range(0, len(lines.ids), rows):
        ids, mask, columns, _ = lines.part(first, rows, device)
        if thoughts is None:
            logits = gather_columns(causal_lm(input_ids=ids, attention_mask=mask).logits, columns)
            log_probs = logits.float().log_softmax(-1)  # (B, U, V)
        else:
            given = thoughts[first : first + rows].to(device)
            log_probs = _mixed_log_probs(causal_lm, ids, mask, columns, given)
        targets = ids.gather(1, columns + 1)
        nll.append(-log_probs.gather(-1, targets[..., None]).squeeze(-1).cpu())
        likeliest = log_probs[..., candidates].argmax(-1)
        right.append((candidates[likeliest] == targets).cpu())
    return LineScores(torch.cat(nll), torch.cat(right))


def _mixed_log_probs(
    causal_lm: Any,
    ids: torch.Tensor,
    mask: torch.Tensor,
    columns: torch.Tensor,
    thoughts: torch.Tensor,
) -> torch.Tensor:
    """Return the log of the next token's mean probability over K thoughts, (B, U, V)."""
    num_thoughts = thoughts.shape[1] // columns.shape[1]
    anchors = columns.repeat_interleave(num_thoughts, dim=1)
    batch = ThoughtBatch(anchors, thoughts, torch.ones_like(anchors, dtype=torch.bool), 1)
    with thoughts_attend(causal_lm):
        states = unroll(causal_lm, ids, mask, batch)
    before = gather_columns(states.text, anchors)
    mixed, _ = mix(getattr(causal_lm, ATTRIBUTE), before, states.blocks[:, :, -1])
    log_probs = project(causal_lm, mixed).float().log_softmax(-1)
    log_probs = log_probs.unflatten(1, (columns.shape[1], num_thoughts))
    return log_probs.logsumexp(2) - torch.tensor(float(num_thoughts)).log()


@dataclass(frozen=True, slots=True)
class AnswerReport:
    """Scores of the answers in held-out lines.

    Attributes:
        loss: Mean −log p without thoughts, in nats.
        accuracy: Share of answers that are the most likely node, without thoughts.
        loss_with_thoughts: The loss with one thought before each answer.
        accuracy_with_thoughts: The accuracy with one thought before each answer.
    """

    loss: float
    accuracy: float
    loss_with_thoughts: float
    accuracy_with_thoughts: float


def score_answers(trainer: Any, lines: Sequence[dict[str, Any]]) -> AnswerReport | None:
    """Score a QuietSTaRTrainer's model on the answers in `lines`; None without lines or thoughts."""
    if not lines or not trainer.args.num_thoughts:
        return None
    model = thinking_model(trainer)
    encoded = encode_lines(trainer.processing_class, lines)
    thoughts = think_about(model.causal_lm, encoded, model.settings, 1)
    where = encoded.is_answer & encoded.is_real
    found: list[float] = []
    for given in (None, thoughts):
        scores = score_lines(model.causal_lm, encoded, given)
        found += [scores.nll[where].mean().item(), scores.is_right[where].float().mean().item()]
    return AnswerReport(*found)


def thinking_model(trainer: Any) -> QuietSTaRModel:
    """Return a trainer's model as a QuietSTaRModel in eval mode."""
    args = trainer.args
    barred = tuple(barred_token_ids(trainer.processing_class))
    settings = ThoughtSettings(args.thought_length, args.thought_temperature, barred)
    return QuietSTaRModel(trainer.accelerator.unwrap_model(trainer.model), settings)


def report_thoughts(
    trainer: Any, lines: Sequence[dict[str, Any]], before: AnswerReport | None
) -> Path | None:
    """Print held-out losses with and without thoughts, and plot the gain of thinking along a text.

    Args:
        trainer: A trained QuietSTaRTrainer.
        lines: The demo's held-out lines; empty for other datasets.
        before: What `score_answers` returned before training.

    Returns:
        The path of the plot, or None without a held-out set or thoughts.
    """
    if trainer.eval_dataset is None or not trainer.args.num_thoughts:
        return None
    scores = trainer.evaluate()
    write = sys.stdout.write
    write(
        "Held-out loss in nats per token: "
        f"{scores['eval_thought/base_loss']:.3f} without thoughts, "
        f"{scores['eval_thought/talk_loss']:.3f} with thoughts.\n"
    )
    for name, report in (("before", before), ("after", score_answers(trainer, lines))):
        if report is not None:
            write(
                f"Answers of {len(lines)} held-out lines, {name}: loss {report.loss:.3f}, right "
                f"{report.accuracy:.2f}; with thoughts: loss {report.loss_with_thoughts:.3f}, "
                f"right {report.accuracy_with_thoughts:.2f}\n"
            )
    picture = Path(trainer.args.output_dir) / "gains.png"
    row = trainer.eval_dataset[0]["input_ids"][:_PICTURE_TOKENS]
    plot_gains(measure_gains(thinking_model(trainer), row), trainer.processing_class, picture)
    write(f"Where thinking helped in the first held-out text: {picture}\n")
    return picture
