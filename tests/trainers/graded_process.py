"""A run of two rounds in a process of its own: `graded_process.py METHOD MODEL FOLDER CHANGES`.

METHOD is "STaR", "IRPO", "ReST^EM", "ReST", "judged ReST", whose policy judges too, or "vote", ReST^EM
by majority votes. CHANGES are fields of the config in JSON, and `adapters`: false trains all weights.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig

from trl_selfplay import (
    IRPOConfig,
    IRPOTrainer,
    ReSTEMConfig,
    ReSTEMTrainer,
    STaRConfig,
    STaRTrainer,
)
from trl_selfplay.rewards import JudgeReward, VoteReward
from trl_selfplay.rollouts.record import Rollout, load_rollouts

_CLASSES: dict[str, Any] = {
    "STaR": (STaRTrainer, STaRConfig),
    "IRPO": (IRPOTrainer, IRPOConfig),
}


def reward(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
    pairs = zip(completions, solution, strict=True)
    return [len(c) % 4 / 8 + float(s in c.split()) for c, s in pairs]


def main(
    method: str, model: str, folder: str, changes: str, prepare: Callable[[Any], None] | None = None
) -> None:
    """Train on the same rows however many processes there are; `prepare` gets the trainer before."""
    trainer_class, config_class = _CLASSES.get(method, (ReSTEMTrainer, ReSTEMConfig))
    settings = json.loads(changes)
    adapters = settings.pop("adapters", True)
    pairs = [divmod(i, 10) for i in range(18)]
    rows = [{"prompt": f"Q {a} + {b} = ?", "solution": str((a + b) % 10)} for a, b in pairs]
    worked = [{**row, "completion": f"so {row['solution']}"} for row in rows[:14]]
    gold = {"gold_dataset": Dataset.from_list(worked)} if method.endswith("ReST") else {}
    judge = JudgeReward(  # a random model names no tag: any number counts
        "policy", template="{prompt} {completion} so", verdict=r".*?(\d).*", scale=(0, 9),
        temperature=1.0, max_completion_length=40,
    )  # fmt: skip
    grading: dict[str, Any] = {"reward_funcs": reward}
    if method == "vote":
        votes = VoteReward(0.0, normal_form=lambda text: len(text) % 3)
        grading = {"reward_funcs": votes, "eval_reward_funcs": reward}
    if method.startswith("judged"):
        grading = {"reward_funcs": [reward, judge]}
    trainer: Any = trainer_class(
        model,
        args=config_class(
            folder, num_generations=6, temperature=1.0, top_k=0, max_steps=2,
            # Two processes take two rows each where one takes them in two passes.
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2 // int(os.environ.get("WORLD_SIZE", "1")),
            learning_rate=0.5, optim="sgd", report_to=[], disable_tqdm=True,
            gradient_checkpointing=False, seed=1, load_best_round_at_end=False,
            **{"num_rounds": 2, "use_cpu": True, **settings},
        ),
        train_dataset=Dataset.from_list(rows[:14]),
        eval_dataset=Dataset.from_list(rows[14:]),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if adapters else None,
        **grading,
        **gold,
    )  # fmt: skip
    trainer.self_play.collector.sampler.suggest_batch_size = lambda *lengths: 3
    if prepare is not None:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=(Path(folder) / "_rounds").exists() or None)
    trainer.end()


def samples_of_round_0(folder: Path) -> list[Rollout]:
    """Return what a run sampled before its first training.

    Without log-probs, whose last bits depend on the rows of a batch.
    """
    paths = sorted((folder / "_rounds" / "round-000" / "samples").glob("*.parquet"))
    return [replace(r, logprob=None) for path in paths for r in load_rollouts(path)]


if __name__ == "__main__":
    main(*sys.argv[1:])
