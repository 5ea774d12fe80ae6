"""What a whole run takes, told from a round on a few prompts: examples, steps, time, disk.

In: a trainer and its `TrialRound`. Out: numbers in proportion to the prompts. Later rounds are taken to be
like the first.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from trl_selfplay.estimation.optimizers import optimizer_bytes
from trl_selfplay.evaluation.estimates import bootstrap_interval
from trl_selfplay.rounds.plan import RoundPlan
from trl_selfplay.rounds.trial_round import TrialRound


@dataclass(frozen=True, slots=True)
class Expected:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        if self.low == self.high:  # a fixed number, or as many of every prompt: no spread is known
            return f"{self.value:,.0f}"
        return f"{self.value:,.0f} [{self.low:,.0f}, {self.high:,.0f}]"


def expected_examples(trainer: Any, trial: TrialRound) -> Expected:
    """Return the number of examples that a round trains on.

    The interval is over prompts (bootstrap), since samples of the same prompt aren't independent.
    """
    per_round = _prompts_per_round(trainer)
    # Pairs and gold completions are examples of a prompt as well.
    per_kept = trial.played.num_examples / max(1, sum(trial.kept))
    low, high = bootstrap_interval([float(count) for count in trial.kept])
    scale = per_round * per_kept
    return Expected(sum(trial.kept) / len(trial.kept) * scale, low * scale, high * scale)


def expected_steps(trainer: Any, trial: TrialRound, examples: Expected) -> Expected:
    """Return the number of optimizer steps of the first round."""
    # Packed rows hold several examples.
    per_row = len(trial.played.training_rows) / max(1, trial.played.num_examples)
    plan = trainer.args.plan_rounds()[0]
    return Expected(
        *(
            _steps(trainer, plan, count * per_row)
            for count in (examples.value, examples.low, examples.high)
        )
    )


def _steps(trainer: Any, plan: RoundPlan, num_rows: float) -> int:
    args = trainer.args
    if num_rows < 1:
        return 0
    most: int = plan.settings.get("max_steps", args.max_steps)
    if most > 0:
        return most
    batches = math.ceil(num_rows / (args.train_batch_size * args.world_size))
    per_epoch = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(per_epoch * args.num_train_epochs)


def seconds_of_run(trainer: Any, trial: TrialRound, examples: Expected) -> dict[str, float]:
    """Return the wall-clock time of all rounds by phase: "sample", "train", "evaluate".

    "train" is missing if no step could be timed; the optimizer's own time isn't in it. Sampling is
    timed at the batch size of the trial, and larger batches are usually faster.
    """
    args, plans = trainer.args, trainer.args.plan_rounds()
    sampling_rounds = len({plan.sampling_round for plan in plans})
    seconds = {
        "sample": sampling_rounds * _prompts_per_round(trainer) * trial.seconds / len(trial.rows)
    }
    if trial.step_seconds is not None:
        per_row = len(trial.played.training_rows) / max(1, trial.played.num_examples)
        steps = sum(_steps(trainer, plan, examples.value * per_row) for plan in plans)
        if (warm_up := trainer.warm_up_rows()) is not None:
            steps += _steps(trainer, plans[0], len(warm_up))
        seconds["train"] = steps * args.gradient_accumulation_steps * trial.step_seconds
    if trial.num_sampled:
        seconds["evaluate"] = _num_heldout(trainer) * trial.seconds / trial.num_sampled
    return seconds


def _num_heldout(trainer: Any) -> int:
    """Return how many completions of held-out prompts a run samples."""
    args, play = trainer.args, trainer.self_play
    num_prompts = sum(map(len, play.heldout.values()))
    rounds = len(args.plan_rounds())
    if play.collector.heldout_scorer is None:  # pairs with the opponent's completions
        return num_prompts * rounds * args.num_generations
    shown_apart = bool(play.formatter.few_shot_examples) and not args.few_shot_in_training
    return num_prompts * (1 + args.num_generations_eval) * (rounds + 1 + shown_apart)


def _prompts_per_round(trainer: Any) -> int:
    count, given = len(trainer.self_play.rows), trainer.args.num_prompts_per_round
    return count if given is None else min(count, given)


def bytes_of_run(trainer: Any, trial: TrialRound) -> dict[str, int]:
    """Return what a run writes, at its largest: "samples", "models", "checkpoints"."""
    args, run, model = trainer.args, trainer.run, trainer.accelerator.unwrap_model(trainer.model)
    plans = args.plan_rounds()
    trained = [p for p in model.parameters() if p.requires_grad]
    saved = trained if isinstance(model, PeftModel) else list(model.parameters())
    model_bytes = sum(p.nbytes for p in saved)
    # Of whole models the last and the best are kept, with the one that is being written.
    kept = len(plans) if run.keeps_every_model else 3
    sampling_rounds = len({plan.sampling_round for plan in plans})
    per_sample = trial.num_bytes / max(1, trial.num_sampled)
    sampled = trial.num_sampled / len(trial.rows) * _prompts_per_round(trainer) * sampling_rounds
    return {
        "samples": round(per_sample * (sampled + _num_heldout(trainer))),
        "models": model_bytes * (kept + 1 + run.keeps_initial_weights),
        "checkpoints": _num_checkpoints(trainer, trial)
        * (model_bytes + optimizer_bytes(trained, str(args.optim))),
    }


def _num_checkpoints(trainer: Any, trial: TrialRound) -> int:
    """Return how many checkpoints lie on disk at once: those of one round."""
    args = trainer.args
    if args.save_strategy == "no":
        return 0
    steps = expected_steps(trainer, trial, expected_examples(trainer, trial)).value
    count = math.ceil(args.num_train_epochs)
    if args.save_strategy == "steps":
        every = args.save_steps if args.save_steps >= 1 else max(1, args.save_steps * steps)
        count = 1 + int(steps // every)  # one is written before an old one goes
    return count if args.save_total_limit is None else min(count, args.save_total_limit + 1)


def free_bytes(folder: Path) -> int:
    """Return what is free on the disk of a folder that may not exist yet."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(existing).free
