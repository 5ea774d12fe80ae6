"""Going on from a model that thinks: what it learnt is there at the first step, and trains."""

import logging
import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from trl_selfplay import QuietSTaRConfig, QuietSTaRModel, QuietSTaRTrainer
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, trained_module
from trl_selfplay.trainers.quiet_star.storage import ThoughtSettings

IDS = torch.arange(3, 15)[None]
LORA = {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1}


def random_rows(seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 20, (10,), generator=generator).tolist() for _ in range(8)]
    return Dataset.from_dict({"input_ids": rows})


def configure(folder, **changes) -> QuietSTaRConfig:
    settings = {
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "max_steps": 2, "save_steps": 2,
        "per_device_train_batch_size": 4, "learning_rate": 1e-2, "thought_length": 3,
        "num_ahead_tokens": 2, "gradient_checkpointing": False, "bf16": False,
    }  # fmt: skip
    return QuietSTaRConfig(str(folder), **{**settings, **changes})


def logits_of(trainer, length=3) -> torch.Tensor:
    return QuietSTaRModel(trainer.model, ThoughtSettings(length))(IDS).logits


@pytest.fixture
def finished(tmp_path, saved_tiny_model):
    """Return a function that trains and saves a run: `finished("lora")` gives trainer, folder."""

    def build(kind: str):
        trainer = QuietSTaRTrainer(
            str(saved_tiny_model),
            configure(tmp_path / "run", save_strategy="no"),
            train_dataset=random_rows(0),
            peft_config=LoraConfig(**LORA) if kind == "lora" else None,
        )
        module = trained_module(trainer.causal_lm)
        with torch.no_grad():
            torch.nn.init.normal_(module.head[-1].weight, std=0.5)
        trainer.train()
        trainer.save_model()
        trainer.save_model(str(tmp_path / "run" / "checkpoint-2"))
        return trainer, tmp_path / "run"

    return build


def assert_goes_on(trainer) -> None:
    """Adapters or all weights, head and vectors move; nothing else does."""
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trains = {n: p.requires_grad for n, p in trainer.model.named_parameters()}
    assert any(f"{ATTRIBUTE}" in n and t for n, t in trains.items())
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) is not trains[name], name


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("source", ["folder", "checkpoint", "model", "saved model"])
def test_going_on_begins_with_the_logits_that_were_saved(kind, source, finished, tmp_path) -> None:
    """Bit for bit, on other text; with the optimizer holding head, vectors and adapters."""
    first, folder = finished(kind)
    expected = logits_of(first)
    model = {
        "folder": str(folder),
        "checkpoint": str(folder / "checkpoint-2"),
        "model": QuietSTaRModel.from_pretrained(folder),
        "saved model": str(tmp_path / "again"),
    }[source]
    if source == "saved model":
        QuietSTaRModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    trainer = QuietSTaRTrainer(
        model,
        configure(tmp_path / "on", save_strategy="no"),
        train_dataset=random_rows(1),
        processing_class=first.processing_class,
    )
    assert isinstance(trainer.model, PeftModel) is (kind == "lora")
    assert torch.equal(logits_of(trainer), expected)
    assert (expected - trainer.causal_lm(IDS).logits).abs().max() > 1e-3  # thoughts have a say
    assert_goes_on(trainer)
    trainer.save_model()
    loaded = QuietSTaRModel.from_pretrained(tmp_path / "on")
    assert torch.equal(loaded(IDS).logits, logits_of(trainer))


def test_thoughts_of_another_length_keep_head_and_vectors(finished, tmp_path, caplog) -> None:
    """As curricula need; the line says so."""
    first, folder = finished("full")
    with caplog.at_level(logging.INFO, logger="trl_selfplay"):
        trainer = QuietSTaRTrainer(
            str(folder),
            configure(tmp_path / "on", thought_length=5, num_ahead_tokens=1),
            train_dataset=random_rows(1),
        )
    assert "now for thoughts of 5 tokens instead of 3" in caplog.text
    for name, weight in trained_module(first.causal_lm).state_dict().items():
        assert torch.equal(trained_module(trainer.causal_lm).state_dict()[name], weight)
    assert torch.equal(logits_of(trainer, 5), logits_of(first, 5))


def test_another_scale_stores_the_same_vectors_differently(finished, tmp_path) -> None:
    first, folder = finished("full")
    trainer = QuietSTaRTrainer(
        str(folder), configure(tmp_path / "on", meta_token_scale=10.0), train_dataset=random_rows(1)
    )
    module, old = trained_module(trainer.causal_lm), trained_module(first.causal_lm)
    assert module.scale == 10.0
    torch.testing.assert_close(module.vectors, old.vectors * 10.0)
    torch.testing.assert_close(module.start_and_end(), old.start_and_end())


def test_new_adapters_on_a_model_that_thinks_begin_with_its_logits(finished, tmp_path) -> None:
    first, folder = finished("full")
    trainer = QuietSTaRTrainer(
        str(folder),
        configure(tmp_path / "on", save_strategy="no"),
        train_dataset=random_rows(1),
        peft_config=LoraConfig(**LORA),
    )
    assert torch.equal(logits_of(trainer), logits_of(first))
    trainer.train()
    trainer.save_model()
    loaded = QuietSTaRModel.from_pretrained(tmp_path / "on")
    assert torch.equal(loaded(IDS).logits, logits_of(trainer))


def test_what_would_lose_thoughts_is_refused_or_said(finished, tmp_path, caplog) -> None:
    first, folder = finished("lora")
    rest = {"train_dataset": random_rows(1), "processing_class": first.processing_class}
    with pytest.raises(ValueError, match="Leave `peft_config` out"):
        QuietSTaRTrainer(
            str(folder), configure(tmp_path / "on"), peft_config=LoraConfig(**LORA), **rest
        )
    base = AutoModelForCausalLM.from_pretrained(folder.parent / "tiny-model")
    with pytest.raises(ValueError, match="pass the name of its folder, or a QuietSTaRModel"):
        QuietSTaRTrainer(
            PeftModel.from_pretrained(base, folder), configure(tmp_path / "on"), **rest
        )
    thinking = QuietSTaRModel.from_pretrained(folder)
    with pytest.raises(TypeError, match="num_thoughts=0 is plain SFT"):
        QuietSTaRTrainer(thinking, configure(tmp_path / "on", num_thoughts=0), **rest)
    shutil.rmtree(folder)
    finished("full")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    QuietSTaRTrainer(plain, configure(tmp_path / "on"), **rest)
    assert "loaded without them, so it starts with an untrained mixing head" in caplog.text
    caplog.clear()
    QuietSTaRTrainer(str(folder), configure(tmp_path / "on", num_thoughts=0), **rest)
    assert "are not loaded" in caplog.text
    (folder / "quiet_star.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"but no quiet_star\.json"):
        QuietSTaRTrainer(str(folder), configure(tmp_path / "on"), **rest)


def test_a_folder_of_adapters_without_thoughts_is_refused(saved_tiny_model, tmp_path) -> None:
    base = AutoModelForCausalLM.from_pretrained(saved_tiny_model)
    get_peft_model(base, LoraConfig(**LORA)).save_pretrained(tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(saved_tiny_model / name, tmp_path / "adapter")
    with pytest.raises(ValueError, match="the model has adapters already"):
        QuietSTaRTrainer(
            str(tmp_path / "adapter"), configure(tmp_path / "on"), train_dataset=random_rows(1)
        )


def losses(trainer) -> list[float]:
    return [h["loss"] for h in trainer.state.log_history if "loss" in h]


def test_a_run_resumes_from_its_newest_whole_checkpoint(saved_tiny_model, tmp_path) -> None:
    """The newest lacks its optimizer, as after a kill; losses and weights are the whole run's."""

    def build(folder, steps):
        args = configure(
            tmp_path / folder, max_steps=steps, save_steps=1, logging_steps=1,
            lr_scheduler_type="constant",
        )  # fmt: skip
        return QuietSTaRTrainer(str(saved_tiny_model), args, train_dataset=random_rows(0))

    whole = build("whole", 4)
    whole.train(resume_from_checkpoint=True)  # on an empty folder, which begins
    parts = build("parts", 3)
    parts.train()
    (tmp_path / "parts" / "checkpoint-3" / "optimizer.pt").unlink()
    again = build("parts", 4)
    with pytest.raises(ValueError, match=r"checkpoint-3'.*optimizer\.pt is missing"):
        again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    again.train(resume_from_checkpoint="True")
    assert losses(again) == losses(whole)
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name


def test_checkpoints_without_an_optimizer_are_not_resumed_from(saved_tiny_model, tmp_path) -> None:
    args = configure(tmp_path / "run", save_only_model=True)
    trainer = QuietSTaRTrainer(str(saved_tiny_model), args, train_dataset=random_rows(0))
    with pytest.raises(ValueError, match="save_only_model=True"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_weights_that_are_not_finite_are_not_saved(saved_tiny_model, tmp_path, caplog) -> None:
    trainer = QuietSTaRTrainer(
        str(saved_tiny_model),
        configure(tmp_path / "run", save_strategy="no"),
        train_dataset=random_rows(0),
    )
    with torch.no_grad():
        trained_module(trainer.causal_lm).vectors[0, 0] = torch.nan
    trainer.train()
    assert caplog.text.count("a loss is not finite") == 1
    with pytest.raises(FloatingPointError, match=r"trained weights hold NaN .* are not saved"):
        trainer.save_model()
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_4_bit_run_goes_on_with_its_logits(tmp_path, tiny_model, word_tokenizer) -> None:
    """The head and the vectors keep all of their bits, where the parent rounds adapters."""
    base = tmp_path / "base"
    tiny_model(word_tokenizer, hidden_size=128, intermediate_size=128).save_pretrained(base)
    word_tokenizer.save_pretrained(base)
    four_bits = {
        "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    }
    first = QuietSTaRTrainer(
        str(base), configure(tmp_path / "run"), train_dataset=random_rows(0),
        peft_config=LoraConfig(**LORA), **four_bits,
    )  # fmt: skip
    with torch.no_grad():
        torch.nn.init.normal_(trained_module(first.causal_lm).head[-1].weight, std=0.5)
    first.train()
    first.save_model()
    again = QuietSTaRTrainer(
        str(tmp_path / "run"), configure(tmp_path / "on", save_strategy="no"),
        train_dataset=random_rows(1), **four_bits,
    )  # fmt: skip
    assert torch.equal(logits_of(again), logits_of(first))
    assert_goes_on(again)
