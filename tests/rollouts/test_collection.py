"""Shards: planned before sampling, done once, found again; graded while others are sampled."""

import json
import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from patience import ENDS_S

from trl_selfplay.generation.sampler import SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.rewards.grading_model import GradingModel
from trl_selfplay.rewards.scores import Scores
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.collection import Collector
from trl_selfplay.rollouts.prompts import PromptRow, load_prompt_rows
from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rollouts.shards import BATCHES_PER_SHARD, Assignment, plan_shards

OPTIONS = SamplingOptions(6, temperature=1.0, eos_token_ids=(1,))


class CountingProgress:
    def __init__(self):
        self.sampled = self.restored = 0
        self.solved = None
        self.abstained = None
        self.num_tokens = 0
        self.num_more = 0.0

    def expect(self, num_more):
        self.num_more += num_more

    def decode(self, num_tokens):
        self.num_tokens += num_tokens

    def update(self, num_samples, num_tokens, restored=False):
        if restored:
            self.restored += num_samples
        else:
            self.sampled += num_samples

    def set_solved(self, share):
        self.solved = share

    def set_abstained(self, count, cause):
        self.abstained = count, cause


def has_a_digit(completions, **kwargs):
    return [float(any(w.isdigit() for w in c.split())) for c in completions]


@pytest.fixture
def collector(tiny_model, word_tokenizer):
    def build(reward=has_a_digit, batch_size=4, seed=0):
        sampler = TransformersSampler(tiny_model(word_tokenizer), word_tokenizer)
        sampler.suggest_batch_size = lambda *_: batch_size
        return Collector(sampler, Scorer(reward), word_tokenizer, Accelerator(cpu=True), seed, 1.0)

    return build


@pytest.fixture
def assignments(word_tokenizer, sums):
    rows = load_prompt_rows(sums(20), "d")
    return [Assignment(r, tuple(word_tokenizer(r.prompt)["input_ids"]), (0, 1, 2)) for r in rows]


def collect(collector, assignments, folder=None, **changes):
    progress = CountingProgress()
    settings = {"round_index": 0, "phase": "train", "folder": folder, "progress": progress}
    rollouts = collector.collect(assignments, OPTIONS, **settings | changes)
    return rollouts, progress


def test_shards_hold_every_prompt_once_and_several_batches(collector, assignments) -> None:
    long = Assignment(assignments[7].row, assignments[7].prompt_ids * 3, (0, 1, 2))
    mixed = [*assignments[:7], long, *assignments[8:]]
    shards = plan_shards(mixed, 6, collector().sampler)
    planned = [prompt_id for shard in shards for prompt_id in shard.prompt_ids]
    assert sorted(planned) == sorted(a.row.prompt_id for a in mixed)
    assert planned[0] == long.row.prompt_id
    for shard in shards[:-1]:
        assert len(shard.prompt_ids) * 3 >= BATCHES_PER_SHARD * 4


def test_samples_don_t_depend_on_shards_batches_or_order(collector, assignments) -> None:
    expected, _ = collect(collector(batch_size=60), assignments)
    for batch_size, given in ((1, assignments), (3, assignments[::-1])):
        found, _ = collect(collector(batch_size=batch_size), given)
        assert found == expected
    assert [(r.prompt_id, r.sample_index) for r in expected] == sorted(
        (a.row.prompt_id, i) for a in assignments for i in a.sample_indices
    )


def test_what_is_on_disk_is_not_sampled_again(tmp_path, collector, assignments) -> None:
    first, progress = collect(collector(), assignments, tmp_path)
    assert (progress.sampled, progress.restored) == (60, 0)
    shards = sorted(tmp_path.glob("*.parquet"))
    assert len(shards) > 1
    assert sorted(
        (r for p in shards for r in load_rollouts(p)), key=lambda r: (r.prompt_id, r.sample_index)
    ) == (first)
    shards[0].unlink()
    again, progress = collect(collector(batch_size=60), assignments, tmp_path)  # plan on disk rules
    assert again == first
    missing = len(json.loads((tmp_path / "plan.json").read_text())[0]["prompt_ids"]) * 3
    assert (progress.sampled, progress.restored) == (missing, 60 - missing)


def test_ungraded_samples_are_only_graded_when_the_run_goes_on(
    tmp_path, collector, assignments
) -> None:
    def broken(completions, **kwargs):
        raise KeyError("no such column")

    with pytest.raises(RuntimeError, match=r"broken.*KeyError"):
        collect(collector(broken), assignments, tmp_path)
    held = [r for path in tmp_path.glob("*.parquet") for r in load_rollouts(path)]
    assert 3 <= len(held) < 60  # also those of a shard that isn't finished
    assert not any(r.is_graded for r in held)
    mended, progress = collect(collector(), assignments, tmp_path)
    assert progress.restored == len(held)
    assert mended == collect(collector(), assignments)[0]


def test_prompts_are_graded_while_their_shard_is_sampled(
    tmp_path, collector, assignments, monkeypatch
) -> None:
    """The first call returns when a prompt of the same shard has begun to be sampled after it."""
    calls, finished = [], []
    begun, enough = threading.Event(), threading.Event()

    def waits(completions, prompts, completion_ids, **kwargs):
        calls.append([*zip(prompts, completion_ids, strict=True)])
        begun.set()
        assert enough.wait(ENDS_S)
        return has_a_digit(completions)

    slow = collector(waits, batch_size=15)  # all in one shard
    sample = slow.sampler.sample

    def watched(*args):
        for index, sampled in sample(*args):
            yield index, sampled
            finished.append(index // 3)
            if num_whole := [*Counter(finished).values()].count(3):
                assert begun.wait(ENDS_S)  # with the first prompt alone, however late it is
            if num_whole > 2 and len(finished) > 3 * len(calls[0]):
                enough.set()

    monkeypatch.setattr(slow.sampler, "sample", watched)
    rollouts, _ = collect(slow, assignments, tmp_path)
    assert len(list(tmp_path.glob("*.parquet"))) == 1
    assert 1 < len(calls) < 20  # what was waiting was graded in one call
    assert rollouts == collect(collector(), assignments)[0]
    assert load_rollouts(tmp_path / "00000.parquet") == sorted(
        rollouts, key=lambda r: planned_place(tmp_path, r)
    )
    graded = [sample for call in calls for sample in call]
    for start in range(0, len(graded), 3):  # all of a prompt together, by index
        prompt = graded[start][0]
        same = [r for r in rollouts if r.prompt == prompt]
        assert graded[start : start + 3] == [(prompt, list(r.completion_ids)) for r in same]


def test_a_function_that_holds_a_model_grades_whole_shards_in_order(
    tmp_path, collector, assignments
) -> None:
    """VF-5 to the last bit: a model's scores depend on what is in its batch."""
    calls = []

    def holds_a_model(completions, completion_ids, **kwargs):
        calls.append(completion_ids)
        return has_a_digit(completions)

    holds_a_model.grading_model = GradingModel(torch.nn.Linear(1, 1))
    rollouts, _ = collect(collector(holds_a_model), assignments, tmp_path)
    files = sorted(tmp_path.glob("*.parquet"))
    assert len(calls) == len(files) > 1
    for ids, file in zip(calls, files, strict=True):
        assert ids == [list(r.completion_ids) for r in load_rollouts(file)]
    assert rollouts == collect(collector(), assignments)[0]


def planned_place(folder, rollout):
    (shard,) = json.loads((folder / "plan.json").read_text())
    return shard["prompt_ids"].index(rollout.prompt_id), rollout.sample_index


def test_an_interrupt_keeps_what_is_sampled_of_a_shard(tmp_path, collector, assignments) -> None:
    def interrupted(completions, **kwargs):
        raise KeyboardInterrupt

    threads = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        collect(collector(interrupted, batch_size=15), assignments, tmp_path)
    assert threading.active_count() == threads
    held = load_rollouts(tmp_path / "00000.parquet")
    assert held
    rollouts, progress = collect(collector(batch_size=15), assignments, tmp_path)
    assert (progress.restored, progress.sampled) == (len(held), 60 - len(held))
    assert rollouts == collect(collector(), assignments)[0]


def test_a_failure_of_the_sampler_keeps_what_it_sampled(
    tmp_path, collector, assignments, monkeypatch
) -> None:
    broken = collector(batch_size=15)
    sample = broken.sampler.sample

    def fails(*args):
        for count, finished in enumerate(sample(*args)):
            if count == 17:
                raise ZeroDivisionError("while sampling")
            yield finished

    monkeypatch.setattr(broken.sampler, "sample", fails)
    with pytest.raises(ZeroDivisionError, match="while sampling"):
        collect(broken, assignments, tmp_path)
    rollouts, progress = collect(collector(batch_size=15), assignments, tmp_path)
    assert (progress.restored, progress.sampled) == (17, 43)
    assert rollouts == collect(collector(), assignments)[0]


def test_a_prompt_that_gets_more_samples_is_graded_anew_with_all_of_them(
    tmp_path, collector, assignments
) -> None:
    """A function may compare a prompt's samples; those of other prompts keep their rewards."""
    sizes = []

    def counts(completions, prompts, **kwargs):
        sizes.extend(Counter(prompts).values())
        return [float(prompts.count(prompt)) for prompt in prompts]

    fewer = [replace(a, sample_indices=(0, 1)) for a in assignments[:10]]
    collect(collector(counts), [*fewer, *assignments[10:]], tmp_path)
    sizes.clear()
    rollouts, _ = collect(collector(counts), assignments, tmp_path)
    assert {r.reward for r in rollouts} == {3.0}
    assert sizes == [3] * 10


def test_a_plan_for_other_prompts_is_refused(tmp_path, collector, assignments) -> None:
    collect(collector(), assignments[:5], tmp_path)
    with pytest.raises(ValueError, match="plans 5 prompts that are not the 6"):
        collect(collector(), assignments[:6], tmp_path)


def test_the_share_of_solved_prompts_is_told(collector, assignments) -> None:
    rollouts, progress = collect(collector(), assignments)
    passed = {r.prompt_id for r in rollouts if r.reward == 1.0 and r.finish != "length"}
    assert 0 < len(passed) < 20
    assert progress.solved == len(passed) / 20


def test_causes_of_abstentions_are_kept_and_told(tmp_path, collector, assignments) -> None:
    def grades_odd(completions, **kwargs):
        odd = [len(c.split()) % 2 for c in completions]
        return Scores(
            [1.0 if o else None for o in odd], {i: "even" for i, o in enumerate(odd) if not o}
        )

    rollouts, progress = collect(collector(grades_odd), assignments, tmp_path)
    even = [r for r in rollouts if len(r.completion.split()) % 2 == 0]
    assert 0 < len(even) < 60
    assert [r for r in rollouts if r.causes == ("even",)] == even
    assert progress.abstained == (len(even), "even")
    again, progress = collect(collector(grades_odd), assignments, tmp_path)
    assert (again, progress.abstained) == (rollouts, (len(even), "even"))


def test_other_seeds_rounds_and_phases_give_other_samples(collector, assignments) -> None:
    texts = [
        [r.completion_ids for r in collect(collector(seed=seed), assignments, **changes)[0]]
        for seed, changes in (
            (0, {}),
            (1, {}),
            (0, {"round_index": 1}),
            (0, {"phase": "eval"}),
        )
    ]
    assert all(texts[i] != texts[j] for i in range(4) for j in range(i))


@pytest.mark.parametrize("damage", ["gone", "cut", "of another shape"])
def test_a_lost_plan_is_made_again_around_the_shards_that_are_there(
    tmp_path, collector, assignments, damage
) -> None:
    """Another batch size, as on a machine with other free memory: nothing is sampled again."""
    first, _ = collect(collector(), assignments, tmp_path)
    plan = tmp_path / "plan.json"
    shards = sorted(tmp_path.glob("*.parquet"))
    assert len(shards) > 3
    missing = len(load_rollouts(shards[1]))
    shards[1].unlink()
    if damage == "gone":
        plan.unlink()
    else:
        plan.write_text({"cut": plan.read_text()[:50], "of another shape": '{"a": 1}'}[damage])
    again, progress = collect(collector(batch_size=7), assignments, tmp_path)
    assert again == first
    assert (progress.sampled, progress.restored) == (missing, 60 - missing)
    once_more, progress = collect(collector(), assignments, tmp_path)
    assert once_more == first
    assert (progress.sampled, progress.restored) == (0, 60)


def test_more_samples_per_prompt_keep_those_that_are_there(
    tmp_path, collector, assignments
) -> None:
    collect(collector(), [replace(a, sample_indices=(0, 1)) for a in assignments], tmp_path)
    more, progress = collect(collector(), assignments, tmp_path)
    assert (progress.sampled, progress.restored) == (20, 40)
    assert more == collect(collector(), assignments)[0]


def test_fewer_samples_per_prompt_leave_the_others_out(tmp_path, collector, assignments) -> None:
    collect(collector(), assignments, tmp_path)
    fewer = [replace(a, sample_indices=(0, 1)) for a in assignments]
    found, progress = collect(collector(), fewer, tmp_path)
    assert (progress.sampled, progress.restored) == (0, 40)
    assert found == collect(collector(), fewer)[0]
    on_disk = [r for path in tmp_path.glob("*.parquet") for r in load_rollouts(path)]
    assert {r.sample_index for r in on_disk} == {0, 1}


RESPONSE_TEMPLATE = {  # as TRL's for Qwen3
    "defaults": {"role": "assistant"},
    "start_anchor": "<assistant>",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": r"</think>", "content": "text"},
        "content": {"close_pattern": r"<eos>", "content": "text"},
    },
}


def test_chat_completions_reach_functions_as_grpo_s_do(chat_tokenizer, make_rollout) -> None:
    """Divided by the tokenizer's response template into thoughts and content."""
    from trl.chat_template_utils import parse_response

    texts = [
        "<think>4?</think>The answer is 5.<eos>",
        "The answer is 7.<eos>",
        "<think>so",
        "<eos>",
    ]
    prompt = [{"role": "user", "content": "?"}]
    prompt_ids = chat_tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    row = PromptRow("p", prompt, "5", {"solution": "5"}, 0)
    rollouts = [
        make_rollout(
            prompt_id="p", sample_index=i, prompt_ids=tuple(prompt_ids),
            completion_ids=tuple(chat_tokenizer(text)["input_ids"]),
            completion=chat_tokenizer.decode(
                chat_tokenizer(text)["input_ids"], skip_special_tokens=True
            ),
        )
        for i, text in enumerate(texts)
    ]  # fmt: skip
    seen = []

    def look(completions, **kwargs):
        seen[:] = completions
        return [1.0] * len(completions)

    collector = Collector(None, Scorer(look), chat_tokenizer, Accelerator(cpu=True), 0)
    collector.grade(rollouts, {"p": row})
    assert seen == [[{"role": "assistant", "content": r.completion}] for r in rollouts]
    chat_tokenizer.response_template = RESPONSE_TEMPLATE
    collector.grade(rollouts, {"p": row})
    assert seen == [
        [parse_response(chat_tokenizer, list(r.completion_ids), prefix=prompt_ids)]
        for r in rollouts
    ]
    (message,) = seen[0]
    assert message["reasoning_content"] == "4?"
    assert message["content"] == "The answer is 5."
