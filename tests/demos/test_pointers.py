"""Quiet-STaR's demo task: right answers, remarks as they are asked for, lines held out."""

import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_selfplay.demos.pointers import (
    DASHES,
    IDLE_WORDS,
    NODES,
    REMARK_LENGTH,
    STARTS,
    Remarks,
    build_lines,
    build_tokenizer,
    pointer_split,
    pretrain,
    token_rows,
)


def follow(line, start) -> list[str]:
    """Return the nodes that are passed from a start, read off the line's text."""
    pointers, hops = line["prompt"].split(" ? ")
    target = dict(pair.split() for pair in pointers.split(" ; "))
    assert set(target) == set(target.values()) == set(NODES)
    passed = [start]
    for _ in range(int(hops)):
        passed.append(target[passed[-1]])
    assert len(set(passed)) == len(passed)  # in one cycle nothing comes back so soon
    return passed[1:]


def test_answers_are_where_the_pointers_lead() -> None:
    for line in build_lines(50, seed=0):
        found = re.findall(r"(\w) = (\w)", line["completion"])
        assert [start for start, _ in found] == list(STARTS)
        assert [answer for _, answer in found] == [follow(line, start)[-1] for start in STARTS]
        assert line["prompt"].endswith(f"? {line['hops']}")
        assert DASHES not in line["completion"]


def test_helpful_remarks_are_the_steps() -> None:
    for line in build_lines(50, 1, Remarks(shown=1.0, steps=1.0)):
        found = re.findall(rf"(\w) = {DASHES} (.+?) {DASHES} (\w)", line["completion"])
        assert len(found) == len(STARTS)
        for (start, remark, answer), steps in zip(found, line["steps"], strict=True):
            words = remark.split()
            assert remark == steps
            assert len(words) == REMARK_LENGTH
            passed = follow(line, start)
            assert words == passed + ["_"] * (REMARK_LENGTH - len(passed))
            assert answer == passed[-1]


@pytest.mark.parametrize(("shown", "steps"), [(0.3, 0.5), (1.0, 0.2)])
def test_remarks_come_as_often_as_asked_for(shown, steps) -> None:
    lines = build_lines(2000, 2, Remarks(shown, steps))
    remarks = re.findall(rf"{DASHES} (.+?) {DASHES}", " ".join(r["completion"] for r in lines))
    with_remarks = [DASHES in line["completion"] for line in lines]
    assert sum(with_remarks) / 2000 == pytest.approx(shown, abs=0.04)
    idle = [set(remark.split()) <= set(IDLE_WORDS) for remark in remarks]
    assert 1 - sum(idle) / len(idle) == pytest.approx(steps, abs=0.04)


def test_each_word_is_a_token_and_the_vocabulary_is_small() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) <= 64
    for line in build_lines(20, 3, Remarks(1.0, 0.5)):
        text = line["prompt"] + line["completion"]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
    (row,) = token_rows(tokenizer, [line])
    prompt = len(line["prompt"].split())
    assert row["labels"] == [-100] * prompt + row["input_ids"][prompt:]


@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_the_seed_alone_decides_the_lines(seeds) -> None:
    first, second = (build_lines(20, seed) for seed in seeds)
    assert (first == second) == (seeds[0] == seeds[1])


def test_no_line_is_both_trained_on_and_held_out() -> None:
    train, test, lines = pointer_split(seed=0)
    assert set(train["prompt"]).isdisjoint(test["prompt"])
    assert test["prompt"] == [line["prompt"] for line in lines]
    assert train.column_names == test.column_names == ["prompt", "completion"]
    assert not any(DASHES in text for text in train["completion"])


def test_pre_training_saves_a_model_once(tmp_path) -> None:
    pretrain(tmp_path / "base", seed=0, smoke=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert model.config.vocab_size == len(tokenizer) == len(build_tokenizer())
    assert model.config.num_hidden_layers == 2
    written = (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns
    pretrain(tmp_path / "base", seed=1, smoke=True)
    assert (tmp_path / "base" / "model.safetensors").stat().st_mtime_ns == written
