"""A model that thinks, on disk: its weights as transformers or PEFT save them, and two files more.

In: a folder with saved weights, or one to load. Out: `quiet_star.safetensors` (vectors and mixing
head), `quiet_star.json` (settings, and samples of the base's weights), and model files that load
without this package. Nothing is ever initialised on load.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trl_selfplay.thoughts.mixing import ATTRIBUTE, ThoughtModule

WEIGHTS_NAME, SETTINGS_NAME = "quiet_star.safetensors", "quiet_star.json"
_FORMAT = 1
# Values kept of each of the base's weights, and how far they may differ: as much as rounding to
# bfloat16 takes away.
_VALUES_PER_WEIGHT = 4
_TOLERANCE = 4e-3


@dataclass(frozen=True, slots=True)
class ThoughtSettings:
    """How a model thinks.

    Attributes:
        thought_length: Sampled tokens of a thought.
        thought_temperature: Of sampling them.
        barred: Tokens that neither thoughts nor generated text contain.
    """

    thought_length: int
    thought_temperature: float = 1.0
    barred: tuple[int, ...] = ()


def save_settings(
    folder: Path, settings: ThoughtSettings, causal_lm: Any, extra: Mapping[str, Any]
) -> None:
    """Write `quiet_star.json`: settings, the base's name and samples of its weights."""
    module = getattr(causal_lm, ATTRIBUTE)
    content = {
        "format": _FORMAT,
        **asdict(settings),
        "meta_token_scale": module.scale,
        "training": dict(extra),
        "base_model": {
            "name": causal_lm.config.name_or_path,
            "revision": getattr(causal_lm.config, "_commit_hash", None),
            "values": sample_base_values(causal_lm),
        },
    }
    (folder / SETTINGS_NAME).write_text(json.dumps(content, indent=1))


def load_settings(folder: Path) -> tuple[ThoughtSettings, dict[str, Any]]:
    """Read `quiet_star.json`; return the settings, and all that it holds.

    Raises:
        ValueError: The file is of another format.
    """
    content = json.loads((folder / SETTINGS_NAME).read_text())
    if content["format"] != _FORMAT:
        raise ValueError(
            f"{folder / SETTINGS_NAME} has format {content['format']}; this version of trl_selfplay "
            f"reads format {_FORMAT}. Install the version that saved it."
        )
    settings = ThoughtSettings(
        content["thought_length"], content["thought_temperature"], tuple(content["barred"])
    )
    return settings, content


def save_module(causal_lm: Any, folder: Path) -> None:
    """Write the thought module's own weights to `quiet_star.safetensors`."""
    module = getattr(causal_lm, ATTRIBUTE)
    if hasattr(module, "modules_to_save"):  # PEFT keeps the trained copy beside the original
        module = module.modules_to_save[module.active_adapters[0]]
    weights = {name: p.detach().cpu().contiguous() for name, p in module.state_dict().items()}
    save_file(weights, folder / WEIGHTS_NAME)


def load_module(folder: Path, scale: float) -> ThoughtModule:
    """Return the saved thought module, in float32.

    Raises:
        FileNotFoundError: The folder holds none.
    """
    path = folder / WEIGHTS_NAME
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no {WEIGHTS_NAME}: it was not saved by QuietSTaRTrainer or "
            "QuietSTaRModel, or that file was not copied along."
        )
    weights = load_file(path)
    module = ThoughtModule(torch.zeros_like(weights["vectors"][0]), scale)
    module.load_state_dict(weights, strict=True)
    return module


def strip_model_files(folder: Path) -> None:
    """Take the thought module out of a folder's model files, so that they load without it.

    Only files that hold some of its weights are written again.
    """
    removed = set()
    for path in sorted(folder.glob("*.safetensors")):
        if path.name == WEIGHTS_NAME:
            continue
        with safe_open(path, "pt") as file:
            ours = {key for key in file.keys() if _is_ours(key)}  # noqa: SIM118  # no mapping
            metadata = file.metadata()
        if ours:
            rest = {key: value for key, value in load_file(path).items() if key not in ours}
            save_file(rest, path, metadata)
            removed |= ours
    for path in folder.glob("*.safetensors.index.json"):
        index = json.loads(path.read_text())
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if k not in removed}
        path.write_text(json.dumps(index, indent=2))
    adapter = folder / "adapter_config.json"
    if adapter.exists():
        config = json.loads(adapter.read_text())
        kept = [name for name in config.get("modules_to_save") or () if name != ATTRIBUTE]
        config["modules_to_save"] = kept or None
        adapter.write_text(json.dumps(config, indent=2))


def sample_base_values(causal_lm: Any) -> dict[str, list[float]]:
    """Return some values of each of the base's weights that isn't quantized, by name.

    Adapters and the thought module are left out; names are those without adapters.
    """
    values: dict[str, list[float]] = {}
    for name, parameter in causal_lm.named_parameters():
        if "lora_" in name or ".modules_to_save." in name or _is_ours(name):
            continue
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        flat = parameter.detach().flatten()
        places = torch.linspace(0, len(flat) - 1, _VALUES_PER_WEIGHT + 2).long()[1:-1]
        values[plain] = flat[places.to(flat.device)].float().tolist()
    return values


def check_base(causal_lm: Any, content: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError if a model isn't the base that a folder's thoughts were trained on.

    Weights that only one of the two holds as plain numbers (the other quantized) aren't compared.
    """
    saved, here = content["base_model"]["values"], sample_base_values(causal_lm)
    shared = sorted(saved.keys() & here.keys())
    differing = [
        name
        for name in shared
        if any(
            abs(a - b) > _TOLERANCE * abs(a) + 1e-6
            for a, b in zip(saved[name], here[name], strict=True)
        )
    ]
    if differing or not shared:
        what = (
            f"{len(differing)} of {len(shared)} weights differ, {differing[0]} among them"
            if shared
            else "they have no weight in common"
        )
        raise ValueError(
            f"{folder} was trained on {content['base_model']['name']!r} (revision "
            f"{content['base_model']['revision']}), and the model given as its base is another one: "
            f"{what}. Its mixing head would be meaningless; load the base it was trained on."
        )


def _is_ours(key: str) -> bool:
    return key.startswith(f"{ATTRIBUTE}.") or f".{ATTRIBUTE}." in key
