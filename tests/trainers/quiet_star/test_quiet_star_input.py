"""What users give to QuietSTaRTrainer: rows and arguments work, or are refused with the remedy."""

import copy

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import AdaptionPromptConfig, LoraConfig, PromptTuningConfig
from tiny_trainers import QUIET, build_trainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForLanguageModeling,
)

TEXTS = {"text": ["Q 1 + 2 = ? so 3 yes", "Q 2 + 2 = ? so 4 yes"] * 4}


@pytest.fixture
def build(tmp_path, tiny_model, word_tokenizer):
    """Build a trainer on texts: `build(train_dataset=…, field=…)`."""

    def build(**changes):
        given = {
            "bf16": False, "max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 4,
            "thought_length": 2, "num_ahead_tokens": 2, "processing_class": word_tokenizer,
            "train_dataset": Dataset.from_dict(TEXTS), **changes,
        }  # fmt: skip
        model = given.pop("model", None) or tiny_model(word_tokenizer)
        return build_trainer("Quiet-STaR", model, tmp_path / "run", QUIET, **given)

    return build


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas"])
def test_rows_in_another_format_are_trained_on_as_text(kind, build) -> None:
    texts = Dataset.from_dict(TEXTS)
    plain, formatted = build(), build(train_dataset=texts.with_format(kind))
    assert list(formatted.train_dataset["input_ids"]) == list(plain.train_dataset["input_ids"])


EMPTY = Dataset.from_dict({"text": []})


@pytest.mark.parametrize("num_thoughts", [0, 2])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_dataset": EMPTY}, "train_dataset has no rows"),
        ({"train_dataset": IterableDataset.from_generator(lambda: iter(()))}, "has no rows"),
        ({"eval_dataset": EMPTY}, "eval_dataset has no rows"),
        ({"eval_dataset": {"b": EMPTY}}, r"eval_dataset\['b'\] has no rows"),
        (
            {"train_dataset": Dataset.from_dict({"body": ["a"], "id": [1]})},
            "its columns are body, id, and dataset_text_field='text'",
        ),
        ({"dataset_text_field": "content"}, "columns are text, and dataset_text_field='content'"),
        ({"train_dataset": Dataset.from_dict({"prompt": ["a"]})}, "and no `completion`"),
        (
            {"train_dataset": Dataset.from_dict({"text": [None, "a"]})},
            "has no text in its first row",
        ),
    ],
)
def test_rows_that_cannot_be_trained_on_are_named(build, num_thoughts, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        build(num_thoughts=num_thoughts, **changes)


@pytest.mark.parametrize("length", [600, 1_000_000_000])
def test_thoughts_longer_than_all_positions_are_refused(build, length) -> None:
    """Without advice to set a negative length."""
    with pytest.raises(ValueError, match="Set a shorter thought_length"):
        build(thought_length=length)


def test_a_collator_of_several_texts_in_a_row_is_refused(build) -> None:
    def collate(rows):
        ids = torch.tensor([[i for row in rows for i in row["input_ids"]]])
        return {"input_ids": ids, "labels": ids, "position_ids": torch.zeros_like(ids)}

    with pytest.raises(ValueError, match="returns input_ids, labels, position_ids"):
        build(data_collator=collate)


def test_a_collator_of_ones_own_is_used(build, word_tokenizer) -> None:
    trainer = build(data_collator=DataCollatorForLanguageModeling(word_tokenizer, mlm=False))
    trainer.train()


def test_control_characters_of_texts_and_thoughts_are_escaped(build, byte_tokenizer, tiny_model,
                                                              capsys) -> None:  # fmt: skip
    texts = Dataset.from_dict(
        {"text": ["\x1b[31mred\x1b]0;title\x07 \u202e end" for _ in range(4)]}
    )
    trainer = build(
        model=tiny_model(byte_tokenizer), processing_class=byte_tokenizer, train_dataset=texts,
        eval_dataset=texts,
    )  # fmt: skip
    trainer.evaluate()
    printed = capsys.readouterr().out
    assert "thoughts that helped most" in printed
    assert all(c.isprintable() or c == "\n" for c in printed)


@pytest.mark.parametrize("family", ["mixtral", "phimoe"])
def test_a_mixture_of_experts_trains_without_its_routers_loss(build, family, caplog) -> None:
    """By default, with a line that says so; thoughts are scored as they were sampled."""
    config = AutoConfig.for_model(
        family, vocab_size=21, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, pad_token_id=0, eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    trainer = build(model=AutoModelForCausalLM.from_config(config).float())
    assert "router_aux_loss_coef=0.001 in the model's config) is disabled" in caplog.text
    assert not trainer.aux_loss_enabled
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.train()
    both = []
    for _ in range(2):
        trainer._batch_index["train"] = 0
        both.append(trainer.compute_loss(trainer.model, batch).item())
    assert both[0] == both[1]


def test_an_optimizer_that_lacks_the_thoughts_is_refused(build, tiny_model, word_tokenizer) -> None:
    model = tiny_model(word_tokenizer)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(ValueError, match="these would never train"):
        build(model=model, optimizers=(optimizer, None))
    build(optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1})).train()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_forwards_give_the_loss_and_gradients_of_float32(build, checkpointing) -> None:
    """Weights in float32, forwards under autocast, backward passes without it."""
    norms = []
    for bf16 in (False, True):
        trainer = build(
            bf16=bf16, gradient_checkpointing=checkpointing, logging_steps=1, max_steps=1,
            eval_dataset=Dataset.from_dict(TEXTS),
        )  # fmt: skip
        trainer.train()
        first = trainer.state.log_history[0]
        norms.append([first["loss"], first["grad_norm"], trainer.evaluate()["eval_loss"]])
        assert trainer.model.dtype == torch.float32
    assert norms[1] == pytest.approx(norms[0], rel=0.03)


@pytest.mark.parametrize(
    ("peft_config", "error", "message"),
    [
        ({"r": 4}, TypeError, "peft_config is a dict"),
        (AdaptionPromptConfig(adapter_len=2, adapter_layers=1), ValueError, "(?i)adaption_?prompt"),
        (PromptTuningConfig(num_virtual_tokens=2), ValueError, "adds virtual tokens"),
        (
            LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5]),
            ValueError,
            "alora_invocation_tokens",
        ),
    ],
)
def test_adapters_that_thoughts_cannot_train_with_are_refused(
    build, peft_config, error, message
) -> None:
    with pytest.raises(error, match=message):
        build(peft_config=peft_config)


def test_a_quantization_that_is_given_twice_is_refused(build, saved_tiny_model) -> None:
    four_bits = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="quantization_config is given twice"):
        build(
            model=str(saved_tiny_model),
            model_init_kwargs={"quantization_config": four_bits},
            quantization_config=four_bits,
        )


def test_tokens_that_a_chat_template_adds_below_adapters_are_refused(
    build, tiny_model, chat_tokenizer, tmp_path
) -> None:
    """A saved adapter would not fit its base again."""
    rows = [
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    ]
    model = tiny_model(chat_tokenizer)
    source = tmp_path / "source"
    copy.deepcopy(chat_tokenizer).save_pretrained(source)
    other = AutoTokenizer.from_pretrained(source)
    other.add_tokens(["<|im_start|>"])
    other.save_pretrained(source)
    arguments = {
        "model": model,
        "processing_class": chat_tokenizer,
        "train_dataset": Dataset.from_list(rows * 4),
        "chat_template_path": str(source),
    }
    with pytest.raises(ValueError, match="chat_template_path brings the base model from 259 to"):
        build(**arguments, peft_config=LoraConfig(target_modules=["q_proj"]))


def test_what_would_fail_later_is_refused(build, tiny_model, word_tokenizer) -> None:
    """A generation config that can't be saved, and tokens that the model has no embedding for."""
    model = tiny_model(word_tokenizer)
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.9
    with pytest.raises(ValueError, match="no checkpoint could be written"):
        build(model=model)
    model = tiny_model(word_tokenizer)
    word_tokenizer.add_tokens(["new"])
    texts = [*TEXTS["text"], "Q 1 + 2 = ? new 3 yes"]
    with pytest.raises(ValueError, match=r"row 8 has the tokens \['new'\]"):
        build(model=model, train_dataset=Dataset.from_dict({"text": texts}))


CHAT = {"role": "user", "content": "Q 1 + 2 = ?"}
ANSWER = {"role": "assistant", "content": "so 3 yes"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"text": "Q 1 + 2 = ? so 3 yes"}, {"text": None}],
            "`train_dataset` row 1: `text` is None",
        ),
        ([{"text": 1}, {"text": 2}], "row 0: `text` is 1; expected text"),
        ([{"input_ids": [CHAT]}], r"row 0: `input_ids` is \[{.*expected a list of token ids"),
        ([{"input_ids": [0.5]}], r"row 0: `input_ids` is \[0.5\]; expected a list of token ids"),
        ([{"input_ids": "Q 1"}], "row 0: `input_ids` is 'Q 1'; expected a list of token ids"),
        ([{"prompt": "Q", "completion": " so 3", "text": []}], r"row 0: `text` is \[\]; expected"),
        (
            [{"prompt": [None], "completion": " so 3 yes"}],
            r"row 0: `prompt` has None as message 0; expected one such as",
        ),
        (
            [{"prompt": [CHAT], "completion": [ANSWER]}, {"prompt": [CHAT], "completion": None}],
            "row 1: `completion` is None; expected text, or a list of messages",
        ),
        (
            [{"prompt": "Q 1 + 2 = ?", "completion": [ANSWER]}],
            "row 0: `prompt` is 'Q 1.* and `completion` is .*give both as text or both as lists",
        ),
        (
            [{"messages": [CHAT, ANSWER]}, {"messages": [CHAT, {**ANSWER, "content": None}]}],
            r"row 1: `messages`, message 1 \(role 'assistant'\): the content is None",
        ),
        (
            [{"messages": [CHAT, ANSWER], "chat_template_kwargs": None}],
            "row 0: `chat_template_kwargs` is None; expected a mapping",
        ),
        (
            [{"messages": [CHAT, ANSWER], "chat_template_kwargs": {"tokenize": False}}],
            "row 0: `chat_template_kwargs` has 'tokenize'=False, which rendering decides itself: leave",
        ),
        (
            [{"messages": [CHAT, ANSWER], "tools": "[1]"}],
            "row 0: `tools` has the entry 1; give names of tools, or their schemas",
        ),
        (
            [{"messages": [CHAT, ANSWER], "tools": ["search"]}],
            "row 0: `tools` names 'search', and the run has no tools. Give the tool's schema",
        ),
    ],
)
def test_a_row_that_is_no_text_is_named(build, word_tokenizer, rows, message) -> None:
    """The parent fails on it with a KeyError or an AttributeError that names no row."""
    word_tokenizer.chat_template = (
        "{% for m in messages %} {{ '' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %} A{% endif %}"
    )
    with pytest.raises((TypeError, ValueError), match=message):
        build(train_dataset=Dataset.from_list(rows))


def test_a_row_that_is_nested_too_deeply_is_named(build) -> None:
    """Python can't print it."""
    value: list = []
    for _ in range(3000):
        value = [value]
    rows = Dataset.from_dict({"text": ["Q 1 + 2 = ? so 3 yes"]})
    rows.set_transform(lambda batch: {"text": [value]})
    with pytest.raises(ValueError, match="row 0: `text` is nested more than 100 levels deep"):
        build(train_dataset=rows)


def test_an_error_before_the_first_step_names_the_settings(build) -> None:
    trainer = build(lr_scheduler_kwargs={"colour": 1})
    with pytest.raises(ValueError, match=r"'colour'.*lr_scheduler_kwargs=\{'colour': 1\}"):
        trainer.train()


@pytest.mark.parametrize("num_thoughts", [0, 2])
def test_rows_of_which_the_parent_leaves_none_are_refused(build, num_thoughts) -> None:
    """Training ended in "num_samples should be a positive integer value"."""
    rows = Dataset.from_dict({"prompt": ["Q 1 + 2 = ?"], "completion": [" so 3 yes"]})
    with pytest.raises(ValueError, match=r"no row of train_dataset is left.*max_length=3"):
        build(train_dataset=rows, max_length=3, num_thoughts=num_thoughts)
