"""Build a trainer over rounds: check its arguments and its model, make its parts.

In: the constructor's arguments, then the model that the parent has built. Out: an error that says
what to do, or the parts that the rounds need. `RoundsMixin` calls these in their order.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from peft import PeftModel
from torch import nn
from transformers import AutoProcessor, PreTrainedTokenizerBase, TrainingArguments

from trl_selfplay.disk import refuse_missing_path, saying_what_is_kept
from trl_selfplay.evaluation.heldout import metric_prefixes
from trl_selfplay.generation.model_traits import (
    TEXT_MODEL_ADVICE,
    ModelTraits,
    has_whole_weights,
    input_device,
    sampling_state,
    without_adapters,
)
from trl_selfplay.generation.transformers_sampler import (
    check_generation_config,
    prepare_quantized_layers,
)
from trl_selfplay.generation.trial import try_model
from trl_selfplay.rewards.functions import compares_samples
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.rendering import FewShotExample, load_few_shot_examples, read_start
from trl_selfplay.rounds.mirror import read_from_store
from trl_selfplay.rounds.run import Run
from trl_selfplay.rounds.store import RoundsStore
from trl_selfplay.rounds.weights import check_head, check_peft_config
from trl_selfplay.tools.agent import Agent
from trl_selfplay.tools.offer import Toolbox
from trl_selfplay.trainers.ported_scripts import check_config_class
from trl_selfplay.trainers.tool_setup import environment_rewards, refuse_environments_parameter

# Arguments of the parents that rounds would ignore or get wrong, and what to do instead.
_NO_LOGITS = (
    "held-out rows are scored by reward functions or by log-probs of whole completions: there are no "
    "logits to compute metrics from. Leave it out; a reward function can log a number of its own with "
    "`log_metric`."
)
REFUSED = {
    "optimizers": "every round starts with a fresh optimizer and scheduler, and yours would serve the "
    "first round only. Choose the optimizer with `args.optim` or `optimizer_cls_and_kwargs`, where "
    "the trainer has it.",
    "compute_metrics": _NO_LOGITS,
    "preprocess_logits_for_metrics": _NO_LOGITS,
    "formatting_func": "the trained text is the model's own. Format the `prompt` column of the "
    "dataset instead.",
    "ref_model": "the reference is the policy itself as it enters each round: its log-probs are "
    "computed once per round, and no second model is held. Leave it out. For another reference "
    "override `compute_ref_log_probs(model, inputs)` in a subclass; its log-probs are then what the "
    "loss compares with.",
}


# Largest relative difference of log-probs that is rounding, in bfloat16 as well.
_ROUNDING = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Grading:
    """What grades completions, and which count as right.

    Attributes:
        reward_funcs: As the trainer takes them; None if nothing is graded.
        reward_processing_classes: Tokenizers of reward models.
        reward_weights: One per reward function; None weighs all with 1.0.
        eval_reward_funcs: Grade held-out completions in place of `reward_funcs`.
        threshold: A completion is right if its reward is at least this.
        refuses_negative: A reward below 0 is an error.
        num_compared: The setting that says how many samples of a prompt are graded together, and its value;
            None: `num_generations`.
    """

    reward_funcs: Any = None
    reward_processing_classes: Any = None
    reward_weights: Sequence[float] | None = None
    eval_reward_funcs: Any = None
    threshold: float = 1.0
    refuses_negative: bool = False
    num_compared: tuple[str, int] | None = None

    @property
    def heldout_funcs(self) -> Any:
        """What grades held-out completions."""
        return self.reward_funcs if self.eval_reward_funcs is None else self.eval_reward_funcs


def read_config(args: Any, config_class: Any, model: Any, method: str) -> Any:
    """Return the config that a trainer runs with.

    Without `args` it has the defaults, and the `output_dir` that TRL would choose: the model's name
    and the method's.

    Raises:
        FileNotFoundError: `model` is the path of a folder that isn't there.
        OSError: The output directory can't be made.
        TypeError: `args` is not the trainer's own config, or `model` is no model.
    """
    if not isinstance(model, (str, nn.Module)):
        raise TypeError(
            f"model is {model!r:.100}; it must be a model's id or folder as text, or a loaded model."
        )
    if isinstance(model, str):
        refuse_missing_path(model, "model")
    if args is None:
        source: Any = model
        name = model if isinstance(model, str) else source.config.name_or_path
        args = config_class(f"{name.rstrip('/').split('/')[-1]}-{method}")
    check_config_class(args, config_class)
    if args.should_save:  # as the parent does, but with its reason if it can't
        folder = Path(args.output_dir)
        with saying_what_is_kept(folder):
            folder.mkdir(parents=True, exist_ok=True)
    return args


def refuse_arguments(**given: Any) -> None:
    """Raise for arguments of a parent that a run over rounds would get wrong or ignore.

    Args:
        **given: Arguments named in `REFUSED`, as the constructor got them.

    Raises:
        TypeError: A config stands in the place of one of them.
        ValueError: One was given.
    """
    for name, value in given.items():
        if isinstance(value, TrainingArguments):
            raise TypeError(
                f"`{name}` is a {type(value).__name__}. Pass the config by name: args=…."
            )
        parts = value if isinstance(value, tuple | list) else (value,)  # optimizer and scheduler
        if any(part is not None for part in parts):
            raise ValueError(f"`{name}` was given, but {REFUSED[name]}")


def check_adapters(model: Any, peft_config: Any) -> None:
    """Raise ValueError for forms of PEFT that can't be right over rounds, or that lack their base."""
    saved = Path(model) / "adapter_config.json" if isinstance(model, str) else None
    if saved is not None and saved.exists() and not (saved.parent / "config.json").exists():
        base = json.loads(saved.read_text()).get("base_model_name_or_path")
        raise ValueError(
            f"the folder {model!r} holds an adapter without its base model. Load both: "
            f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {model!r}, "
            "is_trainable=True)."
        )
    check_peft_config(peft_config)
    for existing in getattr(model, "peft_config", {}).values():
        check_peft_config(existing)


def check_trainable(model: Any) -> None:
    """Raise ValueError if nothing would train, or if new adapters have replaced trained ones."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "no weight of the model is trainable, so no round would change it. An adapter is loaded "
            "for training with PeftModel.from_pretrained(base, path, is_trainable=True)."
        )
    base = without_adapters(model)
    if base is not model and getattr(base, "_hf_peft_config_loaded", False):
        raise ValueError(
            "the model was loaded from a folder that holds an adapter, and `peft_config` put a new "
            "one in its place, so the trained one would be lost. Merge it into its base first, or "
            "leave `peft_config` out and pass PeftModel.from_pretrained(base, path, "
            "is_trainable=True)."
        )


def check_saveable(model: Any) -> None:
    """Raise ValueError for a generation config that would stop the first checkpoint."""
    config = getattr(model, "generation_config", None)
    if config is None or isinstance(model, PeftModel):  # of which the adapters alone are saved
        return
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ValueError(
            "the model's generation config can't be saved, so no checkpoint could be written. Load "
            "the model, fix `model.generation_config`, for example with `do_sample = True`, and "
            f"pass the model. What transformers says: {error}"
        ) from error


def check_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the model has no embedding for what pads or ends its texts."""
    count = model.get_input_embeddings().weight.shape[0]
    for name in ("pad_token", "eos_token"):
        token_id = getattr(tokenizer, f"{name}_id")
        if token_id is not None and token_id >= count:
            raise ValueError(
                f"tokenizer.{name} is {getattr(tokenizer, name)!r} with the id {token_id}, and the "
                f"model has {count} embeddings. Set it to a token that the model knows, or call "
                "`model.resize_token_embeddings(len(tokenizer))` first."
            )


def read_grading(
    args: Any,
    reward_funcs: Any,
    reward_processing_classes: Any = None,
    eval_reward_funcs: Any = None,
    toolbox: Toolbox | None = None,
) -> Grading:
    """Check the reward functions of a trainer whose config is a `GradedConfig`.

    Where they only rank the samples of steps there may be none. Environments with `get_reward` are further
    reward functions of weight 1, as in GRPOTrainer.

    Raises:
        ValueError: There are none, or several of which one alone would make a completion right.
    """
    if reward_funcs is None and args.ranks_steps:
        return Grading(eval_reward_funcs=eval_reward_funcs, threshold=args.reward_threshold)
    weights = args.reward_weights
    if own := environment_rewards(toolbox):
        given = _as_list(reward_funcs)
        classes = (
            [None] * len(given)
            if reward_processing_classes is None
            else _as_list(reward_processing_classes)
        )
        reward_funcs, reward_processing_classes = [*given, *own], [*classes, *[None] * len(own)]
        if weights is not None:
            if len(weights) != len(given):
                raise ValueError(
                    f"reward_weights has {len(weights)} entries for {len(given)} reward functions; give one "
                    "each, or None without any. The rewards of environments weigh 1, without an entry."
                )
            weights = [*weights, *[1.0] * len(own)]
    if toolbox is not None:
        refuse_environments_parameter([*_as_list(reward_funcs), *_as_list(eval_reward_funcs)])
    if reward_funcs is None or reward_funcs == []:
        raise ValueError(
            "`reward_funcs` is missing: something must say which completions are right. Pass a "
            "function such as trl_selfplay.rewards.exact_reward, a reward model id, or a list."
        )
    # A completion has one environment, and so at most one of their rewards.
    num_rewards = len(_as_list(reward_funcs)) - max(len(own) - 1, 0)
    by_threshold = not args.rewards_have_degrees
    if num_rewards > 1 and by_threshold and weights is None and args.reward_threshold == 1.0:
        raise ValueError(
            f"{num_rewards} reward functions with weights of 1.0 and reward_threshold=1.0: "
            "one of them alone would make a completion correct, a reward for the format for "
            f"example. Set reward_threshold={float(num_rewards)} if all must be met, or say "
            "with reward_weights which of them count (1.0 and 0.0 for answer and format)."
        )
    return Grading(
        reward_funcs=reward_funcs,
        reward_processing_classes=reward_processing_classes,
        reward_weights=weights,
        eval_reward_funcs=eval_reward_funcs,
        threshold=args.reward_threshold,
    )


def _as_list(values: Any) -> list[Any]:
    """Return the entries of an argument that takes one or several; none for None."""
    if values is None:
        return []
    return list(values) if isinstance(values, list | tuple) else [values]


def check_comparing(grading: Grading, num_generations: int, has_hints: bool) -> None:
    """Raise ValueError if a function that compares a prompt's samples couldn't tell them apart.

    Args:
        grading: With the reward functions.
        num_generations: The config's.
        has_hints: Whether prompts are sampled with their solutions as hints.
    """
    setting, count = grading.num_compared or ("num_generations", num_generations)
    for name in _comparing(grading.reward_funcs):
        if count == 1:
            raise ValueError(
                f"{setting}=1 with {name}, which compares a prompt's samples: one alone agrees "
                "with itself. Sample several, for example 8."
            )
        if has_hints:
            raise ValueError(
                f"rationalize=True with {name}, which compares a prompt's samples: those that were "
                "shown the solution would be compared with each other, and agree on it whatever they "
                "say before. Set rationalize=False."
            )


def check_heldout_graders(reward_funcs: Any) -> None:
    """Raise ValueError for functions that compare samples: held-out prompts have one greedy one."""
    for name in _comparing(reward_funcs):
        raise ValueError(
            f"{name} compares a prompt's samples, so it can't grade the held-out prompts of "
            "`eval_dataset`: their one greedy completion agrees with itself. Pass functions that know "
            "the solutions, such as eval_reward_funcs=exact_reward, or leave out `eval_dataset`."
        )


def _comparing(reward_funcs: Any) -> list[str]:
    return [getattr(f, "__name__", str(f)) for f in _as_list(reward_funcs) if compares_samples(f)]


def read_examples(
    args: Any,
    few_shot_examples: Sequence[Mapping[str, Any]] | None,
    rows: Sequence[PromptRow],
    needs_solution: bool = False,
    agent: Agent | None = None,
) -> tuple[FewShotExample, ...]:
    """Return few-shot examples in the form of the training rows, of a `GradedConfig`.

    An agent has its own.

    Raises:
        ValueError, TypeError: For examples that can't work, or a setting that needs some.
    """
    has_examples = few_shot_examples if agent is None else agent.has_examples
    if args.few_shot_rounds is not None and not has_examples:
        needed = "`few_shot_examples`" if agent is None else "an agent with examples"
        raise ValueError(f"few_shot_rounds={args.few_shot_rounds} needs {needed}.")
    conversational = rows[0].is_conversational
    return load_few_shot_examples(few_shot_examples, conversational, needs_solution=needs_solution)


def load_processing_class(model: Any, processing_class: Any, args: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer, loaded as TRL would, and check that it can end a completion.

    Raises:
        TypeError: A processor of a multimodal model.
        ValueError: No end-of-sequence token.
    """
    if processing_class is None:
        kwargs: Any = args.model_init_kwargs or {}
        name = model if isinstance(model, str) else model.config.name_or_path
        processing_class = AutoProcessor.from_pretrained(
            name, revision=kwargs.get("revision"), trust_remote_code=args.trust_remote_code
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            f"processing_class is a {type(processing_class).__name__}, and rounds work on text. Pass "
            "its `tokenizer`, and a model that takes text alone: those of multimodal checkpoints "
            f"have to be saved apart first. {TEXT_MODEL_ADVICE}"
        )
    if processing_class.eos_token is None and getattr(args, "eos_token", None) is None:
        raise ValueError(
            f"the tokenizer {processing_class.name_or_path!r} has no end-of-sequence token, so no "
            "completion could ever finish. Set `eos_token` in the config, or "
            "`tokenizer.eos_token`."
        )
    return processing_class


def build_run(args: Any, model: Any, peft_config: Any, heldout_names: Sequence[str]) -> Run:
    """Return the state of a run that has not begun, and fix names that rounds must share."""
    output_dir = Path(args.output_dir)
    # The parent derives it from output_dir, which is another folder in each round.
    if args.push_to_hub and args.hub_model_id is None:
        args.hub_model_id = output_dir.name
    metric = _choosing_metric(args, heldout_names)
    if heldout_names:
        args.metric_for_best_model = metric  # the parent looks it up among what `evaluate` returns
    uses_peft = peft_config is not None or hasattr(model, "peft_config")
    loads_best = args.load_best_round_at_end
    if loads_best and not heldout_names:
        raise ValueError(
            "load_best_round_at_end=True needs an `eval_dataset` of held-out prompts to choose by."
        )
    if args.stop_after_rounds_without_gain is not None and not heldout_names:
        raise ValueError(
            "stop_after_rounds_without_gain needs an `eval_dataset` of held-out prompts."
        )
    if args.eval_on_start and not heldout_names:
        raise ValueError("eval_on_start=True needs an `eval_dataset` of held-out prompts.")
    keepers = [
        name for name, action in (args.alarm_actions or {}).items() if action == "best_round"
    ]
    if keepers and not heldout_names:
        raise ValueError(
            f"alarm_actions[{keepers[0]!r}]='best_round' needs an `eval_dataset` of held-out prompts to "
            "choose by."
        )
    return Run(
        root=output_dir / "_rounds",
        chosen_metric=metric if heldout_names else None,
        loads_best_round=bool(heldout_names) if loads_best is None else loads_best,
        # A model that the parent loads from its source as it is can be read from there again.
        keeps_initial_weights=uses_peft
        or not isinstance(model, str)
        or getattr(args, "chat_template_path", None) is not None,
        keeps_every_model=uses_peft,
        greater_is_better=args.greater_is_better is not False,
    )


def _choosing_metric(args: Any, heldout_names: Sequence[str]) -> str:
    """Return the full name of the metric that chooses, of the first of several held-out sets.

    Raises:
        ValueError: No held-out set has a metric of that name.
    """
    prefixes = metric_prefixes(heldout_names or [""], "eval").values()
    known = [f"{p}_{name}" for p in prefixes for name in args.heldout_metric_names()]
    given = args.metric_for_best_model
    candidates = (given, f"eval_{given}", f"{next(iter(prefixes))}_{given.removeprefix('eval_')}")
    for name in candidates:
        if name in known:
            return name
    raise ValueError(
        f"metric_for_best_model={given!r} is no metric of held-out prompts, so nothing could be "
        f"chosen by it. There are {', '.join(known)}."
    )


def check_built_model(
    model: Any, accelerator: Accelerator, tokenizer: PreTrainedTokenizerBase, balanced: bool
) -> ModelTraits:
    """Check the model that the parent has built, and return how it is sampled from.

    Args:
        model: With its adapters.
        accelerator: The parent's.
        tokenizer: As the parent has prepared it.
        balanced: The loss has a term that balances the load of experts.

    Raises:
        ValueError: The model can't be trained, saved, sampled from or scored as rounds do.
    """
    prepare_quantized_layers(model)
    check_trainable(model)
    check_head(model)
    check_generation_config(model.generation_config)
    check_saveable(model)
    check_special_tokens(model, tokenizer)
    traits = try_model(model, accelerator)
    check_parent_forward(model, accelerator, tokenizer.eos_token_id, balanced)
    return traits


def check_parent_forward(
    model: Any, accelerator: Accelerator, token_id: int, balanced: bool
) -> None:
    """Raise ValueError if TRL's forward, which computes the loss, fails on the model's class.

    It takes the model apart into backbone and head, which some classes don't allow, and counts
    experts by a name that some configs don't have.
    """
    if not has_whole_weights(accelerator.unwrap_model(model)):
        return  # sharded
    failure = _failure_of_forward(model, accelerator, token_id, balanced)
    if failure is None:
        return
    if balanced and _failure_of_forward(model, accelerator, token_id, balanced=False) is None:
        advice = (
            "Set router_aux_loss_coef=0.0 in the config: without the balancing loss of its experts "
            "it trains."
        )
    else:
        advice = "Use a model of another class."
    base = without_adapters(accelerator.unwrap_model(model))
    raise ValueError(
        f"TRL can't train {type(base).__name__}: its forward fails with {type(failure).__name__}: "
        f"{failure}. {advice}"
    ) from failure


def check_rows_apart(model: Any, accelerator: Accelerator, collate: Callable[..., Any]) -> None:
    """Raise ValueError if rows that the collator puts end to end attend to one another.

    The attention of many classes tells such rows apart by their positions, that of others doesn't, and
    recurrent layers carry their state on.

    Args:
        model: With its adapters.
        accelerator: The parent's.
        collate: The parent's collator, without padding.
    """
    unwrapped = accelerator.unwrap_model(model)
    if not has_whole_weights(unwrapped):
        return
    first, second = ([*range(3, 3 + n), n] for n in (9, 6))

    def log_probs(*rows: list[int]) -> torch.Tensor:
        batch = collate([{"input_ids": row, "labels": row} for row in rows])
        inputs = send_to_device(dict(batch), input_device(unwrapped))
        with sampling_state(model, accelerator) as ready, accelerator.autocast(), torch.no_grad():
            found: torch.Tensor = ready(**inputs, use_cache=False, fused_lm_head=True).log_probs
            return found[0, 1 - len(rows[-1]) :].float()

    alone, behind = log_probs(second), log_probs(first, second)
    gap = float((alone - behind).abs().max() / alone.abs().max())
    if gap > _ROUNDING:
        raise ValueError(
            f"padding_free or packing puts rows end to end, and in {type(without_adapters(unwrapped)).__name__} "
            f"they see one another there (log-probs differ by {gap:.2g} of their size). Set "
            "padding_free=False and packing=False; train_sampling_strategy='group_by_length' saves "
            "padding too. With model_init_kwargs={'attn_implementation': 'flash_attention_2'} it may work."
        )


def _failure_of_forward(
    model: Any, accelerator: Accelerator, token_id: int, balanced: bool
) -> Exception | None:
    """Return what TRL's forward raises on a few tokens, or None."""
    device = input_device(accelerator.unwrap_model(model))
    ids = torch.full((1, 4), token_id, device=device)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
    }
    if balanced:
        inputs["output_router_logits"] = True
    ready = sampling_state(model, accelerator)
    try:
        with ready as unwrapped, accelerator.autocast(), torch.no_grad():
            unwrapped(**inputs, fused_lm_head=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error
    return None


def start_of_run(run: Run, store: RoundsStore | None, accelerator: Accelerator) -> datetime:
    """Return when the run in the output directory or the store began, or now; the same in all processes."""
    start: list[Any] = [None]
    if accelerator.is_main_process:
        path = run.rendering_path
        start = [read_start(path, read_from_store(store, path, run.root))]
    if accelerator.num_processes > 1:
        start = broadcast_object_list(start)
    return start[0]


def build_scorers(
    grading: Grading, args: Any, device: torch.device, get_trainer_state: Callable[[], Any]
) -> tuple[Scorer | None, Scorer | None]:
    """Return what grades the rounds' completions and held-out ones; None where nothing does."""
    build = partial(
        Scorer,
        device=device,
        # As GRPOTrainer, but for the revision, which is the policy's.
        model_init_kwargs={
            "trust_remote_code": args.trust_remote_code,
            **{k: v for k, v in (args.model_init_kwargs or {}).items() if k != "revision"},
        },
        get_trainer_state=get_trainer_state,
    )
    scorer = eval_scorer = None
    if grading.reward_funcs is not None:
        scorer = build(
            grading.reward_funcs,
            reward_weights=grading.reward_weights,
            reward_processing_classes=grading.reward_processing_classes,
        )
    if grading.eval_reward_funcs is not None:
        eval_scorer = build(grading.eval_reward_funcs)
    return scorer, eval_scorer


def heldout_threshold(grading: Grading, args: Any) -> float | None:
    """Return the reward at which a held-out completion is right; None where rewards have degrees.

    The true scorer's, or what the run itself is to be judged by, is right or wrong.
    """
    counts_right = re.search(r"(?:accuracy|pass@\d+)$", args.metric_for_best_model or "")
    if args.rewards_have_degrees and grading.eval_reward_funcs is None and not counts_right:
        return None
    return grading.threshold
