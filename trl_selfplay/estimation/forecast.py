"""How much memory a run takes, phase by phase, told from its configuration alone.

In: a model or its name, and a trainer's configuration. Out: `Estimate`, with changes of settings that
would make the run fit. Nothing is loaded: the model's own classes run on tensors without data, and
the bytes of these are counted.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

from trl_selfplay.estimation.optimizers import optimizer_bytes, step_bytes
from trl_selfplay.estimation.plan import RunPlan, read_plan
from trl_selfplay.estimation.record import GB, Estimate, Phase
from trl_selfplay.estimation.training_step import Batch, step_peak
from trl_selfplay.estimation.twin import Twin, build_twin
from trl_selfplay.generation.batch_size import bytes_per_sequence, largest_batch
from trl_selfplay.generation.engine import SHARE_OF_FREE_MEMORY
from trl_selfplay.generation.model_traits import describe_model

# Workspaces of cuBLAS in forward and backward, which PyTorch's allocator holds; as measured on an H200.
_WORKSPACES = 128 * 2**20
_PAGED = "The state of a paged optimizer isn't counted: it leaves the device when memory is short."


def estimate(
    model: Any,
    config: Any,
    *,
    peft_config: Any = None,
    quantization_config: Any = None,
    prompt_length: int | None = None,
    row_length: int | None = None,
    memory: int | None = None,
    device: str | None = None,
    reward_models: Sequence[Any] = (),
) -> Estimate:
    """Return how much memory a run takes, without loading the model.

    Every training batch is taken to be full: `per_device_train_batch_size` rows of `max_length`
    tokens, all trained on. Memory that the device's driver and other programs take isn't counted;
    of an 8 GB card, count on 7.4 GB.

    Args:
        model: As the trainer takes it: a name, a folder, or a loaded model; or a configuration.
        config: The trainer's configuration.
        peft_config: As the trainer takes it.
        quantization_config: As the trainer takes it.
        prompt_length: Tokens of the longest prompt. None: what `max_completion_length` leaves of
            `max_length`.
        row_length: Tokens of the longest row of training. None: `max_length`, or less if prompts
            and completions are shorter.
        memory: Bytes that are free on the device. If the run doesn't fit, `advice` says what would.
        device: "cuda" or "cpu"; None for the one that the trainer would use on this machine. For
            "cuda" on a machine without a GPU, autocast is taken to be bfloat16, TRL's default.
        reward_models: Models that grade on the device while sampling, or their names or
            configurations; they leave it during training.

    Raises:
        CannotEstimateError: A ValueError: weights are sharded over devices, or quantized other than
            by bitsandbytes; the model can't run without data; or neither `max_length` nor
            `row_length` is set for a trainer that doesn't sample.
    """
    plan = read_plan(
        model, config, peft_config, quantization_config, prompt_length, row_length, device
    )
    graders = sum(_weight_bytes(each) for each in reward_models)
    twin = build_twin(plan.model, plan.loading, plan.peft_config, plan.own_step)
    phases = _phases(plan, twin, graders, memory)
    found = Estimate(
        model=_name_of(model),
        device="cuda" if plan.on_gpu else "cpu",
        phases=phases,
        num_parameters=_num_parameters(twin),
        num_trainable=sum(p.numel() for p in twin.trainable),
        smallest=twin.weight_bytes + twin.adapter_bytes,
        notes=(_PAGED,) if "paged" in plan.optim else (),
    )
    if memory is None or found.fits(memory):
        return found
    return replace(found, advice=tuple(_advise(_as_planned(plan), graders, memory)))


def _phases(plan: RunPlan, twin: Twin, graders: int, memory: int | None) -> tuple[Phase, ...]:
    phases = []
    if plan.completion_length:
        phases.append(_sampling(plan, twin, graders, memory))
    if plan.are_pairs:
        phases.append(_reference(plan, twin))
    phases.append(_training(plan, twin))
    return tuple(phases)


def _weights(twin: Twin) -> Counter[str]:
    return Counter(weights=twin.weight_bytes, adapter=twin.adapter_bytes)


def _sampling(plan: RunPlan, twin: Twin, graders: int, memory: int | None) -> Phase:
    """Count what the sampler's own choice of a batch leads to."""
    parts = _weights(twin)
    if graders:
        parts["grading models"] = graders
    if plan.engine_share is not None:
        if memory is not None:
            left = max(0, memory - parts.total())
            parts["engine"] = int(min(plan.engine_share * memory, SHARE_OF_FREE_MEMORY * left))
        detail = f"an engine with up to {plan.engine_share:.0%} of the device's memory"
        return Phase("sampling", dict(parts), detail)
    traits = describe_model(twin.model)
    each = bytes_per_sequence(traits, plan.prompt_length, plan.completion_length, plan.on_gpu)
    length = plan.prompt_length + plan.completion_length
    count = 1
    if memory is not None:
        free, on_cpu = max(0, memory - parts.total()), not plan.on_gpu
        count = largest_batch(traits, length, twin.weight_bytes, each, free, on_cpu)
    parts["cache"] = traits.bytes_per_token * length * count
    parts["activations"] = traits.bytes_per_prompt_token * plan.prompt_length * count
    parts["logits"] = each * count - parts["cache"] - parts["activations"]
    detail = f"{count} sequences of {length} tokens at once"
    if memory is None:
        detail += "; as many more as fit"
    return Phase("sampling", dict(parts), detail)


def _reference(plan: RunPlan, twin: Twin) -> Phase:
    batch = _batch(plan, plan.scored_rows)
    parts = _weights(twin) + step_peak(twin, batch, with_gradients=False)
    return Phase("reference", dict(parts), f"{batch.rows} rows of {batch.length} tokens")


def _training(plan: RunPlan, twin: Twin) -> Phase:
    batch = _batch(plan, plan.rows)
    held = _weights(twin)
    held["optimizer"] = optimizer_bytes(twin.trainable, plan.optim)
    in_step = step_peak(twin, batch, plan.own_step)
    if plan.on_gpu:
        in_step["activations"] += _WORKSPACES
    gradients = sum(p.nbytes for p in twin.trainable)
    in_update = Counter(
        gradients=gradients, activations=step_bytes(twin.trainable, plan.optim, plan.on_gpu)
    )
    parts = held + max(in_step, in_update, key=Counter.total)
    precision = f"autocast to {plan.autocast}" if plan.autocast else "no autocast"
    checkpointing = "checkpointed" if plan.checkpointing is not None else "all activations kept"
    detail = (
        f"{batch.rows} rows of {batch.length} tokens, {precision}, {checkpointing}, {plan.optim}"
    )
    return Phase("training", dict(parts), detail)


def _batch(plan: RunPlan, rows: int) -> Batch:
    return Batch(
        rows=2 * rows if plan.are_pairs else rows,
        length=plan.length,
        autocast=plan.autocast,
        checkpointing=plan.checkpointing,
        accumulates=plan.accumulates,
        on_gpu=plan.on_gpu,
    )


def _advise(plan: RunPlan, graders: int, memory: int) -> Iterator[str]:
    """Yield changes, each on top of those before it, until the run fits."""
    said: list[str] = []
    for change, changed in _changes(plan):
        plan = changed
        said.append(change)
        twin = build_twin(plan.model, plan.loading, plan.peft_config, plan.own_step)
        peak = max(phase.total for phase in _phases(plan, twin, graders, memory))
        if peak <= memory:
            yield f"{', '.join(said)}: {peak / GB:.1f} GB"
            return
    yield f"none of {', '.join(said)} is enough; take a smaller model"


def _as_planned(plan: RunPlan) -> RunPlan:
    """Return the plan of a loaded model as one of a model that will be loaded in the same way."""
    model = plan.model
    if not isinstance(model, nn.Module):
        return plan
    adapters: Any = getattr(model, "peft_config", {})
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return replace(
        plan,
        model=base.config,
        loading={"dtype": base.dtype},  # the configuration says how weights are quantized
        peft_config=next(iter(adapters.values()), plan.peft_config),
    )


def _changes(plan: RunPlan) -> Iterator[tuple[str, RunPlan]]:
    """Yield settings that save memory, those that cost least first; on a CPU none of few bits."""
    quantized = plan.loading.get("quantization_config")
    quantized = quantized or getattr(plan.model, "quantization_config", None)
    if plan.checkpointing is None:
        plan = replace(plan, checkpointing={})
        yield "gradient_checkpointing=True", plan
    if plan.rows > 1:
        plan = replace(plan, rows=1, scored_rows=1, accumulates=True)
        yield "per_device_train_batch_size=1 with more gradient_accumulation_steps", plan
    if plan.peft_config is None and "8bit" not in plan.optim and plan.on_gpu:
        plan = replace(plan, optim="adamw_8bit")
        yield "optim='adamw_8bit'", plan
    if plan.loading.get("dtype", "float32") in ("float32", torch.float32) and plan.on_gpu:
        plan = replace(plan, loading={**plan.loading, "dtype": "bfloat16"})
        yield "model_init_kwargs={'dtype': 'bfloat16'}", plan
    if plan.peft_config is None:
        plan = replace(plan, peft_config=LoraConfig(r=16, target_modules="all-linear"))
        yield "peft_config=LoraConfig(r=16, target_modules='all-linear')", plan
    if quantized is None and plan.on_gpu:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        plan = replace(plan, loading={**plan.loading, "quantization_config": quantization})
        yield "4-bit weights (load_in_4bit=True)", plan
    while plan.length > 256:
        plan = replace(plan, length=max(256, plan.length // 2))
        yield f"max_length={plan.length}", plan


def _num_parameters(twin: Twin) -> int:
    """Count weights; those of 4 bits are packed in pairs."""
    per_number = 2 if twin.quantization in ("nf4", "fp4") else 1
    return sum(
        p.numel() * (per_number if p.dtype == torch.uint8 else 1) for p in twin.model.parameters()
    )


def _weight_bytes(model: Any) -> int:
    if isinstance(model, nn.Module):
        return sum(p.nbytes for p in model.parameters())
    return build_twin(model, {"dtype": "auto"}, None).weight_bytes


def _name_of(model: Any) -> str:
    if isinstance(model, str):
        return model
    config = getattr(model, "config", model)
    return getattr(config, "name_or_path", "") or type(model).__name__
