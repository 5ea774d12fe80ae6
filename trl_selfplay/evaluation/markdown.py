"""Text as Markdown that shows it as it is.

In: what a user, a dataset or a model wrote. Out: one line for a card, that can't add links, HTML, rows of a
table or metadata.
"""

import html
import re
from typing import Any

_SPECIAL = re.compile(r"([\\`*_{}\[\]|~])")
# What Markdown on the hub makes a link or a mention without any of these.
_LINKS = {"://": "&#58;//", "www.": "www&#46;", "@": "&#64;"}


def escape(text: Any) -> str:
    r"""Return text as one line, also for a cell of a table.

    >>> escape("a|b <script>[x](y)\n# c @d")
    'a\\|b &lt;script&gt;\\[x\\](y) # c &#64;d'
    """
    line = "".join(c if c.isprintable() else " " for c in " ".join(str(text).split()))
    escaped = _SPECIAL.sub(r"\\\1", html.escape(line, quote=False))
    for plain, shown in _LINKS.items():
        escaped = escaped.replace(plain, shown)
    return escaped
