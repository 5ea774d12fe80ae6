"""A run's folder as a reader sees it."""

import json
import os
from collections import Counter

import pyarrow.parquet as pq
import pytest
from digests.old_runs import NAMES

from trl_selfplay.disk import DamagedFileError
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.inspection.summary import describe_progress
from trl_selfplay.rollouts.record import load_rollouts


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_of_earlier_code_is_read_as_far_as_it_came(name, unpack) -> None:
    output_dir = unpack(name)
    run = RunFolder.open(output_dir)
    assert run.method == {"star": "STaR", "rest": "ReST^EM", "spin": "SPIN"}[name]
    assert not run.is_finished
    for round_index in run.rounds:
        folder = run.folder(round_index)
        paths = sorted((folder / "samples").glob("*.parquet"), key=lambda p: ("hint" in p.name, p))
        expected = [rollout for path in paths for rollout in load_rollouts(path)]
        found = list(run.rollouts(round_index))
        assert [rollout for rollout, _ in found] == expected
        path = folder / "selection.parquet"
        outcomes = pq.read_table(path).column("outcome").to_pylist() if path.exists() else None
        counted = Counter(outcome for _, outcome in found)
        assert counted == Counter(outcomes or ["unfinished"] * len(expected))
        if round_index < len(run.lines):
            funnel = run.lines[round_index]["funnel"]
            assert counted["kept"] == funnel["kept"] + funnel["hinted_kept"]


def test_a_resumed_run_is_unfinished_until_it_saves_its_model(write_folder, make_rollout) -> None:
    output_dir = write_folder([[(make_rollout(), "kept")]] * 3, finished=2)
    model, settings = output_dir / "config.json", output_dir / "_rounds/config.json"
    lines = output_dir / "_rounds/rounds.jsonl"
    model.write_text("{}")
    for path, time in ((settings, 1), (lines, 2), (model, 3)):
        os.utime(path, (time, time))
    run = RunFolder.open(output_dir)
    assert run.is_finished
    assert describe_progress(run) == "Finished after 2 of 3 rounds, before all were played."
    os.utime(settings, (4, 4))  # written when the run is resumed
    assert not run.is_finished
    assert describe_progress(run).startswith("So far: 2 of 3 rounds finished. Round 2: ")
    os.utime(model, (5, 5))
    assert run.is_finished


def test_a_round_without_samples_has_its_own_outcomes_of_an_earlier_round(unpack) -> None:
    run = RunFolder.open(unpack("rest"))
    assert run.rounds == [0, 2]
    of_round = [dict(Counter(outcome for _, outcome in run.rollouts(index))) for index in (0, 1)]
    assert [found["kept"] for found in of_round] == [line["funnel"]["kept"] for line in run.lines]
    assert [r for r, _ in run.rollouts(0)] == [r for r, _ in run.rollouts(1)]
    assert len(run.gold) == 4


def test_held_out_samples_are_named_by_set_and_writer(unpack) -> None:
    run = RunFolder.open(unpack("spin"))
    assert Counter(name for _, name in run.evaluation(-1)) == {"": 4}
    assert Counter(name for _, name in run.evaluation(0)) == {"": 4, "opponent": 2}
    assert all(r.is_graded == (name == "") for r, name in run.evaluation(0))
    assert list(run.evaluation(5)) == []


def test_names_of_held_out_sets_are_told_from_forms_of_the_prompt(unpack) -> None:
    output_dir = unpack("star")
    folder = output_dir / "_rounds" / "before" / "evaluation"
    for path in list(folder.iterdir()):
        for prefix in ("few_shot_", "my-set-", "my-set-few_shot_"):
            (folder / f"{prefix}{path.name}").write_bytes(path.read_bytes())
    found = Counter(name for _, name in RunFolder.open(output_dir).evaluation(-1))
    assert set(found) == {"", "few-shot", "my-set", "my-set few-shot"}
    assert set(found.values()) == {4}


def test_of_a_round_that_samples_the_shards_on_disk_are_read(unpack) -> None:
    run = RunFolder.open(unpack("star"))
    last = run.rounds[-1]
    assert last >= len(run.lines)
    whole = len(list(run.rollouts(last)))
    (run.folder(last) / "samples" / "hint-00000.parquet").unlink()
    assert 0 < len(list(run.rollouts(last))) < whole


def test_of_a_model_that_is_being_scored_the_shards_on_disk_are_read(unpack) -> None:
    output_dir = unpack("star")
    for round_index in (-1, 0):
        folder = RunFolder.open(output_dir).folder(round_index) / "evaluation"
        (folder / "sampled-00000.parquet").unlink()
        with pytest.raises(DamagedFileError):
            list(RunFolder.open(output_dir).evaluation(round_index))
    (output_dir / "_rounds" / "rounds.jsonl").unlink()
    for round_index in (-1, 0):
        found = list(RunFolder.open(output_dir).evaluation(round_index))
        assert [rollout.sample_index for rollout, _ in found] == [0, 0]


def test_a_missing_shard_of_a_finished_round_is_an_error(unpack) -> None:
    run = RunFolder.open(unpack("star"))
    (run.folder(0) / "samples" / "00000.parquet").unlink()
    with pytest.raises(DamagedFileError, match=r"00000\.parquet"):
        list(run.rollouts(0))


def test_a_finished_round_that_lost_the_plan_of_its_hints_is_an_error(unpack) -> None:
    run = RunFolder.open(unpack("star"))
    (run.folder(0) / "samples" / "hint-plan.json").unlink()
    with pytest.raises(DamagedFileError, match=r"hint-plan\.json is gone"):
        list(run.rollouts(0))


def test_the_folder_of_the_rounds_opens_the_same_run(unpack, monkeypatch) -> None:
    output_dir = unpack("star")
    lines = RunFolder.open(output_dir).lines
    assert RunFolder.open(output_dir / "_rounds").lines == lines
    monkeypatch.chdir(output_dir / "_rounds")
    assert RunFolder.open(".").lines == lines


def test_where_there_is_no_run_the_error_says_what_to_pass(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder `_rounds`\. Pass the output_dir"):
        RunFolder.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        RunFolder.open(tmp_path / "none")


@pytest.mark.parametrize("opened", [RunFolder.open, RunFolder.open_training])
def test_a_url_is_refused_with_the_command_that_copies_its_rounds(opened) -> None:
    with pytest.raises(FileNotFoundError, match=r"is a URL.*aws s3 cp --recursive"):
        opened("s3://bucket/run")


def test_a_run_that_has_just_begun_is_open_to_readers(tmp_path) -> None:
    (tmp_path / "_rounds").mkdir()
    run = RunFolder.open(tmp_path)
    assert (run.lines, run.config, run.rounds, run.gold, run.method) == ([], {}, [], [], "")
    with pytest.raises(FileNotFoundError, match="no samples that round 0 uses"):
        list(run.rollouts(0))


def test_scores_stand_under_the_names_of_their_functions_as_far_as_recorded(
    write_folder, make_rollout
) -> None:
    """Also before a round is finished, and those of held-out samples under the names of theirs."""
    config = {"reward_funcs": "('exact_reward',)", "eval_reward_funcs": "('judge',)"}
    run = RunFolder.open(write_folder([[]], finished=0, config=config))
    trained, held_out = (
        make_rollout(rewards=(1.0, 0.5)),
        make_rollout(phase="eval", rewards=(None,)),
    )
    assert run.scores(trained) == {"exact_reward": 1.0, "function 2": 0.5}
    assert run.scores(held_out) == {"judge": None}
    run.config["eval_reward_funcs"] = None  # graded by the same functions
    assert run.scores(held_out) == {"exact_reward": None}
    assert run.scores(make_rollout(rewards=())) == {}
    run.config["reward_funcs"] = "('exact_reward',"
    with pytest.raises(DamagedFileError, match=r"config\.json can't be read"):
        run.scores(trained)


def test_settings_that_cant_be_read_are_named(unpack) -> None:
    output_dir = unpack("star")
    (output_dir / "_rounds" / "config.json").write_text(json.dumps([1])[:-1])
    with pytest.raises(DamagedFileError, match=r"config\.json can't be read"):
        RunFolder.open(output_dir)
