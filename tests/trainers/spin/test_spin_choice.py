"""What chooses SPIN's best round: the data's likelihood, or a score of the task."""

import logging

import pytest
from datasets import load_from_disk

from trl_selfplay import EmptyRoundError
from trl_selfplay.evaluation.heldout import HeldOutScores
from trl_selfplay.trainers.spin.discriminator import save_scores, warn_falling_likelihood


def says_so(completions, **kwargs):
    return [float("so" in completion.split()) for completion in completions]


def test_the_contract_of_evaluate_is_the_parents(build_spin, build_star, answers, sums) -> None:
    """A set that is asked for by name has the caller's prefix; all of them have names."""
    sets = {"a": answers(3, first=50), "b": answers(4, first=60)}
    trainer = build_spin(eval_dataset=sets)
    assert {"eval_a_logps", "eval_b_logps"} <= set(trainer.evaluate())
    named = trainer.evaluate("b")
    assert "eval_logps" in named
    assert not any(name.startswith("eval_b") for name in named)
    own = trainer.evaluate(sets["b"], metric_key_prefix="test")
    assert own["test_logps"] == pytest.approx(named["eval_logps"])

    star = build_star(eval_dataset={"a": sums(2, first=50), "b": sums(2, first=60)})
    assert "eval_accuracy" in star.evaluate("b")


def test_a_task_score_chooses_where_it_is_given(build_spin, answers, caplog) -> None:
    seen = []

    def first_word(completions, solution, level, **kwargs):
        seen.append((tuple(solution), tuple(level)))
        return says_so(completions)

    heldout = answers(4, first=50).add_column("level", [1, 2, 3, 4])
    trainer = build_spin(num_rounds=2, eval_dataset=heldout, eval_reward_funcs=first_word)
    assert trainer.run.chosen_metric == "eval_accuracy"
    with caplog.at_level(logging.WARNING):
        trainer.train()
    solutions = {solution for batch, _ in seen for solution in batch}
    assert solutions == set(heldout["completion"])  # the data's completion without a column
    assert {level for _, batch in seen for level in batch} == {1, 2, 3, 4}
    before = trainer.run.lines[0]["eval_before"]
    for metrics in (before, *(line["eval"] for line in trainer.run.lines)):
        assert {"eval_accuracy", "eval_pass@1", "eval_mean_reward", "eval_logps"} <= set(metrics)
    assert "eval_win_rate" in trainer.run.lines[1]["eval"]
    training = load_from_disk(str(trainer.run.folder(0) / "dataset"))
    assert "level" not in training.column_names


def test_a_task_score_reads_the_datas_solution_column(build_spin, answers) -> None:
    seen = set()

    def graded(completions, solution, **kwargs):
        seen.update(solution)
        return [0.0] * len(completions)

    heldout = answers(2, first=50).add_column("solution", ["seven", "eight"])
    trainer = build_spin(eval_dataset=heldout, eval_reward_funcs=graded)
    trainer.evaluate()
    assert seen == {"seven", "eight"}
    assert all(row.solution.startswith(" so") for row in trainer.self_play.heldout[""])


def test_a_metric_that_the_user_names_still_chooses(build_spin, answers) -> None:
    trainer = build_spin(eval_dataset=answers(2, first=50), eval_reward_funcs=says_so,
                         metric_for_best_model="logps")  # fmt: skip
    assert trainer.run.chosen_metric == "eval_logps"


def test_task_scores_without_held_out_prompts_are_refused(build_spin) -> None:
    with pytest.raises(ValueError, match="eval_reward_funcs needs an `eval_dataset`"):
        build_spin(eval_reward_funcs=says_so)


def test_a_choice_by_falling_likelihood_is_warned_of(build_spin, answers, caplog) -> None:
    """The untrained model can win although every round tells the data from its opponent."""
    trainer = build_spin(num_rounds=1, eval_dataset=answers(12, first=50))
    folder = trainer.run.folder(-1) / "evaluation"
    save_scores(folder / "scores.json", HeldOutScores({"eval_logps": 0.0}, {}, 0.0))
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "round 0: eval_logps is -" in caplog.text
    assert "eval_reward_funcs" in caplog.text
    assert "loaded the weights of the untrained model" in caplog.text


@pytest.mark.parametrize(
    ("metrics", "warned"),
    [
        ({"eval_logps": -2.0, "eval_win_rate": 0.8, "eval_win_rate_low": 0.6}, True),
        ({"eval_logps": -2.0, "eval_win_rate": 0.6, "eval_win_rate_low": 0.4}, False),
        ({"eval_logps": -0.5, "eval_win_rate": 0.8, "eval_win_rate_low": 0.6}, False),
        ({"eval_logps": -2.0}, False),
    ],
)
def test_likelihood_that_falls_is_warned_of_only_where_the_rounds_work(metrics, warned) -> None:
    warning = warn_falling_likelihood({"eval_logps": -1.0}, metrics, 3)
    assert (warning is not None) == warned
    assert warning is None or warning.startswith("round 3: eval_logps is -2.000, below")


def test_a_run_whose_round_kept_nothing_stops_the_same_way_when_resumed(build_spin) -> None:
    settings = {"max_completion_length": 1, "num_rounds": 1}
    with pytest.raises(EmptyRoundError, match="12 truncated"):
        build_spin(**settings).train()
    with pytest.raises(EmptyRoundError, match="12 truncated"):
        build_spin(**settings).train(resume_from_checkpoint=True)
    stopped = build_spin(on_empty_round="stop", **settings)
    stopped.train(resume_from_checkpoint=True)
    assert stopped.run.lines == []
