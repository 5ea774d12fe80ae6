"""Log-probs of kept answers with and without their rationales, compared with a naive forward."""

import json

import pytest
import torch

from trl_selfplay.commands.dispatch import main
from trl_selfplay.inspection.faithfulness import (
    Parts,
    Score,
    answer_place,
    foreign_rationales,
    score_run,
    split_completion,
    summarize,
)


@pytest.mark.parametrize(
    ("text", "cue", "answer"),
    [
        ("3 + 4 = 7, so the answer is 7.", "the answer is ", "7"),
        ("Adding gives 7.\n#### 7", "#### ", "7"),
        (r"So $3 + 4 = 7$, which is \boxed{7}.", r"\boxed{", "7"),
        ("<think>4? The answer is 4. No: 7.</think>The answer is 7", "The answer is ", "7"),
        ("The answer is 7. I checked that 7 is right.", "The answer is ", "7"),
    ],
)
def test_an_answer_is_found_where_the_grader_reads_it(text, cue, answer) -> None:
    start, place, end = answer_place(text)
    assert text[start:place] == cue
    assert text[place:end] == answer


def test_a_text_without_an_answer_has_no_place() -> None:
    assert answer_place("3 + 4, let me think") is None


def test_a_completion_is_split_into_its_own_tokens(chat_tokenizer) -> None:
    text = "3 + 4 is é. The answer is 7. Good."
    ids = chat_tokenizer(text, add_special_tokens=False).input_ids
    parts = split_completion(ids, chat_tokenizer.decode)
    found = [chat_tokenizer.decode(p) for p in (parts.rationale, parts.cue, parts.answer)]
    assert found == ["3 + 4 is é. ", "The answer is ", "7"]
    assert (*parts.rationale, *parts.cue, *parts.answer) == tuple(ids[: -len(". Good.")])


@pytest.mark.parametrize(
    ("text", "why"),
    [("The answer is 7.", "nothing before the answer"), ("3 + 4", "no answer found in it")],
)
def test_what_cannot_be_split_says_why(chat_tokenizer, text, why) -> None:
    ids = chat_tokenizer(text, add_special_tokens=False).input_ids
    assert split_completion(ids, chat_tokenizer.decode) == why


def test_every_completion_gets_the_rationale_of_another_prompt_with_another_answer() -> None:
    prompt_ids = ["a", "a", "b", "c", "d"]
    texts = ["1", "1", "1", "2", "3"]
    parts = [Parts((i,), (), (9,), text) for i, text in enumerate(texts)]
    found = foreign_rationales(prompt_ids, parts)
    for place, rationale in enumerate(found):
        assert prompt_ids[rationale[0]] != prompt_ids[place]
        assert texts[rationale[0]] != texts[place]
    assert found == foreign_rationales(prompt_ids, parts)
    assert foreign_rationales(["a", "a"], parts[:2]) == [None, None]


def test_means_are_over_prompts_and_intervals_hold_them() -> None:
    def score(prompt_id, own, foreign, hinted=False):
        return Score(0, prompt_id, 0, hinted, 1, own, -3.0, foreign)

    scores = [score("a", -1.0, -5.0), score("a", -2.0, -5.0), score("b", -3.0, None, hinted=True)]
    groups = summarize(scores)["groups"]
    assert list(groups) == ["all", "without hint", "rationalized"]
    found = groups["all"]
    assert (found["completions"], found["prompts"]) == (3, 2)
    assert found["own"]["mean"] == pytest.approx((-1.5 - 3.0) / 2)
    assert found["own - dropped"]["mean"] == pytest.approx((1.5 + 0.0) / 2)
    assert found["own - foreign"] == {"mean": 3.5}  # of prompt a alone: no spread is known
    assert found["own"]["low"] <= found["own"]["mean"] <= found["own"]["high"]
    assert "own - foreign" not in groups["rationalized"]


@pytest.fixture
def run(write_run, chat_tokenizer, tiny_model):
    """A run of two chat prompts and its final model."""
    records = [
        {"prompt": [{"role": "user", "content": f"{a} + 4"}], "solution": str(a + 4)}
        for a in (3, 1)
    ]
    texts = ["3 and 4. The answer is 7.", "1 and 4. The answer is 5.", "The answer is 5."]
    samples = [
        {
            "row": row,
            "outcome": "kept",
            "sample_index": index,
            "completion": text,
            "completion_ids": (*chat_tokenizer(text, add_special_tokens=False).input_ids, 1),
        }
        for index, (row, text) in enumerate(zip((0, 1, 1), texts, strict=True))
    ]
    run = write_run(records, [samples])
    tiny_model(chat_tokenizer).save_pretrained(run.output_dir)
    chat_tokenizer.save_pretrained(run.output_dir)
    return run


def test_scores_are_log_probs_of_the_models_own_forward(
    run, chat_tokenizer, tiny_model, capsys
) -> None:
    assert main(["score", str(run.output_dir)]) == 0
    shown = capsys.readouterr().out
    assert "not scored: 33% (1 nothing before the answer)" in shown
    found = json.loads((run.root / "faithfulness.json").read_text())
    assert (found["kept"], found["tried"], len(found["completions"])) == (3, 3, 2)
    model = tiny_model(chat_tokenizer)

    def logp(prompt, before, answer):
        ids = chat_tokenizer(f"<user>{prompt}<eos><assistant>{before}{answer}").input_ids
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -2].double()
        return float(logits.log_softmax(-1)[ids[-1]])

    of_prompt = {c["sample_index"]: c for c in found["completions"]}
    for index, (prompt, own, other, answer) in enumerate(
        [("3 + 4", "3 and 4. ", "1 and 4. ", "7"), ("1 + 4", "1 and 4. ", "3 and 4. ", "5")]
    ):
        cue = "The answer is "
        score = of_prompt[index]
        assert score["answer_tokens"] == 1
        assert score["own"] == pytest.approx(logp(prompt, own + cue, answer), abs=1e-4)
        assert score["dropped"] == pytest.approx(logp(prompt, cue, answer), abs=1e-4)
        assert score["foreign"] == pytest.approx(logp(prompt, other + cue, answer), abs=1e-4)
    assert score_run(run, limit=1)["tried"] == 1


def test_a_hinted_completion_is_scored_after_the_examples_of_training(
    write_run, chat_tokenizer, tiny_model
) -> None:
    def ids(text):
        return tuple(chat_tokenizer(text, add_special_tokens=False).input_ids)

    shown, text = ids("9 + 9 so 18\n\n3 + 4"), "3 and 4. The answer is 7"
    samples = [
        {"row": 0, "outcome": "failed", "prompt_ids": shown},
        {
            "row": 0,
            "outcome": "kept",
            "sample_index": 1,
            "hinted": True,
            "prompt_ids": ids("9 + 9 (18) so 18\n\n3 + 4 (7)"),
            "completion": text,
            "completion_ids": (*ids(text), 1),
        },
    ]
    run = write_run([{"prompt": "3 + 4", "solution": "7"}], [samples], few_shot_in_training=True)
    model = tiny_model(chat_tokenizer)
    model.save_pretrained(run.output_dir)
    chat_tokenizer.save_pretrained(run.output_dir)
    (score,) = score_run(run)["completions"]
    with torch.no_grad():
        logits = model(torch.tensor([[*shown, *ids(text)]])).logits[0, -2].double()
    assert score["own"] == pytest.approx(float(logits.log_softmax(-1)[ids("7")[0]]), abs=1e-4)


def test_the_command_says_what_is_missing(write_run, capsys) -> None:
    sample = {"row": 0, "outcome": "failed"}
    run = write_run([{"prompt": "1 + 2", "solution": "3"}], [[sample]])
    assert main(["score", str(run.output_dir)]) == 2
    assert "has no final model" in capsys.readouterr().err
    (run.output_dir / "config.json").touch()
    assert main(["score", str(run.output_dir)]) == 2
    assert "no completions of these rounds" in capsys.readouterr().err
    assert main(["score", str(run.output_dir), "--rounds", "4"]) == 2
    assert "has samples of round 0; asked for [4]" in capsys.readouterr().err


def test_a_run_with_tools_is_not_scored(write_run) -> None:
    kept = [{"row": 0, "outcome": "kept"}]
    run = write_run(
        [{"prompt": "1 + 2", "solution": "3"}], [kept], **{"tools.add.description": "Add."}
    )
    with pytest.raises(ValueError, match="had tools: its prompts show them"):
        score_run(run, "any-model")
