"""Tools of tests, in a module that a process imports quickly."""


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return str(a + b)


def fail(text: str) -> str:
    """Fail.

    Args:
        text: Anything.
    """
    raise LookupError(f"no {text}")
