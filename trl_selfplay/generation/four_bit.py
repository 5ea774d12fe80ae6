"""Keep a 4-bit base trainable on a CPU after a forward in eval mode.

In: a model with bitsandbytes `Linear4bit` layers. Out: the same model with one flag changed.
"""

import sys

from torch import nn


def keep_4bit_weights_trainable(model: nn.Module) -> int:
    """Stop bitsandbytes from repacking 4-bit weights on a CPU; return how many layers were set.

    On CPUs with AVX512-BF16 the first forward in eval mode repacks a `Linear4bit`'s weights in
    place; after that no gradient reaches the LoRA layers before it, without an error. Call this
    after loading and before the first sampling or evaluation. Layers on other devices are left
    as they are.

    Remove when bitsandbytes' packed CPU layout has a backward pass.
    """
    if "bitsandbytes" not in sys.modules:  # then no layer can be a Linear4bit
        return 0
    from bitsandbytes.nn import Linear4bit

    count = 0
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False
            count += 1
    return count
