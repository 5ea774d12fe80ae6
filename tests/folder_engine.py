"""An engine that samples from what lies on disk, as vLLM does, in the process of the test.

In: `EngineWeights`. Out: completions of the model that `transformers` and PEFT load from there: an
independent reading of the weights that a trainer hands over.
"""

from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_selfplay.generation.transformers_sampler import TransformersSampler


class FolderEngine:
    """Takes the arguments of `VLLMSampler`, and keeps what was handed to it.

    Attributes:
        engines: All of this class that were made, in order.
        is_stale: Whether an engine goes on with the weights that it has loaded first.
        version: Of the engine, in its record.
    """

    engines: list["FolderEngine"] = []  # noqa: RUF012
    is_stale = False
    version = "1"

    def __init__(self, settings, export, tokenizer, traits, device, announce=None) -> None:
        self.settings, self.export, self.tokenizer = settings, export, tokenizer
        self.engine_record: dict[str, Any] | None = None
        self.handed: list[Any] = []
        self.starts = self.releases = 0
        self._loaded: Any = None
        self._sampler: Any = None
        self.engines.append(self)

    def suggest_batch_size(self, longest_prompt, max_completion_length) -> int:
        return 8

    def sample(self, requests, options, batch_size, on_tokens=None):
        weights = self.export()
        if self._sampler is None:
            self.starts += 1
        if self._loaded is None or (weights != self._loaded and not self.is_stale):
            self._load(weights)
        yield from self._sampler.sample(requests, options, batch_size, on_tokens)

    def _load(self, weights) -> None:
        model = AutoModelForCausalLM.from_pretrained(
            weights.model, dtype=getattr(torch, self.settings.dtype)
        )
        if weights.adapter is not None:
            model = PeftModel.from_pretrained(model, weights.adapter)
            assert weights.adapter_rank == max(c.r for c in model.peft_config.values())
        self._loaded = weights
        self._sampler = TransformersSampler(model, self.tokenizer)
        self.handed.append(weights)
        self.engine_record = {
            "engine": "folder", "version": self.version, "dtype": self.settings.dtype,
            "quantization": self.settings.quantization,
        }  # fmt: skip

    def release(self) -> None:
        self.releases += 1
        if not self.is_stale:
            self._loaded = None
        self._sampler = None if not self.is_stale else self._sampler
