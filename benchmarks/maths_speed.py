"""Pairs per second of math_reward, against math-verify's parse and verify in as many processes.

In: a seed. Out: results/maths_speed.md, pairs per second side by side. Both get the same completions, and different ones in every repeat. Bare means `verify(parse(gold), parse(completion))`
with the package's own timeouts switched off, in processes that share out the pairs beforehand and so
never wait for each other. math_reward has its deadline per pair. Take turns, since the machine's
speed varies.

    python benchmarks/maths_speed.py
"""

import argparse
import logging
import multiprocessing
import operator
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from trl_selfplay.rewards import maths
from trl_selfplay.rewards.worker import WorkerPool

RESULTS = Path(__file__).parent / "results" / "maths_speed.md"
Pair = tuple[str, str, bool]  # gold answer, completion, whether it is right
# Shares of the kinds of answers, roughly those of sets from school word problems to competitions.
_SHARES = {
    "whole number": 45,
    "decimal or money": 8,
    "fraction": 14,
    "root or multiple of pi": 11,
    "polynomial": 9,
    "tuple or interval": 6,
    "list": 4,
    "quantity with a unit": 2,
    "matrix": 1,
}
# Kinds that math_reward compares without a parser.
_PLAIN = ("whole number", "decimal or money", "fraction", "quantity with a unit")


def make_answer(kind: str, draw: random.Random) -> tuple[str, str, str]:
    """Return a gold answer, another form of it, and a wrong answer."""
    a, b, c = (draw.randint(2, 99) for _ in range(3))
    big = draw.randint(100, 99_999)
    if kind == "whole number":
        return f"{big}", f"{big:,}", f"{big + a}"
    if kind == "decimal or money":
        return f"{big}.{a:02}", f"\\${big:,}.{a:02}", f"{big}.{(a + 1) % 100:02}"
    if kind == "fraction":
        return (
            f"\\frac{{{a}}}{{{b * a + 1}}}",
            f"\\dfrac{{{2 * a}}}{{{2 * (b * a + 1)}}}",
            f"\\frac{{{a}}}{{{b}}}",
        )
    if kind == "root or multiple of pi":
        what = draw.choice(["\\sqrt{2}", "\\sqrt{3}", "\\pi", "\\pi^2"])
        return f"\\frac{{{a}{what}}}{{{b}}}", f"\\frac{{{a}}}{{{b}}}{what}", f"{a}{what}"
    if kind == "polynomial":
        return f"{a}x^2+{b}x-{c}", f"-{c}+{b}x+{a}x^{{2}}", f"{a}x^2-{b}x-{c}"
    if kind == "tuple or interval":
        opening, closing = draw.choice(["()", "[]", "(]", "[)"])
        high = a + b
        return (
            f"{opening}{a},{high}{closing}",
            f"\\left{opening}{a}, {high}\\right{closing}",
            f"({a},{high + 1})",
        )
    if kind == "list":
        return f"{a}, {a + b}, {-c}", f"{-c}, {a}, {a + b}", f"{a}, {a + b}, {c}"
    if kind == "quantity with a unit":
        return f"{big}\\text{{ cm}}^2", f"{big}\\,\\mathrm{{cm}}^2", f"{big}\\text{{ cm}}"
    rows = f"{a} & {b} \\\\ {c} & {big}"
    return (
        f"\\begin{{pmatrix}} {rows} \\end{{pmatrix}}",
        f"\\begin{{bmatrix}}{rows}\\end{{bmatrix}}",
        f"{a}",
    )


def make_pairs(mix: str, prompts: int, samples: int, draw: random.Random) -> list[Pair]:
    """Return `samples` completions to each of `prompts` gold answers: alike, in another form, wrong."""
    shares = {k: v for k, v in _SHARES.items() if mix == "all" or k not in _PLAIN}
    kinds = draw.choices(list(shares), list(shares.values()), k=prompts)
    pairs = []
    for kind in kinds:
        gold, other, wrong = make_answer(kind, draw)
        for _ in range(samples):
            answer, is_right = draw.choice(
                [(gold, True), (other, True), (wrong, False), (wrong, False)]
            )
            completion = f"Adding these up gives the result. Therefore, \\boxed{{{answer}}}."
            pairs.append((gold, completion, is_right))
    return pairs


def verify_bare(pairs: list[Pair]) -> int:
    """Return how many verdicts of math-verify's are wrong."""
    from math_verify import parse, verify

    logging.disable(logging.WARNING)  # each call says that the timeouts are off
    return sum(
        is_right
        != verify(
            parse(f"${gold}$", parsing_timeout=None),
            parse(completion, parsing_timeout=None),
            timeout_seconds=None,
        )
        for gold, completion, is_right in pairs
    )


def grade_ours(pairs: list[Pair]) -> int:
    """Return how many verdicts of math_reward's are wrong; an abstention is wrong, too."""
    golds, completions, are_right = zip(*pairs, strict=True)
    return sum(map(operator.ne, maths.math_reward(completions, golds), are_right))


def compare(processes: int, args: argparse.Namespace, draw: random.Random) -> list[str]:
    """Return rows of the table, one per mix."""
    maths._pool = WorkerPool(maths.__name__, "verdict", workers=processes)
    rows = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:

        def grade_bare(pairs: list[Pair]) -> int:
            return sum(pool.map(verify_bare, [pairs[n::processes] for n in range(processes)], 1))

        arms: dict[str, Callable[[list[Pair]], int]] = {"bare": grade_bare, "ours": grade_ours}
        for mix, samples in (("all", 1), ("no plain numbers", 1), ("all", args.samples)):
            speeds: dict[str, list[float]] = {name: [] for name in arms}
            wrong = dict.fromkeys(arms, 0)
            for repeat in range(args.repeats + 1):
                pairs = make_pairs(mix, args.pairs // samples, samples, draw)
                for name in sorted(arms, reverse=bool(repeat % 2)):
                    started = time.perf_counter()
                    count = arms[name](pairs)
                    if repeat:  # the first fills caches
                        speeds[name].append(len(pairs) / (time.perf_counter() - started))
                        wrong[name] += count
            ratios = [o / b for o, b in zip(speeds["ours"], speeds["bare"], strict=True)]
            bare, ours = (statistics.median(speeds[name]) for name in arms)
            rows.append(
                f"| {processes} | {mix} | {samples} | {bare:.0f} | {ours:.0f} "
                f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) "
                f"| {wrong['bare']} | {wrong['ours']} |"
            )
            print(rows[-1], file=sys.stderr, flush=True)
    maths._pool.close()
    return rows


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument(
        "--samples", type=int, default=8, help="Completions per prompt in the last mix."
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    rows = [row for processes in (1, 2) for row in compare(processes, args, draw)]
    cpus = len(os.sched_getaffinity(0))
    RESULTS.write_text(
        f"# Speed of math_reward\n\n"
        f"Pairs of a gold answer and a completion per second; medians of {args.repeats} repeats, in turns, of "
        f"{args.pairs} pairs each. Bare: math-verify's `parse` and `verify` without a deadline. math_reward "
        f"has its deadline of {maths.DEADLINE_S:.0f} s per pair, and reads a prompt's solution once per process.\n\n"
        "| Processes | Mix | Completions per prompt | Bare, pairs/s | math_reward, pairs/s | Ratio (range) "
        "| Wrong verdicts: bare | math_reward |\n|---|---|---|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n\n"
        "Wrong verdicts are counted over all repeats. With one completion per prompt, nearly all pairs are distinct. Equal completions of a prompt are "
        'compared once, and bare has no such cache. The mix "all" is that of `_SHARES` in `benchmarks/maths_speed.py`.\n\n'
        f"Machine: {cpus} shared {platform.machine().replace('_', '-')} cores, load {os.getloadavg()[1]:.0f}; Python {platform.python_version()}, "
        f"math-verify {version('math-verify')}, sympy {version('sympy')}; seed {args.seed}; 2026-11-26. "
        f"Command: `python benchmarks/maths_speed.py --pairs {args.pairs} --repeats {args.repeats}`.\n"
    )


if __name__ == "__main__":
    main()
