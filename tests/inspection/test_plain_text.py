"""Text from a model, safe to print."""

import sys
import unicodedata

import pytest

from trl_selfplay.inspection.plain_text import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b2J", r"\x9b2J"),
        ("null\x00", r"null\x00"),
        ("over\rwritten", r"over\rwritten"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("zero\u200bwidth", r"zero\u200bwidth"),
        ("half \ud83d pair", r"half \ud83d pair"),
        ("tag\U000e0041", r"tag\U000e0041"),
    ],
)
def test_characters_that_act_on_a_terminal_or_hide_are_shown(text, shown) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize("text", ["two\nlines\tand a tab", "Ünïcödé 数学 👩‍👩‍👧", "می‌خواهم", ""])
def test_ordinary_text_stays_as_it_is(text) -> None:
    assert visible(text) == text


def test_nothing_that_the_unicode_database_calls_control_or_format_is_left() -> None:
    """But newline, tab, joiners, and the visible signs of Arabic, Syriac and Kaithi that join digits."""
    left = {
        character
        for character in map(chr, range(sys.maxunicode + 1))
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
        and visible(character) == character
    }
    names = {unicodedata.name(character, character) for character in left}
    assert names <= {"\n", "\t", "ZERO WIDTH JOINER", "ZERO WIDTH NON-JOINER"} | {
        name
        for name in names
        if name.startswith(("ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN", "SHORTHAND", "MUSICAL"))
    }
