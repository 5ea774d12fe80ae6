"""The charts of a run, as numbers: which curves there are, their points, intervals and marks.

In: the lines of rounds.jsonl, and what the trainer's states logged. Out: `Chart`s, which html_report.py
draws and also shows as tables. Values that a line lacks, as those of earlier versions, are None.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trl_selfplay.evaluation.monitor import find_convergence
from trl_selfplay.rollouts.funnel import Funnel

Line = Mapping[str, Any]
Values = tuple[float | None, ...]
Mark = tuple[int, str, str]

# Points of one curve of the training's log; more can't be told apart on a screen.
_MOST_POINTS = 240
_SCORES = (
    r"accuracy|pass@\d+|mean_reward|mean_sampled_reward|logps|win_rate|margin|loss|distance|pairs"
    r"|mean_length|truncated|abstained"
)
_SCORE = re.compile(rf"(?P<prefix>.+)_(?P<score>{_SCORES})")
_FEW_SHOT = "_few_shot"
# What a completion came to, in the order of the bars, and what it is called.
OUTCOME_NAMES = {
    "kept": "kept",
    "failed": "wrong",
    "truncated": "cut by length",
    "abstained": "not graded",
    "leaked": "quotes the hint",
    "too_long": "too long to train on",
    "duplicate": "duplicate",
    "capped": "over the cap per prompt",
    "identical": "equal to its partner",
    "empty": "empty",
    "unpaired": "without a wrong partner",
    "malformed": "malformed call",
    "tool_limit": "out of calls",
}


@dataclass(frozen=True, slots=True)
class Series:
    """One curve, or one part of all bars.

    Attributes:
        name: Its name in the legend.
        values: One per label; None where there is none.
        lows: Lower ends of the intervals; empty without any.
        highs: Upper ends.
        is_reference: A line to compare with, the same everywhere.
    """

    name: str
    values: Values
    lows: Values = ()
    highs: Values = ()
    is_reference: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves or bars over rounds or steps.

    Attributes:
        title: Heading.
        caption: What the numbers mean.
        labels: Of the horizontal axis.
        series: At least one.
        kind: "bars" are stacked.
        axis: What the labels are.
        bounds: Of the vertical axis; None where the values decide.
        marks: Places of labels with what happened there, in few characters and in full.
    """

    title: str
    caption: str
    labels: tuple[str, ...]
    series: tuple[Series, ...]
    kind: Literal["lines", "bars"] = "lines"
    axis: str = "round"
    bounds: tuple[float | None, float | None] = (None, None)
    marks: tuple[Mark, ...] = ()


def split_metric(name: str) -> tuple[str, str] | None:
    """Return prefix and score of a held-out metric, such as ("eval", "accuracy"); None for others."""
    found = _SCORE.fullmatch(name)
    return None if found is None else (found["prefix"], found["score"])


def evaluations(lines: Sequence[Line]) -> list[tuple[str, Mapping[str, float]]]:
    """Return a label and the held-out metrics of the untrained model, if known, and of each round."""
    before = lines[0].get("eval_before") if lines else None
    first = [("before", before)] if before else []
    return [*first, *((str(line["round"]), line.get("eval") or {}) for line in lines)]


def heldout_prefixes(lines: Sequence[Line]) -> list[str]:
    """Return the prefix of each held-out set's metrics, in their order."""
    found = [split_metric(name) for _, metrics in evaluations(lines) for name in metrics]
    prefixes = dict.fromkeys(split[0] for split in found if split is not None)
    return [prefix for prefix in prefixes if not prefix.endswith(_FEW_SHOT)]


def heldout_charts(lines: Sequence[Line]) -> list[Chart]:
    """Return the held-out scores of each set over the rounds, with intervals and the untrained line."""
    of_prefix = [(prefix, _charts_of_set(lines, prefix)) for prefix in heldout_prefixes(lines)]
    return [
        chart if len(of_prefix) == 1 else _renamed(chart, prefix)
        for prefix, charts in of_prefix
        for chart in charts
    ]


def _renamed(chart: Chart, prefix: str) -> Chart:
    name = prefix.removeprefix("eval_")
    return Chart(f"{chart.title}: {name}", *(getattr(chart, f) for f in Chart.__slots__[1:]))


def _charts_of_set(lines: Sequence[Line], prefix: str) -> list[Chart]:
    known = {name for _, metrics in evaluations(lines) for name in metrics}
    k = max(
        (int(name.rpartition("@")[2]) for name in known if _is_pass_at_k(name, prefix)), default=0
    )
    passes = dict.fromkeys(["accuracy", "pass@1", f"pass@{k}"])
    alarms = alarm_marks(lines)
    return [
        chart
        for title, caption, scores, bounds, marks in (
            (
                "Accuracy and pass@k",
                "Share of held-out prompts with a right greedy completion (accuracy), and with at least "
                "one right among k samples (pass@k). Bands are 95 % intervals over prompts.",
                list(passes),
                (0.0, 1.0),
                alarms,
            ),
            (
                "Held-out reward",
                "Mean reward of greedy completions of held-out prompts.",
                [] if f"{prefix}_accuracy" in known else ["mean_reward", "mean_sampled_reward"],
                (None, None),
                alarms,
            ),
            (
                "Win rate against the opponent",
                "Share of held-out pairs in which the policy prefers the data's completion more strongly "
                "than its opponent did. At .5 nothing tells them apart any more: SPIN has converged.",
                ["win_rate"],
                (0.0, 1.0),
                _convergence_marks(lines, prefix),
            ),
            (
                "Likelihood of the data",
                "Mean log-prob per token of the data's held-out completions, in nats.",
                ["logps"],
                (None, None),
                (),
            ),
            (
                "Distance of opponent and data",
                "ln 2 minus the held-out loss, in nats: how far the opponent still is from the data at "
                "least. Below .01 a round has little to learn.",
                ["distance"],
                (None, None),
                (),
            ),
        )
        if (chart := _score_chart(lines, prefix, title, caption, scores, bounds, marks)) is not None
    ]


def _is_pass_at_k(name: str, prefix: str) -> bool:
    return re.fullmatch(rf"{re.escape(prefix)}_pass@\d+", name) is not None


def _score_chart(
    lines: Sequence[Line],
    prefix: str,
    title: str,
    caption: str,
    scores: Sequence[str],
    bounds: tuple[float | None, float | None],
    marks: Iterable[Mark],
) -> Chart | None:
    scored = evaluations(lines)
    series = []
    for score in scores:
        name = f"{prefix}_{score}"
        values = _values(metrics.get(name) for _, metrics in scored)
        if not _has_any(values):
            continue
        lows, highs = (
            _values(metrics.get(f"{name}_{end}") for _, metrics in scored)
            for end in ("low", "high")
        )
        series.append(Series(score.replace("_", " "), values, lows, highs))
    if not series:
        return None
    first = scores[0] if f"{prefix}_{scores[0]}" in dict(scored)[scored[-1][0]] else None
    series += _references(lines, prefix, first or "", len(scored))
    labels = tuple(label for label, _ in scored)
    shift = labels[0] == "before"
    return Chart(
        title,
        caption,
        labels,
        tuple(series),
        bounds=bounds,
        marks=tuple((place + shift, short, full) for place, short, full in marks),
    )


def _references(lines: Sequence[Line], prefix: str, score: str, count: int) -> list[Series]:
    if score == "win_rate":
        return [Series("no difference", (0.5,) * count, is_reference=True)]
    before = lines[0].get("eval_before") or {}
    forms = (("untrained", prefix), ("untrained, few-shot", f"{prefix}{_FEW_SHOT}"))
    return [
        Series(f"{score.replace('_', ' ')}, {name}", (value,) * count, is_reference=True)
        for name, form in forms
        if (value := finite(before.get(f"{form}_{score}"))) is not None
    ]


def _convergence_marks(lines: Sequence[Line], prefix: str) -> list[Mark]:
    return [
        (place, "converged", text)
        for place, line in enumerate(lines)
        if (text := find_convergence(line.get("eval") or {}, prefix))
    ]


def alarm_marks(lines: Sequence[Line]) -> tuple[Mark, ...]:
    """Return the places of rounds with alarms, their number, and their names."""
    return tuple(
        (place, f"▲ {len(alarms)}", ", ".join(str(alarm.get("name")) for alarm in alarms))
        for place, line in enumerate(lines)
        if (alarms := line.get("alarms"))
    )


def funnel_chart(lines: Sequence[Line]) -> Chart | None:
    """Return how many completions came to which outcome in each round, hinted ones with the others."""
    if not lines:
        return None
    funnels = [Funnel.from_dict(line["funnel"]) for line in lines]
    series = [Series("kept", tuple(float(f.unhinted.kept) for f in funnels))]
    if any(f.hinted.sampled for f in funnels):
        series.append(Series("kept, with hint", tuple(float(f.hinted.kept) for f in funnels)))
    for outcome, name in OUTCOME_NAMES.items():
        counts = [getattr(f.unhinted, outcome) + getattr(f.hinted, outcome) for f in funnels]
        if outcome != "kept" and any(counts):
            series.append(Series(name, tuple(map(float, counts))))
    return Chart(
        "Outcomes",
        "What became of each round's completions, those with hints included.",
        _rounds(lines),
        tuple(series),
        kind="bars",
        bounds=(0.0, None),
    )


def sample_charts(lines: Sequence[Line]) -> list[Chart]:
    """Return lengths, diversity and rewards over the rounds, with the alarms marked."""
    kinds: tuple[tuple[str, str, dict[str, str], tuple[float | None, float | None]], ...] = (
        (
            "Length",
            "Mean number of tokens of a completion, without results of tools.",
            {"play/mean_length": "training prompts", "eval_mean_length": "held-out, greedy",
             "play/mean_length_chosen": "the data"},
            (0.0, None),
        ),
        (
            "Cut and ungraded",
            "Share of completions that are cut by max_completion_length, or that no reward function graded.",
            {"play/truncated": "cut, training prompts", "eval_truncated": "cut, held-out",
             "eval_abstained": "not graded, held-out"},
            (0.0, None),
        ),
        (
            "Diversity",
            "Distinct completions as a share of a prompt's completions, and the share of prompts with a "
            "right one (coverage). A collapse shows as a fall of both while accuracy still rises.",
            {"play/distinct": "distinct", "play/coverage": "coverage"},
            (0.0, 1.0),
        ),
        (
            "Distinct right completions",
            "Mean number of distinct right completions per solved prompt.",
            {"play/distinct_correct": "distinct right"},
            (0.0, None),
        ),
        (
            "Solved by difficulty",
            "Share of prompts with a right completion, by how often round 0 solved them.",
            {f"play/solved_{name}": name.replace("_", " ") for name in ("easy", "medium", "hard", "very_hard")},
            (0.0, 1.0),
        ),
    )  # fmt: skip
    charts = [
        _chart_of(lines, title, caption, names, bounds) for title, caption, names, bounds in kinds
    ]
    names = dict.fromkeys(name for line in lines for name in line.get("rewards") or {})
    if names:
        curves = [
            Series(name, values)
            for name in names
            if _has_any(values := _values((line.get("rewards") or {}).get(name) for line in lines))
        ]
        caption = "Mean score of each reward function, and the weighted mean."
        charts.append(_over_rounds(lines, "Rewards", caption, curves, (None, None)))
    return [chart for chart in charts if chart is not None]


def _chart_of(
    lines: Sequence[Line],
    title: str,
    caption: str,
    names: Mapping[str, str],
    bounds: tuple[float | None, float | None],
) -> Chart | None:
    series = []
    for metric, name in names.items():
        part = "eval" if metric.startswith("eval_") else "metrics"
        values = _values((line.get(part) or {}).get(metric) for line in lines)
        if _has_any(values):
            series.append(Series(name, values))
    return _over_rounds(lines, title, caption, series, bounds)


def _over_rounds(
    lines: Sequence[Line],
    title: str,
    caption: str,
    series: Sequence[Series],
    bounds: tuple[float | None, float | None],
) -> Chart | None:
    if not series:
        return None
    marks = alarm_marks(lines)
    return Chart(title, caption, _rounds(lines), tuple(series), bounds=bounds, marks=marks)


def cost_charts(lines: Sequence[Line]) -> list[Chart]:
    """Return seconds and tokens of each phase over the rounds."""
    charts = []
    for title, caption, field in (
        (
            "Seconds",
            "Wall-clock time of each phase, in the process that finished the round. Round 0's includes what precedes "
            "it: the scores of the untrained model (evaluate_before) and the warm-up.",
            "seconds",
        ),
        (
            "Tokens",
            "Tokens of sampled completions, and of trained rows times epochs, in each phase.",
            "tokens",
        ),
    ):
        phases = dict.fromkeys(phase for line in lines for phase in line.get(field) or {})
        series = tuple(
            Series(phase, _values((line.get(field) or {}).get(phase) for line in lines))
            for phase in phases
        )
        if series:
            charts.append(
                Chart(title, caption, _rounds(lines), series, kind="bars", bounds=(0.0, None))
            )
    return charts


def training_charts(history: Sequence[Line]) -> list[Chart]:
    """Return what the trainer logged over the optimizer steps of all rounds.

    Args:
        history: Log lines with `step`, in order.
    """
    kinds: tuple[tuple[str, str, dict[str, str]], ...] = (
        (
            "Loss",
            "Of training rows, and of the trainer's own evaluation if there was one.",
            {"loss": "training", "eval_loss": "evaluation"},
        ),
        (
            "Loss with and without thoughts",
            "In nats per token. Thoughts help if the loss with them is lower.",
            {"thought/base_loss": "without, training", "thought/talk_loss": "with, training",
             "eval_thought/base_loss": "without, held-out", "eval_thought/talk_loss": "with, held-out"},
        ),
        (
            "Gain of thinking",
            "What thoughts add to a token's log-prob, in nats. Above 0, they help.",
            {"thought/gain": "training", "eval_thought/gain": "held-out"},
        ),
        (
            "Thoughts",
            "Share of places whose thoughts help, of thoughts that are reinforced, and of places whose "
            "thoughts are all the same.",
            {"thought/helped": "help", "thought/reinforced": "reinforced", "thought/all_equal": "all the same"},
        ),
        (
            "Entropy of thoughts",
            "Of the distributions that thoughts are drawn from, in nats.",
            {"thought/entropy": "training", "eval_thought/entropy": "held-out"},
        ),
        (
            "Mixing weight",
            "How much of a prediction comes from behind the thought: mean, and 5 % and 95 % quantiles.",
            {"thought/weight_mean": "mean", "thought/weight_p05": "5 %", "thought/weight_p95": "95 %"},
        ),
        (
            "Pairs told apart",
            "Share of training pairs whose chosen side the policy prefers more than its reference does.",
            {"rewards/accuracies": "training"},
        ),
        ("Gradient norm", "Before clipping.", {"grad_norm": "training"}),
    )  # fmt: skip
    charts = (_log_chart(title, caption, history, names) for title, caption, names in kinds)
    return [chart for chart in charts if chart is not None]


def _log_chart(
    title: str, caption: str, history: Sequence[Line], names: Mapping[str, str]
) -> Chart | None:
    """Return a chart of some metrics, thinned out to what a screen can show."""
    found = [entry for entry in history if any(finite(entry.get(n)) is not None for n in names)]
    found = found[:: math.ceil(len(found) / _MOST_POINTS) or 1]
    series = tuple(
        Series(shown, values)
        for name, shown in names.items()
        if _has_any(values := _values(entry.get(name) for entry in found))
    )
    if not series:
        return None
    begins: list[Mark] = []
    for place, entry in enumerate(found):
        index = entry.get("round")
        if index is not None and (not begins or begins[-1][1] != f"round {index:.0f}"):
            begins.append((place, f"round {index:.0f}", ""))
    labels = tuple(str(entry.get("step", "")) for entry in found)
    return Chart(title, caption, labels, series, axis="step", marks=tuple(begins))


def comparison_charts(runs: Mapping[str, Sequence[Line]]) -> list[Chart]:
    """Return each held-out score that several runs have, with a curve per run."""
    names: dict[str, list[str]] = {}
    for run, lines in runs.items():
        known = dict.fromkeys(name for _, metrics in evaluations(lines) for name in metrics)
        for name in known:
            if _is_compared(name, known):
                names.setdefault(name, []).append(run)
    labels = tuple(
        sorted(
            {label for lines in runs.values() for label, _ in evaluations(lines)},
            key=lambda label: -1 if label == "before" else int(label),
        )
    )
    charts = []
    for name, with_score in names.items():
        if len(with_score) < 2:
            continue
        series = []
        for run in with_score:
            scored = dict(evaluations(runs[run]))
            values, lows, highs = (
                _values(scored.get(label, {}).get(f"{name}{end}") for label in labels)
                for end in ("", "_low", "_high")
            )
            series.append(Series(run, values, lows, highs))
        shown = name.removeprefix("eval_").replace("_", " ")
        is_share = shown.startswith(("accuracy", "pass@", "win rate"))
        bounds = (0.0, 1.0) if is_share else (None, None)
        caption = "One curve per run; bands are 95 % intervals over prompts."
        charts.append(Chart(f"Held-out {shown}", caption, labels, tuple(series), bounds=bounds))
    return charts


def _is_compared(name: str, known: Collection[str]) -> bool:
    """Return whether runs are compared by a metric: those that choose rounds, and pass@k with intervals."""
    prefix, score = split_metric(name) or ("", "")
    if prefix.endswith(_FEW_SHOT):
        return False
    if score == "mean_reward":
        return f"{prefix}_accuracy" not in known
    return score in ("accuracy", "logps", "win_rate") or (
        score.startswith("pass@") and f"{name}_low" in known
    )


def _rounds(lines: Sequence[Line]) -> tuple[str, ...]:
    return tuple(str(line["round"]) for line in lines)


def _values(values: Iterable[Any]) -> Values:
    return tuple(map(finite, values))


def finite(value: Any) -> float | None:
    """Return a finite number; None for anything else, as JSON has no NaN."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if is_number else None


def _has_any(values: Values) -> bool:
    return any(value is not None for value in values)
