"""Lines of JSON with a checksum each, so that one that was damaged isn't taken for another event.

In: an event. Out: a line, and from a line its event.
"""

import json
import re
import zlib
from collections.abc import Mapping
from typing import Any

_LINE = re.compile(r'(.*), "crc": "([0-9a-f]{8})"\}')


def to_line(event: Mapping[str, Any]) -> bytes:
    """Return an event as a line without its end."""
    text = json.dumps(event)
    return f'{text[:-1]}, "crc": "{_checksum(text)}"}}'.encode()


def from_line(line: bytes) -> dict[str, Any]:
    """Return the event that `to_line` made a line of.

    Raises:
        ValueError: The line is another one.
    """
    match = _LINE.fullmatch(line.decode())
    if match is None or _checksum(f"{match[1]}}}") != match[2]:
        raise ValueError("it is damaged")
    event: dict[str, Any] = json.loads(line)
    del event["crc"]
    return event


def _checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"
