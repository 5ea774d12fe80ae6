"""The ReST demo's reward model: a classifier that learnt how good the base model's own samples are.

In: prompts that nothing else uses, and the demo's model. Out: a folder with a sequence classifier of
one label, whose score is a real number: the share of words in their place, as far as it can tell. It
errs, as reward models do; held-out prompts are graded by the true scorer.
"""

import itertools
import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
    set_seed,
)

from trl_selfplay.demos.words import DEMO_SETTINGS, DemoSplit, load_demo_model_path, position_reward
from trl_selfplay.disk import replace_folder
from trl_selfplay.rewards.reward_model import RewardModel
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.trainers.rest_em.config import ReSTEMConfig
from trl_selfplay.trainers.rest_em.trainer import ReSTEMTrainer

logger = logging.getLogger(__name__)

# The model's first layers are enough to compare two lists, and a third of the work.
NUM_LAYERS = 10
NUM_SAMPLES, NUM_EPOCHS, LEARNING_RATE, BATCH_SIZE = 6, 3, 1e-4, 8
# One prompt in so many is not trained on but shows how well scores order completions.
_EVERY_CHECKED = 6


def load_demo_reward_model(
    output_dir: str, split: DemoSplit, seed: int = 0, smoke: bool = False
) -> str:
    """Return the folder of the demo's reward model, made once in the run's output directory.

    Args:
        output_dir: Of the run.
        split: Its `judged` prompts are sampled, with its few-shot examples.
        seed: Of the samples and of the training.
        smoke: Sample and train as little as shows that everything works.
    """
    folder = Path(output_dir) / "reward_model"
    if folder.exists():
        return str(folder)
    rollouts = sample_graded(split, seed, smoke)
    prompts = sorted({rollout.prompt_id for rollout in rollouts})
    checked = set(prompts[::_EVERY_CHECKED])
    classifier, tokenizer = train_classifier(
        [r for r in rollouts if r.prompt_id not in checked], seed, 1 if smoke else NUM_EPOCHS
    )
    share, pairs = share_ordered_alike(
        RewardModel(classifier, tokenizer), [r for r in rollouts if r.prompt_id in checked]
    )
    logger.warning(
        "The demo's reward model orders %.0f %% of %d pairs of completions, of prompts that it "
        "never saw, as the true scorer does (50 %% is chance).",
        100 * share,
        pairs,
    )
    temporary = folder.with_name(".reward_model")
    classifier.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    replace_folder(temporary, folder)
    return str(folder)


def sample_graded(split: DemoSplit, seed: int, smoke: bool) -> list[Rollout]:
    """Return the base model's samples of the judged prompts, truly graded."""
    names = ("temperature", "top_p", "max_completion_length", "stop_strings", "report_to")
    with tempfile.TemporaryDirectory() as folder:
        config = ReSTEMConfig(
            folder,
            num_generations=2 if smoke else NUM_SAMPLES,
            top_k=0,
            seed=seed,
            **{name: DEMO_SETTINGS[name] for name in names},
        )
        sampling = ReSTEMTrainer(
            load_demo_model_path(),
            config,
            train_dataset=split.judged.select(range(8)) if smoke else split.judged,
            few_shot_examples=split.few_shot,
            reward_funcs=position_reward,
        )
        play = sampling.self_play
        rollouts = play.sample(play.rows, 0, "train", Path(folder))
    texts = {row.prompt_id: str(row.prompt) for row in play.rows}
    # Without the few-shot examples, as the classifier will be asked.
    return [replace(r, prompt=texts[r.prompt_id]) for r in rollouts if not r.is_truncated]


def train_classifier(rollouts: Sequence[Rollout], seed: int, num_epochs: int) -> tuple[Any, Any]:
    """Return a classifier that predicts the rollouts' rewards (squared error), and its tokenizer."""
    source = load_demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = AutoConfig.from_pretrained(
        source, num_labels=1, num_hidden_layers=NUM_LAYERS, problem_type="regression"
    )
    config.pad_token_id = tokenizer.pad_token_id
    set_seed(seed)  # the head is new
    classifier = AutoModelForSequenceClassification.from_pretrained(source, config=config)
    rows = Dataset.from_list(
        [
            {**tokenizer(r.prompt + r.completion), "labels": [float(r.reward or 0.0)]}
            for r in rollouts
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            classifier,
            TrainingArguments(
                folder,
                num_train_epochs=num_epochs,
                learning_rate=LEARNING_RATE,
                per_device_train_batch_size=BATCH_SIZE,
                save_strategy="no",
                logging_steps=20,
                report_to=[],
                seed=seed,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.train()
    return classifier, tokenizer


def share_ordered_alike(
    judge: Callable[..., Sequence[float | None]], rollouts: Sequence[Rollout]
) -> tuple[float, int]:
    """Return how often the judge orders two completions of a prompt as their rewards do.

    Returns:
        The share, and the number of pairs with different rewards that it is of; 0.5 for none.
    """
    scores = judge([r.prompt for r in rollouts], [r.completion for r in rollouts])
    alike = [
        (a_score - b_score) * (a.reward - b.reward) > 0.0
        for (a, a_score), (b, b_score) in itertools.combinations(
            zip(rollouts, scores, strict=True), 2
        )
        if a.prompt_id == b.prompt_id
        and a.reward is not None
        and b.reward is not None
        and a.reward != b.reward
        and a_score is not None
        and b_score is not None
    ]
    return (sum(alike) / len(alike) if alike else 0.5), len(alike)
