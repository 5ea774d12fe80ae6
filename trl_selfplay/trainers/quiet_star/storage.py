"""Save and load a model that thinks: weights as transformers or PEFT save them, and two more files.

In: a folder to save to or to load from. Out: `quiet_star.safetensors` (thought vectors and mixing
head), `quiet_star.json` (settings, and samples of the base model's weights), and model files that
load without this package. Loading never initializes a weight.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from trl_selfplay.generation.quantized_layers import prepare_quantized_layers
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, ThoughtModule, trained_module
from trl_selfplay.trainers.quiet_star.support import check_model

WEIGHTS_NAME, SETTINGS_NAME = "quiet_star.safetensors", "quiet_star.json"
_FORMAT = 1
# Number of values sampled per weight of the base model, and the relative difference allowed, which
# covers rounding to bfloat16.
_VALUES_PER_WEIGHT = 4
_TOLERANCE = 4e-3


@dataclass(frozen=True, slots=True)
class ThoughtSettings:
    """How a model thinks.

    Attributes:
        thought_length: Number of sampled tokens per thought.
        thought_temperature: Sampling temperature of the thoughts.
        barred: Tokens that neither thoughts nor generated text may contain.
    """

    thought_length: int
    thought_temperature: float = 1.0
    barred: tuple[int, ...] = ()


def save_settings(
    folder: Path, settings: ThoughtSettings, causal_lm: Any, extra: Mapping[str, Any]
) -> None:
    """Write `quiet_star.json`: the settings, and the base model's name and samples of its weights."""
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
    """Read `quiet_star.json`; return the settings, and the whole content.

    Raises:
        ValueError: The file has another format.
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
    """Write the weights of the thought module to `quiet_star.safetensors`."""
    weights = trained_module(causal_lm).state_dict()
    save_file({n: p.detach().cpu().contiguous() for n, p in weights.items()}, folder / WEIGHTS_NAME)


def load_module(folder: Path, scale: float) -> ThoughtModule:
    """Return the saved thought module, in float32.

    Raises:
        FileNotFoundError: The folder has no saved thought module.
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


def find_thoughts(name: str | Path, hub: Mapping[str, Any]) -> Path | None:
    """Return the folder of a model that was saved with thoughts, or None for any other model.

    Args:
        name: A folder, or a repository of the Hub, which is downloaded only if it has thoughts.
        hub: `revision`, `token` and `cache_dir` for the Hub.

    Raises:
        FileNotFoundError: The folder has only one of the two files.
    """
    folder = Path(name)
    if folder.is_dir():
        found = [each for each in (SETTINGS_NAME, WEIGHTS_NAME) if (folder / each).exists()]
        if len(found) == 1:
            (missing,) = {SETTINGS_NAME, WEIGHTS_NAME} - set(found)
            raise FileNotFoundError(
                f"{folder} has {found[0]}, but no {missing}, so its thoughts would be lost. Copy "
                f"that file there too, or delete {found[0]} to start without thoughts."
            )
        return folder if found else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        hf_hub_download(str(name), SETTINGS_NAME, **hub)
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError):
        return None  # if there is no such model, loading it raises
    return local_folder(name, hub)


def local_folder(name: str | Path, hub: Mapping[str, Any]) -> Path:
    """Return the folder itself, or the folder of a Hub repository after downloading it."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name), **hub))


def load_thinking_model(
    folder: Path, base_model: Any, **kwargs: Any
) -> tuple[Any, ThoughtSettings]:
    """Load a saved model with its thought module; return it and its settings.

    Adapters are loaded as a frozen PEFT model with the module in its `modules_to_save`.

    Args:
        folder: The folder of a run, of a checkpoint, or of `QuietSTaRModel.save_pretrained`.
        base_model: The base model or its name; None uses the saved name.
        **kwargs: Passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        FileNotFoundError: The folder has no thoughts.
        ValueError: The base is not the model that was trained, or can't think.
    """
    settings, content = load_settings(folder)
    module = load_module(folder, content["meta_token_scale"])
    adapted = (folder / "adapter_config.json").exists()
    if isinstance(base_model, nn.Module):
        model: Any = base_model
    elif adapted:
        saved = content["base_model"]
        name = saved["name"] if base_model is None else base_model
        if not name:
            raise ValueError(
                f"{folder} holds adapters of a base model that had no name, so the base can't be "
                "loaded. Pass it: QuietSTaRModel.from_pretrained(folder, base_model=...)."
            )
        if name == saved["name"] and saved["revision"] and not Path(name).is_dir():
            kwargs["revision"] = saved["revision"]
        model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    else:
        model = AutoModelForCausalLM.from_pretrained(base_model or folder, **kwargs)
    check_base(model, content, folder)
    prepare_quantized_layers(model)
    check_model(model)
    setattr(model, ATTRIBUTE, module.to(model.get_input_embeddings().weight.device))
    return (_add_adapters(model, folder) if adapted else model), settings


def _add_adapters(model: Any, folder: Path) -> Any:
    """Wrap a model that has a thought module in the saved adapters, frozen."""
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    config.base_model_name_or_path = None  # PEFT fills in the name of this base
    saved = config.modules_to_save or ()
    config.modules_to_save = [*saved, *({ATTRIBUTE} - set(saved))]
    weights = load_peft_weights(str(folder), device="cpu")
    for name, weight in getattr(model, ATTRIBUTE).state_dict().items():
        weights[f"base_model.model.{ATTRIBUTE}.{name}"] = weight  # a checkpoint's copy is replaced
    adapted = get_peft_model(model, config)
    result: Any = set_peft_model_state_dict(adapted, weights)
    if result.unexpected_keys:
        raise ValueError(
            f"{folder} has adapter weights that {type(model).__name__} has no place for, such as "
            f"{result.unexpected_keys[0]}: adapter_config.json belongs to another adapter."
        )
    return adapted


def strip_model_files(folder: Path) -> None:
    """Remove the thought module from a folder's model files, so that they load without it.

    Only files that contain some of its weights are rewritten.
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
    """Return a few values of each unquantized weight of the base model, by name.

    Adapters and the thought module are left out, and names are those of the model without adapters.
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

    Weights that are quantized in one of the two aren't compared.
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
            f"{len(differing)} of {len(shared)} weights differ, such as {differing[0]}"
            if shared
            else "they have no weight in common"
        )
        raise ValueError(
            f"{folder} was trained on {content['base_model']['name']!r} (revision "
            f"{content['base_model']['revision']}), and the given base is another model: {what}. Its "
            "mixing head would be meaningless; load the base it was trained on."
        )


def _is_ours(key: str) -> bool:
    return key.startswith(f"{ATTRIBUTE}.") or f".{ATTRIBUTE}." in key
