"""Bad input: an error that says what was wrong, with which value, and what to do."""

import errno
import logging
import re

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import BEMACallback

from trl_selfplay import EmptyRoundError, STaRConfig, STaRTrainer
from trl_selfplay.rewards import exact_reward
from trl_selfplay.rollouts.record import load_rollouts


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda d: d.remove_columns("solution"),
            ValueError,
            "no column 'solution'.*--solution_column answer",
        ),
        (lambda d: d.select([]), ValueError, "empty"),
        (lambda d: None, TypeError, "must be a `datasets.Dataset`"),
        (
            lambda d: IterableDataset.from_generator(lambda: iter(d)),
            TypeError,
            "rounds need a finite set",
        ),
        (lambda d: d.map(lambda row: {"prompt": " "}), TypeError, "row 0"),
        (
            lambda d: Dataset.from_list([{"prompt": [{"role": "user"}], "solution": "1"}]),
            TypeError,
            "messages",
        ),
        (
            lambda d: Dataset.from_list(
                [{"prompt": [{"role": "user", "content": "Q 1"}], "solution": "1"}]
            ),
            ValueError,
            "no chat template",
        ),
        (
            lambda d: d.map(lambda row: {"prompt": "Q " * 3000}),
            ValueError,
            "don't fit the model's context",
        ),
    ],
)
def test_a_dataset_that_cannot_work_is_refused(build_star, sums, make, kind, message) -> None:
    with pytest.raises(kind, match=message):
        build_star(train_dataset=make(sums(12)) if make(sums(12)) is not None else "rows.json")


def test_held_out_prompts_that_are_trained_on_are_refused(build_star, sums) -> None:
    """EV-6, also under another solution."""
    heldout = sums(12).select([3]).map(lambda row: {"solution": "9"})
    with pytest.raises(ValueError, match="1 of 1 prompts of `eval_dataset`"):
        build_star(eval_dataset=heldout)


@pytest.mark.parametrize("name", ["completions", "prompts", "trainer_state", "log_metric"])
def test_a_column_in_place_of_what_reward_functions_get_is_refused(build_star, sums, name) -> None:
    """A dataset's `completions` would be graded instead of what the model writes."""
    named = [sums(n, first=f).add_column(name, ["9"] * n) for n, f in ((12, 0), (4, 90))]
    with pytest.raises(ValueError, match=f"`train_dataset` has a column '{name}'.*rename_column"):
        build_star(train_dataset=named[0])
    with pytest.raises(ValueError, match=f"`eval_dataset` has a column '{name}'"):
        build_star(eval_dataset=named[1])
    with pytest.raises(ValueError, match=f"`hard` has a column '{name}'"):
        build_star(eval_dataset={"hard": named[1]})
    with pytest.raises(ValueError, match=f"`eval_dataset` has a column '{name}'"):
        build_star().evaluate(named[1])


def test_a_column_that_a_reward_function_needs_is_missed_at_construction(build_star, sums) -> None:
    def needs_level(completions, level, **kwargs):
        return level

    with pytest.raises(ValueError, match=r"'needs_level' needs \['level'\], and train_dataset"):
        build_star(reward_funcs=needs_level)
    leveled = sums(12).add_column("level", [1.0] * 12)
    with pytest.raises(ValueError, match=r"'needs_level' needs \['level'\], and eval_dataset"):
        build_star(reward_funcs=needs_level, train_dataset=leveled, eval_dataset=sums(4, first=90))


@pytest.mark.parametrize("where", ["train_dataset", "eval_dataset"])
def test_solutions_that_are_lists_are_refused_with_their_row(build_star, sums, where) -> None:
    """Any text would be compared with "['7']"; a function of one's own may take a list."""
    sets = {"train_dataset": sums(12), "eval_dataset": sums(4, first=90)}
    sets[where] = sets[where].map(lambda row: {"solution": [row["solution"]]})
    with pytest.raises(
        TypeError, match=rf"`{where}` row \d+: the solution is \['\d'\].*exact_reward"
    ):
        build_star(reward_funcs=exact_reward, **sets)
    build_star(rationalize=False, **sets)


def test_no_reward_function_is_refused(build_star) -> None:
    with pytest.raises(ValueError, match="`reward_funcs` is missing"):
        build_star(reward_funcs=None)


@pytest.mark.parametrize("token", ["eos_token", "pad_token"])
def test_a_tokenizer_without_a_token(build_star, word_tokenizer, token) -> None:
    """No EOS can't end a completion; a missing pad is taken from EOS, as TRL does."""
    setattr(word_tokenizer, token, None)
    if token == "eos_token":
        with pytest.raises(ValueError, match="no end-of-sequence token"):
            build_star()
    else:
        build_star(num_rounds=1).train()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_generations": 0}, "num_generations=0"),
        ({"num_rounds": 0}, "num_rounds=0"),
        ({"temperature": 0.0, "num_generations": 2}, "copies of one completion"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"start_from": "scratch"}, "start_from='scratch'"),
        ({"on_empty_round": "ignore"}, "on_empty_round='ignore'"),
        ({"max_per_prompt": 0}, "max_per_prompt=0"),
        ({"round_max_steps": [5], "num_rounds": 2}, "round_max_steps has 1 values"),
        ({"metric_for_best_model": "loss"}, "no held-out loss"),
        ({"history_rounds": -1}, "history_rounds=-1"),
        ({"num_generations_eval": -1}, "num_generations_eval=-1"),
        ({"few_shot_rounds": -1}, "few_shot_rounds=-1"),
        ({"few_shot_rounds": 1, "few_shot_in_training": True}, "Leave one out"),
    ],
)
def test_a_field_that_cannot_work_is_refused_by_name(tmp_path, fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        STaRConfig(str(tmp_path), **fields)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}, "fresh optimizer"),
        ({"compute_metrics": lambda p: {}}, "`compute_metrics`"),
        ({"formatting_func": str}, "`formatting_func`"),
        ({"assistant_only_loss": True}, "assistant_only_loss"),
        ({"generation_kwargs": {"num_beams": 4}}, "'num_beams'=4"),
        ({"load_best_round_at_end": True}, "`eval_dataset`"),
        ({"eval_on_start": True}, "eval_on_start=True needs an `eval_dataset`"),
        ({"stop_after_rounds_without_gain": 1}, "`eval_dataset`"),
        ({"packing": True, "max_length": None}, "max_length"),
        (
            {"peft_config": LoraConfig(init_lora_weights="pissa")},
            "changes the base model's weights",
        ),
        (
            {"peft_config": LoraConfig(init_lora_weights="olora")},
            "changes the base model's weights",
        ),
        ({"few_shot_examples": [{"prompt": "Q"}]}, "few_shot_examples"),
    ],
)
def test_an_argument_that_rounds_would_ignore_is_refused(build_star, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_star(**arguments)


def test_another_configuration_s_rounds_are_left_alone(build_star) -> None:
    build_star(num_rounds=1).train()
    with pytest.raises(FileExistsError, match="resume_from_checkpoint=True"):
        build_star(num_rounds=1).train()
    with pytest.raises(ValueError, match=r"learning_rate: 0.01 → 0.02"):
        build_star(num_rounds=1, learning_rate=2e-2).train(resume_from_checkpoint=True)


def test_a_resumed_run_may_get_more_rounds(build_star) -> None:
    build_star(num_rounds=1).train()
    trainer = build_star(num_rounds=2, logging_steps=2, per_device_train_batch_size=2)
    trainer.train(resume_from_checkpoint=True)
    assert [line["round"] for line in trainer.run.lines] == [0, 1]


def test_resuming_an_empty_directory_starts_round_0(build_star) -> None:
    trainer = build_star(num_rounds=1)
    trainer.train(resume_from_checkpoint=True)
    assert len(trainer.run.lines) == 1


def small_batches(trainer):
    """Make several shards of a dozen prompts."""
    trainer.self_play.collector.sampler.suggest_batch_size = lambda *_: 3
    return trainer


class StopAfterSampling(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        raise KeyboardInterrupt


def test_a_corrupt_shard_is_sampled_again_alone(build_star, caplog) -> None:
    trainer = small_batches(build_star(num_rounds=1, callbacks=[StopAfterSampling()]))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    shards = sorted((trainer.run.folder(0) / "samples").glob("0*.parquet"))
    before = {path: path.read_bytes() for path in shards}
    rollouts_before = load_rollouts(shards[1])
    times = {path: path.stat().st_mtime_ns for path in shards}
    shards[1].write_bytes(before[shards[1]][:100])
    resumed = small_batches(build_star(num_rounds=1))
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert "Its prompts are sampled again" in caplog.text
    assert load_rollouts(shards[1]) == rollouts_before
    for path in set(shards) - {shards[1]}:
        assert path.stat().st_mtime_ns == times[path]


def test_a_full_disk_stops_the_run_and_resuming_goes_on(build_star, monkeypatch) -> None:
    write = pq.write_table
    whole = small_batches(build_star("whole", num_rounds=1))
    whole.train()
    count = 0

    def fill_up(table, file, **options):
        nonlocal count
        count += 1
        if count > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(table, file, **options)

    monkeypatch.setattr(pq, "write_table", fill_up)
    trainer = small_batches(build_star(num_rounds=1))
    with pytest.raises(OSError, match="free some space"):
        trainer.train()
    monkeypatch.setattr(pq, "write_table", write)
    resumed = small_batches(build_star(num_rounds=1))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.train_dataset.to_list() == whole.train_dataset.to_list()


class FailsOnce:
    """Fails once, on the second shard of 12 samples."""

    __name__ = "fails_once"

    def __init__(self, answer) -> None:
        self.answer, self.graded, self.has_failed = answer, 0, False

    def __call__(self, completions, solution, **kwargs):
        self.graded += len(completions)
        if self.graded > 12 and not self.has_failed:
            self.has_failed = True
            return self.answer(completions)
        return [float(s in c.split()) for c, s in zip(completions, solution, strict=True)]


def too_few(completions):
    return [1.0]


def raises(completions):
    return 1 / 0


@pytest.mark.parametrize(("answer", "kind"), [(too_few, ValueError), (raises, RuntimeError)])
def test_a_broken_reward_function_is_named_and_the_samples_stay(build_star, answer, kind) -> None:
    trainer = small_batches(build_star(num_rounds=1, reward_funcs=FailsOnce(answer)))
    with pytest.raises(kind, match="fails_once"):
        trainer.train()
    shards = sorted((trainer.run.folder(0) / "samples").glob("0*.parquet"))
    graded = [all(r.is_graded for r in load_rollouts(path)) for path in shards]
    assert (graded[0], any(graded[1:])) == (True, False)
    sampled = {r.completion_ids for path in shards for r in load_rollouts(path)}
    assert sampled
    resumed = small_batches(build_star(num_rounds=1, reward_funcs=FailsOnce(answer)))
    resumed.self_play.collector.scorer  # noqa: B018  # built anew
    resumed.self_play.collector.scorer.score = trainer.self_play.collector.scorer.score
    resumed.train(resume_from_checkpoint=True)
    assert sampled <= {r.completion_ids for path in shards for r in load_rollouts(path)}
    assert all(r.is_graded for path in shards for r in load_rollouts(path))


class InterruptAt(TrainerCallback):
    def __init__(self, event: str) -> None:
        setattr(self, event, self.interrupt)

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("phase", ["sampling", "grading", "training", "evaluating"])
def test_ctrl_c_stops_cleanly_and_the_run_goes_on(build_star, sums, phase, caplog) -> None:
    heldout = sums(4, first=90)
    settings = {"eval_dataset": heldout, "num_rounds": 1, "load_best_round_at_end": False}
    whole = build_star("whole", **settings)
    whole.train()
    callbacks = [InterruptAt("on_step_end")] if phase == "training" else []
    trainer = build_star(**settings, callbacks=callbacks)
    collector = trainer.self_play.collector
    calls = 0

    def interrupt_at(target, name, call):
        original = getattr(target, name)

        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        setattr(target, name, wrapped)

    if phase == "sampling":
        interrupt_at(collector.sampler, "sample", 3)
    if phase == "grading":
        interrupt_at(collector.scorer, "score", 3)
    if phase == "evaluating":
        interrupt_at(collector.sampler, "sample", 6)
    with caplog.at_level(logging.WARNING), pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert "resume_from_checkpoint=True" in caplog.text
    resumed = build_star(**settings)
    resumed.train(resume_from_checkpoint=True)
    lines = [
        [{k: v for k, v in line.items() if k != "seconds"} for line in t.run.lines]
        for t in (resumed, whole)
    ]
    assert lines[0] == lines[1]


def test_reward_functions_of_which_one_alone_would_do_are_refused(build_star) -> None:
    def in_form(completions, **kwargs):
        return [1.0] * len(completions)

    def right(completions, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"2 reward functions .* Set reward_threshold=2.0"):
        build_star(reward_funcs=[right, in_form])
    build_star("a", reward_funcs=[right, in_form], reward_threshold=2.0)
    build_star("b", reward_funcs=[right, in_form], reward_weights=[1.0, 0.0])
    build_star("c", reward_funcs=[in_form])


def test_greedy_copies_by_generation_kwargs_are_refused(build_star) -> None:
    with pytest.raises(ValueError, match="copies of one completion"):
        build_star(generation_kwargs={"temperature": 0.0})


def test_completions_that_overrun_the_context_by_generation_kwargs_are_refused(build_star) -> None:
    with pytest.raises(ValueError, match="100000"):
        build_star(generation_kwargs={"max_new_tokens": 100_000})


def test_only_too_long_completions_name_the_length(build_star) -> None:
    trainer = build_star(
        max_length=7, reward_funcs=lambda completions, **_: [float(bool(c)) for c in completions]
    )
    with pytest.raises(EmptyRoundError, match="longer than max_length=7 with their prompts"):
        trainer.train()


@pytest.mark.parametrize("max_steps", [-1, 3])
def test_rows_that_drop_last_would_drop_all_are_named_and_kept(build_star, max_steps) -> None:
    settings = {
        "num_rounds": 1, "max_steps": max_steps, "per_device_train_batch_size": 1000,
        "reward_funcs": lambda completions, **_: [1.0] * len(completions),
    }  # fmt: skip
    with pytest.raises(ValueError, match="fewer than one batch of 1000"):
        build_star(dataloader_drop_last=True, **settings).train()
    trainer = build_star(dataloader_drop_last=False, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert len(trainer.run.lines) == 1


@pytest.mark.parametrize("build", ["build_star", "build_spin"])
def test_a_generation_config_that_cannot_be_saved_is_refused(
    request, tiny_model, word_tokenizer, build
) -> None:
    """Llama 2's and Vicuna's, for example: the first checkpoint would fail, after all sampling."""
    model = tiny_model(word_tokenizer)
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.9
    with pytest.raises(ValueError, match=r"no checkpoint could be written(?s:.*)`temperature`"):
        request.getfixturevalue(build)(model=model)
    # Adapters are saved without it.
    request.getfixturevalue(build)("lora", model=model, peft_config=LoraConfig(r=2))


@pytest.mark.parametrize("build", ["build_star", "build_spin"])
def test_tokens_without_an_embedding_are_refused(
    request, tiny_model, word_tokenizer, build
) -> None:
    """In any row, not in the longest alone; one that no row has does no harm."""
    model = tiny_model(word_tokenizer)
    word_tokenizer.add_tokens(["new"])
    rows = [{"prompt": f"Q {i % 10} + {i // 10} = ?", "solution": "1"} for i in range(100)]
    rows = [{**row, "completion": " so 1"} for row in rows]
    request.getfixturevalue(build)(model=model, train_dataset=Dataset.from_list(rows))
    rows.append({"prompt": "new", "completion": "1", "solution": "1"})
    with pytest.raises(
        ValueError, match=r"'new.*has the tokens \['new'\].*has 21, the tokenizer 22"
    ):
        request.getfixturevalue(build)(model=model, train_dataset=Dataset.from_list(rows))


def test_padding_without_an_embedding_is_refused(build_star, tiny_model, word_tokenizer) -> None:
    model = tiny_model(word_tokenizer)
    word_tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"pad_token is '\[PAD\]' with the id 21"):
        build_star(model=model)
    model.resize_token_embeddings(len(word_tokenizer))
    build_star(model=model)


def test_a_round_whose_completions_were_all_cut_says_so(build_star) -> None:
    cut = build_star("cut", temperature=0.0, num_generations=1, max_completion_length=2)
    with pytest.raises(EmptyRoundError, match="All of them were cut at max_completion_length=2"):
        cut.train()


def test_an_empty_round_shows_finished_completions_first(build_star) -> None:
    wrong = build_star("wrong", reward_funcs=lambda completions, **_: [0.0] * len(completions))
    with pytest.raises(EmptyRoundError) as raised:
        wrong.train()
    assert " truncated (" in str(raised.value)
    assert "lower reward_threshold=1.0 (the highest reward, truncated" in str(raised.value)
    assert str(raised.value).count("(finish eos, reward 0.0)") == 3


def test_a_folder_with_an_adapter_alone_is_refused_with_how_it_is_loaded(
    tmp_path, tiny_model, word_tokenizer, sums
) -> None:
    base, folder = str(tmp_path / "base"), str(tmp_path / "adapter")
    tiny_model(word_tokenizer).save_pretrained(base)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig())
    adapted.save_pretrained(folder)
    advice = f"AutoModelForCausalLM.from_pretrained({base!r}), {folder!r}, is_trainable=True)"
    with pytest.raises(ValueError, match=re.escape(advice)):
        STaRTrainer(
            folder, STaRConfig(str(tmp_path)), train_dataset=sums(4), reward_funcs=exact_reward
        )


def test_a_callback_for_one_training_is_refused_where_it_would_fail(build_star) -> None:
    """TRL's BEMA fails with adapters, and in round 1: before, all of a round was sampled."""
    for folder, changes in (
        ("rounds", {}),
        ("lora", {"num_rounds": 1, "peft_config": LoraConfig()}),
    ):
        trainer = build_star(folder, callbacks=[BEMACallback(update_freq=1)], **changes)
        with pytest.raises(ValueError, match="BEMACallback averages"):
            trainer.train()
        assert not trainer.run.root.exists()
    build_star(num_rounds=1, callbacks=[BEMACallback(update_freq=1)]).train()
