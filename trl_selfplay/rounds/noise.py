"""Switch off the noise that a model adds only in training, and check by a trial that it is off.

In: a model as the trainer holds it. Out: the same model with a deterministic forward in train mode, or an
error. SPIN compares a policy with itself at the start of the round, and Quiet-STaR samples a thought in
one forward and scores it in another: with noise these would be two policies.

Sources of noise in transformers' and PEFT's models are `nn.Dropout`; probabilities of functional dropout
(attention, residual, embedding, activation), layerdrop or stochastic depth, as an attribute, in a dict by
adapter, or read from the config in each forward; jitter on the input of a router; NEFTune; and routers
that sample their experts (PhiMoE).
"""

import re
from typing import Any

import torch
from torch import nn

from trl_selfplay.generation.model_traits import (
    has_whole_weights,
    input_device,
    sampling_state,
    without_adapters,
)

_PROBABILITY = re.compile(r"dropout|pdrop|layer_?drop|drop_?(prob|path|rate)")
# By their exact names: PhiMoE's `router_jitter_noise` is a threshold that eval mode needs as well.
_AMPLITUDES = ("jitter_noise", "input_jitter_noise", "moe_jitter_eps", "neftune_noise_alpha")
# Routers that draw in train mode and take the largest in eval mode, whatever their attributes.
_DRAWING_ROUTERS = ("PhimoeTopKRouter",)
# Largest difference between two forwards, relative to the logits, that is rounding.
_TOLERANCE = {torch.float32: 1e-5}
_REDUCED_TOLERANCE = 1e-2
_TRIAL_ROWS, _TRIAL_TOKENS, _TRIAL_WEIGHT = 2, 16, 0.1


def switch_noise_off(model: Any) -> list[str]:
    """Permanently switch off everything that makes a forward in train mode random.

    The model's saved config changes only if a forward reads its noise from it.

    Returns:
        Names of what was above 0, such as "OPTDecoder.layerdrop".

    Raises:
        ValueError: Two forwards in train mode still differ.
    """
    switched: dict[str, None] = {}
    for module in model.modules():
        switched |= dict.fromkeys(_silence(module))
    is_whole = has_whole_weights(model)
    if not is_whole or _is_noisy(model):
        for config in {id(m.config): m.config for m in model.modules() if _has_config(m)}.values():
            switched |= dict.fromkeys(_zero(config.__dict__, type(config).__name__))
    if is_whole and _is_noisy(model):
        name = type(without_adapters(model)).__name__
        raise ValueError(
            f"{name} gives other logits for the same tokens each time it is asked in train mode, "
            "also with dropout and router noise at 0. What is sampled and what is trained on would "
            "be two policies. Use a model without randomness of its own in training."
        )
    return list(switched)


def _silence(module: Any) -> list[str]:
    name = type(module).__name__
    if name in _DRAWING_ROUTERS:
        if "train" in module.__dict__:
            return []
        module.eval()
        module.train = lambda mode=True: module  # stays in eval mode when the model is switched
        return [name]
    switched = _zero(module.__dict__, name)
    if "dropout" in name.lower() and _is_above_0(module.__dict__.get("p")):
        module.p = 0.0
        switched.append(name)
    return switched


def _zero(attributes: dict[str, Any], owner: str) -> list[str]:
    """Set probabilities and amplitudes of noise to 0; return the names of those that were above."""
    switched = []
    for name, value in attributes.items():
        if not (_PROBABILITY.search(name) or name in _AMPLITUDES):
            continue
        if isinstance(value, dict):  # of each adapter
            noisy = [key for key, entry in value.items() if _is_above_0(entry)]
            value.update(dict.fromkeys(noisy, 0.0))
        else:
            noisy = [name] if _is_above_0(value) else []
            attributes.update(dict.fromkeys(noisy, 0.0))
        if noisy:
            switched.append(f"{owner}.{name}")
    return switched


def _is_above_0(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and value > 0


def _has_config(module: Any) -> bool:
    return hasattr(module.__dict__.get("config"), "to_diff_dict")


@torch.no_grad()
def _is_noisy(model: Any) -> bool:
    """Return whether two forwards in train mode differ.

    New adapters often contribute nothing because one of their factors is 0; the trial changes that.
    """
    still = [p for p in model.parameters() if hasattr(model, "peft_config") and _trains_from_0(p)]
    for parameter in still:
        parameter.fill_(_TRIAL_WEIGHT)
    try:
        return _two_forwards_differ(model)
    finally:
        for parameter in still:
            parameter.zero_()


def _trains_from_0(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and not bool(parameter.any())


def _two_forwards_differ(model: Any) -> bool:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(_TRIAL_ROWS * _TRIAL_TOKENS, device=input_device(model)) % vocabulary
    ids = ids.view(_TRIAL_ROWS, _TRIAL_TOKENS)
    with sampling_state(model, None) as trial:
        trial.train()
        first, second = (
            trial(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            for _ in range(2)
        )
    tolerance = _TOLERANCE.get(first.dtype, _REDUCED_TOLERANCE)
    difference = (first - second).abs().max()
    return not bool(difference <= tolerance * first.abs().max().clamp(min=1.0))
