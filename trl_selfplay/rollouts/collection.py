"""Sample and grade a fixed list of prompts, shard by shard, so that no finished work is lost.

In: assignments (a prompt's tokens and which of its samples to draw), a sampler, a scorer. Out: graded
rollouts. The content of each shard is planned and written to disk before the first token is sampled.
Finished prompts are graded while others are sampled. A shard is saved when it is sampled, and again
when it is graded. After a kill, the plan and all complete shards are read, and work resumes at the
first incomplete shard.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, Protocol

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from trl_selfplay.disk import is_found
from trl_selfplay.generation.random_streams import Phase, stream_key
from trl_selfplay.generation.sampler import Sampler, SampleRequest, SamplingOptions
from trl_selfplay.peers import (
    check_peers,
    from_main,
    gather,
    shared_counter,
    together,
    wait_for_all,
)
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.ahead import run_ahead
from trl_selfplay.rollouts.hand_out import take_shards
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.readable import (
    completion_messages,
    completion_text,
    decode,
    find_tag_ids,
)
from trl_selfplay.rollouts.record import Rollout, save_rollouts
from trl_selfplay.rollouts.sequence import Rollouts, StoredShard
from trl_selfplay.rollouts.shards import (
    Assignment,
    Shard,
    held_prompts,
    load_plan,
    load_shard,
    plan_shards,
    save_engine,
    save_plan,
    split_found,
)
from trl_selfplay.tools.trajectories import Trajectories

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Receives progress while samples come in."""

    def expect(self, num_more: float) -> None:
        """Raise, or lower, the number of samples that this process will finish."""

    def decode(self, num_tokens: int) -> None:
        """Count tokens as they are decoded, those of unfinished samples too."""

    def update(self, num_samples: int, num_tokens: int, restored: bool = False) -> None:
        """Count finished samples and their completion tokens, or those read back from disk."""

    def set_solved(self, share: float) -> None:
        """Report the share of the prompts graded so far that have a passing sample."""

    def set_abstained(self, count: int, cause: str | None) -> None:
        """Report how many samples have no reward, and the most frequent cause, if one is known."""


@dataclass(frozen=True, slots=True)
class Collector:
    """Samples and grades prompts; its fields are constant over rounds."""

    sampler: Sampler
    scorer: Scorer | None  # None: completions are paired, not graded
    tokenizer: PreTrainedTokenizerBase
    accelerator: Accelerator
    seed: int
    reward_threshold: float = 1.0
    has_degrees: bool = False  # completions below the threshold are trained on too
    eval_threshold: float | None = 1.0  # None: held-out rewards are graded, not right or wrong
    refuses_negative_rewards: bool = False
    eval_scorer: Scorer | None = None  # None: held-out prompts are graded like the others
    trajectories: Trajectories | None = None  # None: completions are single turns without tools

    @property
    def heldout_scorer(self) -> Scorer | None:
        """What grades held-out completions; None if nothing does."""
        return self.eval_scorer or self.scorer

    def models_on(self, device: Any) -> list[Any]:
        """Return the models that grade on this device, each once."""
        scorers = [s for s in (self.scorer, self.eval_scorer) if s is not None]
        found = [model for scorer in scorers for model in scorer.models_on(device)]
        return list({id(model): model for model in found}.values())

    def park_models(self) -> None:
        """Move the models that grade off the device, before the policy trains on it."""
        for scorer in (self.scorer, self.eval_scorer):
            if scorer is not None:
                scorer.park_models()

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
    ) -> Rollouts:
        """Return the graded rollouts of all assignments, in the order of the shards.

        Those of the phase "judge" aren't graded, nor are any without reward functions. With a
        folder all lie there, and are read when they are needed.

        Prompts whose samples are all there are graded while others are sampled, in a thread of its
        own: all that are waiting in one call, each with its samples together and in the order of
        their indices. Where a function holds a model, a call gets a whole shard. The thread waits
        when as many prompts are waiting as the largest shard has.

        With several processes, each takes the next shard when it is free, and all return all rollouts.

        Args:
            assignments: What to sample; the order has no influence.
            options: Sampling options for all samples.
            round_index: Part of the key of the random streams, and a field of the rollouts.
            phase: Part of the key of the random streams, and a field of the rollouts.
            progress: Notified of finished samples.
            folder: Folder for shards, or None to keep nothing.
            prefix: Prefix of the shards' file names.

        Raises:
            RuntimeError, ValueError, TypeError: From a reward function, named; the samples stay
                on disk and are only graded when the run is resumed.
            OSError: The disk is full; what is finished stays.
            PeerError: Another process has ended.
        """
        with together(self.accelerator):
            shards = self._load_or_plan(assignments, options, folder, prefix)
            work = _Work(
                shards={f"{prefix}{i:05d}": s for i, s in enumerate(shards) if s.prompt_ids},
                assignments={a.row.prompt_id: a for a in assignments},
                options=options,
                round_index=round_index,
                phase=phase,
                folder=folder,
                prefix=prefix,
            )
            numbers = take_shards(len(work.shards), shared_counter())
            collected = self._grade_as_sampled(work, numbers, progress)
            wait_for_all(self.accelerator)
            return self._join(work, collected)

    def _join(self, work: "_Work", collected: Mapping[str, list[Rollout]]) -> Rollouts:
        """Return the rollouts of all processes, in the order of the shards."""
        if work.folder is not None:
            stored = [StoredShard(work.path(name), s.prompt_ids) for name, s in work.shards.items()]
            if self.accelerator.num_processes > 1:  # which wrote some of them
                all(is_found(shard.path) for shard in stored)
            return Rollouts.stored(stored)
        found = dict(gather(self.accelerator, [*collected.items()]))
        return Rollouts.of([r for name in work.shards for r in found[name]])

    def _grade_as_sampled(
        self, work: "_Work", numbers: Iterator[int], progress: Progress
    ) -> dict[str, list[Rollout]]:
        """Grade this process's shards as they are sampled, if there is anything to grade with.

        Returns:
            Their rollouts by the shard's name, unless they are on disk.
        """
        grades = self.scorer is not None and work.phase != "judge"
        threshold = None if self.has_degrees else self.reward_threshold
        if work.phase == "eval":
            threshold = self.eval_threshold
        tally = _Tally(progress, threshold)
        rows = {prompt_id: a.row for prompt_id, a in work.assignments.items()}
        stop = Event()
        most = max((len(shard.prompt_ids) for shard in work.shards.values()), default=1)
        # A model that grades shares the device with the sampler, and the last bit of its scores depends
        # on what is in its batch: it gets whole shards, not what happens to be waiting.
        grades_shards = grades and self._grades_shards
        waiting: dict[str, list[list[Rollout]]] = defaultdict(list)
        unfinished: dict[str, list[Rollout]] = defaultdict(list)
        changed: set[str] = set()
        collected: dict[str, list[Rollout]] = {}
        sampled = self._sample_shards(work, numbers, progress, stop)
        # Reward functions stay in the main thread: those with timeouts by signal need it.
        with closing(run_ahead(sampled, stop, most)) as batches:
            for batch in batches:
                check_peers()
                for name, items in groupby(batch, key=lambda item: item.shard):
                    waiting[name] += [item.rollouts for item in items]
                    is_sampled = not waiting[name][-1]  # all of the shard, and it is on disk
                    if grades_shards and not is_sampled:
                        continue
                    prompts = waiting.pop(name)
                    rollouts = [r for same in prompts for r in same]
                    if grades:
                        done = [r for same in prompts if _are_graded(same) for r in same]
                        new = [r for same in prompts if not _are_graded(same) for r in same]
                        if new:
                            changed.add(name)
                            where = f"shard {name}, round {work.round_index}"
                            new = self.grade(work.in_order(name, new), rows, where)
                        rollouts = done + new
                        tally.count(rollouts)
                    unfinished[name] += rollouts
                    if is_sampled:
                        finished = work.in_order(name, unfinished.pop(name))
                        if work.folder is None:
                            collected[name] = finished
                        elif name in changed:
                            save_rollouts(work.path(name), finished)
        return collected

    def _sample_shards(
        self, work: "_Work", numbers: Iterator[int], progress: Progress, stop: Event
    ) -> Generator["_SampledPrompt"]:
        """Yield each prompt as it is finished, then its shard's end, once that is on disk.

        What has been sampled is saved as well if the shard can't be finished.
        """
        names = list(work.shards)
        for number in self._tell_share(work, numbers, progress):
            name, shard = names[number], work.shards[names[number]]
            found = [] if work.folder is None else load_shard(work.path(name))
            kept, missing = split_found(found, [work.assignments[i] for i in shard.prompt_ids])
            progress.update(len(kept), sum(len(r.own_ids) for r in kept), restored=True)
            if found and missing:
                logger.warning(
                    "%s holds %d of the samples that are planned; the others are sampled.",
                    work.path(name),
                    len(kept),
                )
            samples: dict[str, list[Rollout]] = {prompt_id: [] for prompt_id in shard.prompt_ids}
            for rollout in kept:
                samples[rollout.prompt_id].append(rollout)
            try:
                lacking = {a.row.prompt_id for a in missing}
                for prompt_id in shard.prompt_ids:
                    if prompt_id not in lacking:
                        yield _SampledPrompt(name, samples[prompt_id])
                with closing(self._sample(missing, name, work, progress, stop)) as sampled:
                    for rollout in sampled:
                        same = samples[rollout.prompt_id]
                        same.append(rollout)
                        if len(same) == len(work.assignments[rollout.prompt_id].sample_indices):
                            same.sort(key=lambda r: r.sample_index)
                            yield _SampledPrompt(name, same)
            except _Stopped:  # nobody waits for what was being decoded
                pass
            finally:
                rollouts = work.in_order(name, [r for same in samples.values() for r in same])
                if work.folder is not None and found != rollouts:
                    save_rollouts(work.path(name), rollouts)
                    engine = getattr(self.sampler, "engine_record", None)
                    if engine is not None and len(rollouts) > len(kept):
                        save_engine(work.folder / f"{work.prefix}engines.json", name, engine)
                if work.folder is not None and len(rollouts) == work.count_samples(
                    shard.prompt_ids
                ):
                    work.steps_path(name).unlink(missing_ok=True)
            if stop.is_set():
                return
            yield _SampledPrompt(name, [])

    @property
    def _grades_shards(self) -> bool:
        return self.scorer is not None and self.scorer.has_models

    def _tell_share(
        self, work: "_Work", numbers: Iterator[int], progress: Progress
    ) -> Iterator[int]:
        """Yield the numbers of this process's shards, and tell what it will have sampled in the end.

        That is what it has taken, and an equal share of what is left.
        """
        world = self.accelerator.num_processes
        sizes = [work.count_samples(shard.prompt_ids) for shard in work.shards.values()]
        ends = list(accumulate(sizes))
        own, told = 0, sum(sizes) / world
        for number in numbers:
            own += sizes[number]
            expected = own + (ends[-1] - ends[number]) / world
            progress.expect(expected - told)
            told = expected
            yield number
        progress.expect(own - told)

    def _load_or_plan(
        self,
        assignments: Sequence[Assignment],
        options: SamplingOptions,
        folder: Path | None,
        prefix: str,
    ) -> list[Shard]:
        path = None if folder is None else folder / f"{prefix}plan.json"
        shards: list[Shard] | None = None
        if self.accelerator.is_main_process:
            shards = None if path is None else load_plan(path, assignments)
            if shards is None:
                held = {} if folder is None else held_prompts(folder, prefix, assignments)
                shards = plan_shards(
                    assignments,
                    options.max_completion_length,
                    self.sampler,
                    held,
                    # The last bit of a model's score depends on what else is in the shard.
                    1 if self._grades_shards else self.accelerator.num_processes,
                )
                if path is not None:
                    save_plan(path, shards)
        # All must have the same plan, and free memory differs between processes.
        shards = from_main(self.accelerator, shards)
        assert shards is not None
        return shards

    def _sample(
        self,
        assignments: Sequence[Assignment],
        name: str,
        work: "_Work",
        progress: Progress,
        stop: Event,
    ) -> Generator[Rollout]:
        """Yield each sample of a shard as it is finished."""
        if not assignments:
            return
        wanted = [(a, index) for a in assignments for index in a.sample_indices]
        requests = [
            SampleRequest(
                a.prompt_ids,
                stream_key(self.seed, work.round_index, work.phase, a.row.prompt_id, sample_index),
            )
            for a, sample_index in wanted
        ]
        prompt_texts = {a.row.prompt_id: decode(self.tokenizer, a.prompt_ids) for a in assignments}
        tag_ids = find_tag_ids(self.tokenizer)
        left = set(range(len(wanted)))

        def on_tokens(num_tokens: int) -> None:
            if stop.is_set():
                raise _Stopped
            check_peers()
            progress.decode(num_tokens)

        with ExitStack() as stack:
            sampler = self._sampler_of(name, work, [a.row for a, _ in wanted], stack)
            batch_size = work.shards[name].batch_size
            for request_index, sampled in sampler.sample(
                requests, work.options, batch_size, on_tokens
            ):
                if stop.is_set():
                    return
                assignment, sample_index = wanted[request_index]
                left.remove(request_index)
                rollout = Rollout(
                    round_index=work.round_index,
                    phase=work.phase,
                    prompt_id=assignment.row.prompt_id,
                    sample_index=sample_index,
                    prompt_ids=assignment.prompt_ids,
                    completion_ids=sampled.completion_ids,
                    prompt=prompt_texts[assignment.row.prompt_id],
                    completion=completion_text(self.tokenizer, sampled, tag_ids),
                    finish=sampled.finish,
                    hinted=work.phase == "hint",
                    logprob=sampled.logprob,
                    completion_mask=sampled.completion_mask,
                    messages=sampled.messages,
                    environment_reward=sampled.environment_reward,
                    halt=sampled.halt,
                    num_failed_calls=sampled.num_failed_calls,
                    num_rerendered_turns=sampled.num_rerendered_turns,
                )
                progress.update(1, len(rollout.own_ids))
                yield rollout
        if left:
            raise RuntimeError(
                f"the sampler returned {len(wanted) - len(left)} completions for {len(wanted)} "
                "requests"
            )

    def _sampler_of(
        self, name: str, work: "_Work", rows: Sequence[PromptRow], stack: ExitStack
    ) -> Sampler:
        """Return what samples a shard: the sampler, or trajectories over it, with their steps on disk.

        Args:
            name: The shard.
            work: What is sampled.
            rows: The row of each request.
            stack: Closes the file of steps.
        """
        if self.trajectories is None or work.phase == "judge":
            return self.sampler
        log = None
        if work.folder is not None:
            log = stack.enter_context(closing(self.trajectories.step_log(work.steps_path(name))))
        return self.trajectories.over(self.sampler, [row.task for row in rows], log)

    def grade(
        self, rollouts: Sequence[Rollout], by_id: Mapping[str, PromptRow], name: str = ""
    ) -> list[Rollout]:
        """Return the rollouts, all of one phase, with their rewards.

        Chat completions reach the reward functions as messages, see `completion_messages`; others as
        the text of what the policy wrote. `name` is what the log calls these rollouts.

        Raises:
            RuntimeError, ValueError, TypeError: From a reward function, named.
            ValueError: A reward is negative where rewards are weights.
        """
        is_heldout = self.eval_scorer is not None and rollouts[0].phase == "eval"
        scorer = self.eval_scorer if is_heldout else self.scorer
        if scorer is None:
            raise RuntimeError("there are no reward functions to grade with")
        scores = scorer.score(**self.reward_arguments(rollouts, by_id), where=name)
        graded = [
            replace(
                r,
                rewards=tuple(given),
                reward=scorer.weighted(given),
                causes=tuple(map(given.causes.get, range(len(given)))) if given.causes else (),
            )
            for r, given in zip(rollouts, scores, strict=True)
        ]
        if self.refuses_negative_rewards and not is_heldout and not scorer.calibration.names:
            _check_not_negative(graded, scorer.names)
        return graded

    def reward_arguments(
        self, rollouts: Sequence[Rollout], by_id: Mapping[str, PromptRow]
    ) -> dict[str, Any]:
        """Return what reward functions get of some rollouts, as `Scorer.score` takes it."""
        rows = [by_id[r.prompt_id] for r in rollouts]
        return {
            "prompts": [row.prompt for row in rows],
            "completions": [
                completion_messages(self.tokenizer, r) if row.is_conversational else r.completion
                for r, row in zip(rollouts, rows, strict=True)
            ],
            "completion_ids": [list(r.completion_ids) for r in rollouts],
            "columns": {key: [row.columns[key] for row in rows] for key in rows[0].columns},
            "groups": [r.prompt_id for r in rollouts],
            "environment_rewards": [r.environment_reward for r in rollouts],
        }


class _Stopped(Exception):
    """Sampling was told to stop while completions were being decoded."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What is sampled in a phase: all shards by the names of their files, and how."""

    shards: Mapping[str, Shard]
    assignments: Mapping[str, Assignment]
    options: SamplingOptions
    round_index: int
    phase: Phase
    folder: Path | None
    prefix: str

    def path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.parquet"

    def steps_path(self, name: str) -> Path:
        """Return the file with the steps of trajectories, until the shard is whole and saved."""
        assert self.folder is not None
        return self.folder / f"{name}.steps.jsonl"

    def count_samples(self, prompt_ids: Iterable[str]) -> int:
        return sum(len(self.assignments[prompt_id].sample_indices) for prompt_id in prompt_ids)

    def in_order(self, name: str, rollouts: Sequence[Rollout]) -> list[Rollout]:
        place = {prompt_id: i for i, prompt_id in enumerate(self.shards[name].prompt_ids)}
        return sorted(rollouts, key=lambda r: (place[r.prompt_id], r.sample_index))


class _SampledPrompt(NamedTuple):
    """All samples of a prompt, by index; none if the shard has come to its end."""

    shard: str
    rollouts: list[Rollout]


class _Tally:
    """Tells the progress bar what has been graded so far."""

    def __init__(self, progress: Progress, threshold: float | None) -> None:
        self._progress = progress
        self._threshold = threshold
        self._prompts: set[str] = set()
        self._solved: set[str] = set()
        self._causes: Counter[str] = Counter()
        self._num_abstained = 0

    def count(self, rollouts: Sequence[Rollout]) -> None:
        self._prompts |= {r.prompt_id for r in rollouts}
        if self._threshold is not None and self._prompts:
            self._solved |= {r.prompt_id for r in rollouts if r.passes(self._threshold)}
            self._progress.set_solved(len(self._solved) / len(self._prompts))
        self._causes.update(r.cause for r in rollouts if r.cause is not None)
        self._num_abstained += sum(r.reward is None for r in rollouts)
        if self._num_abstained:
            cause = next((cause for cause, _ in self._causes.most_common(1)), None)
            self._progress.set_abstained(self._num_abstained, cause)


def _are_graded(rollouts: Sequence[Rollout]) -> bool:
    return all(r.is_graded for r in rollouts)


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
