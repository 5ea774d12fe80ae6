"""Rows of SFT and preference datasets become prompts and the tokens of completions."""

import logging

import pytest
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast
from trl import extract_prompt

from trl_selfplay.rewards import exact_reward
from trl_selfplay.rollouts.completions import drop_long_rows, load_chosen_rows, tokenize_chosen
from trl_selfplay.rollouts.rendering import PromptFormatter

USER, ASSISTANT = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yo")))


def load(*records):
    return load_chosen_rows(Dataset.from_list(list(records)), "train_dataset")


def test_completions_that_share_no_prompt_are_refused_with_what_is_missing() -> None:
    dataset = Dataset.from_list([{"chosen": " so 8", "rejected": " no"}])
    with pytest.raises(ValueError, match=r"row 0: there is no `prompt`.* Add the column `prompt`"):
        load_chosen_rows(dataset, "train_dataset")


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "hi", "completion": "yo"},
        {"prompt": "hi", "chosen": "yo", "rejected": "no"},
        {"messages": [USER, ASSISTANT]},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"prompt": [USER], "chosen": [ASSISTANT]},
        {"prompt": [USER], "chosen": [USER, ASSISTANT]},
        {"prompt": "hi", "chosen": [USER, ASSISTANT]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
    ],
)
def test_all_forms_of_a_dataset_give_prompt_and_completion(record, caplog) -> None:
    with caplog.at_level(logging.WARNING):
        (row,) = load(record)
    conversational = not isinstance(record.get("completion", record.get("chosen")), str)
    assert row.prompt == ([USER] if conversational else "hi")
    assert row.solution == ([ASSISTANT] if conversational else "yo")
    assert ("`rejected` is not used" in caplog.text) == ("rejected" in record)


def test_the_last_assistant_turn_is_the_completion() -> None:
    (row,) = load({"messages": [USER, ASSISTANT, USER, ASSISTANT]})
    assert row.prompt == [USER, ASSISTANT, USER]


@pytest.mark.parametrize(
    ("record", "kind", "message"),
    [
        ({"prompt": "hi", "solution": "4"}, ValueError, "has no completions to learn from"),
        ({"messages": [USER, ASSISTANT, USER]}, ValueError, "ends with a turn of the role 'user'"),
        ({"messages": [ASSISTANT]}, ValueError, "no prompt before"),
        ({"prompt": "hi", "completion": " "}, ValueError, "row 0: the completion is ' '"),
        ({"prompt": "hi", "completion": None}, ValueError, "the completion is None"),
        ({"prompt": [USER], "completion": "yo"}, TypeError, "give both as text"),
    ],
)
def test_a_row_that_cannot_work_is_refused(record, kind, message) -> None:
    with pytest.raises(kind, match=message):
        load(record)


def test_datasets_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="finite set"):
        load_chosen_rows(IterableDataset.from_generator(lambda: iter([])), "train_dataset")
    with pytest.raises(TypeError, match=r"must be a `datasets.Dataset`.*got list"):
        load_chosen_rows([], "train_dataset")
    empty = Dataset.from_dict({"prompt": [], "completion": []})
    with pytest.raises(ValueError, match="is empty"):
        load_chosen_rows(empty, "train_dataset")


def tokens_of(tokenizer, record):
    rows = load(record)
    formatter = PromptFormatter(tokenizer)
    (tokens,) = tokenize_chosen(
        formatter, rows, (tokenizer.eos_token_id,), tokenizer.eos_token_id
    ).values()
    return tokenizer, tokens


def test_chat_tokens_are_the_template_of_both_minus_that_of_the_prompt(chat_tokenizer) -> None:
    """SP-8: the prompt with its generation prompt, as sampled from."""
    tokenizer, tokens = tokens_of(chat_tokenizer, {"messages": [USER, ASSISTANT]})
    assert tokenizer.decode(list(tokens.prompt_ids)) == "<user>hi<eos><assistant>"
    assert tokenizer.decode(list(tokens.chosen_ids)) == "yo<eos>"


def test_what_a_template_adds_after_eos_is_left_out(chat_tokenizer) -> None:
    """SP-9: no sampled completion has it."""
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "<eos>{% endfor", "<eos>\n{% endfor"
    )
    tokenizer, tokens = tokens_of(chat_tokenizer, {"messages": [USER, ASSISTANT]})
    assert tokenizer.decode(list(tokens.prompt_ids)).endswith("<eos>\n<assistant>")
    assert tokenizer.decode(list(tokens.chosen_ids)) == "yo<eos>"


@pytest.mark.parametrize("between", ["", "\n"])
def test_of_two_ends_that_a_template_writes_the_first_counts(chat_tokenizer, between) -> None:
    """SP-9: the policy stops at the first; one inside the text is the data's own."""
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "<eos>{% endfor", f"<end>{between}<eos>{{% endfor"
    )
    end = chat_tokenizer.convert_tokens_to_ids("<end>")
    for text in ("yo", "yo<end>yo"):
        rows = load({"messages": [USER, {"role": "assistant", "content": text}]})
        (tokens,) = tokenize_chosen(
            PromptFormatter(chat_tokenizer), rows, (end, chat_tokenizer.eos_token_id), end
        ).values()
        assert chat_tokenizer.decode(list(tokens.chosen_ids)) == f"{text}<end>"


def test_a_template_that_renders_the_prompt_otherwise_is_refused(chat_tokenizer) -> None:
    """SP-8."""
    chat_tokenizer.chat_template = chat_tokenizer.chat_template.replace(
        "<assistant>{% endif", "<assistant>so {% endif"
    )
    with pytest.raises(ValueError, match="another prompt than the one trained on"):
        tokens_of(chat_tokenizer, {"messages": [USER, ASSISTANT]})


def test_plain_completions_get_one_eos(byte_tokenizer) -> None:
    for text in ("yo", "yo<eos>"):
        tokenizer, tokens = tokens_of(byte_tokenizer, {"prompt": "hi", "completion": text})
        assert tokenizer.decode(list(tokens.chosen_ids)) == "yo<eos>"


def test_long_rows_are_left_out_and_counted(byte_tokenizer, caplog) -> None:
    rows = load({"prompt": "hi", "completion": "yo"}, {"prompt": "a", "completion": "b" * 50})
    tokens = tokenize_chosen(PromptFormatter(byte_tokenizer), rows, (1,), 1)
    with caplog.at_level(logging.WARNING):
        kept = drop_long_rows(rows, tokens, 20, 2, "train_dataset")
    assert [row.prompt for row in kept] == ["hi"]
    assert "1 of 2 rows are longer than max_length=20" in caplog.text
    assert "longer than max_completion_length=2" in caplog.text
    with pytest.raises(ValueError, match="so none is left"):
        drop_long_rows(rows, tokens, 4, 2, "train_dataset")


def test_completions_to_avoid_are_left_out(caplog) -> None:
    """KTO's rows: `label` says which completions are good."""
    with caplog.at_level(logging.WARNING):
        (row,) = load(
            {"prompt": "hi", "completion": "yo", "label": True},
            {"prompt": "hi", "completion": "no", "label": False},
        )
    assert row.solution == "yo"
    assert "1 of 2 rows of `train_dataset` have label=False" in caplog.text
    with pytest.raises(ValueError, match="no completion to learn from"):
        load({"prompt": "hi", "completion": "no", "label": False})


def test_a_prompt_that_both_completions_begin_with_is_split_off_as_in_trl() -> None:
    record = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
    expected = extract_prompt(record)
    (row,) = load(record)
    assert (row.prompt, row.solution) == (expected["prompt"], expected["chosen"])
    with pytest.raises(
        TypeError, match=r"`chosen` is 'The sky is blue\.', and there is no `prompt`"
    ):
        load({"chosen": "The sky is blue."})


def test_a_tool_call_and_thoughts_are_completions() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    thought = {**ASSISTANT, "thinking": "hm"}
    for completion in (call, thought):
        (row,) = load({"prompt": [USER], "completion": [completion]})
        assert row.solution == [completion]


@pytest.mark.parametrize(
    ("completion", "message"),
    [
        ([{"role": "assistant"}], "row 0, the completion .*the content is None"),
        ([{"role": "assistant", "content": 5}], "row 0, the completion .*the content is 5"),
        ([{"content": "yo"}], "row 0: the last of the messages is"),
    ],
)
def test_a_completion_that_is_no_message_names_the_row(completion, message) -> None:
    with pytest.raises(TypeError, match=message):
        load({"prompt": [USER], "completion": completion})


def test_after_a_prompt_that_ends_in_a_space_a_completion_begins_without_one() -> None:
    """SentencePiece puts a space before a text; a model that goes on writes none."""
    words = ["<unk>", "<s>", "</s>", "▁Answer", "▁yes", "yes", "▁", ":", "<0x0A>", *"Answeryos"]
    vocabulary = [(w, -1.0 if len(w) > 1 else -5.0) for w in dict.fromkeys(words)]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    for prompt, text in (("Answer: ", "yes"), ("Answer:", " yes")):
        tokenizer, tokens = tokens_of(tokenizer, {"prompt": prompt, "completion": text})
        both = [*tokens.prompt_ids, *tokens.chosen_ids[:-1]]
        assert tokenizer.decode(both) == "Answer: yes"


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas"])
def test_the_format_of_a_dataset_has_no_influence(kind) -> None:
    records = [{"prompt": "hi", "completion": "yo", "label": i == 1, "n": i} for i in range(2)]
    dataset = Dataset.from_list(records)
    (row,) = load_chosen_rows(dataset.with_format(kind), "train_dataset")
    assert [row] == load_chosen_rows(dataset, "train_dataset")
    assert type(row.columns["n"]) is int


def test_rows_that_graders_tell_apart_are_not_merged() -> None:
    rows = Dataset.from_list(
        [{"prompt": "a", "completion": "b", "solution": s, "id": i} for i, s in enumerate("112")]
    )
    assert len(load_chosen_rows(rows, "d")) == 1
    found = load_chosen_rows(rows, "d", reward_funcs=exact_reward)
    assert sorted(row.columns["solution"] for row in found) == ["1", "2"]
