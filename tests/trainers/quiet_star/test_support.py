"""QS-23: models that can't think are refused at construction, with the reason."""

import pytest
import torch
from causal_classes import VOCAB_SIZE, build_tiny
from tiny_families import FAMILIES, build_family
from transformers import AttentionInterface

from trl_selfplay import QuietSTaRModel
from trl_selfplay.rounds.noise import switch_noise_off
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, attach_thought_module
from trl_selfplay.trainers.quiet_star.replaced_attention import thoughts_attend
from trl_selfplay.trainers.quiet_star.storage import ThoughtSettings
from trl_selfplay.trainers.quiet_star.support import check_lengths, check_model

# A family for each reason.
REFUSED = {
    "blt": "keeps its state in a form of its own",
    "mamba": "recurrent or convolutional layers",
    "bamba": "recurrent or convolutional layers",
    "gemma3n_text": "hidden_size_per_layer_input",
    "gemma4_text": "hidden_size_per_layer_input",
    "llama4_text": "layers of the kind 'chunked_attention'",
    "deepseek_v32": "layers of the kind 'indexed_attention'",
    "deepseek_v4": "layers of the kind 'heavily_compressed_attention'",
    "mllama": "can't be run without its head",
    "roberta": "a head of more than one linear layer",
    "bart": "doesn't take position_ids",
    "moshi": "4 of its layers have a sliding window, and 0 pass it on",
    "doge": "its attention reads the mask itself",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_that_can_think_pass(family) -> None:
    model = build_family(family)
    model.train()
    check_model(model)
    assert model.training


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_think_is_refused_with_its_reason(family) -> None:
    model = build_tiny(family)
    with pytest.raises(
        ValueError, match=f"{type(model).__name__} .*{REFUSED[family]}.* Use a model"
    ):
        check_model(model)


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=23, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="encoder-decoder"):
        check_model(T5ForConditionalGeneration(config))


def test_an_attention_function_of_unknown_meaning_is_refused() -> None:
    AttentionInterface.register("test_odd_attention", lambda *args, **kwargs: None)
    model = build_family("llama")
    model.config._attn_implementation = "test_odd_attention"
    with pytest.raises(ValueError, match="attn_implementation='test_odd_attention'"):
        check_model(model)


def test_a_model_that_counts_positions_its_own_way_is_refused() -> None:
    """The trial finds what no flag says: here, positions that are ignored."""
    model = build_family("llama")
    own = model.base_model.rotary_emb.forward

    def ignoring(x, position_ids):
        return own(x, torch.arange(x.shape[1])[None].expand_as(position_ids))

    model.base_model.rotary_emb.forward = ignoring
    with pytest.raises(ValueError, match="gives other logits for a thought"):
        check_model(model)


def attributes(model) -> list[dict]:
    return [dict(module.__dict__) for module in model.modules()]


def test_attention_is_put_back_after_an_error() -> None:
    """QS-21."""
    for model in (build_family("llama"), build_tiny("falcon"), build_tiny("bloom")):
        own, before = model.config._attn_implementation, attributes(model)
        with pytest.raises(IndexError), thoughts_attend(model), thoughts_attend(model):
            model(torch.tensor([[VOCAB_SIZE]]))
        assert model.config._attn_implementation == own
        assert attributes(model) == before


def test_text_and_thought_must_fit_the_models_positions() -> None:
    """96 positions: 80 of text, a thought of 8 + 2, 3 true tokens, and 3 to spare."""
    model = build_family("gpt2")
    check_lengths(model, 83, 8, 4)
    with pytest.raises(ValueError, match=r"reaches position 97.*Set max_length to at most 83"):
        check_lengths(model, 84, 8, 4)
    check_lengths(model, None, 8, 4)


def test_a_sliding_window_that_attention_is_not_told_is_refused() -> None:
    """QS-23: Qwen2-MoE has its window in the mask alone, which thoughts don't read."""
    sizes = {
        "sliding_window": 12,
        "max_window_layers": 28,
        "num_experts": 2,
        "num_experts_per_tok": 1,
    }
    windowed = build_family("qwen2_moe", use_sliding_window=True, **sizes)
    with pytest.raises(ValueError, match="layers have a sliding window, and 0 pass it on"):
        check_model(windowed)
    check_model(build_family("qwen2_moe", use_sliding_window=False, **sizes))


def test_states_narrower_than_the_layers_have_a_head_of_their_width() -> None:
    model = build_family(
        "opt", word_embed_proj_dim=16, ffn_dim=48, do_layer_norm_before=True, layerdrop=0.2
    )
    check_model(model)
    attach_thought_module(model, None, 100.0, seed=0)
    assert getattr(model, ATTRIBUTE).vectors.shape == (2, 16)
    ids = torch.randint(2, 23, (1, 8), generator=torch.Generator().manual_seed(0))
    thinking = QuietSTaRModel(model, ThoughtSettings(thought_length=2))
    torch.testing.assert_close(thinking(ids).logits, model(ids).logits)  # a fresh head
    assert switch_noise_off(model)
    assert model.model.decoder.layerdrop == 0.0
