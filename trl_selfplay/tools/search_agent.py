"""The search agent of ReST meets ReAct: decide, search, summarize, answer, check the answer.

In: a question and a search function. Out: prompts in the form of Python code, and actions read from it.

Source: arXiv 2312.10003, sections 3.1 to 3.4. The paper's prompts aren't published; these are our own.
"""

import ast
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from trl_selfplay.rewards.answer import text_of
from trl_selfplay.tools.agent import MalformedAction, Move, StepPrompt
from trl_selfplay.tools.arguments import find_wrong
from trl_selfplay.tools.record import ToolCall, ToolResult
from trl_selfplay.tools.tool_set import describe_tools

_MOST_CHARACTERS = 100_000  # of an action that is parsed
# One string, and not several that Python joins.
_STRING = re.compile(r"""(?s)('{3}|"{3}|'|")(?:(?!\1)[^\\]|\\(?!\n).)*+\1""")
_BY_NUMBER = re.compile(r"(?s)\\(?:(x..|u.{4}|U.{8}|N\{[^}]*\}|[0-7]{1,3})|.)")


@dataclass(frozen=True, slots=True)
class StepKind:
    """A kind of step: what it asks, what it shows, and which actions answer it.

    Attributes:
        instruction: The first line of its prompt.
        shows: The parts of the state that its prompt shows, in this order: "question", "past_actions",
            "searches_left", "query", "results", "draft".
        actions: The names of the actions, each with the argument that it must have, or None.
    """

    instruction: str
    shows: tuple[str, ...]
    actions: Mapping[str, str | None]


def check_step(instruction: str, shows: Sequence[str] = ("question", "draft")) -> StepKind:
    """Return a step that keeps the draft or rewrites it: self-critique and revision.

    Args:
        instruction: What to criticize.
        shows: See `StepKind`.
    """
    return StepKind(instruction, tuple(shows), {"Keep": None, "Rewrite": "text"})


DECISION, SUMMARIZATION, ANSWER = "decision", "summarization", "answer"
_KINDS = {
    DECISION: StepKind(
        "Decide what to do next: search for what is still missing, or terminate.",
        ("question", "past_actions", "searches_left"),
        {"Search": "query", "Terminate": None},
    ),
    SUMMARIZATION: StepKind(
        "Summarize what the results say about the query, with the ids of the links.",
        ("question", "query", "results"),
        {"Summary": "text"},
    ),
    ANSWER: StepKind(
        "Answer the question from what the past actions found, with the ids of the links.",
        ("question", "past_actions"),
        {"Answer": "text"},
    ),
}
CHECKS: Mapping[str, StepKind] = MappingProxyType(
    {
        "relevance": check_step(
            "Does the draft answer the question? Keep it, or rewrite it.", ("question", "draft")
        ),
        "grounding": check_step(
            "Do the results support all that the draft says? Keep it, or rewrite it.",
            ("question", "results", "draft"),
        ),
    }
)
_SHOWN = ("question", "past_actions", "searches_left", "query", "results", "draft")


@dataclass(frozen=True, slots=True)
class SearchState:
    """Where a trajectory stands.

    Attributes:
        kind: The kind of the next step; "" if there is none.
        question: The question.
        past: Query and summary of each search.
        results: The result of each search.
        query: The query whose result is waited for, or to be summarized.
        draft: The answer so far.
    """

    kind: str
    question: str
    past: tuple[tuple[str, str], ...] = ()
    results: tuple[str, ...] = ()
    query: str = ""
    draft: str = ""


class SearchAgent:
    """The paper's state machine.

    Decision → search → summarization, and again, until the policy terminates or has no search left; then a
    draft of the answer, and one step for each check, which keeps or rewrites it. An action is one call in
    Python, such as `Search(thoughts='…', query='…')`, with literal strings; `thoughts` may be left out.

    Args:
        search: A tool with one argument, the query, as GRPOTrainer takes tools.
        examples: Few-shot examples by kind of step: mappings with what the step's prompt shows (see
            `StepKind.shows`; `past_actions` as pairs of query and summary) and `action`, the text to write.
        checks: The checks of the draft by kind, in their order. The default are the paper's, relevance and
            grounding; `check_step` makes others.
        max_tool_calls: Most searches of a trajectory.
        num_step_samples: Samples per step.
        conversational: Give prompts as a user's message instead of text.

    Raises:
        TypeError, ValueError: An argument or an example can't work.
    """

    stop_strings = ("\n",)

    def __init__(
        self,
        search: Callable[..., Any],
        *,
        examples: Mapping[str, Sequence[Mapping[str, Any]]] = MappingProxyType({}),
        checks: Mapping[str, StepKind] = CHECKS,
        max_tool_calls: int = 10,
        num_step_samples: int = 4,
        conversational: bool = False,
    ) -> None:
        for name, count in (
            ("max_tool_calls", max_tool_calls),
            ("num_step_samples", num_step_samples),
        ):
            if type(count) is not int or count < 1:
                raise ValueError(f"{name}={count!r:.100}; give a whole number of at least 1.")
        self._tool, self._argument = _read_search(search)
        self.tools = (search,)
        self.num_step_samples = num_step_samples
        self.max_tool_calls = max_tool_calls
        self.conversational = conversational
        self._kinds = _add_checks(checks)
        self._checks = tuple(checks)
        for kind, given in examples.items():
            self._check_examples(kind, given)
        self._examples = {kind: tuple(map(dict, given)) for kind, given in examples.items()}

    @property
    def has_examples(self) -> bool:
        """Whether there are few-shot examples."""
        return any(self._examples.values())

    @property
    def identity(self) -> Mapping[str, Any]:
        """See `Agent.identity`."""
        kinds = {
            name: [kind.instruction, list(kind.shows), dict(kind.actions)]
            for name, kind in self._kinds.items()
        }
        return {
            "kinds": kinds,
            "examples": self._examples,
            "max_tool_calls": self.max_tool_calls,
            "num_step_samples": self.num_step_samples,
            "conversational": self.conversational,
        }

    def begin(self, question: Any) -> SearchState:
        """See `Agent.begin`; of messages, the last is the question."""
        return SearchState(DECISION, text_of(question))

    def next_step(self, state: SearchState, *, few_shot: bool) -> StepPrompt | None:
        """See `Agent.next_step`."""
        if not state.kind:
            return None
        examples = self._examples.get(state.kind, ()) if few_shot else ()
        shown = [f"{self._render(state.kind, e)} {e['action']}\n\n" for e in examples]
        prompt = "".join(shown) + self._render(state.kind, self._values(state))
        if self.conversational:
            return StepPrompt(state.kind, [{"role": "user", "content": prompt}])
        return StepPrompt(state.kind, prompt)

    def act(self, state: SearchState, action: str) -> Move:
        """See `Agent.act`."""
        name, argument = parse_action(action, self._kinds[state.kind].actions)
        if name == "Search":
            call = ToolCall(self._tool, {self._argument: argument})
            return Move(replace(state, query=argument), call)
        if name == "Terminate":
            return Move(replace(state, kind=ANSWER))
        if name == "Summary":
            past = (*state.past, (state.query, argument))
            kind = DECISION if len(past) < self.max_tool_calls else ANSWER
            return Move(replace(state, kind=kind, past=past, query=""))
        draft = state.draft if name == "Keep" else argument
        return Move(replace(state, kind=self._check_after(state.kind), draft=draft))

    def observe(self, state: SearchState, result: ToolResult) -> SearchState:
        """See `Agent.observe`."""
        return replace(state, kind=SUMMARIZATION, results=(*state.results, result.content))

    def answer(self, state: SearchState) -> str:
        """See `Agent.answer`."""
        return state.draft

    def _check_after(self, kind: str) -> str:
        place = 0 if kind == ANSWER else self._checks.index(kind) + 1
        return self._checks[place] if place < len(self._checks) else ""

    def _values(self, state: SearchState) -> dict[str, Any]:
        return {
            "question": state.question,
            "past_actions": state.past,
            "searches_left": self.max_tool_calls - len(state.past),
            "query": state.query,
            "results": state.results[-1:] if state.kind == SUMMARIZATION else state.results,
            "draft": state.draft,
        }

    def _render(self, kind: str, values: Mapping[str, Any]) -> str:
        step = self._kinds[kind]
        lines = [f"# {step.instruction}", *(_assignment(n, values[n]) for n in step.shows)]
        return "\n".join([*lines, "action ="])

    def _check_examples(self, kind: str, examples: Sequence[Mapping[str, Any]]) -> None:
        if kind not in self._kinds:
            raise ValueError(f"examples has the kind {kind!r}; there are {', '.join(self._kinds)}.")
        needed = {*self._kinds[kind].shows, "action"}
        for number, example in enumerate(examples):
            where = f"examples[{kind!r}][{number}]"
            if not isinstance(example, Mapping) or needed != example.keys():
                raise ValueError(
                    f"{where} is {example!r:.200}; give a mapping with {', '.join(sorted(needed))}."
                )
            for name in self._kinds[kind].shows:
                if wrong := _find_wrong_value(name, example[name], kind):
                    raise ValueError(f"{where}: {name} is {example[name]!r:.200}; give {wrong}.")
            if not isinstance(example["action"], str):
                raise TypeError(f"{where}: action is {example['action']!r:.200}; give its text.")
            try:
                parse_action(example["action"], self._kinds[kind].actions)
            except MalformedAction as error:
                raise ValueError(
                    f"{where} has an action that the agent can't read: {error}"
                ) from error


def parse_action(text: str, actions: Mapping[str, str | None]) -> tuple[str, str]:
    """Return an action's name and its argument, "" if it has none.

    Args:
        text: One call in Python, with literal strings as named arguments.
        actions: The names of the actions, each with the argument that it must have, or None.

    Raises:
        MalformedAction: It is anything else.
    """
    call = _read_call(text)
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise MalformedAction("it is no call with named arguments")
    name = call.func.id
    if name not in actions:
        raise MalformedAction(f"{name!r:.50} is none of {', '.join(actions)}")
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    values = [value.value for value in given.values() if isinstance(value, ast.Constant)]
    if len(values) < len(call.keywords) or not all(isinstance(value, str) for value in values):
        raise MalformedAction("an argument is no literal string, or is given twice")
    for value in given.values():
        _check_shown(ast.get_source_segment(text.strip(), value) or "")
    needed = actions[name]
    if given.keys() - {"thoughts"} != ({needed} if needed else set()):
        expected = f"{needed} and, if you like, thoughts" if needed else "at most thoughts"
        raise MalformedAction(f"the arguments of {name} aren't {expected}")
    if needed is None:
        return name, ""
    argument = given[needed]
    assert isinstance(argument, ast.Constant)
    assert isinstance(argument.value, str)
    if not argument.value.strip():
        raise MalformedAction(f"{needed} is empty")
    return name, argument.value


def _check_shown(literal: str) -> None:
    """Raise MalformedAction for a string that spells out what its text doesn't show.

    The text of an action has no special tokens. A string in it has none either, unless a character is written
    by its number, or Python joins it from parts.
    """
    if not _STRING.fullmatch(literal):
        raise MalformedAction("an argument is more than one string")
    for number in filter(None, _BY_NUMBER.findall(literal)):
        written = _read_call(rf"'\{number}'")
        if isinstance(written, ast.Constant) and str(written.value).isprintable():
            raise MalformedAction(rf"\{number} stands for a character that can be written")


def _read_call(text: str) -> ast.expr:
    if len(text) > _MOST_CHARACTERS:
        raise MalformedAction(f"it has {len(text):,} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in the strings
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise MalformedAction(f"it is no Python expression: {error}") from error


def _assignment(name: str, value: Any) -> str:
    if name == "past_actions":
        searches = [f"    Search(query={query!r}, summary={text!r})," for query, text in value]
        return "\n".join([f"{name} = [", *searches, "]"])
    if name == "results":
        return "\n".join([f"{name} = [", *(f"    {text!r}," for text in value), "]"])
    return f"{name} = {value!r}"


def _find_wrong_value(name: str, value: Any, kind: str) -> str | None:
    """Return what an example has to show instead of a value that no prompt of a run shows; None if it is right."""
    if name == "searches_left":
        return None if type(value) is int and value >= 1 else "a whole number of at least 1"
    if name == "past_actions":
        pairs = isinstance(value, list | tuple) and all(
            isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_text, pair))
            for pair in value
        )
        return None if pairs else "a list of pairs of texts, query and summary"
    if name != "results":
        return None if _is_text(value) else "text"
    if not isinstance(value, list | tuple) or not all(map(_is_text, value)):
        return "a list of texts, the result of each search"
    return "what the query found" if kind == SUMMARIZATION and not value else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _add_checks(checks: Mapping[str, StepKind]) -> dict[str, StepKind]:
    for name, kind in checks.items():
        if not isinstance(kind, StepKind):
            raise TypeError(f"checks[{name!r}] is {kind!r:.100}; give what check_step returns.")
        if name in _KINDS or not name:
            raise ValueError(f"checks has {name!r}, which is the name of another kind of step.")
        if unknown := set(kind.shows) - set(_SHOWN):
            raise ValueError(
                f"checks[{name!r}] shows {sorted(unknown)}; there are {', '.join(_SHOWN)}."
            )
    return {**_KINDS, **checks}


def _read_search(search: Callable[..., Any]) -> tuple[str, str]:
    """Return a tool's name, and that of its first argument, which gets the query."""
    if not callable(search):
        raise TypeError(f"search={search!r:.100}; give a function with one argument, the query.")
    [name], [schema] = describe_tools([search])
    argument = next(iter(schema["function"]["parameters"].get("properties") or ()), "")
    if wrong := find_wrong({argument: ""}, schema):
        raise TypeError(
            f"search={name!r:.100} has to take one text, the query, as its first argument: {wrong}."
        )
    return name, argument
