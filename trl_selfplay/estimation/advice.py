"""Which settings would make a run fit into its memory.

In: the plan of a run, and a function that tells a plan's peak. Out: one line with the changes, each of
which is needed, or with what isn't enough.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import BitsAndBytesConfig

from trl_selfplay.estimation.plan import RunPlan
from trl_selfplay.estimation.record import GB

_LEAST_LENGTH = 256


@dataclass(frozen=True, slots=True)
class _Change:
    """A setting to change, as a user would write it, and what becomes of the plan."""

    text: str
    fields: dict[str, Any]


def advise(plan: RunPlan, peak_of: Callable[[RunPlan], int], memory: int) -> str:
    """Return changes with which the run fits, and the peak they lead to.

    They are added one on top of the other, those first that cost least, until the run fits. Then those
    are dropped that the others have made needless.

    Args:
        plan: Of a run that doesn't fit.
        peak_of: Returns the bytes at the peak of a plan.
        memory: Bytes that are free.
    """
    plan = _as_planned(plan)
    taken: list[_Change] = []
    for change in _changes(plan):
        # A smaller length takes the place of the one before.
        taken = [each for each in taken if each.fields.keys() != change.fields.keys()]
        taken.append(change)
        if (peak := peak_of(_changed(plan, taken))) <= memory:
            break
    else:
        listed = ", ".join(change.text for change in taken)
        return f"none of {listed} is enough; take a smaller model"
    for change in taken[-2::-1]:  # those that cost most first; without the last it doesn't fit
        fewer = [each for each in taken if each is not change]
        if (smaller := peak_of(_changed(plan, fewer))) <= memory:
            taken, peak = fewer, smaller
    return f"{', '.join(change.text for change in taken)}: {peak / GB:.1f} GB"


def _changed(plan: RunPlan, changes: list[_Change]) -> RunPlan:
    for change in changes:
        fields = dict(change.fields)
        if "loading" in fields:
            fields["loading"] = {**plan.loading, **fields["loading"]}
        plan = replace(plan, **fields)
    return plan


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


def _changes(plan: RunPlan) -> Iterator[_Change]:
    """Yield settings that save memory, those that cost least first; on a CPU none of few bits."""
    quantized = plan.loading.get("quantization_config")
    quantized = quantized or getattr(plan.model, "quantization_config", None)
    engine = plan.engine
    if plan.checkpointing is None:
        yield _Change("gradient_checkpointing=True", {"checkpointing": {}})
    if plan.rows > 1:
        yield _Change(
            "per_device_train_batch_size=1 with more gradient_accumulation_steps",
            {"rows": 1, "scored_rows": 1, "accumulates": True},
        )
    if plan.on_gpu and engine is not None and engine.share and engine.linear_bytes > 1:
        yield _Change("vllm_quantization='fp8'", {"engine": replace(engine, linear_bytes=1)})
    if plan.peft_config is None and "8bit" not in plan.optim and plan.on_gpu:
        yield _Change("optim='adamw_8bit'", {"optim": "adamw_8bit"})
    if plan.loading.get("dtype", "float32") in ("float32", torch.float32) and plan.on_gpu:
        yield _Change("model_init_kwargs={'dtype': 'bfloat16'}", {"loading": {"dtype": "bfloat16"}})
    if plan.peft_config is None:
        yield _Change(
            "peft_config=LoraConfig(r=16, target_modules='all-linear')",
            {"peft_config": LoraConfig(r=16, target_modules="all-linear")},
        )
    if quantized is None and plan.on_gpu:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        yield _Change(
            "4-bit weights (load_in_4bit=True)", {"loading": {"quantization_config": quantization}}
        )
    if engine is not None and engine.share:
        yield _Change("use_vllm=False", {"engine": None})
    length = plan.length
    while length > _LEAST_LENGTH:
        length = max(_LEAST_LENGTH, length // 2)
        yield _Change(f"max_length={length}", {"length": length})
