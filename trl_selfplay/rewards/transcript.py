"""Find the part of a completion that speaks to the reader.

In: the text of a completion, as the model wrote it. Out: the text without thoughts, chat templates'
tokens and turns that the model made up after its own. Everything takes linear time.
"""

import itertools
import re

# One family per alternative: only its own closing tag ends a thought.
_MOST_PARTS = 100
_NAMES = (
    r"(?:seed:)?think(?:ing)?|thoughts?|reason(?:ing)?|reflect(?:ion)?|scratch_?pad|analysis"
    r"|rationale|inner_monologue|planning|cot"
)
_TAG = re.compile(
    rf"<(?P<slash>/?)(?P<name>{_NAMES})>"
    r"|\[(?P<bracket_slash>/?)(?P<bracket>think)\]"
    r"|◁(?P<kimi_slash>/?)(?P<kimi>think)▷"
    r"|<\|(?P<sky>begin|end)_of_thoughts?\|>"
    r"|(?P<gemma><\|channel>|<channel\|>)",
    re.IGNORECASE,
)
# The format of gpt-oss: any channel but `final` holds thoughts. Without special tokens the names of
# role and channel stick to the text.
_CHANNEL = "<|channel|>"
_FINAL_CHANNEL = re.compile(
    r"<\|channel\|>\s{0,4}final\s{0,4}(?:<\|[a-z]+\|>[^<\n]{0,40})?<\|message\|>"
)
_BARE_CHANNELS = re.compile(r"\s{0,8}analysis(?=[A-Z\"'\d(])")
_BARE_FINAL = "assistantfinal"
_HEADER = re.compile(
    r"\s*(?:<\|im_start\|>|<\|start_header_id\|>|<\|start\|>|<start_of_turn>|<\|turn>|<\|begin_of_text\|>"
    r"|<bos>|<s>|<\|start_of_role\|>|<\|assistant\|>|<｜Assistant｜>|<\|CHATBOT_TOKEN\|>|\[/INST\])*"
    r"\s*(?:(?:assistant|model)(?:<\|end_header_id\|>|<\|end_of_role\|>|\s*\n|\s*$))?",
    re.IGNORECASE,
)
_END_OF_TURN = re.compile(
    r"<\|im_end\|>|<\|im_start\|>|<\|eot_id\|>|<\|eom_id\|>|<\|end_of_text\|>|<\|endoftext\|>|<\|end\|>"
    r"|<\|return\|>|<\|eot\|>|<\|start_header_id\|>|<\|user\|>|<\|end_of_solution\|>|</s>|<eos>"
    r"|<end_of_turn>|<start_of_turn>|<turn\|>|<pad>|\[INST\]|<｜end▁of▁sentence｜>|<｜User｜>"
    r"|<\|END_OF_TURN_TOKEN\|>|<\|end_of_turn\|>|<\|start\|>|<\|system\|>"
    r"|(?:(?<=[.!?)}*$\d\n])|^)(?:assistant|user)[ \t]*(?:\n|\Z)"
)
# A base model goes on with the next example of its prompt.
_NEXT_QUESTION = re.compile(
    r"^[ \t]*(?:[#*]{1,4}[ \t]*)?(?:Q|Question|Problem|Exercise|Human|User|Instruction)(?:[ \t]*\d{1,3})?"
    r"[ \t]*(?:\*\*)?:",
    re.MULTILINE,
)


def without_thoughts(text: str) -> str:
    """Return a text without what stands in the thoughts of a model.

    Thoughts are what `<think>`, `<thinking>`, `<reasoning>`, `<reflection>`, `[THINK]` and their like
    enclose; without an end they go on to the end of the text, and without a beginning, which is often
    part of the prompt, they begin with the text. Of the channels of gpt-oss only `final` is no thought.

    >>> without_thoughts("<think>4 or 5?</think> The answer is 5.")
    ' The answer is 5.'
    """
    text = _final_channel(text)
    kept: list[str] = []
    start, family = 0, None
    for tag in _TAG.finditer(text):
        opens, name = _read_tag(tag)
        if family is None and opens:
            kept.append(text[start : tag.start()])
            family = name
        elif family is None:  # the beginning is in the prompt
            kept.clear()
            start = tag.end()
        elif not opens and name == family:
            start, family = tag.end(), None
    if family is None:
        kept.append(text[start:])
    return "".join(kept)


def _read_tag(tag: re.Match[str]) -> tuple[bool, str]:
    """Return whether a tag opens thoughts, and its family."""
    if tag["sky"]:
        return tag["sky"].lower() == "begin", "thought"
    if tag["gemma"]:
        return tag["gemma"].startswith("<|"), "channel"
    slash = tag["slash"] or tag["bracket_slash"] or tag["kimi_slash"]
    name = (tag["name"] or tag["bracket"] or tag["kimi"]).lower()
    for short in ("think", "thought", "reason", "reflect"):
        if short in name:
            name = short
    return not slash, name


def _final_channel(text: str) -> str:
    if _CHANNEL in text:
        ends = [match.end() for match in _FINAL_CHANNEL.finditer(text)]
        return text[ends[-1] :] if ends else ""
    if _BARE_CHANNELS.match(text):
        _, marker, final = text.rpartition(_BARE_FINAL)
        return final if marker else ""
    return text


def last_turns(text: str) -> list[str]:
    """Return what a model said, without thoughts, in parts: its turn, and those it made up after it.

    A part ends with a token that ends a turn, or before a line such as `Question: …`. The first part
    with an answer is the one that counts.
    """
    text = without_thoughts(text)
    header = _HEADER.match(text)
    assert header is not None  # it matches the empty text too
    text = text[header.end() :]
    turn = next((turn for turn in _END_OF_TURN.split(text) if turn.strip()), "")
    starts = [0, *(question.start() for question in _NEXT_QUESTION.finditer(turn)), len(turn)]
    parts = [turn[start:end] for start, end in itertools.pairwise(starts)]
    return [part for part in parts if part.strip()][:_MOST_PARTS]
