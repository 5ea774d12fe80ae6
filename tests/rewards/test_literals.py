"""The codec that carries values between a program and its checker."""

import contextlib
import enum
import itertools
import math
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_selfplay.rewards import literals
from trl_selfplay.rewards.literals import LiteralError, contents, decode, encode, refill

hashables = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters())
    | st.binary()
    | st.fractions()
    | st.decimals(allow_nan=False),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=4),
    max_leaves=6,
)
values = st.recursive(
    hashables,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.sets(hashables, max_size=4)
        | st.dictionaries(hashables, inner, max_size=4)
        | st.builds(deque, st.lists(inner, max_size=4), st.none() | st.integers(0, 5))
        | st.builds(OrderedDict, st.dictionaries(hashables, inner, max_size=4))
        | st.builds(Counter, st.lists(hashables, max_size=4))
        | st.builds(bytearray, st.binary())
    ),
    max_leaves=12,
)


def shape(value):
    """Return a value with the types of all its parts, which `==` doesn't look at."""
    if isinstance(value, dict):
        return type(value), [(shape(k), shape(v)) for k, v in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return type(value), getattr(value, "maxlen", None), list(map(shape, value))
    if isinstance(value, (set, frozenset)):
        return type(value), sorted(repr(shape(each)) for each in value)
    return type(value), repr(value)


@settings(max_examples=60, deadline=None)
@given(values)
def test_a_value_comes_back_with_all_its_types(value) -> None:
    there_and_back = decode(encode(value))
    assert there_and_back == value
    assert shape(there_and_back) == shape(value)


@settings(max_examples=60, deadline=None)
@given(values, st.data())
def test_damaged_bytes_are_an_error_or_a_value_and_nothing_else(value, data) -> None:
    encoded = bytearray(encode(value))
    position = data.draw(st.integers(0, len(encoded) - 1))
    encoded[position] = data.draw(st.integers(0, 255))
    for damaged in (bytes(encoded), bytes(encoded[:position])):
        with contextlib.suppress(LiteralError):
            decode(damaged)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_an_error_or_a_value(data) -> None:
    with contextlib.suppress(LiteralError):
        decode(data)


def test_numbers_at_the_edges() -> None:
    assert math.isnan(decode(encode(float("nan"))))
    assert decode(encode([math.inf, -math.inf])) == [math.inf, -math.inf]
    assert math.copysign(1, decode(encode(-0.0))) == -1
    for number in (0, -1, 127, 128, -128, -129, 255, 256, 10**1000, -(10**1000)):
        assert decode(encode(number)) == number
    assert decode(encode(range(10, 0, -3))) == range(10, 0, -3)
    assert decode(encode("\ud800x\udfff\ud83d\ude00")) == "\ud800x\udfff\ud83d\ude00"


def test_subclasses_cross_as_the_type_that_they_extend() -> None:
    class Liar(list):
        def __eq__(self, other):
            return True

        def __iter__(self):
            return iter([1, 2, 3])

        __hash__ = None

    point = namedtuple("point", "x y")
    color = enum.IntEnum("color", ["RED"])
    for value, plain in (
        (Liar([7]), [7]),
        (point(1, 2), (1, 2)),
        (color.RED, 1),
        (defaultdict(int, {1: 2}), {1: 2}),
    ):
        assert shape(decode(encode(value))) == shape(plain)


def test_other_types_do_not_cross() -> None:
    class Equal:
        def __eq__(self, other):
            return True

        __hash__ = object.__hash__

    class Disguised:
        __class__ = int

    for value in (Equal(), Disguised(), object(), len, int, lambda: 1, math, slice(1)):
        with pytest.raises(LiteralError, match="type"):
            encode([value])


def test_iterators_cross_as_iterators_of_what_they_give() -> None:
    def squares():
        yield from (1, 4)

    table = {"a": 1}
    for value, elements in (
        (squares(), [1, 4]),
        (map(str, [1]), ["1"]),
        (zip("ab", [1, 2], strict=True), [("a", 1), ("b", 2)]),
        (reversed([1, 2]), [2, 1]),
        (table.keys(), ["a"]),
        (table.items(), [("a", 1)]),
    ):
        copy = decode(encode(value))
        assert copy != elements
        assert next(copy) == elements[0]
        assert list(copy) == elements[1:]
    with pytest.raises(LiteralError, match="an iterator of more than"):
        encode(itertools.count())


def test_shared_containers_stay_shared_and_cycles_are_kept() -> None:
    row = [0]
    grid = decode(encode([row] * 3))
    grid[0].append(1)
    assert grid == [[0, 1]] * 3
    ring: list = [1]
    ring.append((ring, {2: ring}))
    copy = decode(encode(ring))
    assert copy[0] == 1
    assert copy[1][0] is copy
    assert copy[1][1][2] is copy


def test_what_the_other_side_does_to_arguments_comes_back_into_the_callers_objects() -> None:
    inner, untouched = [3], {"k": {1}}
    arguments = ([inner, [1]], untouched, bytearray(b"a"), deque([1, 2], maxlen=2))
    here: list = []
    request = encode(arguments, here)

    there: list = []
    rows, mapping, text, queue = decode(request, there)
    number = len(there)
    rows.sort()
    rows.append(mapping)
    rows[1].append(4)
    mapping["k"].add(2)
    text += b"b"
    queue.append(3)
    result = [rows, rows[0]]
    reply = encode((result, [contents(each) for each in there[:number]]), there)

    answer, filled = decode(reply, here)
    for container, elements in zip(here[:number], filled, strict=True):
        refill(container, elements)
    assert arguments[0] == [[1], [3, 4], {"k": {1, 2}}]
    assert arguments[0][1] is inner
    assert arguments[0][2] is untouched
    assert inner == [3, 4]
    assert arguments[2:] == (bytearray(b"ab"), deque([2, 3], maxlen=2))
    assert answer[0] is arguments[0]


@pytest.mark.parametrize(
    ("container", "wrong"),
    [([], [1]), ({}, (1, 2)), ({}, ((1, 2, 3),)), (set(), ([],)), (bytearray(), (1,)), ({}, None)],
)
def test_contents_of_another_kind_are_refused(container, wrong) -> None:
    with pytest.raises(LiteralError, match="contents"):
        refill(container, wrong)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"?",
        b"NN",
        b"i",
        b"i\x05a",
        b"l\xff\xff\xff\xff\x0f",
        b"l\xff\xff\xff\xff\xff\xff\x01",
        b"@\x00",
        b"s\x01\xff",
        b"u\x02TT",
        b"u\x01l\x00",
        b"m\x01l\x00N",
        b"m\x02TNTN",
        b"f\x01\x01\x01\x00",
        b"r\x01\x00\x01\x01\x01\x00",
        b"e\x03abc",
        b"qi\x01\xff\x00",
        b"qT\x00",
    ],
)
def test_malformed_bytes_are_refused(data) -> None:
    with pytest.raises(LiteralError):
        decode(data)


def test_size_and_depth_are_limited_on_both_sides() -> None:
    deep: list = []
    for _ in range(literals.MOST_DEPTH + 1):
        deep = [deep]
    many = [None] * (literals.MOST_BYTES + 1)
    wide = "x" * (literals.MOST_BYTES + 1)
    for value in (deep, many, wide, 1 << 8 * literals.MOST_BYTES + 8, Fraction(1, 1 << 40_000)):
        with pytest.raises(LiteralError):
            encode(value)
    with pytest.raises(LiteralError, match="nested"):
        decode(b"l\x01" * 10_000 + b"N")
    with pytest.raises(LiteralError, match="more than"):
        decode(b"l\x01" * literals.MOST_BYTES)
    with pytest.raises(LiteralError, match="fraction"):
        decode(b"f" + encode(1 << 40_000)[1:] + b"\x01\x01")


def test_shared_tuples_cannot_grow_without_bound() -> None:
    pair: tuple = ()
    for _ in range(60):
        pair = (pair, pair)
    with pytest.raises(LiteralError, match="more than"):
        encode(pair)


def test_the_module_imports_nothing_but_the_standard_library() -> None:
    path = Path(literals.__file__)
    code = f"import runpy; runpy.run_path({str(path)!r})"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True, cwd="/")


def test_decimals_keep_their_digits() -> None:
    assert shape(decode(encode(Decimal("1.50")))) == shape(Decimal("1.50"))
    assert decode(encode(Decimal("Infinity"))) == Decimal("Infinity")
