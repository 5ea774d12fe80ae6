"""Tiny runs of every trainer, in a process of their own that may be ended at any event.

In: a folder with what all runs share (`write_inputs`), and the name of a run in `RUNS`. Out: the
run's output directory, and the log of its events beside it.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from bigram_policy import TEXT_STEPS, bigram_model, word_tokenizer
from datasets import Dataset
from fault_events import Events, Fault
from peft import LoraConfig
from plain_tools import add
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import chat_template_utils

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
from trl_selfplay.rewards import JudgeReward
from trl_selfplay.rollouts import rendering

_SETTINGS: dict[str, Any] = {
    "max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
    "report_to": [], "disable_tqdm": True, "gradient_checkpointing": False, "use_cpu": True,
    "logging_steps": 1,
}  # fmt: skip
_ROUNDS = {"num_rounds": 2, "temperature": 1.0, "load_best_round_at_end": False}
_GRADED = {"num_generations": 4, "max_completion_length": 8, "num_generations_eval": 2}
# Single digits are words of the tokenizer.
DATED_TEMPLATE = (
    "{{ strftime_now('%-d') }} {% for m in messages %}{{ m['content'] }} "
    "{% if m['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
)
_SCORED_AMID_TRAINING = {"eval_strategy": "steps", "eval_steps": 2}


def write_inputs(folder: Path, model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> None:
    """Save what all runs read: a model with its tokenizer, a reward model, the rows."""
    for name, saved in (("model", model), ("scorer", _reward_model(tokenizer))):
        saved.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "rows.json").write_text(json.dumps(rows))


def write_tiny_inputs(folder: Path) -> None:
    """Save inputs where there are no fixtures: a random model of 21 words, and 16 sums."""
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    words = [*special.values(), *map(str, range(10)), "+", "=", "?", "Q", "A", "yes", "no", "so"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, padding_side="left", **special
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    sums = [
        {"prompt": f"Q {i % 10} + {i // 10} = ?", "solution": str(i % 10 + i // 10)}
        for i in range(16)
    ]
    folder.mkdir()
    write_inputs(folder, LlamaForCausalLM(config).float(), tokenizer, sums)


def _reward_model(tokenizer: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def run(folder: str, name: str, inputs: str, fault: Fault | None) -> None:
    """Run, or go on with, a run in `folder`; end where `fault` says."""
    os.setpgid(0, 0)  # a signal to the group ends this process and its children alone
    output, source = Path(folder), Path(inputs)
    events = Events(output, output.with_name(f"{output.name}.events"), fault)
    rows = json.loads((source / "rows.json").read_text())
    trainer = RUNS[name](folder, source, rows, events)
    events.watch(trainer)
    trainer.train(resume_from_checkpoint=True)
    if not hasattr(trainer, "self_play"):
        trainer.save_model(folder)
    events.happen("done")


def _lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


def _names_solution(completions: Any, solution: list[str], **kwargs: Any) -> list[float]:
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(s in text.split()) for text, s in zip(texts, solution, strict=True)]


def _sets(rows: Any) -> dict[str, Dataset]:
    return {
        "train_dataset": Dataset.from_list(rows[:12]), "eval_dataset": Dataset.from_list(rows[12:])
    }  # fmt: skip


def _build_star(folder: str, inputs: Path, rows: Any, events: Events, **changes: Any) -> Any:
    settings = {**_SETTINGS, **_ROUNDS, **_GRADED, **_SCORED_AMID_TRAINING, **changes}
    reward = events.watch_reward(_names_solution)
    functions: Any = reward
    if "reward_weights" in changes:
        judge = JudgeReward(  # a random model names no tag: any number counts
            "policy", template="{prompt} {completion} so", verdict=r".*?(\d).*", scale=(0, 9),
            temperature=1.0, max_completion_length=40,
        )  # fmt: skip
        functions = [reward, judge]
    trainer = STaRTrainer(
        str(inputs / "model"), STaRConfig(folder, **settings), **_sets(rows),
        reward_funcs=functions, peft_config=_lora(),
    )  # fmt: skip
    return _in_small_shards(trainer)


def _build_judged_star(folder: str, inputs: Path, rows: Any, events: Events) -> Any:
    weights = {"reward_weights": [1.0, 0.5], "reward_threshold": 0.4}
    return _build_star(folder, inputs, rows, events, **weights)


def _build_dated_star(folder: str, inputs: Path, rows: Any, events: Events) -> Any:
    """Build a run in chat whose template prints the day, and let each process have another day."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime(2026, 11, events.process_number)

    rendering.datetime = chat_template_utils.datetime = Clock  # type: ignore[misc]
    chats = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    tokenizer.chat_template = DATED_TEMPLATE
    trainer = STaRTrainer(
        str(inputs / "model"), STaRConfig(folder, **_SETTINGS, **_ROUNDS, **_GRADED), **_sets(chats),
        reward_funcs=events.watch_reward(_names_solution), peft_config=_lora(),
        processing_class=tokenizer,
    )  # fmt: skip
    return _in_small_shards(trainer)


def _build_rest_em(folder: str, inputs: Path, rows: Any, events: Events) -> Any:
    settings = {**_SETTINGS, **_ROUNDS, **_GRADED, "start_from": "base"}
    trainer = ReSTEMTrainer(
        str(inputs / "model"), ReSTEMConfig(folder, **settings), **_sets(rows),
        reward_funcs=events.watch_reward(_names_solution),
    )  # fmt: skip
    return _in_small_shards(trainer)


def _build_with_tools(folder: str, inputs: Path, rows: Any, events: Events) -> Any:
    tokenizer = word_tokenizer()
    settings = {**_SETTINGS, **_ROUNDS, **_GRADED, "max_completion_length": 40, "bf16": False}
    trainer = ReSTEMTrainer(
        bigram_model(tokenizer, TEXT_STEPS), ReSTEMConfig(folder, **settings), **_sets(rows),
        processing_class=tokenizer, reward_funcs=events.watch_reward(_says_yes), tools=[add],
    )  # fmt: skip
    sampler = trainer.self_play.collector.sampler
    sample = sampler.sample

    def without_log_probs(requests: Any, options: Any, *more: Any) -> Any:
        # Their last bits depend on what is decoded together, and that on when results of tools come.
        return sample(requests, replace(options, return_logprobs=False), *more)

    sampler.sample = without_log_probs
    return _in_small_shards(trainer)


def _says_yes(completions: Any, **kwargs: Any) -> list[float]:
    return [float(text.endswith("yes")) for text in completions]


def _build_teacher(folder: str, inputs: Path, rows: Any, events: Events) -> Any:
    settings = {**_SETTINGS, **_ROUNDS, **_GRADED, "num_rounds": 1}
    trainer = ReSTEMTrainer(
        str(inputs / "model"), ReSTEMConfig(folder, **settings), **_sets(rows),
        reward_funcs=events.watch_reward(_names_solution),
        student_model=str(inputs / "model"), student_peft_config=_lora(),
    )  # fmt: skip
    return _in_small_shards(trainer)


def _build_rest(folder: str, inputs: Path, rows: Any, events: Events) -> Any:
    settings = {
        **_SETTINGS, **_ROUNDS, **_GRADED, "num_rounds": 1, "improve_thresholds": [25.0, 60.0],
        "threshold_kind": "percentile", "start_from": "previous", "reward_weights": [1.0, 0.0],
        "top_k": 0,
    }  # fmt: skip
    trainer = ReSTEMTrainer(
        str(inputs / "model"), ReSTEMConfig(folder, **settings), **_sets(rows),
        reward_funcs=[str(inputs / "scorer"), events.watch_reward(_names_solution)],
        peft_config=_lora(),
    )  # fmt: skip
    return _in_small_shards(trainer)


def _build_irpo(folder: str, inputs: Path, rows: Any, events: Events) -> Any:
    settings = {
        **_SETTINGS, **_ROUNDS, **_GRADED, **_SCORED_AMID_TRAINING, "max_completion_length": 32,
        "max_per_prompt": 2,
    }  # fmt: skip
    trainer = IRPOTrainer(
        str(inputs / "model"), args=IRPOConfig(folder, **settings), **_sets(rows),
        reward_funcs=events.watch_reward(_names_solution), peft_config=_lora(),
    )  # fmt: skip
    return _in_small_shards(trainer)


def _build_spin(folder: str, inputs: Path, rows: Any, events: Events) -> Any:
    pairs = [{"prompt": row["prompt"], "completion": f" so {row['solution']}"} for row in rows]
    settings = {**_SETTINGS, **_ROUNDS, "max_completion_length": 16}
    trainer = SPINTrainer(
        str(inputs / "model"), args=SPINConfig(folder, **settings), **_sets(pairs),
        peft_config=_lora(),
    )  # fmt: skip
    return _in_small_shards(trainer)


def _build_v_star(folder: str, inputs: Path, rows: Any, events: Events) -> Any:
    trainer = VSTaRTrainer(
        str(inputs / "star"), args=VSTaRConfig(folder, **_SETTINGS),
        train_dataset=Dataset.from_list(rows[:12]), samples=str(inputs / "star"),
        peft_config=_lora(),
    )  # fmt: skip
    return trainer


def _build_quiet_star(folder: str, inputs: Path, rows: Any, events: Events) -> Any:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 20, (10,), generator=generator).tolist() for _ in range(16)]
    settings = {
        **_SETTINGS, "bf16": False, "thought_length": 3, "num_ahead_tokens": 2,
        "thought_fraction": 0.6,
    }  # fmt: skip
    trainer = QuietSTaRTrainer(
        str(inputs / "model"), QuietSTaRConfig(folder, **settings),
        train_dataset=Dataset.from_dict({"input_ids": texts}), peft_config=_lora(),
    )  # fmt: skip
    with torch.no_grad():
        trainer.causal_lm.quiet_star.head[-1].weight.fill_(0.02)
    return trainer


def _in_small_shards(trainer: Any) -> Any:
    """Make several shards of a dozen prompts."""
    sampler = trainer.self_play.collector.sampler
    sampler.suggest_batch_size = lambda longest_prompt, max_completion_length: 3
    return trainer


# V-STaR reads a STaR run in the folder `star` of the inputs.
RUNS: dict[str, Callable[[str, Path, Any, Events], Any]] = {
    "STaR": _build_star,
    "judged STaR": _build_judged_star,
    "dated STaR": _build_dated_star,
    "ReST^EM": _build_rest_em,
    "ReST^EM with tools": _build_with_tools,
    "student": _build_teacher,
    "ReST": _build_rest,
    "IRPO": _build_irpo,
    "SPIN": _build_spin,
    "V-STaR": _build_v_star,
    "Quiet-STaR": _build_quiet_star,
}
