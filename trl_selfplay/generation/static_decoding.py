"""Decode through CUDA graphs: a step of one token per row over fixed buffers, captured and replayed.

In: the cache of a batch and the tokens just chosen. Out: the next logits, and the cache with these
tokens in it. A step of a small model takes longer to launch than to compute; a replay launches all of
it at once. Steps are captured for a few sizes. A batch uses the next larger one: further rows are
computed and ignored, further columns are masked. Anything but a step works on the cache as if it had
grown by itself, since its keys are views of the buffers.

Shapes: B rows, S cached columns, V logits.
"""

import logging
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch.distributed.tensor import DTensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from trl_selfplay.generation.causal_forward import CausalForward
from trl_selfplay.generation.model_traits import ModelTraits, input_device, without_adapters
from trl_selfplay.memory import is_out_of_memory

logger = logging.getLogger(__name__)

# Sizes for which steps are captured. Fewer waste more of each step, more take longer to capture.
_ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_LEAST_COLUMNS = 128
# Only one capture may be underway in a process. A judge may sample in another thread.
_CAPTURING = threading.Lock()


class StaticDecoder:
    """The buffers and captured steps of a model, kept from call to call until `release`.

    Args:
        device_type: The device whose models are decoded statically. Steps are captured on "cuda",
            and on others run as they are.
    """

    def __init__(self, device_type: str = "cuda") -> None:
        self.device_type = device_type
        self._obstacle: str | None = None
        self._told: str | None = None
        self._model_state: Any = None
        self._capacity = (0, 0)  # rows, columns
        self._buffers: _Buffers | None = None

    def takes(self, model: Any, traits: ModelTraits) -> bool:
        """Return whether this model's steps can run over fixed buffers."""
        if input_device(model).type != self.device_type:
            return False
        obstacle = _find_obstacle(model, traits)
        if obstacle is not None and obstacle != self._told:
            logger.info("decoding without CUDA graphs: %s.", obstacle)
        self._told = obstacle
        return obstacle is None

    def build_forward(
        self,
        model: PreTrainedModel | PeftModel,
        traits: ModelTraits,
        autocast: Callable[[], AbstractContextManager[Any]] | None,
        rows: int,
        columns: int,
    ) -> CausalForward:
        """Return the forward of a model that this decoder takes; its steps run over the buffers.

        Args:
            model: The model without wrappers, in eval mode.
            traits: The model's traits.
            autocast: Returns the mixed-precision context of a forward, or None.
            rows: Maximum rows of a batch.
            columns: Expected maximum of a row's tokens; the buffers grow beyond it.
        """
        state = _state_of(model)
        if state != self._model_state:  # captured steps read the old weights
            self._buffers = None
            self._model_state = state
        self._capacity = (rows, columns)
        return _StaticForward(model, traits, autocast, self)

    def step(
        self,
        forward: CausalForward,
        tokens: torch.Tensor,
        cache: DynamicCache,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Do what `CausalForward.step` does, or return None if steps can't run over buffers.

        The logits are overwritten by the next step.
        """
        if self._obstacle is not None:
            return None
        try:
            return self._hold(cache).step(forward, tokens, cache, positions, mask)
        except Exception as error:  # a fault of the model's own shows up again without graphs
            self._buffers = None
            self._capacity = (0, self._capacity[1])
            first = error.__context__ or error  # the end of a failed capture raises as well
            if is_out_of_memory(first) and len(tokens) > 1:
                raise first from None  # smaller batches follow
            self._obstacle = f"{type(first).__name__}: {first}".partition("\n")[0]
            logger.warning("decoding without CUDA graphs, which failed with %s", self._obstacle)
            return None

    def release(self) -> None:
        """Free buffers and captured steps; what failed is tried again."""
        self._buffers = self._obstacle = None
        self._capacity = (0, 0)

    def _hold(self, cache: DynamicCache) -> "_Buffers":
        """Return buffers that hold the cache, with room for a token."""
        rows, _, length, _ = _layers(cache)[0].keys.shape
        rows = _row_size(max(rows, self._capacity[0]))
        columns = _column_size(max(length + 1, self._capacity[1]))
        if self._buffers is not None and not self._buffers.have_room(rows, columns):
            self._buffers = None
        if self._buffers is None:
            self._buffers = _Buffers(rows, columns, captures=self.device_type == "cuda")
        self._buffers.take(cache)
        return self._buffers


class _StaticForward(CausalForward):
    """A forward whose steps run over a decoder's buffers."""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        traits: ModelTraits,
        autocast: Callable[[], AbstractContextManager[Any]] | None,
        decoder: StaticDecoder,
    ) -> None:
        super().__init__(model, traits, autocast)
        self._decoder = decoder

    def step(
        self,
        tokens: torch.Tensor,
        cache: DynamicCache,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        logits = self._decoder.step(self, tokens, cache, positions, mask)
        return super().step(tokens, cache, positions, mask) if logits is None else logits


class _Buffers:
    """Keys and values of one batch, the other inputs of a step, and the captured steps over them."""

    def __init__(self, rows: int, columns: int, captures: bool) -> None:
        self._size = (rows, columns)
        self._captures = captures
        self._owner: Callable[[], DynamicCache | None] = lambda: None
        self._keys: list[torch.Tensor] = []  # per layer, (rows, H, columns, D)
        self._values: list[torch.Tensor] = []
        self._logits: torch.Tensor | None = None  # (rows, V)
        self._met: set[tuple[int, int]] = set()
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def have_room(self, rows: int, columns: int) -> bool:
        return rows <= self._size[0] and columns <= self._size[1]

    def take(self, cache: DynamicCache) -> None:
        """Move a cache into the buffers, unless it lies there; it then stays there.

        A cache that needs more room than the buffers have leaves them by itself.
        """
        layers = _layers(cache)
        if self._keys and layers[0].lies_in(self._keys[0]):
            return
        other = self._owner()
        if other is not None and other is not cache:
            for layer in _layers(other):
                layer.leave()
        self._owner = weakref.ref(cache)
        if not self._keys:
            self._allocate(layers[0].keys.device)
        for place, layer in enumerate(layers):
            if place == len(self._keys):
                # Masked columns count with a weight of zero, which must not meet a NaN.
                for buffers, held in ((self._keys, layer.keys), (self._values, layer.values)):
                    shape = (self._size[0], held.shape[1], self._size[1], held.shape[3])
                    buffers.append(held.new_zeros(shape))
            layer.settle(self._keys[place], self._values[place])

    def _allocate(self, device: torch.device) -> None:
        rows, columns = self._size
        self._tokens, self._positions = torch.zeros((2, rows), dtype=torch.long, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._order = torch.arange(columns, device=device)
        self._mask = torch.ones((rows, columns), dtype=torch.long, device=device)

    def step(
        self,
        forward: CausalForward,
        tokens: torch.Tensor,
        cache: DynamicCache,
        positions: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Feed tokens (B,) into the cache that the buffers hold; return logits, float32 (B, V)."""
        layers = _layers(cache)
        rows, _, length, _ = layers[0].keys.shape
        self._tokens[:rows] = tokens
        self._positions[:rows] = positions
        self._column.fill_(length)
        # Rows beyond the batch see all columns, since one that sees none gives NaN.
        self._mask[rows if mask is not None else 0 :].fill_(1)
        if mask is not None:
            self._mask[:rows, : length + 1] = mask
        size = (_row_size(rows), _column_size(length + 1))
        if size in self._graphs:
            self._graphs[size].replay()
        elif self._captures and size in self._met:
            with _CAPTURING:
                self._graphs[size] = self._capture(forward, size)
            self._graphs[size].replay()
        else:
            # The first step of a size, which chooses kernels and may allocate for good, isn't captured.
            self._met.add(size)
            self._compute(forward, size)
        for layer in layers:
            layer.show(rows, length + 1)
        assert self._logits is not None
        return self._logits[:rows]

    def _compute(self, forward: CausalForward, size: tuple[int, int]) -> None:
        """Run one step over the first rows and columns of the buffers."""
        rows, columns = size
        cache = DynamicCache()
        cache.layers = [
            _StaticLayer(keys[:rows, :, :columns], values[:rows, :, :columns], self._column)
            for keys, values in zip(self._keys, self._values, strict=True)
        ]
        visible = self._mask[:rows, :columns] * (self._order[:columns] <= self._column)
        logits = forward.next_logits(
            self._tokens[:rows, None], cache, self._positions[:rows, None], visible
        )
        if self._logits is None:
            self._logits = logits.new_empty((self._size[0], logits.shape[1]))
        self._logits[:rows] = logits

    def _capture(self, forward: CausalForward, size: tuple[int, int]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        device = self._column.device
        if self._pool is None:
            # Steps run one after the other, so all may use the same memory in between.
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # which a capture that runs out of memory can't do
        random_state = torch.cuda.get_rng_state(device)
        # Weights that an outer autocast has cast already must be cast by the graph, and not outlive it.
        torch.clear_autocast_cache()
        with torch.cuda.stream(self._stream):
            # Other threads, such as one that grades, may go on using the device.
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                self._compute(forward, size)
            finally:
                try:
                    graph.capture_end()
                except RuntimeError:
                    _undo_capture(device, self._pool, random_state)
                    raise
        torch.clear_autocast_cache()
        return graph


class _StaticLayer(DynamicLayer):
    """A layer for one step: all columns of a buffer, of which it writes one.

    Args:
        keys: (B, H, S, D); written in place.
        values: Likewise.
        column: Index of the column to write, long (1,).
    """

    is_compileable = True  # transformers then builds the mask without reading it

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, column: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self._column = keys, values, column
        self.is_initialized = True
        self._length = keys.shape[2] - 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values of one token, (B, H, 1, D), and return all columns."""
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self._column, key_states)
        self.values.index_copy_(2, self._column, value_states)
        self._length += 1
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the number of columns before the last; the caller masks those not yet written."""
        return self._length


def _undo_capture(device: torch.device, pool: Any, random_state: torch.Tensor) -> None:
    """Give back what a capture that failed has left in its state: the allocator and the generator.

    Otherwise `empty_cache` fails from then on, and so does whatever draws random numbers. The part for
    the generator was never run: `pytest -m gpu tests/generation/test_static_decoding.py`. Remove this
    when the oldest supported torch is 2.12, which has
    https://github.com/pytorch/pytorch/pull/180395, and when its generators leave the capture as well.
    """
    with suppress(RuntimeError):  # it has ended
        torch.cuda.memory._cuda_endAllocateToPool(device.index, pool)
    fresh = torch.Generator(device)
    fresh.set_state(random_state)
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


def _find_obstacle(model: Any, traits: ModelTraits) -> str | None:
    """Return why steps of this model can't run over fixed buffers, or None."""
    base = without_adapters(model)
    parameters = list(model.parameters())
    if traits.padding != "inside" or not traits.takes_position_ids:
        return "not all layers are full attention"
    if traits.rope_switch is not None:
        return "rotary frequencies depend on the length"
    # transformers' own word that a step with a static cache never waits for the device.
    if not getattr(base, "_can_compile_fullgraph", False):
        return f"{type(base).__name__} doesn't support static caches"
    attention = getattr(base.config, "_attn_implementation", None)
    if attention not in ("sdpa", "eager"):
        return f"the attention is {attention}, and not sdpa"
    if len({p.device for p in parameters}) > 1 or any(isinstance(p, DTensor) for p in parameters):
        return "the weights are on several devices"
    return None


def _layers(cache: DynamicCache) -> list[Any]:
    return cache.layers


def _row_size(rows: int) -> int:
    """Return the next larger number of rows for which steps are captured."""
    return next((size for size in _ROWS if size >= rows), -(-rows // 64) * 64)


def _column_size(columns: int) -> int:
    """Return the next larger number of columns, at most an eighth more beyond a thousand."""
    unit = max(_LEAST_COLUMNS, 1 << max(columns.bit_length() - 4, 0))
    return -(-columns // unit) * unit


def _state_of(model: Any) -> tuple[Any, ...]:
    """Return what captured steps depend on: where tensors lie, and how adapters are set."""
    tensors = chain(model.parameters(), model.buffers())
    adapters = [
        (
            m.disable_adapters,
            tuple(m.active_adapters),
            tuple(getattr(m, "merged_adapters", ())),
            tuple(getattr(m, "scaling", {}).items()),
        )
        for m in model.modules()
        if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    return tuple((t.data_ptr(), t.dtype) for t in tensors), tuple(adapters)
