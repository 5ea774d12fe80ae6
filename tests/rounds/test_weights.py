"""Weights between rounds: kept, restored and refused, on real tiny models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from trl_selfplay.disk import DamagedFileError, save_checksums
from trl_selfplay.rounds.weights import (
    adapters_keep_dtypes,
    check_peft_config,
    copy_into,
    load_saved_model,
    load_trainable,
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


def test_adapters_loaded_from_a_checkpoint_keep_their_precision(tmp_path, lora_model) -> None:
    """PEFT itself makes float32 of them; TRL trains those of a 4-bit model in bfloat16."""
    model = lora_model()
    for parameter in trainable_parameters(model).values():
        parameter.data = parameter.data.to(torch.bfloat16)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.save_pretrained(tmp_path)
    with adapters_keep_dtypes(model):
        model.load_adapter(tmp_path, "default", is_trainable=True)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == before[name].dtype, name
        assert torch.equal(parameter, before[name]), name
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}


class OwnConfig(LlamaConfig):
    model_type = "not_in_the_registry"


class OwnModel(LlamaForCausalLM):
    """A model of its own code, as `trust_remote_code` loads them; AutoModel doesn't know it."""

    config_class = OwnConfig


def test_a_saved_model_of_its_own_code_is_loaded_by_its_class(tmp_path) -> None:
    config = OwnConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    saved, model = OwnModel(config), OwnModel(config)
    saved.save_pretrained(tmp_path)
    load_saved_model(model, tmp_path)
    for name, weight in saved.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_a_saved_model_without_its_config_is_named(tmp_path, tiny_model, word_tokenizer) -> None:
    """From its class alone transformers would build a Llama of 7B."""
    model = tiny_model(word_tokenizer)
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(DamagedFileError, match=r"config\.json'\)\. Bring it back"):
        load_saved_model(model, tmp_path)


def flip_in_the_middle(path) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("peft", [False, True])
def test_a_changed_weight_is_noticed(
    tmp_path, tiny_model, word_tokenizer, lora_model, peft
) -> None:
    model = lora_model() if peft else tiny_model(word_tokenizer)
    model.save_pretrained(tmp_path / "model")
    save_checksums(tmp_path / "model")
    save_trainable(model, tmp_path / "initial.safetensors")
    load_saved_model(model, tmp_path / "model")
    load_trainable(model, tmp_path / "initial.safetensors")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    (weights,) = (tmp_path / "model").glob("*.safetensors")
    for path in (weights, tmp_path / "initial.safetensors"):
        flip_in_the_middle(path)
    with pytest.raises(DamagedFileError, match=rf"{weights.name} has changed .* Bring it back"):
        load_saved_model(model, tmp_path / "model")
    with pytest.raises(DamagedFileError, match=r"initial\.safetensors .* have changed .* Bring it"):
        load_trainable(model, tmp_path / "initial.safetensors")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_initial_weights_of_an_earlier_version_are_loaded(
    tmp_path, tiny_model, word_tokenizer
) -> None:
    model = tiny_model(word_tokenizer)
    save_file({n: p.detach() + 1 for n, p in model.named_parameters()}, tmp_path / "initial")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    load_trainable(model, tmp_path / "initial")
    assert all(torch.equal(p, before[n] + 1) for n, p in model.named_parameters())


@pytest.mark.parametrize("peft", [False, True])
def test_damaged_weights_are_named_and_change_nothing(
    tmp_path, tiny_model, word_tokenizer, lora_model, peft
) -> None:
    model = lora_model() if peft else tiny_model(word_tokenizer)
    model.save_pretrained(tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:100])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(DamagedFileError, match=rf"{tmp_path.name} can't be read .* Bring it back"):
        load_saved_model(model, tmp_path)
    save_trainable(model, tmp_path / "initial.safetensors")
    (tmp_path / "initial.safetensors").write_bytes(b"")
    with pytest.raises(DamagedFileError, match=r"initial\.safetensors can't be read"):
        load_trainable(model, tmp_path / "initial.safetensors")
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
