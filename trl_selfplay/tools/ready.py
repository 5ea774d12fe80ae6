"""Tools that are ready to use: a calculator, and Python in the sandbox that grades programs.

In: an expression, or a program that the policy wrote. Out: a number, or what the program printed. Neither is
evaluated in a process that has anything to lose.
"""

import ast
import functools
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

_SIGNIFICANT = 15
_LONGEST = 10**60  # an integer that is shown in full
_MOST_PRINTED = 50_000  # characters of a program that the policy reads
_DEADLINE_S = 5.0
_ENDINGS = {
    "raised": "",  # what it raised is printed
    "late": f"(it was ended after {_DEADLINE_S:g} s)",
    "killed": "(it was killed)",
    "too much output": "(it printed too much, and was ended)",
    "too much memory": "(it used too much memory, and was ended)",
    "too many processes": "(it started too many processes, and was ended)",
}
# Runs a program as an interpreter does: what its last line comes to is printed, and what it raises, in a line.
_RUN = """
import sys, traceback
sys.stdout.reconfigure(line_buffering=True)  # a program that is ended has shown what it printed
names = {{"__name__": "__main__"}}
try:
    exec(compile({body!r}, "program", "exec"), names)
    value = eval(compile({last!r}, "program", "eval"), names)
    if value is not None:
        print(repr(value))
except BaseException as error:
    print(traceback.format_exception_only(error)[-1].strip())
"""


def calculator(expression: str) -> str:
    """Compute an arithmetic expression exactly.

    Args:
        expression: Numbers with + - * / ^, percent signs and parentheses, for example (3 + 4) * 2.5.

    Returns:
        The value, rounded to 15 digits if it has more.
    """
    from trl_selfplay.rewards.arithmetic import evaluate, normal_line, read_tokens

    tokens = read_tokens(normal_line(expression))
    others = [token.text for token in tokens if token.kind in ("word", "other", "dots")]
    if others:
        raise ValueError(f"not arithmetic: {others[0]!r}")
    try:
        return _decimal(evaluate(tokens))
    except ZeroDivisionError:
        raise ZeroDivisionError("division by zero") from None


def python(code: str) -> str:
    """Run a Python program and return what it prints.

    Each program begins anew, without files, network or packages that aren't part of Python.

    Args:
        code: The program. The value of a last line that is an expression is printed too.

    Returns:
        What it printed, and how it ended if it was ended.
    """
    ran = _sandbox().run(_as_interpreter(code), deadline_s=_DEADLINE_S)
    ending = "" if ran.ending == "ok" else _ENDINGS[ran.ending]
    printed = ran.stdout.rstrip()
    if len(printed) > _MOST_PRINTED:  # so that the ending is seen
        printed = f"{printed[:_MOST_PRINTED]}… (cut: {len(printed):,} characters)"
    return "\n".join(filter(None, [printed, ending])) or "(it printed nothing)"


def _check_python() -> None:
    """Raise RuntimeError if this machine can't isolate a program."""
    from trl_selfplay.rewards.sandbox import Sandbox

    Sandbox(workers=1).close()


python.check_machine = _check_python  # type: ignore[attr-defined]
python.keeps_processes = True  # type: ignore[attr-defined]  # the sandbox's worker


@functools.cache
def _sandbox() -> Any:  # its module can be imported on Linux alone
    from trl_selfplay.rewards.sandbox import Sandbox

    return Sandbox(workers=1)


def _as_interpreter(code: str) -> str:
    body, last = code, "None"
    try:
        tree = ast.parse(code)
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            end = tree.body.pop()
            body, last = ast.unparse(tree), ast.unparse(end)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        pass  # it is told by the program's own interpreter
    return _RUN.format(body=body, last=last)


def _decimal(value: Fraction) -> str:
    context = Context(prec=_SIGNIFICANT)
    found = context.divide(Decimal(value.numerator), Decimal(value.denominator))
    if value.denominator == 1 and abs(value.numerator) < _LONGEST:
        return str(value.numerator)
    return f"{found.normalize(context):f}" if abs(found.adjusted()) < _SIGNIFICANT else f"{found:g}"
