"""Fields that the round-based configs share, and the checks that concern them alone.

`SelfPlayConfig` stands before the TRL config in the bases of each trainer's config. Where GRPOConfig
has a field, the one here has its name, type and meaning.
"""

import logging
import math
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Annotated, Any, get_type_hints

import torch
from transformers.utils import is_torch_bf16_gpu_available

from trl_selfplay.confidential import shown
from trl_selfplay.evaluation.detectors import DETECTOR_OF, Action
from trl_selfplay.evaluation.estimates import summarize_heldout
from trl_selfplay.generation.generation_options import is_neutral
from trl_selfplay.generation.sampler import build_sampling_options
from trl_selfplay.rollouts.prompts import check_template_kwargs
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rounds.named_settings import naming_settings
from trl_selfplay.rounds.plan import (
    OnResume,
    PerRound,
    RoundPlan,
    per_round_lists,
    plan_equal_rounds,
)
from trl_selfplay.rounds.store import check_rounds_dir
from trl_selfplay.trainers.engine_config import EngineConfig, check_engine_fields
from trl_selfplay.trainers.field_checks import (
    AT_LEAST_0,
    AT_LEAST_1,
    LARGEST_SEED,
    SHARE,
    TEMPERATURE,
    Bounds,
    bounds_of,
    check_fields,
    check_value,
    refuse_strangers,
)

logger = logging.getLogger(__name__)

# Fields of SelfPlayConfig that may be JSON on a command line.
_DICT_FIELDS = ("generation_kwargs", "chat_template_kwargs", "alarm_actions")


@dataclass
class SelfPlayConfig(EngineConfig):
    """Fields of the outer loop: rounds, sampling, held-out scores.

    A method's own checks follow `super().__post_init__()`, which runs those of the shared fields and
    of TRL's config.
    """

    _default_metric = "eval_accuracy"  # chooses the best round; not a field
    _BOUNDS = {  # noqa: RUF012  # not a field
        "num_rounds": AT_LEAST_1,
        "num_prompts_per_round": AT_LEAST_1,
        "num_generations": AT_LEAST_1,
        "max_completion_length": AT_LEAST_1,
        "temperature": TEMPERATURE,
        "top_p": Bounds(0, 1, exclusive=True, meaning="1.0 is off"),
        "top_k": Bounds(0, meaning="0 is off"),
        "min_p": SHARE,
        "repetition_penalty": Bounds(0, exclusive=True, meaning="1.0 is off"),
        "num_completions_to_print": AT_LEAST_0,
        "num_generations_eval": AT_LEAST_0,
        "temperature_eval": TEMPERATURE,
        "history_rounds": AT_LEAST_0,
        "round_learning_rates": AT_LEAST_0,
        "round_max_steps": AT_LEAST_1,
        "round_temperatures": TEMPERATURE,
        "stop_after_rounds_without_gain": AT_LEAST_1,
    }

    num_rounds: Annotated[int, OnResume.MAY_GROW] = field(
        default=3,
        metadata={
            "help": "Rounds of sampling, grading, selecting and training.",
        },
    )
    num_prompts_per_round: Annotated[int | None, OnResume.FIXED] = field(
        default=None,
        metadata={
            "help": "Prompts drawn anew for each round, without replacement within the round. None "
            "uses all prompts in every round.",
        },
    )
    num_generations: Annotated[int, OnResume.UNTIL_TRAINED] = field(
        default=1,
        metadata={"help": "Completions sampled per prompt."},
    )
    max_completion_length: Annotated[int, OnResume.FIXED] = field(
        default=512,
        metadata={
            "help": "Maximum tokens per completion, results of tools included. Truncated completions are never trained on.",
        },
    )
    temperature: Annotated[float, OnResume.FIXED] = field(
        default=1.0,
        metadata={"help": "Sampling temperature; 0.0 is greedy decoding."},
    )
    top_p: Annotated[float, OnResume.FIXED] = field(
        default=1.0,
        metadata={
            "help": "Sample from the smallest set of tokens with this probability mass; 1.0 disables it.",
        },
    )
    top_k: Annotated[int, OnResume.FIXED] = field(
        default=0,
        metadata={
            "help": "Sample from this many most likely tokens; 0 disables it.",
        },
    )
    min_p: Annotated[float | None, OnResume.FIXED] = field(
        default=None,
        metadata={
            "help": "Drop tokens whose probability is below this fraction of the most likely token's; "
            "None disables it.",
        },
    )
    repetition_penalty: Annotated[float, OnResume.FIXED] = field(
        default=1.0,
        metadata={
            "help": "Values above 1.0 make tokens that have already occurred less likely.",
        },
    )
    stop_strings: Annotated[list[str] | None, OnResume.FIXED] = field(
        default=None,
        metadata={
            "help": "A completion ends with the token that completes one of these strings. In training, "
            "EOS follows it, so that the model learns to stop there.",
        },
    )
    generation_kwargs: Annotated[dict[str, Any] | str | None, OnResume.FIXED] = field(
        default=None,
        metadata={
            "help": "Further generation options, which override the fields above: `eos_token_id`, "
            "`max_new_tokens`, `temperature`, `top_p`, `top_k`, `min_p`, `repetition_penalty`. "
            "Any other is an error.",
        },
    )
    chat_template_kwargs: Annotated[dict[str, Any] | str | None, OnResume.FIXED] = field(
        default=None,
        metadata={
            "help": "Keyword arguments for the chat template, such as `enable_thinking`. A row's own, "
            "in a column `chat_template_kwargs`, take precedence.",
        },
    )
    sanitize_control_tokens: Annotated[bool, OnResume.FIXED] = field(
        default=False,
        metadata={
            "help": "Read special tokens in the text of prompts, hints and data as plain text, so "
            "that only the chat template writes control tokens, like the argument of the same name "
            "of `apply_chat_template`. False reads them as control tokens, as TRL does.",
        },
    )
    log_completions: Annotated[bool, OnResume.FREE] = field(
        default=False,
        metadata={
            "help": "Print sampled completions with their rewards in each round, and log a table of "
            "them to W&B and Trackio if `report_to` names these.",
        },
    )
    num_completions_to_print: Annotated[int | None, OnResume.FREE] = field(
        default=None,
        metadata={
            "help": "Number of completions that `log_completions` prints; None prints all.",
        },
    )
    log_unique_prompts: Annotated[bool, OnResume.FREE] = field(
        default=False,
        metadata={
            "help": "Log one completion per prompt in the table of `log_completions`, not all.",
        },
    )
    log_completions_hub_repo: Annotated[str | None, OnResume.FREE] = field(
        default=None,
        metadata={
            "help": "Dataset repository to which `push_to_hub()` pushes all samples of the run beside the "
            "model, with rewards and outcomes. A new one is public unless `hub_private_repo=True` or your "
            "organization's default is private.",
        },
    )
    num_generations_eval: Annotated[int, OnResume.FIXED] = field(
        default=1,
        metadata={
            "help": "Completions sampled per held-out prompt for `eval_pass@k`, in addition to the "
            "greedy one; 0 samples none.",
        },
    )
    temperature_eval: Annotated[float, OnResume.FIXED] = field(
        default=1.0,
        metadata={
            "help": "Temperature of the held-out samples (with top_p 0.95). It is the same in every "
            "round, so that rounds can be compared (ReST^EM, arXiv 2312.06585, Fig. 5).",
        },
    )
    start_from: Annotated[str, OnResume.UNTIL_TRAINED] = field(
        default="base",
        metadata={
            "help": "Weights from which a round's training starts: those before round 0, or those with "
            "which the previous round ended. Sampling always uses the newest.",
            "choices": ["base", "previous"],
        },
    )
    history_rounds: Annotated[int, OnResume.UNTIL_TRAINED] = field(
        default=0,
        metadata={
            "help": "Number of earlier rounds whose selected samples are trained on as well.",
        },
    )
    round_learning_rates: Annotated[
        list[float] | None, PerRound("learning_rate"), OnResume.UNTIL_TRAINED
    ] = field(
        default=None,
        metadata={
            "help": "One learning rate per round, in place of `learning_rate`.",
        },
    )
    round_max_steps: Annotated[list[int] | None, PerRound("max_steps"), OnResume.UNTIL_TRAINED] = (
        field(
            default=None,
            metadata={
                "help": "One number of optimizer steps per round, in place of `max_steps`.",
            },
        )
    )
    round_temperatures: Annotated[list[float] | None, PerRound("temperature"), OnResume.FIXED] = (
        field(
            default=None,
            metadata={
                "help": "One sampling temperature per round, in place of `temperature`.",
            },
        )
    )
    dry_run: Annotated[bool, OnResume.FREE] = field(
        default=False,
        metadata={
            "help": "Check the run instead of training: `train()` plays a round on 32 training prompts "
            "from random streams of their own, prints what it finds, and writes preflight.json.",
        },
    )
    on_empty_round: Annotated[str, OnResume.FREE] = field(
        default="raise",
        metadata={
            "help": "What happens when a round keeps nothing: raise `EmptyRoundError`, or stop and keep "
            "the rounds before it.",
            "choices": ["raise", "stop"],
        },
    )
    load_best_round_at_end: Annotated[bool | None, OnResume.FREE] = field(
        default=None,
        metadata={
            "help": "Load the weights with the best held-out score at the end, which may be those of the "
            "untrained model. None does so if there is an `eval_dataset`.",
        },
    )
    stop_after_rounds_without_gain: Annotated[int | None, OnResume.FREE] = field(
        default=None,
        metadata={
            "help": "Stop after this many rounds without a better held-out score than the best so far. "
            "None never stops.",
        },
    )
    rounds_dir: Annotated[str | None, OnResume.FREE] = field(
        default=None,
        metadata={
            "help": "URL of a folder on an object store, such as s3://bucket/run, that keeps all rounds as "
            "well: samples, selections, checkpoints and models. A run goes on from it on any machine. "
            "None keeps them in `output_dir` alone.",
        },
    )
    alarm_actions: Annotated[dict[str, str] | str | None, OnResume.FREE] = field(
        default=None,
        metadata={
            "help": 'What alarms do, by name, such as {"held-out-fall": "stop"}: ignore, warn, stop '
            "(end the run after the round; it can be resumed), or best_round (the same, and load the "
            "weights with the best held-out score). The alarms are in docs/collapse.md; those not named "
            "warn.",
        },
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # What TRL's config parses as JSON, and ours: the list of one base hides that of another.
        of_bases = (vars(base).get("_VALID_DICT_FIELDS", ()) for base in cls.__mro__)
        parsed = dict.fromkeys(chain(*of_bases, _DICT_FIELDS))
        cls._VALID_DICT_FIELDS = list(parsed)  # type: ignore[attr-defined]

    def __post_init__(self) -> None:
        config: Any = self  # the last base of each config is TRL's
        check_fields(config)
        switch_off_bf16_without_gpu(config)
        if config.metric_for_best_model is None:
            config.metric_for_best_model = self._default_metric
        if config.greater_is_better is None:
            config.greater_is_better = not config.metric_for_best_model.endswith(_LOWER_IS_BETTER)
        with naming_settings(config, "TRL's config can't take these settings."):
            super().__post_init__()  # type: ignore[misc]
        refuse_strangers(config)
        check_self_play_config(config)

    @property
    def rewards_have_degrees(self) -> bool:
        """Whether completions are trained on that `reward_threshold` doesn't count as correct."""
        return False

    def heldout_metric_names(self) -> tuple[str, ...]:
        """Return the metrics of a held-out set, without the set's prefix."""
        return graded_metric_names(self.num_generations_eval)

    def how_to_keep_more(self, highest_reward: float) -> str:
        """Return what lets more completions pass, in words that follow "or"."""
        return (
            "change what decides which completions are trained on (the highest reward was "
            f"{highest_reward:g})"
        )

    def plan_rounds(self) -> tuple[RoundPlan, ...]:
        """Return what each round of the run does: whose samples it trains on, and its values."""
        return plan_equal_rounds(self)


def switch_off_bf16_without_gpu(config: Any) -> None:
    """Set TRL's default `bf16=None` to False on a machine without an accelerator, and log it.

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


# Keywords of `generation_kwargs` that override a field.
_FIELD_OF_KEYWORD = {
    "max_new_tokens": "max_completion_length",
    **{n: n for n in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
}
# Keywords of generation (transformers, vLLM) that have a field of their own.
_FIELD_INSTEAD = {
    "max_length": "max_completion_length",
    "max_tokens": "max_completion_length",
    "n": "num_generations",
    "num_return_sequences": "num_generations",
    "seed": "seed",
    "stop": "stop_strings",
    "stop_strings": "stop_strings",
}


# Fields of the parent that concern its own evaluation or its pushes from checkpoints, in place of
# which rounds have theirs.
_WITHOUT_USE = (
    "batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches",
    "eval_use_gather_object", "hub_always_push", "include_for_metrics", "label_names",
    "per_device_eval_batch_size", "prediction_loss_only",
)  # fmt: skip
# Fields of the parent that a run over rounds would get wrong.
_REFUSED = {
    "assistant_only_loss": "the loss is on the completion's tokens alone",
    "bf16_full_eval": "held-out prompts are sampled in the precision of training",
    "fp16_full_eval": "held-out prompts are sampled in the precision of training",
    "eval_packing": "held-out prompts are sampled, and nothing is packed",
    "dataset_kwargs": "rows are made in each round, as token ids, and aren't prepared again",
}
_LAYERWISE = "layerwise"  # in the names of optimizers whose hooks stay on the weights
_LOWER_IS_BETTER = ("loss", "truncated", "abstained")


def graded_metric_names(num_samples: int) -> tuple[str, ...]:
    """Return the metrics of a graded held-out set, without the set's prefix."""
    measured = [
        Rollout(
            round_index=0, phase="eval", prompt_id="", sample_index=i, prompt_ids=(0,),
            completion_ids=(0,), prompt="", completion="", finish="eos", reward=0.0, rewards=(0.0,),
        )
        for i in range(num_samples + 1)
    ]  # fmt: skip
    names = summarize_heldout(measured, reward_threshold=1.0, prefix="")
    return tuple(name.removeprefix("_") for name in names)


def check_parent_fields(config: Any) -> None:
    """Refuse fields of the parent that rounds would get wrong; warn of those without effect."""
    defaults = {each.name: each.default for each in fields(config)}
    for name, reason in _REFUSED.items():
        if value := getattr(config, name, None):
            raise ValueError(f"{name}={shown(value, name)}: {reason}. Leave it out.")
    text_field = getattr(config, "dataset_text_field", "text")
    if text_field != "text":
        raise ValueError(
            f"dataset_text_field={text_field!r}: prompts are read from the column `prompt`. Rename "
            "the column, and leave this out."
        )
    if config.log_completions_hub_repo and not config.push_to_hub:
        raise ValueError(
            f"log_completions_hub_repo={shown(config.log_completions_hub_repo)} without push_to_hub=True: "
            "samples are pushed beside the model, by trainer.push_to_hub(). Set both, or neither."
        )
    if getattr(config, "packing", False) and config.max_length is None:
        raise ValueError("packing=True fills sequences of max_length tokens: set max_length.")
    if config.length_column_name != "length":
        raise ValueError(
            f"length_column_name={config.length_column_name!r}: rows are made in each round, with their "
            "lengths. Leave it out; train_sampling_strategy='group_by_length' needs no column of yours."
        )
    strategy = getattr(config, "packing_strategy", "bfd")
    if strategy == "wrapped":
        raise ValueError(
            "packing_strategy='wrapped' cuts completions off from their prompts, and rows attend to the "
            "ones before them. Leave it out; 'bfd' packs whole rows."
        )
    if strategy != "bfd" and not config.packing:
        raise ValueError(
            f"packing_strategy={strategy!r} has no effect without packing=True. Set that, or leave it "
            "out."
        )
    if getattr(config, "enable_jit_checkpoint", False):
        raise ValueError(
            "enable_jit_checkpoint=True would take a round that SIGTERM stopped for one that was "
            "trained to its end. Leave it out: train() ends at SIGTERM by itself, and goes on from the "
            "last complete checkpoint (see save_steps)."
        )
    if _LAYERWISE in config.optim or config.optim in ("lomo", "adalomo"):
        raise ValueError(
            f"optim={str(config.optim.value)!r} updates weights in hooks that outlive a round's "
            "optimizer. Choose one that updates them in its step, such as 'adamw_torch'."
        )
    if config.push_to_hub and config.hub_strategy in ("checkpoint", "all_checkpoints"):
        raise ValueError(
            f"hub_strategy={str(config.hub_strategy.value)!r}: checkpoints of rounds aren't pushed. "
            "Use 'every_save' or 'end', and call trainer.push_to_hub() after train()."
        )
    without_use = [
        f"{name}={shown(value, name)}"
        for name in _WITHOUT_USE
        if (value := getattr(config, name)) not in (defaults[name], None, [])
    ]
    if without_use:
        logger.warning(
            "%s: without effect here, because the trainer itself scores held-out prompts, and nothing "
            "is pushed before the end.",
            ", ".join(without_use),
        )


def check_self_play_config(config: Any) -> None:
    """Raise ValueError for values of the shared fields that can't work together.

    Each message names the field, its value and what to set.
    """
    check_parent_fields(config)
    check_engine_fields(config)
    if config.rounds_dir is not None:
        check_rounds_dir(config.rounds_dir)
    if "://" in str(config.output_dir):
        raise ValueError(
            f"output_dir={config.output_dir!r} is a URL, and a run writes to a disk. Set output_dir to a "
            "folder, and rounds_dir to the URL."
        )
    _check_generation_kwargs(config)
    if "" in (config.stop_strings or ()):
        raise ValueError(
            f"stop_strings={config.stop_strings!r}: an empty string would end every completion "
            "before it began. Leave it out."
        )
    if config.chat_template_kwargs:
        check_template_kwargs(config.chat_template_kwargs, "chat_template_kwargs")
    _check_alarm_actions(config.alarm_actions or {})
    for name in per_round_lists(type(config)):
        values = getattr(config, name)
        if values is not None and len(values) < config.num_rounds:
            raise ValueError(
                f"{name} has {len(values)} values for num_rounds={config.num_rounds}; give one per "
                "round."
            )
    if config.num_generations > 1 and 0.0 in sampling_temperatures(config):
        given = f"round_temperatures={config.round_temperatures}"
        if config.round_temperatures is None:
            given = "temperature=0.0"
        raise ValueError(
            f"num_generations={config.num_generations} with {given}: greedy decoding would give "
            "copies of one completion. Set temperatures above 0 (0.7 to 1.0 are usual) or "
            "num_generations=1."
        )
    if config.temperature_eval == 0.0 and config.num_generations_eval > 1:
        raise ValueError(
            f"num_generations_eval={config.num_generations_eval} with temperature_eval=0.0 would "
            "grade copies. `eval_accuracy` is greedy already; set temperature_eval above 0."
        )
    num_rounds = len(config.plan_rounds())
    if config.seed + num_rounds > LARGEST_SEED:
        raise ValueError(
            f"seed={config.seed} with {num_rounds} rounds: each round adds its index to the seed, "
            f"which may be at most {LARGEST_SEED}. Set a lower seed."
        )


def _check_alarm_actions(actions: dict[str, str]) -> None:
    for name, action in actions.items():
        if name not in DETECTOR_OF:
            raise ValueError(
                f"alarm_actions has {name!r}, which is no alarm. There are {', '.join(DETECTOR_OF)}."
            )
        if action not in list(Action):
            raise ValueError(
                f"alarm_actions[{name!r}]={action!r}; it must be one of {[str(a) for a in Action]}."
            )
        if DETECTOR_OF[name].threshold == math.inf and action in ("stop", "best_round"):
            raise ValueError(
                f"alarm_actions[{name!r}]={action!r}: this number has no threshold, so it never raises an "
                "alarm. Set 'warn' to have it recorded."
            )


def sampling_temperatures(config: Any) -> tuple[float, ...]:
    """Return the temperatures that the rounds sample at, with `generation_kwargs` applied."""
    if config.round_temperatures is not None:
        return tuple(config.round_temperatures[: config.num_rounds])
    return (build_sampling_options(config, ()).temperature,)


def _check_generation_kwargs(config: Any) -> None:
    """Check the values of `generation_kwargs`, and drop those that change nothing."""
    given = dict(config.generation_kwargs or {})
    if config.round_temperatures is not None and "temperature" in given:
        raise ValueError(
            f"generation_kwargs has temperature={given['temperature']} with round_temperatures="
            f"{config.round_temperatures}, which it would override. Leave one out."
        )
    hints, bounds = get_type_hints(SelfPlayConfig), bounds_of(SelfPlayConfig)
    for keyword, value in list(given.items()):
        if keyword in _FIELD_OF_KEYWORD:
            field_name = _FIELD_OF_KEYWORD[keyword]
            name = f"generation_kwargs[{keyword!r}]"
            check_value(name, value, hints[field_name], bounds[field_name])
        elif keyword == "eos_token_id":
            check_value("generation_kwargs['eos_token_id']", value, int | list[int], AT_LEAST_0)
        elif keyword == "do_sample":
            temperatures = config.round_temperatures or [
                given.get("temperature", config.temperature)
            ]
            if any(value is not (temperature > 0.0) for temperature in temperatures):
                raise ValueError(
                    f"generation_kwargs has do_sample={value!r} with temperature="
                    f"{', '.join(map(str, temperatures))}; "
                    "whether tokens are drawn follows from the temperature, and 0.0 is greedy. Set "
                    "`temperature`, and leave do_sample out."
                )
            del given[keyword]
        elif keyword in ("use_cache", "pad_token_id") or is_neutral(keyword, value):
            del given[keyword]  # no influence on what is sampled
        elif keyword in _FIELD_INSTEAD:
            raise ValueError(
                f"generation_kwargs has {keyword!r}={shown(value, keyword)}: set the field "
                f"`{_FIELD_INSTEAD[keyword]}` instead."
            )
    config.generation_kwargs = given or None
