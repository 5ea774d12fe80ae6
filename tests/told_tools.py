"""Tools that say what a test wants, in a module that a process imports quickly."""


def add(a: int, b: int, text: str = "", error: str = "", api_key: str = "") -> str:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
        text: What is returned.
        error: What is raised, if anything.
        api_key: What nobody is to read.
    """
    if error:
        raise LookupError(error)
    return text
