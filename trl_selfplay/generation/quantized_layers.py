"""Keep a quantized base model trainable on a CPU, and alike in sampling and in training.

In: a model with bitsandbytes layers. Out: the same model with layers that compute otherwise.
"""

import sys
from functools import partial

from torch import nn


def prepare_quantized_layers(model: nn.Module) -> int:
    """Make quantized layers on a CPU compute in eval mode as in training; return their number.

    Call this after loading and before the first sampling or evaluation. Layers on other devices are
    left unchanged.

    4 bits: on CPUs with AVX512-BF16, the first forward in eval mode repacks the weights of a
    `Linear4bit` in place. After that, without an error, no gradient reaches the LoRA layers before
    it. The packed layout came with
    https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804; remove this part when it has a
    backward pass.

    8 bits: in eval mode a `Linear8bitLt` rounds its inputs to 8 bits, in train mode it doesn't, which
    would be two policies. It stays in train mode here, which on a CPU is faster as well.
    """
    if "bitsandbytes" not in sys.modules:  # no layer can be quantized by it
        return 0
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    count = 0
    for layer in model.modules():
        if not isinstance(layer, Linear4bit | Linear8bitLt) or layer.weight.device.type != "cpu":
            continue
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
        else:
            layer.train()
            layer.train = partial(_stay, layer)  # type: ignore[assignment]
        count += 1
    return count


def _stay(layer: nn.Module, mode: bool = True) -> nn.Module:
    """Take the place of a layer's `train`, which `eval` calls as well, and change nothing."""
    return layer
