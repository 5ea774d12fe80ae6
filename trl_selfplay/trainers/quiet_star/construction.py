"""Build a Quiet-STaR trainer: load the model, add what thinks, and refuse what can't work.

In: the constructor's arguments. Out: a model with a thought module, adapters that train and save
it, and a forward that takes thoughts; or an error that says what to do.
"""

import copy
import functools
import logging
import types
from collections.abc import Collection
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_selfplay.rollouts.prompts import check_embedded
from trl_selfplay.trainers.construction import check_adapters, check_special_tokens
from trl_selfplay.trainers.quiet_star.mixing import (
    ATTRIBUTE,
    attach_thought_module,
    trained_module,
    unwrap_causal_lm,
)
from trl_selfplay.trainers.quiet_star.model import QuietSTaRModel
from trl_selfplay.trainers.quiet_star.sampling import can_think, predicted_tokens
from trl_selfplay.trainers.quiet_star.storage import SETTINGS_NAME, find_thoughts
from trl_selfplay.trainers.quiet_star.unrolled import think_and_talk

logger = logging.getLogger(__name__)

_ROWS_AT_A_TIME = 64


def add_thoughts_to_forward(causal_lm: Any) -> None:
    """Give a model's forward the keyword `thought_batch`; without it, nothing changes.

    With it the forward returns what `think_and_talk` does. Going through the forward lets wrappers
    (data parallelism, autocast, adapters) see the whole computation.
    """
    original = causal_lm.forward

    @functools.wraps(type(causal_lm).forward)
    def forward(self: Any, *args: Any, thought_batch: Any = None, **kwargs: Any) -> Any:
        if thought_batch is None:
            return original(*args, **kwargs)
        return think_and_talk(self, kwargs["input_ids"], kwargs["attention_mask"], thought_batch)

    causal_lm.forward = types.MethodType(forward, causal_lm)


def refuse_unused(
    compute_metrics: Any, compute_loss_func: Any, preprocess_logits_for_metrics: Any
) -> None:
    """Raise ValueError for parent arguments that need logits of the whole vocabulary."""
    for name, value in (
        ("compute_metrics", compute_metrics),
        ("compute_loss_func", compute_loss_func),
        ("preprocess_logits_for_metrics", preprocess_logits_for_metrics),
    ):
        if value is not None:
            raise ValueError(
                f"`{name}` was given, but logits with thoughts are never held for a whole batch. "
                "Leave it out; losses with and without thoughts are logged."
            )


def refuse_replicas(args: Any) -> None:
    """Raise ValueError where the model would be copied in one process, or texts be cut up."""
    for name in ("cp_size", "sp_size"):
        size = getattr(args.parallelism_config, name, 1)
        if size > 1:
            raise ValueError(
                f"parallelism_config has {name}={size}, which splits a text over processes, away "
                "from its thoughts. Use data parallelism."
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs, over which it would split a batch without its "
            "thoughts. Start the script with torchrun or accelerate launch, or let it see one GPU "
            "with CUDA_VISIBLE_DEVICES=0."
        )


def refuse_optimizer_without_thoughts(optimizer: Any, module: Any) -> None:
    """Raise ValueError for a user's optimizer that doesn't hold the mixing head and the vectors."""
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(parameter) not in held for parameter in module.parameters()):
        raise ValueError(
            "`optimizers` was given with an optimizer that was made before the model had a mixing "
            "head and vectors of thoughts, so these would never train. Use optimizer_cls_and_kwargs, "
            "or `optim` in the config."
        )


def refuse_added_tokens(model: Any, num_embeddings: int) -> None:
    """Raise ValueError where `chat_template_path` has added tokens to the base of adapters."""
    count = model.get_input_embeddings().weight.shape[0]
    if isinstance(model, PeftModel) and count != num_embeddings:
        raise ValueError(
            f"chat_template_path brings the base model from {num_embeddings} to {count} embeddings, "
            "which adapters don't save, so what is trained could not be loaded. Set it to the "
            "template's file, or train without `peft_config`."
        )


def refuse_unknown_tokens(dataset: Any, tokenizer: Any, model: Any) -> None:
    """Raise ValueError if a dataset holds tokens that the model has no embedding for."""
    count = model.get_input_embeddings().weight.shape[0]
    check_special_tokens(model, tokenizer)
    is_tokenized = isinstance(dataset, Dataset) and "input_ids" in dataset.column_names
    if not is_tokenized or len(tokenizer) <= count:
        return
    for index, ids in enumerate(dataset["input_ids"]):
        check_embedded(ids, tokenizer, count, f"row {index}")


def check_rows(dataset: Any, name: str, args: Any, formats: bool) -> None:
    """Raise ValueError if the first row of a dataset is missing, or has no text to train on.

    Args:
        dataset: What the constructor was given; other types are left to the parent.
        name: What to call it.
        args: Its `dataset_text_field`.
        formats: Whether something else makes the text of a row, which is then not looked at.
    """
    if isinstance(dataset, dict):
        for key, each in dataset.items():
            check_rows(each, f"{name}[{key!r}]", args, formats)
        return
    if not isinstance(dataset, Dataset | IterableDataset):
        return
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(f"{name} has no rows: an empty split, or a filter that left nothing.")
    if formats or {"input_ids", "messages", "conversations"} & row.keys():
        return
    if "prompt" in row and "completion" not in row:
        raise ValueError(
            f"{name} has a column `prompt` and no `completion`: its columns are "
            f"{', '.join(sorted(row))}. Rename the one with the text that is to follow the prompt."
        )
    field = args.dataset_text_field
    if "prompt" not in row and field not in row:
        raise ValueError(
            f"{name} has no text to train on: its columns are {', '.join(sorted(row))}, and "
            f"dataset_text_field={field!r}. Set it to the column with the text, or rename columns to "
            "`text`, `messages`, or `prompt` and `completion`."
        )
    if row["completion" if "prompt" in row else field] is None:
        raise ValueError(f"{name} has no text in its first row. Filter such rows out.")


def check_batch(batch: Any) -> None:
    """Raise ValueError if a collated batch lacks what thoughts need, or has what they don't know."""
    known = ("input_ids", "labels", "attention_mask")
    missing, unknown = set(known) - batch.keys(), batch.keys() - set(known)
    if missing or unknown:
        raise ValueError(
            f"`data_collator` returns {', '.join(sorted(batch))}. Thoughts need {', '.join(known)} "
            "and know nothing else, such as several texts in a row. Leave `data_collator` out, or "
            "let it return these three."
        )


def refuse_rows_without_room(
    dataset: Any, columns: Collection[str], collate: Any, num_ahead_tokens: int
) -> None:
    """Raise ValueError if no row of a training set has room for a thought; streams aren't read.

    Args:
        dataset: The training set.
        columns: Those that `collate` gets.
        collate: The data collator.
        num_ahead_tokens: n_true.
    """
    if not isinstance(dataset, Dataset) or not len(dataset):
        return
    most = 0
    for first in range(0, len(dataset), _ROWS_AT_A_TIME):
        rows = range(first, min(first + _ROWS_AT_A_TIME, len(dataset)))
        batch = collate([{k: v for k, v in dataset[row].items() if k in columns} for row in rows])
        check_batch(batch)
        labels, mask = batch["labels"], batch["attention_mask"]
        if can_think(labels, mask, num_ahead_tokens).any():
            return
        most = max(most, int(predicted_tokens(labels, mask).sum(1).max()))
    raise ValueError(
        f"no row of train_dataset has room for a thought: one stands before num_ahead_tokens="
        f"{num_ahead_tokens} tokens to learn, and no row has more than {most}. Set "
        f"num_ahead_tokens={max(1, most)} or less, raise max_length where it cuts rows, or set "
        "completion_only_loss=False where completions are short."
    )


def load_model(model: Any, args: Any, quantization_config: Any) -> tuple[Any, Any]:
    """Return a model that can be added to, loaded as the parent would if it is given by name.

    What was saved with thoughts, and a QuietSTaRModel, keeps its head, vectors and adapters, and
    these train.
    """
    if isinstance(model, QuietSTaRModel):
        return _go_on(model, args, model.config.name_or_path), quantization_config
    if not isinstance(model, str):
        return model, quantization_config
    kwargs = {"dtype": "float32", **(args.model_init_kwargs or {})}
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if quantization_config is not None:
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "quantization_config is given twice, as an argument and in model_init_kwargs. Leave "
                "one of them out."
            )
        kwargs["quantization_config"] = quantization_config
        kwargs.setdefault("device_map", {"": args.device})
    args.model_init_kwargs = None  # used up; the parent would warn that it ignores them
    hub = {name: kwargs.get(name) for name in ("revision", "token", "cache_dir")}
    folder = find_thoughts(model, hub)
    if folder is not None:
        return _go_on(QuietSTaRModel.from_pretrained(folder, **kwargs), args, model), None
    return AutoModelForCausalLM.from_pretrained(model, **kwargs), None


def _go_on(thinking: QuietSTaRModel, args: Any, name: str) -> Any:
    """Return the model inside, whose adapters train again, and say what it begins with."""
    model, length = thinking.model, thinking.settings.thought_length
    if isinstance(model, PeftModel):
        for adapter in model.active_adapters:
            model.peft_config[adapter].inference_mode = False
        model.set_adapter(model.active_adapter)
    logger.info(
        "%s has learnt to think: its mixing head and the vectors that begin and end a thought are "
        "kept as they are%s.",
        name,
        ""
        if length == args.thought_length
        else f", now for thoughts of {args.thought_length} tokens instead of {length}",
    )
    return model


def refuse_thoughts(model: Any) -> None:
    """Raise TypeError or warn where `num_thoughts=0` would drop what a model knows of thinking."""
    if isinstance(model, QuietSTaRModel):
        raise TypeError(
            "num_thoughts=0 is plain SFT, which a QuietSTaRModel is not for. Load the plain model "
            "from the folder with AutoModelForCausalLM, or set num_thoughts=2."
        )
    if isinstance(model, str) and (Path(model) / SETTINGS_NAME).exists():
        logger.warning(
            "num_thoughts=0 is plain SFT: what %s has learnt of thinking is not loaded, and will "
            "not be in the new run's model.",
            model,
        )


def refuse_adapters(model: Any, peft_config: Any) -> None:
    """Raise ValueError for adapters with which a thought module would not be trained or saved."""
    check_adapters(model, peft_config)
    adapters = getattr(model, "peft_config", {}).values()
    if any(ATTRIBUTE not in (adapter.modules_to_save or ()) for adapter in adapters):
        raise ValueError(
            "the model has adapters already, so the mixing head would not be trained and saved with "
            "them. Pass the base model and `peft_config`, or merge the adapters first. To go on "
            "from a Quiet-STaR run, pass the name of its folder, or a QuietSTaRModel."
        )
    if adapters and peft_config is not None:
        raise ValueError(
            "`peft_config` was given, but the model has adapters that learnt to think, which go on "
            "training. Leave `peft_config` out, or merge the adapters first."
        )
    if peft_config is not None and not hasattr(peft_config, "modules_to_save"):
        raise ValueError(
            f"{type(peft_config).__name__} has no `modules_to_save`, so the mixing head could not be "
            "trained and saved with its adapters. Use LoRA."
        )
    if getattr(peft_config, "alora_invocation_tokens", None):
        raise ValueError(
            "peft_config has alora_invocation_tokens: such adapters switch on at a token, which "
            "thoughts don't follow. Leave it out."
        )


def switch_router_loss_off(model: Any, args: Any) -> None:
    """Leave a mixture of experts' loss of its router out: it would count thoughts as text."""
    config = unwrap_causal_lm(model).config.get_text_config()
    own = getattr(config, "router_aux_loss_coef", 0.0)
    if args.router_aux_loss_coef is None and own and hasattr(config, "output_router_logits"):
        args.router_aux_loss_coef = 0.0
        logger.warning(
            "The loss of the experts' router (router_aux_loss_coef=%s in the model's config) is "
            "left out: it would count thoughts as text.",
            own,
        )


def attach_thoughts(model: Any, tokenizer: Any, args: Any) -> None:
    """Give a model its thought module, or take over the one that it has."""
    causal_lm = unwrap_causal_lm(model)
    if hasattr(causal_lm, ATTRIBUTE):
        trained_module(causal_lm).rescale(args.meta_token_scale)
        return
    if (Path(causal_lm.config.name_or_path) / SETTINGS_NAME).exists():
        logger.warning(
            "%s holds a model with thoughts, but the model was loaded without them: it begins with "
            "an untrained mixing head. To go on from it, pass the folder's name, or "
            "QuietSTaRModel.from_pretrained of it.",
            causal_lm.config.name_or_path,
        )
    attach_thought_module(causal_lm, tokenizer, args.meta_token_scale, args.seed)


def save_thoughts_too(peft_config: Any) -> Any:
    """Return a copy of a PEFT configuration that trains and saves the thought module."""
    if peft_config is None:
        return None
    peft_config = copy.deepcopy(peft_config)
    saved = list(peft_config.modules_to_save or ())
    peft_config.modules_to_save = [*saved, *({ATTRIBUTE} - set(saved))]
    return peft_config


def longest_row(dataset: Any, max_length: int | None) -> int | None:
    """Return the longest row's tokens; where rows aren't tokens yet only the limit is known."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return max_length
    return max((len(row) for row in dataset["input_ids"]), default=0)
