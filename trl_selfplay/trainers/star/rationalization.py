"""Show the answer as a hint, and find rationales that quote the hint instead of reasoning.

In: a prompt that no completion solved, with its solution. Out: the prompt with the final answer, for
sampling only (the training example has the prompt without it); then, for a completion of that prompt,
the reason why it must not be trained on, or None. Both are defaults that the trainer's
`hint_formatter` and `leak_filter` replace.

Source: STaR, arXiv 2203.14465, section 3.3 and figures 1 and 2. The paper has no leak filter.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl_selfplay.rewards.answer import final_answer
from trl_selfplay.rollouts.prompts import Messages, Prompt, PromptRow
from trl_selfplay.rollouts.record import Rollout

HINT_MARKER = "(CORRECT)"


def add_hint(prompt: Prompt, solution: Any) -> Prompt:
    r"""Return the prompt with the final answer shown.

    In a multiple-choice prompt, the right option is marked "(CORRECT)". Otherwise the answer follows
    the question in parentheses, before a cue such as "A:" at the end of the prompt. Only the final
    answer of a solution is shown. With an empty solution the prompt is returned unchanged.

    Args:
        prompt: Text, or chat messages, of which the last user turn gets the hint. Not mutated.
        solution: Its final answer is an option's letter, an option's text, or free text.

    Raises:
        ValueError: Chat messages without a text turn of the user.

    Source: STaR, arXiv 2203.14465, section 3.3.

    >>> add_hint("Q: What is 48 + 24?\nA:", "48 + 24 = 72 #### 72")
    'Q: What is 48 + 24? (72)\nA:'
    """
    answer = _answer_of(solution)
    if not answer:
        return prompt
    if isinstance(prompt, str):
        return _hinted_text(prompt, answer)
    for index in range(len(prompt) - 1, -1, -1):
        if prompt[index]["role"] == "user" and (text := _text_of(prompt[index])) is not None:
            hinted = _with_text(prompt[index], _hinted_text(text, answer))
            return [*prompt[:index], hinted, *prompt[index + 1 :]]
    raise ValueError(
        "a hint goes into the last text turn of the user, and this chat prompt has none: "
        f"{prompt!r:.200}. Give a `hint_formatter` that knows where the answer belongs."
    )


def leaks_of_rows(
    leak_filter: Callable[[Any, str, Any], str | None], rows: Sequence[PromptRow]
) -> Callable[[Rollout], str | None]:
    """Return what asks the filter about a rollout, with the unhinted prompt and the solution.

    Args:
        leak_filter: `f(prompt, completion, solution)` returns why a hinted completion quotes its
            hint, or None.
        rows: The prompts that were sampled.

    Raises:
        TypeError: When asked: the filter returned something else than a reason or None.
    """
    by_id = {row.prompt_id: row for row in rows}

    def leak_reason(rollout: Rollout) -> str | None:
        row = by_id[rollout.prompt_id]
        reason = leak_filter(row.prompt, rollout.completion, row.solution)
        if reason is not None and not isinstance(reason, str):
            raise TypeError(
                f"leak_filter returned {reason!r}; return the reason as a short text such as "
                '"mentions_hint" for a completion to drop, or None for one to keep.'
            )
        return reason

    return leak_reason


def find_leak(prompt: Prompt, completion: str, solution: Any) -> str | None:
    """Return why a completion sampled with a hint quotes it instead of reasoning, or None.

    Args:
        prompt: The prompt without the hint. Repeating it is no leak.
        completion: The completion as text.
        solution: The ground truth; only its final answer counts.

    Returns:
        "hint_marker": repeats "(CORRECT)". "mentions_hint": speaks of a hint or of an answer that
        was given. "answer_only": nothing but the answer. "answer_first": states the answer before
        any reasoning. None: none of these.
    """
    prompt_text = _prompt_text(prompt)
    if HINT_MARKER in completion and HINT_MARKER not in prompt_text:
        return "hint_marker"
    answers = _forms_of_answer(prompt_text, _answer_of(solution), completion)
    if _mentions_hint(prompt_text, completion) or _argues_from_answer(completion, answers):
        return "mentions_hint"
    if answers:
        opening = _opening(completion)
        if re.fullmatch(
            rf"(?:{_ANNOUNCEMENT}){{0,3}}{_either(answers)}{_CLOSING}", opening, _FLAGS
        ):
            return "answer_only"
        if _states_answer_first(opening, answers):
            return "answer_first"
    return None


def _answer_of(solution: Any) -> str:
    return "" if solution is None else final_answer(str(solution)).strip()


# --- prompts as text -----------------------------------------------------------------------------


def _text_of(message: dict[str, Any]) -> str | None:
    """Return a message's text, of the last text part where its content is a list of parts."""
    content = message.get("content")
    if isinstance(content, str):
        return content
    texts = [part["text"] for part in content or () if part.get("type") == "text"]
    return texts[-1] if texts else None


def _with_text(message: dict[str, Any], text: str) -> dict[str, Any]:
    """Return a copy of a message with the text that `_text_of` returns replaced."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": text}
    parts = list(content)
    last = max(i for i, part in enumerate(parts) if part.get("type") == "text")
    parts[last] = {**parts[last], "text": text}
    return {**message, "content": parts}


def _prompt_text(prompt: Prompt) -> str:
    """Return the text of a prompt; of chat messages that of all turns."""
    if isinstance(prompt, str):
        return _split_header(prompt)[0]
    messages: Messages = prompt
    return "\n".join(text for m in messages if (text := _text_of(m)) is not None)


# The end of the user's turn and the header of the assistant's, as chat templates write them: tags
# such as <|im_end|> and [/INST] with nothing but white space and the role between and behind them.
_TAG = r"(?:<[^<>\n]{1,40}>|\[/?[A-Z_]{2,30}\])"
_HEADER = re.compile(rf"\s*{_TAG}(?:\s|{_TAG}|assistant:?|model\b)*$", re.IGNORECASE)
_ASSISTANT = re.compile(r"assistant|model|chatbot|\[/INST\]", re.IGNORECASE)
_LONGEST_HEADER = 200  # characters


def _split_header(text: str) -> tuple[str, str]:
    """Split text that a chat template has rendered before the assistant's header; else all and ""."""
    header = _HEADER.search(text, max(0, len(text) - _LONGEST_HEADER))
    if header is None or not _ASSISTANT.search(header[0]):
        return text, ""
    return text[: header.start()], text[header.start() :]


# --- the hint ------------------------------------------------------------------------------------

# What a prompt may end with to call for the answer: a short line of its own that ends in a colon
# ("A:", "### Response:", "Target:"), or one of these words at the end of the question's line; a
# first sentence of the completion may stand after it.
_CUE = re.compile(
    r"(?:\s*\n[ \t]*[^\n:?.!]{1,24}:[*_ \t]*|\s+(?:a|answer|assistant|final answer|solution)\s*:)?"
    r"(?:\s*let['’]?s think step by step[.:]?)?$",
    re.IGNORECASE,
)
_LONGEST_CUE = 100  # characters at the end of a prompt that are searched for a cue


def _hinted_text(text: str, answer: str) -> str:
    text, header = _split_header(text)
    return _hinted_question(text, answer) + header


def _hinted_question(text: str, answer: str) -> str:
    if (option := _right_option(_options(text), answer)) is not None:
        return f"{text[: option.end]} {HINT_MARKER}{text[option.end :]}"
    body = text.rstrip()
    cue = _CUE.search(body, max(0, len(body) - _LONGEST_CUE))
    question = (body[: cue.start()].rstrip() if cue else "") or body
    return f"{question} ({answer}){text[len(question) :]}"


@dataclass(frozen=True, slots=True)
class _Option:
    """One option of a multiple-choice question; its text ends at `end` in the prompt."""

    letter: str
    text: str
    end: int


# "(a) …" anywhere; "a) …" and "A. …" only at the start of a line, where they can't be the end of
# a sentence or an initial.
_OPTION = re.compile(r"(?:(?<=\s)|^)\(([A-Za-z])\)(?=\s*\S)|^[ \t]*([A-Za-z])[.)](?=\s+\S)", re.M)


def _options(text: str) -> list[_Option]:
    """Return the options of the last list in a text whose letters run from a (or A), or none.

    The last one: worked examples with options of their own may stand before the question.
    """
    runs: list[list[re.Match[str]]] = []
    for match in _OPTION.finditer(text):
        letter = _letter(match)
        if runs and ord(letter) == ord(_letter(runs[-1][-1])) + 1:
            runs[-1].append(match)
        elif letter in "aA":
            runs.append([match])
    if not runs or len(runs[-1]) < 2:
        return []
    starts = [m.start() for m in runs[-1][1:]] + [len(text)]
    options = []
    for match, next_start in zip(runs[-1], starts, strict=True):
        line = text[match.end() : next_start].split("\n", 1)[0].rstrip(" \t,;")
        options.append(_Option(_letter(match).lower(), line.strip(), match.end() + len(line)))
    return options


def _letter(match: re.Match[str]) -> str:
    return match[1] or match[2]


def _right_option(options: Sequence[_Option], answer: str) -> _Option | None:
    """Return the option that an answer names, by its letter, its text or both."""
    plain = answer.strip().casefold()
    named = re.fullmatch(r"\(?([a-z])(?:\)|[.:)]?$|[.:)]\s+(.*))(?:\s*(.+))?", plain, re.S)
    for option in options:
        if named and option.letter == named[1]:
            rest = (named[2] or named[3] or "").strip()
            if not rest or rest == option.text.casefold():
                return option
    same = [o for o in options if o.text.casefold().rstrip(".") == plain.rstrip(".")]
    return same[0] if len(same) == 1 else None


# --- leaks ---------------------------------------------------------------------------------------

_FLAGS = re.IGNORECASE | re.DOTALL
_NOT_OPTIONS = r"(?!['’]?\s*(?:choices?|options?|list|format|field|sheet|key\s+signature))"
_SHOWN = r"(?:given|provided|supplied|shown|stated|listed|marked|indicated|mentioned|written)"
_PLACE = (
    r"(?:above|in (?:the )?(?:parenthes[ei]s|brackets?|question|prompt|problem|hint|task)"
    r"|to us|to me|here|already|beforehand|for us)"
)
_MENTIONS = re.compile(
    "|".join(
        (
            # a hint as such
            r"\b(?:the|this|that|your|our|my|given|provided|above)\s+hints?\b",
            r"\bhints?\s+(?:says?|tells?|states?|gives?|shows?|suggests?|indicates?|is|was|above)\b",
            r"\b(?:as|it is|it's|was|is)\s+hinted\b",
            # an answer that was there before
            rf"\b(?:given|provided|supplied|known|stated|expected)\s+answer\b{_NOT_OPTIONS}",
            rf"\banswer,?\s+(?:(?:that|which)\s+)?(?:(?:is|was|has been|as)\s+)?(?:already\s+)?"
            rf"{_SHOWN}\s+(?:as\s+)?{_PLACE}",
            r"\banswer\s+(?:is|was|has been)\s+(?:already\s+)?"
            r"(?:given|provided|supplied|marked|shown|indicated)\b(?!\s+(?:by|as|in|below)\b)",
            r"\banswer\s+(?:is|was)\s+already\s+"
            r"(?:known|there|given|provided|shown|marked|stated)\b",
            r"\b(?:the\s+)?answer\s+(?:above|in\s+(?:the\s+)?parenthes[ei]s|in\s+brackets)\b",
            r"\babove\s+answer\b",
            r"\b(?:we|i)(?:\s+(?:are|were|am|was)|['’](?:re|m))?\s+(?:already\s+)?"
            r"(?:told|given|informed)\s+(?:that\s+)?(?:the|its)\s+(?:correct\s+|right\s+|final\s+)?"
            rf"(?:answer|solution){_NOT_OPTIONS}",
            r"\b(?:since|because|as|given that)\s+(?:we|i)\s+(?:already\s+)?know\s+(?:that\s+)?"
            r"the\s+(?:correct\s+|right\s+|final\s+)?answer\b",
            r"\b(?:question|prompt|problem)\s+(?:already\s+)?(?:says|states|tells us|gives us|gives)"
            r"\s+(?:that\s+)?the\s+(?:correct\s+|right\s+|final\s+)?answer\b",
            # a marked option
            r"\b(?:is|was|are|been|option|choice|answer|one)\s+(?:already\s+)?(?:marked|labell?ed|"
            r"tagged|flagged)\s+(?:as\s+)?(?:being\s+)?(?:the\s+)?[\"'(]*(?:correct|right|answer)",
            r"\b(?:as\s+)?(?:shown|given|stated|indicated|provided)\s+in\s+(?:the\s+)?"
            r"parenthes[ei]s",
        )
    ),
    re.IGNORECASE,
)


def _mentions_hint(prompt_text: str, completion: str) -> bool:
    said = " ".join(prompt_text.casefold().split())
    if "hint" in said:  # the task itself speaks of hints
        completion = re.sub(r"\bhint(?:s|ed)?\b", "", completion, flags=re.IGNORECASE)
    text = " ".join(completion.split())
    return any(match[0].casefold() not in said for match in _MENTIONS.finditer(text))


def _argues_from_answer(completion: str, answers: Sequence[str]) -> bool:
    """Return whether a completion uses the answer as a premise: "since the answer is 72, …"."""
    return bool(answers) and bool(
        re.search(
            r"\b(?:since|because|given(?:\s+that)?|knowing(?:\s+that)?)\s+(?:the|our)\s+"
            r"(?:correct\s+|right\s+|final\s+)?answer\s+(?:is|must\s+be|should\s+be|equals)\s+"
            rf"{_either(answers)}",
            completion,
            _FLAGS,
        )
    )


# Words that may stand before the first statement without being reasoning.
_FILLER = re.compile(
    r"\s*(?:<(?:think|thinking|reasoning|reason|rationale)>|[#>*\s]+|\$+|\\[\[(]"
    r"|(?:sure|okay|ok|well|right|alright|certainly|of course|let['’]?s see|let me (?:think|see)|"
    r"let['’]?s think(?: about (?:it|this))?(?: step by step)?|so|then|clearly|obviously)\b[,.!:]*)",
    re.IGNORECASE,
)
_ANNOUNCEMENT = (
    r"(?:(?:thus|therefore|hence|so)[,\s]+)?"
    r"(?:(?:the\s+|my\s+|our\s+)?(?:final\s+|correct\s+|right\s+|best\s+)?"
    r"(?:answer|solution|choice|option|output)"
    r"(?:\s+(?:here|to (?:this|the) (?:question|problem)))?"
    r"\s*(?::|=|\bis\b:?|\bmust be\b|\bshould be\b|\bwould be\b|\bwill be\b)"
    r"|a\s*:|it\s+is|it['’]s|it\s+must\s+be|####|<answer>|\\boxed\s*\{)"
    r"\s*"
)
_CLOSING = r"(?:[\s.!,;)\]}\"'$%]|</answer>|</think>)*"


def _opening(completion: str) -> str:
    """Return a completion without marks of emphasis and the filler that it begins with."""
    text = re.sub(r"\*\*|__|`", "", completion).strip()
    start = 0
    while filler := _FILLER.match(text, start):
        start = filler.end()
    return text[start:].strip()


def _forms_of_answer(prompt_text: str, answer: str, completion: str) -> list[str]:
    """Return regular expressions for the ways to write an answer, the longest first.

    Those that can't match in the completion are left out: to compile a long answer takes much
    longer than to see that a completion doesn't quote it.
    """
    if not answer:
        return []
    option = _right_option(_options(prompt_text), answer)
    quotes_text = _folded(option.text if option else answer) in _folded(completion)
    if option is None:
        return [_pattern_of(answer)] if quotes_text else []
    letter = rf"(?:option\s+)?\(?{option.letter}\b[).:]?"
    if not quotes_text:
        return [letter]
    text = _pattern_of(option.text)
    # "a basket" for the option "basket"
    return [rf"{letter}\s*{text}", rf"(?:(?:an?|the)\s+)?{text}", letter]


def _folded(text: str) -> str:
    """Return a text without case and what a pattern of an answer, or `_opening`, passes over.

    The dotless i matches i where case is ignored, and stays another letter in `casefold`.
    """
    return re.sub("[\\s,*_`i\u0131\u0307]", "", text.casefold())


def _pattern_of(answer: str) -> str:
    """Return a regular expression for an answer: any white space, with or without 1,000s commas."""
    if re.fullmatch(r"-?[\d,]*\d(?:\.\d+)?", answer):
        whole, dot, fraction = answer.replace(",", "").partition(".")
        digits = "".join(
            f"{',?' if i and whole[i - 1].isdigit() and (len(whole) - i) % 3 == 0 else ''}{d}"
            for i, d in enumerate(whole)
        )
        return rf"\$?{digits}{re.escape(dot + fraction)}(?![\d])(?![.,]\d)"
    words = [re.escape(word) for word in re.split(r"\s*,\s*|\s+", answer) if word]
    # A list may be written with or without commas.
    pattern = r"[,\s]\s*".join(words) if len(words) > 1 else re.escape(answer)
    return rf"{pattern}(?!\w)"


def _either(patterns: Sequence[str]) -> str:
    return rf"[\"'(\[$]*(?:{'|'.join(patterns)})"


def _states_answer_first(opening: str, answers: Sequence[str]) -> bool:
    """Return whether the answer, as a statement of its own, comes before anything else."""
    announced = re.match(
        rf"(?:{_ANNOUNCEMENT}){{1,3}}{_either(answers)}[\"')\]}}$%]*"
        r"(?:\s*$|\s*[.,;!\n<–—]|\s+(?:because|since|as|for|due)\b|\s+-\s)",
        opening,
        _FLAGS,
    )
    bare = re.match(
        rf"{_either(answers)}[\"')\]}}$%]*"
        r"(?:[.!]?[^\S\n]*(?:\n|$)|[.!]\s|,?\s+(?:because|since)\b|\s+[–—]\s"
        r"|\s+is\s+(?:the\s+)?(?:correct|right|best|answer)\b)",
        opening,
        _FLAGS,
    )
    return bool(announced or bare) and not _is_enumeration(opening)


def _is_enumeration(opening: str) -> bool:
    """Return whether a text begins with the first of several numbered or lettered items."""
    first = re.match(r"\(?(\d+|[A-Za-z])[.:)]", opening)
    if first is None:
        return False
    item = first[1]
    following = str(int(item) + 1) if item.isdigit() else chr(ord(item) + 1)
    return re.search(rf"(?:\s|\()\(?{following}[.:)]\s", opening[first.end() :]) is not None
