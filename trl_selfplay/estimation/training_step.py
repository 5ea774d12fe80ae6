"""The memory of one step of training, by running it on tensors without data.

In: the twin of a model, and the size of a batch. Out: bytes by kind at the moment of the peak.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from trl_selfplay.estimation.live_bytes import LiveBytes
from trl_selfplay.estimation.plan import CannotEstimateError, OwnStep
from trl_selfplay.estimation.precision import DeviceRules, fused_attention
from trl_selfplay.estimation.twin import Twin

# The tiles in which TRL projects states to logits (`ChunkedLogProbFunction`, and its callers).
HEAD_TOKENS, HEAD_COLUMNS = 4096, 32768
# Float32 copies of a tile where Triton doesn't fold it in place.
_COPIES_FORWARD, _COPIES_BACKWARD = 4, 7
_STATISTICS = 7  # float32 numbers per token


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch whose rows are all of the same length, and how it is computed.

    Attributes:
        rows: Sequences in a forward.
        length: Tokens per sequence.
        autocast: Its precision, or None.
        checkpointing: Arguments of gradient checkpointing, or None without it.
        accumulates: Whether gradients of an earlier batch are held.
        on_gpu: Whether the device has Triton.
    """

    rows: int
    length: int
    autocast: torch.dtype | None
    checkpointing: Mapping[str, Any] | None
    accumulates: bool
    on_gpu: bool


def step_peak(
    twin: Twin,
    batch: Batch,
    own_step: OwnStep | None = None,
    *,
    with_gradients: bool = True,
) -> Counter[str]:
    """Return the bytes at the peak of a forward and backward, without what the model itself takes.

    Args:
        twin: The model.
        batch: Its size and settings.
        own_step: Of a trainer with a loss of its own; None: that of TRL's SFT and DPO trainers.
        with_gradients: False: the forward alone, without gradients.

    Raises:
        CannotEstimateError: The model's forward needs values that tensors without data don't have.
    """
    if batch.checkpointing is not None:
        _switch_checkpointing_on(twin, dict(batch.checkpointing))
    held = Counter[str]()
    if batch.accumulates and with_gradients:
        held["gradients"] = sum(p.nbytes for p in twin.trainable)
    rules = DeviceRules(batch.autocast, batch.length)
    live = LiveBytes(twin.model, keeps_gradients=not batch.accumulates)
    contexts = (
        fused_attention(twin.causal_lm),
        nullcontext() if own_step is None else own_step.running(twin.causal_lm, batch.on_gpu),
        _looks_like_autocast(batch), rules, live,
        torch.set_grad_enabled(with_gradients),
    )  # fmt: skip
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        try:
            if own_step is None:
                loss = log_probs_of_text(twin, batch, live)
            else:
                loss = own_step.loss(twin.causal_lm, batch.rows, batch.length)
            rules.end_forward()
            if with_gradients:
                rules.backward(loss)
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise CannotEstimateError(
                f"{type(twin.causal_lm).__name__} doesn't run on tensors without data: {error}"
            ) from error
    for parameter in twin.trainable:
        parameter.grad = None
    return held + live.peak


def log_probs_of_text(twin: Twin, batch: Batch, live: LiveBytes) -> torch.Tensor:
    """Return the sum of all tokens' log-probs, computed as TRL does: states, then tiles of logits."""
    causal_lm = twin.causal_lm
    ids = torch.empty((batch.rows, batch.length), dtype=torch.long, device="meta")
    states = causal_lm.base_model(
        input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False
    ).last_hidden_state
    head = causal_lm.get_output_embeddings()
    with live.counting_as("logits"):
        predicting = states[:, :-1].flatten(0, 1)
        how = (batch.autocast, batch.on_gpu, live)
        log_probs: torch.Tensor = _TiledHead.apply(predicting, head.weight, how)
    return log_probs.sum()


class _TiledHead(torch.autograd.Function):
    """Creates and keeps what TRL's `ChunkedLogProbFunction` does. Shapes: states (N, d), head (V, d)."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, how: Any) -> torch.Tensor:
        autocast, on_gpu, live = how
        dtype = autocast or states.dtype
        statistics = states.new_empty((_STATISTICS, len(states)), dtype=torch.float32)
        copies = 0 if on_gpu else _COPIES_FORWARD
        _tile(states, weight, dtype, copies)
        log_probs, log_z, entropy = (torch.empty_like(statistics[0]) for _ in range(3))
        ctx.save_for_backward(states, weight, log_z, entropy)
        ctx.how = (dtype, 0 if on_gpu else _COPIES_BACKWARD, live)
        return log_probs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        states, weight, *_ = ctx.saved_tensors
        dtype, copies, live = ctx.how
        for_states, for_weight, _ = ctx.needs_input_grad
        with live.counting_as("logits"):
            d_states = states.new_empty(states.shape, dtype=torch.float32) if for_states else None
            d_weight = weight.new_empty(weight.shape, dtype=torch.float32) if for_weight else None
            _tile(states, weight, dtype, copies)
            return (
                None if d_states is None else d_states.to(states.dtype),
                None if d_weight is None else d_weight.to(weight.dtype),
                None,
            )


def _tile(states: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, copies: int) -> None:
    """Create the largest tile of logits and what is cast for it."""
    rows, columns = min(len(states), HEAD_TOKENS), min(len(weight), HEAD_COLUMNS)
    held = [states.new_empty((rows, HEAD_COLUMNS), dtype=dtype)]
    held += [each[:n].to(dtype) for each, n in ((states, rows), (weight, columns))]
    held += [states.new_empty((rows, columns), dtype=torch.float32) for _ in range(copies)]


def _switch_checkpointing_on(twin: Twin, options: dict[str, Any]) -> None:
    """Checkpoint activations as the trainers do; with adapters, embeddings require a gradient."""
    own = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    own.pop("offload", None)
    options.setdefault("use_reentrant", False)
    causal_lm = twin.causal_lm
    # The name before transformers 5.23; the other one alone once 5.23 is the oldest.
    old_name = getattr(causal_lm, "gradient_checkpointing_enable", None)
    enable: Any = getattr(causal_lm, "activation_checkpointing_enable", old_name)
    enable(options, **own)
    if twin.model is not causal_lm:
        twin.model.enable_input_require_grads()


@contextmanager
def _looks_like_autocast(batch: Batch) -> Iterator[None]:
    """Let PEFT's layers see that autocast is on; it casts nothing on the meta device."""
    device = "cuda" if batch.on_gpu else "cpu"
    before = torch.is_autocast_enabled(device)
    torch.set_autocast_enabled(device, batch.autocast is not None)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, before)
