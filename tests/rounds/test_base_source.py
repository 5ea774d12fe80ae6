"""Where an engine finds the base weights: only where the files hold what the trainer has in memory."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_selfplay.rounds.base_source import find_source

QV = ["q_proj", "v_proj"]
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class MineConfig(LlamaConfig):
    model_type = "mine"

class Mine(LlamaForCausalLM):
    config_class = MineConfig
"""


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


def lora(model, **changes):
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": QV, **changes}))


def test_the_source_of_the_base_weights(saved_tiny_model, tiny_model, word_tokenizer) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved_tiny_model)
    folder = str(saved_tiny_model)
    assert find_source(loaded, folder, None) == folder
    assert find_source(lora(loaded), loaded, None) == folder
    built = tiny_model(word_tokenizer)
    assert find_source(built, built, None) is None
    grown = AutoModelForCausalLM.from_pretrained(saved_tiny_model)
    grown.resize_token_embeddings(40)
    assert find_source(grown, grown, None) is None
    shutil.rmtree(saved_tiny_model)
    assert find_source(loaded, loaded, None) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_base_in_another_precision_than_its_files_is_the_same(
    dtype, stored, tiny_model, word_tokenizer, tmp_path
) -> None:
    tiny_model(word_tokenizer).to(stored).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", dtype=dtype)
    assert find_source(lora(model.float()), model, None) == str(tmp_path / "model")


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "input_layernorm.weight"])
def test_a_base_changed_in_memory_has_no_source(name, saved_tiny_model) -> None:
    model = load(saved_tiny_model)
    with torch.no_grad():
        model.get_parameter(f"model.layers.1.{name}").mul_(1.001)
    assert find_source(lora(model), model, None) is None


def test_a_base_into_which_an_adapter_was_merged_has_no_source(saved_tiny_model) -> None:
    merged = lora(load(saved_tiny_model), init_lora_weights=False).merge_and_unload()
    assert find_source(lora(merged), merged, None) is None


def test_an_adapter_that_changes_the_base_leaves_it_without_a_source(saved_tiny_model) -> None:
    model = lora(load(saved_tiny_model), init_lora_weights="pissa")
    assert find_source(model, str(saved_tiny_model), None) is None


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_copies_and_adapters_that_train_beside_the_base_leave_its_source(
    name, saved_tiny_model
) -> None:
    model = lora(load(saved_tiny_model), modules_to_save=[name])
    with torch.no_grad():
        [p.add_(0.1) for p in model.parameters() if p.requires_grad]
    assert find_source(model, str(saved_tiny_model), None) == str(saved_tiny_model)


def test_what_is_not_quantized_is_compared(saved_chat_model) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = lora(load(saved_chat_model, quantization_config=quantization, dtype=torch.float32))
    assert find_source(model, model, None) == str(saved_chat_model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.001)
    assert find_source(model, model, None) is None


def test_without_safetensors_a_name_is_believed_and_a_model_is_not(
    saved_tiny_model, caplog
) -> None:
    model = load(saved_tiny_model)
    (saved_tiny_model / "model.safetensors").unlink()
    assert find_source(model, str(saved_tiny_model), None) == str(saved_tiny_model)
    assert find_source(model, model, None) is None
    assert "can not be compared" in caplog.text


@pytest.mark.parametrize("has_default", [True, False])
def test_a_model_of_another_revision_has_that_one_as_its_source(
    has_default, tiny_model, word_tokenizer, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    (repository / "refs").mkdir(parents=True)
    for seed, name in enumerate(["main", "other"][not has_default :], 1):
        tiny_model(word_tokenizer, seed).save_pretrained(
            repository / "snapshots" / (str(seed) * 40)
        )
        (repository / "refs" / name).write_text(str(seed) * 40)
    model = load("some/model", revision="other")
    found = find_source(lora(model), model, None)
    assert found == str(repository / "snapshots" / (str(seed) * 40))


@pytest.mark.parametrize("trusted", [True, False])
def test_code_of_the_repository_runs_where_the_run_trusts_it(
    trusted, saved_tiny_model, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    path = saved_tiny_model / "config.json"
    classes = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    config = {**json.loads(path.read_text()), "model_type": "mine", "auto_map": classes}
    path.write_text(json.dumps(config))
    (saved_tiny_model / "mine.py").write_text(CODE)
    model = load(saved_tiny_model, trust_remote_code=True)
    found = find_source(model, model, None, trust_remote_code=trusted)
    assert found == (str(saved_tiny_model) if trusted else None)
