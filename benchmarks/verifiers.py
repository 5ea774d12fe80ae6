"""Precision and recall of the verifiers and of other libraries, on labelled answers.

In: the rows of tests/rewards/corpus, each a completion, a solution and the right verdict. Out: only
counts, and with `--save` a JSON file in results/verifiers/. Other libraries grade the same pairs where they
are installed (math-verify, TRL, lm-eval; the last needs `pip install lm-eval`).

    PYTHONPATH=. python benchmarks/verifiers.py --corpus frozen --others

An abstention (None) on a right answer counts against recall; on a wrong one it is no error.
"""

import argparse
import json
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from trl_selfplay.rewards import choice_reward, exact_reward, math_reward
from trl_selfplay.rewards.answer import final_answer

CORPUS = Path(__file__).parent.parent / "tests" / "rewards" / "corpus"
RESULTS = Path(__file__).parent / "results" / "verifiers"
Rows = Sequence[dict[str, Any]]
Verdicts = Sequence[float | None]
_MINERVA_RESULTS: dict[str, list[dict[str, int]]] = {}


def ours(reward: Callable[..., Any]) -> Callable[[Rows], Verdicts]:
    """Return a function that grades rows with one of our rewards, in one call."""

    def grade(rows: Rows) -> Verdicts:
        columns = [row["choices"] for row in rows]
        return reward(  # type: ignore[no-any-return]
            completions=[row["completion"] for row in rows],
            solution=[row["solution"] for row in rows],
            choices=columns,
        )

    return grade


def math_verify_alone(rows: Rows) -> Verdicts:
    """Grade with math-verify's own `parse` of both sides, and `verify`, with its defaults."""
    from math_verify import parse, verify

    # A gold answer in LaTeX is only found within delimiters.
    return [
        float(verify(parse(in_mathematics(row["solution"])), parse(row["completion"])))
        for row in rows
    ]


def trl_accuracy(rows: Rows) -> Verdicts:
    """Grade with TRL's `accuracy_reward`."""
    from trl.rewards import accuracy_reward

    chats = [[{"role": "assistant", "content": row["completion"]}] for row in rows]
    return accuracy_reward(chats, [in_mathematics(row["solution"]) for row in rows])  # type: ignore[no-any-return]


def in_mathematics(solution: str) -> str:
    """Put dollar signs around the final answer of a solution, which both libraries need."""
    answer = final_answer(solution).strip()
    return answer if answer.startswith(("$", "\\[", "\\(")) else f"${answer}$"


def gsm8k(filter_index: int) -> Callable[[Rows], Verdicts]:
    """Return lm-eval's gsm8k task: 0 is the filter strict-match, 1 flexible-extract."""

    def grade(rows: Rows) -> Verdicts:
        from lm_eval.filters.extraction import RegexFilter

        pattern = (r"#### (\-?[0-9\.\,]+)", r"(-?[$0-9.,]{2,})|(-?[0-9]+)")[filter_index]
        found = RegexFilter(pattern, group_select=(0, -1)[filter_index]).apply(
            [[row["completion"]] for row in rows], [{}] * len(rows)
        )
        # exact_match of the task: ignore_case, and these are removed from both sides
        ignored = (",", r"\$", r"(?s).*#### ", r"\.$")

        def bare(text: str) -> str:
            for regex in ignored:
                text = re.sub(regex, "", text)
            return text.lower()

        return [
            float(bare(answers[0]) == bare(row["solution"]))
            for answers, row in zip(found, rows, strict=True)
        ]

    return grade


def minerva_math(metric: str) -> Callable[[Rows], Verdicts]:
    """Return lm-eval's minerva_math task, with its metric `exact_match` or `math_verify`."""

    def grade(rows: Rows) -> Verdicts:
        return [float(result[metric]) for result in minerva_results(rows)]

    return grade


def minerva_results(rows: Rows) -> Sequence[dict[str, int]]:
    """Return both metrics of lm-eval's minerva_math, which takes minutes, once per set of rows."""
    import lm_eval

    key = "".join(row["id"] for row in rows)
    if key in _MINERVA_RESULTS:
        return _MINERVA_RESULTS[key]
    path = Path(lm_eval.__file__).parent / "tasks" / "minerva_math" / "utils.py"
    spec = spec_from_file_location("minerva_math_utils", path)
    assert spec is not None
    assert spec.loader is not None
    task = module_from_spec(spec)
    spec.loader.exec_module(task)
    results = []
    for row in rows:
        gold = final_answer(row["solution"]).strip().strip("$")
        doc = {"answer": task.normalize_final_answer(gold), "solution": f"$\\boxed{{{gold}}}$"}
        results.append(task.process_results(doc, [row["completion"]]))
    return _MINERVA_RESULTS.setdefault(key, results)


def multiple_choice(pattern: str, group: int) -> Callable[[Rows], Verdicts]:
    """Return lm-eval's MultiChoiceRegexFilter with a task's pattern; it grades rows with letters."""

    def grade(rows: Rows) -> Verdicts:
        from lm_eval.filters.extraction import MultiChoiceRegexFilter

        letters = string.ascii_uppercase
        found = MultiChoiceRegexFilter(
            regex_pattern=pattern, group_select=group, ignore_case=True, ignore_punctuation=True
        ).apply(
            [[row["completion"]] for row in rows],
            [{"choices": row["choices"] or list(letters[:5])} for row in rows],
        )
        return [
            float(answers[0].strip("() .").upper() == letter_of(row))
            for answers, row in zip(found, rows, strict=True)
        ]

    return grade


def mmlu_pro(rows: Rows) -> Verdicts:
    """Grade with the filter of lm-eval's mmlu_pro task."""
    from lm_eval.filters.extraction import RegexFilter

    found = RegexFilter(r"answer is \(?([ABCDEFGHIJ])\)?", group_select=0).apply(
        [[row["completion"]] for row in rows], [{}] * len(rows)
    )
    return [
        float(answers[0].upper() == letter_of(row))
        for answers, row in zip(found, rows, strict=True)
    ]


def letter_of(row: dict[str, Any]) -> str:
    """Return the letter of a row's solution, which may be the option's text."""
    solution = row["solution"].strip()
    for letter, option in zip(string.ascii_uppercase, row["choices"] or (), strict=False):
        if solution.casefold() == option.strip().casefold():
            return letter
    found = re.fullmatch(r"\(?([A-Za-z])\)?(?:[.:]|[.:)] .*)?", solution)
    return found[1].upper() if found else solution


OURS = {
    "exact_reward": (ours(exact_reward), ("number", "text")),
    "math_reward": (ours(math_reward), ("number", "maths")),
    "choice_reward": (ours(choice_reward), ("choice",)),
}
OTHERS = {
    "math-verify parse and verify": (math_verify_alone, ("number", "maths")),
    "TRL accuracy_reward": (trl_accuracy, ("number", "maths")),
    "lm-eval gsm8k strict-match": (gsm8k(0), ("number",)),
    "lm-eval gsm8k flexible-extract": (gsm8k(1), ("number",)),
    "lm-eval minerva_math exact_match": (minerva_math("exact_match"), ("number", "maths")),
    "lm-eval minerva_math math_verify": (minerva_math("math_verify"), ("number", "maths")),
    "lm-eval mmlu_pro": (mmlu_pro, ("choice",)),
    "lm-eval multi_choice_regex": (multiple_choice(r"(\([A-Z]\))", -1), ("choice",)),
}


def interval(count: int, total: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    if total == 0:
        return 0.0, 1.0
    z = 1.959964
    share, spread = count / total, z * z / total
    centre = share + spread / 2
    half = z * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def count(verdicts: Iterable[float | None], rows: Rows) -> Counter[str]:
    """Return the number of right and wrong answers, and of a verifier's errors."""
    counts: Counter[str] = Counter()
    for verdict, row in zip(verdicts, rows, strict=True):
        counts["right" if row["verdict"] else "wrong"] += 1
        counts["abstentions"] += verdict is None
        counts["false 1.0"] += verdict == 1.0 and not row["verdict"]
        counts["found"] += verdict == 1.0 and bool(row["verdict"])
    return counts


def line(name: str, kind: str, counts: Counter[str]) -> str:
    """Return a row of the table."""
    passed = counts["found"] + counts["false 1.0"]

    def share(part: int, total: int) -> str:
        low, high = interval(part, total)
        return f"{part / max(total, 1):.1%} [{low:.1%}, {high:.1%}]"

    return (
        f"| {name} | {kind} | {counts['right']} | {counts['wrong']} | {counts['false 1.0']} "
        f"| {counts['right'] - counts['found']} | {share(counts['found'], passed)} "
        f"| {share(counts['found'], counts['right'])} "
        f"| {share(counts['false 1.0'], counts['wrong'])} |"
    )


HEADER = (
    "| verifier | kind | right | wrong | false 1.0 | false 0.0 | precision | recall | wrong passed |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def by_letter(rows: Rows) -> list[str]:
    """Return a table of choice_reward's counts by the letter that is right."""
    chosen = [row for row in rows if row["kind"] == "choice"]
    verdicts = ours(choice_reward)(chosen)
    lines = [HEADER.replace("kind", "letter")]
    for letter in sorted({letter_of(row) for row in chosen} & set(string.ascii_uppercase)):
        pairs = [(v, r) for v, r in zip(verdicts, chosen, strict=True) if letter_of(r) == letter]
        counts = count([v for v, _ in pairs], [r for _, r in pairs])
        lines.append(line("choice_reward", letter, counts))
    return lines


def versions() -> str:
    """Return the versions of the libraries compared."""
    found = []
    for package in ("math-verify", "trl", "lm_eval", "sympy"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def load_rows(name: str) -> Rows:
    """Return the rows of a corpus; `forms` are those of tests/rewards/answer_forms.py.

    A name that ends in .jsonl is a path.
    """
    if name == "forms":
        sys.path.insert(0, str(CORPUS.parent))
        from answer_forms import all_rows

        return all_rows()
    path = Path(name) if name.endswith(".jsonl") else CORPUS / f"{name}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(text) for text in lines]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", nargs="+", default=["frozen", "forms"])
    parser.add_argument("--others", action="store_true", help="also grade with other libraries")
    parser.add_argument("--save", help="a name in results/verifiers/ for the verdicts")
    parser.add_argument("--letters", action="store_true", help="also count by right letter")
    args = parser.parse_args()
    print(versions())
    arms = {**OURS, **(OTHERS if args.others else {})}
    saved: dict[str, Any] = {"versions": versions()}
    for name in args.corpus:
        rows = load_rows(name)
        print(f"\n{name}: {len(rows)} rows\n\n{HEADER}")
        for arm, (grade, kinds) in arms.items():
            if arm.startswith("lm-eval") and find_spec("lm_eval") is None:
                continue
            for kind in kinds:
                chosen = [row for row in rows if row["kind"] == kind]
                verdicts = grade(chosen)
                print(line(arm, kind, count(verdicts, chosen)), flush=True)
                pairs = zip(chosen, verdicts, strict=True)
                saved[f"{name}/{arm}/{kind}"] = {row["id"]: verdict for row, verdict in pairs}
        if args.letters:
            print("\n" + "\n".join(by_letter(rows)))
    if args.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.save}.json").write_text(json.dumps(saved) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
