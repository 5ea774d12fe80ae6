"""When each phase of a round begins and ends, and the memory that it takes at most.

In: a trainer over rounds, not yet trained. Out: seconds and peaks by phase, after its `train`.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from gpu_parts.measuring import read_peak, restart_peak, wait_for
from transformers import TrainerCallback


class PhaseClock(TrainerCallback):
    """Notes the phases of a trainer's rounds: sampling, scoring of a reference, training.

    Args:
        trainer: Of this package.
        device: "cuda" or "cpu".
        ends_all: Make EOS the last token of each completion, since random weights never end one.
    """

    def __init__(self, trainer: Any, device: str, ends_all: bool = False) -> None:
        self.trainer, self.device, self.ends_all = trainer, device, ends_all
        self.moments: list[tuple[str, float]] = []
        self.peaks: dict[str, list[dict[str, int]]] = {}
        self.sampled: list[tuple[int, float]] = []  # tokens, seconds
        self.step_seconds: list[float] = []
        self._watch_sampler()
        if hasattr(trainer, "compute_ref_log_probs"):
            self._watch_scoring()
        trainer.add_callback(self)

    def begin(self, phase: str) -> float:
        """Begin a phase with a fresh peak."""
        restart_peak(self.device)
        return self._note(f"{phase} begins")

    def end(self, phase: str) -> float:
        """End a phase and keep its peak."""
        moment = self._note(f"{phase} ends")
        self.peaks.setdefault(phase, []).append(read_peak(self.device))
        return moment

    def _note(self, moment: str) -> float:
        wait_for(self.device)
        self.moments.append((moment, time.perf_counter()))
        return self.moments[-1][1]

    def _watch_sampler(self) -> None:
        sampler = self.trainer.self_play.collector.sampler
        sample, eos = sampler.sample, self.trainer.self_play.eos_token_id

        def watched(*arguments: Any) -> Iterator[Any]:
            started, tokens = self.begin("sampling"), 0
            for index, sampled in sample(*arguments):
                tokens += len(sampled.completion_ids)
                if self.ends_all:
                    ids = (*sampled.completion_ids[:-1], eos)
                    sampled = replace(sampled, completion_ids=ids, finish="eos")
                yield index, sampled
            self.sampled.append((tokens, self.end("sampling") - started))

        sampler.sample = watched

    def _watch_scoring(self) -> None:
        score = self.trainer.compute_ref_log_probs

        def watched(*arguments: Any) -> Any:
            if self.moments and self.moments[-1][0] == "training begins":
                return score(*arguments)  # a check amid training
            self.begin("scoring")
            scores = score(*arguments)
            self.end("scoring")
            return scores

        self.trainer.compute_ref_log_probs = watched

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """Begin the training at its first step."""
        if state.global_step == 0:
            self.begin("training")
        wait_for(self.device)
        self._step_began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        """End the training at its last step, before anything is saved."""
        wait_for(self.device)
        self.step_seconds.append(time.perf_counter() - self._step_began)
        if state.global_step == state.max_steps:
            self.end("training")

    def gaps(self, first: str, second: str) -> list[float]:
        """Return the seconds from each `first` to the next `second`, if no other came between."""
        return [
            later - earlier
            for (a, earlier), (b, later) in zip(self.moments, self.moments[1:], strict=False)
            if (a, b) == (first, second)
        ]

    def summarize(self, tokens_per_step: int) -> dict[str, Any]:
        """Return peaks in bytes, tokens per second, and seconds between phases.

        Args:
            tokens_per_step: Tokens of text in an optimizer step.
        """
        order = [phase for phase in ("sampling", "scoring", "training") if phase in self.peaks]
        between = {
            f"{first} to {second}": self.gaps(f"{first} ends", f"{second} begins")
            for first, second in zip(order, [*order[1:], order[0]], strict=True)
        }
        step = median(self.step_seconds[1:] or self.step_seconds)  # the first warms up
        return {
            "peaks": {
                phase: {name: max(p[name] for p in peaks) for name in peaks[0]}
                for phase, peaks in self.peaks.items()
            },
            "step_seconds": step,
            "trained_tokens_per_second": tokens_per_step / step,
            "sampled_tokens_per_second": sum(t for t, _ in self.sampled)
            / sum(s for _, s in self.sampled),
            "seconds_between": {name: gaps for name, gaps in between.items() if gaps},
        }
