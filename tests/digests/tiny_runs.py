"""The tiny model, tokenizer and data of the digests and of the old run folders.

The model's weights come from integers, so that they are equal on every machine and under every
release of torch; a random one writes the right answer now and then, since an answer is one token.
"""

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
ANSWERS = [f"<answer>{i}</answer>" for i in range(4)]
WORDS = ["0", "1", "2", "3", "+", "=", "Q", "so", "yes", "no", "(", ")", "?", *ANSWERS]
# Sums of 0 to 3 modulo 4: 16 different prompts.
PAIRS = [(3 * i % 4, i // 4) for i in range(16)]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 20 words."""
    words = [*SPECIAL_TOKENS.values(), *WORDS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **SPECIAL_TOKENS)


def build_model(tokenizer: Any) -> LlamaForCausalLM:
    """Return a Llama of one layer in float32 whose weights are multiples of 1/1000."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256,
        tie_word_embeddings=False, pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "norm" not in name:
                steps = torch.randint(-600, 601, weight.shape, generator=generator)
                weight.copy_(steps.float() / 1000)
    return model


def sum_rows(first: int, last: int) -> Dataset:
    """Return rows with `prompt` and `solution`."""
    return Dataset.from_list(
        [{"prompt": f"Q {a} + {b}", "solution": str((a + b) % 4)} for a, b in PAIRS[first:last]]
    )


def gold_rows(first: int, last: int) -> Dataset:
    """Return the same rows with right completions."""
    return Dataset.from_list(
        [
            {
                "prompt": f"Q {a} + {b}",
                "completion": f" so {b} + {a} = {(a + b) % 4} <answer>{(a + b) % 4}</answer>",
                "solution": str((a + b) % 4),
            }
            for a, b in PAIRS[first:last]
        ]
    )


def data_rows(first: int, last: int) -> Dataset:
    """Return rows with `prompt` and `completion`, SPIN's."""
    return gold_rows(first, last).remove_columns("solution")
