"""Weights between rounds: kept, restored and refused, on real tiny models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from trl_selfplay.weights import (
    check_peft_config,
    copy_into,
    load_saved_model,
    load_trainable,
    replace_folder,
    save_trainable,
    trainable_parameters,
)


@pytest.fixture
def lora_model(tiny_model, word_tokenizer):
    def build(seed=0, rank=4):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(tiny_model(word_tokenizer), config)

    return build


def test_trainable_weights_come_back_bit_for_bit_into_the_same_parameters(
    tmp_path, lora_model
) -> None:
    model, path = lora_model(), tmp_path / "initial" / "trainable.safetensors"
    before = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
    identities = {n: id(p) for n, p in model.named_parameters()}
    save_trainable(model, path)
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(1.0)
    load_trainable(model, path)
    assert {n: id(p) for n, p in model.named_parameters()} == identities
    for name, parameter in trainable_parameters(model).items():
        assert torch.equal(parameter, before[name]), name
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_only_the_adapter_is_kept(tmp_path, lora_model) -> None:
    model = lora_model()
    assert all("lora_" in name for name in trainable_parameters(model))
    save_trainable(model, tmp_path / "w.safetensors")
    size = sum(p.numel() * 4 for p in trainable_parameters(model).values())
    assert (tmp_path / "w.safetensors").stat().st_size < size + 8192


@pytest.mark.parametrize("rank", [4, 8])
def test_weights_of_another_shape_are_refused_by_name(tmp_path, lora_model, rank) -> None:
    save_trainable(lora_model(rank=4), tmp_path / "w.safetensors")
    if rank == 4:
        load_trainable(lora_model(seed=1, rank=4), tmp_path / "w.safetensors")
    else:
        with pytest.raises(ValueError, match=r"lora_A.*another model or PEFT"):
            load_trainable(lora_model(rank=8), tmp_path / "w.safetensors")


def test_a_missing_weight_is_refused(lora_model) -> None:
    with pytest.raises(ValueError, match="has nothing for the parameter"):
        copy_into(lora_model(), {}, "the file")


def test_a_saved_adapter_is_loaded_into_the_model_in_place(tmp_path, lora_model) -> None:
    source, target = lora_model(seed=1), lora_model(seed=2)
    source.save_pretrained(tmp_path / "adapter")
    identities = [id(p) for p in target.parameters()]
    load_saved_model(target, tmp_path / "adapter")
    assert [id(p) for p in target.parameters()] == identities
    for name, parameter in trainable_parameters(target).items():
        assert torch.equal(parameter, trainable_parameters(source)[name]), name


def test_a_saved_full_model_is_loaded_in_place(tmp_path, tiny_model, word_tokenizer) -> None:
    source, target = (tiny_model(word_tokenizer, seed=s) for s in (1, 2))
    source.save_pretrained(tmp_path / "model")
    load_saved_model(target, tmp_path / "model")
    ids = torch.arange(6)[None]
    assert torch.equal(source(ids).logits, target(ids).logits)


@pytest.mark.parametrize("initialisation", ["pissa", "pissa_niter_4", "olora", "loftq", "PiSSA"])
def test_an_initialisation_that_changes_the_base_is_refused(initialisation) -> None:
    config = LoraConfig()
    config.init_lora_weights = initialisation
    with pytest.raises(ValueError, match=f"{initialisation}.*changes the base"):
        check_peft_config(config)


@pytest.mark.parametrize("initialisation", [True, False, "gaussian", "orthogonal"])
def test_an_initialisation_that_leaves_the_base_alone_is_taken(initialisation) -> None:
    check_peft_config(LoraConfig(init_lora_weights=initialisation))


def test_a_finished_folder_takes_the_place_of_an_older_one(tmp_path) -> None:
    for name in ("new", "final"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "final")
    assert (tmp_path / "final" / "text").read_text() == "new"
    assert not (tmp_path / "new").exists()
