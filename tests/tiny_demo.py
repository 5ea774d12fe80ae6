"""A tiny model in the place of the demos' own: it has learnt the right answers to their prompts.

In: the demo's prompts, those of its small size too. Out: a folder with a model that answers most of those of `train`, in words
that are tokens. Its window is shorter than the few-shot examples, so it answers after them as well.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from trl_selfplay.demos.words import demo_split


def save_tiny_demo_model(folder: Path, chat_template: str) -> None:
    """Train the model on the prompts of seed 0, a few seconds long, and save it with its tokenizer."""
    prompts = [row for quick in (False, True) for row in demo_split(seed=0, quick=quick).train]
    rows = [f"{row['prompt']} Answer: {row['solution']} <eos>" for row in prompts]
    words = ["<pad>", "<eos>", "<unk>", *sorted({word for row in rows for word in row.split()})]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", chat_template=chat_template,
    )  # fmt: skip
    ids = tokenizer(rows, padding=True, return_tensors="pt")
    config = MistralConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        sliding_window=12, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MistralForCausalLM(config).float()
    labels = ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(100):
        model(**ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
