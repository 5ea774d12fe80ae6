"""Keep a 4-bit base model trainable on a CPU after a forward in eval mode.

In: a model with bitsandbytes `Linear4bit` layers. Out: the same model with one flag changed.
"""

import sys

from torch import nn


def keep_4bit_weights_trainable(model: nn.Module) -> int:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU; return the number of layers changed.

    On CPUs with AVX512-BF16, the first forward in eval mode repacks the weights of a `Linear4bit` in
    place. After that, without an error, no gradient reaches the LoRA layers before it. Call this
    after loading and before the first sampling or evaluation. Layers on other devices are left
    unchanged.

    The packed layout came with https://github.com/bitsandbytes-foundation/bitsandbytes/pull/1804.
    Remove this when it has a backward pass.
    """
    if "bitsandbytes" not in sys.modules:  # no layer can be a Linear4bit
        return 0
    from bitsandbytes.nn import Linear4bit

    count = 0
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False
            count += 1
    return count
