"""What an engine gets to load: the current weights, under a version that changes with them."""

from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_selfplay.generation.quantized_layers import prepare_quantized_layers
from trl_selfplay.rounds import hand_over as module
from trl_selfplay.rounds.base_source import find_source
from trl_selfplay.rounds.hand_over import HandOver, digest_trainable, why_copied

QV = ["q_proj", "v_proj"]
IDS = torch.tensor([[3, 5, 7, 9, 11, 4, 6]])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def lora(model, **changes):
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "target_modules": QV, "init_lora_weights": False, **changes})
    return get_peft_model(model, config)


def step(model):
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(0.3)


@pytest.fixture
def model(saved_tiny_model):
    return lora(AutoModelForCausalLM.from_pretrained(saved_tiny_model))


@pytest.fixture
def hand_over(model, saved_tiny_model, tmp_path):
    return HandOver(lambda: model, tmp_path / "weights", str(saved_tiny_model), torch.float32)


def test_an_adapter_is_handed_over_beside_its_base(model, hand_over, saved_tiny_model) -> None:
    weights = hand_over()
    assert weights.model == str(saved_tiny_model)
    assert weights.adapter_rank == 4
    base = AutoModelForCausalLM.from_pretrained(weights.model)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, weights.adapter)), logits(model)
    )


def test_an_adapter_of_another_name_is_found(saved_tiny_model, tmp_path) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved_tiny_model)
    config = LoraConfig(r=4, target_modules=QV, init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="mine")
    expected = logits(model)
    weights = HandOver(lambda: model, tmp_path / "w", str(saved_tiny_model), torch.float32)()
    base = AutoModelForCausalLM.from_pretrained(weights.model)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, weights.adapter)), expected)


def test_a_version_is_written_once_and_read_again_only_where_something_was_written(
    model, hand_over, monkeypatch
) -> None:
    digests = []
    monkeypatch.setattr(
        module, "digest_trainable", lambda m: digests.append(digest_trainable(m)) or digests[-1]
    )
    first = hand_over()
    written = first.adapter / "adapter_model.safetensors"
    time = written.stat().st_mtime_ns
    assert hand_over() == first
    assert len(digests) == 1
    step(model)
    second = hand_over()
    assert second.version != first.version
    assert second.adapter != first.adapter
    assert written.stat().st_mtime_ns == time


def test_a_change_past_the_counters_is_seen_after_training(model, hand_over) -> None:
    """Optimizers of bitsandbytes write through pointers; `.data` is as invisible to counters."""
    first = hand_over()
    next(p for p in model.parameters() if p.requires_grad).data.add_(0.3)
    hand_over.forget()  # as `release` before each training does
    assert hand_over().version != first.version


def test_one_bit_is_another_version(model) -> None:
    before = digest_trainable(model)
    weight = next(p for p in model.parameters() if p.requires_grad).data.view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    assert digest_trainable(model) != before


def test_the_version_before_can_be_put_in_place(model, hand_over) -> None:
    assert hand_over.previous() is None
    hand_over()
    assert hand_over.previous() is None  # there is none yet
    first = logits(model)
    step(model)
    second = logits(model)
    version = hand_over().version
    with hand_over.previous():
        torch.testing.assert_close(logits(model), first)
    assert torch.equal(logits(model), second)
    assert hand_over().version == version


def test_a_new_process_finds_the_version_before(
    model, hand_over, saved_tiny_model, tmp_path
) -> None:
    hand_over()
    first = logits(model)
    step(model)
    again = HandOver(lambda: model, tmp_path / "weights", str(saved_tiny_model), torch.float32)
    again()
    with again.previous():
        torch.testing.assert_close(logits(model), first)


def test_a_process_that_goes_on_with_a_version_finds_the_one_before(
    model, hand_over, saved_tiny_model, tmp_path
) -> None:
    """As after a kill between the hand-over and the end of its phase."""
    hand_over()
    first = logits(model)
    step(model)
    version = hand_over().version
    again = HandOver(lambda: model, tmp_path / "weights", str(saved_tiny_model), torch.float32)
    assert again().version == version
    with again.previous():
        torch.testing.assert_close(logits(model), first)


def test_a_version_that_returns_is_the_last_one(
    model, hand_over, saved_tiny_model, tmp_path
) -> None:
    weight = next(p for p in model.parameters() if p.requires_grad)
    start = weight.detach().clone()
    first = hand_over()
    step(model)
    hand_over()
    with torch.no_grad():
        weight.copy_(start)
    assert hand_over() == first
    expected = logits(model)
    step(model)
    step(model)
    again = HandOver(lambda: model, tmp_path / "weights", str(saved_tiny_model), torch.float32)
    again()
    with again.previous():
        torch.testing.assert_close(logits(model), expected)


def test_two_versions_stay_on_disk(model, hand_over, tmp_path) -> None:
    versions = []
    for _ in range(4):
        versions.append(hand_over().version)
        step(model)
    folders = {path.name for path in (tmp_path / "weights").iterdir() if path.is_dir()}
    assert folders == set(versions[-2:])


@pytest.mark.parametrize("changes", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_what_engines_do_not_load_is_copied_whole_and_deleted_after_the_phase(
    changes, saved_tiny_model, tmp_path
) -> None:
    model = lora(AutoModelForCausalLM.from_pretrained(saved_tiny_model), **changes)
    hand_over = HandOver(lambda: model, tmp_path / "w", str(saved_tiny_model), torch.float32)
    first = hand_over()
    assert (first.adapter, first.adapter_rank) == (None, 0)
    found = AutoModelForCausalLM.from_pretrained(first.model)
    torch.testing.assert_close(logits(found), logits(model))
    before = logits(model)
    step(model)
    hand_over()
    with hand_over.previous():
        torch.testing.assert_close(logits(model), before)
    hand_over.forget()
    assert not list((tmp_path / "w").glob("*/model"))
    assert Path(hand_over().model).is_dir()  # written anew for the next phase


def test_all_weights_in_training_are_copied(tiny_model, word_tokenizer, tmp_path) -> None:
    model = tiny_model(word_tokenizer)
    hand_over = HandOver(lambda: model, tmp_path / "w", None, torch.bfloat16)
    weights = hand_over()
    found = AutoModelForCausalLM.from_pretrained(weights.model, dtype="auto")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(logits(found), logits(model.bfloat16()), rtol=0.05, atol=1e-3)
    step(model)
    assert hand_over().model != weights.model
    assert hand_over.previous() is None  # copies aren't kept


def test_a_base_without_a_source_is_written_once(tiny_model, word_tokenizer, tmp_path) -> None:
    base = tiny_model(word_tokenizer)
    expected = logits(base)
    model = lora(base)
    hand_over = HandOver(lambda: model, tmp_path / "w", None, torch.float32)
    first = hand_over()
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(first.model)), expected)
    written = (Path(first.model) / "config.json").stat().st_mtime_ns
    step(model)
    hand_over.forget()
    assert hand_over().model == first.model
    again = HandOver(lambda: model, tmp_path / "w", None, torch.float32)
    assert again().model == first.model
    assert (Path(first.model) / "config.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(("seed", "dtype"), [(1, torch.float32), (0, torch.bfloat16)])
def test_the_copy_of_another_base_is_written_anew_and_the_older_deleted(
    seed, dtype, tiny_model, word_tokenizer, tmp_path
) -> None:
    models = [lora(tiny_model(word_tokenizer, number)) for number in (0, seed)]
    HandOver(lambda: models[0], tmp_path / "w", None, torch.float32)()
    weights = HandOver(lambda: models[1], tmp_path / "w", None, dtype)()
    found = AutoModelForCausalLM.from_pretrained(weights.model, dtype="auto")
    assert found.dtype == dtype
    expected = tiny_model(word_tokenizer, seed).to(dtype)
    assert torch.equal(found.lm_head.weight, expected.lm_head.weight)
    assert [path.name for path in (tmp_path / "w").glob("base*")] == [Path(weights.model).name]


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LoraConfig(target_modules=QV), None),
        (LoraConfig(target_modules=QV, use_rslora=True, rank_pattern={"q_proj": 16}), None),
        (LoraConfig(r=513, target_modules=QV), "rank is 513"),
        (LoraConfig(target_modules=QV, rank_pattern={"q_proj": 600}), "rank is 600"),
        (LoraConfig(target_modules=QV, use_dora=True), "use_dora=True"),
        (LoraConfig(target_modules=QV, bias="lora_only"), "bias='lora_only'"),
        (LoraConfig(target_modules=QV, lora_bias=True), "lora_bias=True"),
        (LoraConfig(target_modules=QV, modules_to_save=["lm_head"]), "modules_to_save="),
        (LoraConfig(target_modules=["lm_head"]), "embeddings or the head"),
        (LoraConfig(target_modules=["embed_tokens", "q_proj"]), "embeddings or the head"),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), "type IA3"),
    ],
)
def test_why_an_adapter_is_copied(config, reason, tiny_model, word_tokenizer) -> None:
    found = why_copied(get_peft_model(tiny_model(word_tokenizer, attention_bias=True), config))
    assert found == reason if reason is None else reason in found


def test_the_largest_rank_of_any_layer_is_told(tiny_model, word_tokenizer, tmp_path) -> None:
    model = lora(tiny_model(word_tokenizer), rank_pattern={"v_proj": 16})
    assert HandOver(lambda: model, tmp_path / "w", None, torch.float32)().adapter_rank == 16


def test_a_base_in_four_bits_on_disk_is_dequantized_for_an_engine_without_them(
    saved_chat_model, tmp_path
) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    first = AutoModelForCausalLM.from_pretrained(
        saved_chat_model, quantization_config=quantization, dtype=torch.float32
    )
    folder = str(tmp_path / "four-bit")
    first.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    prepare_quantized_layers(loaded)
    expected = logits(loaded)
    model = lora(loaded)
    assert find_source(model, folder, None, "bitsandbytes") == folder
    assert find_source(model, folder, None) is None
    weights = HandOver(lambda: model, tmp_path / "w", None, torch.float32)()
    base = AutoModelForCausalLM.from_pretrained(weights.model)
    torch.testing.assert_close(logits(base), expected, rtol=1e-3, atol=1e-3)
