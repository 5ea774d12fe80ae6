"""Trajectories through the core: collected shard by shard, resumed, graded, selected, trained on."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import processes
import pytest
from accelerate import Accelerator
from noted_calls import note
from test_collection import CountingProgress, has_a_digit
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_selfplay.generation.completion_scores import score_completions
from trl_selfplay.generation.model_traits import describe_model
from trl_selfplay.generation.sampler import SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.collection import Collector
from trl_selfplay.rollouts.prompts import PromptRow
from trl_selfplay.rollouts.shards import Assignment
from trl_selfplay.rounds.watch import own_turns
from trl_selfplay.tools.record import Reply, ToolCall
from trl_selfplay.tools.tool_set import ToolSet
from trl_selfplay.tools.trajectories import Trajectories

OPTIONS = SamplingOptions(40, eos_token_ids=(1,), return_logprobs=True)


class CallsAtYes:
    """A dialogue for a random model: a turn that ends with "yes" is a call, whose result is told in digits."""

    stop_strings = ("yes",)

    def __init__(self, tokenizer, file: Path, on_read=lambda: None) -> None:
        self.tokenizer, self.file, self.on_read = tokenizer, file, on_read

    def read(self, turn_ids, prefix_ids, schemas):
        self.on_read()
        text = self.tokenizer.decode(list(turn_ids), skip_special_tokens=True)
        message = {"role": "assistant", "content": text}
        if not text.endswith("yes"):
            return Reply(message)
        key = hashlib.blake2b(repr((prefix_ids, turn_ids)).encode(), digest_size=6).hexdigest()
        return Reply(message, (ToolCall("note", {"path": str(self.file), "key": key}),))

    def observation_ids(self, turn_ids, results):
        text = " ".join(f"so {int(result.content, 16) % 10}" for result in results)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def collect(model, tokenizer, folder: Path, on_read=lambda: None, phase="train", count=12):
    """Sample a trajectory for each of some prompts, in one shard; calls are noted beside the folder."""
    dialogue = CallsAtYes(tokenizer, folder.with_suffix(".calls"), on_read)
    sampler = TransformersSampler(model, tokenizer)
    sampler.suggest_batch_size = lambda *_: 4
    collector = Collector(
        sampler, Scorer(has_a_digit), tokenizer, Accelerator(cpu=True), 0,
        trajectories=Trajectories(ToolSet([note], 60.0), dialogue, 5, 512),
    )  # fmt: skip
    rows = [PromptRow.of(f"Q {i // 10} + {i % 10} = ?", "test") for i in range(count)]
    return collector.collect(
        [Assignment(row, tuple(tokenizer(row.prompt)["input_ids"]), (0,)) for row in rows],
        OPTIONS, round_index=0, phase=phase, progress=CountingProgress(), folder=folder,
    )  # fmt: skip


def calls_of(folder: Path) -> list[str]:
    return folder.with_suffix(".calls").read_text().split()


def recorded_in(folder: Path) -> list[str]:
    """Return the calls whose results a step log holds."""
    (path,) = folder.glob("*.steps.jsonl")
    events = [json.loads(line) for line in path.read_bytes().splitlines() if line.endswith(b"}")]
    return [event["result"][1] for event in events if "result" in event]


def assert_same(found, expected) -> None:
    """Compare rollouts; the last bit of a log-prob depends on what else was decoded at the time."""
    for one, other in zip(found, expected, strict=True):
        assert one.logprob == pytest.approx(other.logprob, rel=1e-5)
        assert replace(one, logprob=None) == replace(other, logprob=None)


class Interrupt:
    """Raises, or kills the process, at the next turn once this many results have been recorded."""

    def __init__(self, folder: Path, num_results: int, kills: bool = False) -> None:
        self.folder, self.num_results, self.kills = folder, num_results, kills

    def __call__(self) -> None:
        if len(recorded_in(self.folder)) >= self.num_results:
            if self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt


def collect_until_killed(model: str, folder: str, num_results: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    collect(loaded, tokenizer, Path(folder), Interrupt(Path(folder), num_results, kills=True))


@pytest.fixture
def whole(tmp_path, tiny_model, word_tokenizer):
    """An uninterrupted run: its rollouts and its calls."""
    rollouts = collect(tiny_model(word_tokenizer), word_tokenizer, tmp_path / "whole")
    calls = calls_of(tmp_path / "whole")
    assert len(calls) == len(set(calls)) > 5
    return list(rollouts), sorted(calls)


def test_trajectories_are_kept_whole_and_their_steps_only_until_then(tmp_path, whole) -> None:
    rollouts, calls = whole
    assert not list((tmp_path / "whole").glob("*.jsonl"))
    told = [m["content"] for r in rollouts for m in r.messages if m["role"] == "tool"]
    assert set(told) <= set(calls)  # the result of a call that fills the length isn't shown
    assert len(told) > len(calls) / 2
    for r in rollouts:
        assert len(r.messages) == 1 or not all(r.completion_mask)
        assert r.is_graded


def test_an_interrupted_trajectory_goes_on_from_its_steps(
    tmp_path, tiny_model, word_tokenizer, whole
) -> None:
    """RA-15, within one process; steps are kept only of what isn't saved."""
    folder, model = tmp_path / "interrupted", tiny_model(word_tokenizer)
    with pytest.raises(KeyboardInterrupt):
        collect(model, word_tokenizer, folder, Interrupt(folder, 3))
    recorded = recorded_in(folder)
    assert recorded
    assert_same(collect(model, word_tokenizer, folder), whole[0])
    calls = calls_of(folder)
    assert sorted(set(calls)) == whole[1]
    assert all(calls.count(key) == 1 for key in recorded)
    assert not list(folder.glob("*.jsonl"))


@pytest.mark.slow
def test_trajectories_of_killed_processes_end_like_uninterrupted_ones(
    tmp_path, saved_tiny_model, whole
) -> None:
    """RA-15: kill -9 in the middle of trajectories, twice; no recorded call is made again."""
    folder = tmp_path / "killed"
    recorded: list[set[str]] = [set()]
    num_calls = []  # at each kill
    for _ in range(2):
        num_results = len(recorded[-1]) + 1
        code = processes.call(collect_until_killed, str(saved_tiny_model), str(folder), num_results)
        assert code == -signal.SIGKILL
        recorded.append(set(recorded_in(folder)))
        num_calls.append(len(calls_of(folder)))
        assert recorded[-2] < recorded[-1]
    model = AutoModelForCausalLM.from_pretrained(saved_tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(saved_tiny_model)
    assert_same(collect(model, tokenizer, folder), whole[0])
    calls = calls_of(folder)
    assert sorted(set(calls)) == whole[1]
    for known, count in zip(recorded[1:], num_calls, strict=True):
        assert not known & set(calls[count:])


def test_what_judges_other_completions_calls_no_tools(tmp_path, tiny_model, word_tokenizer) -> None:
    rollouts = collect(
        tiny_model(word_tokenizer), word_tokenizer, tmp_path / "judge", phase="judge"
    )
    assert not any(r.messages for r in rollouts)
    assert not (tmp_path / "judge.calls").exists()


def test_a_trajectory_s_log_prob_is_that_of_the_policy_s_turns(
    tiny_model, word_tokenizer, whole
) -> None:
    """What the detectors compare with the untrained model is what the sampler recorded."""
    model = tiny_model(word_tokenizer)
    traits, vocabulary = describe_model(model), range(len(word_tokenizer))
    for rollout in whole[0]:
        turns = list(own_turns(rollout))
        assert sum((ids for _, ids in turns), ()) == rollout.own_ids
        assert len(turns) == sum(m["role"] == "assistant" for m in rollout.messages)
        found = score_completions(model, None, traits, turns, OPTIONS, vocabulary)
        assert sum(found) == pytest.approx(rollout.logprob, rel=1e-4)
