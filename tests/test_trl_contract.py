"""What we rely on in TRL and transformers, one fact a test: a new release tells here what it changed.

Nothing of this package is tested here. A failing test names the fact; grep the package for it.
"""

import copy
import gc
import inspect
import math
import weakref
from collections import Counter
from dataclasses import dataclass, fields
from functools import partial

import accelerate
import pytest
import torch
from causal_classes import build_tiny
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    SFTConfig,
    SFTTrainer,
    TrlParser,
    pack_dataset,
)
from trl.cli.commands import get_commands
from trl.models import unwrap_model_for_generation

EOS = 1
LN_2 = math.log(2)
QUIET = {
    "bf16": False,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
}


def token_rows(count=4, length=6, first=3):
    """Rows of ids with loss on the second half; row i begins with the token first + i."""
    rows = [[first + i, *((j * 3 + i) % 18 + 3 for j in range(length - 1))] for i in range(count)]
    labels = [[-100] * (length // 2) + row[length // 2 :] for row in rows]
    return Dataset.from_dict({"input_ids": rows, "labels": labels})


def parameter_names(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.fixture
def build_sft(tmp_path, tiny_model, word_tokenizer):
    def build(*, rows=None, model=None, cls=SFTTrainer, trainer_arguments=(), **config):
        config.setdefault("output_dir", str(tmp_path / "run"))
        return cls(
            model if model is not None else tiny_model(word_tokenizer),
            SFTConfig(**{**QUIET, **config}),
            train_dataset=token_rows() if rows is None else rows,
            processing_class=word_tokenizer,
            **dict(trainer_arguments),
        )

    return build


# --- signatures ---


def test_parameters_of_the_sft_trainer() -> None:
    assert parameter_names(SFTTrainer.__init__) == [
        "model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class",
        "compute_loss_func", "compute_metrics", "callbacks", "optimizers",
        "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics", "quantization_config",
        "peft_config", "formatting_func",
    ]  # fmt: skip


def test_parameters_of_the_dpo_trainer() -> None:
    assert parameter_names(DPOTrainer.__init__) == [
        "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset",
        "processing_class", "compute_metrics", "callbacks", "optimizers", "quantization_config",
        "peft_config",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("train", ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
        ("evaluate", ["eval_dataset", "ignore_keys", "metric_key_prefix"]),
        ("log", ["logs", "start_time"]),
        ("compute_loss", ["model", "inputs", "return_outputs", "num_items_in_batch"]),
        ("get_batch_samples", ["epoch_iterator", "num_batches", "device"]),
        ("create_model_card", ["model_name", "dataset_name", "tags"]),
    ],
)
def test_parameters_of_the_methods_that_are_overridden(method, names) -> None:
    assert parameter_names(getattr(SFTTrainer, method)) == names


# --- what a row may contain ---


def test_rows_of_ids_and_labels_are_used_as_they_are(build_sft) -> None:
    """No EOS is added, nothing is masked or reordered."""
    rows = token_rows()
    assert build_sft(rows=rows).train_dataset[:] == rows[:]


@pytest.mark.parametrize(
    ("completion_only_loss", "labels"), [(None, [5, 6, 7, 8]), (True, [-100, -100, 7, 8])]
)
def test_a_completion_mask_is_ignored_unless_asked_for(
    build_sft, completion_only_loss, labels
) -> None:
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7, 8]], "completion_mask": [[0, 0, 1, 1]]})
    trainer = build_sft(rows=rows, completion_only_loss=completion_only_loss)
    assert trainer.train_dataset[0]["labels"] == labels


def test_a_completion_mask_assigned_later_trains_on_the_prompt(build_sft) -> None:
    trainer = build_sft()
    trainer.train_dataset = Dataset.from_dict(
        {"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]], "completion_mask": [[0, 0, 1]]}
    )
    assert next(iter(trainer.get_train_dataloader()))["labels"].tolist() == [[5, 6, 7]]


def test_text_rows_get_eos(build_sft) -> None:
    """The reason why rows of ids are used: a completion that was cut would learn to end there."""
    trainer = build_sft(rows=Dataset.from_list([{"prompt": "Q 1 + 2", "completion": " = 3"}]))
    assert trainer.train_dataset[0]["input_ids"][-1] == EOS


def test_a_dataset_assigned_later_is_not_truncated(build_sft) -> None:
    trainer = build_sft(max_length=8)
    trainer.train_dataset = token_rows(length=12)
    assert next(iter(trainer.get_train_dataloader()))["input_ids"].shape == (2, 12)


def test_only_signature_columns_reach_the_model(build_sft) -> None:
    trainer = build_sft()
    trainer._set_signature_columns_if_needed()
    assert trainer._signature_columns == ["input_ids", "labels", "seq_lengths"]


def test_the_collator_pads_on_the_right_without_loss(build_sft) -> None:
    batch = build_sft().data_collator(
        [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    )
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (Dataset.from_dict({"input_ids": [], "labels": []}), StopIteration),
        (Dataset.from_list([{"prompt": "Q 1", "solution": "1"}]), KeyError),
        ([{"input_ids": [5]}], TypeError),
        ({"train": token_rows()}, TypeError),
    ],
    ids=["empty", "prompt only", "list", "dict"],
)
def test_the_constructor_reads_a_first_row(build_sft, rows, error) -> None:
    """The reason for the placeholder row: prompts can't be given to the parent."""
    with pytest.raises(error):
        build_sft(rows=rows)


def test_the_constructor_needs_a_training_set(tiny_model, word_tokenizer, tmp_path) -> None:
    with pytest.raises(ValueError, match="train_dataset"):
        SFTTrainer(
            tiny_model(word_tokenizer),
            SFTConfig(str(tmp_path), **QUIET),
            processing_class=word_tokenizer,
        )


def test_evaluation_inside_training_needs_an_eval_dataset_at_construction(build_sft) -> None:
    with pytest.raises(ValueError, match="eval"):
        build_sft(eval_strategy="steps", eval_steps=1)


def test_evaluation_inside_training_calls_the_public_method(build_sft) -> None:
    class Scored(SFTTrainer):
        def evaluate(self, *args, **kwargs):
            calls.append(self.state.global_step)
            metrics = {"eval_accuracy": 0.5}
            # Takes the wish to evaluate back; without it, the end of the epoch evaluates again.
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            return metrics

    calls: list[int] = []
    build_sft(
        cls=Scored,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        trainer_arguments={"eval_dataset": token_rows(1)},
    ).train()
    assert calls == [1, 2]


def test_packing_adds_the_lengths_of_the_packed_rows() -> None:
    packed = pack_dataset(token_rows(count=3, length=4), 8, "bfd")
    assert set(packed.column_names) == {"input_ids", "labels", "seq_lengths"}
    assert sorted(packed["seq_lengths"]) == [[4], [4, 4]]


def test_packed_rows_have_the_loss_of_separate_ones(build_sft) -> None:
    """Attention stays within a packed row, without FlashAttention."""
    losses = []
    for packing in (False, True):
        trainer = build_sft(packing=packing, max_length=12, max_steps=1, learning_rate=0.0)
        rows = token_rows(count=2, length=6)
        trainer.train_dataset = pack_dataset(rows, 12, "bfd") if packing else rows
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)  # float32 sums in another order


# --- loss and the patched forward ---


@pytest.mark.parametrize(
    ("declared", "loss"), [(SFTTrainer.loss_is_scaled_for_ga, 8.0), (False, 2.0)]
)
def test_a_mean_loss_is_divided_by_accumulation_steps_only_if_declared(
    build_sft, declared, loss
) -> None:
    class MeanLoss(SFTTrainer):
        loss_is_scaled_for_ga = declared

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.sum() * 0.0 + 2.0

    trainer = build_sft(
        cls=MeanLoss, max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss)


def test_the_fused_head_returns_log_probs_of_labelled_tokens(build_sft) -> None:
    model = build_sft().model
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    labels = ids.clone()
    labels[:, :2] = -100
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        expected = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = expected.gather(-1, ids[:, 1:, None])[..., 0]  # (B, S - 1)
    expected[:, 0] = 0.0  # its label is -100
    torch.testing.assert_close(output.log_probs, expected)
    assert output.entropy.shape == output.is_top1.shape == output.label_mask.shape == (2, 3)


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_trainer_says_whether_experts_are_balanced_and_the_fused_head_returns_their_loss(
    request, method
) -> None:
    build = request.getfixturevalue(f"build_{method}")
    if method == "dpo":  # else a reference model is loaded
        build = partial(build, precompute_ref_log_probs=True)
    assert not build(model=build_tiny("mixtral"), router_aux_loss_coef=0.0).aux_loss_enabled
    trainer = build(model=build_tiny("mixtral"))
    assert trainer.aux_loss_enabled
    ids = torch.tensor([[3, 4, 5, 6]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    output = trainer.model(**inputs, output_router_logits=True, fused_lm_head=True)
    assert output.aux_loss > 0.0


def test_a_deep_copy_runs_the_weights_of_the_original(build_sft) -> None:
    """The reason why a trainer's model is never copied, but loaded from disk."""
    model = build_sft().model
    clone = copy.deepcopy(model)
    for parameter in clone.parameters():
        parameter.data.zero_()
    with torch.no_grad():
        assert clone(input_ids=torch.tensor([[3, 4]])).logits.abs().max() > 0.0


# --- DPO ---


def dpo_rows(round_index, count=4):
    generator = torch.Generator().manual_seed(round_index)

    def draw(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, 20, (length,), generator=generator).tolist()

    return Dataset.from_list(
        [
            {
                "prompt_ids": draw(2, 5),
                "chosen_ids": [*draw(2, 6), EOS],
                "rejected_ids": [*draw(2, 8), EOS],
            }
            for _ in range(count)
        ]
    )


class OwnReference(DPOTrainer):
    """Its reference is the policy as it is when the log-probs are asked for, adapters included."""

    def compute_ref_log_probs(self, model, inputs):
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad(), self.accelerator.autocast():
            output = model(**given, labels=labels, fused_lm_head=True)
        return output.log_probs.sum(1).chunk(2)


@pytest.fixture
def build_dpo(tmp_path, tiny_model, word_tokenizer):
    def build(*, rows=None, model=None, peft_config=None, cls=OwnReference, **config):
        placeholder = Dataset.from_list([{"prompt": "Q 1", "chosen": "2", "rejected": "3"}])
        config.setdefault("output_dir", str(tmp_path / "run"))
        return cls(
            model if model is not None else tiny_model(word_tokenizer),
            args=DPOConfig(**{**QUIET, **config}),
            train_dataset=placeholder if rows is None else rows,
            processing_class=word_tokenizer,
            peft_config=peft_config,
        )

    return build


def test_dpo_rows_become_ids_and_reference_log_probs(build_dpo) -> None:
    rows = build_dpo(precompute_ref_log_probs=True).train_dataset
    assert {
        "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps",
    } <= set(rows.column_names)  # fmt: skip


def test_the_dpo_constructor_takes_no_ids(build_dpo) -> None:
    with pytest.raises(KeyError, match="chosen"):
        build_dpo(rows=dpo_rows(0))


def test_the_dpo_collator_puts_chosen_before_rejected(build_dpo) -> None:
    row = {"prompt_ids": [3], "chosen_ids": [4, 1], "rejected_ids": [5, 6, 1]}
    batch = build_dpo(precompute_ref_log_probs=True).data_collator([row])
    assert batch["input_ids"].tolist() == [[3, 4, 1, 0], [3, 5, 6, 1]]
    assert batch["completion_mask"].tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]


def test_the_dpo_loss_calls_the_model_once_and_logs_what_is_added_to_its_metrics(
    build_dpo,
) -> None:
    """With log-probs of completion tokens alone, 0 elsewhere."""
    trainer = build_dpo(precompute_ref_log_probs=True)
    trainer.precompute_ref_logps = True
    row = {"prompt_ids": [3, 7], "chosen_ids": [4, 1], "rejected_ids": [5, 6, 1],
           "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}  # fmt: skip
    batch, seen = trainer.data_collator([row]), []

    def forward(**kwargs):
        seen.append(trainer.model(**kwargs))
        return seen[-1]

    trainer.compute_loss(forward, batch)
    (outputs,) = seen
    assert ((outputs.log_probs != 0).int() == batch["completion_mask"][:, 1:]).all()
    trainer._metrics["train"]["ours"] += [1.0, 3.0]
    trainer.log({})
    assert trainer.state.log_history[-1]["ours"] == 2.0


@pytest.mark.parametrize("kind", ["full", "lora", "peft model"])
def test_dpo_starts_each_of_three_rounds_at_ln_2(
    build_dpo, tiny_model, word_tokenizer, kind
) -> None:
    """With the reference's log-probs in columns that are computed before each round's updates."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    model = tiny_model(word_tokenizer)
    if kind == "peft model":
        model = get_peft_model(model, lora)
    trainer = build_dpo(
        model=model,
        peft_config=lora if kind == "lora" else None,
        precompute_ref_log_probs=kind == "full",
        max_steps=2,
        learning_rate=2e-2,
    )
    trainer.precompute_ref_logps = True
    for round_index in range(3):
        rows = dpo_rows(round_index)
        batches = [trainer.data_collator([row]) for row in rows]
        logps = [trainer.compute_ref_log_probs(trainer.model, batch) for batch in batches]
        for name, column in zip(("chosen", "rejected"), zip(*logps, strict=True), strict=True):
            rows = rows.add_column(f"ref_{name}_logps", [value.item() for value in column])
        trainer.train_dataset = rows
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.train()
        first, last = trainer.state.log_history[0], trainer.state.log_history[-2]
        assert first["loss"] == pytest.approx(LN_2, abs=1e-6)
        assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
        assert abs(last["rewards/margins"]) > 1e-5  # it does train


# --- configs ---


@pytest.mark.skipif(torch.accelerator.is_available(), reason="is about machines without one")
def test_a_default_config_raises_on_a_machine_without_accelerator(tmp_path) -> None:
    with pytest.raises(ValueError, match="bf16"):
        SFTConfig(str(tmp_path))


GRPO_DEFAULTS = {
    "num_generations": 8, "num_generations_eval": None, "max_completion_length": 512,
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0,
    "generation_kwargs": None, "chat_template_kwargs": None, "reward_weights": None,
    "log_completions": False, "num_completions_to_print": None, "use_vllm": False,
    "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.3, "vllm_max_model_length": None,
    "vllm_tensor_parallel_size": 1, "vllm_server_base_url": None, "vllm_server_host": "0.0.0.0",
    "vllm_server_port": 8000, "vllm_server_timeout": 240.0,
}  # fmt: skip


def test_names_and_defaults_of_grpo_config() -> None:
    defaults = {field.name: field.default for field in fields(GRPOConfig)}
    assert {name: defaults.get(name, "absent") for name in GRPO_DEFAULTS} == GRPO_DEFAULTS


def test_learning_rates_logging_and_lengths_of_the_configs() -> None:
    defaults = {
        cls: {field.name: field.default for field in fields(cls)} for cls in (SFTConfig, DPOConfig)
    }
    assert [d["learning_rate"] for d in defaults.values()] == [2e-5, 1e-6]
    assert [d["max_length"] for d in defaults.values()] == [1024, 1024]
    assert [d["logging_steps"] for d in defaults.values()] == [10, 10]
    assert [d["bf16"] for d in defaults.values()] == [None, None]


def test_the_config_lists_the_fields_that_are_dicts_on_the_command_line() -> None:
    assert "model_init_kwargs" in SFTConfig._VALID_DICT_FIELDS


@dataclass
class FloatOrList:
    rate: float | list[float] = 1.0


@dataclass
class NamedConfig:
    config: str = ""


@dataclass
class Settings:
    learning_rate: float = 0.1
    num_rounds: int = 3


def test_flags_win_over_yaml_and_yaml_over_defaults(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("learning_rate: 1e-5\nnum_rounds: 7\n")
    parse = partial(TrlParser((Settings,)).parse_args_and_config)
    parsed = parse(["--config", str(tmp_path / "run.yaml"), "--num_rounds", "2"])
    assert parsed == (Settings(1e-5, 2),)


def test_an_unknown_key_in_yaml_is_an_error(tmp_path) -> None:
    (tmp_path / "run.yaml").write_text("rounds: 7\n")
    with pytest.raises(ValueError, match="rounds"):
        TrlParser((Settings,)).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("settings", [FloatOrList, NamedConfig])
def test_fields_that_the_parser_refuses(settings) -> None:
    with pytest.raises(ValueError, match=r"Union|config"):
        TrlParser((settings,))


def test_the_trl_command_has_a_fixed_list() -> None:
    """No plugins: the reason for a command of our own."""
    assert [command.name for command in get_commands()] == [
        "distillation", "dpo", "env", "grpo", "kto", "reward", "rloo", "sft", "vllm-serve",
    ]  # fmt: skip


# --- many rounds with one trainer ---


class Watch(TrainerCallback):
    def __init__(self, stop_at=None) -> None:
        self.events: Counter[str] = Counter()
        self.logged_steps: list[int] = []
        self.stop_at = stop_at

    def on_train_begin(self, args, state, control, **kwargs):
        self.events["begin"] += 1

    def on_train_end(self, args, state, control, **kwargs):
        self.events["end"] += 1

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.stop_at:
            control.should_training_stop = True

    def on_log(self, args, state, control, **kwargs):
        self.logged_steps.append(state.global_step)


def adam_steps(trainer) -> set[float]:
    return {float(state["step"]) for state in trainer.optimizer.state.values()}


def test_adam_moments_survive_a_second_training(build_sft) -> None:
    trainer = build_sft(max_steps=2)
    trainer.train()
    trainer.train()
    assert adam_steps(trainer) == {4.0}


def test_the_optimizer_is_fresh_after_it_was_set_to_none(build_sft) -> None:
    trainer = build_sft(max_steps=2)
    trainer.train()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()
    assert adam_steps(trainer) == {2.0}


def test_the_callback_handler_keeps_the_optimizer_alive(build_sft) -> None:
    trainer = build_sft(max_steps=1)
    trainer.train()
    optimizer = weakref.ref(trainer.optimizer.optimizer)
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.accelerator.free_memory()
    gc.collect()
    kept = optimizer() is not None
    trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None
    gc.collect()
    assert (kept, optimizer()) == (True, None)


def test_the_row_order_repeats_whatever_the_seed(build_sft) -> None:
    class Order(SFTTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen.append(inputs["input_ids"][:, 0].tolist())
            return super().training_step(model, inputs, *args, **kwargs)

    seen: list[list[int]] = []
    orders = []
    trainer = build_sft(cls=Order, rows=token_rows(8), num_train_epochs=1)
    for seed in (42, 43):
        seen.clear()
        trainer.args.seed = trainer.args.data_seed = seed
        trainer.train()
        orders.append(list(seen))
    assert len(orders[0]) == 4
    assert orders[0] == orders[1]


def test_every_training_counts_from_zero_and_fires_begin_and_end(build_sft) -> None:
    watch = Watch()
    trainer = build_sft(max_steps=2, trainer_arguments={"callbacks": [watch]})
    trainer.train()
    trainer.train()
    assert trainer.state.global_step == 2
    assert [log["step"] for log in trainer.state.log_history] == [1, 2, 2]
    assert watch.events == {"begin": 2, "end": 2}


def test_trackers_read_the_step_while_log_runs(build_sft) -> None:
    class Offset(SFTTrainer):
        def log(self, logs, start_time=None):
            step = self.state.global_step
            self.state.global_step = step + 100
            super().log(logs, start_time)
            self.state.global_step = step

    watch = Watch()
    trainer = build_sft(cls=Offset, max_steps=2, trainer_arguments={"callbacks": [watch]})
    trainer.train()
    assert watch.logged_steps == [101, 102, 102]
    assert trainer.state.global_step == 2


def test_a_callback_that_stops_ends_one_training_only(build_sft) -> None:
    trainer = build_sft(max_steps=3, trainer_arguments={"callbacks": [Watch(stop_at=2)]})
    steps = []
    for _ in range(2):
        trainer.train()
        steps.append((trainer.state.global_step, trainer.control.should_training_stop))
    assert steps == [(2, True), (2, True)]


def test_a_training_that_ran_to_its_end_also_leaves_the_stop_flag(build_sft) -> None:
    """So that the flag alone doesn't say whether somebody asked to stop; the steps do."""
    trainer = build_sft(max_steps=1)
    trainer.train()
    assert trainer.control.should_training_stop is True
    assert trainer.state.global_step == trainer.state.max_steps


def test_early_stopping_counts_in_a_state_that_checkpoints_hold() -> None:
    """Under the class's name; the count is an attribute."""
    callback = EarlyStoppingCallback(3)
    callback.early_stopping_patience_counter = 2
    state = TrainerState(stateful_callbacks=[callback]).stateful_callbacks
    assert state == {"EarlyStoppingCallback": callback.state()}
    assert callback.state()["args"]["early_stopping_patience"] == 3
    assert callback.state()["attributes"] == {"early_stopping_patience_counter": 2}


def test_resuming_without_a_checkpoint_raises(build_sft, tmp_path) -> None:
    trainer = build_sft(max_steps=1)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_checkpoints_follow_the_output_dir_of_the_moment(build_sft, tmp_path) -> None:
    trainer = build_sft(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.args.output_dir = str(tmp_path / "round-001")
    trainer.train()
    assert (tmp_path / "round-001" / "checkpoint-1" / "trainer_state.json").exists()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_resumed_training_ends_as_an_uninterrupted_one(build_sft) -> None:
    trainer = build_sft(rows=token_rows(8), max_steps=4, save_strategy="steps", save_steps=2)
    trainer.train()
    resumed = build_sft(rows=token_rows(8), max_steps=4)
    resumed.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-2")
    assert resumed.state.global_step == 4
    for (name, ours), theirs in zip(
        resumed.model.named_parameters(), trainer.model.parameters(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)


def test_an_upload_leaves_out_what_begins_with_an_underscore() -> None:
    """Both uploads of a Trainer, at the end and in between: the reason for the name `_rounds`."""
    for method in (Trainer.push_to_hub, Trainer._push_from_checkpoint):
        source = inspect.getsource(method)
        assert 'ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]' in source


# --- models, sampling, rewards, cards ---


def test_a_model_named_by_path_is_loaded_in_float32(
    build_sft, tiny_model, word_tokenizer, tmp_path
) -> None:
    tiny_model(word_tokenizer).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype
    trainer = build_sft(model=str(tmp_path / "half"))
    assert (loaded, trainer.model.dtype) == (torch.bfloat16, torch.float32)


def test_a_peft_model_with_a_peft_config_is_refused(build_sft, tiny_model, word_tokenizer) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="PeftModel"):
        build_sft(
            model=get_peft_model(tiny_model(word_tokenizer), lora),
            trainer_arguments={"peft_config": lora},
        )


def test_unwrapping_for_generation_neither_evaluates_nor_restores_after_an_error(
    tiny_model, word_tokenizer
) -> None:
    """The reason for a context of our own around it."""
    model = tiny_model(word_tokenizer).train()
    model.gradient_checkpointing_enable()
    accelerator = accelerate.Accelerator(cpu=True)

    def fail_inside():
        with unwrap_model_for_generation(model, accelerator) as unwrapped:
            inside.append((unwrapped.training, unwrapped.is_gradient_checkpointing))
            raise RuntimeError("inside")

    inside = []
    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert inside == [(True, False)]
    assert model.is_gradient_checkpointing is False


def test_how_grpo_calls_a_reward_function(tiny_model, word_tokenizer, tmp_path) -> None:
    def reward(prompts, completions, completion_ids, **kwargs):
        called.append((prompts, completions, completion_ids, kwargs))
        return [1.0, None]

    called = []
    trainer = GRPOTrainer(
        tiny_model(word_tokenizer),
        reward_funcs=reward,
        args=GRPOConfig(str(tmp_path), **QUIET, num_generations=2),
        train_dataset=Dataset.from_list([{"prompt": "Q 1", "solution": "1"}]),
        processing_class=word_tokenizer,
    )
    inputs = [{"prompt": "Q 1", "solution": "1"}] * 2
    scores = trainer._calculate_rewards(inputs, ["Q 1"] * 2, ["so 1", "no"], [[20, 4], [19]])
    (prompts, completions, completion_ids, columns) = called[0]
    assert (prompts, completions) == (["Q 1"] * 2, ["so 1", "no"])
    assert completion_ids == [[20, 4], [19]]
    assert columns["solution"] == ["1", "1"]
    assert set(columns) == {"solution", "trainer_state", "log_extra", "log_metric"}
    assert scores[0].item() == 1.0
    assert scores[1].isnan().item()  # None is "does not apply", not 0


def test_class_attributes_name_the_method_on_the_model_card(build_sft, tmp_path) -> None:
    class Named(SFTTrainer):
        _tag_names = ["first-tag"]  # noqa: RUF012  # as in TRL
        _name = "Contract"
        _paper = {"title": "A Paper", "id": "2203.14465", "citation": "@article{key}"}  # noqa: RUF012

    trainer = build_sft(cls=Named)
    trainer.create_model_card(model_name="my-model")
    card = (tmp_path / "run" / "README.md").read_text()
    assert "- first-tag" in card
    for text in ("Contract", "A Paper", "2203.14465", "@article{key}", "my-model"):
        assert text in card


def test_the_model_card_names_no_base_model_that_isnt_on_the_hub(build_sft, tmp_path) -> None:
    for source in (str(tmp_path), ""):
        trainer = build_sft()
        trainer.model.config._name_or_path = source
        trainer.create_model_card(model_name="my-model")
        card = (tmp_path / "run" / "README.md").read_text()
        assert card.count("version of [None](https://huggingface.co/None).") == 1
        assert "base_model" not in card


def test_the_configs_are_training_arguments() -> None:
    assert issubclass(SFTConfig, TrainingArguments)
    assert issubclass(DPOConfig, TrainingArguments)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch lacks oneDNN")
def test_onednn_multiplies_dense_float32_tensors() -> None:
    """Private: `torch.ops.mkldnn._linear_pointwise`, which torch.compile calls."""
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(4, 5), torch.randn(4)
    for b in (bias, None):
        found = torch.ops.mkldnn._linear_pointwise(x, weight, b, "none", [], "")
        torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, b))


def test_what_decoding_through_cuda_graphs_relies_on_exists() -> None:
    """transformers' word that a step never waits for the device; torch's end of a failed capture."""
    assert PreTrainedModel._can_compile_fullgraph is False
    assert LlamaForCausalLM._can_compile_fullgraph is True
    assert callable(torch.cuda.memory._cuda_endAllocateToPool)
    assert callable(torch.Generator.graphsafe_set_state)


@pytest.mark.parametrize(
    ("family", "class_name", "method", "parameters"),
    [
        ("gptj", "GPTJAttention", "_attn", ["query", "key", "value", "attention_mask"]),
        ("codegen", "CodeGenAttention", "_attn", ["query", "key", "value", "attention_mask"]),
        ("gpt_neo", "GPTNeoSelfAttention", "_attn", ["query", "key", "value", "attention_mask"]),
        (
            "gpt_neox_japanese",
            "GPTNeoXJapaneseAttention",
            "_attn",
            ["query", "key", "value", "attention_mask"],
        ),
        ("falcon", "FalconAttention", "_split_heads", ["fused_qkv"]),
        ("bloom", "BloomAttention", "_reshape", ["fused_qkv"]),
        ("bloom", "BloomModel", "build_alibi_tensor", ["attention_mask", "num_heads", "dtype"]),
    ],
)
def test_attention_modules_have_the_methods_that_thoughts_replace_or_call(
    family, class_name, method, parameters
) -> None:
    classes = {type(module).__name__: type(module) for module in build_tiny(family).modules()}
    found = inspect.signature(getattr(classes[class_name], method)).parameters
    assert list(found)[1:] == parameters


def test_falcon_builds_the_bias_of_alibi_from_a_mask_and_the_number_of_heads() -> None:
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    bias = build_alibi_tensor(torch.ones((1, 3)), 4, torch.float32)
    assert bias.shape == (4, 1, 3)
    assert torch.equal(bias[:, 0], bias[:, 0, 1:2] * torch.arange(3))


def test_a_4d_mask_passes_through_a_model_unchanged() -> None:
    """The same object reaches the attention function."""
    seen = []
    AttentionInterface.register(
        "test_seen", lambda m, q, k, v, mask, **_: (seen.append(mask), (q.transpose(1, 2), None))[1]
    )
    for family in ("llama", "gemma3_text", "gpt_oss", "stablelm"):
        model = build_tiny(family)
        model.config._attn_implementation = "test_seen"
        mask = torch.ones((1, 1, 3, 3), dtype=torch.bool)
        model(torch.tensor([[3, 4, 5]]), attention_mask=mask)
        assert seen
        assert all(one is mask for one in seen)
        seen.clear()


def test_a_counter_of_a_tensor_grows_with_each_write_but_those_past_autograd() -> None:
    """Private: `torch.Tensor._version`."""
    weight = torch.nn.Parameter(torch.zeros(3))
    before = weight._version
    with torch.no_grad():
        weight.copy_(torch.ones(3))
    assert weight._version > before
    before = weight._version
    weight.data.add_(1.0)  # why weights are read anew after each training
    assert weight._version == before


def test_modules_and_models_say_what_is_saved_of_them(tiny_model, word_tokenizer) -> None:
    """Private: `Module._non_persistent_buffers_set`, `PreTrainedModel._tied_weights_keys`."""
    model = tiny_model(word_tokenizer, tie_word_embeddings=True)
    rotary = next(m for n, m in model.named_modules() if n.endswith("rotary_emb"))
    assert "inv_freq" in rotary._non_persistent_buffers_set
    assert not [name for name in model.state_dict() if "inv_freq" in name]
    assert "lm_head.weight" in model._tied_weights_keys


def test_logits_are_computed_in_tiles_of_a_known_size() -> None:
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    assert chunked_logprob.TOKEN_CHUNK_SIZE == 4096
    assert utils._CHUNKED_LOGPROB_CHUNK_SIZE == 32_768


def test_the_engine_of_autograd_runs_without_the_public_function() -> None:
    from torch.autograd.graph import _engine_run_backward

    weight = torch.ones(2, requires_grad=True)
    loss = (3 * weight).sum()
    ones = (torch.ones_like(loss),)
    _engine_run_backward((loss,), ones, False, False, (), accumulate_grad=True)
    assert weight.grad.tolist() == [3.0, 3.0]


def test_trackers_are_callbacks_of_one_table_that_read_their_run_from_where_we_write_it() -> None:
    """rounds/trackers.py keeps them open; `logging_dir` is where TensorBoard's next writer writes."""
    from transformers import integrations

    table = integrations.INTEGRATION_TO_CALLBACK
    assert {"mlflow", "tensorboard", "trackio", "wandb"} <= table.keys()
    assert table["tensorboard"] is integrations.TensorBoardCallback
    assert table["mlflow"] is integrations.MLflowCallback
    assert table["wandb"] is integrations.WandbCallback
    begin = inspect.getsource(integrations.TensorBoardCallback.on_train_begin)
    assert "if self.logging_dir is None:" in begin
    assert 'os.getenv("MLFLOW_RUN_ID"' in inspect.getsource(integrations.MLflowCallback.setup)
    setup = inspect.getsource(integrations.WandbCallback.setup)
    assert "self._wandb.init(" in setup
    assert "id=" not in setup  # so that W&B reads WANDB_RUN_ID
