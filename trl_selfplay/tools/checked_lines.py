"""Lines of JSON with a checksum each, so that one that was damaged isn't taken for another event.

In: an event. Out: a line, and from a line its event.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from trl_selfplay.disk import checksum

_LINE = re.compile(r'(.*), "crc": "([0-9a-f]{8})"\}')


def to_line(event: Mapping[str, Any]) -> bytes:
    """Return an event as a line without its end."""
    text = json.dumps(event)
    return f'{text[:-1]}, "crc": "{checksum([text.encode()])}"}}'.encode()


def from_line(line: bytes) -> dict[str, Any]:
    """Return the event that `to_line` made a line of.

    Raises:
        ValueError: The line is another one.
    """
    match = _LINE.fullmatch(line.decode())
    if match is None or checksum([f"{match[1]}}}".encode()]) != match[2]:
        raise ValueError("it is damaged")
    event: dict[str, Any] = json.loads(line)
    del event["crc"]
    return event
