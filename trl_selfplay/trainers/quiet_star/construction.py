"""Build a Quiet-STaR trainer: load the model, attach the thought module, refuse what can't work.

In: the constructor's arguments. Out: a model with a thought module, adapters that train and save
it, and a forward that takes thoughts; or an error that says what to do.
"""

import copy
import functools
import logging
import types
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from trl_selfplay.rollouts.prompts import (
    as_plain_rows,
    check_embedded,
    check_message,
    check_nesting,
    check_template_kwargs,
)
from trl_selfplay.tools.offer import read_schemas
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
    """Add a keyword `thought_batch` to a model's forward, which then returns `think_and_talk`'s dict.

    Without the keyword nothing changes. Going through the forward lets wrappers (data parallelism,
    autocast, adapters) see the whole computation.
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
    """Raise ValueError for the parent's arguments that need the logits of a whole batch."""
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
    """Raise ValueError for parallelism that copies the model within a process or splits texts."""
    for name in ("cp_size", "sp_size"):
        size = getattr(args.parallelism_config, name, 1)
        if size > 1:
            raise ValueError(
                f"parallelism_config has {name}={size}, which splits a text across processes, away "
                "from its thoughts. Use data parallelism."
            )
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs and would split a batch across them without its "
            "thoughts. Start the script with torchrun or accelerate launch, or show it one GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        )


def refuse_optimizer_without_thoughts(optimizer: Any, module: Any) -> None:
    """Raise ValueError if a user's optimizer lacks the mixing head and the thought vectors."""
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(parameter) not in held for parameter in module.parameters()):
        raise ValueError(
            "the optimizer in `optimizers` was created before the model had a mixing head and "
            "thought vectors, so these would never train. Use optimizer_cls_and_kwargs, or `optim` "
            "in the config."
        )


def refuse_added_tokens(model: Any, num_embeddings: int) -> None:
    """Raise ValueError if `chat_template_path` has added tokens to a base model with adapters."""
    count = model.get_input_embeddings().weight.shape[0]
    if isinstance(model, PeftModel) and count != num_embeddings:
        raise ValueError(
            f"chat_template_path brings the base model from {num_embeddings} to {count} embeddings, "
            "which adapters don't save, so the trained model could not be loaded. Set it to the "
            "template's file, or train without `peft_config`."
        )


def refuse_unknown_tokens(dataset: Any, tokenizer: Any, model: Any) -> None:
    """Raise ValueError if a dataset has tokens without an embedding in the model."""
    count = model.get_input_embeddings().weight.shape[0]
    check_special_tokens(model, tokenizer)
    is_tokenized = isinstance(dataset, Dataset) and "input_ids" in dataset.column_names
    if not is_tokenized or len(tokenizer) <= count:
        return
    for index, ids in enumerate(dataset["input_ids"]):
        check_embedded(ids, tokenizer, count, f"row {index}")


def check_rows(dataset: Any, name: str, args: Any, formats: bool) -> None:
    """Raise ValueError or TypeError if a dataset has no rows, or neither text nor tokens in its first row.

    Args:
        dataset: The constructor's argument; types other than datasets are left to the parent.
        name: Name of the argument, for the error.
        args: The configuration, for `dataset_text_field`.
        formats: True if the user formats rows, whose columns then aren't checked.
    """
    if isinstance(dataset, dict):
        for key, each in dataset.items():
            check_rows(each, f"{name}[{key!r}]", args, formats)
        return
    if not isinstance(dataset, Dataset | IterableDataset):
        return
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError(
            f"{name} has no rows. Is the split empty, or did a filter remove all rows?"
        )
    if formats or {"messages", "conversations"} & row.keys():
        return
    if "input_ids" in row:
        _check_ids(row["input_ids"], f"{name} row 0: `input_ids`")
        return
    if "prompt" in row and "completion" not in row:
        raise ValueError(
            f"{name} has a column `prompt` and no `completion`: its columns are "
            f"{', '.join(sorted(row))}. Rename the column that holds the completions."
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


def _check_ids(ids: Any, where: str) -> None:
    """Raise TypeError unless this is a list of integers, or an array of them."""
    try:
        given = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError):
        given = None
    if given is None or given.dim() != 1 or (given.numel() and given.is_floating_point()):
        raise TypeError(
            f"{where} is {ids!r:.200}; expected a list of token ids. Leave the column out to train on text."
        )


def plain(dataset: Any) -> Any:
    """Return a dataset, or a dict of them, whose rows have text and lists: see `as_plain_rows`."""
    if isinstance(dataset, dict):
        return {key: plain(each) for key, each in dataset.items()}
    return as_plain_rows(dataset) if isinstance(dataset, Dataset) else dataset


@contextmanager
def naming_bad_rows(datasets: Mapping[str, Any], args: Any, formats: bool) -> Iterator[None]:
    """Name the first row that isn't text if the parent fails while it prepares its datasets.

    Args:
        datasets: The constructor's arguments, by their names.
        args: The configuration, for `dataset_text_field`.
        formats: True if the user formats rows, which then aren't looked at.

    Raises:
        TypeError, ValueError: In place of what the parent raises, if there is such a row.
    """
    try:
        yield
    except Exception as error:
        for name, given in () if formats else datasets.items():
            for key, dataset in (given if isinstance(given, dict) else {"": given}).items():
                if isinstance(dataset, Dataset):
                    _refuse_bad_row(dataset, f"{name}[{key!r}]" if key else name, args, error)
        raise


def _refuse_bad_row(dataset: Dataset, name: str, args: Any, error: Exception) -> None:
    for index, row in enumerate(as_plain_rows(dataset)):
        where = f"`{name}` row {index}"
        check_nesting(row, where)
        kwargs = row.get("chat_template_kwargs", {})
        check_template_kwargs(kwargs, f"{where}: `chat_template_kwargs`")
        read_schemas(row, where)
        # The parent prefers the text to a prompt beside it.
        columns = ["messages", "conversations", "prompt", "completion", args.dataset_text_field]
        for column in columns:
            value = row.get(column)
            if column not in row or (isinstance(value, str) and column not in columns[:2]):
                continue
            if not (isinstance(value, list) and value and column in columns[:4]):
                raise TypeError(
                    f"{where}: `{column}` is {value!r:.200}; expected text, or a list of messages "
                    "where the parent takes one. Change the row, or leave it out."
                ) from error
            for place, message in enumerate(value):
                if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                    raise TypeError(
                        f"{where}: `{column}` has {message!r:.200} as message {place}; expected one "
                        'such as {"role": "user", "content": "…"}. Change the row, or leave it out.'
                    ) from error
                check_message(message, f"{where}: `{column}`, message {place}")
        both = [row[column] for column in ("prompt", "completion") if column in row]
        if len({type(value) for value in both}) > 1:
            raise TypeError(
                f"{where}: `prompt` is {both[0]!r:.200} and `completion` is {both[1]!r:.200}; give "
                "both as text or both as lists of messages."
            ) from error


def refuse_no_rows_left(dataset: Any, args: Any) -> None:
    """Raise ValueError if the parent's preparation has dropped every row of the training set."""
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(
            "no row of train_dataset is left once TRL has prepared it: rows without a token to learn "
            f"within max_length={args.max_length} are dropped. Raise max_length, or give rows with a "
            "text or completion that isn't empty."
        )


def check_batch(batch: Any) -> None:
    """Raise ValueError if a collated batch doesn't have exactly the keys that thoughts support."""
    known = ("input_ids", "labels", "attention_mask")
    missing, unknown = set(known) - batch.keys(), batch.keys() - set(known)
    if missing or unknown:
        raise ValueError(
            f"`data_collator` returns {', '.join(sorted(batch))}. Thoughts need {', '.join(known)} "
            "and support nothing else, such as several texts per row. Leave `data_collator` out, or "
            "let it return these three."
        )


def refuse_rows_without_room(
    dataset: Any, columns: Collection[str], collate: Any, num_ahead_tokens: int
) -> None:
    """Raise ValueError if no row of a training set has room for a thought.

    Iterable datasets aren't read.

    Args:
        dataset: The training set.
        columns: The columns passed to `collate`.
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
        f"no row of train_dataset has room for a thought: a thought needs num_ahead_tokens="
        f"{num_ahead_tokens} labelled tokens after it, and no row has more than {most}. Set "
        f"num_ahead_tokens={max(1, most)} or less, raise max_length if it truncates rows, or set "
        "completion_only_loss=False if completions are short."
    )


def load_model(model: Any, args: Any, quantization_config: Any) -> tuple[Any, Any]:
    """Return a model to attach thoughts to; a name is loaded as the parent would load it.

    A model saved with thoughts, or a QuietSTaRModel, keeps its head, vectors and adapters, which go
    on training.
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
                "quantization_config is given twice, as an argument and in model_init_kwargs. Remove one "
                "of them."
            )
        kwargs["quantization_config"] = quantization_config
        kwargs.setdefault("device_map", {"": args.device})
    args.model_init_kwargs = None  # already used; the parent would warn that it ignores them
    hub = {name: kwargs.get(name) for name in ("revision", "token", "cache_dir")}
    folder = find_thoughts(model, hub)
    if folder is not None:
        return _go_on(QuietSTaRModel.from_pretrained(folder, **kwargs), args, model), None
    return AutoModelForCausalLM.from_pretrained(model, **kwargs), None


def _go_on(thinking: QuietSTaRModel, args: Any, name: str) -> Any:
    """Return the wrapped model with its adapters set to train, and log what it starts with."""
    model, length = thinking.model, thinking.settings.thought_length
    if isinstance(model, PeftModel):
        for adapter in model.active_adapters:
            model.peft_config[adapter].inference_mode = False
        model.set_adapter(model.active_adapter)
    logger.info(
        "%s was trained to think: its mixing head and its thought vectors are kept%s.",
        name,
        ""
        if length == args.thought_length
        else f", now for thoughts of {args.thought_length} tokens instead of {length}",
    )
    return model


def refuse_thoughts(model: Any) -> None:
    """Raise TypeError or warn if `num_thoughts=0` would drop a model's trained thoughts."""
    if isinstance(model, QuietSTaRModel):
        raise TypeError(
            "num_thoughts=0 is plain SFT, which doesn't take a QuietSTaRModel. Load the plain model "
            "from the folder with AutoModelForCausalLM, or set num_thoughts=2."
        )
    if isinstance(model, str) and (Path(model) / SETTINGS_NAME).exists():
        logger.warning(
            "num_thoughts=0 is plain SFT: the mixing head and thought vectors of %s are not loaded, "
            "and the new run's model will not have them.",
            model,
        )


def refuse_adapters(model: Any, peft_config: Any) -> None:
    """Raise ValueError for adapters that would not train or save the thought module."""
    check_adapters(model, peft_config)
    adapters = getattr(model, "peft_config", {}).values()
    if any(ATTRIBUTE not in (adapter.modules_to_save or ()) for adapter in adapters):
        raise ValueError(
            "the model has adapters already, so the mixing head would not be trained and saved with "
            "them. Pass the base model and `peft_config`, or merge the adapters first. To continue "
            "from a Quiet-STaR run, pass the name of its folder, or a QuietSTaRModel."
        )
    if adapters and peft_config is not None:
        raise ValueError(
            "`peft_config` was given, but the model has adapters from an earlier Quiet-STaR run, which "
            "go on training. Leave `peft_config` out, or merge the adapters first."
        )
    if peft_config is not None and not hasattr(peft_config, "modules_to_save"):
        raise ValueError(
            f"{type(peft_config).__name__} has no `modules_to_save`, so the mixing head could not be "
            "trained and saved with its adapters. Use LoRA."
        )
    if getattr(peft_config, "alora_invocation_tokens", None):
        raise ValueError(
            "peft_config has alora_invocation_tokens: such adapters switch on at certain tokens, which "
            "thoughts don't support. Leave it out."
        )


def switch_router_loss_off(model: Any, args: Any) -> None:
    """Disable the router loss of a mixture of experts, which would count thoughts as text."""
    config = unwrap_causal_lm(model).config.get_text_config()
    own = getattr(config, "router_aux_loss_coef", 0.0)
    if args.router_aux_loss_coef is None and own and hasattr(config, "output_router_logits"):
        args.router_aux_loss_coef = 0.0
        logger.warning(
            "The router loss of the experts (router_aux_loss_coef=%s in the model's config) is "
            "disabled: it would count thoughts as text.",
            own,
        )


def attach_thoughts(model: Any, tokenizer: Any, args: Any) -> None:
    """Attach a thought module to a model, or keep the one that it has."""
    causal_lm = unwrap_causal_lm(model)
    if hasattr(causal_lm, ATTRIBUTE):
        trained_module(causal_lm).rescale(args.meta_token_scale)
        return
    if (Path(causal_lm.config.name_or_path) / SETTINGS_NAME).exists():
        logger.warning(
            "%s holds a model with thoughts, but the model was loaded without them, so it starts "
            "with an untrained mixing head. To continue from the saved one, pass the folder's name "
            "or QuietSTaRModel.from_pretrained(folder).",
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
    """Return the length of the longest row, or `max_length` if rows aren't tokenized yet."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return max_length
    return max((len(row) for row in dataset["input_ids"]), default=0)
