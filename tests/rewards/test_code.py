"""Programs graded by their tests: what counts as right, what a program may try, and data errors."""

import json
import random
import threading

import psutil
import pytest
from patience import ENDS_S, under_growing_deadlines

from trl_selfplay.rewards import CodeReward, code_fraction_reward, code_reward
from trl_selfplay.rewards.code import program_of
from trl_selfplay.rewards.isolation import Limits
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rewards.worker import close_workers

DOUBLE = ["assert double(2) == 4", "assert double('a') == 'aa'", "assert double([]) == []"]
CHECK = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate('a') == 'aa'\n"
PAIRS = [{"input": "2\n", "output": "4\n"}, {"input": "10\n", "output": "20"}]
RIGHT = "def double(x):\n    return x + x"
READS = "print(2 * int(input()))"


@pytest.fixture(scope="module", autouse=True)
def _end_the_workers():
    yield
    close_workers()


def score(program: str, tests=DOUBLE, **columns) -> float | None:
    return code_reward([program], tests=[tests], **{k: [v] for k, v in columns.items()})[0]


def test_all_tests_have_to_hold_or_their_share_counts() -> None:
    programs = [RIGHT, "def double(x):\n    return 2 * x if x else None", "def double(x): ..."]
    assert code_reward(programs, tests=[DOUBLE] * 3) == [1.0, 0.0, 0.0]
    assert code_fraction_reward(programs, tests=[DOUBLE] * 3) == [1.0, 2 / 3, 0.0]


def test_the_three_forms_of_tests() -> None:
    tests = [DOUBLE, CHECK, PAIRS, {"inputs": ["1"], "outputs": ["2"]}]
    right = [RIGHT, RIGHT, READS, READS]
    assert code_reward(right, tests=tests) == [1.0] * 4
    assert code_reward(right[2:] + right[:2], tests=tests) == [0.0] * 4


def test_an_output_counts_only_if_the_program_ends_well() -> None:
    assert score("print(4)", [PAIRS[0]]) == 1.0
    assert score("print(4)\nraise SystemExit(1)", [PAIRS[0]]) == 0.0
    assert score("print(4)\n1 / 0", [PAIRS[0]]) == 0.0
    assert score("import sys\nprint(4)\nprint('why', file=sys.stderr)", [PAIRS[0]]) == 1.0


def test_arguments_results_and_exceptions_cross_as_in_one_process() -> None:
    tests = (
        "xs = [3, 1]\nassert f(xs, key={'a': (1, {2})}) is None\nassert xs == [1, 3]\n"
        "try:\n    f(None)\nexcept TypeError:\n    assert xs == [1, 3]\nelse:\n    assert xs == 0\n"
    )
    sort = "def f(xs, key=None):\n    {}\n    xs.sort()"
    assert score(sort.format("if xs is None: raise TypeError"), tests) == 1.0
    assert score(sort.format("if xs is None: raise KeyError"), tests) == 0.0
    assert score(sort.format("xs = xs[:]"), tests) == 0.0


def test_iterators_cross_both_ways() -> None:
    tests = (
        "g = take(x * x for x in range(3))\nassert next(g) == 0\nassert list(g) == [1, 4]\n"
        "assert take(map(str, [1])) != ['1']\n"
    )
    assert score("def take(xs):\n    yield from xs", tests) == 1.0
    assert score("def take(xs):\n    return xs", tests) == 1.0
    assert score("def take(xs):\n    return list(xs)", tests) == 0.0
    assert score("def take(xs):\n    while True: yield 0", tests) == 0.0


FENCED = "I double it.\n```python\n{}\n```\n"


@pytest.mark.parametrize(
    "answer",
    [
        RIGHT,
        FENCED.format(RIGHT),
        FENCED.format("def double(x): ...") + FENCED.format(RIGHT),
        FENCED.format(RIGHT) + "It prints\n```\n4\n```",
        FENCED.format(RIGHT) + "```text\n4\n```",
        FENCED.format(RIGHT) + "A use:\n" + FENCED.format("print(double(2))"),
        f"```\n{RIGHT}\n```",
        f"~~~py\n{RIGHT}\n~~~",
        f"````python\n{RIGHT}\n````",
        f"```python\n{RIGHT}",
        "- So:\n  ```python\n" + "\n".join("  " + line for line in RIGHT.split("\n")) + "\n  ```",
        f"<think>```python\ndef double(x): ...\n```</think>```python\n{RIGHT}\n```",
        [{"role": "assistant", "content": FENCED.format(RIGHT)}],
        f"{RIGHT}\r\n".replace("\n", "\r\n"),
    ],
)
def test_the_program_is_found_in_the_answer(answer) -> None:
    assert code_reward([answer], tests=[DOUBLE]) == [1.0]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "```python\n```",
        f"Here it is: {RIGHT}",
        f"<think>```python\n{RIGHT}\n```</think> Done.",
        FENCED.format(RIGHT) + FENCED.format("def double(x): ..."),
        FENCED.format(RIGHT) + "Better:\n```python\ndef double(x",
        FENCED.format(RIGHT) + FENCED.format("double = lambda x: 0"),
        [],
    ],
)
def test_no_program_scores_zero(answer) -> None:
    assert code_reward([answer], tests=[DOUBLE]) == [0.0]


HEAD = (
    'from math import pi\n\ndef area(r: float) -> float:\n    """Return the area of a circle."""\n'
)
AREA = ["assert round(area(1), 4) == 3.1416"]


@pytest.mark.parametrize(
    "answer",
    [
        "    return pi * r * r\n",
        "    s = r * r\n    return pi * s\n\n\nI squared it.",
        "    return pi * r * r\n\n\ndef volume(r):\n    return (",
        "def area(r):\n    return pi * r ** 2\n",
        "```python\ndef area(r):\n    return pi * r ** 2\n```",
        "```python\n    return pi * r ** 2\n```",
    ],
)
def test_an_answer_continues_a_prompt_that_is_code(answer) -> None:
    assert score(answer, AREA, prompts=HEAD) == 1.0
    assert score(answer, AREA, starter_code=HEAD, prompts="Write it.") == 1.0
    chat = [{"role": "user", "content": HEAD}]
    assert score(answer, AREA, prompts=chat) == 1.0
    assert score(answer, AREA, prompts="Return the area of a circle.") == 0.0


def test_a_continuation_keeps_brackets_that_close_at_the_left_margin() -> None:
    answer = "    return sum([\n1,\n2,\n])\n\nprint(f()\n"
    assert program_of(answer, "def f():\n", None) == "def f():\n    return sum([\n"
    closed = "    return sum([\n    1,\n]\n)\n\nprint(f()\n"
    assert program_of(closed, "def f():\n", None) == f"def f():\n{closed.split('print')[0]}"


CHEATS = [
    "import os\nos._exit(0)",
    "import sys\nsys.exit(0)",
    "raise SystemExit",
    "def double(x):\n    import os\n    os._exit(0)",
    "def double(x):\n    raise SystemExit(0)",
    "def double(x):\n    print('OK', True, 1.0)",
    "def double(x):\n    raise AssertionError",
    "class E:\n    def __eq__(self, other): return True\n    def __iter__(self): return iter([1])\ndef double(x):\n    return E()",
    "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef double(x):\n    return E(5)",
    "class E(str):\n    def __eq__(self, other): return True\n    __hash__ = str.__hash__\ndef double(x):\n    return E('b')",
    "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.len = lambda x: 4\ndef double(x):\n    return 1",
    "import sys\ndef double(x):\n    f = sys._getframe()\n    while f:\n        for v in list(f.f_locals.values()) + list(f.f_globals.values()):\n            if isinstance(v, str) and 'assert' in v: return 4\n        f = f.f_back",
    "import gc\ndef double(x):\n    for o in gc.get_objects():\n        if isinstance(o, (list, tuple)) and chr(97) * 2 in o: return x + x\n    return None",
    "def double(x):\n    try:\n        double(x)\n    finally:\n        return double(x)",
    "double = type('E', (), {'__call__': lambda s, x: s, '__eq__': lambda s, o: True})()",
    "import os\ndef double(x):\n    for fd in range(3, 256):\n        try: os.write(fd, b'\\x00\\x00\\x00\\x02i\\x01\\x04' * 9)\n        except OSError: pass",
    "def check(candidate): pass\ndef __holds__(*a): pass",
]


@pytest.mark.parametrize("tests", [DOUBLE, CHECK])
def test_a_program_cannot_set_its_own_verdict(tests) -> None:
    """VF-6: it neither sees the tests nor reports a success."""
    count = len(CHEATS)
    scores = under_growing_deadlines(
        lambda deadline_s: CodeReward(deadline_s=deadline_s)(
            CHEATS, tests=[tests] * count, entry_point=["double"] * count
        ),
        lambda scores: None not in scores,
    )
    assert [cheat for cheat, score in zip(CHEATS, scores, strict=True) if score != 0.0] == []


def test_a_program_that_does_not_end_scores_zero_by_the_deadline_in_any_thread() -> None:
    """VF-3, VF-4, VF-5."""
    loops = "def double(x):\n    while True: pass"
    loops_once = "def double(x):\n    while x == 'a': pass\n    return x + x"

    def grade(deadline_s):
        scores: list = []
        reward = CodeReward(deadline_s=deadline_s)
        thread = threading.Thread(
            target=lambda: scores.append(reward([RIGHT, loops, RIGHT], tests=[DOUBLE] * 3))
        )
        thread.start()
        thread.join()
        return scores

    scores = under_growing_deadlines(
        grade, lambda scores: scores[0][::2] == [1.0, 1.0] and None not in scores[0]
    )
    assert scores == [[1.0, 0.0, 1.0]]
    share = under_growing_deadlines(
        lambda deadline_s: CodeReward(share=True, deadline_s=deadline_s)(
            [loops_once], tests=[DOUBLE]
        ),
        lambda scores: scores != [0.0],
    )
    assert share == [1 / 3]


def test_tests_that_hang_are_no_failure_of_the_program() -> None:
    tests = "assert double(1) == 2\nwhile True:\n    pass\nassert double(2) == 4"
    scores = under_growing_deadlines(
        lambda deadline_s: CodeReward(deadline_s=deadline_s)([RIGHT, RIGHT], tests=[tests, DOUBLE]),
        lambda scores: scores == [None, 1.0],  # the hanging ones come to their loop as well
        first_s=0.5,
    )
    assert scores == [None, 1.0]
    assert scores.causes == {0: "no answer within the deadline"}


def test_no_process_is_left() -> None:
    """VF-7: neither of a worker that was ended with its sandbox, nor after the last call."""
    close_workers()
    here = psutil.Process()
    before = here.children(recursive=True)
    assert code_reward([RIGHT], tests=[DOUBLE]) == [1.0]
    first = [p for p in here.children(recursive=True) if p not in before]
    assert len(first) >= 3  # the worker, and its sandbox's
    hangs = under_growing_deadlines(
        lambda deadline_s: CodeReward(deadline_s=deadline_s)(
            [RIGHT], tests=["assert double(1)\nwhile True: pass"]
        ),
        lambda scores: scores == [None],  # it comes to its loop
        first_s=0.5,
    )
    assert hangs == [None]
    assert psutil.wait_procs(first, timeout=ENDS_S)[1] == []
    assert code_reward([RIGHT], tests=[DOUBLE]) == [1.0]
    second = [p for p in here.children(recursive=True) if p not in before]
    close_workers()
    assert psutil.wait_procs(second, timeout=ENDS_S)[1] == []


def test_what_is_wrong_with_the_tests_is_an_abstention_with_its_cause() -> None:
    tests = [
        "assert double(",
        None,
        7,
        [],
        "assert double(1).real_part() == 1",
        "for x in []:\n    assert double(x) == 2",
    ]
    scores = code_reward([RIGHT] * 6, tests=tests)
    assert scores == [None] * 6
    assert list(scores.causes.values()) == [
        *["the tests can't be used"] * 4,
        "the tests need trusted_tests=True",
        "the tests never call the program",
    ]


def test_rows_with_unusable_tests_are_listed_before_sampling() -> None:
    scorer = Scorer([code_reward])
    columns = {
        "tests": [DOUBLE, "assert double(", "assert Box(1).open() == 1", DOUBLE, DOUBLE, CHECK],
        "solution": [RIGHT, RIGHT, RIGHT, "def double(x): return 4", None, RIGHT],
        "level": [1] * 6,
    }
    (errors,) = scorer.find_data_errors(["p"] * 6, columns).values()
    assert errors[1].startswith("the test code doesn't compile: '(' was never closed")
    assert errors[2] == "'Box' returns an object with 'open'; the tests need trusted_tests=True"
    assert errors[3] == "its solution fails the tests, check 1 among them"
    assert sorted(errors) == [1, 2, 3]


def test_a_solution_is_a_program_or_nothing() -> None:
    solutions = [RIGHT, "", None, 4.0, [RIGHT], {"code": RIGHT}]
    errors = code_reward.find_data_errors(["p"] * 6, tests=[DOUBLE] * 6, solution=solutions)
    assert sorted(errors) == [3, 4, 5]
    assert errors[3] == "its solution is 4.0, of type float; give a program as text, or None"
    assert code_reward([RIGHT] * 6, tests=[DOUBLE] * 6, solution=solutions) == [1.0] * 6


def test_a_starter_that_passes_by_itself_is_listed() -> None:
    prompts = ["def f(x):\n    return x", "def f(x):", "def f(x):\n    return 2"]
    errors = code_reward.find_data_errors(prompts, tests=[["assert f(1) == 1"]] * 3)
    assert errors == {0: "the tests hold for an empty answer"}
    swallows = "try:\n    assert f(2) == 4\nexcept Exception:\n    pass"
    errors = code_reward.find_data_errors(["p"] * 2, tests=[swallows, "assert f(2) == 4"])
    assert errors == {0: "the tests hold for an empty answer"}


def test_tests_that_pass_only_sometimes_are_listed() -> None:
    tests = "import random\nassert f() < random.choice([1, 3])\n" * 12
    errors = code_reward.find_data_errors(["p"], tests=[tests], solution=["def f():\n    return 2"])
    assert errors[0] in (
        "its solution passes the tests only sometimes",
        *(f"its solution fails the tests, check {i} among them" for i in range(12)),
    )
    counter = "import time\nassert f() + time.monotonic_ns() // 7 % 2 == 2\n" * 40
    assert code_reward.find_data_errors(["p"], tests=[counter], solution=["def f(): return 1"])


def test_a_dataset_without_any_usable_tests_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"tests of no row. Row 0: the tests are 3, of type int"):
        code_reward.find_data_errors(["p", "q"], tests=[3, "assert"])
    with pytest.raises(ValueError, match=r"needs \['tests'\]"):
        Scorer([code_reward]).check_columns(["solution"], "train_dataset")


def test_trusted_tests_run_with_the_program() -> None:
    reward = CodeReward(trusted_tests=True, deadline_s=ENDS_S)
    tests = ["s = Stack()\ns.push(2)\nassert s.pop() == 2", "assert apply(lambda x: x + 1, 1) == 2"]
    stack = "class Stack(list):\n    push = list.append\n"
    apply = "def apply(f, x): return f(x)"
    programs = [f"{stack}{apply}", stack, apply, "import os\nos._exit(0)", "print('held')\nexit()"]
    assert reward(programs, tests=[tests] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]
    share = CodeReward(share=True, trusted_tests=True, deadline_s=ENDS_S)
    assert share(programs, tests=[tests] * 5) == [1.0, 0.5, 0.5, 0.0, 0.0]
    assert reward([RIGHT], tests=[DOUBLE]) == [1.0]  # what can run apart does


def test_scores_do_not_depend_on_batch_or_order() -> None:
    """VF-1, VF-2, VF-5."""
    operators = ["x + x", "x * 3", "-x", "x - 1", "x ** 2", "7"]
    programs = [f"def f(x):\n    return {body}" for body in operators]
    tests = [[f"assert f({x}) == {eval(body)}" for x in (3, 5)] for body in operators]
    assert code_reward(programs, tests=tests) == [1.0] * 6
    assert code_reward(programs, tests=tests[1:] + tests[:1]) == [0.0] * 6
    rows = [(p, t) for p in programs for t in tests]
    together = code_reward([p for p, _ in rows], tests=[t for _, t in rows])
    assert together == [float(i == j) for i in range(6) for j in range(6)]
    order = random.Random(0).sample(range(36), 36)
    shuffled = code_reward([rows[i][0] for i in order], tests=[rows[i][1] for i in order])
    assert shuffled == [together[i] for i in order]


def test_a_run_records_the_options_that_change_scores() -> None:
    def recorded(**options):
        (function,) = Scorer([CodeReward(**options)]).with_identity.values()
        return json.dumps(function.identity, sort_keys=True)

    assert recorded() == recorded(allow_weak_isolation=True)
    options = [{"deadline_s": 9.0}, {"trusted_tests": True}, {"limits": Limits(processes=2)}]
    assert len({recorded(), *(recorded(**each) for each in options)}) == 4


def test_options_are_checked() -> None:
    for deadline_s in (0, -1.0, float("nan"), float("inf"), 2e6):
        with pytest.raises(ValueError, match="deadline_s"):
            CodeReward(deadline_s=deadline_s)
    assert (code_reward.__name__, code_fraction_reward.__name__) == (
        "code_reward",
        "code_fraction_reward",
    )
