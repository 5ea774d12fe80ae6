"""Play trajectories of an agent step by step, and grade their answers.

In: questions and an agent (tools/agent.py). Out: the steps of all trajectories as rollouts. All trajectories
take a step together: its prompts are sampled like those of single turns, so that shards, resume, engines and
several processes are what they are there.

Source: arXiv 2312.10003, section 3.6.
"""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Self

from trl_selfplay.evaluation.heldout import heldout_options
from trl_selfplay.generation.control_tokens import (
    control_tokens,
    split_control_tokens,
    split_tokens,
)
from trl_selfplay.generation.sampler import Phase, build_sampling_options
from trl_selfplay.generation.valid_text import valid_text
from trl_selfplay.peers import from_main
from trl_selfplay.rewards.local_model import fits
from trl_selfplay.rollouts.collection import Progress
from trl_selfplay.rollouts.prompts import PromptRow, check_prompt
from trl_selfplay.rollouts.record import Rollout, hash_prompt, load_rollouts, save_rollouts
from trl_selfplay.rollouts.sequence import Rollouts
from trl_selfplay.rollouts.shards import Shard, save_plan
from trl_selfplay.rollouts.stored import load_steps_of
from trl_selfplay.rounds.judging import judged, judgements_of
from trl_selfplay.rounds.stages import SelfPlay
from trl_selfplay.rounds.steps import Plays, Step, Trajectory, best_ranked, continued_sample
from trl_selfplay.tools.agent import Agent, MalformedAction, Move
from trl_selfplay.tools.observations import Observations
from trl_selfplay.tools.record import ToolCall, ToolResult
from trl_selfplay.tools.sessions import seed_of
from trl_selfplay.tools.tool_set import MOST_CALLS_AT_ONCE, ToolSet

MOST_STEPS = 1000  # of an agent that never finishes
_STEP_COLUMNS = ("step_kind", "question")  # what ranking functions get besides the prompt
# What distinguishes greedy and random sampling of held-out prompts.
_HELDOUT_OPTIONS = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True, slots=True)
class _Asked:
    """The next step of a trajectory: what is asked, and its prompt."""

    trajectory: Trajectory
    kind: str
    row: PromptRow


@dataclass(frozen=True)
class StepwisePlay(SelfPlay):
    """The stages of a round whose prompts are the steps of an agent.

    Attributes:
        agent: The state machine.
        tools: Its tools.
    """

    agent: Agent = None  # type: ignore[assignment]  # the parent's fields have defaults
    tools: ToolSet = None  # type: ignore[assignment]

    @property
    def toolbox(self) -> ToolSet:
        """The agent's tools."""
        return self.tools

    @property
    def ranks(self) -> bool:
        """Whether reward functions rank the samples of a step; else they grade training answers too."""
        return bool(self.config.ranks_steps)

    @classmethod
    def of(cls, play: SelfPlay, agent: Agent, tools: ToolSet) -> Self:
        """Return stages for an agent.

        Args:
            play: The stages for single turns.
            agent: The agent.
            tools: Its tools.
        """
        given = {each.name: getattr(play, each.name) for each in fields(SelfPlay)}
        return cls(**given, agent=agent, tools=tools)

    def draw_prompts(self, round_index: int) -> list[PromptRow]:
        """Return the questions: the same in every round, each once whatever its solutions."""
        return SelfPlay.draw_prompts(replace(self, rows=list(_once(self.rows).values())), 0)

    @property
    def has_examples(self) -> bool:
        """Whether the agent has few-shot examples."""
        return self.agent.has_examples

    def check_prompts(self, hinted: bool) -> None:
        """Raise ValueError for questions whose first step can't be rendered, sampled or trained on."""
        shown = replace(
            self,
            rows=self.as_asked(self.rows),
            heldout={name: self.as_asked(rows) for name, rows in self.heldout.items()},
        )
        SelfPlay.check_prompts(shown, hinted)

    def as_asked(self, rows: Sequence[PromptRow]) -> list[PromptRow]:
        """Return the first step of each question, with the question's columns."""
        begun = [Trajectory(row, 0, self.agent.begin(row.prompt)) for row in rows]
        asked = [self._ask_next(trajectory, self.has_examples) for trajectory in begun]
        return [replace(a.row, columns=a.trajectory.question.columns) for a in asked if a]

    def check_columns(self, rows: Sequence[PromptRow], name: str) -> None:
        """Raise ValueError if the reward functions can't be called; ranking reads no row's columns."""
        scorer = self.collector.scorer
        if name != "train_dataset" or not self.ranks:
            SelfPlay.check_columns(self, rows, name)
        elif scorer is not None:
            for reader in scorer.solution_readers:
                raise ValueError(
                    f"{reader} compares with the column `solution`, and the samples of a step are ranked "
                    "without gold answers. Set agent_rewards='answers' to keep the trajectories whose "
                    "answer it accepts, or pass it as eval_reward_funcs."
                )
            scorer.check_columns(_STEP_COLUMNS, "the steps of the agent")

    def warn_data_errors(self) -> None:
        """Warn of rows that can't be graded; ranking reads no row."""
        SelfPlay.warn_data_errors(replace(self, rows=[]) if self.ranks else self)

    def play_steps(self, rows: Sequence[PromptRow], round_index: int, folder: Path) -> Plays:
        """Play `num_generations` trajectories of each question to their ends.

        What is already in `folder` is read back, and no call whose result is on disk is made again.

        Args:
            rows: The questions.
            round_index: The round that samples.
            folder: The round's.
        """
        play = self if self.ranks else self._without_scorer()
        plays = play.play_to_end(
            rows, round_index, "train", folder / "samples", range(self.config.num_generations),
            few_shot=self.shows_examples(round_index), num_samples=self.agent.num_step_samples,
            observations=self._observations(),
        )  # fmt: skip
        if self.collector.accelerator.is_main_process:
            plays.save(folder / "steps.parquet")
        return plays

    def play_to_end(
        self,
        rows: Sequence[PromptRow],
        round_index: int,
        phase: Phase,
        folder: Path | None,
        indices: Sequence[int],
        *,
        few_shot: bool,
        num_samples: int,
        observations: Observations,
        prefix: str = "",
        **options: Any,
    ) -> Plays:
        """Play trajectories of questions to their ends, all of them a step at a time.

        Args:
            rows: The questions.
            round_index: Part of the key of the random streams, like `phase`.
            phase: What the samples are for.
            folder: Where they are kept; None keeps nothing.
            indices: The trajectories to play of each question.
            few_shot: Show the agent's few-shot examples.
            num_samples: Samples per step.
            observations: Results of calls that are known, and where new ones are kept.
            prefix: Prefix of the files' names.
            **options: See `ask`.
        """
        begun = [Trajectory(row, i, self.agent.begin(row.prompt)) for row in rows for i in indices]
        rollouts = Rollouts.of(())
        stops = (*(self.config.stop_strings or ()), *self.agent.stop_strings)
        most = build_sampling_options(self.config, ()).max_completion_length
        place = "" if folder is None else folder.relative_to(self.run.root).as_posix()
        where = "held-out" if phase == "eval" else f"round {round_index}"
        number = 0
        while asked := self._next_steps(begun, few_shot, most):
            sampled = self.ask(
                [step.row for step in asked.values()], round_index, phase, folder,
                range(num_samples), prefix=f"{prefix}step{number}-", label=f"{where}, step {number}",
                return_logprobs=True, stop_strings=tuple(dict.fromkeys(stops)), **options,
            )  # fmt: skip
            calls: dict[str, tuple[Trajectory, Move]] = {}
            for prompt_id, samples in groupby(sampled, key=lambda rollout: rollout.prompt_id):
                step = asked[prompt_id]
                move = self._take(step, list(samples))
                if move is not None and move.call is not None:
                    calls[f"{place}/{prompt_id}"] = (step.trajectory, move)
            self._observe(calls, observations)
            rollouts += sampled
            number += 1
        return Plays(begun, rollouts)

    def _next_steps(
        self, trajectories: Sequence[Trajectory], few_shot: bool, most: int
    ) -> dict[str, _Asked]:
        """Return the next step of each trajectory that goes on, by the id of its prompt."""
        found = (self._next(trajectory, few_shot, most) for trajectory in trajectories)
        return {step.row.prompt_id: step for step in found if step is not None}

    def _next(self, trajectory: Trajectory, few_shot: bool, most: int) -> _Asked | None:
        """Return a trajectory's next step; None if it has ended, or does now."""
        if trajectory.end is not None:
            return None
        step = self._ask_next(trajectory, few_shot)
        if step is None:
            trajectory.end = "answered"
        elif len(trajectory.steps) >= MOST_STEPS:
            trajectory.end = "endless"
        elif self.context_length is not None:
            num_tokens = len(self.formatter.token_ids(step.row, few_shot=False))
            if not fits(num_tokens, most, self.context_length):
                trajectory.end = "too_long"
        return step if trajectory.end is None else None

    def _ask_next(self, trajectory: Trajectory, few_shot: bool) -> _Asked | None:
        asked = self.agent.next_step(trajectory.state, few_shot=few_shot)
        if asked is None:
            return None
        question, number = trajectory.question, len(trajectory.steps)
        kwargs = question.template_arguments.get("chat_template_kwargs")
        row = PromptRow(
            # The key of the random streams: no two steps share noise, whatever their prompts.
            hash_prompt(["step", _question_id(question), trajectory.index, number], None),
            asked.prompt,
            None,
            {"step_kind": asked.kind, "question": question.prompt},
            question.row_index,
            question.source,
            {} if kwargs is None else {"chat_template_kwargs": kwargs},
        )
        check_prompt(row.prompt, f"step {number} ({asked.kind}) of {row.where}")
        return _Asked(trajectory, asked.kind, row)

    def _take(self, asked: _Asked, samples: Sequence[Rollout]) -> Move | None:
        """Choose among the samples of a step; return what the continued one leads to, None for the end."""
        trajectory = asked.trajectory
        continued = continued_sample(samples)
        moves: dict[int, Move] = {}
        malformed = set()
        for sample in samples:
            if not sample.is_truncated:
                text = split_control_tokens(sample.completion, self.formatter.tokenizer)
                try:
                    moves[sample.sample_index] = self.agent.act(trajectory.state, text)
                except MalformedAction:
                    malformed.add(sample.sample_index)
        move = moves.get(continued.sample_index)
        target = None
        if move is not None:
            parsed = [sample for sample in samples if sample.sample_index in moves]
            target = best_ranked(parsed, continued).sample_index
        row = asked.row
        in_training = self.agent.has_examples and self.config.few_shot_in_training
        shown = self.agent.next_step(trajectory.state, few_shot=in_training)
        if shown is not None and shown.prompt != row.prompt:
            row = replace(row, prompt=shown.prompt)
        trajectory.steps.append(
            Step(row, asked.kind, continued.sample_index, target, frozenset(malformed))
        )
        trajectory.last = continued
        if move is None:
            trajectory.end = "truncated" if continued.is_truncated else "malformed"
        else:
            trajectory.state = move.state
        return move

    def _observe(
        self, waiting: Mapping[str, tuple[Trajectory, Move]], observations: Observations
    ) -> None:
        """Make the calls that trajectories wait for, side by side, and show them the results."""
        if not waiting:
            return
        results: dict[str, ToolResult] = {}
        if self.collector.accelerator.is_main_process:
            calls = {step: move.call for step, (_, move) in waiting.items()}
            results = self._call(calls, observations)  # type: ignore[arg-type]
        results = from_main(self.collector.accelerator, results)
        tokens = control_tokens(self.formatter.tokenizer)
        for step, (trajectory, move) in waiting.items():
            result = results[step]
            shown = split_tokens(valid_text(result.content), tokens)
            trajectory.state = self.agent.observe(move.state, replace(result, content=shown))
            trajectory.num_calls += 1
            trajectory.num_failed += result.failed

    def _call(
        self, calls: Mapping[str, ToolCall], observations: Observations
    ) -> dict[str, ToolResult]:
        """Return the result of each step's call; equal calls of a deterministic tool are made once.

        What a tool draws at random depends on the first step that makes the call.
        """
        results: dict[str, ToolResult] = {}
        same: dict[Hashable, list[str]] = defaultdict(list)
        for step, call in calls.items():
            repeats = call.name not in self.tools.nondeterministic
            known = observations.of_step(step, call)
            if known is None and repeats:
                known = observations.of_call(call)
            if known is not None:
                results[step] = known
            else:
                same[repr((call.name, sorted(call.arguments.items()))) if repeats else step].append(
                    step
                )

        def make(steps: Sequence[str]) -> ToolResult:
            result = self.tools.call(calls[steps[0]], seed_of(steps[0]))
            for step in steps:
                observations.add(step, calls[step], result)
            return result

        pool = ThreadPoolExecutor(MOST_CALLS_AT_ONCE, thread_name_prefix="tools")
        try:
            sent = {pool.submit(make, steps): steps for steps in same.values()}
            for future in as_completed(sent):
                results |= dict.fromkeys(sent[future], future.result())
        finally:  # what is being called is kept, also where another call failed
            pool.shutdown(cancel_futures=True)
            observations.tell()
        return results

    def sample_heldout(
        self,
        rows: Sequence[PromptRow],
        progress: Progress,
        *,
        few_shot: bool = False,
        folder: Path | None = None,
        prefix: str = "",
    ) -> tuple[Rollouts, int]:
        """Play held-out questions to their answers, and grade these: see `SelfPlay.sample_heldout`.

        The first trajectory of a question is greedy; the `num_generations_eval` others choose among the
        samples of each step as in training. One without an answer has the answer "", and is truncated.
        """
        greedy, sampled = heldout_options(self.config, self.eos_token_ids)
        of_samples = range(1, self.config.num_generations_eval + 1)
        rollouts, num_tokens = Rollouts.of(()), 0
        for name, options, indices, num_samples in (
            ("greedy-", greedy, range(1), 1),
            ("sampled-", sampled, of_samples, self.agent.num_step_samples),
        ):
            if not indices:
                continue
            path = None if folder is None else folder / f"{prefix}{name}00000.parquet"
            graded = self._stored(path)
            if graded is None:
                plays = self._without_scorer().play_to_end(
                    list(_once(rows).values()), 0, "eval", folder and folder / "steps", indices,
                    few_shot=few_shot, num_samples=num_samples, prefix=prefix + name,
                    observations=self._observations(keeps=folder is not None),
                    **{each: getattr(options, each) for each in _HELDOUT_OPTIONS},
                )  # fmt: skip
                answers = self._answers(plays, rows, "eval", 0)
                graded = self._grade(answers, rows, path, prefix + name)
                steps = plays.rollouts
            else:
                assert folder is not None
                steps = load_steps_of(folder / "steps", prefix + name)
            progress.update(len(graded), sum(len(each.completion_ids) for each in graded))
            rollouts += Rollouts.of(graded)
            num_tokens += steps.num_tokens
        return rollouts, num_tokens

    def failed_steps(self, plays: Plays, round_index: int, folder: Path) -> set[str]:
        """Return the prompt ids of the steps of trajectories whose answer doesn't reach the threshold.

        A question with several rows, one for each answer to accept, is graded by each of them; one that
        passes will do. The graded answers are kept in the round's folder.
        """
        played = {_question_id(trajectory.question) for trajectory in plays.trajectories}
        question_ids = {
            row.prompt_id: question_id
            for row in self.rows
            if (question_id := _question_id(row)) in played
        }
        path = folder / "answers" / "00000.parquet"
        graded = self._stored(path)
        if graded is None:
            rows = [row for row in self.rows if row.prompt_id in question_ids]
            answers = self._answers(plays, rows, "train", round_index)
            graded = self._grade(answers, rows, path, "answers-")
        passing = {
            (question_ids[answer.prompt_id], answer.sample_index)
            for answer in graded
            if answer.passes(self.collector.reward_threshold)
        }
        failed = [
            trajectory
            for trajectory in plays.trajectories
            if (_question_id(trajectory.question), trajectory.index) not in passing
        ]
        return {step.row.prompt_id for trajectory in failed for step in trajectory.steps}

    def _answers(
        self, plays: Plays, rows: Sequence[PromptRow], phase: Phase, round_index: int
    ) -> list[Rollout]:
        """Return the answer of each trajectory, for each row that asks its question."""
        same: dict[str, list[Trajectory]] = defaultdict(list)
        for trajectory in plays.trajectories:
            same[_question_id(trajectory.question)].append(trajectory)
        return [
            self._answer(trajectory, prompt_id, phase, round_index)
            for prompt_id, row in {row.prompt_id: row for row in rows}.items()
            for trajectory in same[_question_id(row)]
        ]

    def _answer(
        self, trajectory: Trajectory, prompt_id: str, phase: Phase, round_index: int
    ) -> Rollout:
        """Return an answer as graders get it; its tokens are those of its text, without a prompt."""
        last, text, ids = trajectory.last, "", ()
        is_answered = trajectory.end == "answered"
        if is_answered:
            text = valid_text(self.agent.answer(trajectory.state))
            written = self.formatter.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids = (*written, self.eos_token_id)
        return Rollout(
            round_index=round_index,
            phase=phase,
            prompt_id=prompt_id,
            sample_index=trajectory.index,
            prompt_ids=(),
            completion_ids=ids,
            prompt=last.prompt if last else "",
            completion=text,
            finish="eos" if is_answered else "length",
            halt="malformed" if trajectory.end == "malformed" else None,
            num_failed_calls=trajectory.num_failed,
        )

    def _stored(self, path: Path | None) -> list[Rollout] | None:
        """Return answers that were graded before; None if there are none, or their scores were taken back."""
        found = None
        if self.collector.accelerator.is_main_process and path is not None and path.exists():
            found = load_rollouts(path)
        if found is not None and not all(answer.is_graded for answer in found):
            found = None
        return from_main(self.collector.accelerator, found)

    def _grade(
        self,
        answers: Sequence[Rollout],
        rows: Sequence[PromptRow],
        path: Path | None,
        prefix: str,
    ) -> list[Rollout]:
        """Return answers with their rewards; they are kept at `path`, if it is given."""
        collector, is_eval = self.collector, answers[0].phase == "eval"
        scorer = collector.heldout_scorer if is_eval else collector.scorer
        collector = replace(collector, scorer=scorer)
        by_id = {row.prompt_id: row for row in rows}
        replies = None if path is None else judgements_of(path.parent)
        graded: list[Rollout] = []
        with judged(self, collector, answers, by_id, answers[0].round_index, replies, prefix):
            if collector.accelerator.is_main_process:
                graded = list(map(_wrong_without_answer, collector.grade(answers, by_id)))
                if path is not None:
                    save_rollouts(path, graded)
                    ids = tuple(dict.fromkeys(answer.prompt_id for answer in graded))
                    save_plan(
                        path.with_name(f"{path.stem.removesuffix('00000')}plan.json"),
                        [Shard(ids, 1)],
                    )
        return from_main(collector.accelerator, graded)

    def _without_scorer(self) -> Self:
        return replace(self, collector=replace(self.collector, scorer=None))

    def _observations(self, keeps: bool = True) -> Observations:
        return Observations(self.run.root / "observations.jsonl" if keeps else None)


def _question_id(row: PromptRow) -> str:
    """Return the id of a question, which doesn't depend on its solution."""
    return hash_prompt(row.prompt, None, row.template_arguments)


def _once(rows: Sequence[PromptRow]) -> dict[str, PromptRow]:
    """Return rows by question, each question once whatever its solutions, in the order of the ids."""
    once = {_question_id(row): row for row in rows}
    return {question_id: once[question_id] for question_id in sorted(once)}


def _wrong_without_answer(answer: Rollout) -> Rollout:
    """Return a graded answer; a trajectory without one isn't an abstention."""
    if answer.reward is not None or answer.finish != "length":
        return answer
    return replace(answer, reward=0.0)
