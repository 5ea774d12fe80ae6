"""What an estimate depends on, read from a trainer's configuration once.

In: a configuration of any trainer of this package or of TRL's SFT and DPO trainers. Out: `RunPlan`.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftConfig
from transformers import TrainingArguments
from trl import DPOConfig

_USUAL_PROMPT = 512


class CannotEstimateError(ValueError):
    """The memory of this run can't be told from its configuration."""


class OwnStep(Protocol):
    """A training step with a loss of its own, which a config's `step_without_data()` returns.

    Attributes:
        float32_names: Parts of the names of weights that stay in float32.
    """

    float32_names: tuple[str, ...]

    def prepare_model(self, causal_lm: Any) -> None:
        """Add to a model on the meta device what the trainer adds."""

    def prepare_adapters(self, peft_config: Any) -> Any:
        """Return the adapters' configuration as the trainer changes it."""

    def running(self, causal_lm: Any, on_gpu: bool) -> AbstractContextManager[None]:
        """Return the context of forward and backward."""

    def loss(self, causal_lm: Any, rows: int, length: int) -> torch.Tensor:
        """Return the loss of a batch on the meta device."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What an engine takes while it samples.

    Attributes:
        share: Its share of the device's memory; 0 if it has a device of its own.
        dtype_bytes: Bytes per weight of embeddings and head.
        linear_bytes: Bytes per weight of the layers, which may be quantized.
        num_devices: Devices over which it divides the model.
    """

    share: float
    dtype_bytes: float
    linear_bytes: float
    num_devices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """The settings that decide how much memory a run takes.

    Attributes:
        model: A name, a configuration, or a model.
        loading: Arguments of `from_pretrained`.
        peft_config: For new adapters, or None.
        on_gpu: Whether it runs on a GPU.
        autocast: Precision of autocast, or None.
        rows: Rows of a training batch; a pair counts as one.
        length: Tokens of a row at most.
        are_pairs: Whether a row is a pair of completions, scored by the reference beforehand.
        accumulates: Whether gradients of several batches are added up.
        checkpointing: Arguments of gradient checkpointing, or None without it.
        optim: Name of the optimizer.
        scored_rows: Pairs that the reference scores at once.
        prompt_length: Tokens of the longest prompt that is sampled from, 0 if nothing is sampled.
        completion_length: Tokens of a completion at most.
        engine: What an engine takes; None if sampling is done in the training process.
        own_step: The step of a trainer with a loss of its own, or None for that of SFT and DPO.
    """

    model: Any
    loading: Mapping[str, Any]
    peft_config: Any
    on_gpu: bool
    autocast: torch.dtype | None
    rows: int
    length: int
    are_pairs: bool
    accumulates: bool
    checkpointing: Mapping[str, Any] | None
    optim: str
    scored_rows: int
    prompt_length: int
    completion_length: int
    engine: EnginePlan | None
    own_step: OwnStep | None


def read_plan(
    model: Any,
    config: Any,
    peft_config: Any,
    quantization_config: Any,
    prompt_length: int | None,
    row_length: int | None,
    device: str | None,
) -> RunPlan:
    """Return what a run with this configuration does; see `estimate` for the arguments."""
    _check_arguments(config, peft_config, quantization_config, device)
    for name, length in (("prompt_length", prompt_length), ("row_length", row_length)):
        if length is not None and (not isinstance(length, int) or length < 1):
            raise ValueError(
                f"{name}={length!r}; it must be a number of tokens, 1 or more, or None."
            )
    loading = dict(config.model_init_kwargs or {})
    if quantization_config is not None:
        loading["quantization_config"] = quantization_config
    loading.setdefault("trust_remote_code", getattr(config, "trust_remote_code", False))
    if device is None:
        device = "cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu"
    on_gpu = device != "cpu"
    completion_length = getattr(config, "max_completion_length", 0)
    length = _row_length(config, prompt_length, row_length, completion_length)
    if prompt_length is None:
        prompt_length = max(1, length - completion_length) if completion_length else 0
    are_pairs = isinstance(config, DPOConfig)
    scored = getattr(config, "precompute_ref_batch_size", None)
    rows = config.per_device_train_batch_size
    return RunPlan(
        model=model,
        loading=loading,
        peft_config=peft_config,
        on_gpu=on_gpu,
        autocast=_autocast_of(config, on_gpu),
        rows=rows,
        length=length,
        are_pairs=are_pairs,
        accumulates=config.gradient_accumulation_steps > 1,
        checkpointing=(config.gradient_checkpointing_kwargs or {})
        if config.gradient_checkpointing
        else None,
        optim=str(getattr(config.optim, "value", config.optim)),
        scored_rows=scored or rows,
        prompt_length=prompt_length,
        completion_length=completion_length,
        engine=_read_engine(config, loading, _autocast_of(config, on_gpu)),
        own_step=config.step_without_data() if hasattr(config, "step_without_data") else None,
    )


def _row_length(
    config: Any, prompt_length: int | None, row_length: int | None, completion_length: int
) -> int:
    """Return the tokens of the longest row that may be trained on."""
    known = [n for n in (row_length, config.max_length) if n is not None]
    if completion_length and (prompt_length is not None or not known):
        known.append((prompt_length or _USUAL_PROMPT) + completion_length)
    if not known:
        raise CannotEstimateError(
            "max_length=None: the length of the rows isn't known from the configuration. Pass "
            "row_length, the tokens of the longest one."
        )
    return min(known)


def _check_arguments(
    config: Any, peft_config: Any, quantization_config: Any, device: str | None
) -> None:
    """Raise for what isn't an instance of its class, and for an unknown device."""
    for name, value, kind in (
        ("config", config, TrainingArguments),
        ("peft_config", peft_config, PeftConfig),
    ):
        if isinstance(value, type):
            raise TypeError(f"{name} is the class {value.__name__}; make one: {value.__name__}(…).")
        if not isinstance(value, kind) and (value is not None or name == "config"):
            raise TypeError(f"{name}={value!r:.100}; it must be a {kind.__name__}.")
    if isinstance(quantization_config, type | bool):
        raise TypeError(
            f"quantization_config={quantization_config!r}; it must be a BitsAndBytesConfig(…) or None."
        )
    if device is not None and device.split(":")[0] not in ("cuda", "cpu"):
        raise ValueError(f"device={device!r}; choose 'cuda' or 'cpu', or None.")


def _read_engine(
    config: Any, loading: Mapping[str, Any], autocast: torch.dtype | None
) -> EnginePlan | None:
    """Return what an engine takes; it loads the model's source, and quantizes that on its own."""
    uses_ray = getattr(config, "use_ray", False)
    if not getattr(config, "use_vllm", False) and not uses_ray:
        return None
    own = loading.get("dtype") or torch.float32
    dtype = str(config.vllm_dtype or autocast or own).removeprefix("torch.")
    width = 4 if dtype == "float32" else 2
    linear = {"fp8": 1.0, "bitsandbytes": 0.5 + 4 / 64}.get(config.vllm_quantization, width)
    is_elsewhere = config.vllm_mode == "server" or uses_ray
    share = 0.0 if is_elsewhere else config.vllm_gpu_memory_utilization
    return EnginePlan(share, width, linear, config.vllm_tensor_parallel_size)


def _autocast_of(config: Any, on_gpu: bool) -> torch.dtype | None:
    """Return autocast's precision.

    Without a GPU in this machine, a configuration has switched bf16 off; for another machine's GPU
    TRL's default holds.
    """
    if config.fp16:
        return torch.float16
    if config.bf16 or (on_gpu and not torch.accelerator.is_available()):
        return torch.bfloat16
    return None
