"""Linear layers through oneDNN where the usual library computes them slowly.

In: a model on a CPU. Out: the same model, whose float32 `nn.Linear` layers call oneDNN within a
context. On CPUs that aren't Intel's, MKL leaves AVX-512 unused, and a product of a decoding step
takes twice as long (benchmarks/results/sampling.md). There is no stable name for this product of
dense tensors, so `tests/test_trl_contract.py` tests the one that is used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn


@contextmanager
def fast_linear_layers(model: nn.Module) -> Iterator[None]:
    """Let float32 linear layers on a CPU call oneDNN while gradients are off, within this context.

    Results differ from those of `nn.functional.linear` in the last bits.
    """
    layers: list[Any] = []
    if is_onednn_faster():
        layers = [m for m in model.modules() if _is_plain(m)]
    try:
        for layer in layers:
            layer.forward = _OneDNN(layer)
        yield
    finally:
        for layer in layers:
            del layer.forward


def is_onednn_faster() -> bool:
    """Return whether float32 products go to MKL on a CPU with AVX-512 that isn't Intel's."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and not _is_intel()
    )


class _OneDNN:
    """The forward of one layer."""

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._layer.weight, self._layer.bias
        # Autocast casts, and gradients need a formula; both belong to the usual product.
        if (
            x.dtype != torch.float32
            or x.numel() == 0
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled("cpu")
        ):
            return nn.functional.linear(x, weight, bias)
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return product


def _is_plain(module: nn.Module) -> bool:
    """Return whether a layer's forward is `nn.Linear`'s own, over float32 weights on a CPU."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    )


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # unknown: leave everything as it is
