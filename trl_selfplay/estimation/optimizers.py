"""The memory of an optimizer's state, from its name.

In: the trainable weights and the value of `optim`. Out: bytes.
"""

import math
from collections.abc import Iterable

import torch

# Numbers that are kept per weight.
_MOMENTS = {
    "adamw": 2, "adagrad": 1, "rmsprop": 1, "lion": 1, "ademamix": 3, "sgd": 0, "radam": 2,
    "apollo": 1, "galore": 1, "adalomo": 1, "grokadamw": 3,
}  # fmt: skip
# bitsandbytes: smaller weights keep float32 moments, and aren't paged.
_LEAST_8BIT, _LEAST_PAGED, _BLOCK = 4096, 10**5, 256


def optimizer_bytes(weights: Iterable[torch.Tensor], optim: str) -> int:
    """Return the bytes that an optimizer keeps on the device between steps.

    A paged optimizer's state may leave the device when memory is short, and isn't counted.

    Args:
        weights: Those that are trained.
        optim: A name of `transformers.training_args.OptimizerNames`. An unknown one counts as Adam.
    """
    return sum(_state_bytes(weight, optim) for weight in weights)


def step_bytes(weights: Iterable[torch.Tensor], optim: str, on_gpu: bool) -> int:
    """Return the bytes that a step needs besides state and gradients."""
    sizes = [weight.numel() * weight.element_size() for weight in weights]
    if not sizes or "fused" in optim or "bnb" in optim or "bit" in optim:
        return 0
    return sum(sizes) if on_gpu else 2 * max(sizes)  # all weights at once, or one after another


def _state_bytes(weight: torch.Tensor, optim: str) -> int:
    count, item = weight.numel(), weight.element_size()
    is_bitsandbytes = "bnb" in optim or "32bit" in optim or "paged" in optim or "_8bit" in optim
    if "paged" in optim and count >= _LEAST_PAGED:
        return 0
    if optim == "adafactor":  # a row and a column for each matrix
        if weight.ndim < 2:
            return 4 * count
        return 4 * (count // weight.shape[-1] + count // weight.shape[-2])
    moments = next((n for name, n in _MOMENTS.items() if name in optim), 2)
    if "4bit" in optim and count >= _LEAST_8BIT:
        return moments * (count // 2 + 4 * math.ceil(count / 128))
    if "8bit" in optim and count >= _LEAST_8BIT:
        return moments * (count + 4 * math.ceil(count / _BLOCK))
    return moments * count * (4 if is_bitsandbytes else item)
