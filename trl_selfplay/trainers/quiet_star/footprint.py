"""A step of Quiet-STaR on a model without data, for estimates of its memory.

In: a causal language model on the meta device, and the size of a batch. Out: the thought module, and a
loss computed by the functions that train, over rows in which every column that can think does.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trl_selfplay.trainers.quiet_star import attention, backbone
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, ThoughtModule
from trl_selfplay.trainers.quiet_star.replaced_attention import thoughts_attend
from trl_selfplay.trainers.quiet_star.sampling import sample_thoughts
from trl_selfplay.trainers.quiet_star.unrolled import ThoughtBatch, think_and_talk


class ThinkingStep:
    """What an estimate needs to know of `QuietSTaRTrainer`: see `estimation/plan.py: OwnStep`.

    Args:
        config: A `QuietSTaRConfig` with thoughts.
    """

    float32_names: tuple[str, ...] = (ATTRIBUTE,)

    def __init__(self, config: Any) -> None:
        self.config = config

    def prepare_model(self, causal_lm: Any) -> None:
        """Attach a thought module without data."""
        with torch.device("meta"):
            width = causal_lm.get_input_embeddings().weight.shape[1]
            module = _ModuleWithoutData(torch.empty(width), self.config.meta_token_scale)
        setattr(causal_lm, ATTRIBUTE, module)

    def prepare_adapters(self, peft_config: Any) -> Any:
        """Return a PEFT configuration that trains the thought module too."""
        peft_config = copy.copy(peft_config)
        peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or ()), ATTRIBUTE})
        return peft_config

    @contextmanager
    def running(self, causal_lm: Any, on_gpu: bool) -> Iterator[None]:
        """Attend as thoughts do, in the backward pass as well, in the chunks of the device."""
        own = backbone.DEVICE_CHUNK_LOGITS, attention.DEVICE_CHUNK_SCORES
        if not on_gpu:  # the meta device counts as another device than a CPU
            backbone.DEVICE_CHUNK_LOGITS = backbone.CPU_CHUNK_LOGITS
            attention.DEVICE_CHUNK_SCORES = attention.CPU_CHUNK_SCORES
        try:
            with thoughts_attend(causal_lm):
                yield
        finally:
            backbone.DEVICE_CHUNK_LOGITS, attention.DEVICE_CHUNK_SCORES = own

    def loss(self, causal_lm: Any, rows: int, length: int) -> torch.Tensor:
        """Sample thoughts, then compute a loss of text and thoughts.

        Args:
            causal_lm: The model, without wrappers.
            rows: Texts of the batch.
            length: Tokens of a text.
        """
        args = self.config
        ids = torch.empty((rows, length), dtype=torch.long, device="meta")
        mask = torch.ones_like(ids)
        allowed = max(1, length - args.num_ahead_tokens)
        num_blocks = math.ceil(allowed * args.thought_fraction) * args.num_thoughts
        anchors = torch.empty((rows, num_blocks), dtype=torch.long, device="meta")
        start = getattr(causal_lm, ATTRIBUTE).start_and_end()[0]
        thoughts = sample_thoughts(
            causal_lm, start, ids, mask, anchors, args.thought_length, range(rows * num_blocks),
            temperature=args.thought_temperature,
        )  # fmt: skip
        batch = ThoughtBatch(
            anchors=anchors,
            tokens=thoughts.tokens,
            is_real=torch.ones_like(anchors, dtype=torch.bool),
            num_ahead_tokens=args.num_ahead_tokens,
            temperature=args.thought_temperature,
            scores_thoughts=args.reinforce_weight > 0.0 and args.thought_length > 0,
        )
        outputs = think_and_talk(causal_lm, ids, mask, batch)
        terms = [outputs[f"{name}_log_probs"].sum() for name in ("base", "talk", "thought")]
        return torch.stack(terms).sum()


class _ModuleWithoutData(ThoughtModule):
    """A thought module for the meta device, which has no autocast to switch off."""

    def forward(self, base: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
        """Return mixing weights, float32 (…, 1)."""
        weight: torch.Tensor = self.head(torch.cat([base, thought], dim=-1).float())
        return weight.float()
