"""Quiet-STaR's demo: follow pointers through a map, which takes more steps than the model has layers.

In: a seed. Out: lines of text, and a tiny model that was pre-trained on lines of which some show
the steps. How it is scored is in pointer_scores.py.
"""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

NODES = ("a", "b", "c", "d", "e", "f")
HOPS = (1, 2, 3, 4)
# Nodes whose pointers are followed in each line.
STARTS = ("a", "b", "c")
# What stands between two dashes of a pre-training line: the steps, or words that don't help.
REMARK_LENGTH = 4
IDLE_WORDS = ("hm", "well", "so", "now")
# The dashes that begin and end a remark are also what thoughts begin with.
DASHES = "---"
PAUSE = "…"
_SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
_SIGNS = ("?", "=", ",", ".", ";", "_", DASHES, PAUSE)


@dataclass(frozen=True, slots=True)
class Remarks:
    """How often pre-training lines say something before their answers, and what.

    Attributes:
        shown: Share of the lines that have remarks before each answer.
        steps: Share of the remarks that are the steps; the others don't help.
    """

    shown: float = 0.7
    steps: float = 0.5


# The tiny model, LlamaConfig's fields. Weights begin wider than the usual 0.02, with which a model
# of this width takes far longer to learn a lookup.
MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
PRETRAINING: dict[str, Any] = {
    "max_steps": 1200,
    "per_device_train_batch_size": 64,
    "learning_rate": 4e-3,
    "warmup_steps": 50,
    "logging_steps": 250,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
SETTINGS: dict[str, Any] = {
    "output_dir": "quiet-star-demo",
    "thought_length": REMARK_LENGTH,
    "num_thoughts": 2,
    "num_ahead_tokens": 1,
    "max_steps": 300,
    "per_device_train_batch_size": 32,
    "learning_rate": 1e-3,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": [],
    "gradient_checkpointing": False,
    # A model of this size is as fast without a GPU, and is pre-trained in the same process.
    "use_cpu": True,
    "bf16": False,
}
# A step of these takes 25 s on one CPU core.
_SMOLLM2_SETTINGS: dict[str, Any] = {
    "output_dir": "quiet-star-smollm2",
    "use_cpu": False,
    "bf16": None,
    "max_steps": 36,
    "per_device_train_batch_size": 4,
    "logging_steps": 4,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
}
_SMOKE_SETTINGS: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4}
NUM_PRETRAINING, NUM_TRAIN, NUM_HELD_OUT = 20_000, 10_000, 300
# Seeds of runs are small numbers; these keep their lines apart.
_PRETRAINING_SEED, _HELD_OUT_SEED = 1_000_000, 2_000_000
REMARKS = Remarks()


def build_tokenizer() -> Any:
    """Return a tokenizer with a token for each word of the lines, 28 in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL.values(), *NODES, *map(str, HOPS), *_SIGNS, *IDLE_WORDS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_SPECIAL)


def build_lines(count: int, seed: int, remarks: Remarks | None = None) -> list[dict[str, Any]]:
    """Return lines such as "b f ; f a ; … ? 2" and " a = f , b = a , c = e .".

    The pointers of a line form one cycle through all nodes, so no node leads back to itself in
    less than `len(NODES)` steps.

    Args:
        count: Lines.
        seed: The same seed gives the same lines.
        remarks: Of pre-training; None for lines that show no steps.

    Returns:
        Rows with `prompt`, `completion`, `hops` and `steps`, the helpful remark of each answer.
    """
    rng = random.Random(seed)
    return [_build_line(rng, remarks) for _ in range(count)]


def _build_line(rng: random.Random, remarks: Remarks | None) -> dict[str, Any]:
    cycle = rng.sample(NODES, len(NODES))
    target = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    hops = rng.choice(HOPS)
    pairs = [f"{node} {target[node]}" for node in rng.sample(NODES, len(NODES))]
    shows = remarks is not None and rng.random() < remarks.shown
    parts, steps = [], []
    for start in STARTS:
        visited = [start]
        for _ in range(hops):
            visited.append(target[visited[-1]])
        steps.append(" ".join([*visited[1:], *["_"] * (REMARK_LENGTH - hops)]))
        remark = ""
        if shows and remarks is not None:
            helps = rng.random() < remarks.steps
            words = steps[-1] if helps else " ".join(rng.choices(IDLE_WORDS, k=REMARK_LENGTH))
            remark = f" {DASHES} {words} {DASHES}"
        parts.append(f" {start} ={remark} {visited[-1]}")
    return {
        "prompt": f"{' ; '.join(pairs)} ? {hops}",
        "completion": f"{' ,'.join(parts)} .",
        "hops": hops,
        "steps": steps,
    }


def pretrain(folder: str | Path, seed: int, smoke: bool = False) -> None:
    """Pre-train the tiny model on lines of which some have remarks, and save it with its tokenizer.

    A folder that holds a model already is left as it is.

    Args:
        folder: Where to.
        seed: Of weights and lines.
        smoke: Train for a few steps, which teach it nothing.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        return
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **MODEL)).float()
    settings = PRETRAINING | ({"max_steps": 3} if smoke else {})
    count = 512 if smoke else NUM_PRETRAINING
    lines = build_lines(count, _PRETRAINING_SEED + seed, REMARKS)
    with tempfile.TemporaryDirectory() as temporary:
        trainer = SFTTrainer(
            model,
            SFTConfig(temporary, seed=seed, **settings),
            train_dataset=token_rows(tokenizer, lines),
            processing_class=tokenizer,
        )
        trainer.train()
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def token_rows(tokenizer: Any, lines: Sequence[dict[str, Any]]) -> Dataset:
    """Return lines as `input_ids` and `labels`, of which only completions have any."""
    rows = []
    for line in lines:
        prompt, completion = (tokenizer(line[k])["input_ids"] for k in ("prompt", "completion"))
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return Dataset.from_list(rows)


def heldout_lines(count: int, seed: int) -> list[dict[str, Any]]:
    """Return lines whose prompts a seed's model meets neither in pre-training nor in training."""
    pretraining = build_lines(NUM_PRETRAINING, _PRETRAINING_SEED + seed, REMARKS)
    seen = {line["prompt"] for line in (*pretraining, *build_lines(NUM_TRAIN, seed))}
    lines = build_lines(2 * count, _HELD_OUT_SEED + seed)
    return [line for line in lines if line["prompt"] not in seen][:count]


def pointer_split(seed: int, smoke: bool = False) -> tuple[Dataset, Dataset, list[dict[str, Any]]]:
    """Return lines to train on and held-out ones as datasets, and the held-out ones with their hops.

    No line shows its steps. Columns: `prompt` and `completion`.
    """
    lines = build_lines(64 if smoke else NUM_TRAIN, seed)
    heldout = heldout_lines(16 if smoke else NUM_HELD_OUT, seed)
    train, test = (
        Dataset.from_list([{k: line[k] for k in ("prompt", "completion")} for line in part])
        for part in (lines, heldout)
    )
    return train, test, heldout


def recipe_defaults(smoke: bool = False, smollm2: bool = False) -> dict[str, Any]:
    """Return the demo's settings under the names of a recipe's flags, to be its defaults."""
    return SETTINGS | (_SMOLLM2_SETTINGS if smollm2 else {}) | (_SMOKE_SETTINGS if smoke else {})
