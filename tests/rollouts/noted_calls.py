"""A tool that writes down its calls, in a module that a process imports quickly."""


def note(path: str, key: str) -> str:
    """Write down that it was called.

    Args:
        path: The file to write into.
        key: What tells the call from others.
    """
    with open(path, "a") as file:  # noqa: PTH123
        file.write(key + "\n")
    return key
