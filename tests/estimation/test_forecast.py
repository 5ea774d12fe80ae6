"""What a run takes, told from its configuration."""

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig

from trl_selfplay import QuietSTaRConfig, SPINConfig, STaRConfig, estimate

LLAMA = LlamaConfig(
    vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
)  # fmt: skip
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
)
LORA = LoraConfig(r=8, target_modules="all-linear")


@pytest.mark.parametrize(
    ("config_class", "phases"),
    [
        (STaRConfig, ["sampling", "training"]),
        (SPINConfig, ["sampling", "reference", "training"]),
        (QuietSTaRConfig, ["training"]),
    ],
)
def test_a_run_has_the_phases_of_its_method(tmp_path, config_class, phases) -> None:
    config = config_class(str(tmp_path), max_length=32, bf16=False, use_cpu=True)
    found = estimate(LLAMA, config)
    assert [phase.name for phase in found.phases] == phases
    assert found.peak == max(phase.total for phase in found.phases)
    assert all(phase.name in str(found) for phase in found.phases)


def test_four_bit_weights_take_half_a_byte_and_their_scales(tmp_path) -> None:
    config = STaRConfig(
        str(tmp_path),
        model_init_kwargs={"dtype": "bfloat16", "quantization_config": FOUR_BITS},
        max_length=128,
    )
    found = estimate(LLAMA, config, peft_config=LORA, device="cuda")
    layer = 256 * 256 + 2 * 256 * 128 + 256 * 256 + 3 * 256 * 512
    packed = 2 * layer // 2 + 4 * (2 * layer // 64)
    whole = 2 * (2 * 1000 * 256 + 5 * 256)  # embeddings, head, norms
    buffers = 4 * 2 * 16  # rotary frequencies
    assert found.phase("training").parts["weights"] == packed + whole + buffers


def test_what_does_not_fit_is_told_what_would(tmp_path) -> None:
    config = STaRConfig(str(tmp_path), max_length=128, gradient_checkpointing=False)
    found = estimate(LLAMA, config, device="cuda")
    assert estimate(LLAMA, config, device="cuda", memory=found.peak).advice == ()
    short = estimate(LLAMA, config, device="cuda", memory=found.peak * 2 // 3)
    assert "gradient_checkpointing=True" in short.advice[0]


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_an_engine_takes_at_most_what_the_weights_leave(tmp_path, share) -> None:
    config = STaRConfig(
        str(tmp_path),
        max_length=128,
        use_vllm=True,
        vllm_mode="phase",
        vllm_gpu_memory_utilization=share,
    )
    weights = estimate(LLAMA, config, peft_config=LORA, device="cuda").phase("sampling").total
    memory = 4 * weights
    sampling = estimate(LLAMA, config, peft_config=LORA, device="cuda", memory=memory).phase(
        "sampling"
    )
    assert sampling.parts["engine"] == int(min(share * memory, 0.95 * (memory - weights)))
    assert sampling.total <= memory
