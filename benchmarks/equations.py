"""How often does equations_reward call right arithmetic false, and how often does it find an error?

Worked answers of reasoning-gym's gsm_symbolic, which nobody wrote for this: as they are, with the
signs of Unicode or LaTeX, and marked as in GSM8K. Right are those whose equations hold by Python's
arithmetic; of each, one result is changed in one digit, which makes it wrong. And lines with an
equals sign from the code and documentation of Python's standard library, where most are no
equations: how many are called false?

    OMP_NUM_THREADS=1 python benchmarks/equations.py

takes about two minutes and writes results/equations.md.
"""

import argparse
import datetime
import math
import platform
import random
import re
import sysconfig
from collections.abc import Callable, Iterator
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import reasoning_gym

from trl_selfplay.rewards.equations import equations_reward

RESULTS = Path(__file__).parent / "results" / "equations.md"
SEED = 11  # seed 3 was read while the rules were made
TEXTS = 2000
# An equation of these texts: numbers and signs, and one number as its result.
EQUATION = re.compile(r"(?<![\w.)/*+×÷-])(\(?\d[\d.()+*/x÷ -]*[+*/x÷-][\d.()+*/x÷ -]*\d\)?) ?= ?([$€£]?)(\d+(?:\.\d+)?)(?![\d/.%]*\d)")  # fmt: skip
SIGNS = {
    "as they are": {},
    "Unicode": {"*": "×", " x ": " × ", "/": "÷", "-": "−"},
    "LaTeX": {"*": r"\times ", " x ": r" \times ", "/": r"\div ", "÷": r"\div "},
}


def spell(text: str, signs: dict[str, str], frame: Callable[[str], str]) -> str:
    """Return a text with its equations in another spelling."""

    def replace(match: re.Match[str]) -> str:
        equation = match[0]
        for sign, other in signs.items():
            equation = equation.replace(sign, other)
        return frame(equation)

    return EQUATION.sub(replace, text)


def holds(left: str, right: str) -> bool | None:
    """Return whether an equation holds by Python's arithmetic; None if Python can't read it."""
    if re.search(r"÷\d+/\d|\d/\d+÷", left):
        return None  # 6÷1/2 is 12 to some
    code = left.replace("÷", "/").replace(" x ", " * ")
    try:
        exact = re.sub(r"\d+(?:\.\d+)?", lambda number: f"Fraction('{number[0]}')", code)
        value = eval(exact, {"Fraction": Fraction})
    except (SyntaxError, ZeroDivisionError, TypeError):
        return None
    decimals = len(right.partition(".")[2])
    margin = Fraction(1, 2 * 10**decimals) if decimals else 0
    return abs(value - Fraction(right)) <= margin or math.isclose(
        value, float(right), rel_tol=1e-14
    )


def worked_answers() -> Iterator[tuple[str, bool]]:
    """Yield texts, and whether all their equations hold."""
    for entry in reasoning_gym.create_dataset("gsm_symbolic", size=TEXTS, seed=SEED):
        text = entry["metadata"]["answer_cot"]
        verdicts = [holds(match[1], match[3]) for match in EQUATION.finditer(text)]
        if verdicts and None not in verdicts:
            yield text, all(verdicts)


def with_error(text: str, rng: random.Random) -> str:
    """Return a text with another digit in the result of one of its equations."""
    match = rng.choice(list(EQUATION.finditer(text)))
    result = match[3]
    place = rng.choice([i for i, digit in enumerate(result) if digit.isdigit()])
    digit = rng.choice([d for d in "123456789" if d != result[place]])
    start = match.start(3) + place
    return text[:start] + digit + text[start + 1 :]


def interval(count: int, total: int) -> str:
    """Return a share with its 95 % Wilson interval."""
    z, p = 1.96, count / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return f"{count} of {total} ({100 * p:.2f} %, 95 %: {100 * low:.2f} to {100 * high:.2f})"


def called_false(texts: list[str]) -> int:
    """Return how many texts score 0."""
    return sum(score == 0.0 for score in equations_reward(texts))


def code_lines() -> list[str]:
    """Return the lines with an equals sign of the standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    files += sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*/*.py"))
    lines = []
    for path in files:
        if "site-packages" not in path.parts:
            text = path.read_text(errors="replace")
            lines += [line for line in text.splitlines() if "=" in line and len(line) < 500]
    return lines


def main() -> None:
    """Measure, and write the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    rng = random.Random(SEED)
    answers = list(worked_answers())
    right = [text for text, all_hold in answers if all_hold]
    wrong = [with_error(text, rng) for text in right]
    already = [text for text, all_hold in answers if not all_hold]
    rows = []
    for name, signs in SIGNS.items():
        frame = (
            (lambda equation: f"${equation}$") if name == "LaTeX" else (lambda equation: equation)
        )
        spelled = [[spell(t, signs, frame) for t in texts] for texts in (right, wrong, already)]
        rows.append((name, *map(called_false, spelled)))
    marked = [
        [spell(t, {}, lambda e: f"<<{e}>>") for t in texts] for texts in (right, wrong, already)
    ]
    rows.append(("marked", *map(called_false, marked)))
    lines = code_lines()
    false_lines = [line for line in lines if equations_reward([line]) == [0.0]]
    text = "\n".join(
        [
            "# Equations in worked answers and in other text",
            "",
            f"Worked answers of reasoning-gym {version('reasoning-gym')}, task gsm_symbolic, seed {SEED} (those of "
            f"another seed, of the same templates, were read while the rules were made): {len(right)} whose equations hold by Python's arithmetic, each "
            f"also with one digit of one result changed, and {len(already)} that the task itself makes wrong "
            "(whole numbers of packets for fractions). Python "
            f"{platform.python_version()}, two shared x86-64 cores, {datetime.date.today()}. Script: "
            "`benchmarks/equations.py`.",
            "",
            "| spelling | right, called false | changed, called false | wrong in the task, called false |",
            "|---|---|---|---|",
            *(
                f"| {name} | {interval(a, len(right))} | {interval(b, len(wrong))} | {c} of {len(already)} |"
                for name, a, b, c in rows
            ),
            "",
            f"Of {len(lines)} lines with an equals sign in Python's standard library, {len(false_lines)} are "
            "called false:",
            "",
            *(f"- `{line.strip()}`" for line in false_lines),
            "",
        ]
    )  # fmt: skip
    RESULTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
