"""Report on a run: a table and a plot of the rounds.

In: the lines of rounds.jsonl as dicts. Out: text, Markdown for the model card, a PNG.
"""

import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_selfplay.evaluation.markdown import escape
from trl_selfplay.evaluation.monitor import best_round
from trl_selfplay.evaluation.progress import say
from trl_selfplay.rollouts.funnel import Funnel, describe_causes
from trl_selfplay.rollouts.record import Rollout

UNTRAINED = -1

_NONE = "–"


def print_completions(rollouts: Sequence[Rollout], limit: int | None = None) -> None:
    """Print the ends of prompts, and completions with their rewards, at most `limit` of them."""
    for r in rollouts[:limit]:
        hint = ", hinted" if r.hinted else ""
        say(f"[reward {r.reward}, {r.finish}{hint}] …{r.prompt[-100:]!r}\n    → {r.completion!r}")


def print_round_table(lines: Sequence[Mapping[str, Any]], metric: str | None = None) -> None:
    """Print the rounds so far, as a rich table on a terminal if rich is installed, else as text."""
    if sys.stdout.isatty():
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass  # rich only makes the same table look better
        else:
            # Names and causes come from a user: square brackets in them are no markup.
            console = Console(markup=False)
            is_narrow = console.width < len(round_table(lines, metric).split("\n", 1)[0])
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=_caption(lines))
            header, *rows = _rows(lines, metric)
            for name in header:
                table.add_column(name, justify="right")
            for row in rows:
                table.add_row(*(re.sub(r" (?=[\[±+])", "\n", c) if is_narrow else c for c in row))
            console.print(table)
            return
    sys.stdout.write(f"{round_table(lines, metric)}\n")


def round_table(lines: Sequence[Mapping[str, Any]], metric: str | None = None) -> str:
    """Return the rounds as a plain-text table, one row per round, and a line about its columns.

    Args:
        lines: Lines of rounds.jsonl, at least one.
        metric: The held-out metric that selects the best round; its set is shown. None: the first
            set's accuracy.
    """
    rows = _rows(lines, metric)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    return "\n".join([*table, _caption(lines)])


def rounds_markdown(
    lines: Sequence[Mapping[str, Any]], metric: str | None = None, greater_is_better: bool = True
) -> str:
    """Return the rounds as a section of the model card that names the best and the last round.

    Args:
        lines: Lines of rounds.jsonl, at least one.
        metric: The held-out metric that selects the best round. None: the first set's accuracy.
        greater_is_better: False if the lowest value of the metric is the best.
    """
    header, *rows = _rows(lines, metric)
    table = "\n".join(
        f"| {' | '.join(cells)} |" for cells in (header, ["---:"] * len(header), *rows)
    )
    text = f"## Rounds\n\n{table}\n\nColumns: {escape(_caption(lines))}.\n\n"
    last = lines[-1]["round"]
    metric = metric or _default_metric(lines)
    history = [(i, m[metric]) for i, m in _evaluations(lines) if metric and metric in m]
    if metric is None or not history:
        return f"{text}Last round: {last}. There were no held-out prompts, so none is the best."
    best = best_round(history, greater_is_better)
    scores = dict(history)
    best_name = "before training" if best == UNTRAINED else str(best)
    last_score = f"{scores[last]:.3f}" if last in scores else _NONE
    return (
        f"{text}Best round by `{metric}`: {best_name} ({scores[best]:.3f}). Last round: {last} "
        f"({last_score}). Intervals are 95 %, over prompts. The score that chose the best round is "
        "biased upward; report the model on other prompts."
    )


def _rows(lines: Sequence[Mapping[str, Any]], metric: str | None) -> list[list[str]]:
    """Return the table's header and rows as text."""
    metric = metric or _default_metric(lines) or "eval_accuracy"
    prefix = _prefix(metric)
    known = {name for _, metrics in _evaluations(lines) for name in metrics}
    k = max((_largest_k(m, prefix) for _, m in _evaluations(lines)), default=0)
    scores = ["accuracy", f"pass@{k}", "logps", "win_rate", "margin"]
    if (chosen := metric.removeprefix(f"{prefix}_")) not in scores and "pass@" not in chosen:
        scores = [chosen, *scores]
    scores = [name for name in scores if f"{prefix}_{name}" in known]
    engines = ["engine gap"] if any("engine" in line for line in lines) else []
    rows = [["round", "gain ± s.e.", "funnel", "steps", *scores, *engines, "seconds"]]
    before = lines[0].get("eval_before") or {}
    for name, form in (("before", prefix), ("before, few-shot", f"{prefix}_few_shot")):
        if any(key.startswith(tuple(f"{form}_{score}" for score in scores)) for key in before):
            cells = [_score(before, f"{form}_{score}") for score in scores]
            rows.append([name, _NONE, _NONE, _NONE, *cells, *(_NONE for _ in engines), _NONE])
    for line in lines:
        rows.append(
            [
                str(line["round"]),
                _gain(line["gain"], line["gain_standard_error"]),
                _chain(Funnel.from_dict(line["funnel"]), line, _uses_hints(lines)),
                f"{line['steps']:,}",
                *(_score(line["eval"], f"{prefix}_{score}") for score in scores),
                *(_engine_gap(line) for _ in engines),
                "/".join(f"{line['seconds'].get(phase, 0.0):.0f}" for phase in _phases(lines)),
            ]
        )
    return rows


def _caption(lines: Sequence[Mapping[str, Any]]) -> str:
    graded = ""
    if _is_graded(lines[0]):
        graded = "correct + rationalized → " if _uses_hints(lines) else "correct → "
    funnels = [Funnel.from_dict(line["funnel"]) for line in lines]
    causes: Counter[str] = Counter()
    for funnel in funnels:
        causes.update(dict(funnel.abstain_causes))
    abstained = f"; abstained: {describe_causes(causes.items())}" if causes else ""
    engine = ""
    if any("engine" in line for line in lines):
        engine = "engine gap: nats per token between the log-probs of the engine that samples and the trainer's; "
    return (
        f"funnel: sampled → finished → {graded}kept → trained; {engine}seconds: "
        f"{'/'.join(_phases(lines))}{abstained}"
    )


def _uses_hints(lines: Sequence[Mapping[str, Any]]) -> bool:
    return any(Funnel.from_dict(line["funnel"]).hinted.sampled for line in lines)


def _is_graded(line: Mapping[str, Any]) -> bool:
    """Return whether reward functions graded the round's samples, so that some are correct."""
    return bool(line["rewards"])


def _chain(funnel: Funnel, line: Mapping[str, Any], uses_hints: bool) -> str:
    with_hint = f" + {funnel.rationalized:,}" if uses_hints else ""
    graded = f"{funnel.correct:,}{with_hint} → " if _is_graded(line) else ""
    kept = f"{graded}{funnel.kept:,} → {line['examples']:,}"
    return f"{funnel.sampled:,} → {funnel.finished:,} → {kept}"


def _phases(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(phase for line in lines for phase in line["seconds"]))


def _default_metric(lines: Sequence[Mapping[str, Any]]) -> str | None:
    for _, metrics in _evaluations(lines):
        for name in metrics:
            shown = name.endswith(("_accuracy", "_logps", "_mean_reward"))
            if shown and "_few_shot_" not in name:
                return name
    return None


def _prefix(metric: str) -> str:
    return re.sub(r"_(?:accuracy|pass@\d+|mean_\w+|logps|win_rate)$", "", metric)


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, float]]]:
    """Return (round, held-out metrics), starting with the untrained model."""
    before = lines[0].get("eval_before") if lines else None
    first = [(UNTRAINED, before)] if before else []
    return [*first, *((line["round"], line["eval"]) for line in lines)]


def _largest_k(metrics: Mapping[str, float], prefix: str) -> int:
    pattern = re.compile(rf"{re.escape(prefix)}_pass@(\d+)")
    return max((int(m[1]) for name in metrics if (m := pattern.fullmatch(name))), default=0)


def _score(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return _NONE
    text = f"{metrics[name]:.3f}"
    if f"{name}_low" in metrics:
        text += f" [{metrics[f'{name}_low']:.2f}, {metrics[f'{name}_high']:.2f}]"
    return text


def _gain(gain: float | None, standard_error: float | None) -> str:
    if gain is None:
        return _NONE
    return f"{gain:+.3f}" + ("" if standard_error is None else f" ± {standard_error:.3f}")


def _engine_gap(line: Mapping[str, Any]) -> str:
    """Return the difference of an engine's log-probs from the trainer's, if an engine sampled."""
    agreement = (line.get("engine") or {}).get("agreement")
    return _NONE if agreement is None else f"{agreement['gap']:.2g}"


def plot_rounds(
    lines: Sequence[Mapping[str, Any]], path: str | Path, metric: str = "eval_accuracy"
) -> None:
    """Plot held-out scores with intervals and the kept completions by round, to a PNG file.

    Args:
        lines: Lines of rounds.jsonl, at least one.
        path: Path of the PNG; missing folders are created.
        metric: The held-out metric to show, with pass@k of the same set at the largest k.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'Plotting rounds needs matplotlib: pip install "trl-selfplay[demo]".'
        ) from error
    evaluations = _evaluations(lines)
    k = max((_largest_k(m, _prefix(metric)) for _, m in evaluations), default=0)
    names = dict.fromkeys([metric, *([f"{_prefix(metric)}_pass@{k}"] if k else [])])
    series = {n: points for n in names if (points := _series(evaluations, n))}
    # The figure is used by itself: pyplot would keep it alive and choose a window's backend.
    figure = Figure(figsize=(7, 6 if series else 3), layout="constrained")
    axes = figure.subplots(2 if series else 1, 1, sharex=True, squeeze=False)[:, 0]
    if series:
        _plot_scores(axes[0], series)
        few_shot = (lines[0].get("eval_before") or {}).get(f"{_prefix(metric)}_few_shot_accuracy")
        if few_shot is not None:
            label = "accuracy before, few-shot"
            axes[0].axhline(few_shot, color="gray", linestyle="--", label=label)
        axes[0].legend(loc="best")
    _plot_kept(axes[-1], lines)
    rounds = [UNTRAINED, *(line["round"] for line in lines)]
    axes[-1].set_xticks(rounds, ["before", *map(str, rounds[1:])])
    axes[-1].set_xlabel("round")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")


def _series(
    evaluations: Sequence[tuple[int, Mapping[str, float]]], name: str
) -> list[tuple[int, float, float, float]]:
    """Return (round, value, low, high) of a metric for the rounds that have it."""
    return [
        (i, m[name], m.get(f"{name}_low", m[name]), m.get(f"{name}_high", m[name]))
        for i, m in evaluations
        if name in m
    ]


def _plot_scores(axes: Any, series: Mapping[str, list[tuple[int, float, float, float]]]) -> None:
    for place, (name, points) in enumerate(series.items()):
        rounds, values, lows, highs = zip(*points, strict=True)
        # Side by side, or the bars of the intervals would hide each other.
        shifted = [r + 0.06 * place for r in rounds]
        # Rounding can put an end of an interval on the wrong side of its value.
        below = [max(0.0, v - low) for v, low in zip(values, lows, strict=True)]
        above = [max(0.0, high - v) for v, high in zip(values, highs, strict=True)]
        label = re.sub(r"^eval_", "", name).replace("_", " ")
        axes.errorbar(shifted, values, yerr=[below, above], marker="o", capsize=3, label=label)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel("held-out score (95 % interval)")
    axes.grid(axis="y", alpha=0.3)


def _plot_kept(axes: Any, lines: Sequence[Mapping[str, Any]]) -> None:
    funnels = [Funnel.from_dict(line["funnel"]) for line in lines]
    rounds = [line["round"] for line in lines]
    unhinted = [f.unhinted.kept for f in funnels]
    axes.bar(rounds, unhinted, width=0.5, label="without hint")
    if any(f.hinted.kept for f in funnels):
        hinted = [f.hinted.kept for f in funnels]
        axes.bar(rounds, hinted, bottom=unhinted, width=0.5, label="rationalized")
        axes.legend(loc="best")
    axes.set_ylabel("completions kept")
    axes.grid(axis="y", alpha=0.3)
