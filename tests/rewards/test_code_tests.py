"""Forms of tests, and what can't run beside a program."""

import json

import pytest

from trl_selfplay.rewards.code_checks import run_calls
from trl_selfplay.rewards.code_tests import InputTests, last_function, read_tests, same_output


def run(tests, program: str, candidate=None, **options):
    """Run tests on a program in this process: proxies are tested here, and not what they reach."""
    names: dict = {}
    exec(program, names)
    return run_calls(tests, lambda name, args, kw: names[name](*args, **kw), candidate, **options)


def held(tests, program: str, **options) -> list[bool]:
    return run(read_tests(tests), program, **options)[0]


def test_assert_lists_texts_and_json_are_the_same_tests() -> None:
    tests = ["assert double(2) == 4", "assert double([1]) == [1, 1]"]
    forms = [
        read_tests(form) for form in (tests, tuple(tests), "\n".join(tests), json.dumps(tests))
    ]
    assert all(form == forms[0] for form in forms)
    assert forms[0].names == ("double",)
    assert run(forms[0], "def double(x): return x + x") == ([True, True], 2)
    assert run(forms[0], "def double(x): return x * 2 if x == 2 else None") == ([True, False], 2)


def test_check_gets_the_function_that_is_named() -> None:
    text = "METADATA = {}\ndef check(candidate):\n    for i in range(3):\n        assert candidate(i) == 2 * i\n    assert True, 'end'\n    assert candidate('a') == 'aa'\n"
    tests = read_tests(text, "double")
    assert (tests.num_checks, tests.entry_point, tests.takes_candidate) == (2, "double", True)
    assert run(tests, "def double(x): return x + x", "double") == ([True, True], 4)
    assert read_tests(f"{text}\ncheck(double)").entry_point == "double"
    assert read_tests(text, starter="def triple(x): ...").entry_point == "triple"
    assert read_tests(text).entry_point is None


def test_helpers_of_the_starter_belong_to_the_tests() -> None:
    """A program can't pass by redefining the function that its result is compared with."""
    starter = "import math\ndef encode(s):\n    return s[::-1]\ndef decode(s):\n    pass\n"
    text = "def check(candidate):\n    for s in ('ab', 'cde'):\n        assert candidate(encode(s)) == s\n"
    tests = read_tests(text, "decode", starter)
    assert tests.names == ()
    cheat = "def encode(s): return s\ndef decode(s): return s"
    assert run(tests, cheat, "decode")[0] == [False]
    assert run(tests, "def decode(s): return s[::-1]", "decode")[0] == [True]


def test_a_program_cannot_replace_builtins_in_the_tests() -> None:
    assert read_tests("assert len(f(3)) == 3").names == ("f",)
    assert read_tests("assert sorted(set(f(3))) == [1]").names == ("f",)
    assert read_tests("def check(c):\n    for i in range(3):\n        assert c(i)").names == ()
    assert read_tests("assert sum(10, 15) == 25").names == ("sum",)
    assert read_tests("assert sorted(sum(10, 15)) == 25", "sum").names == ("sum",)
    assert held("assert sum(10, 15) == 25", "def sum(a, b): return a + b") == [True]
    with pytest.raises(ValueError, match="sorted, sum; name the tested one in the column"):
        read_tests("assert sorted(sum(10, 15)) == 25")


def test_a_module_that_the_tests_forgot_to_import_is_imported() -> None:
    tests = read_tests("assert math.isclose(area(1), math.pi)")
    assert tests.names == ("area",)
    assert run(tests, "def area(r): return 3.14159265358979 * r * r")[0] == [True]


@pytest.mark.parametrize(
    ("tests", "why"),
    [
        (["assert Stack().size() == 0"], "'Stack' returns an object with 'size'"),
        ("s = Stack()\ns.append(1)\nassert s.pop() == 1", "'Stack' returns an object"),
        ("assert f(lambda x: x, 1) == 1", "'f' gets a lambda"),
        ("assert f(len, [1]) == 1", "'f' gets the function 'len'"),
        ("assert f([max, min]) == 1", "'f' gets the function 'max'"),
        ("assert f(key=str) == 1", "'f' gets the function 'str'"),
        ("assert f(g) == 1", "'f' gets the function 'g'|g(…)|a value"),
        ("def g(x):\n    return x\nassert f(g) == 1", "'f' gets the function 'g'"),
        ("assert add(1)(2) == 3", "call what the program returns"),
        ("g = add(1)\nassert g(2) == 3", "call what the program returns"),
        ("with opened(1) as x:\n    assert x == 1", "enter a context"),
        ("g = f(1)\nassert g.send(None) == 1", "'f' returns an object with 'send'"),
        ("assert chain([Pair(5, 24), Pair(1, 2)], 2) == 1", r"'chain' gets an object, Pair\(…\),"),
        (
            "root = Node(8)\nroot.left = Node(3)\nassert height(root) == 2",
            "'Node' returns an object",
        ),
        ("assert f.cache == 1", "look into 'f'"),
        ("assert LIMIT == 1\nassert f(1) == 1", "'LIMIT' as a value"),
        ("assert isinstance(f(1), Tree)", "'Tree' as a value"),
        ("async def g():\n    assert await f() == 1\n\nassert g()", "asynchronous"),
    ],
)
def test_what_cannot_run_beside_the_program_is_found_before_it_runs(tests, why) -> None:
    import re

    assert re.search(why, read_tests(tests).obstacle)


@pytest.mark.parametrize(
    "tests",
    [
        "assert f('a').upper() == 'A'",
        "assert list(map(f, [1, 2])) == [1, 2]",
        "assert sorted([2, 1], key=f) == [1, 2]",
        "assert f(sorted([2, 1], key=lambda x: x)) == [1, 2]",
        "assert f(list(map(int, '12'))) == 1",
        "assert f(range(3)) == 1",
        "assert Check_Solution(1, 2) == 'Yes'",
        "y = f([1])\ny.sort()\nassert y == [1]",
        "assert type(f(1)) is int",
        "assert [g(1) for g in (f, f)] == [1, 1]",
        "max = 3\nassert f(max) == 3",
        "assert f(x for x in [1]) == f(iter([1])) == f(map(int, '1')) == 1",
        "g = f(3)\nassert next(g) == 3\nassert g.__next__() == 2\nassert list(g) == [1]",
    ],
)
def test_ordinary_tests_have_no_obstacle(tests) -> None:
    assert read_tests(tests).obstacle is None


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (None, "None, of type NoneType"),
        (3, "3, of type int"),
        (b"assert f(1)", "of type bytes"),
        ("", "no tests"),
        ("  \n# nothing\n", "no tests"),
        ([], "no tests"),
        ("[]", "no tests"),
        ("assert f(1) ==", "doesn't compile"),
        (["assert f(1) == 1", "assert f("], "test 1 doesn't compile"),
        ("x = f(1)", "no assert"),
        (["f(1) == 1"], "no assert"),
        ("assert True", "no assert"),
        ("assert 1 + 1 == 2", "call no function of the program"),
        ("def check(candidate):\n    assert 1 + 1 == 2", "call no function of the program"),
        ("def check(candidate):\n    candidate(1)", "no assert statement in `check`"),
        ("def check():\n    assert f(1)", "one argument"),
        ("assert f(1)\ndef test_f():\n    assert f(2)", "never call 'test_f', which asserts"),
        (
            "import unittest\nassert f(1)\nclass T(unittest.TestCase):\n    def test_f(self):\n"
            "        self.assertEqual(f(2), 2)",
            "never call 'test_f', which asserts",
        ),
        ("assert f(1)\nassert (f(2) == 4, 'bad')", "always holds; leave out"),
        ("import unittest\nassert f(1)\nunittest.main()", "call unittest.main, which doesn't"),
        ("import nowhere_to_be_found\nassert f(1)", "'nowhere_to_be_found', which isn't installed"),
        ("[1, 2", "neither Python nor JSON"),
        ([1, 2], "starts with 1"),
        ([{"in": "1", "out": "2"}], "starts with"),
        ({"a": 1}, "keys"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": [], "outputs": []}, "0 inputs"),
        ({"inputs": "1", "outputs": "2"}, "have to be lists"),
        ({"inputs": [[1]], "outputs": [[2]], "fn_name": "f"}, "fn_name"),
        ([{"input": "1", "output": 2}], "as text"),
        ([{"input": "1", "output": " \n"}], "no output"),
        ("assert " + "-" * 100_000 + "1", "doesn't compile"),
    ],
)
def test_unusable_tests_are_an_error_that_says_why(tests, message) -> None:
    with pytest.raises(ValueError, match=message):
        read_tests(tests)


def test_forms_of_input_and_output() -> None:
    expected = InputTests((("1 2\n", "3"), ("4 5\n", "9")))
    for form in (
        [{"input": "1 2\n", "output": "3"}, {"input": "4 5\n", "output": "9"}],
        {"inputs": ["1 2\n", "4 5\n"], "outputs": ["3", "9"]},
        {"input": ["1 2\n", "4 5\n"], "output": ["3", "9"]},
        {"inputs": [["1 2", ""], ["4 5", ""]], "outputs": [["3"], ["9"]]},
    ):
        assert read_tests(form) == read_tests(json.dumps(form)) == expected


def test_outputs_are_compared_by_words() -> None:
    assert same_output("1 2 \n3\n\n", "1 2\n3")
    assert not same_output("1 23", "1 2 3")
    assert not same_output("", "0")


def test_the_last_function_of_a_text() -> None:
    assert last_function("def f(): ...\nx = 1\ndef g():\n    def h(): ...\ny = 2") == "g"
    assert last_function("x = 1") is None
    assert last_function("def f(:") is None
    assert last_function("-" * 100_000) is None
