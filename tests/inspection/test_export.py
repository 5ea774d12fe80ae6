"""Rows of a run for other trainers, compared with what was written into the run's folder."""

import json

import pyarrow.parquet as pq
import pytest

from trl_selfplay.commands.dispatch import main
from trl_selfplay.inspection.export import export_run
from trl_selfplay.inspection.row_forms import Example, to_row
from trl_selfplay.rollouts.kept_prompts import KeptPrompt
from trl_selfplay.rollouts.stored import save_history

TEXT = [{"prompt": "Q 1 + 2 = ?", "solution": "3"}, {"prompt": "Q 2 + 2 = ?", "solution": "4"}]
SYSTEM, USER = {"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 2"}
CHAT = [{"prompt": [SYSTEM, USER], "solution": "3", "tools": [{"type": "function"}]}]

ROUNDS = [
    [
        {"row": 0, "outcome": "kept", "sample_index": 0, "completion": "so 3"},
        {"row": 0, "outcome": "duplicate", "sample_index": 1, "completion": "so  3"},
        {"row": 0, "outcome": "failed", "sample_index": 2, "completion": "so 4", "reward": 0.0},
        {"row": 0, "outcome": "truncated", "sample_index": 3, "completion": "so so so"},
        {"row": 1, "outcome": "failed", "sample_index": 0, "completion": "so 5", "reward": 0.0},
        {"row": 1, "outcome": "abstained", "sample_index": 1, "completion": "no", "reward": None},
        {"row": 1, "outcome": "kept", "sample_index": 4, "completion": "so 4", "hinted": True},
        {"row": 1, "outcome": "leaked", "sample_index": 5, "completion": "4", "hinted": True},
        {"row": 1, "outcome": "failed", "sample_index": 6, "completion": "6", "hinted": True},
    ],
    [
        {"row": 0, "outcome": "kept", "sample_index": 0, "completion": "so 3"},
        {"row": 0, "outcome": "failed", "sample_index": 1, "completion": "so 4", "reward": 0.0},
        {"row": 1, "outcome": "kept", "sample_index": 0, "completion": "2 + 2 = 4"},
    ],
]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def export(tmp_path):
    """Export a run to a new file and return its rows."""

    def export(run, kind, **options):
        path = tmp_path / f"{kind}.jsonl"
        count = export_run(run, kind, path, overwrite=True, **options)
        rows = read(path)
        assert len(rows) == count
        return rows

    return export


def test_sft_rows_are_what_was_trained_on_without_repeats_and_with_their_origin(
    write_run, export
) -> None:
    rows = export(write_run(TEXT, ROUNDS), "sft")
    assert [(r["prompt"], r["completion"], r["round"], r["hinted"]) for r in rows] == [
        ("Q 1 + 2 = ?", "so 3", 0, False),
        ("Q 2 + 2 = ?", "so 4", 0, True),
        ("Q 2 + 2 = ?", "2 + 2 = 4", 1, False),
    ]
    assert {key: rows[2][key] for key in ("sample_index", "reward", "outcome", "sampled_from")} == {
        "sample_index": 0,
        "reward": 1.0,
        "outcome": "kept",
        "sampled_from": "round 0",
    }
    assert len(export(write_run(TEXT, ROUNDS, "again"), "sft", rounds=[1])) == 2


def test_sft_rows_include_what_a_round_took_from_an_earlier_one(write_run, export) -> None:
    samples = [dict(sample) for sample in ROUNDS[0]]
    samples[1]["outcome"] = "capped"
    run = write_run(TEXT, [samples, ROUNDS[1]])
    taken = [r for r, outcome in run.rollouts(0) if outcome == "capped"]
    save_history(run.folder(1) / "history.parquet", taken)
    found = [(r["completion"], r["round"], r["outcome"]) for r in export(run, "sft", rounds=[1])]
    assert found == [("so 3", 1, "kept"), ("2 + 2 = 4", 1, "kept"), ("so  3", 0, "capped")]
    assert len(export(run, "sft")) == 4
    save_history(run.folder(1) / "history.parquet", [])
    assert len(export(run, "sft")) == 3


def test_dpo_rows_pair_each_completion_once_with_a_wrong_one_of_its_round(
    write_run, export
) -> None:
    rows = export(write_run(TEXT, ROUNDS), "dpo")
    keys = ("prompt", "chosen", "rejected", "round", "chosen_reward", "rejected_reward")
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("Q 1 + 2 = ?", "so 3", "so 4", 0, 1.0, 0.0)  # round 1 has the same pair
    ]


def test_kto_rows_are_right_or_wrong_and_nothing_else(write_run, export) -> None:
    rows = export(write_run(TEXT, ROUNDS), "kto")
    assert [(row["completion"], row["label"]) for row in rows] == [
        ("so 3", True),
        ("so  3", True),
        ("so 4", False),
        ("so 5", False),
        ("so 4", True),
        ("2 + 2 = 4", True),
    ]


def test_parquet_holds_every_sample_as_it_is_on_disk(write_run, tmp_path) -> None:
    run = write_run(TEXT, ROUNDS)
    assert export_run(run, "parquet", tmp_path / "all.parquet") == 12
    table = pq.read_table(tmp_path / "all.parquet").to_pylist()
    stored = [item for index in (0, 1) for item in run.rollouts(index)]
    for row, (rollout, outcome) in zip(table, stored, strict=True):
        assert row["outcome"] == outcome
        assert row["prompt"] in ("Q 1 + 2 = ?", "Q 2 + 2 = ?")
        assert row["rendered_prompt"] == rollout.prompt
        for name in ("prompt_id", "sample_index", "completion", "reward", "round_index"):
            assert row[name] == getattr(rollout, name)
        assert tuple(row["completion_ids"]) == rollout.completion_ids


def test_an_opponents_completions_are_rejected_sides_and_nothing_else(write_run, export) -> None:
    samples = [
        {"row": 0, "outcome": "kept", "completion": "no", "reward": None, "rewards": ()},
        {"row": 1, "outcome": "identical", "completion": "4", "reward": None, "rewards": ()},
    ]
    run = write_run(TEXT, [samples], method="SPIN")
    rows = export(run, "dpo")
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in rows] == [("Q 1 + 2 = ?", "3", "no")]
    for kind in ("sft", "kto"):
        with pytest.raises(ValueError, match="nothing graded the completions"):
            export(run, kind)


def test_unranked_steps_of_an_agent_are_those_that_were_trained_on_and_no_more(
    write_run, export
) -> None:
    """A step's sample that went on, without a reward; which others are right nobody knows."""
    samples = [
        {"row": 0, "outcome": outcome, "sample_index": i, "reward": None, "rewards": ()}
        for i, outcome in enumerate(("capped", "kept", "failed"))
    ]
    run = write_run(TEXT, [samples], method="ReST^EM", agent=["FactAgent"])
    assert [row["sample_index"] for row in export(run, "sft")] == [1]
    for kind in ("dpo", "kto"):
        with pytest.raises(ValueError, match="nothing graded the samples of the agent's steps"):
            export(run, kind)


def test_parquet_and_lines_hold_the_same_rows_also_of_messages(write_run, export, tmp_path) -> None:
    samples = [{"row": 0, "outcome": "kept", "reward": None}, {"row": 0, "outcome": "kept"}]
    samples[1] |= {"sample_index": 1, "completion": "3"}
    run = write_run(CHAT, [samples])
    export_run(run, "sft", tmp_path / "rows.parquet")
    rows = export(run, "sft")
    assert pq.read_table(tmp_path / "rows.parquet").to_pylist() == rows
    assert rows[0]["prompt"] == [SYSTEM, USER]
    assert rows[0]["completion"] == [{"role": "assistant", "content": "so 3"}]
    assert rows[0]["tools"] == [{"type": "function"}]


def _example(prompt, **completions):
    return Example(KeptPrompt(prompt, "3", {}), completions)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("trl", {"prompt": [SYSTEM, USER], "completion": [{"role": "assistant", "content": "3"}]}),
        ("messages", {"messages": [SYSTEM, USER, {"role": "assistant", "content": "3"}]}),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "system", "value": "Add."},
                    {"from": "human", "value": "1 + 2"},
                    {"from": "gpt", "value": "3"},
                ]
            },
        ),
        ("alpaca", {"instruction": "1 + 2", "input": "", "output": "3", "system": "Add."}),
    ],
)
def test_a_completion_in_each_form(form, expected) -> None:
    assert to_row(_example([SYSTEM, USER], completion="3"), form) == expected


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("trl", {"prompt": "1 + 2", "chosen": "3", "rejected": "4"}),
        (
            "messages",
            {
                "messages": [USER],
                "chosen": {"role": "assistant", "content": "3"},
                "rejected": {"role": "assistant", "content": "4"},
            },
        ),
        (
            "sharegpt",
            {
                "conversations": [{"from": "human", "value": "1 + 2"}],
                "chosen": {"from": "gpt", "value": "3"},
                "rejected": {"from": "gpt", "value": "4"},
            },
        ),
        ("alpaca", {"instruction": "1 + 2", "input": "", "chosen": "3", "rejected": "4"}),
    ],
)
def test_a_pair_of_a_text_prompt_in_each_form(form, expected) -> None:
    assert to_row(_example("1 + 2", chosen="3", rejected="4"), form) == expected


def test_a_completion_that_continues_an_assistant_turn_is_one_message_with_it() -> None:
    row = to_row(_example([USER, {"role": "assistant", "content": "So"}], completion=" 3"), "trl")
    assert row == {"prompt": [USER], "completion": [{"role": "assistant", "content": "So 3"}]}


@pytest.mark.parametrize("form", ["sharegpt", "alpaca"])
def test_a_prompt_that_a_form_cannot_hold_is_refused_with_another_form(form) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "1 + 2"}]}]
    with pytest.raises(ValueError, match=r"no place in --form \w+.*Use --form messages"):
        to_row(_example(parts, completion="3"), form)


def test_the_command_writes_a_file_once_and_replaces_it_on_request(
    write_run, tmp_path, monkeypatch, capsys
) -> None:
    run = write_run(TEXT, ROUNDS)
    monkeypatch.chdir(tmp_path)
    flags = [str(run.output_dir), "--as", "sft"]
    assert main(["export", *flags]) == 0
    assert "3 rows in run-sft.jsonl" in capsys.readouterr().out
    before = (tmp_path / "run-sft.jsonl").read_bytes()
    assert main(["export", *flags]) == 2
    assert "--force" in capsys.readouterr().err
    assert main(["export", *flags, "--force"]) == 0
    assert (tmp_path / "run-sft.jsonl").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--as", "sft", "--out", "rows.csv"], "must end in .jsonl or .parquet"),
        (["--as", "sft", "--rounds", "0", "7"], "no samples of round 7; it has those of 0, 1"),
        (["--as", "dpo", "--rounds", "1", "--form", "alpaca"], None),
    ],
)
def test_the_command_says_what_is_wrong(write_run, tmp_path, monkeypatch, capsys, flags, message):
    run = write_run(TEXT, ROUNDS)
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run.output_dir), *flags]) == (0 if message is None else 2)
    assert message is None or message in capsys.readouterr().err


def test_a_run_of_an_earlier_version_is_told_how_to_get_its_prompts(write_run, export) -> None:
    run = write_run(TEXT, ROUNDS)
    (run.root / "prompts.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="Resume it once"):
        export(run, "sft")


def test_nothing_is_left_behind_where_a_row_cannot_be_written(write_run, tmp_path) -> None:
    turns = [USER, {"role": "assistant", "content": "?"}, USER]
    run = write_run([{"prompt": turns, "solution": "3"}], [[{"row": 0, "outcome": "kept"}]])
    with pytest.raises(ValueError, match="alpaca"):
        export_run(run, "sft", tmp_path / "rows.jsonl", form="alpaca")
    assert not list(tmp_path.glob("*rows*"))


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TURNS = (
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": "3"},
    {"role": "assistant", "content": "so 3"},
)


def trajectory(**changes):
    of_trajectory = {
        "completion": "so 3",
        "messages": TURNS,
        "completion_mask": (True, False, True),
    }
    return {"row": 0, "outcome": "kept", "sample_index": 0} | of_trajectory | changes


def test_a_trajectory_is_exported_with_its_calls_and_results(write_run, export, tmp_path) -> None:
    """A text prompt's can't be told as text: its results would be lacking, or trained on."""
    run = write_run(CHAT, [[trajectory()]])
    (row,) = export(run, "sft")
    assert (row["prompt"], row["completion"]) == ([SYSTEM, USER], list(TURNS))
    (row,) = export(run, "sft", form="messages")
    assert row["messages"] == [SYSTEM, USER, *TURNS]
    (row,) = export(run, "sft", form="sharegpt")
    assert row["conversations"][2:] == [
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "so 3"},
    ]
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match=r"calls of tools has no place in --form alpaca"):
        export_run(run, "sft", path, form="alpaca")
    with pytest.raises(ValueError, match=r"no place in --form alpaca.* Use --form messages\.$"):
        export_run(run, "kto", path, form="alpaca")
    with pytest.raises(ValueError, match=r"write them to a \.jsonl file"):
        export_run(run, "sft", tmp_path / "rows.parquet")
    of_text = write_run(TEXT, [[trajectory()]], "of text")
    assert export(of_text, "sft", form="messages")[0]["messages"][1:] == list(TURNS)
    with pytest.raises(
        ValueError, match=r"Use --form messages\. Or .* `_rounds/round-000/dataset`"
    ):
        export_run(of_text, "sft", path)
    assert not path.exists()


SCHEMAS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def test_the_tools_that_a_prompt_showed_are_exported(write_run, export, tmp_path) -> None:
    """As a column where the chat template got them, and in the prompt where it told of them in words."""
    samples = [[{"row": 0, "outcome": "kept"}]]
    run = write_run([{"prompt": [SYSTEM, USER], "solution": "3"}], samples, tools_shown=SCHEMAS)
    for form in ("trl", "messages"):
        assert json.loads(export(run, "sft", form=form)[0]["tools"]) == SCHEMAS
    functions = [schema["function"] for schema in SCHEMAS]
    assert json.loads(export(run, "sft", form="sharegpt")[0]["tools"]) == functions
    with pytest.raises(ValueError, match=r"shows tools .* no place in --form alpaca"):
        export_run(run, "sft", tmp_path / "rows.jsonl", form="alpaca")
    of_row = [{**CHAT[0], "tools": SCHEMAS}]
    assert export(write_run(of_row, samples, "row"), "sft")[0]["tools"] == SCHEMAS
    told = write_run(TEXT, samples, "words", tools_shown="You can add.")
    assert export(told, "sft")[0]["prompt"] == "You can add.\n\nQ 1 + 2 = ?"
    told = write_run([{"prompt": [SYSTEM, USER]}], samples, "turns", tools_shown="You can add.")
    (row,) = export(told, "sft", form="alpaca")
    assert (row["system"], row["instruction"]) == ("Add.\n\nYou can add.", "1 + 2")


def test_half_a_surrogate_pair_in_a_call_is_written(write_run, export) -> None:
    """JSON can hold one, and so can what a model writes."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "\ud800"}}}
    turns = ({**TURNS[0], "tool_calls": [call]}, *TURNS[1:])
    (row,) = export(write_run(CHAT, [[trajectory(messages=turns)]]), "sft")
    assert row["completion"][0]["tool_calls"][0]["function"]["arguments"] == {"a": "?"}


def test_pairs_of_trajectories_are_two_lists_of_messages(write_run, export, tmp_path) -> None:
    wrong = trajectory(sample_index=1, outcome="failed", reward=0.0, completion="so 4")
    run = write_run(CHAT, [[trajectory(), wrong]])
    (row,) = export(run, "dpo")
    assert (row["chosen"], row["rejected"]) == (list(TURNS), list(TURNS))
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError, match=r"no place in --form messages.* Use --form trl"):
        export_run(run, "dpo", path, form="messages")
    of_text = write_run(TEXT, [[trajectory(), wrong]], "of text")
    for form in ("trl", "messages", "sharegpt", "alpaca"):  # none names another that refuses too
        with pytest.raises(ValueError, match=r"--as parquet writes every sample"):
            export_run(of_text, "dpo", path, form=form)
    assert export_run(of_text, "parquet", tmp_path / "all.parquet") == 2


def test_thoughts_beside_a_call_have_no_place_in_sharegpt(write_run, tmp_path) -> None:
    thinking = ({**TURNS[0], "content": "hm"}, *TURNS[1:])
    run = write_run(CHAT, [[trajectory(messages=thinking)]])
    with pytest.raises(ValueError, match=r"text, 'hm', and calls .* no place in --form sharegpt"):
        export_run(run, "sft", tmp_path / "rows.jsonl", form="sharegpt")


def test_every_sample_has_its_messages_as_json(write_run, tmp_path) -> None:
    run = write_run(
        CHAT, [[trajectory(), trajectory(sample_index=1, messages=(), completion_mask=None)]]
    )
    export_run(run, "parquet", tmp_path / "all.parquet")
    of_trajectory, of_single_turn = (
        pq.read_table(tmp_path / "all.parquet").column("messages").to_pylist()
    )
    assert json.loads(of_trajectory) == list(TURNS)
    assert of_single_turn is None
