"""Carry plain values between a program that isn't trusted and the process that checks it.

In: a value built of literals and standard containers. Out: bytes, and from bytes the value again.
Only types listed here cross, so decoding runs no code of the other side, as unpickling would.
Subclasses cross as the type they extend: a named tuple as a tuple, an `IntEnum` as an int.
Iterators, generators and views of dicts cross as iterators of what they give. Both
directions take time linear in the bytes and have limits on size and depth. Only the standard
library is imported, because the program's interpreter has nothing else.

A value is a tag and its payload; lengths are base-128 numbers, the lowest seven bits first.
Mutable containers are numbered as they appear, and later occurrences refer to that number.
"""

import itertools
import struct
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

MOST_BYTES = 4 * 2**20
MOST_DEPTH = 100
_MOST_FRACTION_BITS = 2**15
# Some iterators never end.
_MOST_ITERATED = 100_000

_CONSTANTS = {b"N": None, b"T": True, b"F": False, b"E": Ellipsis, b"I": NotImplemented}
_TAG_OF_CONSTANT = {id(value): tag for tag, value in _CONSTANTS.items()}
_REFERENCE = b"@"
_ITERATOR = b"g"
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
# In the order in which subclasses are looked for: a Counter is a dict as well.
_TAGS: tuple[tuple[type, bytes], ...] = (
    (int, b"i"),
    (float, b"d"),
    (str, b"s"),
    (list, b"l"),
    (tuple, b"t"),
    (Counter, b"c"),
    (OrderedDict, b"o"),
    (dict, b"m"),
    (set, b"u"),
    (frozenset, b"z"),
    (bytes, b"b"),
    (bytearray, b"y"),
    (complex, b"j"),
    (deque, b"q"),
    (range, b"r"),
    (Fraction, b"f"),
    (Decimal, b"e"),
)
_TAG_OF = dict(_TAGS)
_TYPE_OF = {tag: kind for kind, tag in _TAGS}
_MUTABLE = frozenset((b"l", b"c", b"o", b"m", b"u", b"y", b"q"))


class LiteralError(ValueError):
    """A value can't be encoded, or bytes aren't an encoded value."""


def encode(value: Any, shared: list[Any] | None = None) -> bytes:
    """Return a value as bytes.

    Args:
        value: None, booleans, numbers (also `complex`, `Fraction`, `Decimal`), text, bytes, lists,
            tuples, sets, dicts, deques, ranges and their subclasses, in any combination, with
            containers that occur more than once or contain themselves; iterators, which it exhausts.
        shared: The mutable containers that both sides know; they are written as references. Those
            met for the first time are appended, in the order in which `decode` appends them.

    Raises:
        LiteralError: The value holds something else, more than `MOST_BYTES`, or nests deeper than
            `MOST_DEPTH`.

    >>> decode(encode([1, (2.5, "three"), {4: {5}}]))
    [1, (2.5, 'three'), {4: {5}}]
    """
    return _Encoder([] if shared is None else shared).encode(value)


def decode(data: bytes, shared: list[Any] | None = None) -> Any:
    """Return the value that `encode` wrote.

    Args:
        data: The bytes, from any source.
        shared: As for `encode`; containers that the bytes create are appended.

    Raises:
        LiteralError: The bytes aren't exactly one encoded value within the limits.
    """
    if len(data) > MOST_BYTES:
        raise LiteralError(f"more than {MOST_BYTES} bytes")
    decoder = _Decoder(data, [] if shared is None else shared)
    value = decoder.read(0)
    if decoder.position != len(data):
        raise LiteralError("bytes after the value")
    return value


def contents(container: Any) -> Any:
    """Return what `refill` needs to give a mutable container its present contents."""
    if issubclass(type(container), bytearray):
        return bytes(container)
    return tuple(_elements(container))


def refill(container: Any, elements: Any) -> None:
    """Replace what a mutable container holds, in place, by the `contents` of its counterpart.

    Raises:
        LiteralError: The elements aren't such contents.
    """
    kind = type(container)
    try:
        if issubclass(kind, bytearray):
            container[:] = _expect(bytes, elements)
        elif issubclass(kind, (list, deque)):
            container.clear()
            container.extend(_expect(tuple, elements))
        elif issubclass(kind, set):
            container.clear()
            container.update(_expect(tuple, elements))
        else:
            pairs = [_expect(tuple, pair) for pair in _expect(tuple, elements)]
            container.clear()
            for key, value in pairs:
                container[key] = value
    except (TypeError, ValueError) as error:
        raise LiteralError(f"not the contents of a {kind.__name__}: {error}") from error


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} in place of a {kind.__name__}")
    return value


def _elements(container: Any) -> Iterable[Any]:
    """Return a container's elements, or a dict's pairs, whatever its class overrides."""
    kind = type(container)
    if issubclass(kind, OrderedDict):
        return OrderedDict.items(container)
    if issubclass(kind, dict):
        return dict.items(container)
    base = next(b for b in (list, tuple, set, frozenset, deque) if issubclass(kind, b))
    return base.__iter__(container)


def _iterated(iterator: Iterable[Any]) -> tuple[Any, ...]:
    elements = tuple(itertools.islice(iterator, _MOST_ITERATED + 1))
    if len(elements) > _MOST_ITERATED:
        raise LiteralError(f"an iterator of more than {_MOST_ITERATED} elements")
    return elements


class _Encoder:
    def __init__(self, shared: list[Any]) -> None:
        self._out = bytearray()
        self._shared = shared
        self._number_of = {id(container): number for number, container in enumerate(shared)}

    def encode(self, value: Any) -> bytes:
        self._write(value, 0)
        if len(self._out) > MOST_BYTES:
            raise LiteralError(f"more than {MOST_BYTES} bytes")
        return bytes(self._out)

    def _write(self, value: Any, depth: int) -> None:
        out = self._out
        if len(out) > MOST_BYTES:
            raise LiteralError(f"more than {MOST_BYTES} bytes")
        if constant := _TAG_OF_CONSTANT.get(id(value)):
            out += constant
            return
        if depth > MOST_DEPTH:
            raise LiteralError(f"nested deeper than {MOST_DEPTH}")
        kind = type(value)
        tag = _TAG_OF.get(kind) or next((t for k, t in _TAGS if issubclass(kind, k)), None)
        if tag is None:
            if not (hasattr(kind, "__next__") or kind in _VIEWS):
                raise LiteralError(f"a value of type {kind.__name__}")
            tag = _ITERATOR
        if tag in _MUTABLE:
            number = self._number_of.setdefault(id(value), len(self._shared))
            if number < len(self._shared):
                out += _REFERENCE
                self._write_length(number)
                return
            self._shared.append(value)
        out += tag
        match tag:
            case b"i":
                self._write_integer(int(value))
            case b"d":
                out += struct.pack(">d", value)
            case b"j":
                out += struct.pack(">dd", value.real, value.imag)
            case b"s":
                self._write_bytes(str.encode(value, "utf-8", "surrogatepass"))
            case b"b" | b"y":
                self._write_bytes(bytes(value))
            case b"e":
                self._write_bytes(Decimal.__str__(value).encode())
            case b"f":
                # Reducing a fraction isn't linear in its digits.
                if max(map(int.bit_length, value.as_integer_ratio())) > _MOST_FRACTION_BITS:
                    raise LiteralError("a fraction with too many digits")
                self._write_integer(value.numerator)
                self._write_integer(value.denominator)
            case b"r":
                for part in (value.start, value.stop, value.step):
                    self._write_integer(part)
            case b"m" | b"c" | b"o":
                pairs = tuple(_elements(value))
                self._write_length(len(pairs))
                for key, item in pairs:
                    self._write(key, depth + 1)
                    self._write(item, depth + 1)
            case _:
                if tag == b"q":
                    self._write(value.maxlen, depth + 1)
                elements = _iterated(value) if tag == _ITERATOR else tuple(_elements(value))
                self._write_length(len(elements))
                for element in elements:
                    self._write(element, depth + 1)

    def _write_length(self, length: int) -> None:
        while length > 127:
            self._out.append(length & 127 | 128)
            length >>= 7
        self._out.append(length)

    def _write_integer(self, value: int) -> None:
        self._write_bytes(value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))

    def _write_bytes(self, data: bytes) -> None:
        if len(self._out) + len(data) > MOST_BYTES:
            raise LiteralError(f"more than {MOST_BYTES} bytes")
        self._write_length(len(data))
        self._out += data


class _Decoder:
    def __init__(self, data: bytes, shared: list[Any]) -> None:
        self.position = 0
        self._data = data
        self._shared = shared

    def read(self, depth: int) -> Any:
        tag = self._take(1)
        if tag in _CONSTANTS:
            return _CONSTANTS[tag]
        if depth > MOST_DEPTH:
            raise LiteralError(f"nested deeper than {MOST_DEPTH}")
        if tag == _REFERENCE:
            number = self._length()
            if number >= len(self._shared):
                raise LiteralError("a reference to a container that doesn't exist")
            return self._shared[number]
        match tag:
            case b"i":
                return self._integer()
            case b"d":
                return struct.unpack(">d", self._take(8))[0]
            case b"j":
                return complex(*struct.unpack(">dd", self._take(16)))
            case b"b":
                return self._take(self._length())
            case b"y":
                return self._share(bytearray(self._take(self._length())))
            case b"s" | b"e" | b"f" | b"r":
                return self._parsed(tag)
            case b"l" | b"q":
                maxlen = self.read(depth + 1) if tag == b"q" else None
                row = self._share(self._deque(maxlen) if tag == b"q" else [])
                row.extend(self._read_many(depth + 1))
                return row
            case b"t":
                return tuple(self._read_many(depth + 1))
            case b"g":
                return iter(self._read_many(depth + 1))
            case b"u" | b"z":
                return self._set(tag, depth + 1)
            case b"m" | b"c" | b"o":
                return self._dict(self._share(_TYPE_OF[tag]()), depth + 1)
        raise LiteralError(f"an unknown tag {tag!r}")

    def _share(self, container: Any) -> Any:
        self._shared.append(container)
        return container

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise LiteralError("the bytes end within a value")
        part = self._data[self.position : end]
        self.position = end
        return part

    def _length(self) -> int:
        length = shift = 0
        while True:
            (byte,) = self._take(1)
            length |= (byte & 127) << shift
            if byte < 128:
                return length
            shift += 7
            if shift > 28:
                raise LiteralError("a length that is too long")

    def _integer(self) -> int:
        return int.from_bytes(self._take(self._length()), "big", signed=True)

    def _parsed(self, tag: bytes) -> Any:
        try:
            match tag:
                case b"f":
                    ratio = self._integer(), self._integer()
                    if max(map(int.bit_length, ratio)) > _MOST_FRACTION_BITS:
                        raise LiteralError("a fraction with too many digits")
                    return Fraction(*ratio)
                case b"r":
                    return range(self._integer(), self._integer(), self._integer())
                case b"e":
                    return Decimal(self._take(self._length()).decode("ascii"))
                case _:
                    return self._take(self._length()).decode("utf-8", "surrogatepass")
        except LiteralError:
            raise
        except (ArithmeticError, ValueError) as error:
            raise LiteralError(f"a malformed {_TYPE_OF[tag].__name__}: {error}") from error

    def _deque(self, maxlen: Any) -> deque[Any]:
        if maxlen is not None and (type(maxlen) is not int or not 0 <= maxlen <= MOST_BYTES):
            raise LiteralError(f"a deque of at most {maxlen!r:.20} elements")
        return deque(maxlen=maxlen)

    def _read_many(self, depth: int) -> list[Any]:
        # A count beyond the bytes ends with them.
        return [self.read(depth) for _ in range(self._length())]

    def _set(self, tag: bytes, depth: int) -> Any:
        into = self._share(set()) if tag == b"u" else set()
        elements = self._read_many(depth)
        try:
            into.update(elements)
        except TypeError as error:
            raise LiteralError(f"an element of a set: {error}") from error
        if len(into) != len(elements):
            raise LiteralError("an element occurs twice in a set")
        return into if tag == b"u" else frozenset(into)

    def _dict(self, into: Any, depth: int) -> Any:
        count = self._length()
        for _ in range(count):
            key = self.read(depth)
            try:
                into[key] = None
            except TypeError as error:
                raise LiteralError(f"a key of a dict: {error}") from error
            into[key] = self.read(depth)
        if len(into) != count:
            raise LiteralError("a key occurs twice in a dict")
        return into
