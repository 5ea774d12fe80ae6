"""What ends a round's training and what ends the run, also after a kill."""

import shutil

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

SETTINGS = {
    "num_rounds": 2, "max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1,
    "load_best_model_at_end": True, "num_generations_eval": 0, "save_total_limit": None,
    "alarm_actions": {"false-positives": "ignore"},  # it would ask the scripted reward as well
}  # fmt: skip


class Scores:
    """A held-out reward that follows a script: one value for each evaluation, by round."""

    def __init__(self, *rounds) -> None:
        self.values = [value for scores in rounds for value in scores]

    def __call__(self, completions, **kwargs):
        return [self.values.pop(0)] * len(completions)


class KilledError(Exception):
    """In place of a kill: nothing of ours catches it."""


class KillAfterSave(TrainerCallback):
    """Dies once a checkpoint of this step is whole."""

    def __init__(self, step) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


class StopAt(TrainerCallback):
    """Asks to stop at a step."""

    def __init__(self, step) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


class Evaluations(TrainerCallback):
    """Keeps the weights of each evaluation."""

    def __init__(self) -> None:
        self.weights = []

    def on_evaluate(self, args, state, control, model, **kwargs):
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})


def weights_of(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def is_equal(weights, others):
    return all(torch.equal(weights[name], others[name]) for name in weights)


# Before round 0; then each round's evaluations, and the score of the weights that it ends with.
FIRST, SECOND = (0.2, 0.5, 0.4, 0.3, 0.5), (0.3, 0.6, 0.7, 0.6, 0.6, 0.7)


def test_an_m_step_goes_on_while_the_held_out_reward_improves(build_rest_em, sums) -> None:
    """Both rounds run to the second score in a row without gain, and go on from their best one."""
    seen = Evaluations()
    trainer = build_rest_em(
        **SETTINGS, start_from="previous", metric_for_best_model="eval_mean_reward",
        eval_dataset=sums(1, first=90), eval_reward_funcs=Scores([0.1], FIRST, SECOND),
        callbacks=[EarlyStoppingCallback(2), seen],
    )  # fmt: skip
    trainer.train()
    assert [line["steps"] for line in trainer.run.lines] == [4, 5]
    assert [line["eval"]["eval_mean_reward"] for line in trainer.run.lines] == [0.5, 0.7]
    assert is_equal(weights_of(trainer), seen.weights[4 + 2])
    assert not is_equal(seen.weights[4 + 2], seen.weights[4 + 4])


@pytest.mark.parametrize("step", [2, 3, 4])
def test_patience_survives_a_kill(build_rest_em, sums, step) -> None:
    """At step 3 one evaluation has brought no gain, at step 4 two: the training is over."""
    rounds = [0.1], FIRST, SECOND

    def build(folder, scores, *callbacks):
        return build_rest_em(
            folder, **SETTINGS, start_from="previous", metric_for_best_model="eval_mean_reward",
            eval_dataset=sums(1, first=90), eval_reward_funcs=scores,
            callbacks=[EarlyStoppingCallback(2), *callbacks],
        )  # fmt: skip

    whole = build("whole", Scores(*rounds))
    whole.train()
    with pytest.raises(KilledError):
        build("killed", Scores(*rounds), KillAfterSave(step)).train()
    resumed = build("killed", Scores(FIRST[step:], SECOND))
    resumed.train(resume_from_checkpoint=True)
    assert [line["steps"] for line in resumed.run.lines] == [4, 5]
    assert is_equal(weights_of(resumed), weights_of(whole))


def test_a_round_that_stopped_early_stays_so_where_the_kill_came_after_it(
    build_rest_em, sums
) -> None:
    """The model is there and the line isn't."""

    def build(scores, **changes):
        return build_rest_em(
            **{**SETTINGS, "num_rounds": 1, **changes}, metric_for_best_model="eval_mean_reward",
            eval_dataset=sums(1, first=90), eval_reward_funcs=scores, start_from="previous",
            callbacks=[EarlyStoppingCallback(2)],
        )  # fmt: skip

    first = build(Scores([0.1], FIRST))
    first.train()
    first.run.lines_path.unlink()
    shutil.rmtree(first.run.folder(0) / "evaluation")
    again = build(Scores(FIRST[-1:], SECOND), num_rounds=2)
    again.train(resume_from_checkpoint=True)
    assert [line["steps"] for line in again.run.lines] == [4, 5]


def test_any_other_callback_ends_the_run_beside_early_stopping(build_rest_em, sums) -> None:
    """Though an evaluation has been without gain."""
    trainer = build_rest_em(
        **SETTINGS, metric_for_best_model="eval_mean_reward", eval_dataset=sums(1, first=90),
        eval_reward_funcs=Scores([0.1], FIRST), callbacks=[EarlyStoppingCallback(2), StopAt(3)],
    )  # fmt: skip
    trainer.train()
    assert [line["steps"] for line in trainer.run.lines] == [3]


def test_a_callback_that_stops_the_warm_up_ends_the_run(build_rest_em, gold_answers) -> None:
    """And resuming goes on after it."""
    settings = {"warm_up_on_gold": True, "gold_dataset": gold_answers(4), "num_rounds": 1}
    trainer = build_rest_em(**settings, callbacks=[StopAt(2)])
    trainer.train()
    assert trainer.run.lines == []
    assert not (trainer.run.folder(0) / "samples").exists()
    trainer = build_rest_em(**settings)
    trainer.train(resume_from_checkpoint=True)
    assert [line["steps"] for line in trainer.run.lines] == [3]
