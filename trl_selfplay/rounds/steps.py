"""Trajectories of an agent, as steps: which sample goes on, and which one is trained on.

In: the samples of each step. Out: records of steps and trajectories, the selection of a round's examples, and
its metrics.

Source: arXiv 2312.10003, section 3.6.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from trl_selfplay.disk import BRING_BACK, CHECKED, naming_damage
from trl_selfplay.rollouts.funnel import Outcome
from trl_selfplay.rollouts.kept_prompts import KeptPrompts, save_prompts
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.rendering import PromptFormatter
from trl_selfplay.rollouts.selection import Selection
from trl_selfplay.rollouts.sequence import Rollouts

End = Literal["answered", "malformed", "truncated", "too_long", "endless"]


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a trajectory.

    Attributes:
        row: Its prompt in the form that is trained on; the id is that of its samples.
        kind: The agent's name for what is asked.
        continued: Index of the sample that the trajectory went on with.
        target: Index of the sample that is trained on; None if the continued one can't be parsed.
        malformed: Indices of the samples that can't be parsed, truncated ones left out.
    """

    row: PromptRow
    kind: str
    continued: int
    target: int | None
    malformed: frozenset[int]


@dataclass(slots=True)
class Trajectory:
    """A trajectory on its way.

    Attributes:
        question: The dataset's row.
        index: Number among the question's trajectories.
        state: The agent's.
        steps: Those played so far.
        end: Why it ended; None while it goes on.
        last: The continued sample of its last step.
        num_calls: Calls of tools, and `num_failed` those of them that failed.
    """

    question: PromptRow
    index: int
    state: Any
    steps: list[Step] = field(default_factory=list)
    end: End | None = None
    last: Rollout | None = None
    num_calls: int = 0
    num_failed: int = 0


@dataclass(frozen=True, slots=True)
class Plays:
    """Finished trajectories, and the samples of all their steps."""

    trajectories: Sequence[Trajectory]
    rollouts: Rollouts

    @property
    def steps(self) -> Iterator[Step]:
        """The steps of all trajectories, in their order."""
        return (step for trajectory in self.trajectories for step in trajectory.steps)

    def save(self, path: Path) -> None:
        """Write the steps in their order, with the prompts that are trained on.

        `end` says why a trajectory ended, at its last step.
        """
        places = [
            (trajectory, number, step)
            for trajectory in self.trajectories
            for number, step in enumerate(trajectory.steps)
        ]
        ends = [t.end if n + 1 == len(t.steps) else None for t, n, _ in places]
        more = {
            "question_id": pa.array([t.question.prompt_id for t, *_ in places], pa.string()),
            "trajectory": pa.array([t.index for t, *_ in places], pa.int32()),
            "step": pa.array([number for _, number, _ in places], pa.int32()),
            "kind": pa.array([step.kind for *_, step in places], pa.string()),
            "continued": pa.array([step.continued for *_, step in places], pa.int32()),
            "target": pa.array([step.target for *_, step in places], pa.int32()),
            "end": pa.array(ends, pa.string()),
        }
        save_prompts(path, [step.row for *_, step in places], more)

    def select(
        self, fits_row: Callable[[Rollout], bool], left_out: Collection[str] = ()
    ) -> Selection:
        """Select the target of each step.

        Args:
            fits_row: Whether a rollout fits in a training row.
            left_out: Prompt ids of steps whose trajectories failed.
        """
        steps = {step.row.prompt_id: step for step in self.steps}

        def outcome_of(rollout: Rollout) -> Outcome:
            step = steps[rollout.prompt_id]
            if rollout.is_truncated:
                return "truncated"
            if rollout.sample_index in step.malformed or rollout.prompt_id in left_out:
                return "failed"
            if rollout.sample_index != step.target:
                return "capped"
            return "kept" if fits_row(rollout) else "too_long"

        return Selection.of(self.rollouts, outcome_of)

    def metrics(self, selection: Selection) -> dict[str, float]:
        """Return what a round logs of its trajectories."""
        kinds = {step.row.prompt_id: step.kind for step in self.steps}
        examples = Counter(kinds[rollout.prompt_id] for rollout in selection.kept)
        failures = Counter(step.kind for step in self.steps if step.continued in step.malformed)
        targets = [step for step in self.steps if step.target is not None]
        calls = sum(t.num_calls for t in self.trajectories)
        failed = sum(t.num_failed for t in self.trajectories)
        ends = Counter(t.end for t in self.trajectories)
        num = len(self.trajectories)
        questions = len({t.question.prompt_id for t in self.trajectories})
        changed = sum(step.target != step.continued for step in targets)
        names = sorted(set(kinds.values()))
        return {
            **{f"play/parse_failures/{name}": float(failures[name]) for name in names},
            **{f"play/trajectories_{end}": n / num for end, n in sorted(ends.items(), key=str)},
            "play/steps_per_trajectory": len(kinds) / num,
            "play/calls_per_question": calls / questions,
            "tools/call_frequency": calls / num,
            "tools/failure_frequency": failed / calls if calls else 0.0,
            **{f"select/examples/{name}": float(examples[name]) for name in names},
            "select/targets_changed": changed / len(targets) if targets else 0.0,
        }


def load_steps(path: Path) -> list[PromptRow]:
    """Return the prompts of steps as `Plays.save` wrote them: those that are trained on.

    Raises:
        DamagedFileError: The file can't be read, or isn't there.
    """
    with naming_damage(path, BRING_BACK):
        kept = KeptPrompts(pq.read_table(path, **CHECKED))
        steps = [(prompt_id, kept[prompt_id]) for prompt_id in kept]
    return [
        PromptRow(prompt_id, step.prompt, None, {}, number, str(path), step.template_arguments)
        for number, (prompt_id, step) in enumerate(steps)
    ]


class StepPrompts(Mapping[str, tuple[int, ...]]):
    """The tokens of steps' prompts as trained on, rendered when they are asked for."""

    def __init__(self, rows: Iterable[PromptRow], formatter: PromptFormatter) -> None:
        self._rows = {row.prompt_id: row for row in rows}
        self._formatter = formatter

    def __getitem__(self, prompt_id: str) -> tuple[int, ...]:
        return self._formatter.token_ids(self._rows[prompt_id], few_shot=False)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def continued_sample(samples: Sequence[Rollout]) -> Rollout:
    """Return the sample with the lowest perplexity: the highest mean log-prob per token.

    The log-probs are those of the distribution that was sampled from. Ties go to the lowest sample index.

    Args:
        samples: Of one step, at least one.

    Raises:
        RuntimeError: The sampler returned no log-probs, and there is a choice.
    """
    if len(samples) == 1:
        return samples[0]

    def rank(sample: Rollout) -> tuple[float, int]:
        if sample.logprob is None:
            raise RuntimeError(
                "the sampler returned no log-probs, by which the sample of a step that goes on is chosen."
            )
        return -sample.logprob / max(1, len(sample.completion_ids)), sample.sample_index

    return min(samples, key=rank)


def best_ranked(parsed: Sequence[Rollout], continued: Rollout) -> Rollout:
    """Return the training target of a step: the sample with the highest reward.

    The continued sample stays the target unless another one's reward is higher: on a tie, where it has no
    reward, and without ranking.

    Args:
        parsed: The step's samples whose actions can be parsed.
        continued: The sample that the trajectory went on with, one of them.
    """
    best, highest = continued, continued.reward
    for sample in sorted(parsed, key=lambda sample: sample.sample_index):
        if highest is not None and sample.reward is not None and sample.reward > highest:
            best, highest = sample, sample.reward
    return best
