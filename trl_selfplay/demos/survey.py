"""The tool of a demo: a full-text search in a colour survey.

In: the colours of two words in the survey of xkcd, which matplotlib ships, and a call's argument. Out: the
text that the policy reads. Runs in processes of its own, so it imports little.
"""

import functools
import re
import sqlite3


@functools.cache
def colours() -> dict[str, tuple[int, int, int]]:
    """Return red, green and blue, each from 0 to 255, by the colour's name.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.colors import get_named_colors_mapping, to_rgb
    except ImportError as error:
        raise ImportError(
            'The demo\'s questions need matplotlib: pip install "trl-selfplay[demo]".'
        ) from error
    found = {}
    for full_name, value in get_named_colors_mapping().items():
        name = str(full_name).removeprefix("xkcd:")
        # matplotlib adds a second spelling of each name with "grey".
        if re.fullmatch("[a-z]+ [a-z]+", name) and "gray" not in name:
            red, green, blue = (round(255 * part) for part in to_rgb(value))
            found[name] = (red, green, blue)
    return found


def search(query: str) -> str:
    """Find a colour's red, green and blue.

    Args:
        query: The colour's name.
    """
    words = re.findall(r"\w+", query)
    # The words in their order are worth more, since some colours share theirs: pink purple, purple pink.
    asked = " OR ".join(f'"{text}"' for text in (" ".join(words), *words))
    if not words:
        return "nothing found"
    found = _index().execute(
        "SELECT line FROM survey WHERE survey MATCH ? ORDER BY rank, rowid LIMIT 1", (asked,)
    )
    return next((line for (line,) in found), "nothing found")


@functools.cache
def _index() -> sqlite3.Connection:
    index = sqlite3.connect(":memory:", check_same_thread=False)
    index.execute("CREATE VIRTUAL TABLE survey USING fts5(name, line UNINDEXED)")
    lines = [(n, f"{n}: red {r}, green {g}, blue {b}") for n, (r, g, b) in colours().items()]
    index.executemany("INSERT INTO survey VALUES (?, ?)", lines)
    return index
