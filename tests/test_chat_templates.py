"""All chat templates that TRL ships: our prompts are theirs, and whatever one leaves out is said."""

import logging
import random
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
import trl
from datasets import Dataset
from transformers.utils import chat_template_utils
from trl import get_training_chat_template

from trl_selfplay.rollouts.prompts import load_prompt_rows
from trl_selfplay.rollouts.rendering import PromptFormatter, load_few_shot_examples
from trl_selfplay.trainers.star.rationalization import add_hint

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
NOW = datetime(2024, 2, 3, 4, 5, 6)
QUESTION, EXAMPLE = "What is 48 + 24?", "What is 1 + 1?"
ANSWER, THOUGHT = "one and one, so 2", "<think>one and one</think>\n\nSo 2."
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Which city."}},
            "required": ["city"],
        },
    },
}
# What is asked for, the messages that a user would write by hand, and the words that must be there.
FORMS = ("plain", "parts", "system", "few-shot", "hint", "thoughts", "tools")
CASES = [(path.stem, form) for path in TEMPLATES for form in FORMS]
DRAWN = random.Random(20261125).sample(CASES, len(CASES) // 10)


class Clock(datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


def user(text):
    return {"role": "user", "content": text}


def squeezed(text):
    return "".join(text.split())


def judge(tokenizer, form, caplog):
    """Compare one form of a prompt with the template's own rendering; return what became of it."""
    example = [user(EXAMPLE), {"role": "assistant", "content": ANSWER}]
    messages, words, tools = [user(QUESTION)], [QUESTION], None
    prompt, completion, hinted = messages, None, False
    if form == "parts":
        prompt = messages = [user([{"type": "text", "text": QUESTION}])]
    elif form == "system":
        prompt = messages = [{"role": "system", "content": "Be brief."}, user(QUESTION)]
        words = ["Be brief.", QUESTION]
    elif form == "few-shot":
        completion, messages, words = ANSWER, [*example, user(QUESTION)], [QUESTION, ANSWER]
    elif form == "hint":
        hinted, messages, words = True, [user(f"{QUESTION} (72)")], [f"{QUESTION} (72)"]
    elif form == "thoughts":
        completion, words = THOUGHT, [QUESTION, THOUGHT]
        messages = [example[0], {"role": "assistant", "content": THOUGHT}, user(QUESTION)]
    elif form == "tools":
        tools, words = [TOOL], [QUESTION, "get_weather"]
    try:
        expected = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=True, return_dict=False
        )
    except Exception:
        expected = None
    shown = "" if expected is None else squeezed(tokenizer.decode(expected))
    is_whole = all(squeezed(word) in shown for word in words)
    if form == "parts" and ("'type'" in shown or '"type"' in shown):
        is_whole = False  # the content's Python or JSON code is no text

    record = {"prompt": prompt, "solution": "72"} | ({"tools": tools} if tools else {})
    rows = load_prompt_rows(Dataset.from_list([record]), "train_dataset")
    examples = [{"prompt": EXAMPLE, "completion": completion, "solution": "2"}]
    formatter = PromptFormatter(
        tokenizer,
        load_few_shot_examples(examples if completion else None, True),
        add_hint,
        start=NOW,
    )
    caplog.clear()
    try:
        formatter.check_rows(rows, few_shot=True)
        found = list(formatter.token_ids(rows[0], few_shot=True, hinted=hinted))
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert not is_whole, refused
        assert "chat template" in refused
        return "refused"
    assert found == expected
    if caplog.records:
        assert not is_whole
        return "said"
    assert is_whole
    return "equal"


def hinted_as_text(tokenizer):
    """Put the hint into a prompt that the template has rendered before."""
    how = {"tokenize": False, "add_generation_prompt": True}
    before = tokenizer.apply_chat_template([user(QUESTION)], **how)
    return add_hint(before, "72"), tokenizer.apply_chat_template([user(f"{QUESTION} (72)")], **how)


@pytest.fixture
def judged(byte_tokenizer, monkeypatch, caplog):
    """Return a function that judges one case."""
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    byte_tokenizer.add_special_tokens({"bos_token": "<bos>"})

    def judged(name, form):
        byte_tokenizer.chat_template = (TEMPLATES[0].parent / f"{name}.jinja").read_text()
        with caplog.at_level(logging.WARNING):
            return judge(byte_tokenizer, form, caplog)

    return judged


@pytest.mark.parametrize(("name", "form"), DRAWN)
def test_some_templates_are_followed_or_what_they_drop_is_said(judged, name, form) -> None:
    assert judged(name, form) in ("equal", "refused", "said")


@pytest.mark.full
def test_every_template_is_followed_or_what_it_drops_is_said(judged) -> None:
    counts = Counter((form, judged(name, form)) for name, form in CASES)
    print(counts)  # noqa: T201
    for form in ("plain", "few-shot", "hint"):  # but for those that read content in parts alone
        assert counts[form, "equal"] >= len(TEMPLATES) - 6


@pytest.mark.full
def test_what_trl_patches_for_training_is_among_the_templates(byte_tokenizer) -> None:
    texts = {path.read_text() for path in TEMPLATES}
    for path in TEMPLATES:
        byte_tokenizer.chat_template = path.read_text()
        try:
            patched = get_training_chat_template(byte_tokenizer)
        except ValueError:  # it has no patch for this one
            continue
        assert patched is None or patched in texts


def test_a_hint_in_rendered_text_stands_where_it_does_in_messages(
    byte_tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    byte_tokenizer.add_special_tokens({"bos_token": "<bos>"})
    tried = 0
    for path in TEMPLATES:
        byte_tokenizer.chat_template = path.read_text()
        hinted, expected = hinted_as_text(byte_tokenizer)
        if QUESTION in expected:
            tried += 1
            assert hinted == expected, path.name
    assert tried >= len(TEMPLATES) - 6
