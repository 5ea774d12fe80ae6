"""Sample and grade a fixed list of prompts, shard by shard, so that no finished work is lost.

In: assignments (a prompt's tokens and which of its samples to draw), a sampler, a scorer. Out:
graded rollouts. What each shard holds is decided and written down before the first token is
sampled; a shard is saved when sampled, graded, and saved again. Whoever comes back after a kill
finds the plan, reads the shards that are whole and goes on with the first that is not.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from trl_selfplay.generation.random_streams import stream_key
from trl_selfplay.generation.sampler import Sampler, SampleRequest, SamplingOptions
from trl_selfplay.one_ahead import one_ahead
from trl_selfplay.prompts import PromptRow
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts import (
    CorruptShardError,
    Phase,
    Rollout,
    load_rollouts,
    save_rollouts,
    save_text,
)

logger = logging.getLogger(__name__)

# A shard is what a kill can cost. Several batches, so that rows freed by short completions can
# be filled again within it.
BATCHES_PER_SHARD = 4


@dataclass(frozen=True, slots=True)
class Assignment:
    """The samples to draw of one prompt: its row, the tokens to condition on, the sample indices."""

    row: PromptRow
    prompt_ids: tuple[int, ...]
    sample_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """A fixed share of the work: prompt ids, and the most sequences decoded together."""

    prompt_ids: tuple[str, ...]
    batch_size: int


class Progress(Protocol):
    """What is told while samples come in."""

    def update(self, num_samples: int, num_tokens: int, restored: bool = False) -> None:
        """Count finished samples and their completion tokens, or those read back from disk."""

    def set_solved(self, share: float) -> None:
        """Tell the share of prompts, among those graded so far, with a passing sample."""


@dataclass(frozen=True, slots=True)
class Collector:
    """Everything that sampling and grading need and that stays the same over rounds."""

    sampler: Sampler
    scorer: Scorer | None  # None: completions are paired, not graded
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    seed: int
    reward_threshold: float = 1.0
    refuses_negative_rewards: bool = False
    eval_scorer: Scorer | None = None  # None: held-out prompts are graded like the others

    def collect(
        self,
        assignments: Sequence[Assignment],
        options: SamplingOptions,
        *,
        round_index: int,
        phase: Phase,
        progress: Progress,
        folder: Path | None = None,
        prefix: str = "",
    ) -> list[Rollout]:
        """Return the graded rollouts of all assignments, sorted by (prompt_id, sample_index).

        While a shard is graded the next one is sampled, in a thread of its own.

        Under several processes each samples every n-th shard, and all return all rollouts.

        Args:
            assignments: What to sample; the order has no influence.
            options: Of the sampler, the same for all.
            round_index: Key of the random streams and field of the rollouts.
            phase: Likewise.
            progress: Told of finished samples.
            folder: Where shards are kept, or None to keep nothing.
            prefix: Of the shards' file names.

        Raises:
            RuntimeError, ValueError, TypeError: From a reward function, named; the samples stay
                on disk and are only graded when the run is resumed.
            OSError: The disk is full; what is finished stays.
        """
        by_id = {a.row.prompt_id: a for a in assignments}
        shards = self._load_or_plan(assignments, options, folder, prefix)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        collected: list[Rollout] = []
        solved: list[bool] = []
        rows = {prompt_id: a.row for prompt_id, a in by_id.items()}
        stop = Event()

        def sample_shards() -> Iterator[tuple[Shard, Path | None, list[Rollout]]]:
            for index, shard in enumerate(shards):
                if index % world != rank:
                    continue
                path = None if folder is None else folder / f"{prefix}{index:05d}.parquet"
                chosen = [by_id[prompt_id] for prompt_id in shard.prompt_ids]
                rollouts = _load_finished(path, chosen)
                if rollouts is None:
                    rollouts = self._sample(
                        chosen, options, shard.batch_size, round_index, phase, progress, stop
                    )
                    if path is not None:
                        save_rollouts(path, rollouts)
                else:
                    num_tokens = sum(len(r.completion_ids) for r in rollouts)
                    progress.update(len(rollouts), num_tokens, restored=True)
                yield shard, path, rollouts

        # Reward functions stay in the main thread: those with timeouts by signal need it.
        with closing(one_ahead(sample_shards(), stop)) as sampled:
            for shard, path, rollouts in sampled:
                if self.scorer is not None and not all(r.is_graded for r in rollouts):
                    rollouts = self.grade(rollouts, rows)
                    if path is not None:
                        save_rollouts(path, rollouts)
                collected += rollouts
                if self.scorer is not None:
                    passed = {r.prompt_id for r in rollouts if r.passes(self.reward_threshold)}
                    solved += [prompt_id in passed for prompt_id in shard.prompt_ids]
                    progress.set_solved(sum(solved) / len(solved))
        if world > 1:
            collected = gather_object(collected)
        return sorted(collected, key=lambda r: (r.prompt_id, r.sample_index))

    def _load_or_plan(
        self,
        assignments: Sequence[Assignment],
        options: SamplingOptions,
        folder: Path | None,
        prefix: str,
    ) -> list[Shard]:
        path = None if folder is None else folder / f"{prefix}plan.json"
        # Every process must plan the same, and free memory differs between them: one decides.
        shards: list[Shard] | None = None
        if self.accelerator.is_main_process:
            shards = None if path is None else _load_plan(path, assignments)
            if shards is None:
                shards = plan_shards(assignments, options.max_completion_length, self.sampler)
                if path is not None:
                    _save_plan(path, shards)
        if self.accelerator.num_processes > 1:
            shards = gather_object([shards])[0]
        assert shards is not None
        return shards

    def _sample(
        self,
        assignments: Sequence[Assignment],
        options: SamplingOptions,
        batch_size: int,
        round_index: int,
        phase: Phase,
        progress: Progress,
        stop: Event,
    ) -> list[Rollout]:
        wanted = [(a, index) for a in assignments for index in a.sample_indices]
        requests = [
            SampleRequest(
                a.prompt_ids,
                stream_key(self.seed, round_index, phase, a.row.prompt_id, sample_index),
            )
            for a, sample_index in wanted
        ]
        prompt_texts = {a.row.prompt_id: _decode(self.tokenizer, a.prompt_ids) for a in assignments}
        rollouts: list[Rollout | None] = [None] * len(wanted)
        for request_index, sampled in self.sampler.sample(requests, options, batch_size):
            if stop.is_set():
                break
            assignment, sample_index = wanted[request_index]
            text_ids = sampled.completion_ids
            if sampled.finish == "eos":
                text_ids = text_ids[:-1]
            rollouts[request_index] = Rollout(
                round_index=round_index,
                phase=phase,
                prompt_id=assignment.row.prompt_id,
                sample_index=sample_index,
                prompt_ids=assignment.prompt_ids,
                completion_ids=sampled.completion_ids,
                prompt=prompt_texts[assignment.row.prompt_id],
                completion=_decode(self.tokenizer, text_ids, skip_special_tokens=True),
                finish=sampled.finish,
                hinted=phase == "hint",
                logprob=sampled.logprob,
            )
            progress.update(1, len(sampled.completion_ids))
        finished = [r for r in rollouts if r is not None]
        if len(finished) < len(wanted):
            raise RuntimeError(
                f"the sampler returned {len(finished)} completions for {len(wanted)} requests"
            )
        return finished

    def grade(self, rollouts: Sequence[Rollout], by_id: Mapping[str, PromptRow]) -> list[Rollout]:
        """Return the rollouts, all of one phase, with their rewards.

        Raises:
            RuntimeError, ValueError, TypeError: From a reward function, named.
            ValueError: A reward is negative where rewards are weights.
        """
        is_heldout = self.eval_scorer is not None and rollouts[0].phase == "eval"
        scorer = self.eval_scorer if is_heldout else self.scorer
        if scorer is None:
            raise RuntimeError("there are no reward functions to grade with")
        rows = [by_id[r.prompt_id] for r in rollouts]
        completions: list[Any] = [
            [{"role": "assistant", "content": r.completion}]
            if row.is_conversational
            else r.completion
            for r, row in zip(rollouts, rows, strict=True)
        ]
        scores = scorer.score(
            prompts=[row.prompt for row in rows],
            completions=completions,
            completion_ids=[list(r.completion_ids) for r in rollouts],
            columns={name: [row.columns[name] for row in rows] for name in rows[0].columns},
        )
        graded = [
            replace(r, rewards=rewards, reward=scorer.weighted(rewards))
            for r, rewards in zip(rollouts, scores, strict=True)
        ]
        if self.refuses_negative_rewards and not is_heldout:
            _check_not_negative(graded, scorer.names)
        return graded


def _check_not_negative(rollouts: Sequence[Rollout], names: Sequence[str]) -> None:
    for r in rollouts:
        if r.reward is not None and r.reward < 0.0:
            scored = {n: s for n, s in zip(names, r.rewards, strict=True) if s is not None}
            worst = min(scored, key=lambda name: scored[name])
            raise ValueError(
                f"a completion has the reward {r.reward:g} ({worst} gave {scored[worst]:g}), and "
                "loss_weighting='reward' weighs completions by their reward, which must not be "
                "negative (arXiv 2312.06585, section 3). Shift or clip the reward, or set "
                f"loss_weighting='filter'. Prompt: {r.prompt[-200:]!r}. Completion: "
                f"{r.completion[:200]!r}"
            )


def _decode(tokenizer: Any, ids: Sequence[int], **kwargs: Any) -> str:
    return tokenizer.decode(list(ids), **kwargs)


def plan_shards(
    assignments: Sequence[Assignment], max_completion_length: int, sampler: Sampler
) -> list[Shard]:
    """Divide the work into shards of about `BATCHES_PER_SHARD` batches.

    The longest prompts come first: what doesn't fit in memory shows in the first minute. All
    samples of a prompt are in one shard, so that a reward function can compare them.
    """
    ordered = sorted(assignments, key=lambda a: (-len(a.prompt_ids), a.row.prompt_id))
    shards: list[Shard] = []
    start = 0
    while start < len(ordered):
        batch_size = sampler.suggest_batch_size(
            len(ordered[start].prompt_ids), max_completion_length
        )
        end, num_samples = start, 0
        while end < len(ordered) and num_samples < BATCHES_PER_SHARD * batch_size:
            num_samples += len(ordered[end].sample_indices)
            end += 1
        shards.append(Shard(tuple(a.row.prompt_id for a in ordered[start:end]), batch_size))
        start = end
    return shards


def _save_plan(path: Path, shards: Sequence[Shard]) -> None:
    content = [{"prompt_ids": s.prompt_ids, "batch_size": s.batch_size} for s in shards]
    save_text(path, json.dumps(content))


def _load_plan(path: Path, assignments: Sequence[Assignment]) -> list[Shard] | None:
    if not path.exists():
        return None
    shards = [Shard(tuple(s["prompt_ids"]), s["batch_size"]) for s in json.loads(path.read_text())]
    planned = {prompt_id for shard in shards for prompt_id in shard.prompt_ids}
    if planned != {a.row.prompt_id for a in assignments}:
        raise ValueError(
            f"{path} plans {len(planned)} prompts that are not the {len(assignments)} of this run: "
            "the dataset or `num_prompts_per_round` changed. Use another `output_dir`, or delete "
            f"{path.parent} to sample this phase anew."
        )
    return shards


def _load_finished(path: Path | None, assignments: Sequence[Assignment]) -> list[Rollout] | None:
    """Return a shard's rollouts if it is there, whole, and holds what was planned."""
    if path is None or not path.exists():
        return None
    try:
        rollouts = load_rollouts(path)
    except CorruptShardError as error:
        logger.warning("%s; sampling this shard again, the others are kept.", error)
        return None
    planned = {
        (a.row.prompt_id, index, a.prompt_ids) for a in assignments for index in a.sample_indices
    }
    if {(r.prompt_id, r.sample_index, r.prompt_ids) for r in rollouts} != planned:
        logger.warning(
            "%s doesn't hold the samples that were planned; sampling this shard again, the others "
            "are kept.",
            path,
        )
        return None
    return rollouts
