"""Exported text of a tokenizer whose decoder drops the space at the beginning, as Llama 2's does."""

import json
from itertools import count

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from trl_selfplay.inspection.export import export_run

SPACE = "\u2581"
USER, BEGUN = {"role": "user", "content": "q"}, {"role": "assistant", "content": "so"}


@pytest.fixture(scope="module")
def tokenizer():
    """SentencePiece's form: a word is one token with the space before it."""
    words = ["q", "so", "y", "="]
    pieces = [SPACE, *words, *(SPACE + word for word in words), "s", "o"]
    vocabulary = {piece: i for i, piece in enumerate(["<pad>", "<eos>", "<unk>", *pieces])}
    merges = [("s", "o"), *((SPACE, word) for word in words)]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


@pytest.fixture
def export(write_run, tokenizer, tmp_path):
    """Export completions of a prompt, given as tokens, and return rows and tokens."""

    number = count()

    def export(prompt, completions, kind="sft", **options):
        samples = []
        for index, tokens in enumerate(completions):
            ids = tokenizer.convert_tokens_to_ids([*tokens, "<eos>"])
            assert tokenizer.unk_token_id not in ids
            samples.append(
                {
                    "row": 0,
                    "sample_index": index,
                    "outcome": "kept" if index % 2 == 0 else "failed",
                    "completion_ids": tuple(ids),
                    "completion": tokenizer.decode(ids[:-1]),
                }
            )
        run = write_run([{"prompt": prompt, "solution": "y"}], [samples], f"run-{next(number)}")
        tokenizer.save_pretrained(run.output_dir)
        path = tmp_path / "rows.jsonl"
        export_run(run, kind, path, overwrite=True, **options)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return rows, [sample["completion_ids"][:-1] for sample in samples]

    return export


@pytest.mark.parametrize("first", [f"{SPACE}y", "y", SPACE])
def test_prompt_and_completion_tokenize_to_what_was_sampled(export, tokenizer, first) -> None:
    completion = [first, "=" if first == SPACE else f"{SPACE}q"]
    merged = [f"{SPACE}="] if first == SPACE else completion  # as the text is read
    rows, _ = export("so q =", [completion])
    ids = tokenizer(rows[0]["prompt"] + rows[0]["completion"]).input_ids
    assert (
        tokenizer.convert_ids_to_tokens(ids) == [f"{SPACE}{w}" for w in ("so", "q", "=")] + merged
    )


def test_both_sides_of_a_pair_have_the_space_that_was_sampled(export, tokenizer) -> None:
    rows, sampled = export("so q =", [[f"{SPACE}y"], [f"{SPACE}q"]], kind="dpo")
    prompt = tokenizer(rows[0]["prompt"]).input_ids
    for side, ids in zip(("chosen", "rejected"), sampled, strict=True):
        assert tokenizer(rows[0]["prompt"] + rows[0][side]).input_ids == [*prompt, *ids]


def test_a_message_has_the_space_only_where_it_goes_on(export) -> None:
    rows, _ = export([USER, BEGUN], [[f"{SPACE}y"]])
    assert rows[0]["completion"][0]["content"] == "so y"
    rows, _ = export([USER], [[f"{SPACE}y"]])
    assert rows[0]["completion"][0]["content"] == "y"
    rows, _ = export("q", [[f"{SPACE}y"]], form="messages")
    assert rows[0]["messages"][-1]["content"] == "y"


def test_a_tokenizer_that_cannot_be_loaded_leaves_the_text_as_it_was_graded(
    write_run, tmp_path, caplog
) -> None:
    run = write_run([{"prompt": "q", "solution": "y"}], [[{"row": 0, "outcome": "kept"}]])
    (run.output_dir / "tokenizer_config.json").write_text("{")
    export_run(run, "sft", tmp_path / "rows.jsonl")
    assert json.loads((tmp_path / "rows.jsonl").read_text())["completion"] == "so 3"
    assert "can't be loaded" in caplog.text
