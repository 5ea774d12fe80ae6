"""The samples that a report shows, as the plain data that its page filters.

In: a run's folder. Out: `ShownSamples`: for each round a bounded choice of its rollouts and of its held-out
completions, with texts that are safe to show. Samples that can't be read are named instead.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from trl_selfplay.disk import DamagedFileError, NewerFormatError
from trl_selfplay.inspection.charts import OUTCOME_NAMES, finite
from trl_selfplay.inspection.plain_text import visible
from trl_selfplay.inspection.run_folder import UNFINISHED, RunFolder
from trl_selfplay.inspection.sample_choice import choose_samples
from trl_selfplay.inspection.trajectory import (
    Decode,
    load_decoder,
    name_end,
    split_steps,
    split_tokens,
)
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rounds.run import UNTRAINED

# A browser shows thousands of samples only if their texts are short: each of them, and the steps of a
# trajectory together, of which each has at least the other number.
_MOST_CHARACTERS = 8000
_MOST_OF_A_STEP = 400
HELD_OUT = "held-out"


@dataclass(slots=True)
class ShownSamples:
    """The chosen samples of a run.

    Attributes:
        samples: One record each, see `_record`.
        prompts: Ids of their prompts.
        texts: Prompts as sampled from; a hint or examples make another text of the same prompt.
        solutions: Their solutions in the same order, "" where the run kept none.
        note: How they were chosen, how many there are, and what can't be read.
    """

    samples: list[dict[str, Any]] = field(default_factory=list)
    prompts: dict[str, int] = field(default_factory=dict)
    texts: dict[str, int] = field(default_factory=dict)
    solutions: list[str] = field(default_factory=list)
    note: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return what the page gets."""
        return {
            "samples": self.samples,
            "prompts": list(self.prompts),
            "solutions": self.solutions,
            "texts": list(self.texts),
        }


def collect_samples(run: RunFolder, limit: int) -> ShownSamples:
    """Return at most `limit` samples of each round, and as many held-out completions."""
    shown = ShownSamples()
    decode = load_decoder(run)
    rounds = sorted({*run.rounds, *(line["round"] for line in run.lines)})
    shown.note.append(
        f"At most {limit} completions of each round are shown, shared equally among the outcomes, and at "
        f"most {limit} greedy held-out ones. Which prompts is drawn by a hash of their ids, so rounds show "
        "the same prompts as far as they sampled them. `--samples N` shows more."
    )
    for index in rounds if limit > 0 else ():
        _add(shown, run, index, run.rollouts(index), limit, decode, "")
    for index in [UNTRAINED, *rounds] if limit > 0 else ():
        greedy = (
            (rollout, name) for rollout, name in run.evaluation(index) if rollout.sample_index == 0
        )
        _add(shown, run, index, greedy, limit, decode, HELD_OUT)
    known = run.prompts
    for prompt_id in shown.prompts if known is not None else ():
        solution = known[prompt_id].solution if known is not None and prompt_id in known else None
        shown.solutions.append("" if solution is None else _shorten(str(solution)))
    return shown


def _add(
    shown: ShownSamples,
    run: RunFolder,
    index: int,
    rollouts: Iterable[tuple[Rollout, str]],
    limit: int,
    decode: Decode | None,
    kind: str,
) -> None:
    where = "the untrained model" if index == UNTRAINED else f"round {index}"
    try:
        chosen = choose_samples(rollouts, limit)
    except (DamagedFileError, NewerFormatError, FileNotFoundError) as error:
        shown.note.append(f"Samples of {where} can't be read: {error}")
        return
    if chosen.totals and not kind:
        counts = ", ".join(
            f"{sum(outcome == o for _, o in chosen.samples):,} of {total:,} {name_outcome(outcome)}"
            for outcome, total in chosen.totals.items()
        )
        shown.note.append(f"{where.capitalize()}: {counts}.")
    for rollout, outcome in chosen.samples:
        label = f"{HELD_OUT} {outcome}".strip() if kind else name_outcome(outcome)
        shown.samples.append(_record(shown, run, rollout, index, label, decode))


def _record(
    shown: ShownSamples,
    run: RunFolder,
    rollout: Rollout,
    index: int,
    label: str,
    decode: Decode | None,
) -> dict[str, Any]:
    """Return a sample as JSON takes it, with texts by their places in lists."""
    steps = split_steps(rollout, decode)
    each = max(_MOST_OF_A_STEP, 2 * _MOST_CHARACTERS // max(1, len(steps)))
    trajectory = {
        "steps": [[s.writer, visible(s.name), _shorten(s.text, each)] for s in steps],
        "own_tokens": len(rollout.own_ids),
    }
    written = split_tokens(rollout, decode)
    if rollout.messages and written and decode is not None:
        trajectory["written"] = [[is_own, _shorten(text, each)] for is_own, text in written]
    return {
        "round": index,
        "outcome": label,
        "prompt": shown.prompts.setdefault(rollout.prompt_id, len(shown.prompts)),
        "text": shown.texts.setdefault(_shorten(rollout.prompt), len(shown.texts)),
        "index": rollout.sample_index,
        "hinted": rollout.hinted,
        "end": name_end(rollout),
        "reward": finite(rollout.reward),
        "scores": [[visible(n), finite(score)] for n, score in run.scores(rollout).items()],
        "cause": visible(rollout.cause or ""),
        "tokens": len(rollout.completion_ids),
        "completion": _shorten(rollout.completion),
        **(trajectory if steps else {}),
    }


def _shorten(text: str, most: int = _MOST_CHARACTERS) -> str:
    """Return text that is safe to show, without its middle where it is longer than this."""
    if len(text) > most:
        half = most // 2
        text = f"{text[:half]}\n[… {len(text) - 2 * half:,} characters …]\n{text[-half:]}"
    return visible(text)


def name_outcome(outcome: str) -> str:
    """Return what an outcome is called."""
    return "not selected yet" if outcome == UNFINISHED else OUTCOME_NAMES.get(outcome, outcome)
