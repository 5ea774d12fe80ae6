"""Rewards that a random model meets now and then."""


def contains_solution(completions, solution, **kwargs):
    """A reward that a random model meets now and then: the answer is among the words."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(s in text.split()) for text, s in zip(texts, solution, strict=True)]


def digit_share(completions, **kwargs):
    """A real-valued reward: the share of a completion's words that are digits."""
    return [sum(w.isdigit() for w in c.split()) / max(len(c.split()), 1) for c in completions]
