"""The settings of the recipes' demos, read from the recipes, for the benchmarks that repeat them."""

import runpy
from dataclasses import fields
from pathlib import Path
from typing import Any

_RECIPES = Path(__file__).parent.parent / "recipes"


def demo_flags(recipe: str, changes: str | None = None) -> dict[str, Any]:
    """Return the flags of a recipe's demo by name, with changes such as "QUICK" of "star"."""
    defined = runpy.run_path(str(_RECIPES / f"{recipe}.py"))
    return {**defined["DEMO"], **(defined[changes] if changes else {})}


def demo_settings(recipe: str, config_class: type, changes: str | None = None) -> dict[str, Any]:
    """Return the flags of a recipe's demo that are fields of a configuration, without its folder."""
    names = {field.name for field in fields(config_class)} - {"output_dir"}
    return {name: value for name, value in demo_flags(recipe, changes).items() if name in names}


def demo_lora(recipe: str) -> Any:
    """Return the adapter's configuration of a recipe's demo."""
    from peft import LoraConfig

    flags = demo_flags(recipe)
    return LoraConfig(
        r=flags["lora_r"],
        lora_alpha=flags["lora_alpha"],
        lora_dropout=flags["lora_dropout"],
        target_modules=flags["lora_target_modules"],
    )
