import json
import pickle

import pytest

from trl_selfplay.rewards import puzzle_reward

reasoning_gym = pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize("task", ["word_sequence_reversal", "chain_sum", "countdown"])
@pytest.mark.parametrize("as_json", [False, True])
def test_the_task_s_own_scorer_decides(task, as_json) -> None:
    """VF-2: gold scores 1 (countdown takes any right expression), a wrong answer less."""
    entries = list(reasoning_gym.create_dataset(task, size=3, seed=5))
    golds = [entry["answer"] for entry in entries]
    metadata = [json.dumps(e["metadata"]) if as_json else e["metadata"] for e in entries]
    reward = puzzle_reward(task)
    right = [f"Let me think.\nAnswer: {gold}" for gold in golds]
    assert reward(completions=right, solution=golds, metadata=metadata) == [1.0, 1.0, 1.0]
    wrong = reward(completions=["Answer: no"] * 3, solution=golds, metadata=metadata)
    assert all(score < 1.0 for score in wrong)


def test_a_scorer_that_fails_gives_no_verdict(caplog) -> None:
    """VF-3: this task's scorer needs metadata that is missing here."""
    assert puzzle_reward("word_ladder")(completions=["Answer: a,b"], solution=["a,b"]) == [None]
    assert "1 of 1" in caplog.text


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="no task 'nonesuch'"):
        puzzle_reward("nonesuch")


def test_the_function_pickles_and_has_a_name() -> None:
    reward = pickle.loads(pickle.dumps(puzzle_reward("chain_sum")))
    assert reward.__name__ == "chain_sum_reward"
    assert reward(completions=["7"], solution=["7"]) == [1.0]
