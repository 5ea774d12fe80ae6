"""Check generation options before sampling starts.

In: the model's generation config, the user's extra options, the sampling options. Out: the ids that
end a completion, or an error that names every option that would otherwise be ignored.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from trl_selfplay.generation.sampler import SamplingOptions

# Logits divided by less may be infinite.
LEAST_TEMPERATURE = 1e-6

SUPPORTED_OPTIONS = frozenset(
    {
        "bos_token_id",
        "do_sample",
        "eos_token_id",
        "max_new_tokens",
        "min_p",
        "pad_token_id",
        "repetition_penalty",
        "temperature",
        "top_k",
        "top_p",
        "use_cache",
    }
)

# Options of a model's generation config that only affect the speed or the return value of
# `generate`, that belong to beam search, assisted decoding or encoder-decoder models, or that our
# own options replace.
_WITHOUT_EFFECT = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "early_stopping",
        "is_assistant",
        "length_penalty",
        "low_memory",
        "max_cache_len",
        "max_length",
        "max_matching_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "output_attentions",
        "output_hidden_states",
        "output_logits",
        "output_scores",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "renormalize_logits",
        "return_dict_in_generate",
        "speculation_type",
        "target_lookbehind",
        "transformers_version",
        "use_mtp",
    }
)

# Values at which an unsupported option does nothing, besides None, False and empty collections.
_NEUTRAL_VALUES: dict[str, tuple[float, ...]] = {
    "diversity_penalty": (0.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0, 1.0),
    "eta_cutoff": (0.0, 1.0),
    "guidance_scale": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0.0,),
    "typical_p": (1.0,),
}


def check_generation_config(generation_config: GenerationConfig | Mapping[str, Any] | None) -> None:
    """Raise ValueError if an option is set that sampling would ignore.

    A model's own `temperature`, `top_p`, `do_sample` and so on are accepted and not used, since
    sampling follows the trainer's config.

    Args:
        generation_config: The model's generation config, or a user's `generation_kwargs`, in which
            an unsupported name is an error whatever its value.

    Raises:
        ValueError: An unsupported option is set; the error names each with its value.
    """
    if generation_config is None:
        return
    if isinstance(generation_config, GenerationConfig):
        # Only the options of `generate`: checkpoints also store other keys in this file.
        known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
        ignored = {
            name: value
            for name in known
            if name not in SUPPORTED_OPTIONS | _WITHOUT_EFFECT
            and not is_neutral(name, value := getattr(generation_config, name, None))
        }
        source = "the model's generation config sets"
        remedy = "Set them to None in model.generation_config if you want completions without them."
    else:
        ignored = {
            name: value
            for name, value in generation_config.items()
            if name not in SUPPORTED_OPTIONS
        }
        if generation_config.get("do_sample") is False:
            ignored["do_sample"] = False
        source = "generation_kwargs holds"
        remedy = "Remove them (greedy decoding is temperature=0.0)."
    if ignored:
        listed = ", ".join(f"{name}={value!r}" for name, value in sorted(ignored.items()))
        raise ValueError(
            f"{source} options that the sampler doesn't support: {listed}. Supported are "
            f"{', '.join(sorted(SUPPORTED_OPTIONS))}; stop strings have a field of their own. "
            f"{remedy}"
        )


def is_neutral(name: str, value: Any) -> bool:
    """Return whether an unsupported option of `generate` has no effect at this value."""
    if value is None or value is False:
        return True
    if isinstance(value, list | tuple | dict) and not value:
        return True
    return not isinstance(value, bool) and value in _NEUTRAL_VALUES.get(name, ())


def collect_eos_token_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return all ids that end a completion, of the model and the tokenizer, sorted.

    Raises:
        ValueError: Neither has an EOS token.
    """
    config = getattr(model, "generation_config", None)
    from_model = getattr(config, "eos_token_id", None)
    if from_model is None:
        from_model = []
    elif isinstance(from_model, int):
        from_model = [from_model]
    ids = {int(i) for i in from_model}
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    if not ids:
        raise ValueError(
            "neither the tokenizer nor the model's generation config has an EOS token, so no "
            "completion could ever end and none would be trained on. Set tokenizer.eos_token (for "
            'example to "</s>") or model.generation_config.eos_token_id.'
        )
    return tuple(sorted(ids))


def check_sampling_options(options: SamplingOptions) -> None:
    """Raise ValueError if an option is out of range.

    Raises:
        ValueError: The error names the option, its value and its range.
    """
    rules = (
        ("max_completion_length", options.max_completion_length >= 1, "at least 1"),
        (
            "temperature",
            options.temperature == 0.0 or options.temperature >= LEAST_TEMPERATURE,
            f"at least {LEAST_TEMPERATURE:g}, or 0.0 (greedy)",
        ),
        ("top_p", 0.0 < options.top_p <= 1.0, "above 0.0 and at most 1.0 (1.0 is off)"),
        ("top_k", options.top_k >= 0, "at least 0 (0 is off)"),
        (
            "min_p",
            options.min_p is None or 0.0 <= options.min_p <= 1.0,
            "between 0.0 and 1.0, or None",
        ),
        ("repetition_penalty", options.repetition_penalty > 0.0, "above 0.0 (1.0 is off)"),
        ("stop_strings", all(options.stop_strings), "without an empty string"),
    )
    for name, is_valid, expected in rules:
        if not is_valid:
            raise ValueError(f"{name} must be {expected}, but is {getattr(options, name)!r}.")


def without_added_eos(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Remove the EOS that some tokenizers append to every text, which would end a prompt."""
    return list(ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids)
