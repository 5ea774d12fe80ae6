import asyncio
import functools

import numpy as np
import pytest
import torch
from trl.rewards import think_format_reward

from trl_selfplay.rewards import exact_reward
from trl_selfplay.rewards.scoring import Scorer


def length(completions, **kwargs):
    return [float(len(c)) for c in completions]


def tens(completions, scale=10.0, **kwargs):
    return [scale] * len(completions)


async def later(completions, **kwargs):
    await asyncio.sleep(0)
    return [0.5] * len(completions)


class Later:
    async def __call__(self, completions, **kwargs):
        return [None] * len(completions)


def score(scorer, completions=("a", "bb"), **columns):
    return scorer.score(
        prompts=["p"] * len(completions),
        completions=list(completions),
        completion_ids=[[1]] * len(completions),
        columns={k: list(v) for k, v in columns.items()},
    )


def test_each_function_s_score_is_kept_and_weighed() -> None:
    """As for GRPOTrainer: None is left out of the sum; None from all is None."""
    funcs = [length, functools.partial(tens, scale=2.0), later, Later()]
    scorer = Scorer(funcs, reward_weights=[1.0, 0.5, 4.0, 9.0])
    assert scorer.names == ("length", "tens", "later", "Later")
    rewards = score(scorer)
    assert rewards == [(1.0, 2.0, 0.5, None), (2.0, 2.0, 0.5, None)]
    assert [scorer.weighted(r) for r in rewards] == [1.0 + 1.0 + 2.0, 2.0 + 1.0 + 2.0]
    assert scorer.weighted((None,) * 4) is None


def test_async_functions_work_inside_a_running_loop() -> None:
    """As in a notebook."""

    async def cell():
        return score(Scorer(later))

    assert asyncio.run(cell()) == [(0.5,), (0.5,)]


def test_columns_arrive_by_name() -> None:
    seen = {}

    def look(prompts, completions, completion_ids, solution, trainer_state, **kwargs):
        seen.update(kwargs, prompts=prompts, solution=solution, ids=completion_ids)
        return [1.0] * len(completions)

    score(Scorer(look), solution=["1", "2"], level=[3, 4], completion=["x", "y"])
    assert seen["solution"] == ["1", "2"]
    assert seen["level"] == [3, 4]
    assert "completion" not in seen
    assert {"log_extra", "log_metric"} <= seen.keys()


@pytest.mark.parametrize(
    "values", [[1, 0], [True, False], np.array([1.0, 0.0]), torch.tensor([1.0, 0.0]), (1.0, 0.0)]
)
def test_numbers_of_any_library_are_scores(values) -> None:
    assert score(Scorer(lambda completions, **_: values)) == [(1.0,), (0.0,)]


def test_a_nan_abstains_as_for_grpo() -> None:
    assert score(Scorer(lambda completions, **_: [float("nan"), 1.0])) == [(None,), (1.0,)]


def too_few(completions, **kwargs):
    return [1.0]


def a_number(completions, **kwargs):
    return 1.0


def words(completions, **kwargs):
    return ["good", "bad"]


def broken(completions, **kwargs):
    return 1 / 0


async def broken_later(completions, **kwargs):
    return 1 / 0


def needs_gold(completions, gold, **kwargs):
    return [1.0] * len(completions)


def takes_no_more(completions):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        (too_few, ValueError, "'too_few' returned 1 scores for 2 completions"),
        (a_number, TypeError, "'a_number' returned float"),
        (words, TypeError, "'words' returned 'good' for completion 0"),
        (broken, RuntimeError, "'broken' raised ZeroDivisionError"),
        (broken_later, RuntimeError, "'broken_later' raised ZeroDivisionError"),
        (needs_gold, ValueError, r"'needs_gold' needs \['gold'\].*\['prompt', 'solution'\]"),
        (takes_no_more, ValueError, r"'takes_no_more' doesn't take \*\*kwargs"),
    ],
)
def test_a_function_that_misbehaves_is_named(function, kind, message) -> None:
    with pytest.raises(kind, match=message):
        score(Scorer([tens, function]), solution=["1", "2"])


def test_an_interrupt_passes_through() -> None:
    def interrupted(completions, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(Scorer(interrupted))


def test_the_caller_s_list_is_not_changed() -> None:
    funcs = [length, length]
    assert Scorer(funcs).names == ("length", "length_2")
    assert funcs == [length, length]


def test_trl_s_own_rewards_take_plain_text_here() -> None:
    assert score(Scorer(think_format_reward), ["<think>\na\n</think>\nb", "c"]) == [(1.0,), (0.0,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_funcs": [3]}, "reward_funcs holds 3"),
        ({"reward_funcs": [length], "reward_weights": [1.0, 2.0]}, "2 entries for 1"),
        ({"reward_funcs": [length], "reward_processing_classes": []}, "0 entries for 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Scorer(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("function", [exact_reward, later], ids=["sync", "async"])
def test_the_same_function_serves_grpo(
    function, tmp_path, tiny_model, word_tokenizer, sums
) -> None:
    """VF-14."""
    from trl import GRPOConfig, GRPOTrainer

    word_tokenizer.padding_side = "left"
    trainer = GRPOTrainer(
        tiny_model(word_tokenizer),
        reward_funcs=function,
        args=GRPOConfig(
            str(tmp_path), num_generations=2, per_device_train_batch_size=2, max_steps=1,
            max_completion_length=4, report_to=[], bf16=False, use_cpu=True, save_strategy="no",
        ),
        train_dataset=sums(4),
        processing_class=word_tokenizer,
    )  # fmt: skip
    assert trainer.train().global_step == 1
