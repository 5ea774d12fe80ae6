"""The trainers on tiny models, for tests that let something go wrong in real runs.

In: a method's name, a folder, a model, often one of `save_tiny_model`. Out: a trainer, and what its run left. A run
takes about a second: a dozen sums, several shards of three prompts, a checkpoint at each step.
"""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_models import sum_rows
from tiny_rewards import contains_solution
from tiny_trainers import GRADED, SMALL, build_trainer

from trl_selfplay.rollouts.record import Rollout, load_rollouts

_ROUNDS = {"num_rounds": 2, "temperature": 1.0, "max_completion_length": 8}
_GENERATIONS = {"num_generations": 4, "num_generations_eval": 2}


def lora() -> LoraConfig:
    """Return the adapters of a run."""
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


def pairs_of(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return SPIN's rows with the answers as completions."""
    return [{"prompt": r["prompt"], "completion": f" so {r['solution']}"} for r in rows]


def build(method: str, folder: Path | str, model: Any, **changes: Any) -> Any:
    """Return a trainer.

    Args:
        method: A key of `tiny_trainers.METHODS`.
        folder: The run's output directory.
        model: The model, or its folder.
        **changes: Fields of the config, and arguments of the constructor: in the place of what is set here,
            or, for V-STaR, `samples`, the output directory of a finished run.
    """
    disable_progress_bars()
    given: dict[str, Any] = {"save_steps": 1, "bf16": False, "peft_config": lora()}
    rows, heldout = sum_rows(12), sum_rows(4, first=90)
    if method == "SPIN":
        rows, heldout = pairs_of(rows), pairs_of(heldout)
    given["train_dataset"] = Dataset.from_list(rows)
    plays = method in (*GRADED, "SPIN")
    if plays:
        given |= {**_ROUNDS, "eval_dataset": Dataset.from_list(heldout)}
    if method in GRADED:
        given |= {**_GENERATIONS, "reward_funcs": contains_solution}
    if method == "IRPO":
        given |= {"max_completion_length": 24, "max_per_prompt": 2}
    if method == "Quiet-STaR":
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(3, 20, (10,), generator=generator).tolist() for _ in range(16)]
        given |= {"thought_length": 3, "num_ahead_tokens": 2, "thought_fraction": 0.6}
        given["train_dataset"] = Dataset.from_dict({"input_ids": ids})
    if isinstance(model, Path):
        model = str(model)
    trainer = build_trainer(method, model, folder, SMALL, **{**given, **changes})
    if plays:  # several shards of the dozen prompts
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
