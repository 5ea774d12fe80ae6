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
from torch import nn

from trl_selfplay.estimation.advice import advise
from trl_selfplay.estimation.optimizers import optimizer_bytes, step_bytes
from trl_selfplay.estimation.plan import RunPlan, read_plan
from trl_selfplay.estimation.record import GB, Estimate, Phase, read_bytes
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
    memory: int | str | None = None,
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
        memory: What is free on the device, in bytes or as text such as "12GB" or "11.5 GiB". If the run
            doesn't fit, `advice` says what would.
        device: "cuda" or "cpu"; None for the one that the trainer would use on this machine. For
            "cuda" on a machine without a GPU, autocast is taken to be bfloat16, TRL's default.
        reward_models: Models that grade on the device while sampling, or their names or
            configurations; they leave it during training.

    Raises:
        TypeError: An argument has another type, such as a class in place of an instance.
        ValueError: A length is below 1, or `memory` no amount that a device can have.
        CannotEstimateError: A ValueError: weights are sharded over devices, or quantized other than
            by bitsandbytes; the model can't run without data; or neither `max_length` nor
            `row_length` is set for a trainer that doesn't sample.
    """
    memory = None if memory is None else read_bytes(memory)
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
        notes=tuple(_notes(plan, twin, memory)),
    )
    if memory is None or found.fits(memory):
        return found
    free = memory

    def peak_of(changed: RunPlan) -> int:
        twin = build_twin(changed.model, changed.loading, changed.peft_config, changed.own_step)
        return max(phase.total for phase in _phases(changed, twin, graders, free))

    return replace(found, advice=(advise(plan, peak_of, free),))


def _notes(plan: RunPlan, twin: Twin, memory: int | None) -> Iterator[str]:
    """Yield what isn't counted, and what an engine wouldn't start with."""
    if "paged" in plan.optim:
        yield _PAGED
    if plan.engine is None or not plan.engine.share or memory is None:
        return
    needed = _engine_needs(plan, twin)
    if plan.engine.share * memory < needed:
        yield (
            f"The engine needs {needed / GB:.1f} GB for its own weights and one sequence, and "
            f"vllm_gpu_memory_utilization={plan.engine.share:g} gives it "
            f"{plan.engine.share * memory / GB:.1f} GB."
        )


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
    if plan.engine is not None:
        if plan.engine.share:  # a server has a device of its own
            parts["engine"] = _engine_needs(plan, twin)
            if memory is not None:
                left = max(0, memory - parts.total() + parts["engine"])
                most = int(min(plan.engine.share * memory, SHARE_OF_FREE_MEMORY * left))
                parts["engine"] = max(parts["engine"], most)
        detail = f"an engine with up to {plan.engine.share:.0%} of the device's memory"
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


def _engine_needs(plan: RunPlan, twin: Twin) -> int:
    """Return the bytes of an engine's own weights, and of the cache of one sequence."""
    engine: Any = plan.engine
    causal_lm = twin.causal_lm
    ends = {id(m): m for m in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())}
    in_ends = sum({id(p): p.numel() for m in ends.values() for p in m.parameters()}.values())
    in_layers = _num_parameters(twin) - in_ends
    weights = in_ends * engine.dtype_bytes + in_layers * engine.linear_bytes
    cache = describe_model(twin.model).bytes_per_token * (
        plan.prompt_length + plan.completion_length
    )
    return int((weights + cache) / engine.num_devices)


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
