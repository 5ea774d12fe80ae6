"""Folders of runs written by hand: prompts, samples and outcomes as a test needs them."""

import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from digests.old_runs import ARCHIVES
from hostile_texts import HOSTILE

from trl_selfplay.disk import save_table, save_text
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rollouts.kept_prompts import keep_prompts
from trl_selfplay.rollouts.prompts import collect_rows
from trl_selfplay.rollouts.record import save_rollouts
from trl_selfplay.rollouts.selection import Selection
from trl_selfplay.rollouts.shards import Shard, save_plan
from trl_selfplay.rollouts.stored import save_selection


@pytest.fixture
def write_run(tmp_path, make_rollout):
    """Return a function that writes a finished run.

    Its arguments: the dataset's records, and for each round the samples as dicts: `row`, the record's
    place, `outcome`, and what differs from the rollout of the fixture `make_rollout`.
    """

    def write(records, rounds, name="run", **config):
        root = tmp_path / name / "_rounds"
        ids = []  # of each record
        for record in records:
            ids += [row.prompt_id for row in collect_rows([(0, record, {})], "train_dataset")]
        keep_prompts(
            root / "prompts.parquet",
            collect_rows(((i, record, {}) for i, record in enumerate(records)), "train_dataset"),
        )
        save_text(root / "config.json", json.dumps({"method": "STaR", "model": "tiny", **config}))
        lines = []
        for index, samples in enumerate(rounds):
            folder = root / f"round-{index:03d}"
            rollouts, outcomes = [], []
            for sample in samples:
                fields = {k: v for k, v in sample.items() if k not in ("row", "outcome")}
                outcomes.append(sample["outcome"])
                rollouts.append(
                    make_rollout(
                        **{
                            "round_index": index,
                            "prompt_id": ids[sample["row"]],
                            "phase": "hint" if fields.get("hinted") else "train",
                            **fields,
                        }
                    )
                )
            for prefix, is_hinted in (("", False), ("hint-", True)):
                shard = [r for r in rollouts if r.hinted == is_hinted]
                prompt_ids = tuple(dict.fromkeys(r.prompt_id for r in shard))
                save_plan(folder / "samples" / f"{prefix}plan.json", [Shard(prompt_ids, 1)])
                save_rollouts(folder / "samples" / f"{prefix}00000.parquet", shard)
            columns = {
                "prompt_id": [r.prompt_id for r in rollouts],
                "sample_index": pa.array([r.sample_index for r in rollouts], pa.int32()),
                "hinted": [r.hinted for r in rollouts],
                "outcome": outcomes,
            }
            save_table(folder / "selection.parquet", pa.table(columns))
            source = "base" if index == 0 else f"round {index - 1}"
            lines.append({"round": index, "sampled_from": source, "steps": 1})
        save_text(root / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        return RunFolder.open(tmp_path / name)

    return write


@pytest.fixture
def unpack(tmp_path):
    """Unpack what a run of earlier code left when it was killed; return its output directory."""

    def unpack(name):
        with tarfile.open(ARCHIVES / f"{name}.tar.xz") as archive:
            archive.extractall(tmp_path, filter="data")
        return tmp_path / "run"

    return unpack


@pytest.fixture
def write_folder(tmp_path):
    """Write the folder of a run and return its output directory."""

    def write(rounds, name="run", *, evaluations=None, finished=None, config=None, **changes):
        """Write rounds, each a list of graded rollouts and their outcomes.

        `evaluations` has held-out rollouts by round; `changes` are fields of all lines; the first
        `finished` rounds have a line.
        """
        output_dir = tmp_path / name
        root = output_dir / "_rounds"
        lines = []
        for index, rollouts in enumerate(rounds):
            folder = root / f"round-{index:03d}"
            _write_shard(folder / "samples", "", [r for r, _ in rollouts])
            outcomes = {(r.prompt_id, r.sample_index): outcome for r, outcome in rollouts}
            selection = Selection.of(
                [r for r, _ in rollouts],
                lambda r, outcomes=outcomes: outcomes[r.prompt_id, r.sample_index],
            )
            save_selection(folder / "selection.parquet", selection)
            lines.append(
                {
                    "round": index,
                    "sampled_from": "base" if index == 0 else f"round {index - 1}",
                    "trained_from": "base",
                    "funnel": selection.funnel.to_dict(),
                    "rewards": {"mean": 0.5, "exact_reward": 0.5},
                    "metrics": {"play/mean_length": 3.0, "play/distinct": 0.5},
                    "eval": heldout(0.5 + 0.1 * index),
                    "gain": 0.1,
                    "gain_standard_error": 0.05,
                    "seconds": {"sample": 1.0, "train": 2.0, "evaluate": 0.5},
                    "tokens": {"sample": 100, "train": 300, "evaluate": 50},
                    "examples": selection.funnel.kept,
                    "steps": 3,
                    "learning_rate": 1e-3,
                    **({"eval_before": heldout(0.4)} if index == 0 else {}),
                    **changes,
                }
            )
        for index, rollouts in (evaluations or {}).items():
            folder = root / ("before" if index < 0 else f"round-{index:03d}") / "evaluation"
            _write_shard(folder, "greedy-", rollouts)
        settings = {"method": "STaR", "model": "tiny", "num_rounds": len(rounds), **(config or {})}
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.json").write_text(json.dumps(settings))
        (root / "rounds.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines[:finished]))
        return output_dir

    return write


def heldout(accuracy):
    return {
        "eval_accuracy": accuracy, "eval_accuracy_low": accuracy - 0.1,
        "eval_accuracy_high": accuracy + 0.1, "eval_pass@1": accuracy, "eval_pass@8": 0.9,
        "eval_mean_length": 3.0,
    }  # fmt: skip


def _write_shard(folder: Path, prefix, rollouts) -> None:
    save_rollouts(folder / f"{prefix}00000.parquet", rollouts)
    prompt_ids = list(dict.fromkeys(r.prompt_id for r in rollouts))
    (folder / f"{prefix}plan.json").write_text(
        json.dumps([{"prompt_ids": prompt_ids, "batch_size": 1}])
    )


@pytest.fixture
def hostile_run(write_folder, make_rollout):
    """A run of one round whose prompts, completions and names are hostile."""
    rollouts = [
        (
            make_rollout(
                prompt_id=f"{i:032x}", prompt=text, completion=f"so {text}", reward=float(i % 2),
                causes=(text,), rewards=(float(i % 2),),
            ),
            "kept" if i % 2 else "failed",
        )
        for i, text in enumerate(HOSTILE)
    ]  # fmt: skip
    return write_folder(
        [rollouts],
        "<b>run & \u202e",
        config={"model": HOSTILE[0], "note": HOSTILE[1], "half": "\ud83d"},
        rewards={"mean": 0.5, HOSTILE[0]: 0.5},
        alarms=[{"id": "D2", "name": HOSTILE[1], "value": 0.3, "low": 0.2, "high": 0.4,
                 "threshold": 0.5, "action": "warn", "text": HOSTILE[0]}],
        detectors={HOSTILE[0]: 0.3, "distinct": None},
    )  # fmt: skip
