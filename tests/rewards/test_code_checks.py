"""Which checks of tests hold, how they are counted, and what ends the tests."""

import pytest

from trl_selfplay.rewards.code_checks import (
    NotAValue,
    ProgramOver,
    Unsendable,
    read_outcome,
    run_calls,
    together,
)
from trl_selfplay.rewards.code_tests import CallTests, read_tests


def run(tests, program: str, candidate=None, **options):
    """Run tests on a program in this process: proxies are tested here, and not what they reach."""
    names: dict = {}
    exec(program, names)
    return run_calls(tests, lambda name, args, kw: names[name](*args, **kw), candidate, **options)


def held(tests, program: str, **options) -> list[bool]:
    return run(read_tests(tests), program, **options)[0]


def test_statements_between_checks_run_in_order() -> None:
    tests = "import math\nxs = [1]\npush(xs, 2)\nassert xs == [1, 2]\npush(xs, 3)\nassert math.fsum(xs) == 6"
    assert held(tests, "def push(xs, x): xs.append(x)") == [True, True]
    assert held(tests, "def push(xs, x): 1 / 0") == [False, False]


def test_a_check_that_fails_or_raises_does_not_end_the_others() -> None:
    tests = ["assert f(1) == 1", "assert f(0) == 1", "assert f(2)[0] == 1", "assert f(3) == 1 / 3"]
    assert held(tests, "def f(x): return 1 / x") == [True, False, False, True]
    assert held(tests, "def f(x): return 1 / x", stop_early=True) == [True, False, False, False]


def test_a_test_may_expect_an_exception() -> None:
    tests = (
        "try:\n    f(-1)\nexcept ValueError as error:\n    assert 'small' in str(error)\n"
        "else:\n    assert False\n"
    )
    assert held(tests, "def f(x): raise ValueError('too small')") == [True]
    assert held(tests, "def f(x): raise TypeError('too small')") == [False]
    assert held(tests, "def f(x): return x") == [False]


@pytest.mark.parametrize("trouble", [ProgramOver, NotAValue])
def test_no_test_can_pass_by_catching_that_the_program_has_ended(trouble) -> None:
    tests = read_tests(
        "try:\n    f(1)\nexcept:\n    pass\nassert 1 + 1 == 2\ntry:\n    f(1)\nexcept BaseException:\n    assert str()==''"
    )

    def call(name, args, kwargs):
        raise trouble

    assert run_calls(tests, call) == ([True, False], 2)


def test_a_function_of_the_tests_that_asserts_counts_where_it_is_called() -> None:
    text = (
        "def same(a, b):\n    assert a == b\ndef check(c):\n    same(c(1), 1)\n    same(c(2), 3)\n"
    )
    assert run(read_tests(text), "def f(x): return x", "f")[0] == [True, False]


def test_program_and_tests_together_print_what_holds(capsys) -> None:
    tests = read_tests("s = Stack()\ns.push(2)\nassert s.pop() == 2\nassert s.pop() is None")
    assert isinstance(tests, CallTests)
    stack = "class Stack(list):\n    push = list.append\n    def pop(self): return list.pop(self)\n"
    for program, expected in (
        (stack, [True, False]),
        ("class Stack: ...", [False, False]),
        ("class Stack", [False, False]),
        ("import sys\nsys.exit(0)", [False, False]),
    ):
        exec(together(tests, program, None, "secret"), {})
        assert read_outcome(tests, capsys.readouterr().out, "secret") == expected
    assert read_outcome(tests, "OK\n[0, 1]\n", "secret") == [False, False]
    assert read_outcome(tests, "", "secret") == [False, False]


def test_an_argument_that_cannot_be_sent_ends_the_tests() -> None:
    def call(name, args, kwargs):
        raise Unsendable

    with pytest.raises(Unsendable):
        run_calls(read_tests("try:\n    f(open)\nexcept:\n    pass\nassert f(1)"), call)


FAILS_LATE = [
    "if f(2) != 4:\n    raise AssertionError('bad')",
    "try:\n    f(2)\n    assert False\nexcept ValueError:\n    pass",
    "def a(x):\n    assert f(x) == 4\ndef b():\n    a(2)\nb()",
    "class T:\n    def t(self):\n        assert f(2) == 4\nT().t()",
    "class T:\n    def __init__(self):\n        assert f(2) == 4\nT()",
    "import numpy as np\nnp.testing.assert_equal(f(2), 4)",
    "from numpy.testing import assert_equal as same\nsame(f(2), 4)",
    "import unittest\nunittest.TestCase().assertEqual(f(2), 4)",
    "import pytest\nwith pytest.raises(ValueError):\n    f(2)",
    "if __name__ == '__main__':\n    assert f(2) == 4",
    "def a():\n    assert f(2) == 4\n[g() for g in (a,)]",
    "{4: 'four'}[f(2)]",
    "1 / (f(2) - 1)",
    "import sys\nsys.exit(f(2) != 4)",
    "raise BaseException",
]


@pytest.mark.parametrize("late", FAILS_LATE)
def test_tests_that_an_exception_ends_anywhere_do_not_hold(late, capsys) -> None:
    """VF-6: alike at the top level, within `check`, in a list, and beside the program."""
    wrong = "def f(x): return 1"
    in_check = f"assert c(1) == 1\n{late}".replace("f(", "c(").replace("\n", "\n    ")
    forms = {
        "text": (f"assert f(1) == 1\n{late}", None),
        "list": (["assert f(1) == 1", late], None),
        "check": (f"def check(c):\n    {in_check}", "f"),
    }
    for form, (text, candidate) in forms.items():
        tests = read_tests(text)
        assert not all(run(tests, wrong, candidate)[0]), form
        assert not all(run(tests, wrong, candidate, stop_early=True)[0]), form
        exec(together(tests, wrong, candidate, "secret"), {})
        assert not all(read_outcome(tests, capsys.readouterr().out, "secret")), form


@pytest.mark.parametrize("late", FAILS_LATE[:-3])
def test_the_same_tests_hold_for_the_right_function(late) -> None:
    right = "def f(x):\n    if {}: raise ValueError\n    return x * x"
    raises = "ValueError" in late
    assert all(held(f"assert f(1) == 1\n{late}", right.format("x == 2" if raises else "False")))


def test_an_exception_after_the_last_check_costs_that_one() -> None:
    tests = ["assert f(1) == 1", "assert f(3) == 1", "x = f(2) + ''"]
    assert held(tests, "def f(x): return 1") == [True, False]
    assert held(tests, "def f(x): return '' if x == 2 else 1") == [True, True]


def test_a_check_has_to_hold_each_time() -> None:
    text = "def check(c):\n    assert c(1) < 4\nif __name__ == '__main__':\n    check(f)"
    count = "n = 4\ndef f(x):\n    global n\n    n -= {}\n    return n"
    tests = read_tests(text)
    assert tests.entry_point == "f"
    assert run(tests, count.format(1), "f") == ([True], 2)
    assert run(tests, count.format(-1), "f") == ([False], 2)
    assert run(tests, "k = iter([4, 1])\ndef f(x): return next(k)", "f") == ([False], 2)


@pytest.mark.parametrize("trouble", [ProgramOver, NotAValue])
def test_between_checks_no_test_can_catch_it_either(trouble) -> None:
    tests = read_tests("try:\n    y = f(1)\nexcept BaseException:\n    y = 4\nassert y == 4")

    def call(name, args, kwargs):
        raise trouble

    assert run_calls(tests, call) == ([False], 1)
