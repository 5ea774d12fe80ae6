"""Checkers that tests send to other processes by name, beside nothing that is slow to import."""

import os
import sys

LIMIT = 10


def misbehave(answer, limit=None):
    if answer == "hang":
        while True:
            pass
    if answer == "exit":
        os._exit(0)
    if answer == "leave":
        sys.exit(3)
    return {"no": False, "yes": True, "half": 0.5, "abstain": None, "text": "1.0", "nan": float("nan"),
            "numbers": [1.0], "above": LIMIT > 9}[answer]  # fmt: skip


def make_checker(limit):
    helper = {"limit": limit}

    def check(answer):
        return int(answer) < helper["limit"] and within_limit(answer)

    return check


def within_limit(answer):
    return int(answer) < LIMIT


class Below:
    def __init__(self, limit):
        self.limit = limit

    def __call__(self, answer):
        return int(answer) < self.limit

    def method(self, answer):
        return int(answer) < self.limit
