"""A byte tokenizer and tiny models of several families, all from their configs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SPECIAL_TOKENS = ("<pad>", "<eos>", "<end>")
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
PAD, EOS, END = 0, 1, 2


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that characters beyond ASCII span several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=["<end>"],
    )


@pytest.fixture
def build_model() -> Callable[..., PreTrainedModel]:
    """Build a tiny random model in float32: `build_model("llama", **config_overrides)`."""

    def build(family: str = "llama", seed: int = 0, **overrides: Any) -> PreTrainedModel:
        ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
        common = {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            # wide weights, so that the next token depends on the prompt and greedy text varies
            "initializer_range": 0.3,
            **ids,
        }
        torch.manual_seed(seed)
        if family == "llama":
            model = LlamaForCausalLM(LlamaConfig(**{**common, **overrides}))
        elif family == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**{**common, "head_dim": 8, **overrides}))
        elif family == "mistral":
            config = MistralConfig(**{**common, "sliding_window": 16, **overrides})
            model = MistralForCausalLM(config)
        else:
            small = {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4}
            config = GPT2Config(
                **{**small, "n_positions": 256, "initializer_range": 0.3, **ids, **overrides}
            )
            model = GPT2LMHeadModel(config)
        return model.float()

    return build
