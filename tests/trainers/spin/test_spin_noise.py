"""SPIN on models that are random in train mode: the opponent is still the policy."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trl_selfplay.trainers.reference import WrongOpponentError

LN_2 = math.log(2.0)
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.1}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
NOISY = {
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},  # dropout 0.1 by default
    "seed_oss": GROUPED,  # likewise
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},  # likewise
    "llama": {**GROUPED, "attention_dropout": 0.1},
    "starcoder2": {**GROUPED, "residual_dropout": 0.3, "embedding_dropout": 0.3},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4,
             "attn_pdrop": 0.3},
    "mixtral": {**GROUPED, **EXPERTS, "router_jitter_noise": 0.3},
    "phimoe": {**GROUPED, **EXPERTS, "input_jitter_noise": 0.3},
}  # fmt: skip


def noisy_model(family, tokenizer, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **{**NOISY[family], **changes}, vocab_size=len(tokenizer), bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    return AutoModelForCausalLM.from_config(config).float()


def formula(model, batch, beta):
    """Equation 4.7 in eval mode, from the logits of each row without its padding."""
    model.eval()
    logps = []
    for ids, mask, completion in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        ids, completion = ids[mask == 1], completion[mask == 1].bool()
        with torch.no_grad():
            table = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
        places = torch.nonzero(completion).squeeze(1)
        logps.append(float(table[places - 1, ids[places]].sum()))
    model.train()
    chosen, rejected = np.array(logps).reshape(2, -1)
    references = (batch[f"ref_{side}_logps"].numpy() for side in ("chosen", "rejected"))
    margins = beta * ((chosen - next(references)) - (rejected - next(references)))
    return float(np.log1p(np.exp(-margins)).mean())


@pytest.mark.parametrize(
    "family",
    [f if f == "opt" else pytest.param(f, marks=pytest.mark.slow) for f in NOISY],
)
def test_rounds_begin_at_ln_2_and_go_on_by_the_formula_whatever_noise_a_model_has(
    build_spin, pair_recorder, word_tokenizer, family
) -> None:
    """SP-1 and SP-4."""
    model = noisy_model(family, word_tokenizer)
    trainer = build_spin(
        model=model, num_rounds=2, callbacks=[pair_recorder], max_completion_length=16
    )
    expected, step = [], trainer.training_step

    def recorded_step(model, inputs, *args, **kwargs):
        if trainer.progress is not None:  # not the step that is tried before sampling
            expected.append(formula(trainer.model, inputs, trainer.beta))
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = recorded_step
    trainer.train()
    losses = [logs["loss"] for t in range(2) for logs in pair_recorder.steps[t]]
    assert losses == pytest.approx(expected, abs=2e-6)
    for first in (losses[0], losses[3]):
        assert first == pytest.approx(LN_2, abs=1e-6)
    assert abs(losses[1] - LN_2) > 1e-4


def test_noise_that_comes_after_construction_is_caught_in_round_0(build_spin) -> None:
    """The check looks at the policy as training will use it."""
    trainer = build_spin()
    trainer.model.model.layers[0].self_attn.attention_dropout = 0.3
    with pytest.raises(WrongOpponentError, match="round 0: before the first step"):
        trainer.train()
