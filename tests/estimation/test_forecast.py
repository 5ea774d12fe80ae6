"""What a run takes, told from its configuration."""

import re

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig, LlamaConfig

from trl_selfplay import QuietSTaRConfig, SPINConfig, STaRConfig, estimate
from trl_selfplay.estimation.advice import advise
from trl_selfplay.estimation.plan import read_plan

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
    fewer_rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    changes = ({**fewer_rows, "optim": "adamw_8bit"}, fewer_rows, {"optim": "adamw_8bit"})
    assert short.advice[0].startswith(
        "per_device_train_batch_size=1 with more gradient_accumulation_steps, optim='adamw_8bit': "
    )
    fits = [
        estimate(
            LLAMA,
            STaRConfig(str(tmp_path), max_length=128, gradient_checkpointing=False, **change),
            device="cuda",
        ).fits(found.peak * 2 // 3)
        for change in changes
    ]
    assert fits == [True, False, False]


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_an_engine_takes_at_most_what_the_weights_leave(tmp_path, share) -> None:
    config = STaRConfig(
        str(tmp_path),
        max_length=128,
        use_vllm=True,
        vllm_mode="phase",
        vllm_gpu_memory_utilization=share,
    )
    held = estimate(LLAMA, config, peft_config=LORA, device="cuda").phase("sampling").parts
    weights = held["weights"] + held["adapter"]
    memory = 4 * weights
    sampling = estimate(LLAMA, config, peft_config=LORA, device="cuda", memory=memory).phase(
        "sampling"
    )
    assert sampling.parts["engine"] == int(min(share * memory, 0.95 * (memory - weights)))
    assert sampling.total <= memory


def plan_of(tmp_path):
    fields = {"max_length": 2048, "gradient_checkpointing": False}
    config = STaRConfig(str(tmp_path), **fields)
    return read_plan(LLAMA, config, None, None, None, None, "cuda")


def test_each_change_that_is_advised_is_needed(tmp_path) -> None:
    """Adapters alone are enough here, after four changes that weren't."""

    def peak_of(plan) -> int:
        saved = (plan.checkpointing is not None) + (plan.rows == 1) + ("8bit" in plan.optim)
        return (10 if plan.peft_config else 30 - 2 * saved) * 10**9

    said = advise(plan_of(tmp_path), peak_of, 12 * 10**9)
    assert said == "peft_config=LoraConfig(r=16, target_modules='all-linear'): 10.0 GB"
    said = advise(plan_of(tmp_path), peak_of, 8 * 10**9)
    assert said.startswith("none of gradient_checkpointing=True, ")
    assert said.count("max_length=") == 1


def test_of_several_lengths_the_longest_that_fits_is_advised(tmp_path) -> None:
    said = advise(plan_of(tmp_path), lambda plan: plan.length * 10**7, 6 * 10**9)
    assert said == "max_length=512: 5.1 GB"


def test_an_engine_whose_own_weights_do_not_fit_is_told(tmp_path) -> None:
    fields = {"max_length": 16, "max_completion_length": 8, "per_device_train_batch_size": 1}
    config = STaRConfig(str(tmp_path), use_vllm=True, vllm_mode="phase", **fields)
    llama = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    settings = {"peft_config": LoraConfig(r=2), "quantization_config": FOUR_BITS, "device": "cuda"}
    layers = 8 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
    least = estimate(llama, config, **settings).phase("sampling").parts["engine"]
    assert least == pytest.approx(2 * layers, rel=0.02)  # 16 bits, although 4 are trained on
    held = estimate(llama, config, **settings).phase("sampling").parts["weights"]
    found = estimate(llama, config, **settings, memory=held + least * 3 // 4)
    assert found.advice[0].startswith("vllm_quantization='fp8': ")
    config.vllm_gpu_memory_utilization = 0.05
    found = estimate(llama, config, **settings, memory=10 * least)
    assert found.advice == ()
    assert "vllm_gpu_memory_utilization=0.05 gives it" in found.notes[-1]


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"memory": 12}, ValueError, "if you mean gigabytes, write '12GB'"),
        ({"memory": "12 gallons"}, ValueError, "give bytes, or text such as '12GB'"),
        ({"memory": True}, ValueError, "memory=True"),
        ({"memory": -1}, ValueError, "memory=-1"),
        ({"memory": 10**18}, ValueError, "which no device has"),
        ({"prompt_length": -5}, ValueError, "prompt_length=-5; it must be a number of tokens"),
        ({"row_length": 0}, ValueError, "row_length=0"),
        ({"config": STaRConfig}, TypeError, "config is the class STaRConfig; make one"),
        ({"config": None}, TypeError, "config=None; it must be a TrainingArguments"),
        ({"peft_config": LoraConfig}, TypeError, "peft_config is the class LoraConfig"),
        ({"peft_config": True}, TypeError, "peft_config=True; it must be a PeftConfig"),
        ({"quantization_config": True}, TypeError, "quantization_config=True"),
        ({"model": LlamaConfig}, TypeError, "model is <class"),
        ({"model": "./nowhere"}, FileNotFoundError, "there is nothing at"),
        ({"device": "gpu"}, ValueError, "device='gpu'; choose 'cuda' or 'cpu'"),
    ],
)
def test_an_argument_that_can_not_be_is_named(tmp_path, changes, error, said) -> None:
    arguments = {"model": LLAMA, "config": STaRConfig(str(tmp_path)), **changes}
    with pytest.raises(error, match=re.escape(said)):
        estimate(arguments.pop("model"), arguments.pop("config"), **arguments)
