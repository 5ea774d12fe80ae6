"""What a device does that the meta device doesn't: autocast, fused attention, answers about values.

In: a model on the meta device, whose tensors hold no data. Out: a context in which its forward creates
and keeps the tensors that it would create and keep on the device, for rows without padding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface

_ATTENTION = "trl_selfplay_estimated"
# Functions that autocast runs in the lower precision, and in float32, of those that decoders use.
# Source: PyTorch's "Autocast Op Reference".
_LOWER: set[Callable[..., Any]] = {
    functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm,
    torch.Tensor.bmm, torch.baddbmm, torch.addmm, torch.mm, functional.conv1d,
}  # fmt: skip
_FLOAT32: set[Callable[..., Any]] = {
    functional.layer_norm, functional.softmax, functional.log_softmax, functional.cross_entropy,
    torch.softmax, torch.log_softmax, torch.Tensor.softmax, torch.Tensor.log_softmax,
    functional.softplus,
}  # fmt: skip


class DeviceRules(TorchFunctionMode):
    """Makes functions of meta tensors behave like those of another device.

    Under autocast, arguments are cast, and a trainable weight's copy is kept until the forward ends,
    as in PyTorch's cache. A mask selects everything, a condition holds, and a list of values has the
    largest one: that is the batch with most to compute.

    Args:
        autocast: The precision of autocast, or None.
        largest: What a value of an index tensor is at most.
    """

    def __init__(self, autocast: torch.dtype | None, largest: int) -> None:
        super().__init__()
        self.dtype = autocast
        self.largest = largest
        self._copies: dict[int, torch.Tensor] = {}
        self._keeps_copies = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function as the device would."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*(self._lower(each) for each in args[:3])).transpose(1, 2)
        if func is torch.Tensor.__bool__:
            return True
        if func is torch.Tensor.tolist:
            return [self.largest] * args[0].numel()
        if func is torch.Tensor.__getitem__ and _is_mask(args[1]):
            return args[0].flatten(0, args[1].ndim - 1).clone()
        if self.dtype is not None and func in _LOWER:
            args = [self._lower(each) for each in args]
            kwargs = {name: self._lower(each) for name, each in kwargs.items()}
        elif self.dtype is not None and func in _FLOAT32:
            args = [_to_float32(each) for each in args]
            kwargs = {name: _to_float32(each) for name, each in kwargs.items()}
        return func(*args, **kwargs)

    def end_forward(self) -> None:
        """Drop the copies of weights; from now on none are kept."""
        self._copies.clear()
        self._keeps_copies = False

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients under these rules, because checkpointing runs the forward again.

        PyTorch leaves a mode while one of its public functions runs, `backward` too.
        """
        ones = (torch.ones_like(loss),)
        _engine_run_backward((loss,), ones, False, False, (), accumulate_grad=True)

    def _lower(self, value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        if self.dtype is None or not is_float or value.dtype == self.dtype:
            return value
        is_kept = self._keeps_copies and torch.is_grad_enabled()
        if not (is_kept and value.requires_grad and value.is_leaf):
            return value.to(self.dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(self.dtype)
        return self._copies[id(value)]


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _to_float32(value: Any) -> Any:
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if is_float else value


class _FusedAttention(torch.autograd.Function):
    """Creates and keeps what FlashAttention does: the output, and a log-sum-exp per query.

    Shapes: query (B, H, S, d); output (B, S, H, d).
    """

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        out = query.new_empty((batch, length, heads, value.shape[-1]))
        lse = query.new_empty((batch, heads, length), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors[:3])


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """Implement transformers' attention interface.

    Under autocast, rotary embeddings give queries and keys in float32, and attention casts them to
    the precision in which the values already are.
    """
    out = _FusedAttention.apply(query.to(value.dtype), key.to(value.dtype), value)
    return out, None


def _no_mask(*_: Any, **__: Any) -> None:
    """Implement transformers' mask interface: rows without padding need no mask."""


@contextmanager
def fused_attention(model: Any) -> Iterator[None]:
    """Replace fused attention by what has its memory; "eager" attention stays as it is."""
    config = model.config
    own = config._attn_implementation
    if own == "eager":
        yield
        return
    AttentionInterface.register(_ATTENTION, _attend)
    AttentionMaskInterface.register(_ATTENTION, _no_mask)
    config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = own
