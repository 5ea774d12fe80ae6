import asyncio
import functools
import gc
import logging
import sys
import threading
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from trl.rewards import think_format_reward

from trl_selfplay.rewards import (
    choice_reward,
    exact_reward,
    guarded_call,
    math_reward,
    puzzle_reward,
)
from trl_selfplay.rewards.functions import columns_read
from trl_selfplay.rewards.scores import Scores
from trl_selfplay.rewards.scoring import Scorer
from trl_selfplay.rewards.worker import close_workers


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
    rows = scorer.score(
        prompts=["p"] * len(completions),
        completions=list(completions),
        completion_ids=[[1]] * len(completions),
        columns={k: list(v) for k, v in columns.items()},
    )
    return [tuple(row) for row in rows]


def test_a_nan_abstains_as_for_grpo() -> None:
    assert score(Scorer(not_a_number)) == [(1.0,), (None,)]


def test_the_name_of_a_function_is_not_taken_for_a_reward_model() -> None:
    with pytest.raises(ValueError, match=r"from trl_selfplay\.rewards import exact_reward"):
        Scorer("exact_reward")


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


class LogsOnce:
    """Logs a number for each completion, the first time it is called."""

    calls = 0

    def __call__(self, completions, log_metric, log_extra, **kwargs):
        self.calls += 1
        if self.calls == 1:
            log_extra("note", ["x"] * len(completions))
            for completion in completions:
                log_metric("words", len(completion))
        return [1.0] * len(completions)


def test_numbers_that_functions_log_are_averaged_and_belong_to_their_call() -> None:
    scorer = Scorer(LogsOnce())
    score(scorer, ["a", "bbb"])
    assert scorer.take_metrics() == {"words": 2.0}
    score(scorer)
    assert scorer.take_metrics() == {}


def test_the_trainer_s_state_is_passed_on() -> None:
    def look(completions, trainer_state, **kwargs):
        return [float(trainer_state)] * len(completions)

    assert Scorer(look, get_trainer_state=lambda: 7).score(["p"], ["c"], [[1]], {}) == [[7.0]]


class Client:
    """As an HTTP client: its lock belongs to the event loop of its first use."""

    def __init__(self):
        self.lock = asyncio.Lock()
        self.entered = 0
        self.most = 0

    async def __call__(self, completions, **kwargs):
        self.entered += 1
        self.most = max(self.most, self.entered)
        await asyncio.sleep(0.05)
        async with self.lock:
            await asyncio.sleep(0)
        self.entered -= 1
        return [1.0] * len(completions)


def test_async_functions_run_together_and_on_one_loop_for_good() -> None:
    client = Client()
    scorer = Scorer([client, client])
    for _ in range(2):
        assert score(scorer) == [(1.0, 1.0)] * 2
    assert client.most == 2


def test_a_closed_or_lost_scorer_leaves_no_thread() -> None:
    """VF-7; a closed one starts another thread when it is needed."""
    before = threading.active_count()
    scorer = Scorer(later)
    score(scorer)
    assert threading.active_count() == before + 1
    scorer.close()
    assert threading.active_count() == before
    score(scorer)
    del scorer
    gc.collect()
    assert threading.active_count() == before


def test_sync_functions_have_no_thread() -> None:
    before = threading.active_count()
    score(Scorer(length))
    assert threading.active_count() == before


def too_few(completions, **kwargs):
    return [1.0]


def a_number(completions, **kwargs):
    return 1.0


def words(completions, **kwargs):
    return ["good", "bad"]


def numbers_as_text(completions, **kwargs):
    return ["1.0"] * len(completions)


def not_a_number(completions, **kwargs):
    return [1.0, float("nan")]


def broken(completions, **kwargs):
    return 1 / 0


async def broken_later(completions, **kwargs):
    return 1 / 0


def infinite(completions, **kwargs):
    return [1.0, float("inf")]


def minus_infinite(completions, **kwargs):
    return torch.tensor([1.0, -torch.inf])


def enormous(completions, **kwargs):
    return [1.0, -1e308]


def long_integer(completions, **kwargs):
    return [1.0, 10**400]


def leaves(completions, **kwargs):
    sys.exit(0)


async def leaves_later(completions, **kwargs):
    raise SystemExit


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
        (numbers_as_text, TypeError, "'numbers_as_text' returned '1.0' for completion 0"),
        (broken, RuntimeError, "'broken' raised ZeroDivisionError"),
        (broken_later, RuntimeError, "'broken_later' raised ZeroDivisionError"),
        (infinite, ValueError, "'infinite' returned inf for completion 1, 'bb' to the prompt 'p'"),
        (minus_infinite, ValueError, "'minus_infinite' returned -inf for completion 1"),
        (enormous, ValueError, r"'enormous' returned -1e\+308 for completion 1"),
        (long_integer, ValueError, "'long_integer' returned 10+.* for completion 1"),
        (leaves, RuntimeError, "'leaves' raised SystemExit: 0"),
        (leaves_later, RuntimeError, "'leaves_later' raised SystemExit"),
        (needs_gold, ValueError, r"'needs_gold' needs \['gold'\].*\['prompt', 'solution'\]"),
        (takes_no_more, ValueError, r"'takes_no_more' doesn't take .*'solution'.* add \*\*kwargs"),
    ],
)
def test_a_function_that_misbehaves_is_named(function, kind, message) -> None:
    with pytest.raises(kind, match=message):
        score(Scorer([tens, function]), solution=["1", "2"])


@pytest.mark.parametrize(
    "name", ["completions", "prompts", "trainer_state", "log_extra", "log_metric"]
)
def test_a_column_never_takes_the_place_of_what_functions_get(name) -> None:
    """Whatever a call of ours passes is refused as the name of a column, or not forwarded."""
    with pytest.raises(ValueError, match=f"has a column '{name}'.*Rename it"):
        Scorer(length).check_columns(["solution", name], "train_dataset")
    with pytest.raises(ValueError, match=f"has a column '{name}'"):
        Scorer(length).score(["p"], ["c"], [[1]], {name: ["gold"]})


@pytest.mark.parametrize("function", [tens, later])
def test_every_name_that_a_call_passes_is_known_as_such(function) -> None:
    seen = {}

    def look(**kwargs):
        seen.update(kwargs)
        return function(**kwargs)

    score(Scorer(look if function is tens else _async(look)))
    scorer = Scorer(tens)
    for name in seen.keys() - {"completion_ids"}:  # not forwarded, as for GRPOTrainer
        with pytest.raises(ValueError, match="has a column"):
            scorer.check_columns([name], "train_dataset")
    assert score(scorer, completion_ids=["x", "y"]) == [(10.0,), (10.0,)]


def _async(function):
    async def call(**kwargs):
        return await function(**kwargs)

    return call


def test_columns_are_checked_before_anything_is_scored() -> None:
    with pytest.raises(
        ValueError, match=r"'needs_gold' needs \['gold'\], and train_dataset has.*--solution_column"
    ):
        Scorer([tens, needs_gold]).check_columns(["solution"], "train_dataset")
    Scorer([tens, needs_gold]).check_columns(["gold"], "train_dataset")


def test_rewards_whose_sum_overflows_are_refused() -> None:
    scorer = Scorer([tens, length], reward_weights=[1e300, 1e300])
    with pytest.raises(ValueError, match=r"'tens': 10.0, 'length': 2.0.*sum to 1.2e\+301"):
        scorer.weighted((10.0, 2.0))
    with pytest.raises(ValueError, match="isn't finite"):
        Scorer([tens, length], reward_weights=[1.0, float("inf")])


def test_only_finite_numbers_that_functions_log_are_averaged() -> None:
    def logs(completions, log_metric, **kwargs):
        for value in (1.0, float("inf"), 3.0, float("nan")):
            log_metric("level", value)
        log_metric("broken", float("nan"))
        return [1.0] * len(completions)

    scorer = Scorer(logs)
    score(scorer)
    assert scorer.take_metrics() == {"level": 2.0}


def test_logged_means_don_t_depend_on_how_completions_are_divided_into_calls() -> None:
    """Whether a function logs once per call, per completion, or for some completions."""

    def logs(completions, log_metric, **kwargs):
        sizes = [len(c) for c in completions]
        log_metric("per call", sum(sizes) / len(sizes))
        for size in sizes:
            log_metric("per completion", size)
            if size > 1:
                log_metric("some", size)
        return [1.0] * len(completions)

    completions = ["a", "bb", "ccc", "dd", "eeeeeee", "f", "gg"]
    scorer = Scorer(logs)
    for ends in ([7], [1, 7], [4, 5, 7]):
        for start, end in zip([0, *ends], ends, strict=False):
            score(scorer, completions[start:end])
        assert scorer.take_metrics() == {
            "per call": 18 / 7, "per completion": 18 / 7, "some": 16 / 5,
        }  # fmt: skip


@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_that_does_not_answer_is_mentioned(is_async, monkeypatch, caplog) -> None:
    """It returns once the log has named it and what it is scoring."""
    mentioned = threading.Event()

    class Seen(logging.Handler):
        def emit(self, record):
            mentioned.set()

    def waits(completions, **kwargs):
        assert mentioned.wait(60.0)
        return [1.0] * len(completions)

    async def waits_later(completions, **kwargs):
        return waits(completions)

    monkeypatch.setattr(guarded_call, "SLOW_AFTER_S", 0.01)
    handler = Seen()
    guarded_call.logger.addHandler(handler)
    function = waits_later if is_async else waits
    try:
        Scorer([function]).score(["p"], ["c"], [[1]], {}, where="shard 00003, round 1")
    finally:
        guarded_call.logger.removeHandler(handler)
    (record,) = caplog.records
    assert record.getMessage().startswith(
        f"reward function {function.__name__} has not returned after 0 s on 1 completions of shard "
        "00003, round 1"
    )


def test_a_function_that_names_all_it_gets_needs_no_more() -> None:
    def exact(prompts, completions, completion_ids, solution, trainer_state, log_extra, log_metric):
        return [1.0] * len(completions)

    assert score(Scorer(exact), solution=["1", "2"]) == [(1.0,), (1.0,)]


def test_a_decorator_decides_what_its_function_gets() -> None:
    def drop_columns(function):
        @functools.wraps(function)
        def wrapper(completions, **kwargs):
            return function(completions)

        return wrapper

    assert score(Scorer(drop_columns(takes_no_more)), solution=["1", "2"]) == [(1.0,), (1.0,)]


def test_an_interrupt_passes_through() -> None:
    def interrupted(completions, **kwargs):
        raise KeyboardInterrupt

    async def interrupted_later(completions, **kwargs):
        raise KeyboardInterrupt

    for function in (interrupted, interrupted_later):
        with pytest.raises(KeyboardInterrupt):
            score(Scorer(function))


def test_a_sync_failure_leaves_no_coroutine_behind() -> None:
    """It would be a warning about a coroutine that was never awaited."""
    with pytest.raises(RuntimeError, match="'broken'"):
        score(Scorer([later, broken]))
    gc.collect()


def test_the_caller_s_list_is_not_changed() -> None:
    funcs = [length, length]
    assert Scorer(funcs).names == ("length", "length_2")
    assert funcs == [length, length]


def test_names_are_unique_whatever_they_are() -> None:
    def f(**kwargs): ...
    def f_2(**kwargs): ...

    assert Scorer([f_2, f, f]).names == ("f_2", "f", "f_3")
    assert Scorer([f, f, f_2, f_2]).names == ("f", "f_2", "f_2_2", "f_2_3")
    assert Scorer([lambda **_: [], functools.partial(f)]).names == ("<lambda>", "f")


def test_trl_s_own_rewards_take_plain_text_here() -> None:
    assert score(Scorer(think_format_reward), ["<think>\na\n</think>\nb", "c"]) == [(1.0,), (0.0,)]
    assert score(Scorer(functools.partial(think_format_reward)), ["c"]) == [(0.0,)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reward_funcs": [3]}, "reward_funcs holds 3"),
        ({"reward_funcs": []}, "reward_funcs is empty"),
        ({"reward_funcs": [length], "reward_weights": [1.0, 2.0]}, "2 entries for 1"),
        ({"reward_funcs": [length], "reward_processing_classes": []}, "0 entries for 1"),
        # as for GRPOTrainer: one tokenizer is not that of two reward models
        ({"reward_funcs": [length] * 2, "reward_processing_classes": object()}, "1 entries for 2"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Scorer(**arguments)


@pytest.mark.slow
def test_the_same_functions_serve_grpo(tmp_path, tiny_model, word_tokenizer, sums) -> None:
    """VF-14: sync and async, with the scores that our own scorer gives them."""
    from trl import GRPOConfig, GRPOTrainer

    graded = []

    async def right_later(completions, solution, **kwargs):
        await asyncio.sleep(0)
        graded.append((completions, solution))
        return exact_reward(completions, solution)

    functions = [exact_reward, choice_reward, right_later]
    if find_spec("math_verify"):
        functions.append(math_reward)
    if find_spec("reasoning_gym"):
        functions.append(puzzle_reward("chain_sum"))
    word_tokenizer.padding_side = "left"
    trainer = GRPOTrainer(
        tiny_model(word_tokenizer),
        reward_funcs=list(functions),
        args=GRPOConfig(
            str(tmp_path), num_generations=2, per_device_train_batch_size=2, max_steps=1,
            max_completion_length=4, report_to=[], bf16=False, use_cpu=True, save_strategy="no",
            logging_steps=1,
        ),
        train_dataset=sums(4),
        processing_class=word_tokenizer,
    )  # fmt: skip
    assert trainer.train().global_step == 1
    ((completions, solution),) = graded
    scorer = Scorer(functions)
    ours = score(scorer, completions, solution=solution)
    for index, name in enumerate(scorer.names):
        present = [scores[index] for scores in ours if scores[index] is not None]
        if present:
            logged = trainer.state.log_history[0][f"rewards/{name}/mean"]
            assert logged == pytest.approx(sum(present) / len(present))
    close_workers()


def test_solutions_that_nothing_can_be_graded_against_are_found_before_sampling() -> None:
    """VF-11's first half: by function and index; functions that read no solution aren't asked."""

    def constant(completions, **kwargs):
        return [1.0] * len(completions)

    scorer = Scorer([functools.partial(exact_reward), constant])
    found = scorer.find_data_errors(["p"] * 4, {"solution": ["4", "", None, "#### 7"]})
    assert found == {
        "exact_reward": {1: "the solution '' can't be read", 2: "the solution 'None' can't be read"}
    }
    assert scorer.find_data_errors(["p"], {"solution": ["4"]}) == {}


def test_a_function_names_the_rows_that_it_can_t_grade_itself() -> None:
    """It sees all columns, as when it grades, and the options that it was given."""

    def runs(completions, tests, strict=False, **kwargs):
        return [1.0] * len(completions)

    def find_data_errors(prompts, tests, level, strict=False, **kwargs):
        assert (prompts, level, strict) == (["p", "q"], [1, 2], True)
        return {i: "the tests don't compile" for i, text in enumerate(tests) if "(" in text}

    runs.find_data_errors = find_data_errors
    scorer = Scorer(functools.partial(runs, strict=True))
    columns = {"tests": ["assert f(", "assert f"], "level": [1, 2], "completion": ["a", "b"]}
    assert scorer.find_data_errors(["p", "q"], columns) == {"runs": {0: "the tests don't compile"}}


def test_each_function_s_causes_of_abstentions_are_kept() -> None:
    def ties(completions, **kwargs):
        return Scores([1.0, None, None], {1: "tie"})

    async def dies(completions, **kwargs):
        return Scores([None] * 3, {0: "the process died", 1: "no answer"})

    rows = Scorer([ties, length, dies]).score(["p"] * 3, ["a", "bb", "ccc"], [[1]] * 3, {})
    assert rows == [[1.0, 1.0, None], [None, 2.0, None], [None, 3.0, None]]
    assert [row.causes for row in rows] == [{2: "the process died"}, {0: "tie", 2: "no answer"}, {}]


def test_a_cause_that_would_act_on_a_terminal_is_shown_as_an_escape() -> None:
    def quotes(completions, **kwargs):
        return Scores([None], {0: "said \x1b[2J\u202e"})

    [row] = Scorer([quotes]).score(["p"], ["a"], [[1]], {})
    assert row.causes == {0: r"said \x1b[2J\u202e"}


@pytest.mark.parametrize("causes", [{0: "tie"}, {2: "tie"}, {1: 3}])
def test_the_cause_of_no_abstention_is_an_error(causes) -> None:
    def wrong(completions, **kwargs):
        return Scores([1.0, None], causes)

    with pytest.raises(ValueError, match=r"'wrong' gave .* as the cause"):
        score(Scorer(wrong))


def test_a_reward_model_may_be_named_like_a_function() -> None:
    """An id has an owner; without a network it isn't found, which is another error."""
    with pytest.raises(ValueError, match="names a reward model"):
        Scorer("exact_reward")
    with pytest.raises(OSError, match="huggingface"):
        Scorer("owner/helpful_reward")


def names_one(completions, gold, **kwargs):
    return [0.0] * len(completions)


def looks_up(completions, **kwargs):
    return [kwargs["gold"]] * len(completions)


def closes_over(completions, **columns):
    return [(lambda: columns["gold"])() for _ in completions]


def takes_all_of_them(completions, **columns):
    return [len(locals()["columns"])] * len(completions)


async def waits(completions, gold, **kwargs):
    return [0.0] * len(completions)


class Graded:
    def __call__(self, completions, gold, **kwargs):
        return [0.0] * len(completions)

    def looks_up(self, completions, **kwargs):
        return [kwargs.get("id")] * len(completions)


@functools.wraps(names_one)
def wrapped(*args, **kwargs):
    return names_one(*args, **kwargs)


@pytest.mark.parametrize(
    ("reward_funcs", "read"),
    [
        (None, []),
        ("org/reward-model", []),
        (names_one, ["gold"]),
        (waits, ["gold"]),
        (Graded(), ["gold"]),
        (functools.partial(names_one, extra=1), ["gold"]),
        (exact_reward, ["solution"]),
        (math_reward, ["solution"]),
        ([exact_reward, names_one], ["gold", "solution"]),
        *((f, ["gold", "id", "solution"]) for f in (looks_up, closes_over, takes_all_of_them)),
        (Graded().looks_up, ["gold", "id", "solution"]),
        (wrapped, ["gold", "id", "solution"]),
        (max, ["gold", "id", "solution"]),
    ],
)
def test_the_columns_that_reward_functions_read_are_known(reward_funcs, read) -> None:
    columns = ["prompt", "completion", "gold", "id", "solution"]
    assert columns_read(reward_funcs, columns) == read
