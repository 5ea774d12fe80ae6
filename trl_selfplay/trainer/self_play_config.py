"""Fields that the round-based configs share, and the checks that concern them alone.

`SelfPlayConfig` holds fields only; it stands before the TRL config in the bases of each trainer's
config. Where GRPOConfig has a field, the one here has its name, type and meaning.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available

from trl_selfplay.generation.sampler import build_sampling_options
from trl_selfplay.prompts import check_template_kwargs

logger = logging.getLogger(__name__)


@dataclass
class SelfPlayConfig:
    """Fields of the outer loop: rounds, sampling, held-out scores."""

    num_rounds: int = field(
        default=3,
        metadata={"help": "Rounds of sampling, grading, selecting and training."},
    )
    num_prompts_per_round: int | None = field(
        default=None,
        metadata={
            "help": "Prompts to draw afresh for each round, without replacement within a round. "
            "None uses all prompts in every round."
        },
    )
    num_generations: int = field(
        default=1, metadata={"help": "Completions to sample for each prompt."}
    )
    max_completion_length: int = field(
        default=512,
        metadata={"help": "Most tokens of a completion. One that is cut here is never trained on."},
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Sampling temperature; 0.0 is greedy decoding."}
    )
    top_p: float = field(
        default=1.0,
        metadata={"help": "Sample from the smallest set of tokens with this mass; 1.0 is off."},
    )
    top_k: int = field(
        default=0, metadata={"help": "Sample from this many likeliest tokens; 0 is off."}
    )
    min_p: float | None = field(
        default=None,
        metadata={
            "help": "Drop tokens below this share of the likeliest token's probability; None is "
            "off."
        },
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata={"help": "Above 1.0, tokens that already occurred become less likely."},
    )
    stop_strings: list[str] | None = field(
        default=None,
        metadata={
            "help": "A completion ends with the token that completes one of these. It is trained "
            "on with EOS added, so that the model learns to stop there."
        },
    )
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "More generation options, overriding the fields above: `eos_token_id`, "
            "`max_new_tokens`, `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`. "
            "Any other one is an error."
        },
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for the chat template, such as `enable_thinking`. A row's own "
            "`chat_template_kwargs`, in a column of that name, win."
        },
    )
    sanitize_control_tokens: bool = field(
        default=False,
        metadata={
            "help": "Read special tokens in the text of prompts, hints and data as plain text, so "
            "that only the chat template writes control tokens, as the argument of "
            "`apply_chat_template` of that name does. False reads them as control tokens, as TRL."
        },
    )
    log_completions: bool = field(
        default=False,
        metadata={"help": "Print sampled completions with their rewards in each round."},
    )
    num_completions_to_print: int | None = field(
        default=None,
        metadata={"help": "How many completions `log_completions` prints; None prints all."},
    )
    num_generations_eval: int = field(
        default=1,
        metadata={
            "help": "Completions to sample for each held-out prompt, beside the greedy one, for "
            "`eval_pass@k`; 0 samples none."
        },
    )
    temperature_eval: float = field(
        default=1.0,
        metadata={
            "help": "Temperature of the held-out samples (with top_p 0.95), the same in every "
            "round so that rounds compare (ReST^EM, arXiv 2312.06585, Fig. 5)."
        },
    )
    start_from: str = field(
        default="base",
        metadata={
            "help": "Weights that a round's training starts from: those before round 0 or those "
            "the previous round ended with. Sampling always uses the newest.",
            "choices": ["base", "previous"],
        },
    )
    history_rounds: int = field(
        default=0,
        metadata={"help": "Earlier rounds whose selected samples are trained on too."},
    )
    round_learning_rates: list[float] | None = field(
        default=None,
        metadata={"help": "One learning rate for each round, in place of `learning_rate`."},
    )
    round_max_steps: list[int] | None = field(
        default=None,
        metadata={"help": "One number of optimizer steps for each round, in place of `max_steps`."},
    )
    on_empty_round: str = field(
        default="raise",
        metadata={
            "help": "What to do when a round keeps nothing: raise `EmptyRoundError`, or stop and "
            "keep the rounds before it.",
            "choices": ["raise", "stop"],
        },
    )
    load_best_round_at_end: bool | None = field(
        default=None,
        metadata={
            "help": "Load the weights with the best held-out score at the end, the untrained model "
            "included. None: on with an `eval_dataset`."
        },
    )
    stop_after_rounds_without_gain: int | None = field(
        default=None,
        metadata={
            "help": "Stop after this many rounds whose held-out score is not above the best so "
            "far. None never stops."
        },
    )


def switch_off_bf16_without_gpu(config: Any) -> None:
    """Set TRL's default `bf16=None` to False on a machine that has no accelerator, and say so.

    TRL resolves None to bfloat16, which raises on a machine without a GPU, or with `use_cpu=True`
    trains in a precision that most CPUs emulate slowly.
    """
    if config.bf16 is not None or config.fp16:
        return
    if config.use_cpu or not (is_torch_bf16_gpu_available() or torch.accelerator.is_available()):
        config.bf16 = False
        logger.warning(
            "No GPU in use: training in float32 (bf16 is TRL's default; set bf16=False to say so)."
        )


def check_self_play_config(config: Any) -> None:
    """Raise ValueError for values of the shared fields that can't work.

    Each message names the field, its value and what to set.
    """
    if config.round_learning_rates is not None:
        # YAML reads 1e-5 as text, which the parser mends for single numbers but not in lists.
        config.round_learning_rates = [float(rate) for rate in config.round_learning_rates]
    if isinstance(config.stop_strings, str):
        config.stop_strings = [config.stop_strings]
    if "" in (config.stop_strings or ()):
        raise ValueError(
            f"stop_strings={config.stop_strings!r}; an empty text would end every completion before "
            "it began. Leave it out."
        )
    if config.chat_template_kwargs:
        check_template_kwargs(config.chat_template_kwargs, "chat_template_kwargs")
    for name, least in (
        ("num_rounds", 1),
        ("num_generations", 1),
        ("num_generations_eval", 0),
        ("max_completion_length", 1),
    ):
        value = getattr(config, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}; it must be an integer of at least {least}.")
    for name in ("num_prompts_per_round", "stop_after_rounds_without_gain"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value!r}; it must be at least 1, or None.")
    for name in ("temperature", "temperature_eval"):
        if getattr(config, name) < 0.0:
            raise ValueError(f"{name}={getattr(config, name)}; it must be 0.0 (greedy) or above.")
    options = build_sampling_options(config, ())  # with generation_kwargs laid over
    if options.temperature == 0.0 and config.num_generations > 1:
        raise ValueError(
            f"num_generations={config.num_generations} with temperature=0.0: greedy decoding would "
            "give copies of one completion. Set temperature above 0 (0.7 to 1.0 are usual) or "
            "num_generations=1."
        )
    if config.temperature_eval == 0.0 and config.num_generations_eval > 1:
        raise ValueError(
            f"num_generations_eval={config.num_generations_eval} with temperature_eval=0.0 would "
            "grade copies. `eval_accuracy` is greedy already; set temperature_eval above 0."
        )
    if not 0.0 < config.top_p <= 1.0:
        raise ValueError(f"top_p={config.top_p}; it must be above 0 and at most 1.0 (off).")
    if config.top_k < 0:
        raise ValueError(f"top_k={config.top_k}; it must be 0 (off) or above.")
    if config.min_p is not None and not 0.0 <= config.min_p <= 1.0:
        raise ValueError(f"min_p={config.min_p}; it must be between 0 and 1, or None (off).")
    if config.repetition_penalty <= 0.0:
        raise ValueError(
            f"repetition_penalty={config.repetition_penalty}; it must be above 0 (1.0 is off)."
        )
    for name, choices in (
        ("start_from", ("base", "previous")),
        ("on_empty_round", ("raise", "stop")),
    ):
        if getattr(config, name) not in choices:
            raise ValueError(f"{name}={getattr(config, name)!r}; choose one of {choices}.")
    if config.history_rounds < 0:
        raise ValueError(f"history_rounds={config.history_rounds}; it must be 0 or above.")
    for name in ("round_learning_rates", "round_max_steps"):
        values = getattr(config, name)
        if values is not None and len(values) < config.num_rounds:
            raise ValueError(
                f"{name} has {len(values)} values for num_rounds={config.num_rounds}; give one a "
                "round."
            )
