"""Whole runs in the ways that people set them up: chat, adapters, stop strings, several rewards."""

import asyncio

import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model

from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rollouts.stored import load_kept

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}


def samples(trainer, round_index):
    folder = trainer.run.folder(round_index) / "samples"
    return [r for path in sorted(folder.glob("*.parquet")) for r in load_rollouts(path)]


def short(completions, **kwargs):
    """A reward that byte models meet: any text at all."""
    return [1.0] * len(completions)


def test_chat_prompts_are_sampled_graded_and_trained_on_as_chat(
    build_star, tiny_model, chat_tokenizer
) -> None:
    given = []

    def look(prompts, completions, solution, **kwargs):
        given.extend(zip(prompts, completions, strict=True))
        return [1.0] * len(completions)

    rows = [{"prompt": [{"role": "user", "content": f"say {c}"}], "solution": c} for c in "abcdef"]
    trainer = build_star(
        model=tiny_model(chat_tokenizer, seed=1), processing_class=chat_tokenizer,
        train_dataset=dataset(rows), reward_funcs=look, num_generations=40, num_rounds=1,
        max_completion_length=24, rationalize=False,
        few_shot_examples=[{"prompt": "say z", "completion": "z", "solution": "z"}],
    )  # fmt: skip
    trainer.train()
    prompt, completion = given[0]
    assert prompt[0]["role"] == "user"
    assert completion[0]["role"] == "assistant"
    assert isinstance(completion[0]["content"], str)
    kept = load_kept(trainer.run.folder(0))
    assert kept
    assert kept[0].prompt.startswith("<user>say z<eos><assistant>z<eos><user>say")
    trained = {tuple(row["input_ids"]) for row in load_from_disk(trainer.run.folder(0) / "dataset")}
    for rollout in kept:
        row = next(r for r in trainer.self_play.rows if r.prompt_id == rollout.prompt_id)
        text = f"<user>{row.prompt[0]['content']}<eos><assistant>"
        ids = chat_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (*ids, *rollout.completion_ids) in trained


def dataset(rows):
    from datasets import Dataset

    return Dataset.from_list(rows)


def test_a_stop_string_ends_the_completion_and_eos_is_learnt_there(build_star) -> None:
    """ST-22 in a whole run: sampled up to the stop string, trained on with EOS behind it."""
    trainer = build_star(stop_strings=["so"], reward_funcs=short, num_rounds=1, rationalize=False)
    trainer.train()
    eos = trainer.processing_class.eos_token_id
    rows = load_from_disk(trainer.run.folder(0) / "dataset").to_list()
    trained = {tuple(t for t in row["labels"] if t != -100) for row in rows}
    kept = load_kept(trainer.run.folder(0))
    stopped = [r for r in kept if r.finish == "stop"]
    assert stopped
    for rollout in stopped:
        assert rollout.completion.endswith("so")
        assert rollout.completion_ids[-1] != eos
        assert (*rollout.completion_ids, eos) in trained
    for rollout in kept:
        if rollout.finish == "eos":
            assert rollout.completion_ids[-1] == eos
            assert rollout.completion_ids in trained


def test_few_shot_examples_can_be_left_out_after_the_first_rounds(build_star) -> None:
    example = {"prompt": "Q 9 + 9 = ?", "completion": " so 8", "solution": "8"}
    trainer = build_star(few_shot_examples=[example], few_shot_rounds=1, reward_funcs=short,
                         rationalize=False)  # fmt: skip
    trainer.train()
    shown = trainer.processing_class("Q 9 + 9 = ? so 8")["input_ids"]
    first, second = (samples(trainer, i) for i in (0, 1))
    plain = {r.prompt_id: r.prompt_ids for r in second}
    assert plain
    for rollout in first:
        assert list(rollout.prompt_ids) == [*shown, *plain[rollout.prompt_id]]


@pytest.mark.parametrize("start_from", ["base", "previous"])
def test_an_adapter_that_the_user_trained_is_where_rounds_begin(
    build_star, tiny_model, word_tokenizer, recorder, start_from
) -> None:
    """ST-1, ST-3 for a PeftModel: its own weights are the initial ones, not a fresh adapter."""
    torch.manual_seed(5)
    config = LoraConfig(**LORA, init_lora_weights=False)
    model = get_peft_model(tiny_model(word_tokenizer), config)
    given = recorder.copy(model)
    trainer = build_star(
        model=model, callbacks=[recorder], start_from=start_from, reward_funcs=short
    )
    trainer.train()
    first, second = recorder.weights_at_train_begin
    expected = given if start_from == "base" else recorder.weights_at_train_end[0]
    assert all(torch.equal(first[n], given[n]) for n in given)
    assert all(torch.equal(second[n], expected[n]) for n in given)
    assert any(not torch.equal(recorder.weights_at_train_end[1][n], given[n]) for n in given)


def test_rounds_under_activation_checkpointing_equal_rounds_without(build_star, recorder) -> None:
    ends = []
    for folder, checkpointing in (("a", False), ("b", True)):
        trainer = build_star(folder, gradient_checkpointing=checkpointing, reward_funcs=short,
                             peft_config=LoraConfig(**LORA), callbacks=[recorder])  # fmt: skip
        trainer.train()
        ends.append(recorder.weights_at_train_end[-1])
        assert isinstance(trainer.model, PeftModel)
    for name, weight in ends[0].items():
        torch.testing.assert_close(weight, ends[1][name], rtol=1e-4, atol=1e-6)


def test_several_rewards_are_weighed_and_logged_and_async_ones_run(build_star, recorder) -> None:
    states = []

    def digits(completions, trainer_state, log_metric, **kwargs):
        states.append(trainer_state)
        log_metric("asked", len(completions))
        return [float(any(w.isdigit() for w in c.split())) for c in completions]

    async def yes(completions, **kwargs):
        await asyncio.sleep(0)
        return [float("yes" in c.split()) for c in completions]

    trainer = build_star(reward_funcs=[digits, yes], reward_weights=[1.0, 0.5], num_rounds=1,
                         rationalize=False, num_generations=12, callbacks=[recorder])  # fmt: skip
    trainer.train()
    graded = samples(trainer, 0)
    assert {len(r.rewards) for r in graded} == {2}
    for rollout in graded:
        words = rollout.completion.split()
        expected = (float(any(w.isdigit() for w in words)), float("yes" in words))
        assert rollout.rewards == expected
        assert rollout.reward == expected[0] + 0.5 * expected[1]
    assert set(trainer.run.lines[0]["rewards"]) == {"mean", "digits", "yes"}
    assert states
    assert all(state is not None for state in states)
    assert any("play/asked" in log for log in recorder.logs)
