"""Tiny runs of every trainer, in a process of their own that may be ended at any event.

In: a folder with what all runs share (`write_inputs`), and the name of a run in `RUNS`. Out: the
run's output directory, and the log of its events beside it.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bigram_policy import TEXT_STEPS, bigram_model, word_tokenizer
from datasets import Dataset
from fact_agent import FactAgent, questions
from fault_events import Events, Fault
from plain_tools import add
from tiny_models import save_tiny_model, sum_rows
from tiny_rewards import contains_solution
from tiny_runs import build, lora, pairs_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from transformers.utils import chat_template_utils

from trl_selfplay.rewards import JudgeReward
from trl_selfplay.rollouts import rendering

_ROWS = sum_rows(16)
# Single digits are words of the tokenizer.
DATED_TEMPLATE = (
    "{{ strftime_now('%-d') }} {% for m in messages %}{{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
_SCORED_AMID_TRAINING = {"eval_strategy": "steps", "eval_steps": 2}


def write_inputs(folder: Path) -> None:
    """Save what all runs read: a model with its tokenizer, and a reward model."""
    save_tiny_model(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder / "scorer")
    tokenizer.save_pretrained(folder / "scorer")


def run(folder: str, name: str, inputs: str, fault: Fault | None) -> None:
    """Run, or go on with, a run in `folder`; end where `fault` says."""
    os.setpgid(0, 0)  # a signal to the group ends this process and its children alone
    output = Path(folder)
    events = Events(output, output.with_name(f"{output.name}.events"), fault)
    trainer = RUNS[name](output, Path(inputs), events)
    events.watch(trainer)
    trainer.train(resume_from_checkpoint=True)
    if not hasattr(trainer, "self_play"):
        trainer.save_model(folder)
    events.happen("done")


def _build(method: str, folder: Path, inputs: Path, events: Events, **changes: Any) -> Any:
    """Build a run over rounds; `changes` as for `tiny_runs.build`, and `model`."""
    given = {"max_steps": 4, "load_best_round_at_end": False, **_sets(_ROWS), **changes}
    if method != "SPIN":
        given = {"reward_funcs": events.watch_reward(contains_solution), **given}
    return build(method, folder, given.pop("model", inputs / "model"), **given)


def _sets(rows: Any) -> dict[str, Dataset]:
    return {
        "train_dataset": Dataset.from_list(rows[:12]), "eval_dataset": Dataset.from_list(rows[12:])
    }  # fmt: skip


def _build_judged_star(folder: Path, inputs: Path, events: Events) -> Any:
    judge = JudgeReward(  # a random model names no tag: any number counts
        "policy", template="{prompt} {completion} so", verdict=r".*?(\d).*", scale=(0, 9),
        temperature=1.0, max_completion_length=40,
    )  # fmt: skip
    return _build(
        "STaR", folder, inputs, events, reward_weights=[1.0, 0.5], reward_threshold=0.4,
        reward_funcs=[events.watch_reward(contains_solution), judge], **_SCORED_AMID_TRAINING,
    )  # fmt: skip


def _build_dated_star(folder: Path, inputs: Path, events: Events) -> Any:
    """Build a run in chat whose template prints the day, and let each process have another day."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2026, 11, events.process_number)

    rendering.datetime = chat_template_utils.datetime = Clock  # type: ignore[misc]
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in _ROWS]
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    tokenizer.chat_template = DATED_TEMPLATE
    return _build("STaR", folder, inputs, events, processing_class=tokenizer, **_sets(chats))


def _build_with_tools(folder: Path, inputs: Path, events: Events) -> Any:
    tokenizer = word_tokenizer()
    trainer = _build(
        "ReST^EM", folder, inputs, events, model=bigram_model(tokenizer, TEXT_STEPS), tools=[add],
        max_completion_length=40, processing_class=tokenizer, peft_config=None,
        reward_funcs=events.watch_reward(_says_yes),
    )  # fmt: skip
    sampler = trainer.self_play.collector.sampler
    sample = sampler.sample

    def without_log_probs(requests: Any, options: Any, *more: Any) -> Any:
        # Their last bits depend on what is decoded together, and that on when results of tools come.
        return sample(requests, replace(options, return_logprobs=False), *more)

    sampler.sample = without_log_probs
    return trainer


def _build_agent(folder: Path, inputs: Path, events: Events) -> Any:
    return _build(
        "ReST^EM", folder, inputs, events, agent=FactAgent(), num_generations=2, reward_funcs=None,
        max_completion_length=16, train_dataset=questions(), eval_dataset=None,
    )  # fmt: skip


def _says_yes(completions: Any, **kwargs: Any) -> list[float]:
    return [float(text.endswith("yes")) for text in completions]


def _build_teacher(folder: Path, inputs: Path, events: Events) -> Any:
    return _build(
        "ReST^EM", folder, inputs, events, num_rounds=1, peft_config=None,
        student_model=str(inputs / "model"), student_peft_config=lora(),
    )  # fmt: skip


def _build_rest(folder: Path, inputs: Path, events: Events) -> Any:
    return _build(
        "ReST^EM", folder, inputs, events, num_rounds=1, improve_thresholds=[25.0, 60.0],
        threshold_kind="percentile", start_from="previous", reward_weights=[1.0, 0.0], top_k=0,
        reward_funcs=[str(inputs / "scorer"), events.watch_reward(contains_solution)],
    )  # fmt: skip


def _build_v_star(folder: Path, inputs: Path, events: Events) -> Any:
    return build("V-STaR", folder, inputs / "star", max_steps=4, samples=str(inputs / "star"))


def _build_quiet_star(folder: Path, inputs: Path, events: Events) -> Any:
    trainer = build("Quiet-STaR", folder, inputs / "model", max_steps=4)
    with torch.no_grad():
        trainer.causal_lm.quiet_star.head[-1].weight.fill_(0.02)
    return trainer


# V-STaR reads a STaR run in the folder `star` of the inputs.
RUNS: dict[str, Callable[[Path, Path, Events], Any]] = {
    "STaR": partial(_build, "STaR", **_SCORED_AMID_TRAINING),
    "judged STaR": _build_judged_star,
    "dated STaR": _build_dated_star,
    "ReST^EM": partial(_build, "ReST^EM", start_from="base", peft_config=None),
    "ReST^EM with tools": _build_with_tools,
    "agent": _build_agent,
    "student": _build_teacher,
    "ReST": _build_rest,
    "IRPO": partial(_build, "IRPO", max_completion_length=32, **_SCORED_AMID_TRAINING),
    "SPIN": partial(_build, "SPIN", max_completion_length=16, **_sets(pairs_of(_ROWS))),
    "V-STaR": _build_v_star,
    "Quiet-STaR": _build_quiet_star,
}
