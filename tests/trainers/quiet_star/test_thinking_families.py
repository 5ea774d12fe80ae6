"""QS-2 and QS-23 for every causal class of transformers: its thoughts equal naive ones, or it is refused."""

from typing import Any

import pytest
import torch
from causal_classes import VOCAB_SIZE, build_tiny, family_names
from naive_thoughts import logits_of, naive_scores, states_of
from peft import LoraConfig, get_peft_model
from tiny_families import wake_head

from trl_selfplay.rounds.noise import switch_noise_off
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, attach_thought_module
from trl_selfplay.trainers.quiet_star.replaced_attention import thoughts_attend
from trl_selfplay.trainers.quiet_star.sampling import sample_thoughts
from trl_selfplay.trainers.quiet_star.support import check_model
from trl_selfplay.trainers.quiet_star.unrolled import ThoughtBatch, think_and_talk

# One of each way to attend, with what its tiny config must hold.
ALIBI = {"alibi": True, "new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "sinks": ("gpt_oss", {}),
    "sinks in window layers, narrow values": ("mimo_v2_flash", {}),
    "ALiBi": ("bloom", {}),
    "ALiBi, clipped": ("mpt", {}),
    "ALiBi in another scale": ("falcon", ALIBI),
    "one key head": ("falcon", {"multi_query": True, "new_decoder_architecture": False}),
    "key heads in groups": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "interleaved rotation": ("gptj", {}),
    "interleaved rotation, fused weights": ("codegen", {}),
    "local layers": ("gpt_neo", {}),
    "partial rotation": ("stablelm", {}),
    "sinusoidal positions": ("xglm", {}),
    "two attentions per layer": ("diffllama", {}),
    "layers that are run again": ("hrm_text", {}),
    "a dense layer before the head": ("modernbert-decoder", {}),
    "latent keys": ("deepseek_v3", {"v_head_dim": 12}),
}
# What no class of transformers may raise: errors that weren't written for the user.
RAW = ("size of tensor", "object has no attribute", "unexpected keyword", "shape")
LENGTH, AHEAD, TEXT = 3, 2, 24


def check_thoughts(model: Any, columns: list[int]) -> str:
    """Compare scores and greedy thoughts with naive ones; return the reason if it is refused."""
    try:
        check_model(model)
    except ValueError as error:
        return str(error)
    attach_thought_module(model, None, scale=100.0, seed=0)
    wake_head(model)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, VOCAB_SIZE, (1, TEXT), generator=generator)  # longer than the windows
    tokens = torch.randint(3, VOCAB_SIZE, (1, len(columns), LENGTH), generator=generator)
    anchors, mask = torch.tensor([columns]), torch.ones_like(text)
    real = torch.ones_like(anchors, dtype=torch.bool)
    close = {"atol": 2e-3, "rtol": 1e-3}
    with torch.no_grad():
        outputs = think_and_talk(model, text, mask, ThoughtBatch(anchors, tokens, real, AHEAD))
        start = getattr(model, ATTRIBUTE).start_and_end()[0]
        keys = list(range(len(columns)))
        greedy = sample_thoughts(
            model, start, text, mask, anchors, LENGTH, keys, temperature=0.0
        ).tokens[0]
        for g, column in enumerate(columns):
            naive = naive_scores(model, text[0], column, tokens[0, g], AHEAD)
            torch.testing.assert_close(outputs["talk_log_probs"][0, g], naive.talk, **close)
            torch.testing.assert_close(outputs["weights"][0, g], naive.weights, **close)
            total = outputs["thought_log_probs"][0, g]
            torch.testing.assert_close(total, naive.thought.sum(), **close)
            assert follows(model, text[0, : column + 1], start, greedy[g])
    return ""


def follows(model: Any, text: torch.Tensor, start: torch.Tensor, thought: torch.Tensor) -> bool:
    """Return whether each token of a thought is the most likely one, up to rounding."""
    embed = model.get_input_embeddings()
    # Copies, because CTRL scales its input in place.
    sequence = torch.cat([embed(text), start[None], embed(thought[:-1])]).clone()
    logits = logits_of(model, states_of(model, sequence)[len(text) :])
    best = logits.amax(-1)
    return bool((best - logits[torch.arange(len(thought)), thought] < 1e-3).all())


@pytest.mark.parametrize("way", WAYS)
def test_thoughts_of_each_way_to_attend_equal_naive_ones(way) -> None:
    family, changes = WAYS[way]
    assert check_thoughts(build_tiny(family, **changes), [0, 9, 20]) == ""


@pytest.mark.full
@pytest.mark.parametrize("family", family_names())
def test_thoughts_of_every_class_equal_naive_ones_or_it_is_refused(family) -> None:
    reason = check_thoughts(build_tiny(family), [0, 1, 9, 15, 16, 20])
    assert not any(raw in reason for raw in RAW) or "(RuntimeError: " in reason


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["gpt_oss", "bloom", "falcon", "gptj", "xglm", "gpt2"])
def test_recomputed_activations_leave_gradients_as_they_are(family, reentrant) -> None:
    """QS-19: layers that pass the mask on by position or by name, both forms of recomputation."""
    model = build_tiny(family)
    attach_thought_module(model, None, scale=100.0, seed=0)
    wake_head(model)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, VOCAB_SIZE, (1, TEXT), generator=generator)
    tokens = torch.randint(3, VOCAB_SIZE, (1, 2, LENGTH), generator=generator)
    anchors = torch.tensor([[3, 15]])
    batch = ThoughtBatch(anchors, tokens, torch.ones_like(anchors, dtype=torch.bool), AHEAD)
    found = []
    switch_noise_off(model.train())
    for recomputes in (False, True):
        if recomputes:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        with thoughts_attend(model):
            outputs = think_and_talk(model, text, torch.ones_like(text), batch)
            (outputs["talk_log_probs"].sum() + outputs["thought_log_probs"].sum()).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        size = gradient.abs().max().clamp(min=1.0)
        torch.testing.assert_close(found[1][name] / size, gradient / size, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT's
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama"])
def test_lora_on_all_linear_layers_neither_takes_the_mixing_head_nor_whole_layers(family) -> None:
    """PEFT shortens names for experts: layers 0, 2 and 4 of a head were taken for the model's."""
    model = build_tiny(family)
    attach_thought_module(model, None, scale=100.0, seed=0)
    config = LoraConfig(target_modules="all-linear", modules_to_save=[ATTRIBUTE], r=2)
    adapted = get_peft_model(model, config)
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    lora = [name for name in trained if "lora_" in name]
    assert any("self_attn" in name for name in lora)
    assert not any(ATTRIBUTE in name for name in lora)
    assert sum(ATTRIBUTE in name for name in trained) == 6  # 2 vectors in one, 5 of the head
