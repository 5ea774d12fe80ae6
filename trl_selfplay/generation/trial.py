"""Check whether a model can be sampled from: its traits, then a trial on a few tokens.

In: a trainer's model before the first round. Out: an error that says why it can't. The trial feeds
rows through the cache as the sampler does and compares them with each row alone, so that a model
whose state, mask or positions work differently is refused at construction and not sampled wrongly.
"""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from trl_selfplay.generation.causal_forward import CausalForward
from trl_selfplay.generation.model_traits import (
    ModelTraits,
    describe_model,
    has_whole_weights,
    sampling_state,
    without_adapters,
)

_LENGTH, _SHORTER = 6, 4
# Maximum distance between logits relative to their spread, in float32 and in lower precision.
_TOLERANCE, _LOW_PRECISION_TOLERANCE = 1e-2, 0.3


def try_model(model: nn.Module, accelerator: Accelerator | None = None) -> ModelTraits:
    """Return the model's traits after a trial that its rows don't influence each other.

    If rows of different lengths fail, or the model numbers positions in its own way, the traits are
    those of rows of equal length without position ids.

    Args:
        model: The model as a trainer holds it; its state is restored. There is no trial for sharded
            weights.
        accelerator: The trainer's accelerator, for unwrapping and mixed precision.

    Raises:
        ValueError: The model can't be sampled from. The error names its class and the reason.
    """
    unwrapped: Any = model if accelerator is None else accelerator.unwrap_model(model)
    traits = describe_model(unwrapped)
    if not has_whole_weights(unwrapped):
        return traits
    base = without_adapters(unwrapped)
    candidates = [traits]
    if traits.padding != "none" or traits.takes_position_ids:
        candidates.append(_with_equal_lengths(traits, base.config))
    autocast = None if accelerator is None else accelerator.autocast
    failures: list[str | Exception] = []
    with sampling_state(model, accelerator) as ready, torch.no_grad():
        for candidate in candidates:
            try:
                reason = _find_fault(CausalForward(ready, candidate, autocast))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                failures.append(error)
                continue
            if reason is None:
                return candidate
            failures.append(reason)
    # Report the last failure, that of rows of equal length: without padding, it says more.
    failure = failures[-1]
    if isinstance(failure, Exception):
        text = f"its forward failed with {type(failure).__name__}: {failure}"
        if base is not unwrapped and getattr(base, "is_quantized", False):
            text += ". Many kinds of adapters can't read the weights of a quantized base: use LoRA."
    else:
        text = failure
    raise ValueError(
        f"{type(base).__name__} can't be sampled from: in a trial of {_LENGTH} tokens {text}"
    ) from (failure if isinstance(failure, Exception) else None)


def _with_equal_lengths(traits: ModelTraits, config: Any) -> ModelTraits:
    """Return the traits for rows without padding whose positions the model numbers itself."""
    length = traits.context_length
    if length is not None:  # RoBERTa's positions start after its pad token's id
        length -= 1 + (getattr(config, "pad_token_id", None) or 0)
    return replace(
        traits, padding="none", window=None, takes_position_ids=False, context_length=length
    )


def _find_fault(forward: CausalForward) -> str | None:
    """Return what is wrong with rows that share a cache, or None."""
    apart, alone = _distances(forward)
    if not apart <= _TOLERANCE:
        return (
            "the continuation of a prompt changed when another prompt had been computed in "
            "between. The model keeps a state in its modules, outside of its cache, so rows could "
            "not be kept apart."
        )
    if not alone <= (_TOLERANCE if forward.is_float32() else _LOW_PRECISION_TOLERANCE):
        return (
            "rows fed through the cache together got other logits than each row alone (they differ "
            f"by {alone:.2g} of the logits' spread). The model's attention, masks or positions work "
            "in a way that the sampler doesn't support."
        )
    return None


def _distances(forward: CausalForward) -> tuple[float, float]:
    """Return two distances of the logits of rows that share a cache.

    The first is from the logits with other rows computed in between, which a cache keeps apart
    exactly. The second is from the logits of each row alone, where rounding differs.
    """
    generator = torch.Generator().manual_seed(0)
    size = (5, _LENGTH)
    first, second, *others, last = torch.randint(
        3, forward.traits.vocab_size, size, generator=generator
    ).tolist()
    rows = _TrialRows(forward, [first])
    if forward.traits.padding != "none":
        rows = _TrialRows(forward, [first, second[:_SHORTER]])
    places = list(range(len(rows.prompts)))
    undisturbed = rows.step(rows.prefilled(), places, last)
    cache = rows.prefilled()
    _TrialRows(forward, others[: len(places)]).prefilled()
    apart = _largest_distance(rows.step(cache, places, last), undisturbed)

    places = [0, *places]  # the first prompt continues in two rows
    together = rows.step(rows.prefilled(), places, last)
    whole = [[*rows.prompts[p], token] for p, token in zip(places, last, strict=False)]
    lone = [forward.lone_logits(torch.tensor([ids]).to(forward.device)) for ids in whole]
    return apart, _largest_distance(together, torch.stack(lone))


class _TrialRows:
    """Prompts, padded on the left to the length of the trial, and one token after each."""

    def __init__(self, forward: CausalForward, prompts: list[list[int]]) -> None:
        self.prompts = prompts
        self._forward = forward
        pads = [_LENGTH - len(prompt) for prompt in prompts]
        device = forward.device
        self._ids = torch.tensor([[0] * n + p for n, p in zip(pads, prompts, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (_LENGTH + 1 - n) for n in pads])
        self._positions = (mask.cumsum(dim=1) - 1).clamp(min=0).to(device)
        self._mask = mask.to(device) if any(pads) else None

    def prefilled(self) -> Any:
        """Return a cache with one row per prompt."""
        cache = self._forward.new_cache()
        mask = None if self._mask is None else self._mask[:, :_LENGTH]
        ids, positions = self._ids.to(self._forward.device), self._positions[:, :_LENGTH]
        self._forward.next_logits(ids, cache, positions, mask)
        return cache

    def step(self, cache: Any, places: list[int], tokens: list[int]) -> torch.Tensor:
        """Continue the prompts at these places by one token each; return the logits after it."""
        device = self._forward.device
        index = torch.tensor(places).to(device)
        if len(places) > len(self.prompts):
            cache.reorder_cache(index)
        ids = torch.tensor(tokens[: len(places)])[:, None].to(device)
        mask = None if self._mask is None else self._mask[index]
        return self._forward.next_logits(ids, cache, self._positions[index, _LENGTH:], mask)


def _largest_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest distance between rows of logits, relative to their spread."""
    found, expected = (x - x.mean(dim=-1, keepdim=True) for x in (found, expected))
    spread = expected.norm(dim=-1).clamp(min=1e-6)
    return ((found - expected).norm(dim=-1) / spread).max().item()
