"""Estimates against the bytes that real steps of training allocate on a CPU."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from trl_selfplay import (
    QuietSTaRConfig,
    QuietSTaRTrainer,
    SPINConfig,
    SPINTrainer,
    STaRConfig,
    STaRTrainer,
    estimate,
)

LENGTH, VOCAB = 32, 600
CONFIG = LlamaConfig(
    vocab_size=VOCAB, hidden_size=128, intermediate_size=352, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
    pad_token_id=0, eos_token_id=1, bos_token_id=None,
)  # fmt: skip
IDS = torch.randint(10, VOCAB, (8, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1} | {f"t{i}": i for i in range(2, VOCAB)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def build_star(settings: dict[str, Any], adapters: Any) -> Any:
    trainer = STaRTrainer(
        AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32),
        STaRConfig(max_completion_length=64, **settings),
        train_dataset=Dataset.from_dict({"prompt": ["t5"], "solution": ["t7"]}),
        processing_class=build_tokenizer(),
        reward_funcs=lambda completions, **columns: [1.0] * len(completions),
        peft_config=adapters,
    )
    trainer.train_dataset = Dataset.from_dict({"input_ids": IDS, "labels": IDS})
    return trainer


def build_spin(settings: dict[str, Any], adapters: Any) -> Any:
    trainer = SPINTrainer(
        AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32),
        args=SPINConfig(max_completion_length=64, **settings),
        train_dataset=Dataset.from_dict({"prompt": ["t5"], "completion": [" t7"]}),
        processing_class=build_tokenizer(),
        peft_config=adapters,
    )
    # All tokens but one are the completion's, as in the estimate.
    prompts, completions = [ids[:1] for ids in IDS], [ids[1:] for ids in IDS]
    zeros = [0.0] * len(IDS)
    trainer.train_dataset = Dataset.from_dict(
        {"prompt_ids": prompts, "chosen_ids": completions, "rejected_ids": completions,
         "ref_chosen_logps": zeros, "ref_rejected_logps": zeros}
    )  # fmt: skip
    return trainer


def build_quiet_star(settings: dict[str, Any], adapters: Any) -> Any:
    return QuietSTaRTrainer(
        AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32),
        QuietSTaRConfig(thought_length=2, num_ahead_tokens=2, **settings),
        train_dataset=Dataset.from_dict({"input_ids": IDS}),
        processing_class=build_tokenizer(),
        peft_config=adapters,
    )


def allocated_in_a_step(trainer: Any, folder: Path) -> int:
    """Return the most bytes that forward, backward and update hold at once, as PyTorch's profiler says.

    It counts what is allocated while it runs, so neither weights nor the optimizer's state.
    """
    args = trainer.args
    trainer.create_optimizer_and_scheduler(10)
    if args.gradient_checkpointing:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    trainer.current_gradient_accumulation_steps = 1
    batches = iter(trainer.get_train_dataloader())
    [batch], count = trainer.get_batch_samples(batches, 1, torch.device("cpu"))

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch), count)
        trainer.optimizer.step()

    step()  # the optimizer gets its state
    if args.gradient_accumulation_steps == 1:
        trainer.model.zero_grad(set_to_none=True)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        step()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    counts = sorted(
        (e["ts"], e["args"]["Total Allocated"], e["args"]["Bytes"])
        for e in events
        if e.get("name") == "[memory]"
    )
    before = counts[0][1] - counts[0][2]  # of an earlier profile in this process
    return max(total for _, total, _ in counts) - before


BUILD = {"STaR": build_star, "SPIN": build_spin, "Quiet-STaR": build_quiet_star}
LORA = partial(LoraConfig, r=8, target_modules="all-linear")


@pytest.mark.parametrize(
    ("method", "with_adapters", "checkpointing", "accumulation"),
    [
        ("STaR", False, True, 1),
        pytest.param("STaR", False, False, 2, marks=pytest.mark.slow),
        pytest.param("STaR", True, False, 1, marks=pytest.mark.slow),
        pytest.param("SPIN", False, False, 1, marks=pytest.mark.slow),
        ("SPIN", True, True, 1),
        ("Quiet-STaR", False, True, 1),
        pytest.param("Quiet-STaR", True, False, 1, marks=pytest.mark.slow),
    ],
)
def test_a_step_allocates_what_was_estimated(
    tmp_path, method, with_adapters, checkpointing, accumulation
) -> None:
    """Within 5 %: what is left are masks, labels and numbers of the log."""
    torch.manual_seed(0)
    settings = {
        "output_dir": str(tmp_path), "max_length": LENGTH, "per_device_train_batch_size": 2,
        "gradient_checkpointing": checkpointing, "gradient_accumulation_steps": accumulation,
        "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    adapters = LORA() if with_adapters else None
    trainer = BUILD[method](settings, adapters)
    found = estimate(CONFIG, trainer.args, peft_config=adapters, row_length=LENGTH)
    parts = dict(found.phase("training").parts)
    for held in ("weights", "adapter", "optimizer"):
        parts.pop(held, None)
    if accumulation > 1:
        del parts["gradients"]  # they were allocated before
    measured = allocated_in_a_step(trainer, tmp_path)
    assert sum(parts.values()) == pytest.approx(measured, rel=0.05)
    of_loaded = estimate(trainer.model, trainer.args, row_length=LENGTH)
    assert of_loaded.phase("training").parts == found.phase("training").parts
