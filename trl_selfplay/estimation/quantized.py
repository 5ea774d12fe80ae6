"""Linear layers with quantized weights, without data.

In: linear layers on the meta device. Out: layers of bitsandbytes' classes in their place, by which PEFT
chooses its own, with a forward that creates and keeps what theirs does.
"""

from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from transformers import BitsAndBytesConfig

_BLOCK, _NESTED_BLOCK = 64, 256  # weights per scale; scales per scale of scales
_CODE = 4 * 256  # the values of 8-bit scales


def quantize(causal_lm: Any, names: list[str], how: BitsAndBytesConfig) -> int:
    """Replace linear layers by quantized ones; return the bytes of their scales."""
    scales = 0
    for name in names:
        linear = causal_lm.get_submodule(name)
        blocks = -(-linear.weight.numel() // _BLOCK)
        layer: nn.Module
        if how.load_in_4bit:
            layer = _FourBit(linear, how)
            nested = blocks + 4 * -(-blocks // _NESTED_BLOCK) + _CODE
            scales += nested if how.bnb_4bit_use_double_quant else 4 * blocks
        else:
            layer = _EightBit(linear)
            scales += 4 * linear.out_features
        causal_lm.set_submodule(name, layer)
    return scales


class _Dequantized(torch.autograd.Function):
    """Multiply by a quantized weight: it exists whole for the product, and again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        weight = states.new_empty(shape)
        return states @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad,) = grads
        return grad @ grad.new_empty(ctx.shape), None, None


class _FourBit(Linear4bit):
    """A linear layer with 4-bit weights without data; PEFT knows its class."""

    def __init__(self, linear: nn.Linear, how: BitsAndBytesConfig) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.empty((-(-linear.weight.numel() // 2), 1), dtype=torch.uint8, device="meta")
        weight: Any = nn.Parameter(packed, requires_grad=False)
        weight.compress_statistics = how.bnb_4bit_use_double_quant
        weight.quant_type = how.bnb_4bit_quant_type
        self.weight = weight
        self.compute_dtype = how.bnb_4bit_compute_dtype
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return states in the precision that they came in."""
        states = x.to(self.compute_dtype)
        shape = (self.out_features, self.in_features)
        product = _Dequantized.apply(states, self.weight, shape)
        if self.bias is not None:
            product = product + self.bias.to(product.dtype)
        return product.to(x.dtype)


class _EightBit(Linear8bitLt):
    """A linear layer with 8-bit weights without data; PEFT knows its class."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.empty(linear.weight.shape, dtype=torch.int8, device="meta")
        self.weight: Any = nn.Parameter(packed, requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return states in the precision that they came in; products are in float16."""
        shape = (self.out_features, self.in_features)
        product = _Dequantized.apply(x.half(), self.weight, shape)
        return product.to(x.dtype)
