"""Trainers of every method, and their TRL parents, on one tiny model."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from drop_in_classes import ALL_FIELDS, CLASSES, OWN_SETTINGS, SETTINGS

from trl_selfplay.rollouts.record import hash_prompt


def contains_solution(completions, solution, **kwargs):
    return [float(s in str(c).split()) for c, s in zip(completions, solution, strict=True)]


@pytest.fixture
def parts(tiny_model, word_tokenizer, sums):
    """What trainers are made of: `model`, `tokenizer`, `rows` (prompt, completion, solution)."""
    rows = sums(8).map(lambda row: {"completion": f" so {row['solution']}"})
    return SimpleNamespace(model=tiny_model(word_tokenizer), tokenizer=word_tokenizer, rows=rows)


@pytest.fixture
def build(tmp_path, parts, tiny_model, make_rollout):
    """Return a function that builds a trainer by its method; fields go to the config."""

    def build_method(method, folder="run", *, model=None, args=None, **changes):
        trainer_class, config_class = CLASSES[method]
        fields = config_class.__dataclass_fields__
        settings = {k: v for k, v in SETTINGS.items() if k in fields}
        settings |= OWN_SETTINGS.get(method, {})
        arguments = {"processing_class": parts.tokenizer, "train_dataset": parts.rows}
        if method in ("STaR", "ReST^EM", "IRPO"):
            arguments["reward_funcs"] = contains_solution
        if method == "V-STaR":
            arguments["samples"] = [
                make_rollout(
                    prompt_id=hash_prompt(row["prompt"], row["solution"]),
                    sample_index=i,
                    reward=float(i),
                    completion=f"so {i}",
                )
                for row in parts.rows
                for i in (0, 1)
            ]
        if method == "Quiet-STaR" and "train_dataset" not in changes:
            arguments["train_dataset"] = texts(parts)
        foreign = {k: v for k, v in changes.items() if k in ALL_FIELDS}
        arguments |= {k: v for k, v in changes.items() if k not in foreign}
        if args is None:
            args = config_class(str(tmp_path / folder), **{**settings, **foreign})
        model = tiny_model(parts.tokenizer) if model is None else model
        return trainer_class(model, args=args, **arguments)

    return build_method


def texts(parts) -> Dataset:
    rows = [f"{row['prompt']}{row['completion']} {row['prompt']}" for row in parts.rows]
    return Dataset.from_dict({"text": rows})
