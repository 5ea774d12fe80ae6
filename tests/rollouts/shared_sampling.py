"""Sampling that several processes share, in processes of its own."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_selfplay.generation.sampler import SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.collection import Collector
from trl_selfplay.rollouts.prompts import load_prompt_rows
from trl_selfplay.rollouts.shards import Assignment
from trl_selfplay.tools.record import Reply, ToolCall
from trl_selfplay.tools.tool_set import ToolSet
from trl_selfplay.tools.trajectories import Trajectories

OPTIONS = SamplingOptions(6, temperature=1.0, eos_token_ids=(1,), return_logprobs=True)
# The number of prompts, their phase, and whether the samples are kept on disk.
CASES: dict[str, tuple[int, Any, bool]] = {
    "many prompts": (20, "train", True),
    "fewer prompts than processes": (2, "train", True),
    "one prompt": (1, "train", True),
    "hints": (5, "hint", True),
    "held-out": (7, "eval", True),
    "judge": (7, "judge", True),
    "no folder": (20, "eval", False),
    "one prompt, no folder": (1, "eval", False),
    "with a tool": (20, "train", True),
}


def count(number: int) -> str:
    """Return the number after this one.

    Args:
        number: Any.
    """
    return str(number + 1)


class EachTurnCalls:
    """A dialogue for a model that calls nothing of its own accord."""

    stop_strings = ()

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def read(self, turn_ids: Any, prefix_ids: Any, schemas: Any) -> Reply:
        call = ToolCall("count", {"number": len(turn_ids)})
        return Reply({"role": "assistant", "content": "a turn"}, (call,))

    def observation_ids(self, turn_ids: Any, results: Any) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(results[0].content, add_special_tokens=False))


class SilentProgress:
    """Adds up what it is told."""

    def __init__(self, total: float) -> None:
        self.total, self.done = total, 0

    def expect(self, num_more: float) -> None:
        self.total += num_more

    def decode(self, num_tokens: int) -> None:
        pass

    def update(self, num_samples: int, num_tokens: int, restored: bool = False) -> None:
        self.done += num_samples

    def set_solved(self, share: float) -> None:
        pass

    def set_abstained(self, count: int, cause: str | None) -> None:
        pass


def has_a_digit(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(any(w.isdigit() for w in c.split())) for c in completions]


def has_yes(completions: list[str], **kwargs: Any) -> list[float]:
    return [float("yes" in c.split()) for c in completions]


def build_collector(model: str, **changes: Any) -> Collector:
    tokenizer = AutoTokenizer.from_pretrained(model)
    sampler: Any = TransformersSampler(AutoModelForCausalLM.from_pretrained(model), tokenizer)
    sampler.suggest_batch_size = lambda *_: 3
    parts = {"scorer": Scorer(has_a_digit), "eval_scorer": Scorer(has_yes), **changes}
    return Collector(
        sampler=sampler, tokenizer=tokenizer, accelerator=Accelerator(cpu=True), seed=1, **parts
    )


def collect(collector: Collector, count: int, phase: Any, folder: Path | None) -> tuple[Any, Any]:
    data = [{"prompt": f"Q {a} + {b} = ?", "solution": "1"} for a in range(5) for b in range(4)]
    rows = load_prompt_rows(Dataset.from_list(data[:count]), "d")
    assignments = [
        Assignment(r, tuple(collector.tokenizer(r.prompt)["input_ids"]), (0, 1, 2)) for r in rows
    ]
    progress = SilentProgress(3 * count / collector.accelerator.num_processes)
    where = {"round_index": 0, "phase": phase, "folder": folder, "progress": progress}
    return collector.collect(assignments, OPTIONS, **where), progress


def run_cases(model: str, folder: str) -> None:
    """Sample all cases, and write down what this process gets and has sampled itself."""
    collector = build_collector(model)
    dialogue = EachTurnCalls(collector.tokenizer)
    calling = replace(collector, trajectories=Trajectories(ToolSet([count], 60.0), dialogue, 2))
    found = {}
    for name, (num_prompts, phase, is_kept) in CASES.items():
        where = Path(folder) / name if is_kept else None
        sampling = calling if name == "with a tool" else collector
        rollouts, progress = collect(sampling, num_prompts, phase, where)
        assert progress.total == progress.done
        found[name] = (list(rollouts), progress.done)
    rank = collector.accelerator.process_index
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    collector.accelerator.end_training()


def hold_one_up(model: str, folder: str) -> None:
    """Sample in two processes, of which one waits in its first shard until all others are there."""
    collector = build_collector(model)
    sampler, sample = collector.sampler, collector.sampler.sample
    is_slow = os.environ["RANK"] == "1"

    def sample_late(*arguments: Any) -> Any:
        for _ in range(30_000):
            if len([*Path(folder).glob("0*.parquet")]) >= 4:
                break
            Event().wait(0.02)
        else:
            raise TimeoutError("the other process doesn't take all other shards")
        return sample(*arguments)

    if is_slow:
        sampler.sample = sample_late  # type: ignore[method-assign]
    collect(collector, 20, "train", Path(folder))
    collector.accelerator.end_training()
