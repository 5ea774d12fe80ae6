"""Several processes share a phase: the same samples in the same order, and no one waits for one shard."""

import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import shared_sampling
from processes import call_group

from trl_selfplay.peers import shared_counter
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.hand_out import take_shards
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.shards import Assignment, plan_shards


def test_one_process_takes_all_shards_in_order() -> None:
    assert list(take_shards(4, shared_counter())) == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [3, 40, 1000])
@pytest.mark.parametrize("num_processes", [1, 2, 7, 64])
def test_a_plan_for_several_processes_has_the_same_order_and_small_shards_at_its_end(
    count, num_processes
) -> None:
    rows = [SimpleNamespace(prompt_id=f"{i:04d}") for i in range(count)]
    work: Any = [Assignment(row, (0,) * (1 + i % 5), (0, 1, 2)) for i, row in enumerate(rows)]  # type: ignore[arg-type]
    sampler: Any = SimpleNamespace(suggest_batch_size=lambda *lengths: 6)
    alone = plan_shards(work, 8, sampler)
    shards = plan_shards(work, 8, sampler, num_processes=num_processes)
    order = [prompt_id for shard in shards for prompt_id in shard.prompt_ids]
    assert order == [prompt_id for shard in alone for prompt_id in shard.prompt_ids]
    sizes = [3 * len(shard.prompt_ids) for shard in shards]
    assert max(sizes) <= 24
    assert sizes == sorted(sizes, reverse=True)
    assert len(shards) >= min(num_processes, count)
    left = sum(sizes)
    for size in sizes:  # but for one prompt, within half of an equal share, or a batch
        assert num_processes == 1 or size < max(left / num_processes / 2, 6) + 3
        left -= size


def test_metrics_that_functions_log_are_those_of_all_processes() -> None:
    def reward(completions, log_metric, **kwargs):
        log_metric("length", sum(map(len, completions)) / len(completions))
        return [1.0] * len(completions)

    def score(*completions):
        scorer = Scorer(reward)
        prompts, ids = ["p"] * len(completions), [[1]] * len(completions)
        scorer.score(prompts, list(completions), ids, {})
        return scorer

    logged: list[Any] = []
    score("a").take_metrics(lambda calls: logged.extend(calls) or [])
    both = score("abc", "abcde").take_metrics(lambda calls: [*logged, *calls])
    assert both == {"length": (1 + 3 + 5) / 3}


def assert_same_samples(found: list[Rollout], expected: list[Rollout]) -> None:
    """All bit for bit, but for log-probs, whose last bits depend on the rows of a batch."""
    assert [replace(r, logprob=None) for r in found] == [replace(r, logprob=None) for r in expected]
    assert [r.logprob for r in found] == pytest.approx([r.logprob for r in expected], abs=1e-5)


@pytest.mark.slow
def test_samples_and_their_order_don_t_depend_on_the_number_of_processes(
    tmp_path, saved_tiny_model
) -> None:
    """In all phases, with fewer prompts than processes, and with nothing kept on disk."""
    found = {}
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        folder.mkdir()
        arguments = (str(saved_tiny_model), str(folder))
        assert call_group(count, shared_sampling.run_cases, *arguments) == [0] * count
        found[count] = [
            pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(count)
        ]
    (expected,) = found[1]
    assert any(r.completion_mask for r in expected["with a tool"][0])
    for count in (2, 3):
        for name, (rollouts, num_samples) in expected.items():
            assert len(rollouts) == num_samples > 0
            for each in found[count]:
                assert_same_samples(each[name][0], rollouts)
            assert sum(each[name][1] for each in found[count]) == num_samples


@pytest.mark.slow
def test_a_process_that_is_held_up_holds_no_other_up(tmp_path, saved_tiny_model) -> None:
    codes = call_group(2, shared_sampling.hold_one_up, str(saved_tiny_model), str(tmp_path))
    assert codes == [0, 0]
