"""Noise of train mode: off in every kind of model that has it, and refused where it stays."""

import functools

import pytest
import torch
import transformers
from peft import BOFTConfig, LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from trl_selfplay.rounds.noise import _DRAWING_ROUTERS, switch_noise_off

VOCAB = 40
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip
LIKE_LLAMA = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {**LIKE_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
LIKE_OPT = {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}
LIKE_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
             "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1, "initializer_range": 0.3}  # fmt: skip
# Model type, sizes, and its own noise alone.
NOISY = {
    "opt": ("opt", LIKE_OPT, {"dropout": 0.3, "attention_dropout": 0.3}),
    "opt-layerdrop": ("opt", LIKE_OPT, {"dropout": 0.0, "layerdrop": 0.9}),
    "llama": ("llama", LIKE_LLAMA, {"attention_dropout": 0.3}),
    "gpt_bigcode": ("gpt_bigcode", LIKE_GPT2, {"attn_pdrop": 0.3}),
    "seed_oss": ("seed_oss", LIKE_LLAMA, {"residual_dropout": 0.3}),
    "starcoder2": ("starcoder2", LIKE_LLAMA, {"residual_dropout": 0.3, "embedding_dropout": 0.3}),
    "gptj-config": ("gptj", LIKE_GPT2 | {"rotary_dim": 4}, {"attn_pdrop": 0.3}),
    "persimmon-config": ("persimmon", SIZES, {"attention_dropout": 0.3}),
    "mixtral-jitter": ("mixtral", EXPERTS, {"router_jitter_noise": 0.3}),
    "phimoe-draws": ("phimoe", EXPERTS, {"input_jitter_noise": 0.3}),
}
RARER = {
    "gpt2": ("gpt2", LIKE_GPT2, {"resid_pdrop": 0.3}),
    "openai-gpt": ("openai-gpt", LIKE_GPT2, {"resid_pdrop": 0.3}),
    "falcon-config": ("falcon", SIZES, {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
    "gpt_neo-config": (
        "gpt_neo",
        {
            **{k: v for k, v in SIZES.items() if k != "num_hidden_layers"},
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        {"attention_dropout": 0.3},
    ),
    "gpt_neox": ("gpt_neox", SIZES, {"hidden_dropout": 0.3, "attention_dropout": 0.3}),
    "bloom": ("bloom", SIZES | {"n_layer": 2, "n_head": 4}, {"hidden_dropout": 0.3}),
    "xglm": (
        "xglm",
        {"vocab_size": VOCAB, "d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
        {"layerdrop": 0.9, "activation_dropout": 0.3},
    ),
    "biogpt": ("biogpt", SIZES, {"layerdrop": 0.9, "activation_dropout": 0.3}),
    "phi3": ("phi3", LIKE_LLAMA, {"resid_pdrop": 0.3}),
    "stablelm": ("stablelm", LIKE_LLAMA, {"hidden_dropout": 0.3}),
    "doge": ("doge", LIKE_LLAMA, {"hidden_dropout": 0.3}),
    "gpt_oss": ("gpt_oss", EXPERTS, {"attention_dropout": 0.3}),
    "gemma2": ("gemma2", LIKE_LLAMA, {"attention_dropout": 0.3}),
    "minimax_m2-jitter": ("minimax_m2", EXPERTS, {"router_jitter_noise": 0.3}),
}
IDS = torch.arange(2, 26).view(2, 12)


def build(name, sizes, noise):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**sizes, **noise})
    return AutoModelForCausalLM.from_config(config).float()


@torch.no_grad()
def logits(model, *, train):
    model.train(train)
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


def is_random(model):
    return any(
        not torch.equal(logits(model, train=True), logits(model, train=True)) for _ in range(8)
    )


@pytest.mark.parametrize(
    "family", [*NOISY, *(pytest.param(name, marks=pytest.mark.slow) for name in RARER)]
)
def test_train_mode_computes_what_eval_mode_does_once_noise_is_off(family) -> None:
    model = build(*(NOISY | RARER)[family])
    expected = logits(model, train=False)
    assert is_random(model)
    assert switch_noise_off(model)
    assert torch.equal(logits(model, train=False), expected)  # no threshold was taken for noise
    torch.testing.assert_close(logits(model, train=True), expected, rtol=1e-5, atol=1e-5)
    assert not is_random(model)
    assert switch_noise_off(model) == []


def test_the_saved_config_keeps_its_dropout_where_no_forward_reads_it() -> None:
    model = build("opt", LIKE_OPT, {"dropout": 0.3, "layerdrop": 0.2})
    switch_noise_off(model)
    assert (model.config.dropout, model.config.layerdrop) == (0.3, 0.2)


def test_the_model_comes_back_in_the_mode_it_was_in() -> None:
    model = build("llama", LIKE_LLAMA, {"attention_dropout": 0.3})
    model.train()
    model.model.layers[0].eval()
    switch_noise_off(model)
    assert model.model.training
    assert not model.model.layers[0].mlp.training


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_dropout=0.5, init_lora_weights=False),
        LoHaConfig(r=4, rank_dropout=0.5, init_weights=False),
        LoHaConfig(r=4, module_dropout=0.5, init_weights=False),
        BOFTConfig(boft_block_size=8, boft_dropout=0.5, init_weights=False),
    ],
    ids=["LoRA", "LoHa rank", "LoHa module", "BOFT"],
)
# BOFT looks for a compiler of CUDA kernels.
@pytest.mark.filterwarnings("ignore:(Failed to load the CUDA|Setting boft_n_butterfly)")
def test_an_adapters_dropout_is_off_as_well(config) -> None:
    if isinstance(config, BOFTConfig):  # PEFT imports it to build BOFT's kernels
        pytest.importorskip("setuptools")
    config.target_modules = {"q_proj", "v_proj"}
    model = get_peft_model(build("llama", LIKE_LLAMA, {}), config)
    assert is_random(model)
    assert switch_noise_off(model)
    assert not is_random(model)


def test_noise_on_embeddings_that_a_user_has_hooked_in_is_off() -> None:
    model = build("llama", LIKE_LLAMA, {})
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 50.0
    hook = transformers.integrations.neftune.neftune_post_forward_hook
    embeddings.register_forward_hook(hook)
    assert is_random(model)
    assert switch_noise_off(model) == ["Embedding.neftune_noise_alpha"]
    assert not is_random(model)


class OwnNoise(LlamaForCausalLM):
    """Draws in a way that no attribute tells of."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if self.training:
            output.logits = output.logits + 0.1 * torch.randn_like(output.logits)
        return output


def test_noise_that_cannot_be_switched_off_is_refused() -> None:
    model = OwnNoise(build("llama", LIKE_LLAMA, {}).config)
    with pytest.raises(ValueError, match="OwnNoise gives other logits for the same tokens"):
        switch_noise_off(model)


def test_what_is_not_noise_stays() -> None:
    """Names that only look alike, and PhiMoE's threshold."""
    phimoe = build("phimoe", EXPERTS, {"router_jitter_noise": 0.02})
    layer = phimoe.model.layers[0]
    layer.drop_tokens, layer.dropless, layer.dropout = True, 0.5, nn.Dropout(0.5)
    switch_noise_off(phimoe)
    assert (layer.drop_tokens, layer.dropless, layer.dropout.p) == (True, 0.5, 0.0)
    routers = [m for m in phimoe.modules() if type(m).__name__ in _DRAWING_ROUTERS]
    assert [router.router_jitter_noise for router in routers] == [0.02, 0.02]


def test_a_model_whose_weights_lie_elsewhere_is_not_tried() -> None:
    config = build("llama", LIKE_LLAMA, {"attention_dropout": 0.3}).config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.forward = functools.partial(pytest.fail, "the forward was called")
    assert "LlamaAttention.attention_dropout" in switch_noise_off(model)
