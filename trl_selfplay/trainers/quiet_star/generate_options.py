"""The options of `QuietSTaRModel.generate`: transformers' keywords, and the model's own defaults.

In: keywords, a generation config, and the model's generation config. Out: sampling options, or an
error that names each option that isn't supported.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from trl_selfplay.generation.generation_options import (
    check_generation_config,
    check_sampling_options,
)
from trl_selfplay.generation.sampler import SamplingOptions

logger = logging.getLogger(__name__)

# The default of transformers' `generate`.
_DEFAULT_NEW_TOKENS = 20
# Options that only affect sampling, with the values at which they have no effect.
_OF_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (0.0, 1.0),
    "top_k": (0,),
    "top_p": (1.0,),
    "min_p": (0.0,),
}
TAKEN = (
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "num_return_sequences",
    "eos_token_id",
    "pad_token_id",
    "generation_config",
    "stopping_criteria",
    "num_thoughts",
    "thought_temperature",
    "seed",
    "use_cache",
)


@dataclass(frozen=True, slots=True)
class GenerateOptions:
    """Options of one `generate` call.

    Attributes:
        sampling: How tokens are chosen, and the maximum number of new tokens.
        num_return_sequences: Continuations per prompt.
        pad_token_id: Fills rows that have ended.
    """

    sampling: SamplingOptions
    num_return_sequences: int
    pad_token_id: int


def refuse_unknown(options: Mapping[str, Any]) -> None:
    """Raise TypeError for unsupported keywords of `generate`, unless they are switched off."""
    if (options.get("num_beams") or 1) != 1:
        raise TypeError(
            f"QuietSTaRModel.generate got num_beams={options['num_beams']}: thoughts are not kept per "
            "beam. Leave it out, or sample with do_sample=True and num_return_sequences and choose "
            "among the texts."
        )
    unknown = [
        f"{name}={value!r}"
        for name, value in options.items()
        if value is not None and value is not False and (name, value) != ("num_beams", 1)
    ]
    if unknown:
        raise TypeError(
            f"QuietSTaRModel.generate doesn't take {', '.join(unknown)}. It takes input_ids, "
            f"attention_mask, {', '.join(TAKEN)}; without thoughts, use `model.model.generate`."
        )


def read_options(
    keywords: Mapping[str, Any],
    given: GenerationConfig | None,
    of_model: GenerationConfig,
    num_prompt_tokens: int,
) -> GenerateOptions:
    """Return the options, from the keywords, then `given`, then the model's generation config.

    Args:
        keywords: Values by the names of GenerationConfig's fields; None if not given.
        given: A generation config, or None.
        of_model: The model's generation config.
        num_prompt_tokens: Number of prompt columns, including padding.

    Raises:
        ValueError: A config sets an unsupported option, or a value is out of range.
    """
    configs = [config for config in (given, of_model) if config is not None]
    for config in configs:
        checked = copy.copy(config)
        checked.num_return_sequences = None  # supported here
        check_generation_config(checked)

    def read(name: str, default: Any = None) -> Any:
        values = [keywords.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), default)

    do_sample = read("do_sample", False)
    eos, pad = read("eos_token_id", []), read("pad_token_id")
    stops = [eos] if isinstance(eos, int) else list(eos)
    sampling = SamplingOptions(
        max_completion_length=_read_length(keywords, configs, num_prompt_tokens),
        temperature=float(read("temperature", 1.0)) if do_sample else 0.0,
        top_k=read("top_k", 0) if do_sample else 0,
        top_p=float(read("top_p", 1.0)) if do_sample else 1.0,
        min_p=read("min_p") if do_sample else None,
        repetition_penalty=float(read("repetition_penalty", 1.0)),
        eos_token_ids=tuple(stops),
    )
    check_sampling_options(sampling)
    count = read("num_return_sequences", 1)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"num_return_sequences={count!r}; it must be an integer of at least 1.")
    if do_sample and sampling.temperature == 0.0:
        raise ValueError(
            "temperature=0.0 with do_sample=True; set do_sample=False for greedy text."
        )
    if not do_sample:
        if count > 1:
            raise ValueError(
                f"num_return_sequences={count} without do_sample=True would return copies of one "
                "text. Set do_sample=True."
            )
        unused = [
            f"{name}={keywords[name]!r}"
            for name, neutral in _OF_SAMPLING.items()
            if keywords.get(name) is not None and keywords[name] not in neutral
        ]
        if unused:
            logger.warning("%s has no effect without do_sample=True.", ", ".join(unused))
    pad = pad if pad is not None else stops[0] if stops else 0
    return GenerateOptions(sampling, count, pad)


def _read_length(
    keywords: Mapping[str, Any], configs: list[GenerationConfig], num_prompt_tokens: int
) -> int:
    """Return the maximum number of new tokens, from the first source that sets it."""
    sources = [keywords, *({name: getattr(c, name, None) for name in TAKEN} for c in configs)]
    for source in sources:
        new, whole = source.get("max_new_tokens"), source.get("max_length")
        if new is not None and new < 1:
            raise ValueError(f"max_new_tokens={new}; it must be at least 1.")
        if new is not None:
            return int(new)
        if whole is not None and whole <= num_prompt_tokens:
            raise ValueError(
                f"max_length={whole} leaves no room for new tokens after prompts of "
                f"{num_prompt_tokens}. Set max_new_tokens."
            )
        if whole is not None:
            return int(whole) - num_prompt_tokens
    return _DEFAULT_NEW_TOKENS
