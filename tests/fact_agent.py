"""A toy agent for a model with a word per token: two look-ups in a table of facts, then an answer."""

from dataclasses import dataclass, replace

from datasets import Dataset
from facts import BORN, CAPITAL, fact

from trl_selfplay.tools.agent import MalformedAction, Move, StepPrompt
from trl_selfplay.tools.record import ToolCall

_AS_DIGITS = {"yes": "1", "no": "2", "so": "3"}  # a random model is to find more than half in order


@dataclass(frozen=True)
class FactState:
    question: str
    found: tuple[str, ...] = ()
    key: str = ""
    answer: str = ""
    is_looking: bool = True


class FactAgent:
    """An action begins with a digit: what to look up, or the answer. Other words are malformed."""

    stop_strings = ("=", "+")
    has_examples = False

    def __init__(self, num_step_samples=3, num_calls=2, tool=fact, tools=None) -> None:
        self.tools = (tool,) if tools is None else tools
        self.num_step_samples = num_step_samples
        self.num_calls = num_calls

    @property
    def identity(self):
        return {"num_calls": self.num_calls}

    def begin(self, question):
        return FactState(question)

    def next_step(self, state, *, few_shot):
        if state.answer:
            return None
        left = self.num_calls - len(state.found)
        kind = "look" if left else "answer"
        seen = [f"A {each}" for each in state.found]
        return StepPrompt(
            kind, " ".join([state.question, *seen, "no" if left else "yes", str(left)])
        )

    def act(self, state, action):
        word = _AS_DIGITS.get(first := action.split()[0] if action.split() else "", first)
        if not word.isdigit():
            raise MalformedAction(f"{word!r} is no digit")
        if len(state.found) == self.num_calls:
            return Move(replace(state, answer=word))
        return Move(replace(state, key=word), ToolCall(self.tools[0].__name__, {"key": word}))

    def observe(self, state, result):
        seen = "so no" if result.failed else result.content
        return replace(state, found=(*state.found, f"{state.key} {seen}"), key="")

    def answer(self, state):
        return state.answer


def questions(count=6, first=0, **columns):
    rows = [
        {"prompt": f"Q {i % 10} {i // 10}", **{k: v(i % 10) for k, v in columns.items()}}
        for i in range(first, first + count)
    ]
    return Dataset.from_list(rows)


def capital_of_birth(person):
    return CAPITAL[BORN[str(person)]]
