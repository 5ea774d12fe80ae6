"""Tiny random models of the families that can think, and weights for a head that has woken up."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE

VOCAB = 23
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 96, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "mistral-window": {"model_type": "mistral", "sliding_window": 5},
    "smollm": {"model_type": "llama", "tie_word_embeddings": True},
    "gemma": {},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 1.0,
               "final_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "gpt_neox": {},
    "deepseek_v3": {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16,
                    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
                    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
                    "topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96, "n_inner": 48},
}  # fmt: skip


def build_family(family: str, seed: int = 0, **changes: Any) -> Any:
    """Build a random float32 model of a family, in eval mode."""
    settings = {"model_type": family, **_SIZES, **FAMILIES.get(family, {}), **changes}
    if settings["model_type"] == "gpt2":
        settings = {k: v for k, v in settings.items() if k not in _SIZES or "token_id" in k}
        settings["vocab_size"] = VOCAB
    if settings["model_type"] == "gpt_neox":
        del settings["num_key_value_heads"], settings["head_dim"]
    if settings["model_type"] == "deepseek_v3":
        del settings["head_dim"]  # of keys; values have another
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    if (
        config.model_type == "gemma2"
    ):  # transformers before 5.23 takes sdpa, which drops the softcap
        config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        for parameter in model.parameters():  # wider than usual, so that what differs shows
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return model


def wake_head(model: Any, seed: int = 3) -> None:
    """Give the mixing head's last layer weights, as if it had been trained."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.nn.init.normal_(getattr(model, ATTRIBUTE).head[-1].weight, std=0.3)
