"""A tiny random model of any causal class of transformers: its default config, made small by names.

In: a name of transformers' mapping for causal language models. Out: the model in float32, with
weights wide enough that the next token depends on all tokens before it.
"""

from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PAD, EOS, VOCAB_SIZE = 0, 1, 259

# Values by the names that configs give them; a config gets those that it has.
_SIZES: dict[str, int] = {
    **dict.fromkeys(
        ["vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"], VOCAB_SIZE
    ),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size"], 32),
    **dict.fromkeys(["embedding_dim", "word_embed_proj_dim", "attention_hidden_size"], 32),
    **dict.fromkeys(["input_embedding_size", "output_embedding_size", "lru_width"], 32),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"], 4),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_decoder_layers"], 2),
    **dict.fromkeys(
        ["num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"], 4
    ),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["swa_num_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads"], 2),
    **dict.fromkeys(["head_dim", "swa_head_dim", "attention_head_dim", "dim_head", "d_head"], 8),
    **dict.fromkeys(["attention_head_size", "kv_channels", "rotary_dim", "linear_head_dim"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"], 8),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"], 64),
    **dict.fromkeys(["dff", "d_inner", "dim_ff", "ffn_hidden_size", "feed_forward_size"], 64),
    **dict.fromkeys(["intermediate_size_mlp", "dense_intermediate_size"], 64),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 16),
    **dict.fromkeys(["shared_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["shared_experts_intermediate_size", "router_hidden_size"], 16),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "gated_norm_rank"], 16),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"], 256),
    **dict.fromkeys(
        ["context_length", "model_max_length", "original_max_position_embeddings"], 256
    ),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["n_group", "topk_group", "num_expert_group", "n_groups", "mamba_n_groups"], 1),
    **dict.fromkeys(["num_shared_experts", "n_shared_experts", "mamba_ngroups"], 1),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "laurel_rank", "adapter_rank"], 16),
    **dict.fromkeys(["index_n_heads", "linear_num_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["linear_num_key_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "mamba_d_head"], 8),
    **dict.fromkeys(["mamba_head_dim", "mamba_d_state", "ssm_state_size", "state_size"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads"], 8),
    **dict.fromkeys(["mamba_d_ssm"], 64),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size"], 8),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "attention_window_size"], 16),
    **dict.fromkeys(["window_size", "attention_chunk_size", "local_attention"], 16),
    **dict.fromkeys(["hidden_size_per_layer_input"], 8),
    **dict.fromkeys(["time_step_rank", "mamba_dt_rank"], 4),
}
# What the rule above gets wrong, by the name of the family.
_MLA = {"num_key_value_heads": 4}  # latent attention has no groups
_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DECODER = {"is_decoder": True}
_CHANGES: dict[str, dict[str, Any]] = {
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": _MLA | {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "bert": _DECODER,
    "bert-generation": _DECODER,
    "big_bird": _DECODER | {"attention_type": "original_full"},
    "blt": {"encoder_hash_byte_group_vocab": 99},
    "camembert": _DECODER,
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "data2vec-text": _DECODER,
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "hidden_size": 32}
        | {"moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _MLA | _EXPERTS,
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "dots1": _EXPERTS,
    "dots3_note_text": _MLA,
    "electra": _DECODER,
    "ernie": _DECODER,
    "gemma3n_text": {"num_hidden_layers": 8, "num_kv_shared_layers": 4, "intermediate_size": 64}
    | {"layer_types": ["sliding_attention", "full_attention"] * 4}
    | {"activation_sparsity_pattern": [0.0] * 8},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "glm4_moe_lite": _MLA,
    "glm_moe_dsa": _MLA,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "inkling2_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "inkling_text": {"layer_types": ["hybrid_sliding", "hybrid"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _MLA | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "kolibri1": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "sliding_attention", "conv", "full_attention"]},
    "longcat_flash": _MLA,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "megatron-bert": _DECODER,
    "minicpm3": _MLA,
    "ministral": {"head_dim": 8},
    "moshi": {"audio_vocab_size": 32},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {"layer_types": ["linear_attention", "indexed_attention"] * 2}
    | {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
    | {"indexer_budget": 64, "indexer_compress_ratio": 4},
    "reformer": _DECODER | {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (16, 16)},
    "rembert": _DECODER,
    "roberta": _DECODER,
    "roberta-prelayernorm": _DECODER,
    "roc_bert": _DECODER
    | {"pronunciation_embed_dim": 8, "pronunciation_vocab_size": VOCAB_SIZE}
    | {"shape_embed_dim": 8, "shape_vocab_size": VOCAB_SIZE},
    "roformer": _DECODER,
    "xlm-roberta": _DECODER,
    "xlm-roberta-xl": _DECODER,
    "xmod": _DECODER | {"default_language": "en_XX"},
    "youtu": _MLA,
    "xlstm": {"hidden_size": 128},
    "zamba": {"attention_hidden_size": 64}
    | {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"attention_hidden_size": 64}
    | {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}


# Multimodal classes, whose other parts the rule leaves large, and two whose config it can't make:
# they don't occur in the sweep. The text classes of the former do.
_NOT_TINY = {
    *("fuyu", "gemma3", "gemma3n", "gemma4_unified", "got_ocr2", "moss_transcribe_diarize"),
    *("gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody"),
}


def family_names() -> list[str]:
    """Return a name for each causal class of transformers, a text model's if there are several."""
    names = {cls: name for name, cls in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}
    return sorted(set(names.values()) - _NOT_TINY)


def small_values(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return small values of the sizes that a config has, also for configs inside it."""
    config = config_class()
    values: dict[str, Any] = {
        name: size
        for name, size in _SIZES.items()
        if isinstance(vars(config).get(name), int) and vars(config)[name] > 0
    }
    ids = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
    values |= {name: value for name, value in ids.items() if name in vars(config)}
    for name in ("initializer_range", "init_std"):
        if name in vars(config):
            values[name] = 0.3
    for name, inner in config_class.sub_configs.items():
        if (
            isinstance(inner, type)
            and issubclass(inner, PreTrainedConfig)
            and inner is not PreTrainedConfig
        ):
            values[name] = small_values(inner)
    return values


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """Return a small config of the family's class."""
    # Of a multimodal name's text class it is the text's.
    config_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]).config_class
    return config_class(**{**small_values(config_class), **_CHANGES.get(name, {}), **changes})


def build_tiny(name: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny random model of the family, in float32 and eval mode."""
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    config = tiny_config(name, **changes)
    torch.manual_seed(0)
    model = model_class(config).float().eval()
    # Forced tokens of some encoder-decoder families are refused.
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=2)
    return model
