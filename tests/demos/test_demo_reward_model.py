"""How well a reward model orders completions, counted by hand; the model itself: test_recipes.py."""

import pytest

from trl_selfplay.demos.reward_model import share_ordered_alike


@pytest.fixture
def rollouts(make_rollout):
    """Two prompts with rewards 0, .5, 1 and .2, .2: three pairs that differ within a prompt."""
    rewards = {"a": (0.0, 0.5, 1.0), "b": (0.2, 0.2)}
    return [
        make_rollout(prompt_id=prompt_id, sample_index=i, completion=str(reward), reward=reward)
        for prompt_id, group in rewards.items()
        for i, reward in enumerate(group)
    ]


@pytest.mark.parametrize(
    ("judge", "expected"),
    [
        (lambda prompts, completions: [float(c) for c in completions], (1.0, 3)),
        (lambda prompts, completions: [-float(c) for c in completions], (0.0, 3)),
        (lambda prompts, completions: [abs(float(c) - 0.6) for c in completions], (1 / 3, 3)),
        (lambda prompts, completions: [0.0] * len(completions), (0.0, 3)),
        (lambda prompts, completions: [None, 0.1, 0.2, 0.0, 0.0], (1.0, 1)),
        (lambda prompts, completions: [None] * len(completions), (0.5, 0)),
    ],
    ids=["true", "reversed", "partly", "constant", "abstains once", "abstains"],
)
def test_pairs_of_one_prompt_with_different_rewards_count(rollouts, judge, expected) -> None:
    assert share_ordered_alike(judge, rollouts) == (pytest.approx(expected[0]), expected[1])
