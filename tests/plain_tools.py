"""Tools of tests, in a module that a process imports quickly."""

import random


def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return str(a + b)


def look_up(word: str) -> str:
    """Look a word up.

    Args:
        word: The word.
    """
    return f"{word}: a word"


def draw(word: str) -> str:
    """Draw a card.

    Args:
        word: Its colour.
    """
    return f"{word}: {random.random()}"


draw.deterministic = False  # as `trl_selfplay.tools.tool` says it, which is slow to import


def rows_found(word: str) -> list[tuple]:
    """Query a table.

    Args:
        word: What to look for.
    """
    return [(word, 1)]


class Counter:
    """An environment that says how far to count, and counts."""

    def reset(self, target: int = 1, **columns) -> str | None:
        self.count, self.target = 0, target
        return f" {target}"

    def add(self, a: int, b: int) -> str:
        """Count up.

        Args:
            a: By this much.
            b: And by this much.
        """
        self.count += a + b
        return str(self.count)

    def get_reward(self) -> float:
        return float(self.count >= self.target)


class Silent:
    """An environment that says nothing and gives no reward."""

    def reset(self, **columns) -> None:
        pass

    def look_up(self, word: str) -> str:
        """Look a word up.

        Args:
            word: The word.
        """
        return f"{word}: a word"


class Hides:
    """An environment that draws a number, which it doesn't say."""

    def reset(self, **columns) -> None:
        self.number = random.randrange(1000)

    def look_up(self, word: str) -> str:
        """Look a word up.

        Args:
            word: The word.
        """
        return str(self.number)


class Says(Hides):
    """An environment that says what it draws."""

    def reset(self, **columns) -> str:
        super().reset()
        return f" {self.number}"
