"""Models of random weights in the sizes of public ones, built on the device, and their tokenizer.

In: a size's name. Out: a model in bfloat16 or with nf4 layers as `from_pretrained` loads them, and a
tokenizer with a word for every id. Nothing is read from a hub or written to disk.
"""

import math
import random
from functools import lru_cache
from typing import Any

import torch
from datasets import Dataset
from gpu_parts.measuring import clean_up
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

PAD, EOS = 0, 1
_FIRST_WORD = 2
_IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": EOS}
# The sizes of Qwen2.5-0.5B and 3B, of Llama-3.1-8B, and one for CPUs (nf4 needs rows of 64 weights).
CONFIGS = {
    "0.5B": Qwen2Config(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, max_position_embeddings=32_768,
        tie_word_embeddings=True, **_IDS,
    ),
    "3B": Qwen2Config(
        vocab_size=151_936, hidden_size=2048, intermediate_size=11_008, num_hidden_layers=36,
        num_attention_heads=16, num_key_value_heads=2, max_position_embeddings=32_768,
        tie_word_embeddings=True, **_IDS,
    ),
    "8B": LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192, **_IDS,
    ),
    "toy": Qwen2Config(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        tie_word_embeddings=True, **_IDS,
    ),
}  # fmt: skip


def quantization() -> BitsAndBytesConfig:
    """Return nf4 with double quantization, computing in bfloat16."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def lora() -> LoraConfig:
    """Return new adapters of rank 16 on all linear layers."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def build_model(size: str, device: str, is_quantized: bool = False) -> Any:
    """Return a model of random weights on the device, in bfloat16 (on a CPU float32) or nf4."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    if not is_quantized:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(CONFIGS[size], dtype=dtype).eval()
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(CONFIGS[size], dtype=dtype)
    return type(shapes).from_pretrained(
        None,
        config=CONFIGS[size],
        state_dict=_random_weights(shapes, device, dtype),
        quantization_config=quantization(),
        device_map=device,
        dtype=dtype,
    )


@lru_cache(maxsize=1)
def kept_model(size: str, device: str, is_quantized: bool) -> Any:
    """Return a model with adapters in the precision of the forward, kept until another is asked for."""
    clean_up(device)
    model = build_model(size, device, is_quantized)
    return get_peft_model(model, lora(), autocast_adapter_dtype=False).eval()


def _random_weights(shapes: torch.nn.Module, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return weights by name. Those that are quantized are views of one tensor, to spare memory."""
    std = shapes.config.initializer_range
    kept = {name for name, p in shapes.named_parameters() if "layers" not in name or p.dim() == 1}
    most = max(p.numel() for name, p in shapes.named_parameters() if name not in kept)
    shared = torch.randn(2 * most, device=device, dtype=dtype) * std
    weights, start = {}, 0
    for name, parameter in shapes.named_parameters():
        if name not in kept:
            start = (start + 4093) % most
            weights[name] = shared[start : start + parameter.numel()].view(parameter.shape)
        elif parameter.dim() > 1:
            weights[name] = torch.randn(parameter.shape, device=device, dtype=dtype) * std
        else:
            fill = torch.zeros if name.endswith("bias") else torch.ones
            weights[name] = fill(parameter.shape, device=device, dtype=dtype)
    return weights


@torch.no_grad()
def let_end(model: Any, mean_length: int) -> None:
    """Give EOS a probability of about 1 / mean_length after any token, as random weights don't.

    A bias in the last layer's values, as models of Qwen2 have it, adds the same vector to all hidden
    states. EOS's row of the head becomes a multiple of their mean.
    """
    head = model.get_output_embeddings().weight
    torch.nn.init.normal_(model.base_model.layers[-1].self_attn.v_proj.bias, std=10.0)
    ids = torch.randint(_FIRST_WORD, head.shape[0], (4, 64), device=head.device)
    states = model.base_model(input_ids=ids).last_hidden_state.float().flatten(0, 1)
    others = torch.logsumexp(states @ head[_FIRST_WORD:].float().T, -1).mean()
    mean = states.mean(0)
    wanted = others - math.log(mean_length)
    head[EOS] = (wanted * mean / mean.square().sum()).to(head.dtype)


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a word for every id; no special token is the start of a word."""
    vocabulary = {"<pad>": PAD, "<eos>": EOS}
    vocabulary |= {f"t{i}": i for i in range(_FIRST_WORD, vocab_size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def words(rng: random.Random, count: int, vocab_size: int) -> str:
    """Return a text of so many tokens."""
    return " ".join(f"t{rng.randrange(_FIRST_WORD, vocab_size)}" for _ in range(count))


def build_rows(num_prompts: int, prompt: int, completion: int, vocab_size: int) -> Dataset:
    """Return prompts with completions of fixed lengths; EOS is the last token of a completion."""
    rng = random.Random(0)
    return Dataset.from_list(
        [
            {
                "prompt": words(rng, prompt, vocab_size),
                "completion": " " + words(rng, completion - 1, vocab_size),
            }
            for _ in range(num_prompts)
        ]
    )
