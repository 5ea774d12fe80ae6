"""What a constructor finds out from several arguments together: metrics of the held-out sets."""

import pytest
from datasets import Dataset
from transformers import EarlyStoppingCallback

from trl_selfplay.rewards import exact_reward


@pytest.mark.parametrize("method", ["star", "rest_em", "spin", "irpo"])
@pytest.mark.parametrize("name", ["eval_reward", "eval_rewards/accuracies", "reward", "abc", ""])
def test_an_unknown_metric_is_refused_with_those_that_there_are(
    request, sums, answers, method, name
) -> None:
    heldout = (answers if method == "spin" else sums)(4, first=90)
    known = "eval_b_win_rate" if method == "spin" else "eval_b_pass@4_low"
    with pytest.raises(ValueError, match=known) as caught:
        request.getfixturevalue(f"build_{method}")(
            eval_dataset={"a": heldout.select([0]), "b": heldout.select([1])},
            num_generations_eval=4, metric_for_best_model=name,
        )  # fmt: skip
    assert f"metric_for_best_model={name!r}" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "full"),
    [
        ("accuracy", "eval_a_accuracy"),
        ("eval_accuracy", "eval_a_accuracy"),
        ("eval_b_accuracy", "eval_b_accuracy"),
        ("b_pass@2", "eval_b_pass@2"),
        ("eval_a_mean_reward", "eval_a_mean_reward"),
    ],
)
def test_a_metric_is_that_of_the_first_set_unless_another_is_named(
    build_star, sums, given, full
) -> None:
    sets = {"a": sums(2, first=90), "b": sums(2, first=95)}
    trainer = build_star(eval_dataset=sets, metric_for_best_model=given, num_generations_eval=2)
    assert trainer.args.metric_for_best_model == full
    assert trainer.run.chosen_metric == full


@pytest.mark.parametrize("method", ["star", "rest_em", "spin", "irpo"])
def test_the_metrics_that_there_are_are_those_of_a_round(request, sums, answers, method) -> None:
    """Named from what one prompt would be measured by, so they can't differ from what is logged."""
    heldout = (answers if method == "spin" else sums)(4, first=90)
    trainer = request.getfixturevalue(f"build_{method}")(
        eval_dataset=heldout, num_rounds=1, num_generations_eval=3, max_steps=1
    )
    trainer.train()
    logged = trainer.run.lines[0]["eval"]
    assert set(logged) == {f"eval_{name}" for name in trainer.args.heldout_metric_names()}


@pytest.mark.parametrize(
    ("method", "metric", "greater"),
    [
        ("star", "accuracy", True),
        ("star", "eval_truncated", False),
        ("rest_em", "eval_abstained", False),
        ("spin", "eval_loss", False),
        ("spin", None, True),
    ],
)
def test_smaller_is_better_where_the_metric_is_a_loss_or_a_share_of_failures(
    request, sums, answers, method, metric, greater
) -> None:
    heldout = (answers if method == "spin" else sums)(4, first=90)
    build = request.getfixturevalue(f"build_{method}")
    trainer = build("a", eval_dataset=heldout, metric_for_best_model=metric)
    assert trainer.args.greater_is_better is greater  # of early stopping
    assert trainer.run.greater_is_better is greater  # of the best round
    said = build("b", eval_dataset=heldout, metric_for_best_model=metric,
                 greater_is_better=not greater)  # fmt: skip
    assert said.run.greater_is_better is not greater


def test_early_stopping_finds_the_metric(build_star, sums) -> None:
    trainer = build_star(
        eval_dataset=sums(4, first=90), metric_for_best_model="truncated", num_rounds=1,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, callbacks=[EarlyStoppingCallback(1)],
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric is not None


def test_few_shot_rounds_need_examples(build_star) -> None:
    with pytest.raises(ValueError, match="few_shot_rounds=1 needs `few_shot_examples`"):
        build_star(few_shot_rounds=1)


@pytest.mark.parametrize("method", ["star", "rest_em", "irpo"])
def test_rows_are_told_apart_by_what_their_graders_read(request, sums, method) -> None:
    """Training rows by `reward_funcs`, held-out ones by `eval_reward_funcs` where there are any."""

    def by_level(completions, level, **kwargs):
        return [float(value) for value in level]

    def on_two_levels(rows):
        return Dataset.from_list([{**row, "level": level} for row in rows for level in (0, 1)])

    settings = {
        "train_dataset": on_two_levels(sums(6)),
        "eval_dataset": on_two_levels(sums(4, first=90)),
        "reward_funcs": by_level,
    }
    graders = [None] if method == "star" else [None, exact_reward]
    for eval_reward_funcs in graders:
        own = {} if eval_reward_funcs is None else {"eval_reward_funcs": eval_reward_funcs}
        play = request.getfixturevalue(f"build_{method}")(**settings, **own).self_play
        assert len({row.prompt_id for row in play.rows}) == 12
        assert len(play.heldout[""]) == (8 if eval_reward_funcs is None else 4)
