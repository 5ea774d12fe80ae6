"""Rollouts in another model's tokens: the policy's own text, and nothing else, stays its own."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.rendering import PromptFormatter
from trl_selfplay.rollouts.retokenized import retokenize

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}{{ c.function.arguments | tojson }}]{% endfor %}"
    "{% if m.role == 'assistant' %}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
MESSAGES = (
    {"role": "assistant", "content": "look", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "3</s>"},
    {"role": "tool", "name": "add", "content": "three"},
    {"role": "assistant", "content": "It is 3"},
)


@pytest.fixture
def pairs_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with some of them merged, and other special tokens than the policy's."""
    special = {"pad_token": "<p>", "eos_token": "</s>", "unk_token": "<u>"}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("i", "s"), ("Ġ", "is"), ("t", "h"), ("r", "e")]
    words = [*special.values(), *alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, **special)


def row_of(prompt) -> PromptRow:
    return PromptRow("p", prompt, None, {}, 0, "train_dataset")


def rollout_of(tokenizer, prompt, parts, finish="eos", messages=()) -> Rollout:
    """A rollout whose parts (text, whether the policy wrote it) are tokenized one by one."""
    pieces = [(tokenizer.encode(text, add_special_tokens=False), own) for text, own in parts]
    ids = [token for piece, _ in pieces for token in piece]
    mask = [own for piece, own in pieces for _ in piece]
    if finish == "eos":
        ids, mask = [*ids, tokenizer.eos_token_id], [*mask, True]
    return Rollout(
        round_index=0, phase="train", prompt_id="p", sample_index=0, completion_ids=tuple(ids),
        prompt_ids=tuple(tokenizer.encode(prompt)), prompt=prompt, completion="", finish=finish,
        completion_mask=None if all(mask) else tuple(mask), messages=messages,
    )  # fmt: skip


def texts_by_author(tokenizer, rollout) -> list[tuple[str, bool]]:
    mask = rollout.completion_mask or (True,) * len(rollout.completion_ids)
    texts = []
    for token, own in zip(rollout.completion_ids, mask, strict=True):
        text = tokenizer.decode([token])
        if texts and texts[-1][1] == own:
            texts[-1] = (texts[-1][0] + text, own)
        else:
            texts.append((text, own))
    return texts


@pytest.mark.parametrize("finish", ["eos", "stop"])
def test_text_stays_as_it_is_and_ends_as_it_ended(byte_tokenizer, pairs_tokenizer, finish) -> None:
    given = rollout_of(byte_tokenizer, "Why? ", [("this is é", True)], finish)
    [found], missing = retokenize(
        [given], byte_tokenizer, PromptFormatter(pairs_tokenizer), (1,), {}
    )
    assert not missing
    assert found.finish == finish
    assert found.completion_mask is None
    assert pairs_tokenizer.decode(found.completion_ids) == "this is é" + "</s>" * (finish == "eos")
    assert len(found.completion_ids) < len(given.completion_ids)


def test_what_a_tool_said_never_becomes_the_policys_text(byte_tokenizer, pairs_tokenizer) -> None:
    """RA-2: also where tokens could merge across the boundary, or the tool writes the student's EOS."""
    parts = [("Action: th", True), ("is</s>", False), ("re is", True)]
    given = rollout_of(byte_tokenizer, "Q", parts)
    [found], _ = retokenize([given], byte_tokenizer, PromptFormatter(pairs_tokenizer), (1,), {})
    parts[-1] = ("re is</s>", True)
    assert texts_by_author(pairs_tokenizer, found) == parts
    assert found.completion_ids.count(pairs_tokenizer.eos_token_id) == 1


def test_messages_are_rendered_by_the_students_template_turn_by_turn(
    byte_tokenizer, pairs_tokenizer
) -> None:
    """RA-2, with the independent rendering of the whole conversation."""
    row = row_of([{"role": "user", "content": "1 + 2?"}])
    given = rollout_of(byte_tokenizer, "x", [("unread", True)], messages=MESSAGES)
    formatter = PromptFormatter(pairs_tokenizer)
    [found], missing = retokenize([given], byte_tokenizer, formatter, (1,), {"p": row})
    assert not missing
    assert texts_by_author(pairs_tokenizer, found) == [
        ('look[add{"a": 1, "b": 2}]</s>', True),
        ("\n<tool>3</s><tool>three<assistant>", False),
        ("It is 3</s>", True),
    ]
    whole = pairs_tokenizer.apply_chat_template([*row.prompt, *MESSAGES], tokenize=False)
    prompt = formatter.token_ids(row, few_shot=False)
    assert pairs_tokenizer.decode([*prompt, *found.completion_ids]) == whole.rstrip("\n")


def test_what_cannot_be_told_exactly_is_counted_by_its_cause(
    byte_tokenizer, pairs_tokenizer, word_tokenizer
) -> None:
    row = row_of([{"role": "user", "content": "1 + 2?"}])
    given = rollout_of(byte_tokenizer, "x", [("unread", True)], messages=MESSAGES)
    pairs_tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if loop.last or m.role != 'assistant' %}{{ m.content }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )  # earlier turns lose their text
    found, missing = retokenize(
        [given], byte_tokenizer, PromptFormatter(pairs_tokenizer), (1,), {"p": row}
    )
    assert not found
    assert list(missing) == [
        "turns that the student's chat template renders otherwise once others follow"
    ]
    plain = rollout_of(byte_tokenizer, "Q 1 ", [("yes sir", True)])
    found, missing = retokenize([plain], byte_tokenizer, PromptFormatter(word_tokenizer), (1,), {})
    assert (found, dict(missing)) == ([], {"text that the student's tokenizer doesn't know": 1})
