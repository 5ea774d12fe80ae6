"""Text that tokenizers and files take.

In: text from a model, a tool or a server, in which half a surrogate pair may stand. Out: valid Unicode.
"""


def valid_text(text: str) -> str:
    """Return text that can be written as UTF-8; half a surrogate pair becomes a question mark."""
    return text.encode("utf-8", "replace").decode()
