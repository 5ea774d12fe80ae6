"""Held-out scores against counts of the rollouts that they come from."""

import copy

import pytest
from accelerate import Accelerator

from trl_selfplay.evaluation.progress import SamplingProgress
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rollouts.collection import Collector
from trl_selfplay.rollouts.prompts import PromptRow, load_prompt_rows
from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rollouts.rendering import FewShotExample, PromptFormatter
from trl_selfplay.rounds.run import Run
from trl_selfplay.rounds.stages import SelfPlay
from trl_selfplay.trainers.star.config import STaRConfig

EOS = (1,)


def has_a_digit(completions, **kwargs):
    return [float(any(w.isdigit() for w in c.split())) for c in completions]


@pytest.fixture
def config(tmp_path):
    """Return a function that gives one config with other values: making it sets devices up."""
    settings = {"max_completion_length": 6, "num_generations_eval": 3, "use_cpu": True}
    made = STaRConfig(str(tmp_path / "run"), **settings)

    def build(**changes):
        changed = copy.copy(made)
        for name, value in changes.items():
            setattr(changed, name, value)
        return changed

    return build


@pytest.fixture
def build_play(config, tiny_model, word_tokenizer, sums, tmp_path):
    """Return a function that makes the stages, with one example and ten held-out rows."""
    model, rows = tiny_model(word_tokenizer, seed=3), load_prompt_rows(sums(10), "eval")

    def build(**changes):
        sampler = TransformersSampler(model, word_tokenizer)
        scorer = Scorer(has_a_digit)
        collector = Collector(sampler, scorer, word_tokenizer, Accelerator(cpu=True), 0, 1.0)
        examples = [FewShotExample("Q 1 + 1 = ?", " so 2", "2")]
        formatter = PromptFormatter(word_tokenizer, examples)
        run = Run(tmp_path / "_rounds", None, False, False, False)
        return SelfPlay(config(**changes), [], {"": rows}, formatter, collector, EOS, 1, None, run)

    return build


def sample(play):
    with SamplingProgress(0, "held-out", 8, disable=True) as progress:
        return play.sample_heldout(play.heldout[""], progress)[0]


def test_accuracy_is_greedy_and_pass_at_1_is_the_mean_of_samples(build_play) -> None:
    """EV: greedy and sampled scores are kept apart."""
    play = build_play(few_shot_in_training=False)
    rollouts, metrics = sample(play), play.score(play.heldout).metrics
    passed = [r.finish != "length" and r.reward == 1.0 for r in rollouts]
    greedy = [p for p, r in zip(passed, rollouts, strict=True) if r.sample_index == 0]
    sampled = [p for p, r in zip(passed, rollouts, strict=True) if r.sample_index > 0]
    assert (len(greedy), len(sampled)) == (10, 30)
    assert metrics["eval_accuracy"] == sum(greedy) / 10
    assert metrics["eval_pass@1"] == pytest.approx(sum(sampled) / 30)
    solved = {r.prompt_id for p, r in zip(passed, rollouts, strict=True) if p and r.sample_index}
    assert metrics["eval_pass@3"] == pytest.approx(len(solved) / 10)


def test_no_held_out_samples_leave_the_greedy_score_alone(build_play) -> None:
    play = build_play(num_generations_eval=0)
    metrics = play.score(play.heldout).metrics
    assert {r.sample_index for r in sample(play)} == {0}
    assert "eval_accuracy" in metrics
    assert not any("pass@" in name for name in metrics)


def test_every_round_meets_the_same_noise(build_play) -> None:
    """Differences between rounds are differences of weights: nothing tells rounds apart."""
    first, second = (sample(build_play(seed=seed)) for seed in (0, 1))
    assert first == second


def test_the_few_shot_form_is_scored_beside_the_trained_one(tmp_path, build_play) -> None:
    play = build_play(few_shot_in_training=False)
    rows = play.heldout[""]
    scores = play.score({"a": rows[:4], "b": rows[4:]}, folder=tmp_path, with_few_shot=True)
    assert {"eval_a_accuracy", "eval_a_few_shot_accuracy", "eval_b_pass@3"} <= set(scores.metrics)
    assert set(scores.by_prompt) == {r.prompt_id for r in rows[:4]}
    plain, shown = (
        load_rollouts(tmp_path / f"a-{form}greedy-00000.parquet") for form in ("", "few_shot_")
    )
    example = play.formatter.tokenizer("Q 1 + 1 = ? so 2")["input_ids"]
    for before, after in zip(plain, shown, strict=True):
        assert list(after.prompt_ids) == [*example, *before.prompt_ids]


def test_prompts_of_ones_own_are_asked_ungraded_and_read_back(build_play, tmp_path) -> None:
    play = build_play(num_generations=1, disable_tqdm=True)
    rows = [PromptRow.of(f"Q {n} + 1 = ?", "judge_prompt") for n in range(3)]

    def ask():
        return play.ask(rows, 0, "judge", tmp_path / "asked", range(2), max_completion_length=3)

    first = ask()
    asked = sorted((row.prompt_id, i) for row in rows for i in range(2))
    assert [(r.prompt_id, r.sample_index) for r in first] == asked
    assert {r.phase for r in first} == {"judge"}
    assert all(len(r.completion_ids) <= 3 and not r.is_graded for r in first)
    stored = [r for path in (tmp_path / "asked").glob("*.parquet") for r in load_rollouts(path)]
    assert sorted(stored, key=lambda r: (r.prompt_id, r.sample_index)) == first == ask()


def test_asking_for_nothing_samples_nothing(build_play, tmp_path) -> None:
    assert build_play().ask([], 0, "judge", tmp_path / "asked", range(2)) == []
    assert not (tmp_path / "asked").exists()
