"""Count the bytes of tensors that are alive while a model runs on the meta device.

In: a forward and a backward of meta tensors, which hold no data. Out: the bytes alive at the moment
of the peak, by what they are.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts tensors that are created while this mode is active, until they are freed.

    What existed before isn't counted. A gradient counts as one once it is a weight's `.grad`.

    Args:
        model: What computes; its weights aren't counted.
        keeps_gradients: False: a gradient is added to one that is held already, and freed.

    Attributes:
        peak: Bytes by kind at the moment of the largest total.
    """

    def __init__(self, model: nn.Module, keeps_gradients: bool) -> None:
        super().__init__()
        self._keeps_gradients = keeps_gradients
        self.peak: Counter[str] = Counter()
        self._now: Counter[str] = Counter()
        self._total = self._largest = 0
        self._kind = "activations"
        self._live: dict[int, tuple[str, int]] = {}
        self._known = {_key(t) for t in (*model.parameters(), *model.buffers())}
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._is_gradient)
            for p in model.parameters()
            if p.requires_grad
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self._count(result)
        elif isinstance(result, tuple | list):
            for each in result:
                if isinstance(each, torch.Tensor):
                    self._count(each)
        return result

    def __exit__(self, *exception: Any) -> None:
        """Stop counting."""
        super().__exit__(*exception)
        for hook in self._hooks:
            hook.remove()

    @contextmanager
    def counting_as(self, kind: str) -> Iterator[None]:
        """Count what is created within this context as another kind than activations."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def _count(self, tensor: torch.Tensor) -> None:
        key = _key(tensor)
        if key in self._live or key in self._known:  # a view, or a result written in place
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._live[key] = (self._kind, size)
        self._now[self._kind] += size
        self._total += size
        weakref.finalize(storage, self._free, key).atexit = False
        if self._total > self._largest:
            self._largest = self._total
            self.peak = self._now.copy()

    def _free(self, key: int) -> None:
        kind, size = self._live.pop(key)
        self._now[kind] -= size
        self._total -= size

    def _is_gradient(self, weight: torch.Tensor) -> None:
        if not self._keeps_gradients:
            weight.grad = None
        if weight.grad is None or (key := _key(weight.grad)) not in self._live:
            return
        kind, size = self._live[key]
        self._live[key] = ("gradients", size)
        self._now[kind] -= size
        self._now["gradients"] += size


def _key(tensor: torch.Tensor) -> int:
    """Return a number that all views of the same memory share."""
    return tensor.untyped_storage()._cdata
