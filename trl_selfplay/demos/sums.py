"""Sums with a scratchpad, and a decoder of 0.8 M parameters that learns them in a minute on a CPU.

In: pairs of numbers with as many digits. Out: prompts and answers, worked sums, and a model that has
seen few of these, the stand-in for one that is given worked examples. It has a token a character.

    45+78=  →  5+8+0=13;4+7+1=12;123          with hint: 45+78=(123)

Source: the task of STaR, arXiv 2203.14465, section 4.3, in a shorter form.
"""

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

CHARACTERS = "0123456789+=;()"

Sum = tuple[int, int]


# --- the task ------------------------------------------------------------------------------------


def scratchpad(a: int, b: int) -> str:
    """Return the right completion: a step a digit from the last one, with its carry; the answer.

    >>> scratchpad(45, 78)
    '5+8+0=13;4+7+1=12;123'
    """
    carry, steps = 0, []
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total:02d};")
        carry = total // 10
    return "".join(steps) + str(a + b)


def draw(count: int, digits: Iterable[int], seed: int) -> list[Sum]:
    """Return different sums of two numbers, each sum with one of these numbers of digits."""
    rng, choices = random.Random(seed), tuple(digits)
    sums: dict[Sum, None] = {}
    while len(sums) < count:
        length = rng.choice(choices)
        first = 0 if length == 1 else 10 ** (length - 1)
        sums[rng.randint(first, 10**length - 1), rng.randint(first, 10**length - 1)] = None
    return list(sums)


def rows_of(sums: Sequence[Sum]) -> Dataset:
    """Return prompts and answers, without scratchpads."""
    return Dataset.from_list([{"prompt": f"{a}+{b}=", "solution": str(a + b)} for a, b in sums])


def worked_rows(sums: Sequence[Sum]) -> Dataset:
    """Return prompts and answers with right scratchpads, the columns prompt, completion, solution."""
    completions = [scratchpad(a, b) for a, b in sums]
    return rows_of(sums).add_column("completion", completions)


def add_hint(prompt: str, solution: str) -> str:
    """Return the prompt with the answer where the target begins, as in the paper's figure 4."""
    return f"{prompt}({solution})"


def right_answer(completions: Sequence[str], solution: Sequence[str], **kwargs: Any) -> list[float]:
    """Reward what stands after the last step, whatever the steps say."""
    return [float(c.rsplit(";", 1)[-1] == s) for c, s in zip(completions, solution, strict=True)]


# --- the model -----------------------------------------------------------------------------------


def build_tokenizer() -> Any:
    """Return a tokenizer with one token per character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    vocabulary = {t: i for i, t in enumerate([*special.values(), *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def build_model(
    tokenizer: Any, seed: int, hidden_size: int = 128, num_layers: int = 4
) -> LlamaForCausalLM:
    """Return the decoder, untrained."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=-(-(hidden_size * 8 // 3) // 8) * 8,  # 8/3, a multiple of 8
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


def build_base(folder: str, seed: int, sums: dict[int, list[Sum]], steps: int = 400) -> None:
    """Train a model on worked sums, half of them with hints, and save it with its tokenizer.

    A third of the rows are sums of one digit, which it is to know; the rest are the few of each
    greater length.
    """
    tokenizer = build_tokenizer()
    rows = []
    for digits, examples in sums.items():
        for a, b in examples * (2 if digits == 1 else 3):
            for prompt in (f"{a}+{b}=", add_hint(f"{a}+{b}=", str(a + b))):
                rows.append(row_of(tokenizer, prompt, scratchpad(a, b)))
    trainer = SFTTrainer(
        build_model(tokenizer, seed),
        SFTConfig(folder, **training_settings(seed), max_steps=steps),
        train_dataset=Dataset.from_list(rows).shuffle(seed=seed),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(folder)


def row_of(tokenizer: Any, prompt: str, completion: str) -> dict[str, list[int]]:
    """Return a training row with loss on the completion and its end."""
    before, after = (tokenizer(text)["input_ids"] for text in (prompt, completion))
    after = [*after, tokenizer.eos_token_id]
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


def training_settings(seed: int) -> dict[str, Any]:
    """Return what base and rounds share: batch, optimizer, and silence."""
    return {
        "per_device_train_batch_size": 32,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 20,
        "weight_decay": 0.0,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 50,
        "report_to": [],
        "disable_tqdm": True,
    }
