r"""Text that a model or a dataset wrote, safe to print.

In: any string. Out: the same string with control characters, and characters that reorder or hide text,
as escapes: a completion can't clear the screen, set the title of a terminal or hide what it says.
"""

import re

# Control characters but newline and tab; soft hyphen; Arabic letter mark; zero-width and
# bidirectional marks, but not the joiners, which scripts and emoji need; line and paragraph
# separators; invisible operators, isolates and deprecated format characters; lone surrogates; byte
# order mark; interlinear annotations; tags.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""Return text with control, bidirectional and invisible characters as Python escapes.

    Newlines and tabs stay as they are. The result can be encoded as UTF-8.

    >>> visible("two\x1b[2J\u202e")
    'two\\x1b[2J\\u202e'
    """
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
