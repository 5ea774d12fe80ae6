"""Tiny models, tokenizers and sums, all built in code: no downloads.

In: nothing. Out: what the fixtures of the same names give, also for processes that have no fixtures.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
WORDS = [*map(str, range(10)), "+", "=", "?", "Q", "A", "yes", "no", "so"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(
    words: Iterable[str] = WORDS,
    split: Any = None,
    chat_template: str | None = None,
    **special: str,
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per word, for completions that people can read.

    Args:
        words: Its words beside the special tokens.
        split: What splits texts into words; None for white space.
        chat_template: Its chat template, if any.
        **special: Special tokens in the place of `SPECIAL_TOKENS`.
    """
    special = {**SPECIAL_TOKENS, **special}
    vocabulary = {w: i for i, w in enumerate(dict.fromkeys([*special.values(), *words]))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    backend.pre_tokenizer = split or pre_tokenizers.WhitespaceSplit()
    return _tokenizer(backend, special, chat_template)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token per byte, so that any text round-trips and é spans two tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _tokenizer(backend, SPECIAL_TOKENS, chat_template)


def _tokenizer(
    backend: Tokenizer, special: dict[str, str], chat_template: str | None
) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_model(
    tokenizer: PreTrainedTokenizerBase, seed: int = 0, **changes: Any
) -> LlamaForCausalLM:
    """Return a random Llama in float32; `changes` are fields of its config."""
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).float()


def save_tiny_model(folder: Path | str, chat_template: str | None = None, **changes: Any) -> None:
    """Save a model with its tokenizer of words, to be loaded by its path."""
    tokenizer = word_tokenizer(chat_template=chat_template)
    tiny_model(tokenizer, **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sum_rows(count: int, first: int = 0) -> list[dict[str, str]]:
    """Return additions of digits, all different up to 100: `prompt`, `solution`."""
    pairs = [divmod(i, 10) for i in range(first, first + count)]
    return [{"prompt": f"Q {b} + {a} = ?", "solution": str((a + b) % 10)} for a, b in pairs]
