"""What an inference engine in a process of its own is told: its settings, and whose weights it serves.

In: a trainer's config and the folders to which it wrote its weights. Out: `EngineSettings` and
`EngineWeights`, records for vllm_sampler.py; and the least version of vLLM that takes them.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

LEAST_VLLM = (0, 32)
# The trainer's model is on the same device. What an engine may use must be free when it starts.
SHARE_OF_FREE_MEMORY = 0.95


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How a vLLM engine is started. Numbers are checked by the config that they come from.

    Attributes:
        python: The interpreter that runs the engine; None for this one. Its environment has vLLM,
            and needs none of our packages.
        dtype: Precision of the weights: "auto" (the model's own), "bfloat16", "float16", "float32".
        quantization: vLLM's name of a method ("fp8", "bitsandbytes"), or None.
        gpu_memory_utilization: Share of the device's memory that the engine may use. On a CPU, the
            share of the memory of one NUMA node for keys and values.
        max_model_length: Most tokens of prompt and completion; None for the model's context.
        tensor_parallel_size: Number of devices.
        max_num_seqs: Most sequences decoded together; None for 256, and 64 on a CPU.
        enforce_eager: Whether to leave out compilation and CUDA graphs; None for eager on a CPU,
            where compilation takes minutes.
        trust_remote_code: Whether code from the model's repository may run.
        start_patience_s: Seconds within which an engine must have started.
        step_patience_s: Seconds within which a busy engine must finish a step.
        engine_arguments: Further arguments of vLLM's `EngineArgs`; they override the others.
    """

    python: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: str | None = None
    gpu_memory_utilization: float = 0.9
    max_model_length: int | None = None
    tensor_parallel_size: int = 1
    max_num_seqs: int | None = None
    enforce_eager: bool | None = None
    trust_remote_code: bool = False
    start_patience_s: float = 1800.0
    step_patience_s: float = 600.0
    engine_arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineWeights:
    """Whose weights the engine serves.

    Attributes:
        model: Name or folder of the base model, or a folder with a copy of the whole policy.
        adapter: Folder of the current LoRA adapter in PEFT's format, or None.
        adapter_rank: Largest rank of the adapter's layers; 0 without one.
        version: Another one whenever the weights have changed.
        revision: Commit, branch or tag of `model` on the hub.
    """

    model: str
    adapter: Path | None
    adapter_rank: int
    version: int | str
    revision: str | None = None


class RecordsEngine(Protocol):
    """A sampler that says which engine drew its completions.

    Attributes:
        engine_record: The engine's name and version, dtype and quantization as JSON values, to be
            stored with each shard; None in process, or before an engine has started.
    """

    engine_record: dict[str, Any] | None
