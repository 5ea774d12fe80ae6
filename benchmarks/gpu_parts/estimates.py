"""Part d: memory as `trl_selfplay.estimate` tells it beforehand against the peaks of parts a, b and e.

In: the files of these parts. Out: items, one for each run that was measured: bytes estimated and
measured by phase. Nothing runs on the device, so this part can follow on any machine.
"""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_parts import models, quantized, quiet_star, whole_round
from gpu_parts.items import Item, Records, is_done

from trl_selfplay import estimate

# What the estimate calls a phase, and what PhaseClock does.
_PHASES = {"reference": "scoring", "training": "training"}


def build_items(device: str, results: Path) -> list[Item]:
    """Return the items of this part: what other parts have measured."""
    is_gpu = device == "cuda"
    in_a = quantized.FULL if is_gpu else quantized.TOY
    in_b = whole_round.FULL if is_gpu else whole_round.TOY
    in_e = quiet_star.FULL if is_gpu else quiet_star.TOY
    four_bit = {"peft_config": models.lora(), "quantization_config": models.quantization()}
    prompt = {"prompt_length": in_a.prompt}
    cases: dict[str, tuple[str, str, Any, dict[str, Any]]] = {
        name: ("a", sizes.model, partial(quantized.star_config, sizes), four_bit | prompt)
        for name, sizes in {"star": in_a, **quantized.cards_of(in_a)}.items()
    }
    cases |= {
        "spin": ("a", in_a.model, partial(quantized.spin_config, in_a), four_bit | prompt),
        "rest_em": (
            "b",
            in_b.model,
            partial(whole_round.rest_em_config, in_b),
            {"peft_config": models.lora(), "prompt_length": in_b.prompts[1]},
        ),
    }
    for length in (in_e.length, *in_e.searched):
        config = partial(quiet_star.quiet_star_config, in_e)
        cases[f"split {length}"] = ("e", in_e.model, config, {"row_length": length})
    items = []
    for name, (part, size, config, arguments) in cases.items():
        record = Records(results / f"{part}.json").load().get(name)
        if is_done(record):
            run = partial(compare, record, size, config, arguments, device)
            items.append(Item(f"{part} {name}", run, 5.0))
    return items


def compare(
    record: dict[str, Any],
    size: str,
    config: Callable[[str, str], Any],
    arguments: dict[str, Any],
    device: str,
) -> dict[str, Any]:
    """Return bytes estimated and measured by phase."""
    with tempfile.TemporaryDirectory() as folder:
        # Without a GPU no configuration may ask for bf16; the estimate takes it for granted.
        settings = config("cuda" if torch.cuda.is_available() else "cpu", folder)
    settings.model_init_kwargs = {"dtype": "bfloat16" if device == "cuda" else "float32"}
    found = estimate(models.CONFIGS[size], settings, device=device, **arguments)
    measured = record.get("peaks") or {"training": record["peak"]}
    phases = {}
    for phase in found.phases:
        peaks = measured.get(_PHASES.get(phase.name, ""))
        if peaks is not None:
            phases[phase.name] = {
                "estimated": phase.total,
                "parts": dict(phase.parts),
                "measured": peaks["allocated"],
            }
    return {"phases": phases}
