"""What users give to QuietSTaRTrainer: rows and arguments work, or are refused with the remedy."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorForLanguageModeling

from trl_selfplay import QuietSTaRConfig, QuietSTaRTrainer

TEXTS = {"text": ["Q 1 + 2 = ? so 3 yes", "Q 2 + 2 = ? so 4 yes"] * 4}


@pytest.fixture
def build(tmp_path, tiny_model, word_tokenizer):
    """Build a trainer on texts: `build(train_dataset=…, field=…)`."""

    def build(**changes):
        fields = QuietSTaRConfig.__dataclass_fields__
        settings = {
            "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "max_steps": 2,
            "save_strategy": "no", "per_device_train_batch_size": 4, "thought_length": 2,
            "num_ahead_tokens": 2, "activation_checkpointing": False,
            **{k: v for k, v in changes.items() if k in fields},
        }  # fmt: skip
        arguments = {
            "train_dataset": Dataset.from_dict(TEXTS),
            "processing_class": word_tokenizer,
            **{k: v for k, v in changes.items() if k not in fields},
        }
        model = arguments.pop("model", None) or tiny_model(word_tokenizer)
        return QuietSTaRTrainer(
            model, QuietSTaRConfig(str(tmp_path / "run"), **settings), **arguments
        )

    return build


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
    assert "router_aux_loss_coef=0.001 in the model's config) is left out" in caplog.text
    assert not trainer.aux_loss_enabled
    trainer.train()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    trainer.model.train()
    both = []
    for _ in range(2):
        trainer._batch_index["train"] = 0
        both.append(trainer.compute_loss(trainer.model, batch).item())
    assert both[0] == both[1]
