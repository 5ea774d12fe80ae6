"""Several processes share a phase: the same samples in the same order, and no one waits for one shard."""

import pickle

import pytest
import shared_sampling
from processes import call_group

from trl_selfplay.peers import shared_counter
from trl_selfplay.rollouts.hand_out import take_shards


def test_one_process_takes_all_shards_in_order() -> None:
    assert list(take_shards(4, shared_counter())) == [0, 1, 2, 3]


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
    for count in (2, 3):
        for name, (rollouts, num_samples) in expected.items():
            assert len(rollouts) == num_samples > 0
            for each in found[count]:
                assert each[name][0] == rollouts, (name, count)
            assert sum(each[name][1] for each in found[count]) == num_samples


@pytest.mark.slow
def test_a_process_that_is_held_up_holds_no_other_up(tmp_path, saved_tiny_model) -> None:
    codes = call_group(2, shared_sampling.hold_one_up, str(saved_tiny_model), str(tmp_path))
    assert codes == [0, 0]
