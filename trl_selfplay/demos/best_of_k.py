"""How often the answer that a verifier prefers is right, on prompts that no one has trained on.

In: a trainer over rounds, with its model as the generator, and a verifier. Out: samples of the
prompts, and a table that is printed.
"""

import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from trl_selfplay.evaluation.estimates import mean_best_of_k
from trl_selfplay.rewards.verifier import VerifierReward
from trl_selfplay.rollouts.record import Rollout, load_rollouts

_KS = (1, 2, 4, 8, 16)


def sample_heldout(generator: Any, prompts: Dataset, folder: Path) -> list[tuple[str, Rollout]]:
    """Return `num_generations_eval` graded samples of each prompt, each with its prompt's text.

    Args:
        generator: A trainer over rounds with reward functions.
        prompts: Held-out prompts as text.
        folder: Where the samples are kept; those that it holds aren't sampled again.
    """
    sets = generator.load_sets(prompts)
    generator.score_sets(sets, folder=folder)
    texts = {row.prompt_id: row.prompt for row in sets[""]}
    samples = [r for path in folder.glob("sampled-*.parquet") for r in load_rollouts(path)]
    samples.sort(key=lambda r: (r.prompt_id, r.sample_index))
    return [(texts[r.prompt_id], r) for r in samples]


def score_with(verifier: VerifierReward, samples: list[tuple[str, Rollout]]) -> list[float | None]:
    """Return the verifier's scores of samples, by their tokens."""
    prompts = [prompt for prompt, _ in samples]
    rollouts = [rollout for _, rollout in samples]
    completions = [rollout.completion for rollout in rollouts]
    return verifier(prompts, completions, [r.completion_ids for r in rollouts])


def print_best_of_k(generator: Any, verifier: str, prompts: Dataset) -> None:
    """Sample held-out prompts, and print how often the best of k is right by each of the scores.

    Args:
        generator: As `sample_heldout` takes it.
        verifier: The folder of an adapter that VSTaRTrainer saved.
        prompts: Held-out prompts as text.
    """
    samples = sample_heldout(generator, prompts, Path(generator.args.output_dir) / "report")
    rollouts = [rollout for _, rollout in samples]
    ks = [k for k in _KS if k <= generator.args.num_generations_eval]
    lines = [
        f"Right answers to {len(prompts)} held-out prompts, the verifier's best of k",
        "score    " + "".join(f"{f'k={k}':>7}" for k in ks),
    ]
    for kind in ("sum", "mean", "ratio"):
        scores = score_with(VerifierReward(verifier, score=kind), samples)
        shares = mean_best_of_k(rollouts, scores, ks)
        lines.append(f"{kind:9}" + "".join(f"{share:7.3f}" for share in shares.values()))
    sys.stdout.write("\n".join(lines) + "\n")
