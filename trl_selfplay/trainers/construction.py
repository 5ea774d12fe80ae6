"""Build a round-based trainer: check its arguments, make its parts, answer its parent.

In: the constructor's arguments. Out: an error that says what to do, or the pieces that the parent
gets in place of the user's (one placeholder row, since the real rows are made round by round) and
those that the rounds need.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import AutoProcessor, PreTrainedTokenizerBase

from trl_selfplay.evaluation.heldout import metric_prefixes
from trl_selfplay.generation.model_traits import (
    TEXT_MODEL_ADVICE,
    has_whole_weights,
    input_device,
    sampling_state,
    without_adapters,
)
from trl_selfplay.generation.transformers_sampler import (
    TransformersSampler,
    check_generation_config,
    collect_eos_token_ids,
    keep_4bit_weights_trainable,
)
from trl_selfplay.generation.trial import try_model
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.collection import Collector
from trl_selfplay.rollouts.prompts import HintFormatter, PromptRow
from trl_selfplay.rollouts.rendering import FewShotExample, PromptFormatter, read_start
from trl_selfplay.rounds.run import Run
from trl_selfplay.rounds.stages import SelfPlay
from trl_selfplay.rounds.weights import check_head, check_peft_config
from trl_selfplay.trainers.ported_scripts import check_config_class


def read_config(args: Any, config_class: Any, model: Any, method: str) -> Any:
    """Return the config that a trainer runs with.

    Without `args` it has the defaults, and the `output_dir` that TRL would choose: the model's name
    and the method's.

    Raises:
        TypeError: `args` is not the trainer's own config, or `model` is no model.
    """
    if not isinstance(model, (str, nn.Module)):
        raise TypeError(
            f"model is {model!r:.100}; it must be a model's id or folder as text, or a loaded model."
        )
    if args is None:
        source: Any = model
        name = model if isinstance(model, str) else source.config.name_or_path
        return config_class(f"{name.rstrip('/').split('/')[-1]}-{method}")
    check_config_class(args, config_class)
    return args


def check_arguments(args: Any, *, model: Any, peft_config: Any, **unused: Any) -> None:
    """Raise for arguments that can't work, before a model is loaded.

    Raises:
        ValueError: An argument that rounds would ignore, or a PEFT initialisation that changes base
            weights.
    """
    check_adapters(model, peft_config)
    refuse_unused_arguments(**unused, args=args)
    if args.packing and args.max_length is None:
        raise ValueError("packing=True fills sequences of max_length tokens: set max_length.")


def check_rewards(args: Any, reward_funcs: Any, few_shot_examples: Any) -> None:
    """Raise ValueError for rewards that can't decide, and few-shot rounds without examples.

    Several reward functions, each weighing 1.0, can't decide where any one alone reaches 1.0.
    """
    if reward_funcs is None or reward_funcs == []:
        raise ValueError(
            "`reward_funcs` is missing: something must say which completions are right. Pass a "
            "function such as trl_selfplay.rewards.exact_reward, a reward model id, or a list."
        )
    several = isinstance(reward_funcs, list | tuple) and len(reward_funcs) > 1
    by_threshold = not args.rewards_have_degrees
    if several and by_threshold and args.reward_weights is None and args.reward_threshold == 1.0:
        raise ValueError(
            f"{len(reward_funcs)} reward functions with weights of 1.0 and reward_threshold=1.0: "
            "one of them alone would make a completion correct, a reward for the format for "
            f"example. Set reward_threshold={float(len(reward_funcs))} if all must be met, or say "
            "with reward_weights which of them count (1.0 and 0.0 for answer and format)."
        )
    if args.few_shot_rounds is not None and not few_shot_examples:
        raise ValueError(f"few_shot_rounds={args.few_shot_rounds} needs `few_shot_examples`.")


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
            "the model, mend `model.generation_config`, for example with `do_sample = True`, and "
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


def refuse_optimizers(optimizers: tuple[Any, Any]) -> None:
    """Raise ValueError for optimizer objects, which would serve the first round only."""
    if any(part is not None for part in optimizers or ()):
        raise ValueError(
            "`optimizers` was given, but every round starts with a fresh optimizer and scheduler, "
            "and yours would serve the first round only. Choose the optimizer with `args.optim` "
            "or `optimizer_cls_and_kwargs`, where the trainer has it."
        )


def refuse_logit_metrics(**given: Any) -> None:
    """Raise ValueError for arguments that compute held-out metrics from logits."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"`{name}` was given, but held-out prompts are sampled and graded by "
                "`reward_funcs`: there are no logits to compute metrics from. Leave it out; log a "
                "number of your own with `log_metric` in a reward function."
            )


def refuse_unused_arguments(
    optimizers: tuple[Any, Any],
    compute_metrics: Any,
    preprocess_logits_for_metrics: Any,
    formatting_func: Any,
    args: Any,
) -> None:
    """Raise ValueError for parent arguments that a run over rounds would silently ignore."""
    refuse_optimizers(optimizers)
    refuse_logit_metrics(
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=preprocess_logits_for_metrics,
    )
    if formatting_func is not None:
        raise ValueError(
            "`formatting_func` was given, but the trained text is the model's own. Format the "
            "`prompt` column of the dataset instead."
        )
    if args.assistant_only_loss:
        raise ValueError(
            "assistant_only_loss=True has no use here: the loss is on the completion's tokens "
            "alone. Leave it out."
        )


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


def placeholder_dataset(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return one final row for the parent to be built on; no round ever trains on it."""
    eos = tokenizer.eos_token_id
    return Dataset.from_dict({"input_ids": [[eos, eos]], "labels": [[-100, eos]]})


def build_run(args: Any, model: Any, peft_config: Any, heldout_names: Sequence[str]) -> Run:
    """Return the state of a run that has not begun, and fix names that rounds must share."""
    output_dir = Path(args.output_dir)
    # The parent derives these from output_dir, which is another folder in each round.
    if args.run_name is None:
        args.run_name = output_dir.name
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


def build_self_play(
    trainer: Any,
    rows: list[PromptRow],
    heldout: Mapping[str, list[PromptRow]],
    few_shot_examples: Sequence[FewShotExample] = (),
    hint_formatter: HintFormatter | None = None,
    reward_funcs: Any = None,
    reward_processing_classes: Any = None,
    eval_reward_funcs: Any = None,
) -> SelfPlay:
    """Put the stages of a round together for a trainer whose parent has been built.

    Without reward functions completions are sampled and not graded; `eval_reward_funcs` grade the
    held-out ones in place of `reward_funcs`.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    trainer.placeholder = trainer.train_dataset  # as the parent has prepared it
    keep_4bit_weights_trainable(trainer.model)
    check_trainable(trainer.model)
    check_head(trainer.model)
    check_generation_config(trainer.model.generation_config)
    check_saveable(trainer.model)
    check_special_tokens(trainer.model, tokenizer)
    traits = try_model(trainer.model, trainer.accelerator)
    check_parent_forward(trainer)
    scorer = (
        None
        if reward_funcs is None
        else _build_scorer(trainer, reward_funcs, args.reward_weights, reward_processing_classes)
    )
    eval_scorer = None if eval_reward_funcs is None else _build_scorer(trainer, eval_reward_funcs)
    has_degrees = args.rewards_have_degrees
    threshold = getattr(args, "reward_threshold", 1.0)
    return SelfPlay(
        config=args,
        rows=rows,
        heldout=heldout,
        formatter=PromptFormatter(
            tokenizer,
            few_shot_examples,
            hint_formatter,
            args.chat_template_kwargs,
            sanitize_control_tokens=args.sanitize_control_tokens,
            start=_start_of_run(trainer),
            num_embeddings=trainer.model.get_input_embeddings().weight.shape[0],
        ),
        collector=Collector(
            sampler=TransformersSampler(
                lambda: trainer.model_wrapped,
                tokenizer,
                accelerator=trainer.accelerator,
                traits=traits,
            ),
            scorer=scorer,
            eval_scorer=eval_scorer,
            tokenizer=tokenizer,
            accelerator=trainer.accelerator,
            seed=args.seed,
            reward_threshold=threshold,
            has_degrees=has_degrees,
            # The true scorer's, or what the run itself is to be judged by, is right or wrong.
            eval_threshold=None
            if has_degrees and eval_scorer is None and not _counts_right(args)
            else threshold,
            refuses_negative_rewards=getattr(args, "loss_weighting", "filter") == "reward",
        ),
        eos_token_ids=collect_eos_token_ids(trainer.model, tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        context_length=traits.context_length,
        run=trainer.run,
    )


def check_parent_forward(trainer: Any) -> None:
    """Raise ValueError if TRL's forward, which computes the loss, fails on the model's class.

    It takes the model apart into backbone and head, which some classes don't allow, and counts
    experts by a name that some configs don't have.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not has_whole_weights(model):
        return  # sharded
    balanced = trainer.aux_loss_enabled
    failure = _failure_of_forward(trainer, balanced)
    if failure is None:
        return
    if balanced and _failure_of_forward(trainer, balanced=False) is None:
        advice = (
            "Set router_aux_loss_coef=0.0 in the config: without the balancing loss of its experts "
            "it trains."
        )
    else:
        advice = "Use a model of another class."
    base = without_adapters(model)
    raise ValueError(
        f"TRL can't train {type(base).__name__}: its forward fails with {type(failure).__name__}: "
        f"{failure}. {advice}"
    ) from failure


def _failure_of_forward(trainer: Any, balanced: bool) -> Exception | None:
    """Return what TRL's forward raises on a few tokens, or None."""
    device = input_device(trainer.accelerator.unwrap_model(trainer.model))
    ids = torch.full((1, 4), trainer.processing_class.eos_token_id, device=device)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": ids,
    }
    if balanced:
        inputs["output_router_logits"] = True
    ready = sampling_state(trainer.model, trainer.accelerator)
    try:
        with ready as unwrapped, trainer.accelerator.autocast(), torch.no_grad():
            unwrapped(**inputs, fused_lm_head=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error
    return None


def _start_of_run(trainer: Any) -> datetime:
    """Return when the run in the output directory began, or now; the same in all processes."""
    start = [read_start(trainer.run.rendering_path)]
    if trainer.accelerator.num_processes > 1:
        start = broadcast_object_list(start)
    return start[0]


def _counts_right(args: Any) -> bool:
    """Return whether the best round is chosen by a share of right completions."""
    return bool(re.search(r"(?:accuracy|pass@\d+)$", args.metric_for_best_model or ""))


def _build_scorer(
    trainer: Any, reward_funcs: Any, weights: Any = None, processing_classes: Any = None
) -> Scorer:
    return Scorer(
        reward_funcs,
        reward_weights=weights,
        reward_processing_classes=processing_classes,
        device=trainer.accelerator.device,
        # As GRPOTrainer, but for the revision, which is the policy's.
        model_init_kwargs={
            "trust_remote_code": trainer.args.trust_remote_code,
            **{k: v for k, v in (trainer.args.model_init_kwargs or {}).items() if k != "revision"},
        },
        get_trainer_state=lambda: trainer.state,
    )
