"""Write the tables of config fields into the pages of the trainers, from the fields' help.

    python docs/write_tables.py

A table stands between `<!-- fields: NAME -->` and `<!-- end of fields -->`. In: the dataclasses. Out: the
fields that NAME adds to TRL's config and to the pages' common tables, or for which it has another default.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

from trl import DPOConfig, SFTConfig

import trl_selfplay
from trl_selfplay.trainers.config import SelfPlayConfig
from trl_selfplay.trainers.engine_config import EngineConfig
from trl_selfplay.trainers.graded_config import GradedConfig

PAGES = sorted((Path(__file__).parent / "trainers").glob("*.md"))
_UNKNOWN = object()
_TABLE = re.compile(r"(<!-- fields: (\w+) -->\n).*?(<!-- end of fields -->)", re.S)
# What the configs inherit from, and has a table or a page of its own.
_BASES = {
    part.__name__: part
    for part in (SFTConfig, DPOConfig, EngineConfig, SelfPlayConfig, GradedConfig)
}


def field_table(name: str) -> str:
    """Return the table of a config, or of a part of one, in Markdown."""
    config = _BASES.get(name) or getattr(trl_selfplay, name)
    bases = [each for each in _BASES.values() if each is not config and issubclass(config, each)]
    of_bases = [{f.name: f.default for f in dataclasses.fields(base)} for base in bases]
    rows = ["| Field | Default | Meaning |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        if not any(field.default == known.get(field.name, _UNKNOWN) for known in of_bases):
            rows.append(f"| `{field.name}` | `{_default(field)}` | {_help(field)} |")
    return "\n".join(rows) + "\n"


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    assert field.default_factory is not dataclasses.MISSING
    return repr(field.default_factory())


def _help(field: "dataclasses.Field[Any]") -> str:
    text = field.metadata["help"]
    choices = field.metadata.get("choices")
    if choices and not all(str(choice) in text for choice in choices):
        text += f" One of {', '.join(map(repr, choices))}."
    return text.replace("|", "\\|").replace("<", "&lt;")


def with_tables(text: str) -> str:
    """Return a page with its tables as the code has them."""
    return _TABLE.sub(lambda m: f"{m[1]}{field_table(m[2])}{m[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
