"""Every trainer on a 4-bit base: what it trains, saves, samples and resumes."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_rewards import digit_share
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback

from trl_selfplay import QuietSTaRConfig, QuietSTaRTrainer, VSTaRConfig, VSTaRTrainer
from trl_selfplay.generation.quantized_layers import prepare_quantized_layers
from trl_selfplay.generation.sampler import SampleRequest, build_sampling_options
from trl_selfplay.rollouts.record import hash_prompt
from trl_selfplay.rounds.weights import trainable_parameters

LN_2 = math.log(2.0)
PAIRED = ("SPIN", "IRPO", "VSTaR")
METHODS = ("STaR", "ReSTEM", *PAIRED, "QuietSTaR")
PROMPTS = ((13, 4, 13, 5, 14, 15), (13, 7, 13, 15), (13, 9))
SETTINGS = {
    "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "logging_steps": 1,
    "learning_rate": 1e-2, "per_device_train_batch_size": 4, "gradient_checkpointing": False,
    "max_steps": 2, "save_strategy": "steps", "save_steps": 1,
}  # fmt: skip


def nf4(**changes) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        **{
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.float32,
            **changes,
        }
    )


def lora(**changes) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "lora_dropout": 0.1, **changes})


class Watcher(TrainerCallback):
    """Keeps the log lines of the first steps; may stop the run amid its last training."""

    def __init__(self, interrupts: bool = False) -> None:
        self.interrupts, self.first_steps, self.trainings = interrupts, [], 0

    def on_train_begin(self, *args, **kwargs):
        self.trainings += 1

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs and logs.get("step", state.global_step) % args.max_steps == 1:
            self.first_steps.append(dict(logs))

    def on_step_begin(self, args, state, control, **kwargs):
        is_last = self.trainings == getattr(args, "num_rounds", 1)
        if self.interrupts and is_last and state.global_step == 1:  # after its checkpoint
            raise KeyboardInterrupt


@pytest.fixture
def base_folder(tmp_path, tiny_model, word_tokenizer):
    """A model wide enough for 4-bit blocks, on disk."""
    model = tiny_model(word_tokenizer, hidden_size=64, intermediate_size=128, initializer_range=0.1)
    model.save_pretrained(tmp_path / "base")
    word_tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def verifier_samples(sums, make_rollout, word_tokenizer):
    def build():
        return [
            make_rollout(
                prompt_id=hash_prompt(row["prompt"], row["solution"]), sample_index=i,
                prompt=row["prompt"], completion=text, reward=reward,
                completion_ids=(*word_tokenizer(text)["input_ids"], word_tokenizer.eos_token_id),
                prompt_ids=tuple(word_tokenizer(row["prompt"])["input_ids"]),
            )
            for row in sums(12)
            for i, (text, reward) in enumerate(
                [(f"so {row['solution']}", 1.0), (f"so yes {row['solution']} no", 0.0)]
            )
        ]  # fmt: skip

    return build


@pytest.fixture
def build(
    tmp_path, base_folder, build_star, build_rest_em, build_spin, build_irpo, verifier_samples,
    word_tokenizer, sums,
):  # fmt: skip
    """Return a function that builds a trainer on the quantized base, with a new LoRA adapter."""

    def build_method(method, folder="run", **changes):
        arguments = {
            "model": base_folder, "quantization_config": nf4(), "peft_config": lora(), **changes
        }  # fmt: skip
        arguments["peft_config"] = copy.deepcopy(arguments["peft_config"])  # PEFT writes into it
        rounds = {
            "STaR": build_star, "ReSTEM": build_rest_em, "SPIN": build_spin, "IRPO": build_irpo
        }  # fmt: skip
        if method in rounds:
            sizes = {"num_rounds": 2, "max_completion_length": 12}
            if method == "IRPO":  # half of the completions are right
                sizes |= {"reward_funcs": digit_share, "reward_threshold": 0.2}
            return rounds[method](folder, **{**SETTINGS, **sizes, **arguments})
        config, trainer, extra = {
            "VSTaR": (VSTaRConfig, VSTaRTrainer, {"samples": verifier_samples()}),
            "QuietSTaR": (QuietSTaRConfig, QuietSTaRTrainer, {}),
        }[method]
        fields = config.__dataclass_fields__
        settings = {**SETTINGS, **{k: v for k, v in arguments.items() if k in fields}}
        rest = {k: v for k, v in arguments.items() if k not in fields}
        rows = sums(12)
        if method == "QuietSTaR":
            settings |= {"thought_length": 2, "num_ahead_tokens": 1}
            rows = Dataset.from_dict(
                {"input_ids": [[13, 4, 13, 5, 14, 15, i + 3] for i in range(8)]}
            )
        return trainer(
            args=config(str(tmp_path / folder), **settings), train_dataset=rows,
            processing_class=word_tokenizer, **extra, **rest,
        )  # fmt: skip

    return build_method


def frozen_weights(model):
    """All that training must leave alone, the constants of the quantization included."""
    trained = trainable_parameters(model)
    return {n: t.detach().clone() for n, t in model.state_dict().items() if n not in trained}


def assert_only_adapters_on_disk(root, model) -> None:
    """Checkpoints, rounds and the result hold the trained weights and not one of the base's."""
    sizes = {n: p.numel() for n, p in trainable_parameters(model).items() if "quiet_star" not in n}
    files = sorted(root.rglob("*.safetensors"))
    assert files
    kinds = {"adapter_model.safetensors", "trainable.safetensors", "quiet_star.safetensors"}
    assert {path.name for path in files} <= kinds
    assert {path.name for path in root.rglob("*.bin")} <= {"training_args.bin"}
    for path in files:
        if path.name == "quiet_star.safetensors":
            continue
        tensors = load_file(path)
        own = {n: t for n, t in tensors.items() if "quiet_star" not in n}
        assert len(own) == len(sizes), path
        assert sum(t.numel() for t in own.values()) == sum(sizes.values()), path


@torch.no_grad()
def shake(model) -> None:
    """Move every trainable weight, so that an adapter that does little yet does something."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(model).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def assert_sampled_as_generated(trainer) -> None:
    options = build_sampling_options(
        trainer.args, trainer.self_play.eos_token_ids, temperature=0.0, max_completion_length=8
    )
    sampler = trainer.self_play.collector.sampler
    sampled = dict(sampler.sample([SampleRequest(p, b"") for p in PROMPTS], options, 5))
    model = trainer.model.eval()
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        with trainer.accelerator.autocast():
            generated = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=8,
            )  # fmt: skip
        assert sampled[i].completion_ids == tuple(generated[0, len(prompt) :].tolist())


@torch.no_grad()
def assert_loads_again(trainer, base_folder, quantization) -> None:
    """As a user loads it: the base is quantized anew, and the adapter is put on it."""
    dtype = (trainer.args.model_init_kwargs or {}).get("dtype", "float32")
    base = AutoModelForCausalLM.from_pretrained(
        base_folder, quantization_config=quantization, dtype=dtype
    )
    prepare_quantized_layers(base)  # else the CPU's layers of inference round more
    loaded = PeftModel.from_pretrained(base, trainer.args.output_dir).eval()
    trained = dict(trainer.model.eval().named_parameters())
    for name, parameter in loaded.named_parameters():
        if name in trained and trained[name].requires_grad:
            parameter.data = parameter.data.to(trained[name].dtype)  # PEFT loads in float32
    ids = torch.tensor([PROMPTS[0]])
    with trainer.accelerator.autocast():
        logits = trainer.model(input_ids=ids).logits  # in float32 under autocast
        torch.testing.assert_close(loaded(input_ids=ids).logits.to(logits.dtype), logits)


def check(build, method, base_folder, tmp_path, quantization=None, **changes) -> None:
    quantization = quantization or nf4()
    changes = {"quantization_config": quantization, **changes}
    watcher = Watcher()
    trainer = build(method, "whole", callbacks=[watcher], **changes)
    frozen = frozen_weights(trainer.model)
    assert any(weight.dtype in (torch.uint8, torch.int8) for weight in frozen.values())
    begun = {n: p.detach().clone() for n, p in trainable_parameters(trainer.model).items()}
    trainer.train()
    trainer.save_model()
    assert getattr(trainer, "ref_model", None) is None

    for name, weight in frozen_weights(trainer.model).items():
        assert torch.equal(weight, frozen[name]), name
    whole = trainable_parameters(trainer.model)
    for name, weight in whole.items():
        assert not torch.equal(weight, begun[name]), name
        assert weight.dtype == begun[name].dtype, name
        is_factor = any(f".lora_{letter}." in name for letter in "ABE")
        if is_factor or changes.get("bf16"):
            continue
        assert weight.dtype == torch.float32, name  # not TRL's bfloat16
    if method in PAIRED:
        assert watcher.first_steps
        for logs in watcher.first_steps:
            assert logs["loss"] - logs.get("nll", 0.0) == pytest.approx(LN_2, abs=1e-5)
    assert_only_adapters_on_disk(tmp_path / "whole", trainer.model)

    parts = build(method, "parts", **{**changes, "callbacks": [Watcher(interrupts=True)]})
    with pytest.raises(KeyboardInterrupt):
        parts.train()
    assert list((tmp_path / "parts").rglob("checkpoint-1/adapter_model.safetensors"))
    assert_only_adapters_on_disk(tmp_path / "parts", trainer.model)
    resumed = build(method, "parts", **changes)
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in trainable_parameters(resumed.model).items():
        assert parameter.dtype == whole[name].dtype, name
        assert torch.equal(parameter, whole[name]), name
    if method == "QuietSTaR":
        return
    assert_loads_again(trainer, base_folder, quantization)
    shake(trainer.model)
    assert_sampled_as_generated(trainer)


FAST = ("SPIN", "QuietSTaR")
EVERY_METHOD = [m if m in FAST else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_a_4_bit_base_is_trained_through_adapters_alone(
    build, method, base_folder, tmp_path
) -> None:
    check(build, method, base_folder, tmp_path)


# By what else people set: precision of the computation, of the base, of the sums; adapters that aren't
# LoRA, or more than LoRA; which activations are kept.
VARIANTS = {
    "fp4": {"quantization": nf4(bnb_4bit_quant_type="fp4")},
    "8 bits": {"quantization": BitsAndBytesConfig(load_in_8bit=True)},
    "compute in bfloat16": {"quantization": nf4(bnb_4bit_compute_dtype=torch.bfloat16)},
    "all in bfloat16": {
        "quantization": nf4(bnb_4bit_compute_dtype=torch.bfloat16),
        "model_init_kwargs": {"dtype": "bfloat16"},
        "bf16": True,
    },
    "head saved": {"peft_config": lora(modules_to_save=["lm_head"])},
    "embeddings saved": {"peft_config": lora(modules_to_save=["embed_tokens"])},
    "tokens": {"peft_config": lora(trainable_token_indices=[3, 4, 5])},
    "ia3": {"peft_config": IA3Config(task_type="CAUSAL_LM")},
    "adalora": {
        "peft_config": AdaLoraConfig(init_r=4, target_r=2, total_step=99, target_modules=["q_proj"])
    },
    "some layers checkpointed": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"every_n_layers": 2},
    },
    "paged optimizer": {"optim": "paged_adamw_8bit"},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", FAST)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_what_else_people_set_on_a_quantized_base(
    build, method, variant, base_folder, tmp_path
) -> None:
    check(build, method, base_folder, tmp_path, **VARIANTS[variant])


@pytest.mark.parametrize("given", ["to the trainer", "in model_init_kwargs"])
def test_a_verifier_starts_from_an_adapter_merged_at_full_precision(
    build, base_folder, tmp_path, given
) -> None:
    """The folder of a generator's adapter; the merged weights are then quantized."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    adapted = get_peft_model(base, lora(init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "generator")
    AutoTokenizer.from_pretrained(base_folder).save_pretrained(tmp_path / "generator")
    how = {"quantization_config": nf4()}
    if given == "in model_init_kwargs":
        how = {"quantization_config": None, "model_init_kwargs": how}
    trainer = build("VSTaR", model=str(tmp_path / "generator"), **how)
    assert trainer.model.get_base_model().is_loaded_in_4bit
    merged = load_file(tmp_path / "run" / "merged" / "model.safetensors")
    for name, weight in adapted.merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged[name], weight)
    trainer.train()
