"""The stages of a round, put together for a trainer: draw prompts, sample and grade, build rows.

In: prompts, held-out sets, a collector and a formatter, made once by the trainer. Out: graded
rollouts of a phase, held-out scores, and the finished `PlayedRound` of a selection. The trainers
call these in the order of their papers.
"""

import logging
import random
import shutil
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from trl import pack_dataset

from trl_selfplay.evaluation.estimates import summarize_heldout
from trl_selfplay.evaluation.heldout import (
    HeldOutScores,
    greedy_scores,
    heldout_options,
    metric_prefixes,
)
from trl_selfplay.evaluation.progress import SamplingProgress
from trl_selfplay.evaluation.report import print_completions
from trl_selfplay.generation.sampler import Phase, build_sampling_options
from trl_selfplay.peers import from_main, gather, wait_for_all
from trl_selfplay.rewards.answer import is_answer
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.collection import Collector, Progress
from trl_selfplay.rollouts.gold import Gold, load_gold
from trl_selfplay.rollouts.lengths import check_lengths, check_training_lengths
from trl_selfplay.rollouts.played import PlayedRound, mean_rewards, round_metrics
from trl_selfplay.rollouts.prompts import PromptRow, refuse_seen_heldout
from trl_selfplay.rollouts.record import Rollout, load_rollouts, save_rollouts
from trl_selfplay.rollouts.rendering import PromptFormatter
from trl_selfplay.rollouts.rows import (
    RowWeights,
    build_on_main,
    build_training_rows,
    save_dataset,
    training_completion_ids,
)
from trl_selfplay.rollouts.selection import Selection
from trl_selfplay.rollouts.sequence import Rollouts
from trl_selfplay.rollouts.shards import Assignment
from trl_selfplay.rollouts.stored import save_history, save_selection
from trl_selfplay.rounds.calibrating import weigh_calibrated
from trl_selfplay.rounds.judging import collect_judged, judged
from trl_selfplay.rounds.run import Run

logger = logging.getLogger(__name__)

# Maximum number of rows whose data is checked at construction. Grading meets all of them.
_MOST_ROWS_CHECKED = 2000
# Number of the longest prompts tokenized at construction. Sampling checks all prompts.
_CHECKED_AT_CONSTRUCTION = 64


@dataclass(frozen=True, slots=True)
class SelfPlay:
    """The stages of a trainer's rounds, the same in every round.

    Attributes:
        config: The trainer's arguments.
        rows: The training prompts, sorted by id.
        heldout: Held-out prompts by the name of their set.
        formatter: Renders prompts as token ids.
        collector: Samples and grades.
        eos_token_ids: Tokens that end a completion.
        eos_token_id: The one that is added in training after a stop string.
        context_length: Maximum tokens of a prompt with its completion, or None.
        run: Knows where rounds lie on disk.
        initial_weights: Puts the weights from before round 0 in place, within a context.
        log_probs: Returns the log-prob of each (prompt ids, completion ids) under the present weights
            and sampling options.
        whose_context: What sets `context_length`, in words for errors.
    """

    config: Any
    rows: list[PromptRow]
    heldout: Mapping[str, list[PromptRow]]
    formatter: PromptFormatter
    collector: Collector
    eos_token_ids: tuple[int, ...]
    eos_token_id: int
    context_length: int | None
    run: Run
    initial_weights: Callable[[], AbstractContextManager[None]] = nullcontext
    whose_context: str = "the model's context"
    log_probs: Callable[..., list[float]] | None = None

    @property
    def lacks_embeddings(self) -> bool:
        """Whether the tokenizer has tokens that the model has no embedding for."""
        count = self.formatter.num_embeddings
        return count is not None and len(self.formatter.tokenizer) > count

    @property
    def has_examples(self) -> bool:
        """Whether prompts can have few-shot examples."""
        return bool(self.formatter.few_shot_examples)

    @property
    def toolbox(self) -> Any:
        """The run's tools, a `Toolbox`, or None."""
        return None if self.formatter.tool_form is None else self.formatter.tool_form.toolbox

    @property
    def heldout_graders(self) -> list[Callable[..., Any]]:
        """The functions that grade held-out completions, without reward models."""
        scorer = self.collector.heldout_scorer
        return [] if scorer is None else scorer.callables

    def check_prompts(self, hinted: bool) -> None:
        """Raise ValueError for prompts that can't be rendered, sampled from or trained on."""
        most = build_sampling_options(self.config, ()).max_completion_length
        self.formatter.warn_control_tokens_of_examples()
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
                longest, few_shot, hinted and name == "train_dataset", name or "eval_dataset", most
            )
        check_training_lengths(
            self.rows,
            lambda row: self.training_prompt_ids([row])[row.prompt_id],
            self.config.max_length,
            most,
            _longest(self.rows),
        )

    def check_columns(self, rows: Sequence[PromptRow], name: str) -> None:
        """Raise ValueError if the reward functions can't be called with a dataset's columns."""
        scorer = self.collector.scorer
        if name != "train_dataset":
            scorer = self.collector.heldout_scorer
        if scorer is not None and rows:
            scorer.check_columns(rows[0].columns, name)

    def warn_data_errors(self) -> None:
        """Warn, before anything is sampled, of rows that the reward functions can't grade.

        Raises:
            TypeError: A function that compares with a single answer would get a list, a dict or
                bytes.
        """
        scorer, for_heldout = self.collector.scorer, self.collector.heldout_scorer
        if scorer is not None:
            self._refuse_collections(scorer, self.rows, "train_dataset")
            _warn_data_errors(scorer, self.rows, "train_dataset")
        for name, rows in self.heldout.items():
            if for_heldout is not None:
                self._refuse_collections(for_heldout, rows, name or "eval_dataset")
                _warn_data_errors(for_heldout, rows, name or "eval_dataset")

    def _refuse_collections(self, scorer: Scorer, rows: Sequence[PromptRow], name: str) -> None:
        readers = scorer.solution_readers
        wrong = next((r for r in rows if not is_answer(r.solution)), None) if readers else None
        if wrong is not None:
            raise TypeError(
                f"`{name}` row {wrong.row_index}: the solution is {wrong.solution!r:.100}, of type "
                f"{type(wrong.solution).__name__}, and {readers[0]} compares with one answer. Give "
                "text or a number, one row for each answer to accept, or a reward function of "
                "your own."
            )

    def _prompt_ids(
        self, rows: Sequence[PromptRow], few_shot: bool, hinted: bool, name: str, most: int
    ) -> list[tuple[int, ...]]:
        ids = [self.formatter.token_ids(r, few_shot=few_shot, hinted=hinted) for r in rows]
        check_lengths(
            rows, [len(i) for i in ids], most, self.context_length, name, self.whose_context
        )
        return ids

    def as_asked(self, rows: Sequence[PromptRow]) -> list[PromptRow]:
        """Return rows as they are first asked, without hints and examples."""
        return list(rows)

    def draw_prompts(self, round_index: int) -> list[PromptRow]:
        """Return the prompts of a round: all, or a draw that depends only on the seed and the round."""
        count = self.config.num_prompts_per_round
        if count is None or count >= len(self.rows):
            return self.rows
        drawn = random.Random(f"{self.config.seed}/{round_index}").sample(self.rows, count)
        return sorted(drawn, key=lambda row: row.prompt_id)

    def sample(
        self, rows: Sequence[PromptRow], round_index: int, phase: Phase, folder: Path
    ) -> Rollouts:
        """Sample `num_generations` completions per prompt, and grade them if there are reward functions.

        Few-shot examples precede the prompt in the first `few_shot_rounds` rounds. Hinted samples (phase "hint") have the answer in the prompt, and their sample indices follow
        those of the unhinted ones.
        """
        hinted, count = phase == "hint", self.config.num_generations
        indices = tuple(range(count, 2 * count) if hinted else range(count))
        rollouts = self.ask(
            rows, round_index, phase, folder / "samples", indices,
            few_shot=self.shows_examples(round_index), prefix="hint-" if hinted else "",
            # For the entropy of what is sampled. An engine would compute them anew for every token.
            return_logprobs=not self.config.use_vllm,
        )  # fmt: skip
        return weigh_calibrated(self, rollouts, folder)

    def shows_examples(self, round_index: int) -> bool:
        """Return whether a round samples with the few-shot examples before each prompt."""
        limit = self.config.few_shot_rounds if self.has_examples else 0  # SPIN has no such field
        return limit is None or round_index < limit

    def ask(
        self,
        rows: Sequence[PromptRow],
        round_index: int,
        phase: Phase,
        folder: Path | None,
        indices: Sequence[int],
        *,
        few_shot: bool = False,
        prefix: str = "",
        label: str | None = None,
        **options: Any,
    ) -> Rollouts:
        """Sample completions of any prompts, those of the dataset or others (`PromptRow.of`).

        What is already in `folder` is read back. The phase "judge" isn't graded.

        Args:
            rows: The prompts, each once.
            round_index: Part of the key of the random streams, like `phase`.
            phase: What the samples are for; "hint" shows the answers.
            folder: Where the samples are kept, in a round's folder; None keeps nothing.
            indices: The samples to draw of each prompt.
            few_shot: Show the few-shot examples before each prompt.
            prefix: Prefix of the files' names.
            label: What the progress bar says; None says the round.
            **options: Replace fields of the config, such as `max_completion_length=64`.

        Raises:
            ValueError: A prompt and its completion don't fit into the model's positions.
        """
        if not rows:
            return Rollouts.of(())
        how = build_sampling_options(self.config, self.eos_token_ids, **options)
        most = how.max_completion_length
        prompt_ids = self._prompt_ids(rows, few_shot, phase == "hint", rows[0].source, most)
        where = "preflight" if self.config.dry_run else f"round {round_index}"
        what = f"{where}{' with hints' if phase == 'hint' else ''}"
        label = "judging" if phase == "judge" else label or what  # of held-out samples as well
        with self.progress(label, len(rows) * len(indices), most) as progress:
            return self._collect(
                self.collector,
                [Assignment(r, i, tuple(indices)) for r, i in zip(rows, prompt_ids, strict=True)],
                how,
                round_index=round_index,
                phase=phase,
                progress=progress,
                folder=folder,
                prefix=prefix,
            )

    def _collect(self, collector: Collector, *what: Any, **where: Any) -> Rollouts:
        """Sample and grade, with the policy's judgements if a reward function asks for them."""
        scorer = collector.scorer
        if scorer is None or where["phase"] == "judge" or not scorer.policy_judges:
            return collector.collect(*what, **where)
        return collect_judged(self, collector, *what, **where)

    def score(
        self,
        sets: Mapping[str, Sequence[PromptRow]],
        *,
        folder: Path | None = None,
        prefix: str = "eval",
        with_few_shot: bool = False,
    ) -> HeldOutScores:
        """Score held-out sets with the current weights, in the form of the prompt that is trained on.

        Args:
            sets: Prompts by the name of their set.
            folder: Where samples are kept; None keeps nothing.
            prefix: First part of the metrics' names.
            with_few_shot: Score them also with the few-shot examples in the prompt, under
                `<prefix>_few_shot_…`: what the untrained model can do when it is shown the task.
        """
        started = time.monotonic()
        forms = {"": self.has_examples and self.config.few_shot_in_training}
        if with_few_shot and self.has_examples and not forms[""]:
            forms["few_shot_"] = True
        threshold = self.collector.eval_threshold
        metrics: dict[str, float] = {}
        of_sets: list[dict[str, float]] = []
        num_tokens = 0
        samples = sum(map(len, sets.values())) * (1 + self.config.num_generations_eval) * len(forms)
        longest = build_sampling_options(self.config, ()).max_completion_length
        with self.progress("held-out", samples, longest, ("num_generations_eval",)) as progress:
            for name, set_prefix in metric_prefixes(list(sets), prefix).items():
                for form, few_shot in forms.items():
                    rollouts, sampled = self.sample_heldout(
                        sets[name],
                        progress,
                        few_shot=few_shot,
                        folder=folder,
                        prefix=f"{name}-{form}" if name else form,
                    )
                    metrics |= summarize_heldout(
                        rollouts,
                        reward_threshold=threshold,
                        prefix=f"{set_prefix}_{form}".rstrip("_"),
                    )
                    of_sets.append(greedy_scores(rollouts, threshold))
                    num_tokens += sampled
        logged = _take_logged(self.collector.heldout_scorer, self.collector.accelerator)
        metrics |= {f"{prefix}_{name}": value for name, value in logged.items()}
        seconds = time.monotonic() - started
        return HeldOutScores(metrics, of_sets[0] if of_sets else {}, seconds, num_tokens)

    def sample_heldout(
        self,
        rows: Sequence[PromptRow],
        progress: Progress,
        *,
        few_shot: bool = False,
        folder: Path | None = None,
        prefix: str = "",
    ) -> tuple[Rollouts, int]:
        """Sample and grade held-out prompts, once greedily and `num_generations_eval` times at random.

        The random streams don't depend on the round: every round, and a later evaluation of a
        saved model, uses the same noise, so that rounds differ only in their weights.

        Args:
            rows: The prompts.
            progress: Notified of finished samples.
            few_shot: Show the few-shot examples before each prompt.
            folder: Where samples are kept; None keeps nothing.
            prefix: Prefix of the files' names.

        Returns:
            The rollouts, of which `sample_index` 0 is the greedy one, and the tokens sampled for them.
        """
        collector = replace(self.collector, scorer=self.collector.heldout_scorer)
        greedy, sampled = heldout_options(self.config, self.eos_token_ids)
        prompt_ids = [self.formatter.token_ids(row, few_shot=few_shot) for row in rows]
        rollouts = Rollouts.of(())
        for name, options, indices in (
            ("greedy-", greedy, (0,)),
            ("sampled-", sampled, tuple(range(1, self.config.num_generations_eval + 1))),
        ):
            if indices:
                rollouts += self._collect(
                    collector,
                    [Assignment(r, ids, indices) for r, ids in zip(rows, prompt_ids, strict=True)],
                    options,
                    round_index=0,  # the key of the streams, see above
                    phase="eval",
                    progress=progress,
                    folder=folder,
                    prefix=prefix + name,
                )
        return rollouts, rollouts.num_tokens

    def progress(
        self,
        description: str,
        total: int,
        max_completion_length: int,
        settings: Sequence[str] = ("num_prompts_per_round", "num_generations"),
    ) -> SamplingProgress:
        """Return a progress bar over samples, of which each process has its share."""
        is_main = self.collector.accelerator.is_main_process
        disable = self.config.disable_tqdm or not is_main
        share = total / self.collector.accelerator.num_processes  # until the shards are known
        return SamplingProgress(share, description, max_completion_length, disable, settings)

    def training_prompt_ids(self, rows: Sequence[PromptRow]) -> dict[str, tuple[int, ...]]:
        """Return the prompts as trained on: never hinted, few-shot only if configured."""
        few_shot = self.has_examples and self.config.few_shot_in_training
        return {row.prompt_id: self.formatter.token_ids(row, few_shot=few_shot) for row in rows}

    def load_gold(self, dataset: Any, *, needs_solutions: bool) -> Gold:
        """Return a dataset's human completions; None gives none.

        Args:
            dataset: As `gold.load_gold` takes it.
            needs_solutions: Whether they will be graded.

        Raises:
            TypeError, ValueError: For rows that can't work, or whose prompts are held out.
        """
        if dataset is None:
            return Gold((), {})
        scorer = self.collector.scorer
        for name in scorer.comparing if scorer is not None and needs_solutions else ():
            raise ValueError(
                f"{name} compares a prompt's samples, so it can't grade `gold_dataset`, whose completions "
                "may be the only ones of their prompts. Leave it out, or take another reward function."
            )
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
        if not from_main(accelerator, path.exists()):
            judgements = self.run.root / "judgements"
            with judged(self, self.collector, gold.rollouts, gold.rows, 0, judgements, "gold-"):
                if accelerator.is_main_process:
                    save_rollouts(path, self.collector.grade(gold.rollouts, gold.rows))
        wait_for_all(accelerator)
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
        """Return whether a training example fits into `max_length`."""
        if self.config.max_length is None:
            return True
        completion = training_completion_ids(rollout, self.eos_token_id)
        return len(prompt_ids[rollout.prompt_id]) + len(completion) <= self.config.max_length

    def build_sft_round(
        self,
        round_index: int,
        selection: Selection,
        prompt_ids: Mapping[str, tuple[int, ...]],
        *,
        weigh: RowWeights | None = None,
        metrics: Mapping[str, float] = MappingProxyType({}),
    ) -> PlayedRound:
        """Save the selection, and build SFTTrainer's rows and the round's metrics.

        Args:
            round_index: The round that trains on them.
            selection: What is trained on, and the outcome of every rollout.
            prompt_ids: Prompts as trained on.
            weigh: Returns the rows' weights; gold completions without a reward weigh 1.
            metrics: Further metrics to log.
        """
        folder = self.run.folder(round_index)
        num_examples = len(selection.examples)

        def build(where: Path) -> Dataset:
            return build_training_rows(
                selection.examples,
                prompt_ids,
                self.eos_token_id,
                seed=self.config.seed + round_index,
                weigh=weigh,
                completion_only=self.config.completion_only_loss is not False,
                folder=where,
            )

        def build_packed(where: Path) -> Dataset:
            with_rows = folder / ".unpacked"
            packed = pack_dataset(
                build(with_rows), self.config.max_length, self.config.packing_strategy
            )
            saved = save_dataset(where, packed)
            shutil.rmtree(with_rows, ignore_errors=True)
            return saved

        self.keep_selection(folder, selection)
        is_packed = self.config.packing and num_examples
        rows = build_on_main(
            self.collector.accelerator, folder / "dataset", build_packed if is_packed else build
        )
        return self.describe_round(round_index, selection, rows, num_examples, metrics)

    def describe_round(
        self,
        round_index: int,
        selection: Selection,
        rows: Dataset,
        num_examples: int,
        metrics: Mapping[str, float],
    ) -> PlayedRound:
        """Return what a round trains on, with its rewards and metrics.

        Args:
            round_index: The round that trains on them.
            selection: What is trained on, and the outcome of every rollout.
            rows: The parent's dataset, final.
            num_examples: Selected examples; packed rows hold several.
            metrics: Further metrics to log; they override the common ones of the same name.
        """
        scorer, accelerator = self.collector.scorer, self.collector.accelerator
        rewards = mean_rewards(selection.facts, () if scorer is None else scorer.names)
        return PlayedRound(
            rows,
            num_examples,
            replace(selection.funnel, gold=len(selection.gold)),
            selection.rollouts,
            round_metrics(selection, rewards)
            | dict(metrics)
            | {f"play/{n}": v for n, v in _take_logged(scorer, accelerator).items()},
            rewards,
            outcomes=selection.outcomes,
        )

    def keep_selection(self, folder: Path, selection: Selection) -> None:
        """Save in a round's folder what became of each rollout, and what is trained on beside them.

        Print completions if configured.
        """
        if self.collector.accelerator.is_main_process:
            save_selection(folder / "selection.parquet", selection)
            save_history(folder / "history.parquet", selection.history)
            save_history(folder / "drawn_gold.parquet", selection.gold)
            if self.config.log_completions:
                print_completions(selection.rollouts, self.config.num_completions_to_print)


def _warn_data_errors(scorer: Scorer, rows: Sequence[PromptRow], name: str) -> None:
    sample = rows[:_MOST_ROWS_CHECKED]
    if not sample:
        return
    columns = {key: [row.columns[key] for row in sample] for key in sample[0].columns}
    found = scorer.find_data_errors([row.prompt for row in sample], columns)
    for function, errors in found.items():
        examples = [f"row {sample[i].row_index}: {why}" for i, why in islice(errors.items(), 5)]
        logger.warning(
            "%s can't grade %d of %d rows of `%s` as they are (%s): their completions get no score, or a "
            "wrong one. Fix or drop these rows, or use another reward function.",
            function,
            len(errors),
            len(sample),
            name,
            "; ".join(examples),
        )


def _longest(rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Return the rows that probably have the most tokens."""

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


def _take_logged(scorer: Scorer | None, accelerator: Accelerator) -> dict[str, float]:
    """Return the numbers that reward functions logged in all processes; none if nothing is graded."""
    return {} if scorer is None else scorer.take_metrics(partial(gather, accelerator))
