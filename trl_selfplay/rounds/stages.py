"""The stages of a round, put together for a trainer: draw prompts, sample and grade, build rows.

In: prompts, held-out sets, a collector and a formatter, made once by the trainer. Out: graded
rollouts of a phase, held-out scores, and the finished `PlayedRound` of a selection. The trainers
call these in the order of their papers.
"""

import logging
import math
import random
import shutil
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from trl import pack_dataset

from trl_selfplay.disk import (
    BRING_BACK,
    DamagedFileError,
    naming_damage,
    replace_folder,
    save_table,
)
from trl_selfplay.evaluation.diversity import diversity_metrics, warn_poorer_samples
from trl_selfplay.evaluation.heldout import HeldOutScores, score_all
from trl_selfplay.evaluation.report import SamplingProgress, print_completions
from trl_selfplay.generation.random_streams import Phase
from trl_selfplay.generation.sampler import build_sampling_options
from trl_selfplay.rewards.answer import is_answer
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.collection import Assignment, Collector, read_plan
from trl_selfplay.rollouts.gold import Gold, load_gold
from trl_selfplay.rollouts.played import PlayedRound
from trl_selfplay.rollouts.prompts import PromptRow, refuse_seen_heldout
from trl_selfplay.rollouts.record import Rollout, load_rollouts, save_rollouts
from trl_selfplay.rollouts.rendering import PromptFormatter, check_lengths, check_training_lengths
from trl_selfplay.rollouts.rows import (
    RowWeights,
    build_training_rows,
    training_completion_ids,
)
from trl_selfplay.rollouts.selection import Selection
from trl_selfplay.rounds.run import Run

logger = logging.getLogger(__name__)

# How many solutions are read at construction. All are when graded.
_MOST_SOLUTIONS_READ = 2000
# How many of the longest prompts are tokenized at construction. All are checked when sampled.
_CHECKED_AT_CONSTRUCTION = 64


@dataclass(frozen=True, slots=True)
class SelfPlay:
    """What a trainer plays with, the same in every round.

    Attributes:
        config: The trainer's arguments.
        rows: The training prompts, sorted by id.
        heldout: Held-out prompts by the name of their set.
        formatter: Renders prompts as token ids.
        collector: Samples and grades.
        eos_token_ids: Tokens that end a completion.
        eos_token_id: The one that is added in training after a stop string.
        context_length: Most positions of the model, or None.
    """

    config: Any
    rows: list[PromptRow]
    heldout: Mapping[str, list[PromptRow]]
    formatter: PromptFormatter
    collector: Collector
    eos_token_ids: tuple[int, ...]
    eos_token_id: int
    context_length: int | None

    @property
    def lacks_embeddings(self) -> bool:
        """Whether the tokenizer has tokens that the model has no embedding for."""
        count = self.formatter.num_embeddings
        return count is not None and len(self.formatter.tokenizer) > count

    def check_prompts(self, hinted: bool) -> None:
        """Raise ValueError now for prompts that can't be rendered, sampled from or trained on."""
        for name, rows in {"train_dataset": self.rows, **self.heldout}.items():
            # A token without an embedding may be in any row.
            longest = list(rows) if self.lacks_embeddings else _longest(rows)
            # Held-out prompts are shown with the examples before round 0.
            few_shot = bool(self.formatter.few_shot_examples) and (
                self.config.few_shot_in_training
                or name != "train_dataset"
                or self.config.few_shot_rounds != 0
            )
            self.check_columns(rows, name or "eval_dataset")
            reads_solutions = hinted or self.collector.scorer is None
            self.formatter.warn_control_tokens(rows, reads_solutions)
            self.formatter.check_rows([*_longest(rows), *_first_of_each_kind(rows)], few_shot)
            self._prompt_ids(
                longest, few_shot, hinted and name == "train_dataset", name or "eval_dataset"
            )
        check_training_lengths(
            self.rows,
            lambda row: self.training_prompt_ids([row])[row.prompt_id],
            self.config.max_length,
            build_sampling_options(self.config, ()).max_completion_length,
            _longest(self.rows),
        )

    def check_columns(self, rows: Sequence[PromptRow], name: str) -> None:
        """Raise ValueError if the reward functions can't be called with a dataset's columns."""
        scorer = self.collector.scorer
        if name != "train_dataset":
            scorer = self.collector.eval_scorer or scorer
        if scorer is not None and rows:
            scorer.check_columns(rows[0].columns, name)

    def warn_unreadable_solutions(self) -> None:
        """Say before anything is sampled which solutions the reward functions can't read.

        Raises:
            TypeError: One that compares with a single answer would get a list, a dict or bytes.
        """
        scorer = self.collector.scorer
        heldout_scorer = self.collector.eval_scorer or scorer
        self._refuse_collections(scorer, self.rows, "train_dataset")
        for name, rows in self.heldout.items():
            self._refuse_collections(heldout_scorer, rows, name or "eval_dataset")
        sample = self.rows[:_MOST_SOLUTIONS_READ]
        found = {} if scorer is None else scorer.find_unreadable([r.solution for r in sample])
        for name, indices in found.items():
            examples = ", ".join(
                f"row {sample[i].row_index}: {str(sample[i].solution)[:80]!r}" for i in indices[:5]
            )
            logger.warning(
                "%s can't read the solution of %d of %d rows of `train_dataset` (%s); it abstains "
                "on their completions. Mend or drop these rows, or take another reward function.",
                name,
                len(indices),
                len(sample),
                examples,
            )

    def _refuse_collections(
        self, scorer: Scorer | None, rows: Sequence[PromptRow], name: str
    ) -> None:
        readers = () if scorer is None else scorer.solution_readers
        wrong = next((r for r in rows if not is_answer(r.solution)), None) if readers else None
        if wrong is not None:
            raise TypeError(
                f"`{name}` row {wrong.row_index}: the solution is {wrong.solution!r:.100}, of type "
                f"{type(wrong.solution).__name__}, and {readers[0]} compares with one answer. Give "
                "text or a number, one row for each answer to accept, or a reward function of "
                "your own."
            )

    def _prompt_ids(
        self, rows: Sequence[PromptRow], few_shot: bool, hinted: bool, name: str
    ) -> list[tuple[int, ...]]:
        ids = [self.formatter.token_ids(r, few_shot=few_shot, hinted=hinted) for r in rows]
        check_lengths(
            rows,
            [len(i) for i in ids],
            build_sampling_options(self.config, ()).max_completion_length,
            self.context_length,
            name,
        )
        return ids

    def draw_prompts(self, round_index: int) -> list[PromptRow]:
        """Return the prompts of a round: all, or a fresh draw that only the seed decides."""
        count = self.config.num_prompts_per_round
        if count is None or count >= len(self.rows):
            return self.rows
        drawn = random.Random(f"{self.config.seed}/{round_index}").sample(self.rows, count)
        return sorted(drawn, key=lambda row: row.prompt_id)

    def sample(
        self, rows: Sequence[PromptRow], round_index: int, phase: Phase, folder: Path
    ) -> list[Rollout]:
        """Sample `num_generations` completions a prompt and grade them.

        The few-shot examples stand before the prompt in the first `few_shot_rounds` rounds.

        Hinted samples (phase "hint") show the answer in the prompt, and their sample indices go on
        where the unhinted ones end.
        """
        if not rows:
            return []
        hinted, count = phase == "hint", self.config.num_generations
        indices = tuple(range(count, 2 * count) if hinted else range(count))
        few_shot = bool(self.formatter.few_shot_examples)
        if few_shot and (limit := self.config.few_shot_rounds) is not None:
            few_shot = round_index < limit
        prompt_ids = self._prompt_ids(rows, few_shot, hinted, "train_dataset")
        description = f"round {round_index}{' with hints' if hinted else ''}"
        with self._progress(description, len(rows) * count) as progress:
            return self.collector.collect(
                [Assignment(r, ids, indices) for r, ids in zip(rows, prompt_ids, strict=True)],
                build_sampling_options(self.config, self.eos_token_ids),
                round_index=round_index,
                phase=phase,
                progress=progress,
                folder=folder / "samples",
                prefix="hint-" if hinted else "",
            )

    def score(
        self,
        sets: Mapping[str, list[PromptRow]],
        *,
        folder: Path | None = None,
        prefix: str = "eval",
        with_few_shot: bool = False,
    ) -> HeldOutScores:
        """Score held-out sets with the current weights, see `heldout.score_all`."""
        forms = 2 if with_few_shot and self.formatter.few_shot_examples else 1
        samples = sum(map(len, sets.values())) * (1 + self.config.num_generations_eval) * forms
        with self._progress("held-out", samples, ("num_generations_eval",)) as progress:
            scores = score_all(
                self.collector,
                self.formatter,
                sets,
                self.config,
                self.eos_token_ids,
                progress,
                folder=folder,
                prefix=prefix,
                with_few_shot=with_few_shot,
            )
        logged = _take_logged(self.collector.eval_scorer or self.collector.scorer)
        scores.metrics.update({f"{prefix}_{n}": v for n, v in logged.items()})
        return scores

    def _progress(
        self,
        description: str,
        total: int,
        settings: Sequence[str] = ("num_prompts_per_round", "num_generations"),
    ) -> SamplingProgress:
        is_main = self.collector.accelerator.is_main_process
        disable = self.config.disable_tqdm or not is_main
        share = math.ceil(total / self.collector.accelerator.num_processes)
        return SamplingProgress(share, description, disable=disable, settings=settings)

    def watch_diversity(
        self,
        run: Run,
        rollouts: Sequence[Rollout],
        normal_form: Callable[[str], Hashable],
    ) -> dict[str, float]:
        """Return the numbers of a round's diversity; warn if round 0's samples were richer."""
        round_index = run.round_index or 0
        first: Sequence[Rollout] = rollouts
        if round_index > 0:
            try:
                first = load_samples(run.folder(0))
            except (DamagedFileError, FileNotFoundError) as error:
                logger.warning("diversity isn't compared with round 0's: %s", error)
        threshold = self.collector.reward_threshold
        for warning in warn_poorer_samples(first, rollouts, normal_form, threshold, round_index):
            logger.warning("%s", warning)
        has_degrees = self.config.rewards_have_degrees
        return diversity_metrics(first, rollouts, normal_form, threshold, has_degrees)

    def training_prompt_ids(self, rows: Sequence[PromptRow]) -> dict[str, tuple[int, ...]]:
        """Return the prompts as trained on: never hinted, few-shot only if configured."""
        few_shot = bool(self.formatter.few_shot_examples) and self.config.few_shot_in_training
        return {row.prompt_id: self.formatter.token_ids(row, few_shot=few_shot) for row in rows}

    def load_gold(self, dataset: Any, *, needs_solutions: bool) -> Gold:
        """Return a dataset's human completions, none for None.

        Args:
            dataset: As `gold.load_gold` takes it.
            needs_solutions: Whether they will be graded.

        Raises:
            TypeError, ValueError: For rows that can't work, or whose prompts are held out.
        """
        if dataset is None:
            return Gold((), {})
        gold = load_gold(
            dataset,
            self.rows,
            self.formatter,
            self.eos_token_ids,
            self.eos_token_id,
            needs_solutions=needs_solutions,
        )
        refuse_seen_heldout(self.heldout, list(gold.rows.values()), "gold_dataset")
        return gold

    def grade_gold(self, gold: Gold, path: Path) -> list[Rollout]:
        """Return the human completions with their rewards, graded once per run and kept at `path`."""
        if not gold.rollouts:
            return []
        accelerator = self.collector.accelerator
        if accelerator.is_main_process and not path.exists():
            save_rollouts(path, self.collector.grade(gold.rollouts, gold.rows))
        accelerator.wait_for_everyone()
        return load_rollouts(path)

    def drop_long_gold(
        self, gold: Sequence[Rollout], prompt_ids: Mapping[str, tuple[int, ...]]
    ) -> list[Rollout]:
        """Return the human completions that fit in `max_length` with their prompts; warn of others."""
        fitting = [rollout for rollout in gold if self.fits(rollout, prompt_ids)]
        if len(fitting) < len(gold):
            logger.warning(
                "%d of %d gold completions are longer than max_length=%s with their prompts and "
                "are left out.",
                len(gold) - len(fitting),
                len(gold),
                self.config.max_length,
            )
        return fitting

    def fits(self, rollout: Rollout, prompt_ids: Mapping[str, tuple[int, ...]]) -> bool:
        """Say whether a training example is no longer than `max_length`."""
        if self.config.max_length is None:
            return True
        completion = training_completion_ids(rollout, self.eos_token_id)
        return len(prompt_ids[rollout.prompt_id]) + len(completion) <= self.config.max_length

    def finish(
        self,
        rollouts: Sequence[Rollout],
        selection: Selection,
        prompt_ids: Mapping[str, tuple[int, ...]],
        round_index: int,
        folder: Path,
        *,
        gold: Sequence[Rollout] = (),
        weigh: RowWeights | None = None,
        metrics: Mapping[str, float] = MappingProxyType({}),
    ) -> PlayedRound:
        """Write the selection down, build the parent's rows and the round's numbers.

        Args:
            rollouts: All of the round.
            selection: What became of them.
            prompt_ids: Prompts as trained on.
            round_index: The round.
            folder: Of the round.
            gold: Human completions to train on as well.
            weigh: Gives each row a weight; gold completions without a reward weigh 1.
            metrics: What else to log of the round.
        """
        examples = [*selection.kept, *selection.history, *gold]
        rows = build_training_rows(
            examples,
            prompt_ids,
            self.eos_token_id,
            seed=self.config.seed + round_index,
            weigh=weigh,
            completion_only=self.config.completion_only_loss is not False,
        )
        if self.config.packing and examples:
            rows = pack_dataset(rows, self.config.max_length, self.config.packing_strategy)
        if self.collector.accelerator.is_main_process:
            save_selection(folder / "selection.parquet", selection)
            if self.config.log_completions:
                print_completions(rollouts, self.config.num_completions_to_print)
            save_rows(folder / "dataset", rows)
        self.collector.accelerator.wait_for_everyone()
        scorer = self.collector.scorer
        rewards = mean_rewards(rollouts, () if scorer is None else scorer.names)
        return PlayedRound(
            rows,
            len(examples),
            replace(selection.funnel, gold=len(gold)),
            tuple(rollouts),
            round_metrics(rollouts, selection, rewards, len(examples))
            | dict(metrics)
            | {f"play/{n}": v for n, v in _take_logged(scorer).items()},
            rewards,
        )


def _longest(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Return the rows that are likely to have the most tokens."""

    def size(row: PromptRow) -> int:
        return len(f"{row.prompt}{row.template_arguments}".encode())

    return sorted(rows, key=size, reverse=True)[:_CHECKED_AT_CONSTRUCTION]


def _first_of_each_kind(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Return the first row with each role, form of content and argument of the template."""
    first: dict[Hashable, PromptRow] = {}
    for row in rows:
        for name, value in row.template_arguments.items():
            keys = value if isinstance(value, Mapping) else ("",)
            for key in keys:
                first.setdefault((name, key), row)
        if not isinstance(row.prompt, str):
            for message in row.prompt:
                first.setdefault((message["role"], type(message.get("content"))), row)
    return list(first.values())


def _take_logged(scorer: Scorer | None) -> dict[str, float]:
    """Return the numbers that reward functions logged; none where nothing is graded."""
    return {} if scorer is None else scorer.take_metrics()


def save_selection(path: Path, selection: Selection) -> None:
    """Write what became of each rollout: prompt_id, sample_index, hinted, outcome."""
    rollouts, outcomes = zip(*selection.outcomes, strict=True) if selection.outcomes else ((), ())
    save_table(
        path,
        pa.table(
            {
                "prompt_id": pa.array([r.prompt_id for r in rollouts], pa.string()),
                "sample_index": pa.array([r.sample_index for r in rollouts], pa.int32()),
                "hinted": pa.array([r.hinted for r in rollouts], pa.bool_()),
                "outcome": pa.array(list(outcomes), pa.string()),
            }
        ),
    )


def load_samples(folder: Path) -> list[Rollout]:
    """Return all rollouts that a round sampled, from its folder.

    Raises:
        DamagedFileError: A shard that was planned can't be read, lacks a prompt, or is gone.
        FileNotFoundError: The round has no samples on disk.
    """
    samples = folder / "samples"
    plans = {prefix: read_plan(samples / f"{prefix}plan.json") for prefix in ("", "hint-")}
    if plans[""] is None:
        raise FileNotFoundError(
            f"{samples} has no samples of that round, which this one needs too. {BRING_BACK}"
        )
    rollouts: list[Rollout] = []
    for prefix, shards in plans.items():
        for number, shard in enumerate(shards or ()):
            if not shard.prompt_ids:
                continue
            path = samples / f"{prefix}{number:05d}.parquet"
            held = load_rollouts(path)
            if missing := set(shard.prompt_ids) - {r.prompt_id for r in held}:
                raise DamagedFileError(
                    f"{path} lacks {len(missing)} of the {len(shard.prompt_ids)} prompts that were "
                    f"sampled into it. {BRING_BACK}"
                )
            rollouts += held
    return sorted(rollouts, key=lambda r: (r.prompt_id, r.sample_index))


def load_outcomes(folder: Path, outcomes: Collection[str]) -> list[Rollout]:
    """Return the rollouts of a round that came to one of these outcomes, from its folder.

    Raises:
        DamagedFileError, FileNotFoundError: As `load_samples`.
    """
    rollouts = load_samples(folder)
    path = folder / "selection.parquet"
    with naming_damage(path, BRING_BACK):
        selection = pq.read_table(path).to_pylist()
        chosen = {
            (s["prompt_id"], s["sample_index"]) for s in selection if s["outcome"] in outcomes
        }
    return [r for r in rollouts if (r.prompt_id, r.sample_index) in chosen]


def load_kept(folder: Path) -> list[Rollout]:
    """Return the rollouts that an earlier round kept, from its folder."""
    return load_outcomes(folder, ("kept",))


def load_history(run: Run, rounds: Iterable[int]) -> list[Rollout]:
    """Return what these rounds selected before the cap, the newest round first.

    Raises:
        DamagedFileError, FileNotFoundError: As `load_samples`.
    """
    return [
        rollout
        for round_index in sorted(rounds, reverse=True)
        for rollout in load_outcomes(run.folder(round_index), ("kept", "capped"))
    ]


def save_rows(folder: Path, rows: Dataset) -> None:
    """Write a dataset so that a reader sees either all of it or nothing."""
    temporary = folder.with_name(f".{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    rows.save_to_disk(str(temporary))
    replace_folder(temporary, folder)


def mean_rewards(rollouts: Sequence[Rollout], names: Sequence[str]) -> dict[str, float | None]:
    """Return the mean weighted reward and each function's mean, abstentions left out."""
    columns = {"mean": [r.reward for r in rollouts]}
    columns |= {name: [r.rewards[i] for r in rollouts] for i, name in enumerate(names)}
    return {
        name: fmean(scores) if (scores := [v for v in values if v is not None]) else None
        for name, values in columns.items()
    }


def round_metrics(
    rollouts: Sequence[Rollout],
    selection: Selection,
    rewards: Mapping[str, float | None],
    num_examples: int,
) -> dict[str, float]:
    """Return the numbers of a round for the log: play/… of what was sampled, select/… of the rest."""
    unhinted = [r for r in rollouts if not r.hinted]
    metrics = {
        "play/completions": float(len(rollouts)),
        "play/mean_length": fmean(len(r.completion_ids) for r in unhinted),
        "play/truncated": fmean(r.is_truncated for r in unhinted),
        "select/kept": float(len(selection.kept)),
        "select/kept_hinted": float(sum(r.hinted for r in selection.kept)),
        "select/prompts_solved": len({r.prompt_id for r in selection.kept if not r.hinted})
        / len({r.prompt_id for r in unhinted}),
        "select/examples": float(num_examples),
    }
    metrics |= {f"play/reward_{n}": v for n, v in rewards.items() if v is not None}
    return metrics
