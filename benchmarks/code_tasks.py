"""Programming tasks in the forms of MBPP and of contests, for the benchmark of code_reward.

In: nothing. Out: reference programs and their tests. A task marked as together uses classes, hands
over functions or talks to a generator, so that its tests can't run apart from the program.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CodeTask:
    """A reference program and its tests."""

    program: str
    tests: Any
    together: bool = False


TASKS = (
    CodeTask(
        "def largest_gap(xs):\n    xs = sorted(xs)\n    return max((b - a for a, b in zip(xs, xs[1:])), default=0)",
        ["assert largest_gap([3, 9, 1]) == 6", "assert largest_gap([]) == 0", "assert largest_gap([4, 4]) == 0"],
    ),
    CodeTask(
        "def count_vowels(text):\n    return sum(c in 'aeiou' for c in text.lower())",
        ["assert count_vowels('Banana') == 3", "assert count_vowels('') == 0", "assert count_vowels('IO') == 2"],
    ),
    CodeTask(
        "def rotate(xs, k):\n    if not xs:\n        return xs\n    k = k % len(xs)\n    return xs[-k:] + xs[:-k]",
        ["assert rotate([1, 2, 3, 4], 1) == [4, 1, 2, 3]", "assert rotate([1, 2, 3], 5) == [2, 3, 1]", "assert rotate([], 2) == []", "assert rotate([1, 2], 0) == [1, 2]"],
    ),
    CodeTask(
        "def digit_sum(n):\n    total = 0\n    while n > 0:\n        total += n % 10\n        n = n // 10\n    return total",
        ["assert digit_sum(1234) == 10", "assert digit_sum(0) == 0", "assert digit_sum(999) == 27"],
    ),
    CodeTask(
        "def common(a, b):\n    return sorted(set(a) & set(b))",
        ["assert common([1, 2, 3], (3, 2)) == [2, 3]", "assert common([], [1]) == []", "assert common('ab', 'bc') == ['b']"],
    ),
    CodeTask(
        "import math\n\ndef distance(p, q):\n    return math.sqrt(sum((a - b) ** 2 for a, b in zip(p, q)))",
        ["import math", "assert math.isclose(distance((0, 0), (3, 4)), 5)", "assert math.isclose(distance((1,), (4,)), 3)"],
    ),
    CodeTask(
        "def run_lengths(text):\n    runs = []\n    for c in text:\n        if runs and runs[-1][0] == c:\n            runs[-1] = (c, runs[-1][1] + 1)\n        else:\n            runs.append((c, 1))\n    return runs",
        ["assert run_lengths('aab') == [('a', 2), ('b', 1)]", "assert run_lengths('') == []", "assert run_lengths('aba') == [('a', 1), ('b', 1), ('a', 1)]"],
    ),
    CodeTask(
        "def remove_all(xs, x):\n    while x in xs:\n        xs.remove(x)",
        ["xs = [1, 2, 1]\nremove_all(xs, 1)\nassert xs == [2]", "xs = [3]\nassert remove_all(xs, 4) is None\nassert xs == [3]"],
    ),
    CodeTask(
        "def parse_age(text):\n    age = int(text)\n    if age < 0:\n        raise ValueError('negative')\n    return age",
        ["assert parse_age('42') == 42", "try:\n    parse_age('-1')\n    raised = False\nexcept ValueError:\n    raised = True\nassert raised", "assert parse_age('0') == 0"],
    ),
    CodeTask(
        "def transpose(rows):\n    return [list(column) for column in zip(*rows)]",
        ["assert transpose([[1, 2], [3, 4]]) == [[1, 3], [2, 4]]", "assert transpose([]) == []", "assert transpose([[1, 2, 3]]) == [[1], [2], [3]]"],
    ),
    CodeTask(
        "def is_leap(year):\n    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)",
        ["assert is_leap(2024)", "assert not is_leap(1900)", "assert is_leap(2000) is True", "assert is_leap(2023) is False"],
    ),
    CodeTask(
        "def word_counts(text):\n    counts = {}\n    for word in text.split():\n        counts[word] = counts.get(word, 0) + 1\n    return counts",
        ["assert word_counts('a b a') == {'a': 2, 'b': 1}", "assert word_counts('') == {}", "assert word_counts('x x x')['x'] == 3"],
    ),
    CodeTask(
        "def power(base, exponent):\n    result = 1\n    for _ in range(exponent):\n        result *= base\n    return result",
        "for n in range(6):\n    assert power(2, n) == 2 ** n\nassert power(10, 40) == 10 ** 40\nassert power(0.5, 2) == 0.25\n",
    ),
    CodeTask(
        "def balanced(text):\n    depth = 0\n    for c in text:\n        if c == '(':\n            depth += 1\n        elif c == ')':\n            depth -= 1\n        if depth < 0:\n            return False\n    return depth == 0",
        ["assert balanced('(())')", "assert not balanced('())(')", "assert not balanced('(')", "assert balanced('')"],
    ),
    CodeTask(
        "def merge(a, b):\n    out, i, j = [], 0, 0\n    while i < len(a) and j < len(b):\n        if a[i] <= b[j]:\n            out.append(a[i])\n            i += 1\n        else:\n            out.append(b[j])\n            j += 1\n    return out + a[i:] + b[j:]",
        ["assert merge([1, 4], [2, 3]) == [1, 2, 3, 4]", "assert merge([], [1]) == [1]", "assert merge([5], []) == [5]", "assert merge([1, 1], [1]) == [1, 1, 1]"],
    ),
    CodeTask(
        "from fractions import Fraction\n\ndef harmonic(n):\n    return sum((Fraction(1, k) for k in range(1, n + 1)), Fraction(0))",
        ["from fractions import Fraction", "assert harmonic(3) == Fraction(11, 6)", "assert harmonic(0) == 0"],
    ),
    CodeTask(
        "def sum(a, b):\n    return a + b",
        ["assert sum(10, 15) == 25", "assert sum(-1, 1) == 0"],
    ),
    CodeTask(
        "def caesar(text, shift):\n    return ''.join(chr((ord(c) - 97 + shift) % 26 + 97) for c in text)",
        "def check(candidate):\n    assert candidate('abc', 1) == 'bcd'\n    assert candidate('xyz', 3) == 'abc'\n    for shift in range(30):\n        assert candidate(candidate('hello', shift), -shift) == 'hello'\n",
    ),
    CodeTask(
        "def collatz(n):\n    steps = 0\n    while n != 1:\n        n = n // 2 if n % 2 == 0 else 3 * n + 1\n        steps += 1\n    return steps",
        ["assert collatz(1) == 0", "assert collatz(6) == 8", "assert collatz(27) == 111"],
    ),
    CodeTask(
        "def stats(*, values, digits=2):\n    return {'mean': round(sum(values) / len(values), digits), 'n': len(values)}",
        ["assert stats(values=[1, 2]) == {'mean': 1.5, 'n': 2}", "assert stats(values=(1, 1, 2), digits=3) == {'mean': 1.333, 'n': 3}"],
    ),
    CodeTask(
        "class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n        self.items.append(x)\n    def size(self):\n        return len(self.items)",
        ["s = Stack()\ns.push(4)\ns.push(5)\nassert s.size() == 2", "assert Stack().size() == 0"],
        together=True,
    ),
    CodeTask(
        "def apply_twice(f, x):\n    return f(f(x))",
        ["assert apply_twice(lambda x: x + 3, 1) == 7", "assert apply_twice(str.upper, 'a') == 'A'"],
        together=True,
    ),
    CodeTask(
        "def countdown(n):\n    while n > 0:\n        yield n\n        n -= 1",
        ["g = countdown(3)\nassert g.send(None) == 3\nassert list(g) == [2, 1]", "assert list(countdown(0)) == []"],
        together=True,
    ),
    CodeTask(
        "a, b = map(int, input().split())\nprint(a + b)",
        [{"input": "1 2\n", "output": "3\n"}, {"input": "10 -4\n", "output": "6"}],
    ),
    CodeTask(
        "n = int(input())\nfor i in range(1, n + 1):\n    print(i * i, end=' ')\nprint()",
        {"inputs": ["3\n", "1\n", "5\n"], "outputs": ["1 4 9\n", "1\n", "1 4 9 16 25\n"]},
    ),
    CodeTask(
        "import sys\n\nnumbers = [int(word) for line in sys.stdin for word in line.split()]\nprint(max(numbers) - min(numbers))",
        [{"input": "3 1\n9\n", "output": "8"}, {"input": "5", "output": "0"}],
    ),
    CodeTask(
        "n, k = map(int, input().split())\nxs = sorted(map(int, input().split()))\nprint(xs[k - 1])",
        [{"input": "4 2\n9 3 5 1\n", "output": "3"}, {"input": "1 1\n7\n", "output": "7"}, {"input": "3 3\n1 2 3\n", "output": "3"}],
    ),
    CodeTask(
        "s = input().strip()\nprint('YES' if s == s[::-1] else 'NO')",
        [{"input": "level\n", "output": "YES"}, {"input": "ab\n", "output": "NO"}],
    ),
)  # fmt: skip
