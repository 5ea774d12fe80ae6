"""What a run comes to, in words and tables: how far it is, its key numbers, lineage and settings.

In: `RunFolder`s. Out: text and rows of text, for the report. What the run was given, such as names of
models, is not made safe for a terminal or a page here.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from trl_selfplay.confidential import masked
from trl_selfplay.evaluation.detectors import DETECTOR_OF, WHERE
from trl_selfplay.evaluation.monitor import best_round
from trl_selfplay.evaluation.progress import format_duration
from trl_selfplay.inspection.charts import OUTCOME_NAMES, evaluations, heldout_prefixes
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rollouts.funnel import Funnel
from trl_selfplay.rounds.run import UNTRAINED

NONE = "–"
ALARM = "▲ "
_OFF = ("", "None", "False", "[]", "{}")
# What a round's line holds beside what every round has; the method's own values, as a threshold.
_COMMON = frozenset(
    [
        "round",
        "sampled_from",
        "trained_from",
        "funnel",
        "rewards",
        "metrics",
        "eval",
        "eval_before",
        "gain",
        "gain_standard_error",
        "seconds",
        "tokens",
        "examples",
        "steps",
        "learning_rate",
        "engine",
        "alarms",
        "detectors",
    ]
)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a header.

    Attributes:
        header: Names of the columns.
        rows: As many cells each.
        caption: What it shows.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


def describe_progress(run: RunFolder) -> str:
    """Return how far a run is: finished, or the phase that its files show."""
    if not run.has_rounds:
        return "A training without rounds. Its log is shown; there are no samples and no funnel."
    done, planned = len(run.lines), run.planned_rounds
    of = f" of {planned}" if planned else ""
    if run.is_finished:
        stopped = planned is not None and done < planned
        return f"Finished after {done}{of} rounds{', before all were played' if stopped else ''}."
    folder = run.folder(done)
    begun = [
        ("samples/plan.json", "sampling"),
        ("selection.parquet", "training"),
        ("model", "scoring held-out prompts"),
    ]
    phases = [phase for name, phase in begun if (folder / name).exists()]
    now = f" Round {done}: {phases[-1]}." if phases else ""
    return f"So far: {done}{of} rounds finished.{now}"


def key_numbers(run: RunFolder) -> list[tuple[str, str, str]]:
    """Return name, value and a remark for the head of the report."""
    lines = run.lines
    if not lines:
        return []
    numbers = []
    if scores := _heldout_scores(run):
        metric, values, best = scores
        name, newest = metric.removeprefix("eval_").replace("_", " "), max(values)
        if UNTRAINED in values:
            numbers.append((f"{name}, untrained", _score(run, UNTRAINED, metric), ""))
        which = "the untrained model" if best == UNTRAINED else f"round {best}"
        numbers.append((f"{name}, best", _score(run, best, metric), which))
        numbers.append((f"{name}, last", _score(run, newest, metric), f"round {newest}"))
    last = lines[-1]
    if last.get("gain") is not None:
        error = last.get("gain_standard_error")
        plus_minus = "" if error is None else f" ± {error:.3f}"
        numbers.append(("gain", f"{last['gain']:+.3f}{plus_minus}", "paired by prompt, ± s.e."))
    funnels = [Funnel.from_dict(line["funnel"]) for line in lines]
    sampled = sum(f.sampled + f.hinted.sampled for f in funnels)
    numbers.append(("completions", f"{sampled:,}", f"{sum(f.kept for f in funnels):,} kept"))
    seconds = sum(sum(line["seconds"].values()) for line in lines)
    numbers.append(
        ("time", format_duration(seconds), f"{sum(line['steps'] for line in lines):,} steps")
    )
    if any("alarms" in line for line in lines):
        names = [alarm.get("name") for line in lines for alarm in line.get("alarms") or ()]
        remark = f"raised {len(names)} times" if len(names) > len(set(names)) else ""
        numbers.append(("alarms", str(len(set(names))), remark))
    return numbers


def chosen_metric(run: RunFolder) -> str | None:
    """Return the held-out metric that chooses the best round, or the first that every run has."""
    known = {name for _, metrics in evaluations(run.lines) for name in metrics}
    chosen = run.config.get("metric_for_best_model")
    if chosen in known:
        return str(chosen)
    names = (
        f"{p}_{s}"
        for p in heldout_prefixes(run.lines)
        for s in ("accuracy", "mean_reward", "logps")
    )
    return next((name for name in names if name in known), None)


def _heldout_scores(run: RunFolder) -> tuple[str, dict[int, float], int] | None:
    """Return the metric that chooses, its values by round (-1: untrained), and the best round."""
    metric = chosen_metric(run)
    if metric is None:
        return None
    values = {i: m[metric] for i, m in _by_round(run).items() if metric in m}
    return (
        metric,
        values,
        best_round([*values.items()], run.config.get("greater_is_better") is not False),
    )


def saved_round(run: RunFolder) -> int:
    """Return the round whose weights a finished run saved as its model; -1 is the untrained model."""
    last, scores = run.lines[-1], _heldout_scores(run)
    asked = run.config.get("load_best_round_at_end") is not False or any(
        alarm.get("action") == "best_round" for alarm in last.get("alarms") or ()
    )
    return scores[2] if asked and scores else last["round"]


def _by_round(run: RunFolder) -> dict[int, Mapping[str, float]]:
    return {
        UNTRAINED if label == "before" else int(label): metrics
        for label, metrics in evaluations(run.lines)
    }


def _score(run: RunFolder, round_index: int, metric: str) -> str:
    metrics = _by_round(run)[round_index]
    low, high = (metrics.get(f"{metric}_{end}") for end in ("low", "high"))
    interval = "" if low is None or high is None else f" [{low:.2f}, {high:.2f}]"
    return f"{metrics[metric]:.3f}{interval}"


def funnel_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return the counts of each round's funnel, with those of hinted completions after a plus sign."""
    funnels = [Funnel.from_dict(line["funnel"]) for line in lines]
    has_hints = any(f.hinted.sampled for f in funnels)
    outcomes = [
        o
        for o in OUTCOME_NAMES
        if any(getattr(f.unhinted, o) + getattr(f.hinted, o) for f in funnels)
    ]
    header = [
        "round",
        "prompts",
        "solved",
        "sampled",
        *(OUTCOME_NAMES[o] for o in outcomes),
        "trained on",
    ]

    def both(unhinted: int, hinted: int) -> str:
        return f"{unhinted:,} + {hinted:,}" if has_hints else f"{unhinted:,}"

    rows = [
        (
            str(line["round"]),
            f"{f.prompts:,}",
            f"{f.prompts_solved:,}",
            both(f.sampled, f.hinted.sampled),
            *(both(getattr(f.unhinted, o), getattr(f.hinted, o)) for o in outcomes),
            f"{line['examples']:,}",
        )
        for line, f in zip(lines, funnels, strict=True)
    ]
    note = "Without + with a hint. " if has_hints else ""
    causes = {c for f in funnels for c, _ in f.abstain_causes}
    reasons = "; ".join(
        f"{cause}: {sum(dict(f.abstain_causes).get(cause, 0) for f in funnels):,}"
        for cause in sorted(causes)
    )
    return Table(
        tuple(header),
        tuple(rows),
        f"{note}{f'Not graded because of: {reasons}.' if reasons else ''}",
    )


def alarm_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return the alarms by name: rounds, newest value, action, and what the newest says.

    Without the place in the documentation, which need not be where the report is read.
    """
    raised: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for line in lines:
        for alarm in line.get("alarms") or ():
            raised.setdefault(str(alarm.get("name", "")), []).append((line["round"], alarm))
    rows = [
        (
            name,
            ", ".join(str(index) for index, _ in found),
            _with_interval(found[-1][1]),
            str(found[-1][1].get("action", "")),
            str(found[-1][1].get("text", "")).partition(f" See {WHERE}")[0],
        )
        for name, found in raised.items()
    ]
    return Table(("alarm", "rounds", "newest value", "action", "what the newest says"), tuple(rows))


def detector_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return every detector's value in each round; `ALARM` stands before those that raised one."""
    names = dict.fromkeys(name for line in lines for name in line.get("detectors") or {})
    raised = {
        (line["round"], alarm.get("name")) for line in lines for alarm in line.get("alarms") or ()
    }
    rows = []
    for name in sorted(names, key=lambda name: [*DETECTOR_OF, name].index(name)):
        cells = [
            (ALARM if (line["round"], name) in raised else "")
            + format_number((line.get("detectors") or {}).get(name))
            for line in lines
        ]
        known = DETECTOR_OF.get(name)
        threshold = NONE
        if known is not None and isfinite(known.threshold):  # others only measure
            threshold = f"> {format_number(known.threshold)}"
        rows.append((name, *cells, threshold, "" if known is None else known.value))
    rounds = (f"round {line['round']}" for line in lines)
    return Table(("detector", *rounds, "alarm", "its value is the"), tuple(rows))


def _with_interval(alarm: Mapping[str, Any]) -> str:
    """Return a value, or mean, with its interval."""
    value, low, high = (alarm.get(name) for name in ("value", "low", "high"))
    value = alarm.get("mean", value)
    if low is None or high is None:
        return format_number(value)
    return f"{format_number(value)} [{format_number(low)}, {format_number(high)}]"


def faithfulness_table(run: RunFolder) -> Table:
    """Return how much answers depend on their rationales, by group; no rows where it isn't measured."""
    measured = run.faithfulness or {}
    columns = ("own", "dropped", "foreign", "own - dropped", "own - foreign")
    rows = [
        (
            name,
            f"{group.get('completions', 0):,}",
            *(_with_interval({"value": None, **(group.get(column) or {})}) for column in columns),
        )
        for name, group in (measured.get("groups") or {}).items()
    ]
    caption = (
        f"{measured.get('kept', 0):,} completions were kept, {measured.get('tried', 0):,} of them tried. "
        f"Model: {measured.get('model', '')}."
    )
    header = ("group", "completions", *columns)
    return Table(header, tuple(rows), caption if rows else "")


def lineage_table(run: RunFolder) -> Table:
    """Return which weights each round sampled from and trained from, and what it made of them."""
    own = list(dict.fromkeys(k for line in run.lines for k in line if k not in _COMMON))
    scores = _heldout_scores(run)
    best = None if scores is None else scores[2]
    rows = [
        (
            f"round {line['round']}" + (" (best)" if line["round"] == best else ""),
            str(line["sampled_from"]),
            str(line["trained_from"]),
            *(format_number(line.get(name)) for name in own),
            f"{line['examples']:,}",
            f"{line['steps']:,}",
            format_number(line.get("learning_rate")),
            "yes" if (run.folder(line["round"]) / "model").exists() else "no",
        )
        for line in run.lines
    ]
    header = (
        "weights",
        "sampled from",
        "trained from",
        *own,
        "examples",
        "steps",
        "learning rate",
        "on disk",
    )
    return Table(header, tuple(rows))


def score_table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Return every held-out number of each round; intervals stand beside their values."""
    scored = evaluations(lines)
    known = dict.fromkeys(name for _, metrics in scored for name in metrics)
    names = [
        n for n in known if not (n.endswith(("_low", "_high")) and n.rpartition("_")[0] in known)
    ]
    rows = [(name, *(_cell(metrics, name) for _, metrics in scored)) for name in names]
    return Table(("metric", *(label for label, _ in scored)), tuple(rows))


def _cell(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return NONE
    low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
    interval = "" if low is None or high is None else f" [{low:.3g}, {high:.3g}]"
    return f"{format_number(metrics[name])}{interval}"


def settings_rows(run: RunFolder) -> list[tuple[str, str]]:
    """Return the settings that say something, by name: neither None, nor off, nor empty."""
    shown = ((name, format_setting(value)) for name, value in sorted(run.config.items()))
    return [(name, text) for name, text in shown if text not in _OFF]


def differing_settings(runs: Mapping[str, RunFolder]) -> Table:
    """Return the settings in which runs differ, with a column per run.

    A setting that a run doesn't record, as an earlier version may not, is taken to be off.
    """
    names = sorted({n for run in runs.values() for n in run.config} - {"output_dir", "run_name"})
    rows = []
    for name in names:
        values = [format_setting(run.config.get(name)) for run in runs.values()]
        if len({"None" if value in _OFF else value for value in values}) > 1:
            rows.append((name, *values))
    return Table(("setting", *runs), tuple(rows))


def totals_table(runs: Mapping[str, RunFolder]) -> Table:
    """Return what each run did and came to."""
    rows = []
    for name, run in runs.items():
        funnels = [Funnel.from_dict(line["funnel"]) for line in run.lines]
        metric = best = NONE
        if scores := _heldout_scores(run):
            metric, _, index = scores
            name_of_best = "untrained" if index == UNTRAINED else f"round {index}"
            best = f"{_score(run, index, metric)} ({name_of_best})"
        tokens = [sum(line["tokens"].values()) for line in run.lines if "tokens" in line]
        seconds = sum(sum(line["seconds"].values()) for line in run.lines)
        rows.append(
            (
                name,
                run.method or NONE,
                str(len(run.lines)),
                f"{sum(f.sampled + f.hinted.sampled for f in funnels):,}",
                f"{sum(f.kept for f in funnels):,}",
                f"{sum(line['steps'] for line in run.lines):,}",
                f"{sum(tokens):,}" if tokens else NONE,
                format_duration(seconds),
                metric,
                best,
            )
        )
    header = (
        "run",
        "method",
        "rounds",
        "completions",
        "kept",
        "steps",
        "tokens",
        "time",
        "metric",
        "best",
    )
    return Table(header, tuple(rows))


def name_runs(runs: Iterable[RunFolder]) -> dict[str, RunFolder]:
    """Return runs by the shortest ends of their paths that tell them apart."""
    folders = list(runs)
    for depth in range(1, 64):
        names = ["/".join(run.output_dir.resolve().parts[-depth:]) for run in folders]
        if len(set(names)) == len(names):
            return dict(zip(names, folders, strict=True))
    # The same folder twice.
    return {f"{run.output_dir.name} ({number})": run for number, run in enumerate(folders, 1)}


def format_setting(value: Any) -> str:
    """Return a setting as text, without secrets."""
    value = masked(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return {"null": "None", "true": "True", "false": "False"}.get(text, text)


def format_number(value: Any) -> str:
    """Return a number in at most four digits behind the point; other values as text.

    >>> format_number(0.00001), format_number(1234.5), format_number(None)
    ('1e-05', '1,234.5', '–')
    """
    if value is None:
        return NONE
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if not isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1 else f"{value:,.2f}".rstrip("0")
