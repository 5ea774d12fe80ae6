"""Play a round on a few prompts before a run begins, and undo it.

In: a trainer that has not begun to train, and an empty folder. Out: `TrialRound`: what the trainer's own
`play_round` selects from these prompts, and how long that takes. Samples come from random streams of
their own, so that those of the run neither change nor are seen beforehand.
"""

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl_selfplay.generation.sampler import build_sampling_options
from trl_selfplay.rollouts.kept_prompts import read_questions
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.stored import count_kept
from trl_selfplay.rounds.dry_run import try_step
from trl_selfplay.rounds.training import changed_settings

NUM_PROMPTS = 32
# Samples per prompt for pass@8. The round itself is played with the run's own number.
NUM_SAMPLES = 8


@dataclass(frozen=True, slots=True)
class TrialRound:
    """What a round on a few prompts gave, and what it took.

    Attributes:
        rows: The prompts.
        played: The round, as the trainer played it.
        samples: Graded completions without a hint: those of the round, and as many more as pass@k
            needs. Empty if the trainer samples nothing.
        hinted: Those with a hint.
        kept: Number of selected completions of each prompt.
        seconds: Wall-clock time of the round: sampling, grading, selecting, scoring of pairs.
        num_bytes: Size on disk of the round's samples.
        step_seconds: Wall-clock time of forward and backward on one batch of the round's rows; None
            without rows, or if the model has to be wrapped before it can be trained.
    """

    rows: Sequence[PromptRow]
    played: PlayedRound
    samples: Sequence[Rollout]
    hinted: Sequence[Rollout]
    kept: Sequence[int]
    seconds: float
    num_bytes: int
    step_seconds: float | None

    @property
    def num_sampled(self) -> int:
        """Number of completions that the round sampled, with and without a hint."""
        return self.played.funnel.sampled + self.played.funnel.hinted.sampled


def play_trial_round(trainer: Any, folder: Path) -> TrialRound:
    """Play round 0 on some of the training prompts; the weights and the trainer stay as they are.

    Args:
        trainer: A trainer over rounds.
        folder: An empty folder that all processes see.

    Raises:
        Exception: Whatever a round and the first training step raise.
    """
    play, args = trainer.self_play, trainer.args
    count = min(NUM_PROMPTS, len(play.rows))
    rows = random.Random(f"{args.seed}/preflight").sample(play.rows, count)
    rows.sort(key=lambda row: row.prompt_id)
    run = replace(trainer.run, root=folder)
    # The seed of a run isn't negative, so no sample of a run has such a stream.
    collector = replace(play.collector, seed=-1 - play.collector.seed)
    changes = {
        "run": run,
        "self_play": replace(play, rows=rows, heldout={}, collector=collector, run=run),
        **trainer.data_of({row.prompt_id for row in rows}),
    }
    settings = {**args.plan_rounds()[0].settings, "num_prompts_per_round": None}
    where = run.folder(0)
    with changed_settings(trainer, changes), changed_settings(args, settings):
        if trainer.samples_prompts:
            _start_sampler(trainer.self_play)
        started = time.monotonic()
        played = trainer.play_round(0)
        seconds = time.monotonic() - started
        num_bytes = sum(path.stat().st_size for path in (where / "samples").glob("*.parquet"))
        rollouts = list(played.rollouts) if trainer.samples_prompts else []
        samples = [*(r for r in rollouts if not r.hinted), *_more_samples(trainer)]
        if scorer := collector.scorer:
            scorer.take_metrics()
        play.collector.sampler.release()
        step_seconds = _time_step(trainer, played)
    questions = read_questions(where / "steps.parquet")
    kept: Counter[str] = Counter()
    for prompt_id, number in count_kept(where).items():
        kept[questions.get(prompt_id, prompt_id)] += number
    return TrialRound(
        rows,
        played,
        samples=samples,
        hinted=[rollout for rollout in rollouts if rollout.hinted],
        kept=[kept[row.prompt_id] for row in rows],
        seconds=seconds,
        num_bytes=num_bytes,
        step_seconds=step_seconds,
    )


def _start_sampler(play: Any) -> None:
    """Sample a token, so that the start of an engine and first calls aren't timed with the rest."""
    with changed_settings(play.config, {"disable_tqdm": True}):
        play.ask(play.rows[:1], 0, "judge", None, (0,), max_completion_length=1)


def _more_samples(trainer: Any) -> Sequence[Rollout]:
    """Return as many further samples per prompt, without a hint, as pass@k needs."""
    play, args = trainer.self_play, trainer.args
    is_greedy = build_sampling_options(args, ()).temperature == 0.0
    if (
        trainer.agent is not None
        or play.collector.scorer is None
        or is_greedy
        or args.num_generations >= NUM_SAMPLES
    ):
        return []
    indices = range(args.num_generations, NUM_SAMPLES)
    few_shot = play.shows_examples(0)
    return play.ask(play.rows, 0, "train", None, indices, few_shot=few_shot)


def _time_step(trainer: Any, played: PlayedRound) -> float | None:
    """Return the seconds of forward and backward on a batch of the round's rows."""
    if not played.num_examples:
        return None
    rows = played.training_rows
    batch = rows.select(range(min(len(rows), trainer.args.train_batch_size)))
    try_step(trainer, batch)  # the first one allocates
    return try_step(trainer, batch)
