"""A sampler over an engine, which checks after every hand-over that the engine has the current weights.

In: a sampler whose completions come from another process. Out: the same completions, once the trainer's
own model has scored a few short ones alike. Until then none is passed on, so that none is kept.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol

from trl_selfplay.disk import naming_damage, save_text
from trl_selfplay.generation.engine import EngineWeights, RecordsEngine
from trl_selfplay.generation.engine_agreement import Agreement, compare
from trl_selfplay.generation.sampler import (
    Requests,
    SampledCompletion,
    Sampler,
    SampleRequest,
    SamplingOptions,
)

logger = logging.getLogger(__name__)

# What is sampled and scored after each hand-over.
_NUM_PROBES, _PROBE_TOKENS = 16, 32

# Scores (prompt ids, completion ids) pairs under the options that they were sampled with.
Score = Callable[[Sequence[tuple[tuple[int, ...], tuple[int, ...]]], SamplingOptions], list[float]]


class EngineChangedError(RuntimeError):
    """The engine is another one than that which sampled the run until now."""


class EngineSampler(Sampler, RecordsEngine, Protocol):
    """A sampler whose completions come from an engine.

    Attributes:
        on_restart: Called amid a `sample` once the sampler has replaced an engine that failed, before
            any completion of the new one. It may call `sample`.
    """

    on_restart: Callable[[], None] | None


class HandsOver(Protocol):
    """Gives the current weights to an engine."""

    def __call__(self) -> EngineWeights:
        """Return where the current weights are."""
        ...

    def forget(self) -> None:
        """Free what only a running engine needs."""
        ...

    def previous(self) -> AbstractContextManager[None] | None:
        """Return a context with the weights of the version before, or None."""
        ...


class CheckedSampler:
    """Passes on an engine's completions once they agree with the trainer's model.

    After each hand-over of weights, and each start of the engine (that of a replacement amid a `sample`
    too), up to 16 of the requests are sampled with at most 32 tokens and scored by the trainer's model.
    The engine's log-probs must agree within a limit, and lie nearer to the current weights than to
    those handed over before, if the two can be told apart.

    Args:
        engine: Samples.
        hand_over: Gives it the weights.
        score: Scores completions with the trainer's model as it is.
        limit: Largest mean difference of log-probs per token, in nats.
        record_path: File with the record of the run's engine.
        allow_change: Whether another engine than that of the record may go on.
    """

    def __init__(
        self,
        engine: EngineSampler,
        hand_over: HandsOver,
        score: Score,
        limit: float,
        record_path: Path,
        allow_change: bool = False,
    ) -> None:
        self._engine = engine
        self._hand_over = hand_over
        self._score = score
        self._limit = limit
        self._record_path = record_path
        self._allow_change = allow_change
        self._checked: int | str | None = None
        self._agreement: Agreement | None = None

    @property
    def engine_record(self) -> dict[str, Any] | None:
        """The engine's record, and how well it agreed with the trainer after the last hand-over."""
        record = self._engine.engine_record
        if record is None or self._agreement is None:
            return record
        return {**record, "agreement": self._agreement.to_dict()}

    def suggest_batch_size(self, longest_prompt: int, max_completion_length: int) -> int:
        """Return how many sequences the engine takes at once."""
        return self._engine.suggest_batch_size(longest_prompt, max_completion_length)

    def sample(
        self,
        requests: Requests,
        options: SamplingOptions,
        batch_size: int,
        on_tokens: Callable[[int], None] | None = None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        """Yield `(request index, completion)` as completions finish: see `Sampler.sample`.

        Raises:
            EngineMismatchError: The engine has other weights than the trainer.
            EngineChangedError: It is another engine than the run's.
        """
        if isinstance(requests, Sequence):
            yield from self._sample(requests, requests, options, batch_size, on_tokens)
            return
        first: list[SampleRequest] = []
        for request in islice(requests, min(_NUM_PROBES, batch_size)):
            if request is None:
                break
            first.append(request)
        yield from self._sample(first, chain(first, requests), options, batch_size, on_tokens)

    def _sample(
        self,
        known: Sequence[SampleRequest],
        requests: Requests,
        options: SamplingOptions,
        batch_size: int,
        on_tokens: Callable[[int], None] | None,
    ) -> Iterator[tuple[int, SampledCompletion]]:
        check = partial(self._check_or_end, _spread(known), options, batch_size)
        self._engine.on_restart = check
        if known and self._hand_over().version != self._checked:
            check()
        yield from self._engine.sample(requests, options, batch_size, on_tokens)

    def release(self) -> None:
        """End the engine, and delete copies of weights that it alone needed."""
        self._checked = None
        self._engine.release()
        self._hand_over.forget()

    def _check_or_end(
        self, requests: Sequence[SampleRequest], options: SamplingOptions, batch_size: int
    ) -> None:
        try:
            self._check(requests, options, batch_size)
        except BaseException:
            self.release()
            raise

    def _check(
        self, requests: Sequence[SampleRequest], options: SamplingOptions, batch_size: int
    ) -> None:
        version = self._hand_over().version
        short = replace(
            options,
            max_completion_length=min(options.max_completion_length, _PROBE_TOKENS),
            return_logprobs=True,
        )
        sampled = dict(self._engine.sample(requests, short, min(batch_size, len(requests))))
        self._check_record()
        completions = [(r.prompt_ids, sampled[i].completion_ids) for i, r in enumerate(requests)]
        engine = [_logprob(sampled[i]) for i in range(len(requests))]
        current, last = self._score(completions, short), None
        if (previous := self._hand_over.previous()) is not None:
            with previous:
                last = self._score(completions, short)
        lengths = [len(completion) for _, completion in completions]
        self._agreement = agreement = compare(engine, current, last, lengths, self._limit)
        agreement.check()
        logger.info(
            "the engine's log-probs differ from the trainer's by %.2g per token; nearer to: %s",
            agreement.gap,
            agreement.nearer_to,
        )
        # Scoring under the weights before has written to the model and put its own back.
        if self._hand_over().version != version:
            raise RuntimeError(
                "the weights changed while an engine was being checked; report this."
            )
        self._checked = version

    def _check_record(self) -> None:
        """Refuse another engine than the one that sampled before; else record this one."""
        record, path = self._engine.engine_record, self._record_path
        if path.exists():
            with naming_damage(path, "Delete it, if the engine is the same as before."):
                before = json.loads(path.read_text())
            if before != record and not self._allow_change:
                raise EngineChangedError(
                    f"the run was sampled with {before}, and this engine is {record}: the two round "
                    "differently, and samples of both would be mixed. Go on with that engine, set "
                    "allow_engine_change=True, or choose another output_dir."
                )
        if record is not None:
            save_text(path, json.dumps(record, indent=1))


def _spread(requests: Sequence[SampleRequest]) -> list[SampleRequest]:
    """Return some of the requests, of different prompts as far as there are."""
    distinct = list({request.prompt_ids: request for request in requests}.values())
    step = max(1, len(distinct) // _NUM_PROBES)
    chosen = distinct[::step][:_NUM_PROBES]
    others = (request for request in requests if request not in chosen)
    return [*chosen, *islice(others, _NUM_PROBES - len(chosen))]


def _logprob(completion: SampledCompletion) -> float:
    if completion.logprob is None:
        raise RuntimeError("the engine gave no log-probs although they were requested.")
    return completion.logprob
