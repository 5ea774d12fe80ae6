"""The policy as the judge of its own samples, in a phase between sampling and grading.

In: a phase's samples, and reward functions of which some ask the policy. Out: the same samples,
graded. The policy is asked only when nothing is being sampled, since the judge may have other
weights. Its replies lie on disk beside the samples, in `judgements/`, and are read back on resume.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl_selfplay.generation.control_tokens import split_control_tokens
from trl_selfplay.generation.sampler import Phase, SamplingOptions
from trl_selfplay.rewards.endpoint import Reply
from trl_selfplay.rewards.judge import JudgeReward
from trl_selfplay.rewards.local_model import (
    TOO_LONG,
    check_room,
    fits,
)
from trl_selfplay.rollouts.collection import Collector, Progress
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.sequence import Rollouts
from trl_selfplay.rollouts.shards import Assignment


def collect_judged(
    play: Any,
    collector: Collector,
    assignments: Sequence[Assignment],
    options: SamplingOptions,
    *,
    round_index: int,
    phase: Phase,
    progress: Progress,
    folder: Path | None = None,
    prefix: str = "",
) -> Rollouts:
    """Sample all assignments, let the policy judge them, then grade them.

    Args:
        play: The stages of the trainer's rounds.
        collector: With the reward functions.
        assignments: See `Collector.collect`, as for the others.
        options: For the samples; the judge has its own.
        round_index: Part of the random streams of both.
        phase: What the samples are for.
        progress: Notified of samples.
        folder: Folder of the samples; the replies lie beside it, or in it if it holds an evaluation.
        prefix: Prefix of files, for the replies too.
    """
    assert collector.scorer is not None
    where: dict[str, Any] = {
        "round_index": round_index, "phase": phase, "folder": folder, "prefix": prefix
    }  # fmt: skip
    sampled = replace(collector, scorer=None).collect(
        assignments, options, progress=progress, **where
    )
    if all(rollout.is_graded for rollout in sampled):
        return sampled
    rows = {a.row.prompt_id: a.row for a in assignments}
    replies = judgements_of(folder)
    with judged(play, collector, sampled, rows, round_index, replies, prefix):
        if folder is None:
            return Rollouts.of(collector.grade(sampled, rows))
        with play.progress("grading", len(sampled), options.max_completion_length) as grading:
            return collector.collect(assignments, options, progress=grading, **where)


def judgements_of(folder: Path | None) -> Path | None:
    """Return the folder of the replies about the samples in a folder."""
    if folder is None:
        return None
    return (folder.parent if folder.name == "samples" else folder) / "judgements"


@contextmanager
def judged(
    play: Any,
    collector: Collector,
    rollouts: Sequence[Rollout],
    rows: Mapping[str, PromptRow],
    round_index: int,
    folder: Path | None,
    prefix: str,
) -> Iterator[None]:
    """Ask the policy all that its judges want to know, and let them grade within this context."""
    assert collector.scorer is not None
    judges = collector.scorer.policy_judges
    given = collector.reward_arguments(rollouts, rows)
    try:
        for number, judge in enumerate(judges):
            read = {**given["columns"], "groups": given["groups"]}
            questions = judge.questions(given["prompts"], given["completions"], **read)
            replies = _ask(play, judge, questions, round_index, folder, f"{prefix}{number}-")
            judge.keep_replies(replies)
        yield
    finally:
        for judge in judges:
            judge.keep_replies({})


def check_judges(play: Any, is_sharded: bool) -> None:
    """Raise ValueError where the policy can't judge as it is to.

    Args:
        play: The stages of the trainer's rounds.
        is_sharded: Weights are divided over processes while training.
    """
    scorer, for_heldout = play.collector.scorer, play.collector.heldout_scorer
    for each in (scorer, for_heldout):
        for judge in () if each is None else each.policy_judges:
            _, num_tokens = _row_of(play, judge.shortest_question)
            most = judge.options.max_completion_length
            check_room(num_tokens, most, play.context_length, "policy")
            if is_sharded and judge.weights == "initial":
                raise ValueError(
                    "the policy is to judge with its initial weights, and weights that are divided "
                    "over processes (FSDP, DeepSpeed ZeRO-3) can't be exchanged. Use "
                    "weights='current', a model of the judge's own, or a server."
                )


def _row_of(play: Any, question: str) -> tuple[PromptRow, int]:
    """Return a question as a prompt, and its number of tokens."""
    tokenizer = play.formatter.tokenizer
    text = split_control_tokens(question, tokenizer)
    is_chat = getattr(tokenizer, "chat_template", None) is not None
    prompt: Any = [{"role": "user", "content": text}] if is_chat else text
    row = PromptRow.of(prompt, "questions of the judge")
    return row, len(play.formatter.token_ids(row, few_shot=False))


def _ask(
    play: Any,
    judge: JudgeReward,
    questions: Sequence[str],
    round_index: int,
    folder: Path | None,
    prefix: str,
) -> dict[str, Reply]:
    """Return the policy's reply to each question, with the weights that the judge is to have."""
    most = judge.options.max_completion_length
    replies: dict[str, Reply] = {}
    rows: dict[str, PromptRow] = {}
    for question in questions:
        row, num_tokens = _row_of(play, question)
        if fits(num_tokens, most, play.context_length):
            rows[question] = row
        else:
            replies[question] = Reply(None, TOO_LONG)
    is_initial = judge.weights == "initial"
    with play.initial_weights() if is_initial else nullcontext():
        answers = play.ask(
            list(rows.values()), round_index, "judge", folder, (0,), prefix=prefix,
            max_completion_length=most, temperature=judge.options.temperature,
            top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0, stop_strings=(),
        )  # fmt: skip
    by_id = {answer.prompt_id: answer for answer in answers}
    for question, row in rows.items():
        answer = by_id[row.prompt_id]
        replies[question] = Reply(answer.completion, is_cut_off=answer.is_truncated)
    return replies
