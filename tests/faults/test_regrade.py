"""A run whose reward function was wrong ends, once regraded, like one that always had the right one."""

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bigram_policy import CHAT_STEPS, bigram_model, family_template, word_tokenizer
from datasets import Dataset, load_from_disk
from fault_events import Events, Fault
from plain_tools import Counter
from processes import call, call_twice
from safetensors.torch import load_file
from tiny_rewards import contains_solution
from tiny_runs import build
from transformers import TrainerCallback

from trl_selfplay.commands.dispatch import main
from trl_selfplay.disk import DamagedFileError
from trl_selfplay.generation.random_streams import stream_key
from trl_selfplay.rewards import JudgeReward
from trl_selfplay.rollouts.record import Rollout, load_rollouts
from trl_selfplay.rounds.mirror import followed_by_store
from trl_selfplay.rounds.regrading import refuse_half_regraded
from trl_selfplay.rounds.store import describe, scan

SEED = 42


def says_so(completions: Any, **kwargs: Any) -> list[float]:
    """Accept what has the word "so" in it, whatever was asked."""
    return [float("so" in c.split()) for c in completions]


def under_the_name_of_the_right_one() -> Any:
    """Return the wrong function with a name that a run doesn't refuse while a round keeps its scores."""

    def contains_solution(completions: Any, **kwargs: Any) -> list[float]:
        return says_so(completions)

    return contains_solution


class InterruptIn(TrainerCallback):
    """Stops a run after the second step of a round, when a checkpoint is on disk."""

    def __init__(self, round_index: int) -> None:
        self.round_index, self.reached = round_index, -1

    def on_round_begin(self, *args: Any, round_index: int, **kwargs: Any) -> None:
        self.reached = round_index

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.reached == self.round_index and state.global_step == 2:
            raise KeyboardInterrupt


def play(method: str, folder: Path, source: Path, stop_in: int | None = None, **changes: Any):
    """Begin a run or go on with it; return the stream keys of what is sampled."""
    settings = {"load_best_round_at_end": False, "num_generations_eval": 1, **changes}
    trainer = build(method, folder, source, **settings)
    sampled: list[int] = []
    sample = trainer.self_play.collector.sampler.sample

    def watched(requests: Any, options: Any, *args: Any) -> Any:
        if not isinstance(requests, Iterator):
            return sample([*map(noted, requests)], options, *args)
        # The last bits of log-probs depend on what is decoded together, and that on when tools return.
        return sample(map(noted, requests), replace(options, return_logprobs=False), *args)

    def noted(request: Any) -> Any:
        if request is not None:
            sampled.append(request.stream_key)
        return request

    trainer.self_play.collector.sampler.sample = watched
    if stop_in is None:
        trainer.train(resume_from_checkpoint=True)
    else:
        trainer.add_callback(InterruptIn(stop_in))
        with pytest.raises(KeyboardInterrupt):
            trainer.train(resume_from_checkpoint=True)
    return set(sampled)


def samples_in(folder: Path) -> list[Rollout]:
    paths = sorted((folder / "samples").glob("*.parquet"))
    return [rollout for path in paths for rollout in load_rollouts(path)]


def regrade(folder: Path, round_index: int | None) -> set[int]:
    """Take the scores of a round back; return the stream keys of its samples, all on disk."""
    of_round = folder / "_rounds" / f"round-{round_index or 0:03d}"
    before = samples_in(of_round)
    assert (
        main(["regrade", str(folder)] + ["--round", str(round_index)] * (round_index is not None))
        == 0
    )
    after = samples_in(of_round)
    assert after == [replace(r, reward=None, rewards=()) for r in before]
    assert samples_in(folder / "_rounds_aside" / of_round.name) == before
    return {stream_key(SEED, r.round_index, r.phase, r.prompt_id, r.sample_index) for r in after}


def assert_alike(folder: Path, whole: Path) -> None:
    """Compare lines, samples, rows and weights; how hinted prompts lie in shards may differ."""
    (lines, samples, rows, weights), expected = outcome_of(folder), outcome_of(whole)
    assert lines == expected[0]
    assert samples == expected[1]
    assert rows == expected[2]
    assert weights.keys() == expected[3].keys()
    assert all(torch.equal(weight, expected[3][name]) for name, weight in weights.items())


def outcome_of(folder: Path) -> tuple[Any, ...]:
    root = folder / "_rounds"
    lines = [json.loads(text) for text in (root / "rounds.jsonl").read_text().splitlines()]
    samples = {}
    for path in [*root.glob("*/samples/*.parquet"), *root.glob("*/evaluation/*.parquet")]:
        for r in load_rollouts(path):
            where = path.parent.relative_to(root), path.name.startswith("greedy")
            # The last bit of a log-prob depends on what was decoded together.
            logprob = None if r.logprob is None else round(r.logprob, 3)
            samples[(*where, r.phase, r.prompt_id, r.sample_index)] = replace(r, logprob=logprob)
    rows = {p.parent.name: load_from_disk(str(p)).to_list() for p in root.glob("*/dataset")}
    weights = {
        (str(path.relative_to(folder)), name): weight
        for path in [*folder.glob("*.safetensors"), *root.glob("*/model/*.safetensors")]
        for name, weight in load_file(path).items()
    }
    for line in lines:
        del line["seconds"]
    return lines, samples, rows, weights


@pytest.mark.slow
def test_star_with_hints_is_graded_again_from_a_finished_round_on(tmp_path, source) -> None:
    whole, run, later = (tmp_path / name for name in ("whole", "run", "later"))
    play("STaR", whole, source)
    play("STaR", run, source, stop_in=1, reward_funcs=says_so)
    before = regrade(run, 0)
    sampled = play("STaR", run, source)
    assert not before & sampled
    assert_alike(run, whole)
    # The function was right in round 0 and wrong in round 1, which is under way.
    play("STaR", later, source, num_rounds=1)
    play("STaR", later, source, stop_in=1, reward_funcs=under_the_name_of_the_right_one())
    before = regrade(later, 1)
    sampled = play("STaR", later, source)
    assert not before & sampled
    assert_alike(later, whole)


def play_share(folder: str, source: str, is_wrong: bool, stop_in: int | None) -> None:
    """Play STaR as one of several processes, which note together what they sample."""
    changes = {"reward_funcs": says_so} if is_wrong else {}
    sampled = play("STaR", Path(folder), Path(source), stop_in, **changes)
    with Path(f"{folder}.sampled").open("a") as file:
        file.write("".join(f"{key}\n" for key in sampled))


@pytest.mark.slow
def test_two_processes_grade_again_what_they_sampled(tmp_path, source) -> None:
    whole, run, sampled = tmp_path / "whole", tmp_path / "run", tmp_path / "run.sampled"
    assert call_twice(play_share, str(whole), str(source), False, None) == [0, 0]
    assert call_twice(play_share, str(run), str(source), True, 1) == [0, 0]
    sampled.unlink()
    before = regrade(run, 0)
    assert call_twice(play_share, str(run), str(source), False, None) == [0, 0]
    again = set(map(int, sampled.read_text().split()))
    assert before
    assert again
    assert not before & again
    assert_alike(run, whole)


def says_yes(completions: Any, **kwargs: Any) -> list[float]:
    return [float(c[-1]["content"].split()[-1:] == ["yes"]) for c in completions]


def says_no(completions: Any, **kwargs: Any) -> list[float]:
    return [float(c[-1]["content"].split()[-1:] == ["no"]) for c in completions]


@pytest.mark.slow
@pytest.mark.parametrize(("wrong", "right"), [(says_no, says_yes), (None, says_yes), (None, None)])
def test_rewards_of_environments_stay_and_functions_beside_them_grade_again(
    tmp_path, wrong, right
) -> None:
    whole, run, tokenizer = (
        tmp_path / "whole",
        tmp_path / "run",
        word_tokenizer(family_template("qwen2_5")),
    )

    def play_one(folder: Path, stop_in: int | None, reward_funcs: Any) -> set[int]:
        torch.manual_seed(0)  # of the weights that the table of words leaves open
        return play(
            "ReST^EM", folder, bigram_model(tokenizer, CHAT_STEPS), stop_in, environment_factory=Counter,
            reward_funcs=reward_funcs, reward_threshold=2.0 if reward_funcs else 1.0,
            train_dataset=Dataset.from_dict({"target": [0, 5, 12, 3, 7, 9]}),
            eval_dataset=Dataset.from_dict({"target": [1, 6]}), max_completion_length=60,
            num_generations=6, processing_class=tokenizer, peft_config=None,
        )  # fmt: skip

    play_one(whole, None, right)
    play_one(run, 1, wrong)
    before = regrade(run, 0)
    given = {r.environment_reward for r in samples_in(run / "_rounds" / "round-000")}
    assert {0.0, 1.0} <= given
    sampled = play_one(run, None, right)
    assert sampled
    assert not before & sampled
    assert_alike(run, whole)


def judge() -> JudgeReward:
    return JudgeReward(  # a random model names no tag: any number counts
        "policy", template="{prompt} {completion} so", verdict=r".*?(\d).*", scale=(0, 9),
        temperature=1.0, max_completion_length=40,
    )  # fmt: skip


@pytest.mark.slow
def test_what_the_policy_judges_is_asked_again(tmp_path, source) -> None:
    """The run is in round 0, which needs no name, and trains all weights."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    changes = {
        "eval_dataset": None, "peft_config": None, "reward_weights": [1.0, 0.5],
        "reward_threshold": 0.4,
    }  # fmt: skip
    play("ReST^EM", whole, source, reward_funcs=[contains_solution, judge()], **changes)
    play(
        "ReST^EM", run, source, 0, reward_funcs=says_so, eval_dataset=None, peft_config=None
    )  # fmt: skip
    before = regrade(run, None)
    sampled = play("ReST^EM", run, source, reward_funcs=[contains_solution, judge()], **changes)
    assert before
    assert not before & sampled
    assert_alike(run, whole)


@pytest.mark.slow
def test_irpo_is_graded_again_once_all_its_rounds_are_finished(tmp_path, source) -> None:
    """Its rounds are kept on a store as well, which has them all in the end."""
    whole, run, store = tmp_path / "whole", tmp_path / "run", f"file://{tmp_path / 'store'}"
    play("IRPO", whole, source, eval_dataset=None)
    play("IRPO", run, source, reward_funcs=says_so, eval_dataset=None, rounds_dir=store)
    before = regrade(run, 0)
    sampled = play("IRPO", run, source, eval_dataset=None, rounds_dir=store)
    assert before
    assert not before & sampled
    assert_alike(run, whole)
    root, elsewhere = run / "_rounds", tmp_path / "elsewhere" / "_rounds"
    with followed_by_store(store, elsewhere):  # fetches all
        pass
    assert {name: describe(path) for name, path in scan(elsewhere).items()} == {
        name: describe(path) for name, path in scan(root).items()
    }


def regrade_until(folder: str, fault: Fault | None) -> None:
    Events(Path(folder), Path(f"{folder}.events"), fault)
    assert main(["regrade", folder, "--round", "0"]) == 0


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of a run's files by name, without temporary ones."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".tmp"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_scores_are_taken_back_whole_or_the_run_is_not_resumed(
    tmp_path, write_folder, make_rollout
) -> None:
    """A kill in the middle would leave some samples with the wrong function's scores."""
    sampled = [
        [(make_rollout(round_index=i, sample_index=n), "kept") for n in (0, 1)] for i in (0, 1)
    ]
    begun = write_folder(sampled, evaluations={-1: [make_rollout(phase="eval", round_index=-1)]})
    (begun / "_rounds" / "gold.parquet").write_bytes(b"graded")
    (begun / "_rounds" / "round-000" / "samples" / "hint-plan.json").write_text("[]")
    shutil.copytree(begun, whole := tmp_path / "whole")
    log = tmp_path / "log"
    assert call(regrade_until, str(whole), None, log=log) == 0, log.read_text()
    expected, events = files_of(whole), Path(f"{whole}.events").read_text().splitlines()
    assert "_rounds/regrade.json" not in expected
    codes = []
    for after in range(2, len(events) - 1, 3):
        run = tmp_path / f"run-{after}"
        shutil.copytree(begun, run)
        codes.append(call(regrade_until, str(run), Fault("", after), log=log))
        marker = run / "_rounds" / "regrade.json"
        if marker.exists():
            with pytest.raises(
                DamagedFileError, match=r"trl-selfplay regrade .* again, then resume"
            ):
                refuse_half_regraded(run / "_rounds")
            assert main(["regrade", str(run)]) == 0
        else:  # before anything was changed, or after all was
            assert files_of(run) in (files_of(begun), expected)
            continue
        assert files_of(run) == expected
    assert set(codes) == {-signal.SIGKILL}
    assert len(codes) > 5
