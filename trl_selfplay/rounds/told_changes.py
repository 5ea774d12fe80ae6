"""Tell in few words what changed between a run on disk and the same run now.

In: settings by name, as a run records them, on disk and now. Out: text for errors and warnings; of tools, one
text per tool that came, went or changed.
"""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

# Settings with a value per tool: what prompts show of it, and a digest of its source.
TOOLS, TOOLS_SOURCE = "tools", "tools_source"
# Characters of a value that a message shows.
_SHOWN = 80


def diff(was: Any, is_: Any) -> str:
    """Return two values in few words: of long ones what they don't begin with alike."""
    texts = [repr(was), repr(is_)]
    if max(map(len, texts)) > _SHOWN:
        alike = sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
        )
        start = max(alike - _SHOWN // 4, 0)
        texts = [("…" if start else "") + text[start:] for text in texts]
    return " → ".join(t if len(t) <= _SHOWN else f"{t[:_SHOWN]}…" for t in texts)


def tools_that_differ(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return which tools came, went or show something else to the model, by name below `tools`."""
    fields: dict[str, list[str]] = {}
    for name in sorted({*before, *now}):
        if name.startswith(f"{TOOLS}."):
            fields.setdefault(".".join(name.split(".")[:2]), []).append(name)
    found = {}
    for tool, names in fields.items():
        changes = [
            f"{name[len(tool) + 1 :]}: {diff(before.get(name), now.get(name))}"
            for name in names
            if before.get(name) != now.get(name)
        ]
        if not any(name in now for name in names):
            found[tool] = "gone"
        elif not any(name in before for name in names):
            found[tool] = "new"
        elif changes:
            found[tool] = "; ".join(changes)
    return found


def told(name: str) -> str:
    """Return a setting's name for a message: of a tool the words that its user knows."""
    for top, words in ((TOOLS, "the tool"), (TOOLS_SOURCE, "the source of the tool")):
        if name.startswith(f"{top}."):
            return f"{words} {name.removeprefix(f'{top}.')}"
    return name
