"""Check a run before it begins, on a few training prompts: what `dry_run=True` does instead of training.

In: a trainer that has not begun to train. Out: findings, printed and in `preflight.json` in the output
directory. A round is played on 32 prompts from random streams of their own; nothing is trained, and a
run that follows gets the same samples as without.
"""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any, Literal

from transformers.trainer_utils import TrainOutput

from trl_selfplay.disk import save_text
from trl_selfplay.estimation.plan import CannotEstimateError
from trl_selfplay.estimation.record import size_text
from trl_selfplay.evaluation.estimates import interval_of_shares, pass_at_k
from trl_selfplay.evaluation.progress import format_duration, say
from trl_selfplay.evaluation.room_of_results import RoomOfResults
from trl_selfplay.generation.sampler import build_sampling_options
from trl_selfplay.peers import wait_for_all
from trl_selfplay.rollouts.funnel import describe_causes, describe_funnel
from trl_selfplay.rounds.example_lengths import warn_of_long_examples
from trl_selfplay.rounds.gold_check import check_gold
from trl_selfplay.rounds.memory_check import describe_memory, estimate_run
from trl_selfplay.rounds.needs import (
    bytes_of_run,
    expected_examples,
    expected_steps,
    free_bytes,
    seconds_of_run,
)
from trl_selfplay.rounds.stopping import end_of_turn, warn_of_end
from trl_selfplay.rounds.trial_round import NUM_PROMPTS, NUM_SAMPLES, TrialRound, play_trial_round

logger = logging.getLogger(__name__)

Level = Literal["ok", "warning", "error"]

_NUM_SHOWN = 3
# From this pass@1 on there is little left to learn.
_ALL_BUT_SOLVED = 0.95
# From this share of truncated completions on, many are sampled for nothing.
_MANY_TRUNCATED = 0.25


class PreflightError(RuntimeError):
    """A run with these settings can't work; `preflight.json` says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check.

    Attributes:
        name: What was checked, one word.
        level: "error" if a run can't work.
        text: What was found, and what to do about it.
        values: The numbers in it.
        details: Further lines. Text of models and data in them is a Python literal.
    """

    name: str
    level: Level
    text: str
    values: Mapping[str, Any] = field(default_factory=dict)
    details: tuple[str, ...] = ()


def run_preflight(trainer: Any) -> TrainOutput:
    """Check a run, print what is found and save it; train nothing.

    Raises:
        PreflightError: A run with these settings can't work.
    """
    folder = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        count = len(trainer.self_play.rows)
        say(f"dry_run=True: a round on {min(NUM_PROMPTS, count)} of {count:,} training prompts")
    findings = find_all(trainer, folder / ".preflight")
    errors = [finding for finding in findings if finding.level == "error"]
    if trainer.is_world_process_zero():
        save_text(folder / "preflight.json", to_json(findings))
        say(describe(findings, min(100, shutil.get_terminal_size().columns)))
        say(f"dry_run=True: nothing was trained. All of this is in {folder / 'preflight.json'}")
    if errors:
        listed = "\n".join(f"- {finding.name}: {finding.text}" for finding in errors)
        raise PreflightError(f"a run with these settings can't work:\n{listed}")
    return TrainOutput(0, 0.0, {})


def find_all(trainer: Any, folder: Path) -> list[Finding]:
    """Return what all checks find.

    Args:
        trainer: That has not begun to train.
        folder: Where the trial round's files lie while it lasts.
    """
    is_main, accelerator = trainer.is_world_process_zero(), trainer.accelerator
    if is_main:
        shutil.rmtree(folder, ignore_errors=True)
    wait_for_all(accelerator)
    try:
        trial = play_trial_round(trainer, folder)
        found = [
            _prompts(trainer, trial),
            _stop(trainer, trial),
            _gold(trainer, trial),
            _passing(trainer, trial),
            _lengths(trainer, trial),
            _examples(trainer, trial),
            _memory(trainer, trial),
            _time(trainer, trial),
            _disk(trainer, trial),
        ]
    finally:
        wait_for_all(accelerator)
        if is_main:
            shutil.rmtree(folder, ignore_errors=True)
    return [finding for finding in found if finding is not None]


def warn_before_run(trainer: Any) -> None:
    """Make the checks that cost nothing, at the start of every run; log what they find."""
    for find in (warn_of_end, warn_of_long_examples) if trainer.samples_prompts else ():
        if warning := find(trainer.self_play):
            logger.warning("%s", warning)


def describe(findings: Sequence[Finding], columns: int = 100) -> str:
    """Return findings as text, one paragraph each; details aren't wrapped.

    Args:
        findings: At least one.
        columns: Width of the text.
    """
    margin = max(len(finding.name) for finding in findings) + 2
    lines = []
    for finding in findings:
        level = "" if finding.level == "ok" else f"{finding.level.upper()}: "
        text = fill(
            level + finding.text,
            max(columns, margin + 40),
            initial_indent=finding.name.ljust(margin),
            subsequent_indent=" " * margin,
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += [text, *(" " * (margin + 2) + detail for detail in finding.details)]
    return "\n".join(lines)


def to_json(findings: Sequence[Finding]) -> str:
    """Return findings as JSON."""
    counts = {level: sum(f.level == level for f in findings) for level in ("error", "warning")}
    content = {
        "errors": counts["error"],
        "warnings": counts["warning"],
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(content, indent=1, default=str) + "\n"


def _prompts(trainer: Any, trial: TrialRound) -> Finding:
    """Show prompts as they are sampled from, and a completion of each."""
    play = trainer.self_play
    shown = play.as_asked(trial.rows[:_NUM_SHOWN])
    details = []
    few_shot = play.shows_examples(0)
    for row in shown:
        forms = {"": {"few_shot": few_shot}}
        if play.formatter.hint_formatter is not None:
            forms[" with hint"] = {"few_shot": few_shot, "hinted": True}
        for name, how in forms.items():
            ids = play.formatter.token_ids(row, **how)
            text = play.formatter.tokenizer.decode(list(ids))
            details.append(f"{row.where}{name}, {len(ids)} tokens: {text!r}")
            sampled = trial.hinted if name else trial.samples
            one = next((r for r in sampled if r.prompt_id == row.prompt_id), None)
            if one is not None:
                reward = "" if one.reward is None else f", reward {one.reward:g}"
                details.append(f"→ {one.completion!r} ({one.finish}{reward})")
    what = "as the model sees them, each with a completion" if trial.samples else "as trained on"
    return Finding("prompts", "ok", f"{len(shown)} {what}:", {}, tuple(details))


def _stop(trainer: Any, trial: TrialRound) -> Finding:
    play = trainer.self_play
    tokenizer = play.formatter.tokenizer
    eos = [tokenizer.decode([token]) for token in play.eos_token_ids]
    ending = end_of_turn(play)
    values = {
        "eos": eos,
        "end_of_turn": None if ending is None else tokenizer.decode(list(ending)),
    }
    if (warning := warn_of_end(play)) and trial.samples:
        return Finding("stop", "warning", warning, values)
    text = f"completions end at {', '.join(map(repr, eos))}"
    if ending:
        text += f", and so do the chat template's turns ({values['end_of_turn']!r})"
    if last := _last_tokens(trial):
        wrong = len([token for token in last if token not in play.eos_token_ids])
        values["rows_without_eos"] = wrong
        if wrong:
            text += f"; {wrong} of {len(last)} training rows don't end in one of these"
            return Finding("stop", "error", text, values)
        text += f"; {len(last)} of {len(last)} training rows end in one of these"
    return Finding("stop", "ok", text, values)


def _last_tokens(trial: TrialRound) -> list[int]:
    """Return the last token of each row that is trained on; none if rows are packed."""
    played = trial.played
    rows = played.training_rows
    if played.num_examples != len(rows):
        return []
    names = [
        name for name in ("input_ids", "chosen_ids", "rejected_ids") if name in rows.column_names
    ]
    return [ids[-1] for name in names for ids in rows[name]]


def _gold(trainer: Any, trial: TrialRound) -> Finding | None:
    found = check_gold(trainer, trial.rows)
    if found is None:
        return None
    values = {"form": found.form, "count": found.count, "passed": found.num_passed}
    if found.form is None:
        what = "completions of `gold_dataset`"
    else:
        what = f"solutions, written as {found.form!r},"
    text = f"{found.num_passed} of {found.count} {what} pass the reward functions"
    details = tuple(
        f"{where}: reward {reward}: {completion!r:.200}"
        for where, completion, reward in found.missed[:_NUM_SHOWN]
    )
    if found.num_passed == found.count:
        return Finding("gold", "ok", text, values)
    if found.num_passed:
        return Finding("gold", "warning", f"{text}; fix or drop the others:", values, details)
    if found.form is None:
        text += ": right answers of the model would fail as well. Mend the reward functions or the data:"
        return Finding("gold", "error", text, values, details)
    text = (
        "no usual way of writing the solutions passes the reward functions, so it isn't known whether "
        "they accept right answers. Call them on a right completion of yours."
    )
    return Finding("gold", "warning", text, values)


def _passing(trainer: Any, trial: TrialRound) -> Finding | None:
    """Say how often the model is right already."""
    play = trainer.self_play
    if play.collector.scorer is None or not trial.samples:
        return None
    graded = [r for r in trial.samples if r.reward is not None]
    values: dict[str, Any] = {"abstained": 1 - len(graded) / len(trial.samples)}
    causes = describe_causes(trial.played.funnel.abstain_causes)
    if not graded:
        text = f"the reward functions abstained on all completions ({causes or 'without a cause'})"
        return Finding("rewards", "error", text, values)
    abstained = ""
    if len(graded) < len(trial.samples):
        abstained = f"; {values['abstained']:.0%} have no reward" + (
            f" ({causes})" if causes else ""
        )
    if trainer.args.rewards_have_degrees:
        rewards = [r.reward for r in graded if r.reward is not None]
        values |= {"mean": fmean(rewards), "low": min(rewards), "high": max(rewards)}
        text = (
            f"mean {values['mean']:.3g}, from {min(rewards):.3g} to {max(rewards):.3g}{abstained}"
        )
        if min(rewards) == max(rewards):
            text += ". All are equal: nothing can be chosen by them"
            return Finding("rewards", "error", text, values)
        return Finding("rewards", "warning" if abstained else "ok", text, values)
    by_prompt: dict[str, list[bool]] = {}
    for r in graded:
        by_prompt.setdefault(r.prompt_id, []).append(r.passes(play.collector.reward_threshold))
    most = min(NUM_SAMPLES, *map(len, by_prompt.values()))
    for k in sorted({1, most}):
        scores = [pass_at_k(len(own), sum(own), k) for own in by_prompt.values()]
        low, high = interval_of_shares(scores)
        values[f"pass@{k}"] = fmean(scores)
        values[f"pass@{k}_low"], values[f"pass@{k}_high"] = low, high
    shown = ", ".join(
        f"pass@{k} {values[f'pass@{k}']:.2f} "
        f"[{values[f'pass@{k}_low']:.2f}, {values[f'pass@{k}_high']:.2f}]"
        for k in sorted({1, most})
    )
    text = f"{shown} on {len(by_prompt)} training prompts{abstained}"
    if values[f"pass@{most}"] == 0:
        text += (
            ": nothing to learn from. Look at the completions above: if they are right, mend the reward "
            "functions. Else show few-shot examples, take easier prompts or a stronger model, or "
            "sample more completions"
        )
        return Finding("rewards", "error" if not sum(trial.kept) else "warning", text, values)
    if values["pass@1"] >= _ALL_BUT_SOLVED:
        text += ": almost nothing is left to learn. Take harder prompts"
        return Finding("rewards", "warning", text, values)
    return Finding("rewards", "warning" if abstained else "ok", text, values)


def _lengths(trainer: Any, trial: TrialRound) -> Finding | None:
    """Say how long completions are, and how many are cut or don't fit into training."""
    if not trial.samples:
        return None
    args = trainer.args
    most = build_sampling_options(args, ()).max_completion_length
    lengths = [
        len(r.completion_ids) for r in trial.samples
    ]  # with results of tools: all are limited
    truncated = fmean(r.is_truncated for r in trial.samples)
    results = RoomOfResults()
    for rollout in trial.samples:
        results.add(rollout, most)
    longest_prompt = max(len(r.prompt_ids) for r in trial.samples)
    too_long = trial.played.funnel.unhinted.too_long + trial.played.funnel.hinted.too_long
    values = {
        "mean_length": fmean(lengths),
        "max_length_sampled": max(lengths),
        "longest_prompt": longest_prompt,
        "truncated": truncated,
        "too_long": too_long,
        "max_completion_length": most,
        "max_length": args.max_length,
    }
    text = (
        f"completions have {values['mean_length']:.0f} tokens, {max(lengths)} at most; "
        f"{truncated:.0%} are cut at max_completion_length={most}{results.describe()}"
    )
    if truncated == 1.0:
        text += (
            ", and truncated completions are never trained on. Raise max_completion_length, set "
            "stop_strings, or start from a model that ends its answers"
        )
        return Finding("lengths", "error", text, values)
    level: Level = "ok"
    if truncated > _MANY_TRUNCATED:
        text += ", and truncated completions are never trained on. Raise it, or set stop_strings"
        level = "warning"
    if too_long:
        text += (
            f"; {too_long} right ones are longer than max_length={args.max_length} with their prompts "
            "and are left out. Raise max_length"
        )
        level = "warning"
    if warning := warn_of_long_examples(trainer.self_play):
        text += f"; {warning}"
        level = "warning"
    return Finding("lengths", level, text, values)


def _examples(trainer: Any, trial: TrialRound) -> Finding:
    played, graded = trial.played, trainer.self_play.collector.scorer is not None
    examples = expected_examples(trainer, trial)
    steps = expected_steps(trainer, trial, examples)
    values = {
        "kept": sum(trial.kept),
        "examples": asdict(examples),
        "steps": asdict(steps),
        "funnel": played.funnel.to_dict(),
    }
    details = (describe_funnel(played.funnel, graded),)
    if not played.num_examples:
        remedy = played.remedy or "Nothing that was sampled is trained on."
        return Finding("examples", "error", f"a round keeps nothing. {remedy}", values, details)
    text = f"a round trains on about {examples} examples, in {steps} optimizer steps"
    args = trainer.args
    batch = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    values["batch"] = batch
    if examples.value < batch:
        text += f"; that is less than one batch of {batch}. Sample more, or take smaller batches"
        return Finding("examples", "warning", text, values, details)
    return Finding("examples", "ok", text, values, details)


def _memory(trainer: Any, trial: TrialRound) -> Finding:
    try:
        found, free = estimate_run(trainer)
    except CannotEstimateError as error:
        return Finding("memory", "ok", f"isn't estimated: {error}")
    values = {phase.name: phase.total for phase in found.phases} | {"free": free}
    text = describe_memory(found, free)
    longest = max((len(r.prompt_ids) + len(r.completion_ids) for r in trial.samples), default=0)
    if longest and (most := trainer.args.max_length) is not None and longest < most:
        values |= {"longest_row": longest, "max_length": most}
        text += f", for rows of max_length={most} tokens; the trial's have up to {longest}"
    if found.fits(free):
        return Finding("memory", "ok", text, values)
    details = tuple(f"to fit: {change}" for change in found.advice)
    return Finding("memory", "warning", f"{text}: it may not fit", values, details)


def _time(trainer: Any, trial: TrialRound) -> Finding:
    seconds = seconds_of_run(trainer, trial, expected_examples(trainer, trial))
    num_tokens = sum(len(r.own_ids) for r in trial.played.rollouts)
    values = {"seconds": seconds, "tokens_per_second": num_tokens / max(trial.seconds, 1e-9)}
    parts = ", ".join(f"{phase} {format_duration(value)}" for phase, value in seconds.items())
    text = f"about {format_duration(sum(seconds.values()))} for the run ({parts})"
    if trainer.samples_prompts:
        text += f", at {values['tokens_per_second']:,.0f} tokens/s in the trial"
    return Finding("time", "ok", text, values)


def _disk(trainer: Any, trial: TrialRound) -> Finding:
    needed = bytes_of_run(trainer, trial)
    free = free_bytes(Path(trainer.args.output_dir))
    values = {**needed, "free": free}
    parts = ", ".join(f"{what} {size_text(count)}" for what, count in needed.items())
    text = f"up to {size_text(sum(needed.values()))} ({parts}), of {size_text(free)} free"
    if sum(needed.values()) > free:
        text += ". Choose an output_dir on a larger disk, or set save_strategy='no' or save_total_limit=1"
        return Finding("disk", "error", text, values)
    return Finding("disk", "ok", text, values)
