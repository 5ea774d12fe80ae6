"""Rewards that a random model meets now and then."""


def contains_solution(completions, solution, **kwargs):
    """A reward that a random model meets now and then: the answer is among the words."""
    return [float(s in c.split()) for c, s in zip(completions, solution, strict=True)]


def digit_share(completions, **kwargs):
    """A real-valued reward: the share of a completion's words that are digits."""
    return [sum(w.isdigit() for w in c.split()) / max(len(c.split()), 1) for c in completions]
