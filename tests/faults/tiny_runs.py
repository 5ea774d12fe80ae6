"""The trainers on tiny models, for tests that let something go wrong in real runs.

In: a method's name, a folder, a saved model of `save_source`. Out: a trainer, and what its run left. A run
takes about a second: a dozen sums, several shards of three prompts, a checkpoint at each step.
"""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_selfplay import (
    IRPOConfig,
    IRPOTrainer,
    QuietSTaRConfig,
    QuietSTaRTrainer,
    ReSTEMConfig,
    ReSTEMTrainer,
    SPINConfig,
    SPINTrainer,
    STaRConfig,
    STaRTrainer,
    VSTaRConfig,
    VSTaRTrainer,
)
from trl_selfplay.rollouts.record import Rollout, load_rollouts

METHODS = {
    "STaR": (STaRTrainer, STaRConfig),
    "ReST-EM": (ReSTEMTrainer, ReSTEMConfig),
    "SPIN": (SPINTrainer, SPINConfig),
    "IRPO": (IRPOTrainer, IRPOConfig),
    "V-STaR": (VSTaRTrainer, VSTaRConfig),  # from the samples of a finished run
    "Quiet-STaR": (QuietSTaRTrainer, QuietSTaRConfig),
}
_WORDS = [
    "<pad>",
    "<eos>",
    "<unk>",
    *map(str, range(10)),
    "+",
    "=",
    "?",
    "Q",
    "A",
    "yes",
    "no",
    "so",
]


def save_source(folder: Path) -> None:
    """Save a random model and its tokenizer of a token a word."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(_WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **special)
    config = LlamaConfig(
        vocab_size=len(_WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512, pad_token_id=0,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sums(count: int, first: int = 0) -> list[dict[str, str]]:
    """Return rows of additions."""
    pairs = [divmod(i, 10) for i in range(first, first + count)]
    return [{"prompt": f"Q {b} + {a} = ?", "solution": str((a + b) % 10)} for a, b in pairs]


def contains_solution(completions: Any, solution: Any, **kwargs: Any) -> list[float]:
    """Return 1.0 where the answer is among the words."""
    return [float(s in c.split()) for c, s in zip(completions, solution, strict=True)]


def build(
    method: str, folder: Path | str, source: Path | str, *, samples: Any = None, **changes: Any
) -> Any:
    """Return a trainer; keywords are fields of its config, or arguments of its constructor.

    Args:
        method: A key of `METHODS`.
        folder: The run's output directory.
        source: The folder of the model.
        samples: For V-STaR: the output directory of a finished run.
        **changes: Take the place of what is set here.
    """
    disable_progress_bars()
    trainer_class, config_class = METHODS[method]
    settings: dict[str, Any] = {
        "max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": [], "disable_tqdm": True, "gradient_checkpointing": False,
        "use_cpu": True, "bf16": False,
    }  # fmt: skip
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    arguments: dict[str, Any] = {"train_dataset": Dataset.from_list(sums(12)), "peft_config": lora}
    if method in ("STaR", "ReST-EM", "IRPO", "SPIN"):
        settings |= {"num_rounds": 2, "temperature": 1.0, "max_completion_length": 8}
        heldout = sums(4, first=90)
    if method in ("STaR", "ReST-EM", "IRPO"):
        settings |= {"num_generations": 4, "num_generations_eval": 2}
        arguments |= {"reward_funcs": contains_solution, "eval_dataset": Dataset.from_list(heldout)}
    if method == "IRPO":
        settings |= {"max_completion_length": 24, "max_per_prompt": 2}
    if method == "SPIN":
        rows = [{"prompt": r["prompt"], "completion": f" so {r['solution']}"} for r in sums(12)]
        heldout = [{"prompt": r["prompt"], "completion": f" so {r['solution']}"} for r in heldout]
        arguments |= {
            "train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(heldout),
        }  # fmt: skip
    if method == "V-STaR":
        arguments["samples"] = samples
    if method == "Quiet-STaR":
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(3, 20, (10,), generator=generator).tolist() for _ in range(16)]
        settings |= {"thought_length": 3, "num_ahead_tokens": 2, "thought_fraction": 0.6}
        arguments |= {"train_dataset": Dataset.from_dict({"input_ids": ids})}
    fields = config_class.__dataclass_fields__
    settings |= {name: value for name, value in changes.items() if name in fields}
    arguments |= {name: value for name, value in changes.items() if name not in fields}
    trainer = trainer_class(str(source), args=config_class(str(folder), **settings), **arguments)
    if method in ("STaR", "ReST-EM", "IRPO", "SPIN"):  # several shards of the dozen prompts
        sampler = trainer.self_play.collector.sampler
        sampler.suggest_batch_size = lambda longest_prompt, max_completion_length: 3
    return trainer


def samples_of(folder: Path | str) -> dict[str, list[Rollout]]:
    """Return the samples that a run has kept, by their file."""
    root = Path(folder) / "_rounds"
    paths = sorted(p for p in root.rglob("*.parquet") if p.parent.name in ("samples", "evaluation"))
    return {str(path.relative_to(root)): load_rollouts(path) for path in paths}


def outcome_of(folder: Path | str) -> dict[str, Any]:
    """Return what a finished run came to: samples, lines without their times, and weights."""
    folder = Path(folder)
    lines = folder / "_rounds" / "rounds.jsonl"
    texts = lines.read_text().splitlines() if lines.exists() else []
    weights = {
        f"{path.name}/{name}": weight.tolist()
        for path in sorted(folder.glob("*.safetensors"))
        for name, weight in load_file(path).items()
    }
    return {
        "samples": samples_of(folder),
        "lines": [{k: v for k, v in json.loads(t).items() if k != "seconds"} for t in texts],
        "weights": weights,
    }
