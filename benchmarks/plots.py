"""Plot the measured results of `benchmarks/results` for the page docs/results.md.

    python benchmarks/plots.py

In: the tables of the result files. Out: one SVG per plot in docs/images. Nothing is measured here.
"""

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
IMAGES = ROOT / "docs/images"
# The same bytes for the same numbers, with text as text.
mpl.rcParams.update({"svg.hashsalt": "plots", "svg.fonttype": "none", "font.size": 10})
OURS, CONTROL = "#2563a8", "#9a9a9a"


class Score(NamedTuple):
    """A mean over seeds, and its range."""

    mean: float
    low: float
    high: float


def table(name: str, header: str) -> list[dict[str, str]]:
    """Return the first table of a result file whose first line contains `header`."""
    lines = (RESULTS / f"{name}.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|") and header in line)
    cells = [_cells(lines[start])]
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        cells.append(_cells(line))
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def score(cell: str) -> Score:
    """Read `0.73 [0.66, 0.86]`, or a number alone."""
    numbers = [float(n) for n in re.findall(r"-?\d+\.?\d*", cell)]
    return Score(*numbers) if len(numbers) == 3 else Score(numbers[0], numbers[0], numbers[0])


def plot_arms(name: str, arms: dict[str, tuple[Score, str]], label: str) -> None:
    """Plot one row per arm: the mean over seeds as a dot, their range as a line."""
    figure = Figure(figsize=(7, 0.36 * len(arms) + 0.9), layout="constrained")
    axes = figure.subplots()
    for place, (value, color) in enumerate(reversed(arms.values())):
        axes.plot([value.low, value.high], [place, place], color=color, linewidth=2)
        axes.plot([value.mean], [place], "o", color=color)
        axes.annotate(
            f"{value.mean + 1e-9:.2f}",
            (value.high, place),
            (6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_yticks(range(len(arms)), list(reversed(arms)))
    axes.set_ylim(-0.6, len(arms) - 0.4)
    lowest = min(value.low for value, _ in arms.values())
    axes.set_xlim(min(0.0, 1.1 * lowest), max(1.0, 0.0) if lowest >= 0 else 0.3)
    axes.set_xlabel(label)
    _save(figure, axes, name)


def plot_rounds(name: str, series: dict[str, list[Score]], label: str) -> None:
    """Plot scores by round, with the range over seeds, from the model before training on."""
    figure = Figure(figsize=(7, 3.8), layout="constrained")
    axes = figure.subplots()
    for place, (arm, scores) in enumerate(series.items()):
        color = f"C{place}"
        rounds = [r + 0.03 * place for r in range(len(scores))]
        axes.plot(rounds, [s.mean for s in scores], "o-", color=color, label=arm, markersize=4)
        axes.vlines(
            rounds, [s.low for s in scores], [s.high for s in scores], color=color, alpha=0.5
        )
    longest = max(map(len, series.values()))
    axes.set_xticks(range(longest), ["before", *map(str, range(longest - 1))])
    axes.set_xlabel("after round")
    axes.set_ylabel(label)
    figure.legend(loc="outside lower center", fontsize=9, ncols=2, frameon=False)
    _save(figure, axes, name)


def _save(figure: Figure, axes: Any, name: str) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    IMAGES.mkdir(parents=True, exist_ok=True)
    path = IMAGES / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    # matplotlib ends lines with spaces.
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def plot_learning() -> None:
    """STaR's demo and its controls."""
    of_arm = {row["arm"]: score(row["accuracy"]) for row in table("learning", "arm | seeds")}
    names = {
        "STaR": ("star", OURS),
        "STaR without rationalization": ("no_rationalization", OURS),
        "first round's data, equal steps": ("round0_data", CONTROL),
        "wrong completions in the right form": ("form_only", CONTROL),
        "gold final answers, equal steps": ("gold", CONTROL),
        "untrained, four examples": ("untrained, 4-shot (a)", CONTROL),
    }
    arms = {label: (of_arm[arm], color) for label, (arm, color) in names.items()}
    plot_arms("star", arms, "greedy accuracy on 200 prompts that chose nothing")


def plot_em_family() -> None:
    """ReST^EM, ReST and RFT with their controls."""
    of_arm = {row["arm"]: score(row["accuracy"]) for row in table("em_family", "arm | seeds")}
    names = {
        "ReST^EM, 2 rounds": ("rest_em", OURS),
        "ReST": ("rest", OURS),
        "RFT (with worked answers)": ("rft", OURS),
        "first round's data, equal steps": ("round0_data", CONTROL),
        "one round, as many samples": ("one_round_all_samples", CONTROL),
        "unfiltered": ("unfiltered", CONTROL),
        "worked answers, equal steps": ("gold", CONTROL),
        "before": ("untrained", CONTROL),
    }
    arms = {label: (of_arm[arm], color) for label, (arm, color) in names.items()}
    plot_arms("rest_em", arms, "greedy accuracy on 64 held-out prompts")


def plot_irpo() -> None:
    """IRPO against STaR and ReST^EM, by round."""
    rounds = ["base", "round 0", "round 1", "round 2"]
    rows = {
        (row["arm"], row["setting"]): [score(row[each]) for each in rounds]
        for row in table("irpo", "arm | seeds | setting")
    }
    names = {
        "STaR": ("star", "0.0003"),
        "ReST^EM": ("rest_em", "0.0003"),
        "IRPO, beta 1": ("irpo", "0.0001, beta 1"),
        "IRPO, beta 3": ("irpo", "0.0001, beta 3"),
        "IRPO, beta 3, without likelihood": ("irpo_without_nll", "0.0001, beta 3"),
    }
    plot_rounds("irpo", {n: rows[key] for n, key in names.items()}, "greedy accuracy, 200 sums")


def plot_spin() -> None:
    """SPIN's demo and its controls, by round."""
    rows = table("spin", "arm | after round")
    (before,) = (score(row["right"]) for row in rows if row["arm"] == "untrained")
    names = {
        "SPIN": "spin",
        "fine-tuning, equal steps": "sft_steps",
        "fine-tuning, equal time": "sft_time",
        "untrained model as the opponent": "base_opponent",
    }
    series = {
        label: [before, *(score(row["right"]) for row in rows if row["arm"] == arm)]
        for label, arm in names.items()
    }
    plot_rounds("spin", series, "right, of 32 held-out questions")


def plot_quiet_star() -> None:
    """Quiet-STaR's demo and its controls."""
    of_arm = {
        (row["arm"], row["scored with"]): score(row["hard tokens"])
        for row in table("quiet_star", "scored with")
    }
    names = {
        "Quiet-STaR": ("full", "thoughts", OURS),
        "without REINFORCE": ("no_reinforce", "thoughts", CONTROL),
        "trained on another line's thoughts": ("swapped", "thoughts", CONTROL),
        "pause tokens": ("pause", "thoughts", CONTROL),
        "fine-tuning, equal steps": ("sft", "no thought", CONTROL),
        "fine-tuning, equal time": ("sft_time", "no thought", CONTROL),
    }
    arms = {label: (of_arm[arm, by], color) for label, (arm, by, color) in names.items()}
    plot_arms("quiet_star", arms, "−log p of hard held-out tokens, nats (less is better)")


def plot_v_star() -> None:
    """Which of k answers is chosen."""
    rows = {row["chosen by"]: row for row in table("v_star", "chosen by")}
    names = {
        "any of k is right": "any",
        "verifier's likelihood": "verifier sum",
        "generator's likelihood": "generator sum",
        "majority vote": "vote",
        "verifier's ratio": "verifier ratio",
    }
    ks = (1, 2, 4, 8, 16)
    figure = Figure(figsize=(7, 3.7), layout="constrained")
    axes = figure.subplots()
    for label, name in names.items():
        axes.plot(
            ks, [score(rows[name][f"k = {k}"]).mean for k in ks], "o-", label=label, markersize=4
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, list(map(str, ks)))
    axes.set_xlabel("k answers to choose from")
    axes.set_ylabel("chosen answer is right")
    figure.legend(loc="outside lower center", fontsize=9, ncols=2, frameon=False)
    _save(figure, axes, "v_star")


def plot_addition() -> None:
    """STaR with and without hints, by round and number of digits."""
    text = (RESULTS / "addition.md").read_text()
    figure = Figure(figsize=(7, 3.1), layout="constrained")
    for axes, (section, title) in zip(
        figure.subplots(1, 2, sharey=True),
        (("plain", "without rationalization"), ("hints", "with rationalization")),
        strict=True,
    ):
        part = text.split(f"## {section} (")[1].split("\n## ")[0]
        rows = [_cells(line) for line in part.splitlines() if re.match(r"\| (base|\d)", line)]
        for digits in (2, 3, 4, 5):
            axes.plot(
                [float(row[digits]) for row in rows], "o-", label=f"{digits} digits", markersize=3
            )
        axes.set_xticks(range(len(rows)), ["before", *(row[0] for row in rows[1:])])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("after round")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("held-out accuracy")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=9, ncols=4, frameon=False)
    _save(figure, figure.axes[0], "addition")


PLOTS = (
    plot_learning, plot_addition, plot_em_family, plot_irpo, plot_spin, plot_v_star, plot_quiet_star,
)  # fmt: skip


def main() -> None:
    """Write all plots."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    for plot in PLOTS:
        plot()


if __name__ == "__main__":
    main()
