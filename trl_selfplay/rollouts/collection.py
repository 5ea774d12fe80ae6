"""Sample and grade a fixed list of prompts, shard by shard, so that no finished work is lost.

In: assignments (a prompt's tokens and which of its samples to draw), a sampler, a scorer. Out: graded
rollouts. The content of each shard is planned and written to disk before the first token is sampled. A
shard is saved when it is sampled, and again when it is graded. After a kill, the plan and all complete
shards are read, and work resumes at the first incomplete shard.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from trl_selfplay.disk import DamagedFileError, naming_damage, save_text
from trl_selfplay.generation.random_streams import Phase, stream_key
from trl_selfplay.generation.sampler import Sampler, SampleRequest, SamplingOptions
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.record import Rollout, load_rollouts, save_rollouts

logger = logging.getLogger(__name__)

# A shard is what a kill can cost. Several batches, so that rows freed by short completions can
# be filled again within it.
BATCHES_PER_SHARD = 4
_SURROGATE = re.compile("[\ud800-\udfff]")

Item = TypeVar("Item")
_END = object()


@dataclass(frozen=True, slots=True)
class Assignment:
    """The samples to draw for one prompt: its row, its tokens, and the sample indices."""

    row: PromptRow
    prompt_ids: tuple[int, ...]
    sample_indices: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """A fixed part of the work: prompt ids, and the maximum number of sequences decoded together."""

    prompt_ids: tuple[str, ...]
    batch_size: int


class Progress(Protocol):
    """Receives progress while samples come in."""

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

    @property
    def heldout_scorer(self) -> Scorer | None:
        """What grades held-out completions; None if nothing does."""
        return self.eval_scorer or self.scorer

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
    ) -> list[Rollout]:
        """Return the graded rollouts of all assignments, sorted by (prompt_id, sample_index).

        Those of the phase "judge" aren't graded, nor are any without reward functions.

        While a shard is graded the next one is sampled, in a thread of its own.

        Each of n processes samples every n-th shard, and all return all rollouts.

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
        """
        by_id = {a.row.prompt_id: a for a in assignments}
        shards = self._load_or_plan(assignments, options, folder, prefix)
        graded = self.scorer is not None and phase != "judge"
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        collected: list[Rollout] = []
        solved: list[bool] = []
        causes: Counter[str | None] = Counter()
        threshold = None if self.has_degrees else self.reward_threshold
        if phase == "eval":
            threshold = self.eval_threshold
        rows = {prompt_id: a.row for prompt_id, a in by_id.items()}
        stop = Event()

        def sample_shards() -> Iterator[tuple[Shard, str, Path | None, list[Rollout]]]:
            for index, shard in enumerate(shards):
                if index % world != rank or not shard.prompt_ids:
                    continue
                path = None if folder is None else folder / f"{prefix}{index:05d}.parquet"
                chosen = [by_id[prompt_id] for prompt_id in shard.prompt_ids]
                found = _load_shard(path)
                kept, missing = _compare(found, chosen)
                num_tokens = sum(len(r.completion_ids) for r in kept)
                progress.update(len(kept), num_tokens, restored=True)
                if found and missing:
                    logger.warning(
                        "%s holds %d of the samples that are planned; the others are sampled.",
                        path,
                        len(kept),
                    )
                rollouts = kept
                if missing:
                    rollouts = kept + self._sample(
                        missing, options, shard.batch_size, round_index, phase, progress, stop
                    )
                    place = {prompt_id: i for i, prompt_id in enumerate(shard.prompt_ids)}
                    rollouts.sort(key=lambda r: (place[r.prompt_id], r.sample_index))
                if path is not None and found != rollouts:
                    save_rollouts(path, rollouts)
                yield shard, f"shard {prefix}{index:05d}, round {round_index}", path, rollouts

        # Reward functions stay in the main thread: those with timeouts by signal need it.
        with closing(one_ahead(sample_shards(), stop)) as sampled:
            for shard, name, path, rollouts in sampled:
                if graded and not all(r.is_graded for r in rollouts):
                    rollouts = self.grade(rollouts, rows, name)
                    if path is not None:
                        save_rollouts(path, rollouts)
                collected += rollouts
                if graded:
                    causes.update(r.cause for r in rollouts if r.reward is None)
                    if causes:
                        progress.set_abstained(causes.total(), _most_frequent(causes))
                if graded and threshold is not None:
                    passed = {r.prompt_id for r in rollouts if r.passes(threshold)}
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
                held = {} if folder is None else _held_prompts(folder, prefix, assignments)
                shards = plan_shards(assignments, options.max_completion_length, self.sampler, held)
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
        tag_ids = _find_tag_ids(self.tokenizer)
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
                completion=_decode_completion(self.tokenizer, text_ids, tag_ids),
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

    def grade(
        self, rollouts: Sequence[Rollout], by_id: Mapping[str, PromptRow], name: str = ""
    ) -> list[Rollout]:
        """Return the rollouts, all of one phase, with their rewards.

        Chat completions reach the reward functions as one assistant message, which the tokenizer's
        `response_template`, where it has one, divides into thoughts and content, as for
        GRPOTrainer. `name` is what the log calls these rollouts.

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
        if self.refuses_negative_rewards and not is_heldout:
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
                [_message(self.tokenizer, r)] if row.is_conversational else r.completion
                for r, row in zip(rollouts, rows, strict=True)
            ],
            "completion_ids": [list(r.completion_ids) for r in rollouts],
            "columns": {key: [row.columns[key] for row in rows] for key in rows[0].columns},
        }


def one_ahead(items: Iterator[Item], stop: Event) -> Generator[Item]:
    """Yield the items in order, while a second thread makes the next one.

    The thread is never more than one item ahead. What the iterator raises is raised here, in turn. Closing, or an exception such as Ctrl-C,
    sets `stop`, waits for what is in progress, and closes the iterator.

    Args:
        items: Used only in the second thread.
        stop: The iterator checks it, to end early.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead") as thread:
        try:
            coming = thread.submit(next, items, _END)
            while (item := coming.result()) is not _END:
                coming = thread.submit(next, items, _END)
                yield item  # type: ignore[misc]
        finally:
            stop.set()
            thread.submit(getattr(items, "close", int)).result()


def _most_frequent(causes: Counter[str | None]) -> str | None:
    known = Counter({cause: n for cause, n in causes.items() if cause is not None})
    return known.most_common(1)[0][0] if known else None


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
    text: str = tokenizer.decode(list(ids), **kwargs)
    # Half a surrogate pair, which a tokenizer in Python may leave, can't be written as UTF-8.
    return text.encode("utf-8", "replace").decode() if _SURROGATE.search(text) else text


def _decode_completion(tokenizer: Any, ids: Sequence[int], tag_ids: Collection[int]) -> str:
    """Return the text without special tokens, except tags such as `<answer>`."""
    kept = {i for i in ids if i in tag_ids}
    if not kept:
        return _decode(tokenizer, ids, skip_special_tokens=True)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - kept
    return _decode(tokenizer, [i for i in ids if i not in special])


def _find_tag_ids(tokenizer: Any) -> frozenset[int]:
    """Return the special tokens that form pairs of tags, such as `<answer>` and `</answer>`.

    Reward functions read them, and decoding without special tokens removes them.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token): i for i, token in added.items() if token.special}
    tags = [tag for tag in special if re.fullmatch(r"<[A-Za-z][\w-]+>", tag)]
    pairs = [(tag, f"</{tag[1:]}") for tag in tags if f"</{tag[1:]}" in special]
    return frozenset(special[tag] for pair in pairs for tag in pair)


def _message(tokenizer: Any, rollout: Rollout) -> dict[str, Any]:
    """Return a completion as the assistant's message, parsed if the tokenizer has a template for it."""
    plain = {"role": "assistant", "content": rollout.completion}
    if getattr(tokenizer, "response_template", None) is None:
        return plain
    try:
        ids, prefix = list(rollout.completion_ids), list(rollout.prompt_ids)
        parsed = tokenizer.parse_response(ids, prefix=prefix)
    except (ValueError, TypeError):  # for example, a malformed tool call
        return plain
    if not isinstance(parsed, dict):  # a truncated one left nothing
        return plain
    content = parsed.get("content") or ""
    if isinstance(content, str):
        content = content.removesuffix(tokenizer.eos_token)
    return {**parsed, "content": content}


def _compare(
    found: Sequence[Rollout], assignments: Sequence[Assignment]
) -> tuple[list[Rollout], list[Assignment]]:
    """Return the planned samples among those found, and what remains to be sampled."""
    by_key = {(r.prompt_id, r.sample_index, r.prompt_ids): r for r in found}
    kept: list[Rollout] = []
    missing = []
    for a in assignments:
        held = [by_key.get((a.row.prompt_id, i, a.prompt_ids)) for i in a.sample_indices]
        kept += [rollout for rollout in held if rollout is not None]
        rest = tuple(i for i, r in zip(a.sample_indices, held, strict=True) if r is None)
        if rest:
            missing.append(replace(a, sample_indices=rest))
    return kept, missing


def _held_prompts(
    folder: Path, prefix: str, assignments: Sequence[Assignment]
) -> dict[int, tuple[str, ...]]:
    """Return the planned prompts that shards on disk hold, by the shard's number."""
    left = {a.row.prompt_id for a in assignments}
    held: dict[int, tuple[str, ...]] = {}
    for path in sorted(folder.glob(f"{prefix}[0-9]*.parquet")):
        prompt_ids = tuple(dict.fromkeys(r.prompt_id for r in _load_shard(path)))
        held[int(path.stem.removeprefix(prefix))] = tuple(p for p in prompt_ids if p in left)
        left -= set(prompt_ids)
    return held


def plan_shards(
    assignments: Sequence[Assignment],
    max_completion_length: int,
    sampler: Sampler,
    held: Mapping[int, tuple[str, ...]] = MappingProxyType({}),
) -> list[Shard]:
    """Divide the work into shards of about `BATCHES_PER_SHARD` batches.

    The longest prompts come first, so that running out of memory shows in the first minute. All
    samples of a prompt are in one shard, so that a reward function can compare them.

    Args:
        assignments: The work.
        max_completion_length: Maximum tokens per completion.
        sampler: Suggests batch sizes.
        held: Prompts of the shards on disk, by number, if their plan is lost. These shards keep
            their numbers and the others fill the gaps.
    """
    done = {prompt_id for prompt_ids in held.values() for prompt_id in prompt_ids}
    lengths = {a.row.prompt_id: len(a.prompt_ids) for a in assignments}
    ordered = sorted(assignments, key=lambda a: (-len(a.prompt_ids), a.row.prompt_id))
    ordered = [a for a in ordered if a.row.prompt_id not in done]
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
    for number in sorted(held):
        longest = max((lengths[prompt_id] for prompt_id in held[number]), default=1)
        batch_size = sampler.suggest_batch_size(longest, max_completion_length)
        shards += [Shard((), 1)] * (number - len(shards))  # a number that is gone holds nothing
        shards.insert(number, Shard(held[number], batch_size))
    return shards


def _save_plan(path: Path, shards: Sequence[Shard]) -> None:
    content = [{"prompt_ids": s.prompt_ids, "batch_size": s.batch_size} for s in shards]
    save_text(path, json.dumps(content))


def _load_plan(path: Path, assignments: Sequence[Assignment]) -> list[Shard] | None:
    try:
        shards = read_plan(path)
    except DamagedFileError as error:
        logger.warning("%s", error)
        return None
    if shards is None:
        return None
    planned = {prompt_id for shard in shards for prompt_id in shard.prompt_ids}
    if planned != {a.row.prompt_id for a in assignments}:
        raise ValueError(
            f"{path} plans {len(planned)} prompts that are not the {len(assignments)} of this run: "
            "the dataset, `num_prompts_per_round` or what these prompts are made from changed. Use "
            f"another `output_dir`, or delete {path.parent} to sample this phase anew."
        )
    return shards


def read_plan(path: Path) -> list[Shard] | None:
    """Return the shards of a phase, by number; None without a plan on disk.

    Raises:
        DamagedFileError: It is there and can't be read.
    """
    if not path.exists():
        return None
    with naming_damage(path, "The phase is planned anew around the shards that are there."):
        plan = json.loads(path.read_text())
        return [Shard(tuple(map(str, s["prompt_ids"])), int(s["batch_size"])) for s in plan]


def _load_shard(path: Path | None) -> list[Rollout]:
    """Return what a shard holds; nothing if it isn't there or can't be read."""
    if path is None or not path.exists():
        return []
    try:
        return load_rollouts(path, "Its prompts are sampled again, the other shards are kept.")
    except DamagedFileError as error:
        logger.warning("%s", error)
        return []
