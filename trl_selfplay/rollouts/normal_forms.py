"""Forms under which two completions of one prompt count as the same.

In: a completion's text. Out: something hashable, equal for completions to be kept once.
"""

from trl_selfplay.rewards.equations import find_equations


def default_normal_form(completion: str) -> str:
    r"""Return a completion lower-cased and with white space folded.

    >>> default_normal_form(" 3 + 4\n= 7. Answer:  7 ")
    '3 + 4 = 7. answer: 7'
    """
    return " ".join(completion.lower().split())


def reasoning_path(completion: str) -> tuple[str, ...]:
    """Return the list of equations of a completion, in order, without blanks.

    Two orders of the same equations, or of the operands of one, are different paths. A text
    without any equation is its own path, lower-cased and with white space folded: the official
    code would take all such texts of a prompt for one.

    Source: RFT, arXiv 2308.01825, section 3.3: one path for each distinct equation list. Of the
    paths with one list RFT keeps the one farthest from the others by edit distance; here it is the
    one that was sampled first.

    >>> reasoning_path("Half of 48 is <<48 / 2=24>>24.") == reasoning_path("So <<48/2 = 24>>24 clips.")
    True
    """
    equations = find_equations(completion)
    if not equations:
        return (default_normal_form(completion),)
    return tuple("".join(equation.split()) for equation in equations)
