"""Folders of runs, written as a run writes them, with the texts that a test wants."""

import json
import tarfile
from pathlib import Path

import pytest
from digests.old_runs import ARCHIVES

from trl_selfplay.rollouts.record import save_rollouts
from trl_selfplay.rollouts.selection import Selection
from trl_selfplay.rollouts.stored import save_selection

# What a model may write to take over a page or a terminal, and what may stand for it.
HOSTILE = [
    "</script><script>document.title = 'taken'</script>",
    "<img src=x onerror=\"document.title = 'taken'\">",
    "<!--<script>",
    "\x1b]0;taken\x07\x1b[2J\x9b2J",
    "\u202egnp.exe\u2066 \u2028\u2029 \x00 \r",
    "{{ 7 * 7 }} ${7*7} &lt;b&gt; \\u003cb",
    "[red]not markup[/red]",
]


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
        settings = {
            "method": "STaR", "model": "tiny", "num_rounds": len(rounds),
            "reward_funcs": "('exact_reward',)", **(config or {}),
        }  # fmt: skip
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
                prompt_id=f"{i:032x}", sample_index=index, prompt=text, completion=f"so {text}",
                reward=float(i % 2), causes=(text,), rewards=(float(i % 2),),
            ),
            "kept" if i % 2 else "failed",
        )
        for i, text in enumerate(HOSTILE)
        for index in (0, 1)
    ]  # fmt: skip
    return write_folder(
        [rollouts],
        "<b>run & \u202e",
        config={"model": HOSTILE[0], "note": HOSTILE[1], "half": "\ud83d",
                "reward_funcs": str((HOSTILE[0],))},
        rewards={"mean": 0.5, HOSTILE[0]: 0.5},
        alarms=[{"id": "D2", "name": HOSTILE[1], "value": 0.3, "low": 0.2, "high": 0.4,
                 "threshold": 0.5, "action": "warn", "text": HOSTILE[0]}],
        detectors={HOSTILE[0]: 0.3, "distinct": None},
    )  # fmt: skip
