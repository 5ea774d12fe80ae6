"""A round may have values of its own for fields of the config."""

import torch

from trl_selfplay.rollouts.stored import load_samples


def test_each_round_samples_at_its_own_temperature(build_star) -> None:
    """With a learning rate of 0 every round has the same policy, and greedy is its argmax."""
    common = {
        "learning_rate": 0.0,
        "reward_threshold": 0.0,
        "rationalize": False,
        "num_generations": 1,
        "on_empty_round": "stop",
    }
    cooled = build_star("cooled", temperature=1.0, round_temperatures=[1.0, 0.0], **common)
    warm = build_star("warm", temperature=1.0, **common)
    cooled.train()
    warm.train()
    assert sampled(cooled, 0) == sampled(warm, 0)
    greedy = sampled(cooled, 1)
    assert greedy != sampled(warm, 1)
    for prompt_ids, completion_ids in greedy:
        ids = torch.tensor([prompt_ids])
        expected = cooled.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8,
            eos_token_id=list(cooled.self_play.eos_token_ids),
        )  # fmt: skip
        assert expected[0, len(prompt_ids) :].tolist() == list(completion_ids)
    assert cooled.args.temperature == 1.0  # as the user set it


def sampled(trainer, round_index):
    rollouts = load_samples(trainer.run.folder(round_index))
    return [(r.prompt_ids, r.completion_ids) for r in rollouts]
