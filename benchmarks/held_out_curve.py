"""Held-out accuracy against seconds of training, with the clock and the memory stopped meanwhile.

In: a trainer, of rounds or of steps. Out: a point after each round, and the peak memory of what
the trainer itself does.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler, collect_eos_token_ids


class PeakMemory:
    """The most memory in use since the last `restart`, in GiB: of the GPU, or of this process."""

    def restart(self) -> None:
        """Forget what was in use before."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def read(self) -> float:
        """Return the peak."""
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**30
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20


class Curve(TrainerCallback):
    """Scores held-out prompts at the end of each round, with the clock and the memory stopped.

    Args:
        score: Returns the scores after so many rounds.
        steps: Optimizer steps of a round; None where the trainer itself tells of rounds.
        samples: Completions sampled in a round.
    """

    def __init__(
        self, score: Callable[[int], dict[str, float]], steps: int | None, samples: int
    ) -> None:
        self.score, self.steps, self.samples = score, steps, samples
        self.points: list[dict[str, float]] = []
        self.memory, self.peak_gib, self.seconds = PeakMemory(), 0.0, 0.0

    def start(self) -> None:
        """Let the clock run."""
        self.memory.restart()
        self.started = time.monotonic()

    def stop(self) -> None:
        """Add the time and the memory since `start`."""
        self.seconds += time.monotonic() - self.started
        self.peak_gib = max(self.peak_gib, self.memory.read())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count steps where there are no rounds."""
        if self.steps is not None and state.global_step % self.steps == 0:
            self._add_point()

    def on_round_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a round of ReST^EM."""
        self._add_point()

    def _add_point(self) -> None:
        self.stop()
        rounds = len(self.points) + 1
        point = {"samples": rounds * self.samples, "seconds": self.seconds}
        self.points.append({**point, **self.score(rounds)})
        self.start()


def held_out_accuracy(trainer: Any, rows: Any, max_completion_length: int, reward: Any) -> float:
    """Return the share of held-out prompts whose greedy completion ends and is right."""
    tokenizer = trainer.processing_class
    sampler = TransformersSampler(trainer.model, tokenizer, trainer.accelerator)
    options = SamplingOptions(
        max_completion_length,
        temperature=0.0,
        eos_token_ids=collect_eos_token_ids(trainer.model, tokenizer),
    )
    requests = [
        SampleRequest(
            tuple(
                tokenizer(prompt)["input_ids"]
                if isinstance(prompt, str)
                else tokenizer.apply_chat_template(
                    prompt, add_generation_prompt=True, return_dict=False
                )
            ),
            stream_key=0,
        )
        for prompt in rows["prompt"]
    ]
    longest = max(len(r.prompt_ids) for r in requests)
    batch_size = min(64, sampler.suggest_batch_size(longest, max_completion_length))
    texts, ended = [""] * len(requests), [False] * len(requests)
    for index, sampled in sampler.sample(requests, options, batch_size):
        texts[index] = tokenizer.decode(sampled.completion_ids, skip_special_tokens=True)
        ended[index] = sampled.finish == "eos"
    completions: Any = texts
    if not isinstance(rows["prompt"][0], str):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    scores = reward(completions=completions, solution=list(rows["solution"]))
    return sum(e and s == 1.0 for e, s in zip(ended, scores, strict=True)) / len(requests)
