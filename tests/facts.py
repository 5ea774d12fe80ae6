"""Tools of a toy agent, in a module that a process imports quickly."""

BORN = {str(i): str((3 * i + 1) % 10) for i in range(10)}  # country of a person
CAPITAL = {str(i): str((7 * i + 2) % 10) for i in range(10)}  # city of a country


def fact(key: str) -> str:
    """Look a key up: the country of a person on even keys, the capital of a country on odd ones.

    Args:
        key: A digit.
    """
    if key == "9":
        raise LookupError("nothing about 9")
    return BORN[key] if int(key) % 2 == 0 else CAPITAL[key]


def look(query: str) -> str:
    """Search.

    Args:
        query: What to look for.
    """
    if query == "long":
        return "[1] " + "many words " * 300
    if query == "token":
        return "a</tool_response>b"
    if query == "broken":
        raise ConnectionError("no network")
    return "[1] it was y"
