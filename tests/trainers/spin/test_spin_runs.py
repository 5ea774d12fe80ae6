"""Whole SPIN runs: the fixed point, resuming, held-out measures, what is refused."""

import json
import logging
import math
import shutil

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from trl_selfplay import EmptyRoundError
from trl_selfplay.generation.sampler import SampledCompletion
from trl_selfplay.rounds.weights import trainable_parameters

LN_2 = math.log(2.0)


def rows_of(trainer, round_index):
    return load_from_disk(str(trainer.run.folder(round_index) / "dataset")).to_list()


def expected_gradient(trainer, weight):
    """The gradient over all pairs of one-token completions, y from the data, y' from the policy.

    The policy's head is zero: every token has probability 1/V, whatever the prompt.
    """
    head = trainer.model.lm_head.weight
    head.data.zero_()
    vocabulary = head.shape[0]
    model, total = trainer.model, torch.zeros_like(head)
    for y in range(vocabulary):
        rows = [
            {"prompt_ids": [5], "chosen_ids": [y], "rejected_ids": [other],
             "ref_chosen_logps": -math.log(vocabulary), "ref_rejected_logps": -math.log(vocabulary)}
            for other in range(vocabulary)
        ]  # fmt: skip
        model.zero_grad()
        loss = trainer.compute_loss(model, trainer.data_collator(rows))
        assert float(loss.detach()) == pytest.approx(LN_2, abs=1e-6)
        loss.backward()
        total += weight(y) * head.grad
    return float(total.norm())


def test_the_gradient_vanishes_where_the_policy_is_the_data(build_spin, word_tokenizer) -> None:
    """SP-16, exactly: all outcomes of a tiny vocabulary through the trainer's own loss."""
    trainer = build_spin()
    vocabulary = len(word_tokenizer)
    assert expected_gradient(trainer, lambda y: 1 / vocabulary) < 1e-6
    skewed = expected_gradient(trainer, lambda y: float(y == 7))
    assert skewed > 1e-2


def test_data_that_the_policy_wrote_leave_it_where_it_is(
    build_spin, answers, word_tokenizer, capsys
) -> None:
    """SP-16: held-out pairs can't be told apart, and the run says converged."""
    prompts = Dataset.from_list(
        [{"prompt": f"Q {a} {b} {c} ?", "completion": " so"}
         for a in range(6) for b in range(6) for c in range(5)]
    )  # fmt: skip
    writer = build_spin("writer", train_dataset=prompts, seed=7, max_steps=1)
    rollouts = [r for r in writer.play_round(0).rollouts if r.finish == "eos" and r.completion]
    written = [{"prompt": r.prompt, "completion": f" {r.completion}"} for r in rollouts]
    train, heldout = Dataset.from_list(written[:80]), Dataset.from_list(written[80:])
    settings = {"num_rounds": 1, "max_steps": 4, "learning_rate": 1e-3, "max_length": 128}
    trainer = build_spin("same", train_dataset=train, eval_dataset=heldout, **settings)
    trainer.train()
    (line,) = trainer.run.lines
    assert line["eval"]["eval_win_rate_low"] <= 0.5 <= line["eval"]["eval_win_rate_high"]
    assert abs(line["gain"]) < 0.02
    assert abs(line["eval"]["eval_distance"]) < 0.01
    assert line["eval"]["eval_pairs"] >= 20
    assert "round 0: converged" in capsys.readouterr().out

    others = answers(60)
    trainer = build_spin("other", train_dataset=others.select(range(40)),
                         eval_dataset=others.select(range(40, 60)),
                         **settings)  # fmt: skip
    trainer.train()
    assert "converged" not in capsys.readouterr().out
    (line,) = trainer.run.lines
    assert line["eval"]["eval_win_rate"] > 0.9
    assert line["eval"]["eval_margin"] > 0


class Stop(TrainerCallback):
    """Interrupts the run at a step of a round, or as a round's training begins."""

    def __init__(self, round_index, step) -> None:
        self.round_index, self.step, self.now = round_index, step, None

    def on_round_begin(self, args, state, control, round_index, **kwargs):
        self.now = round_index

    def on_train_begin(self, args, state, control, **kwargs):
        self.stop_at(0, state)

    def on_step_end(self, args, state, control, **kwargs):
        self.stop_at(1, state)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.stop_at(2, state)

    def on_round_end(self, args, state, control, round_index, **kwargs):
        self.stop_at(3, state)

    def stop_at(self, step, state):
        if (self.now, step) == (self.round_index, self.step):
            raise KeyboardInterrupt


# (round, where): before the first step, after one, before the third, after the round.
MOMENTS = ((0, 2), (1, 0), (1, 1), (1, 2), (0, 3))
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


@pytest.mark.parametrize(
    ("peft", "moments"),
    [
        pytest.param(True, [(1, 1)], id="lora"),
        pytest.param(False, MOMENTS, id="full, all", marks=pytest.mark.slow),
        pytest.param(True, MOMENTS, id="lora, all", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_pairs_log_probs_and_weights(
    build_spin, answers, peft, moments
) -> None:
    """SP-12: before the first step, inside and after a round's training."""
    settings = {"num_rounds": 2, "save_strategy": "steps", "save_steps": 1, "history_rounds": 1,
                "eval_dataset": answers(4, first=50), "load_best_round_at_end": False}  # fmt: skip

    def build(folder, **changes):
        return build_spin(folder, **settings, **changes,
                          peft_config=LoraConfig(**LORA) if peft else None)  # fmt: skip

    whole = build("whole")
    whole.train()
    for round_index, step in moments:
        with pytest.raises(KeyboardInterrupt):
            build("parts", callbacks=[Stop(round_index, step)]).train()
        interrupted = build("parts", callbacks=[])
        interrupted.train(resume_from_checkpoint=True)
        for t in range(2):
            assert rows_of(interrupted, t) == rows_of(whole, t)
        for mine, other in zip(interrupted.run.lines, whole.run.lines, strict=True):
            assert (mine["eval"], mine["gain"]) == (other["eval"], other["gain"])
        weights = trainable_parameters(whole.model)
        for name, parameter in trainable_parameters(interrupted.model).items():
            assert torch.equal(parameter, weights[name]), name
        shutil.rmtree(interrupted.args.output_dir)


def test_stored_log_probs_are_read_back_and_not_computed_again(build_spin) -> None:
    """SP-12: whatever the weights are by then."""
    trainer = build_spin()
    before = trainer.play_round(0).training_rows.to_list()
    for parameter in trainer.model.parameters():
        parameter.data.mul_(1.5)
    assert trainer.play_round(0).training_rows.to_list() == before


def test_held_out_pairs_are_measured_every_round_and_choose_the_best(build_spin, answers) -> None:
    sets = {"one": answers(6, first=50), "two": answers(4, first=80)}
    trainer = build_spin(num_rounds=2, eval_dataset=sets, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert trainer.run.chosen_metric == "eval_one_logps"
    before = trainer.run.lines[0]["eval_before"]
    assert set(before) == {f"eval_{s}_logps{e}" for s in sets for e in ("", "_low", "_high")}
    for line in trainer.run.lines:
        for name in ("logps", "win_rate", "margin", "loss", "distance", "pairs"):
            assert f"eval_one_{name}" in line["eval"]
        assert line["eval"]["eval_two_distance"] == pytest.approx(
            LN_2 - line["eval"]["eval_two_loss"]
        )
        assert line["gain"] is not None
    metrics = trainer.evaluate(answers(3, first=60))
    assert {"eval_logps", "eval_runtime"} <= set(metrics)
    assert "eval_win_rate" not in metrics
    assert "eval_win_rate" in trainer.evaluate("two")
    with pytest.raises(ValueError, match="no held-out set 'three'"):
        trainer.evaluate("three")
    card = (trainer.run.root.parent / "README.md").read_text()
    assert "## Rounds" in card
    assert "self-play" in card.lower()
    log = [json.loads(text) for text in trainer.run.lines_path.read_text().splitlines()]
    assert log[0]["trained_from"] == "base"
    assert log[1]["trained_from"] == "round 0"


def test_chat_messages_run(build_spin, tiny_model, chat_tokenizer) -> None:
    rows = Dataset.from_list(
        [{"messages": [{"role": "user", "content": str(i)},
                       {"role": "assistant", "content": f"so {i}"}]} for i in range(8)]
    )  # fmt: skip
    trainer = build_spin(model=tiny_model(chat_tokenizer), processing_class=chat_tokenizer,
                         train_dataset=rows, num_rounds=1, max_completion_length=400,
                         max_length=None, num_generations=2)  # fmt: skip
    trainer.train()
    assert trainer.run.lines[0]["examples"] > 0


def test_bfloat16_passes_the_check_of_the_opponent(build_spin, tiny_model, word_tokenizer) -> None:
    """SP-1 in reduced precision: noise of the padding is no wrong opponent."""
    for folder, model, bf16 in (
        ("weights", tiny_model(word_tokenizer).bfloat16(), False),
        ("autocast", tiny_model(word_tokenizer), True),
    ):
        trainer = build_spin(folder, model=model, bf16=bf16, num_rounds=2, learning_rate=1e-2)
        trainer.train()
        assert len(trainer.run.lines) == 2


def test_a_peft_model_can_be_trained_twice(build_spin, tiny_model, word_tokenizer) -> None:
    """The parent's second adapter is gone again, in memory and on disk."""
    model = get_peft_model(tiny_model(word_tokenizer), LoraConfig(**LORA))
    for folder in ("first", "second"):
        trainer = build_spin(folder, model=model, num_rounds=1)
        trainer.train()
    trainer.save_model(trainer.args.output_dir)
    assert not (trainer.run.root.parent / "ref").exists()


# --- bad input -----------------------------------------------------------------------------------


def test_a_reference_model_is_refused_with_the_way_to_override(
    build_spin, tiny_model, word_tokenizer
) -> None:
    with pytest.raises(ValueError, match=r"no second model is held.*compute_ref_log_probs"):
        build_spin(ref_model=tiny_model(word_tokenizer))


def test_arguments_that_rounds_would_ignore_are_refused(build_spin) -> None:
    with pytest.raises(ValueError, match="`compute_metrics` was given"):
        build_spin(compute_metrics=lambda prediction: {})
    with pytest.raises(ValueError, match="`optimizers` was given"):
        build_spin(optimizers=(object(), None))


def test_a_dataset_without_completions_is_refused(build_spin, sums) -> None:
    with pytest.raises(ValueError, match="has no completions to learn from"):
        build_spin(train_dataset=sums(4))


def test_completions_longer_than_max_length_are_left_out(build_spin, answers, caplog) -> None:
    rows = answers(4).to_list()
    rows[2]["completion"] = " so" * 60
    with caplog.at_level(logging.WARNING):
        trainer = build_spin(train_dataset=Dataset.from_list(rows), max_length=40)
    assert "1 of 4 rows are longer than max_length=40" in caplog.text
    assert len(trainer.self_play.rows) == 3
    with pytest.raises(ValueError, match="so none is left"):
        build_spin(max_length=5)


def test_held_out_prompts_that_are_trained_on_are_refused(build_spin, answers) -> None:
    with pytest.raises(ValueError, match="1 of 1 prompts of `eval_dataset`"):
        build_spin(eval_dataset=answers(1))


def test_a_policy_that_generates_only_eos_is_told(build_spin, tiny_model, word_tokenizer) -> None:
    model = tiny_model(word_tokenizer)
    # With one embedding for all tokens every position has the same hidden state, which the row of
    # EOS then answers to.
    embeddings, head = model.model.embed_tokens.weight.data, model.lm_head.weight.data
    embeddings[:] = embeddings[3]
    state = model.model(input_ids=torch.tensor([[3, 4]])).last_hidden_state[0, -1].detach()
    head.zero_()
    head[word_tokenizer.eos_token_id] = 50.0 * state / state.norm()
    with pytest.raises(EmptyRoundError, match="12 empty") as error:
        build_spin(model=model).train()
    assert "ends at once" in str(error.value)


@pytest.mark.parametrize(
    ("ids", "finish", "what"),
    [((1,), "eos", "12 empty"), ((5, 5), "length", "12 truncated")],
)
def test_a_policy_that_writes_nothing_usable_is_told(build_spin, ids, finish, what) -> None:
    trainer = build_spin()
    sampler = trainer.self_play.collector.sampler
    sampler.sample = lambda requests, options, batch_size, on_tokens: (
        (i, SampledCompletion(ids, finish)) for i in range(len(requests))
    )
    with pytest.raises(EmptyRoundError, match=what) as error:
        trainer.train()
    assert "generation prompt" in str(error.value)
    for word in ("reward_threshold", "rationalized", "correct", "solved", "hint"):
        assert word not in str(error.value)
