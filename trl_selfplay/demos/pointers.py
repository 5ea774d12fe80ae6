"""Quiet-STaR's demo: follow pointers through a map for more steps than the model has layers.

In: a seed. Out: lines of text, and a tiny model pre-trained on lines some of which show the steps.
pointer_scores.py scores it.
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
# Each line follows the pointers from these nodes.
STARTS = ("a", "b", "c")
# Length of the remarks between dashes in pre-training lines: the steps, or idle words.
REMARK_LENGTH = 4
IDLE_WORDS = ("hm", "well", "so", "now")
# Dashes enclose a remark; the start and end of a thought are initialized to their embedding.
DASHES = "---"
PAUSE = "…"
_SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
_SIGNS = ("?", "=", ",", ".", ";", "_", DASHES, PAUSE)


@dataclass(frozen=True, slots=True)
class Remarks:
    """How many pre-training lines have remarks before their answers, and of which kind.

    Attributes:
        shown: Share of lines with a remark before each answer.
        steps: Share of remarks that show the steps; the others are idle words.
    """

    shown: float = 0.7
    steps: float = 0.5


# LlamaConfig's fields for the tiny model. At the usual initializer_range of 0.02, a model of this
# width takes far longer to learn a lookup.
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
NUM_PRETRAINING, NUM_TRAIN, NUM_HELD_OUT = 20_000, 10_000, 300
# Run seeds are small numbers; these offsets keep the lines of the three sets apart.
_PRETRAINING_SEED, _HELD_OUT_SEED = 1_000_000, 2_000_000
REMARKS = Remarks()


def build_tokenizer() -> Any:
    """Return a tokenizer with one token per word, 28 in all."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*_SPECIAL.values(), *NODES, *map(str, HOPS), *_SIGNS, *IDLE_WORDS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_SPECIAL)


def build_lines(count: int, seed: int, remarks: Remarks | None = None) -> list[dict[str, Any]]:
    """Return lines such as "b f ; f a ; … ? 2" and " a = f , b = a , c = e .".

    The pointers of a line form one cycle through all nodes, so no node leads back to itself in
    fewer than `len(NODES)` steps.

    Args:
        count: Number of lines.
        seed: The same seed gives the same lines.
        remarks: The remarks of pre-training lines, or None for lines without remarks.

    Returns:
        Rows with `prompt`, `completion`, `hops` and `steps` (for each answer, the remark that helps).
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
    """Pre-train the tiny model on lines some of which have remarks, and save it with its tokenizer.

    A folder that already holds a model is left as it is.

    Args:
        folder: Folder to save to.
        seed: Seeds the weights and the lines.
        smoke: Train for a few steps only, which teach it nothing.
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
    """Return lines as `input_ids` and `labels`; prompt tokens have the label -100."""
    rows = []
    for line in lines:
        prompt, completion = (tokenizer(line[k])["input_ids"] for k in ("prompt", "completion"))
        rows.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return Dataset.from_list(rows)


def heldout_lines(count: int, seed: int) -> list[dict[str, Any]]:
    """Return lines whose prompts occur neither in pre-training nor in training with this seed."""
    pretraining = build_lines(NUM_PRETRAINING, _PRETRAINING_SEED + seed, REMARKS)
    seen = {line["prompt"] for line in (*pretraining, *build_lines(NUM_TRAIN, seed))}
    lines = build_lines(2 * count, _HELD_OUT_SEED + seed)
    return [line for line in lines if line["prompt"] not in seen][:count]


def pointer_split(seed: int, smoke: bool = False) -> tuple[Dataset, Dataset, list[dict[str, Any]]]:
    """Return training and held-out lines as datasets, and the held-out lines with their hops.

    No line shows its steps. The datasets have the columns `prompt` and `completion`.
    """
    lines = build_lines(64 if smoke else NUM_TRAIN, seed)
    heldout = heldout_lines(16 if smoke else NUM_HELD_OUT, seed)
    train, test = (
        Dataset.from_list([{k: line[k] for k in ("prompt", "completion")} for line in part])
        for part in (lines, heldout)
    )
    return train, test, heldout
