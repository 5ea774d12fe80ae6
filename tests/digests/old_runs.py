"""Run folders that earlier code left behind when it was killed, and the runs that they belong to.

`old_runs/NAME.tar.xz` holds `run/`, the output directory of a run that a SIGKILL broke off in its
second half, `weights.safetensors`, what the same run comes to without interruption, and
`rows.json`, the digests of its rollouts, selections and training rows. They were written by commit
6770e97, from a folder above `digests`:

    python -m digests.old_runs make digests/old_runs

Paths are relative, so that a run is resumed in any working directory that holds `run/`.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors.torch import save_file
from transformers import TrainerCallback

from trl_selfplay import (
    ReSTEMConfig,
    ReSTEMTrainer,
    SPINConfig,
    SPINTrainer,
    STaRConfig,
    STaRTrainer,
)

from .reading import digest_rows, trainable
from .tiny_runs import build_model, build_tokenizer, data_rows, gold_rows, sum_rows

NAMES = ("star", "rest", "spin")
ARCHIVES = Path(__file__).parent / "old_runs"
MODEL, RUN = Path("model"), Path("run")
# Columns without floats, which the last bit of another processor can't change.
EXACT_COLUMNS = (
    "rows", "round_index", "phase", "prompt_id", "sample_index", "prompt_ids", "completion_ids",
    "finish", "rewards", "outcome", "input_ids", "labels", "chosen_ids", "rejected_ids",
)  # fmt: skip
_COMMON = {
    "output_dir": str(RUN), "num_rounds": 2, "max_steps": 3, "save_steps": 1, "save_total_limit": 1,
    "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
    "disable_tqdm": True, "gradient_checkpointing": False, "use_cpu": True, "seed": 3,
    "load_best_round_at_end": False,
    # Gradients that are nothing but rounding don't become steps.
    "adam_epsilon": 1e-3,
}  # fmt: skip
_GRADED = {"num_generations": 4, "temperature": 1.0, "max_completion_length": 10}


# Graders of their own, so that no change to one of the package changes these runs.
def solution_reward(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
    """Return 1.0 for a completion that contains the solution."""
    return [float(s in c) for c, s in zip(completions, solution, strict=True)]


def letters_reward(completions: list[str], **kwargs: Any) -> list[float]:
    """Return 1.0 or 0.0 by the sum of the letters' codes."""
    return [float(sum(map(ord, completion)) % 3 > 0) for completion in completions]


def save_model() -> None:
    """Write the model, and its tokenizer, into the working directory."""
    tokenizer = build_tokenizer()
    build_model(tokenizer).save_pretrained(MODEL)
    tokenizer.save_pretrained(MODEL)


def build_trainer(name: str, grade: Any = solution_reward, **changes: Any) -> Any:
    """Return the trainer of a run by its name, whose folders lie in the working directory.

    STaR and SPIN read their model from `model/`; ReST gets it as an object. `changes` are fields
    of the config.
    """
    if name == "star":
        return STaRTrainer(
            str(MODEL),
            STaRConfig(**{**_COMMON, **_GRADED, **changes}),
            train_dataset=sum_rows(0, 10),
            eval_dataset=sum_rows(12, 14),
            reward_funcs=solution_reward,
            peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
        )
    if name == "rest":
        fields = {
            "improve_thresholds": [0.3, 0.8], "start_from": "previous", "top_k": 0,
            "max_per_prompt": 3, "few_shot_in_training": False, "reward_weights": [0.5, 0.5],
            "warm_up_on_gold": True, "history_rounds": 1, "round_learning_rates": [1e-2, 5e-3],
        }  # fmt: skip
        tokenizer = build_tokenizer()
        return ReSTEMTrainer(
            build_model(tokenizer),
            ReSTEMConfig(**{**_COMMON, **_GRADED, **fields, **changes}),
            train_dataset=sum_rows(0, 10),
            gold_dataset=gold_rows(0, 4),
            reward_funcs=[grade, letters_reward],
            processing_class=tokenizer,
        )
    fields = {"max_completion_length": 24, "history_rounds": 1, "round_betas": [0.1, 0.5]}
    return SPINTrainer(
        str(MODEL),
        args=SPINConfig(**{**_COMMON, **fields, **changes}),
        train_dataset=data_rows(0, 10),
        eval_dataset=data_rows(12, 14),
        eval_reward_funcs=solution_reward,
    )


def digest_exact_rows(root: Path) -> dict[str, dict[str, Any]]:
    """Return the digests of what is equal on every machine, by folder."""
    return {
        name: {column: value for column, value in columns.items() if column in EXACT_COLUMNS}
        for name, columns in digest_rows(root).items()
    }


# --- how the folders were made -------------------------------------------------------------------


class _Killer(TrainerCallback):
    """Kills the process in the second round's training, one step after its first checkpoint."""

    def __init__(self) -> None:
        self.trainings = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainings += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainings == 2 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def _run_and_die(name: str) -> None:
    if name != "rest":
        trainer = build_trainer(name)
        trainer.add_callback(_Killer())
        trainer.train()
    # In the second Grow step, as its last shard but one has been graded.
    rounds = [0]

    class Counter(TrainerCallback):
        def on_round_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            rounds[0] = kwargs["round_index"]

    @functools.wraps(solution_reward)  # known by the same name and source
    def watched(*args: Any, **kwargs: Any) -> Any:
        shards = list(RUN.glob("_rounds/round-002/samples/*.parquet"))
        if rounds[0] == 2 and len(shards) >= 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return solution_reward(*args, **kwargs)

    trainer = build_trainer(name, watched)
    trainer.add_callback(Counter())
    collector: Any = trainer.self_play.collector
    collector.sampler.suggest_batch_size = lambda *args, **kwargs: 3
    trainer.train()


def _run_whole(name: str) -> None:
    trainer = build_trainer(name)
    trainer.train()
    save_file(trainable(trainer.model), "weights.safetensors")
    rows = digest_exact_rows(RUN / "_rounds")
    Path("rows.json").write_text(json.dumps(rows, indent=1))


def _make(target: Path) -> None:
    """Write an archive for each run into `target`."""
    target = target.resolve()
    target.mkdir(exist_ok=True)
    above = Path(__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{above}:{os.environ.get('PYTHONPATH', '')}",
    }
    for name in NAMES:
        with tempfile.TemporaryDirectory() as scratch:
            for what, exit_code in (("whole", 0), ("killed", -signal.SIGKILL)):
                folder = Path(scratch) / what
                folder.mkdir()
                command = [sys.executable, "-m", "digests.old_runs", what, name]
                done = subprocess.run(command, cwd=folder, env=environment, check=False)
                assert done.returncode == exit_code, (name, what, done.returncode)
            with tarfile.open(target / f"{name}.tar.xz", "w:xz", preset=9) as archive:
                for path in (
                    Path(scratch) / "killed" / RUN,
                    Path(scratch) / "whole" / "weights.safetensors",
                    Path(scratch) / "whole" / "rows.json",
                ):
                    archive.add(path, path.name, filter=_plain)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


if __name__ == "__main__":
    what, argument = sys.argv[1:]
    if what == "make":
        _make(Path(argument))
    else:
        save_model()
        {"whole": _run_whole, "killed": _run_and_die}[what](argument)
