"""Copies of the whole policy: loaded from disk, they compute what the trainer's model computes."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from trl_selfplay.generation.quantized_layers import prepare_quantized_layers
from trl_selfplay.rounds import whole_copy
from trl_selfplay.rounds.whole_copy import save_whole_copy

QV = ["q_proj", "v_proj"]
ADAPTERS = {
    "none": None,
    "lora": LoraConfig(r=4, target_modules=QV, init_lora_weights=False),
    "dora": LoraConfig(r=4, target_modules=QV, use_dora=True, init_lora_weights=False),
    "bias": LoraConfig(
        r=4, target_modules=QV, bias="all", lora_bias=True, init_lora_weights=False
    ),
    "modules_to_save": LoraConfig(
        r=4, target_modules=QV, modules_to_save=["lm_head"], init_lora_weights=False
    ),
    "embeddings": LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=False),
    "tokens": LoraConfig(
        r=4, target_modules=QV, trainable_token_indices={"embed_tokens": [3, 4]},
        init_lora_weights=False,
    ),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "loha": LoHaConfig(r=4, target_modules=QV, init_weights=False),
    "oft": OFTConfig(target_modules=QV, oft_block_size=4, init_weights=False),
}  # fmt: skip
IDS = torch.tensor([[3, 5, 7, 9, 11, 4, 6]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def shaken(model):
    """Change what trains, as training would."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def copied(model, folder, **kwargs):
    before = {name: p.clone() for name, p in model.state_dict().items() if p is not None}
    save_whole_copy(model, folder, torch.float32, **kwargs)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_copy_computes_what_the_policy_computes(
    kind, tmp_path, tiny_model, word_tokenizer
) -> None:
    model = tiny_model(word_tokenizer, attention_bias=True)
    base = logits(model)
    if ADAPTERS[kind] is not None:
        model = get_peft_model(model, ADAPTERS[kind])
    expected = logits(shaken(model))
    assert (expected - base).abs().max() > 1e-2
    torch.testing.assert_close(logits(copied(model, tmp_path / "copy")), expected)


@pytest.mark.parametrize("kind", ["lora", "modules_to_save", "tokens"])
def test_a_copy_without_adapters_is_the_base(kind, tmp_path, tiny_model, word_tokenizer) -> None:
    model = tiny_model(word_tokenizer)
    expected = logits(model)
    model = shaken(get_peft_model(model, ADAPTERS[kind]))
    found = logits(copied(model, tmp_path / "copy", merged=False))
    torch.testing.assert_close(found, expected)


def test_a_head_trained_apart_from_the_embedding_is_not_tied_to_it_in_the_copy(
    tmp_path, tiny_model, word_tokenizer
) -> None:
    model = tiny_model(word_tokenizer, tie_word_embeddings=True)
    tied = copied(model, tmp_path / "tied")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    model = shaken(get_peft_model(model, ADAPTERS["modules_to_save"]))
    found = copied(model, tmp_path / "untied")
    torch.testing.assert_close(logits(found), logits(model))


@pytest.mark.parametrize("kind", ["dora", "modules_to_save"])
def test_a_copy_of_a_four_bit_policy_is_its_dequantized_weights(
    kind, tmp_path, saved_chat_model
) -> None:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(
        saved_chat_model, quantization_config=quantization, dtype=torch.float32
    )
    prepare_quantized_layers(model)
    model = shaken(get_peft_model(model, ADAPTERS[kind]))
    expected = logits(model)
    save_whole_copy(model, tmp_path / "copy", torch.float32)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype=torch.float32)
    assert not hasattr(found.config, "quantization_config")
    torch.testing.assert_close(logits(found), expected, rtol=1e-3, atol=1e-3)


def test_stacked_experts_are_written_as_in_checkpoints(tmp_path) -> None:
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=21,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )
    found = copied(model, tmp_path / "copy")
    names = json.loads((tmp_path / "copy/model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in names
    torch.testing.assert_close(logits(found), logits(model))


def test_weights_are_divided_over_files_of_bounded_size(
    tmp_path, tiny_model, word_tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(whole_copy, "_BYTES_PER_FILE", 20_000)
    model = tiny_model(word_tokenizer)
    found = copied(model, tmp_path / "copy")
    sizes = [path.stat().st_size for path in (tmp_path / "copy").glob("*.safetensors")]
    assert len(sizes) > 3
    assert max(sizes) < 25_000
    torch.testing.assert_close(logits(found), logits(model))


def test_a_disk_that_is_too_full_is_named_and_left_as_it_was(
    tmp_path, tiny_model, word_tokenizer, monkeypatch
) -> None:
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"disk is full.*copy of the policy takes .* GiB"):
        save_whole_copy(tiny_model(word_tokenizer), tmp_path / "copy", torch.float32)
    assert list(tmp_path.iterdir()) == []
