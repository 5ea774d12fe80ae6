"""The reward model of the ReST demo: a classifier trained on the base model's own graded samples.

In: prompts that nothing else uses, and the demo's model. Out: a folder with a sequence classifier
with one label, which predicts the share of words at the right position. Like any reward model it
makes mistakes, so held-out prompts are graded by the true scorer.
"""

import itertools
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
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

from trl_selfplay.demos.words import DemoSplit, load_demo_model_path, position_reward
from trl_selfplay.disk import replace_folder
from trl_selfplay.rewards.reward_model import RewardModel
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.trainers.rest_em.config import ReSTEMConfig
from trl_selfplay.trainers.rest_em.trainer import ReSTEMTrainer

logger = logging.getLogger(__name__)

# The first layers are enough to compare two lists, at a third of the cost.
NUM_LAYERS = 10
NUM_SAMPLES, NUM_EPOCHS, LEARNING_RATE, BATCH_SIZE = 6, 3, 1e-4, 8
# One prompt in six is held out to measure how well the scores rank completions.
_EVERY_CHECKED = 6


def load_demo_reward_model(
    output_dir: str,
    split: DemoSplit,
    sampling: Mapping[str, Any],
    seed: int = 0,
    smoke: bool = False,
) -> str:
    """Return the folder of the demo's reward model, trained once per output directory.

    Args:
        output_dir: The run's output directory; the model is saved in `reward_model` below it.
        split: Its `judged` prompts are sampled, with its few-shot examples.
        sampling: Holds the run's `temperature`, `top_p`, `max_completion_length`, `stop_strings`.
        seed: Seeds both sampling and training.
        smoke: Only sample and train enough to show that everything works.
    """
    folder = Path(output_dir) / "reward_model"
    if folder.exists():
        return str(folder)
    rollouts = sample_graded(split, sampling, seed, smoke)
    prompts = sorted({rollout.prompt_id for rollout in rollouts})
    checked = set(prompts[::_EVERY_CHECKED])
    classifier, tokenizer = train_classifier(
        [r for r in rollouts if r.prompt_id not in checked], seed, 1 if smoke else NUM_EPOCHS
    )
    share, pairs = share_ordered_alike(
        RewardModel(classifier, tokenizer), [r for r in rollouts if r.prompt_id in checked]
    )
    logger.warning(
        "The demo's reward model ranks %.0f %% of %d pairs of completions to unseen prompts as the "
        "true scorer does (50 %% is chance).",
        100 * share,
        pairs,
    )
    temporary = folder.with_name(".reward_model")
    classifier.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    replace_folder(temporary, folder)
    return str(folder)


def sample_graded(
    split: DemoSplit, sampling: Mapping[str, Any], seed: int, smoke: bool
) -> list[Rollout]:
    """Return samples of the base model for the judged prompts, graded by the true scorer."""
    names = ("temperature", "top_p", "max_completion_length", "stop_strings")
    with tempfile.TemporaryDirectory() as folder:
        config = ReSTEMConfig(
            folder,
            num_generations=2 if smoke else NUM_SAMPLES,
            top_k=0,
            seed=seed,
            report_to=[],
            **{name: sampling[name] for name in names},
        )
        trainer = ReSTEMTrainer(
            load_demo_model_path(),
            config,
            train_dataset=split.judged.select(range(8)) if smoke else split.judged,
            few_shot_examples=split.few_shot,
            reward_funcs=position_reward,
        )
        play = trainer.self_play
        rollouts = list(play.sample(play.rows, 0, "train", Path(folder)))
    texts = {row.prompt_id: str(row.prompt) for row in play.rows}
    # The prompts without few-shot examples, as the classifier will see them.
    return [replace(r, prompt=texts[r.prompt_id]) for r in rollouts if r.is_finished]


def train_classifier(rollouts: Sequence[Rollout], seed: int, num_epochs: int) -> tuple[Any, Any]:
    """Train a classifier on the rollouts' rewards (squared error); return it and its tokenizer."""
    source = load_demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = AutoConfig.from_pretrained(
        source, num_labels=1, num_hidden_layers=NUM_LAYERS, problem_type="regression"
    )
    config.pad_token_id = tokenizer.pad_token_id
    set_seed(seed)  # for the new head
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
    """Compare the judge's ranking of completions to the same prompt with that of their rewards.

    Returns:
        The share of pairs that both rank alike, among pairs with different rewards (0.5 if there
        are none), and the number of these pairs.
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
