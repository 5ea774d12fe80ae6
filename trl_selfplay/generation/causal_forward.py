"""A model's forward pass for decoding.

In: tokens, the cache they are added to, their positions and mask. Out: the next token's logits, or
an error if the model didn't use the cache.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from trl_selfplay.generation.buffered_cache import new_cache
from trl_selfplay.generation.model_traits import ModelTraits, input_device


class CausalForward:
    """A model's forward pass, reduced to the next token's logits.

    Args:
        model: The model without wrappers, in eval mode.
        traits: The model's traits.
        autocast: Returns the mixed-precision context of a forward, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        traits: ModelTraits,
        autocast: Callable[[], AbstractContextManager[Any]] | None,
    ) -> None:
        self.model: Any = model
        self.traits = traits
        self.device = input_device(model)
        self._autocast = autocast

    def new_cache(self) -> DynamicCache:
        """Return an empty cache with the layers that this model needs."""
        return new_cache(self.model.config)

    def is_float32(self) -> bool:
        """Return whether the whole model computes in float32."""
        with nullcontext() if self._autocast is None else self._autocast():
            if torch.is_autocast_enabled(self.device.type):
                return False
        return all(p.dtype == torch.float32 for p in self.model.parameters())

    def next_logits(
        self,
        input_ids: torch.Tensor,
        cache: DynamicCache,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Feed tokens (B, S) into the cache and return the last position's logits, float32 (B, V).

        Raises:
            RuntimeError: The model didn't use the cache.
        """
        # Pass only what this model's forward takes. Without `logits_to_keep`, a prefill computes
        # logits of the whole prompt.
        kwargs: dict[str, Any] = {}
        if self.traits.takes_position_ids:
            kwargs["position_ids"] = position_ids
        if self.traits.takes_logits_to_keep:
            kwargs["logits_to_keep"] = 1
        held = _cached_length(cache)
        with nullcontext() if self._autocast is None else self._autocast():
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=True,
                **{self.traits.cache_name: cache},
                **kwargs,
            )
        # A model that ignores the cache it is given would sample without a context.
        if held is not None and _cached_length(cache) != held + input_ids.shape[1]:
            raise RuntimeError(
                f"{type(self.model).__name__} left {_cached_length(cache)} tokens in its cache instead of "
                f"{held + input_ids.shape[1]}, so later tokens would be wrong. Its forward must fill the "
                "`past_key_values` that it is given."
            )
        return outputs.logits[:, -1].float()

    def step(
        self,
        tokens: torch.Tensor,
        cache: DynamicCache,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Feed one token per row, (B,), into the cache and return the next logits, float32 (B, V).

        Args:
            tokens: Token ids, (B,).
            cache: S columns.
            positions: (B,).
            mask: (B, S + 1), or None if nothing is masked.

        Raises:
            RuntimeError: The model didn't use the cache.
        """
        return self.next_logits(tokens[:, None], cache, positions[:, None], mask)

    def forget_lengths(self) -> None:
        """Reset the model's rotary frequencies.

        Dynamic scaling keeps them stretched for the longest sequence so far, until a short one comes.
        """
        one = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        self.next_logits(one, self.new_cache(), torch.zeros_like(one), None)

    def lone_logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits after a row of tokens (1, S), computed without a cache, float32 (V,)."""
        with nullcontext() if self._autocast is None else self._autocast():
            outputs = self.model(input_ids=input_ids, use_cache=False)
        return outputs.logits[0, -1].float()


def _cached_length(cache: DynamicCache) -> int | None:
    """Return the number of cached tokens, or None if all layers are recurrent."""
    if any(isinstance(layer, CacheLayerMixin) for layer in cache.layers):
        return cache.get_seq_length()
    return None
