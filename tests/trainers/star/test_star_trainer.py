"""STaR's invariants, on real runs of a tiny model."""

import logging
import math
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from trl_selfplay import EmptyRoundError
from trl_selfplay.generation.sampler import SampledCompletion
from trl_selfplay.rewards.scores import Scores
from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rollouts.rows import build_training_rows
from trl_selfplay.rollouts.stored import load_kept, load_samples
from trl_selfplay.rounds.weights import trainable_parameters

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}


def read_samples(trainer, round_index, pattern="*.parquet"):
    folder = trainer.run.folder(round_index) / "samples"
    return [r for path in sorted(folder.glob(pattern)) for r in load_rollouts(path)]


def assert_equal(weights, others) -> None:
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.equal(weights[name], others[name]), name


def differs(weights, others) -> bool:
    return any(not torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_every_round_trains_from_the_initial_weights(build_star, recorder, peft) -> None:
    """ST-1: bit for bit, the initial adapter under LoRA."""
    trainer = build_star(
        num_rounds=3, callbacks=[recorder], peft_config=LoraConfig(**LORA) if peft else None
    )
    initial = recorder.copy(trainer.model)
    trainer.train()
    assert len(recorder.weights_at_train_begin) == 3
    for weights in recorder.weights_at_train_begin:
        assert_equal(weights, initial)
    assert differs(recorder.weights_at_train_end[2], initial)


def test_a_model_given_by_path_starts_again_from_its_files(
    build_star, recorder, saved_tiny_model
) -> None:
    """ST-1 for full fine-tuning of a model named by path: no second copy is kept on disk."""
    trainer = build_star(model=str(saved_tiny_model), callbacks=[recorder])
    initial = recorder.copy(trainer.model)
    trainer.train()
    assert not trainer.run.initial_weights.exists()
    assert_equal(recorder.weights_at_train_begin[1], initial)


def test_a_round_samples_with_the_weights_the_last_one_ended_with(
    build_star, tiny_model, word_tokenizer
) -> None:
    """ST-2: greedy completions equal those of the saved model of the round before."""
    trainer = build_star(temperature=0.0, num_generations=1, rationalize=False,
                         reward_funcs=lambda completions, **_: [1.0] * len(completions),
                         max_completion_length=6, learning_rate=3e-2, max_steps=8,
                         peft_config=LoraConfig(**LORA))  # fmt: skip
    finish_whatever(trainer)
    trainer.train()
    saved = PeftModel.from_pretrained(tiny_model(word_tokenizer), trainer.run.folder(0) / "model")
    first = {r.prompt_id: r.completion_ids for r in read_samples(trainer, 0)}
    second = read_samples(trainer, 1)
    for rollout in second:
        ids = torch.tensor([rollout.prompt_ids])
        out = saved.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6,
                             do_sample=False, pad_token_id=word_tokenizer.pad_token_id)  # fmt: skip
        expected = tuple(out[0, ids.shape[1] :].tolist())
        assert rollout.completion_ids == expected[: len(rollout.completion_ids)]
    assert any(first[r.prompt_id] != r.completion_ids for r in second)


def finish_whatever(trainer) -> None:
    """Let completions that are cut count as finished, so that a random model's greedy text can be
    trained on."""
    sampler = trainer.self_play.collector.sampler
    sample = sampler.sample

    def sample_and_finish(*args):
        for index, sampled in sample(*args):
            yield index, SampledCompletion(sampled.completion_ids, "eos", sampled.logprob)

    sampler.sample = sample_and_finish


def test_a_round_can_start_from_the_one_before(build_star, recorder) -> None:
    """ST-3."""
    build_star(start_from="previous", callbacks=[recorder]).train()
    assert_equal(recorder.weights_at_train_begin[1], recorder.weights_at_train_end[0])


def test_rationalized_examples_train_on_the_plain_prompt(build_star) -> None:
    """ST-4, ST-5, ST-6: hinted only where nothing passed; trained without the hint; ids kept."""
    trainer = build_star(num_rounds=1, leak_filter=lambda *_: None, num_generations=10)
    trainer.train()
    unhinted, hinted = (read_samples(trainer, 0, p) for p in ("0*.parquet", "hint-*.parquet"))
    solved = {r.prompt_id for r in unhinted if r.passes(1.0)}
    assert solved
    assert hinted
    assert {r.prompt_id for r in hinted} == {r.prompt_id for r in unhinted} - solved
    assert {r.sample_index for r in hinted} == set(range(10, 20))
    kept = [r for r in load_kept(trainer.run.folder(0)) if r.hinted]
    assert kept
    plain = {r.prompt_id: r.prompt_ids for r in unhinted}
    rows = {tuple(row["input_ids"]) for row in load_from_disk(trainer.run.folder(0) / "dataset")}
    for rollout in kept:
        assert rollout.prompt_ids != plain[rollout.prompt_id]
        assert (*plain[rollout.prompt_id], *rollout.completion_ids) in rows


def test_the_order_of_the_dataset_has_no_influence(build_star, sums) -> None:
    """ST-9."""
    selected = []
    for folder, dataset in (("a", sums(12)), ("b", sums(12).shuffle(seed=3))):
        trainer = build_star(folder, train_dataset=dataset)
        trainer.train()
        selected.append(
            [(r.prompt_id, r.sample_index, r.completion_ids) for i in (0, 1)
             for r in load_kept(trainer.run.folder(i))]
        )  # fmt: skip
    assert selected[0] == selected[1]


def test_greedy_completions_do_not_depend_on_the_order_of_rows(build_star, sums) -> None:
    """ST-9, its second half."""
    greedy = []
    for folder, dataset in (("a", sums(12)), ("b", sums(12).shuffle(seed=3))):
        trainer = build_star(
            folder, train_dataset=dataset, num_generations=1, temperature=0.0, num_rounds=1,
            on_empty_round="stop",
        )  # fmt: skip
        trainer.train()
        rollouts = load_samples(trainer.run.folder(0))
        greedy.append({r.prompt_id: r.completion_ids for r in rollouts})
    assert len(greedy[0]) == 12
    assert greedy[0] == greedy[1]


def test_optimizer_and_schedule_are_new_in_every_round(build_star, recorder) -> None:
    """ST-12."""
    build_star(callbacks=[recorder], num_rounds=3, lr_scheduler_type="linear").train()
    assert recorder.optimizer_states == [0, 0, 0]
    firsts = {}
    for log in recorder.logs:
        if "learning_rate" in log:
            firsts.setdefault(log["round"], log["learning_rate"])
    assert len(firsts) == 3
    assert len(set(firsts.values())) == 1


@pytest.mark.parametrize("history_rounds", [0, 1])
def test_earlier_rounds_are_trained_on_only_if_asked(build_star, history_rounds) -> None:
    """ST-13."""
    trainer = build_star(history_rounds=history_rounds, deduplicate=False)
    trainer.train()
    kept = [load_kept(trainer.run.folder(i)) for i in (0, 1)]
    texts = {(r.prompt_id, r.completion) for r in kept[1]}
    new_in_first = {(r.prompt_id, r.completion) for r in kept[0]} - texts
    assert new_in_first
    rows = load_from_disk(trainer.run.folder(1) / "dataset")
    assert len(rows) == len(kept[1]) + history_rounds * len(new_in_first)


@pytest.mark.parametrize("few_shot_in_training", [False, True])
def test_no_prompt_token_of_a_batch_is_learnt(build_star, few_shot_in_training) -> None:
    """ST-14, as the parent's collator hands it over; few-shot text is prompt."""
    shot = {"prompt": "Q 8 + 1 = ?", "completion": " so 8 + 1 = 9", "solution": "9"}
    trainer = build_star(
        num_rounds=1, few_shot_examples=[shot], few_shot_in_training=few_shot_in_training,
        rationalize=False, reward_funcs=lambda completions, **_: [1.0] * len(completions),
    )  # fmt: skip
    trainer.train()
    play = trainer.self_play
    prompts = play.training_prompt_ids(play.rows)
    shown = len(trainer.processing_class(shot["completion"])["input_ids"])
    kept = {(*prompts[r.prompt_id], *r.completion_ids): r for r in load_kept(trainer.run.folder(0))}
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert len(batch["labels"]) == len(kept) > 1
    for ids, labels, mask in zip(
        batch["input_ids"].tolist(), batch["labels"].tolist(), batch["attention_mask"], strict=True
    ):
        length = int(mask.sum())
        rollout = kept[tuple(ids[:length])]
        prompt = prompts[rollout.prompt_id]
        assert (len(prompt) > shown + 5) == few_shot_in_training
        expected = [-100] * len(prompt) + list(rollout.completion_ids)
        assert labels == expected + [-100] * (len(labels) - length)


def has_a_seven(completions, **kwargs):
    return [float("7" in c.split()) for c in completions]


class Spoiled:
    """A sampler whose completions without a 7 come out as other tokens without a 7."""

    def __init__(self, sampler, tokenizer, word) -> None:
        self.sampler, self.decode = sampler, tokenizer.decode
        self.token = tokenizer(word)["input_ids"][-1]

    def suggest_batch_size(self, *lengths):
        return self.sampler.suggest_batch_size(*lengths)

    def release(self):
        self.sampler.release()

    def sample(self, *args):
        for index, sampled in self.sampler.sample(*args):
            ids = sampled.completion_ids
            if "7" not in self.decode(list(ids)).split():
                ids = (self.token,) * (len(ids) - 1) + ids[-1:]
            yield index, replace(sampled, completion_ids=ids)


def test_failed_completions_change_nothing_that_is_learnt(build_star) -> None:
    """ST-15: rows and weights are the same whatever tokens a failed completion has."""
    datasets, weights, failed = [], [], []
    for folder, word in (("a", None), ("b", "yes")):
        trainer = build_star(folder, num_rounds=1, rationalize=False, reward_funcs=has_a_seven)
        play = trainer.self_play
        if word is not None:
            sampler = Spoiled(play.collector.sampler, trainer.processing_class, word)
            trainer.self_play = replace(play, collector=replace(play.collector, sampler=sampler))
        trainer.train()
        datasets.append(load_from_disk(trainer.run.folder(0) / "dataset").to_list())
        weights.append({n: p.detach().clone() for n, p in trainer.model.named_parameters()})
        rollouts = load_samples(trainer.run.folder(0))
        failed.append([r.completion_ids for r in rollouts if not r.passes(1.0)])
    assert failed[0] != failed[1]
    assert len(datasets[0]) > 0
    assert datasets[0] == datasets[1]
    assert_equal(*weights)


def test_a_round_that_keeps_nothing_leaves_what_the_round_before_learnt(
    build_star, recorder
) -> None:
    """ST-16, after weights have changed."""
    calls = []

    def only_at_first(completions, **kwargs):
        calls.append(len(completions))
        return [float(len(calls) == 1)] * len(completions)

    trainer = build_star(
        reward_funcs=only_at_first, callbacks=[recorder], rationalize=False, on_empty_round="stop"
    )
    initial = recorder.copy(trainer.model)
    trainer.train()
    assert len(trainer.run.lines) == 1
    learnt = recorder.copy(trainer.model)
    assert_equal(learnt, recorder.weights_at_train_end[0])
    assert any(not torch.equal(learnt[n], initial[n]) for n in initial)


def never(completions, **kwargs):
    return [0.0] * len(completions)


@pytest.mark.parametrize("on_empty_round", ["raise", "stop"])
def test_an_empty_round_changes_no_weight(build_star, recorder, on_empty_round, caplog) -> None:
    """ST-16: the error shows the funnel and three completions."""
    trainer = build_star(reward_funcs=never, on_empty_round=on_empty_round)
    initial = recorder.copy(trainer.model)
    if on_empty_round == "raise":
        with pytest.raises(EmptyRoundError) as raised:
            trainer.train()
        message = str(raised.value)
    else:
        assert trainer.train().global_step == 0
        message = caplog.text
    assert message.count("→") >= 3
    assert "sampled" in message
    assert_equal(recorder.copy(trainer.model), initial)


def test_all_rewards_none_is_an_empty_round(build_star) -> None:
    trainer = build_star(reward_funcs=lambda completions, **_: [None] * len(completions))
    with pytest.raises(
        EmptyRoundError, match=r"reward functions \(<lambda>\) abstained on all"
    ) as e:
        trainer.train()
    assert "answer format" not in str(e.value)


def test_an_empty_round_of_abstentions_names_their_causes(build_star) -> None:
    def abstains(completions, **kwargs):
        return Scores([None] * len(completions), dict.fromkeys(range(len(completions)), "tie"))

    with pytest.raises(EmptyRoundError, match=r"not that it is wrong\. Causes: \d+ tie\."):
        build_star(reward_funcs=abstains).train()


def test_a_round_shorter_than_its_warm_up_is_one_warning(build_star, caplog) -> None:
    """ST-17."""
    trainer = build_star(num_rounds=1, warmup_steps=100)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    warnings = [r.message for r in caplog.records if "warm" in r.message.lower()]
    assert len(warnings) == 1
    assert "3" in warnings[0]
    assert "100" in warnings[0]


def test_without_rationalization_nothing_is_sampled_with_a_hint(build_star) -> None:
    """ST-18."""
    trainer = build_star(rationalize=False)
    trainer.train()
    assert not list(trainer.run.root.rglob("hint-*"))


@pytest.mark.parametrize("count", [None, 5])
def test_every_row_is_sampled_in_every_round(build_star, sums, count) -> None:
    """ST-20: the last partial batch included; a smaller draw is fresh each round."""
    trainer = build_star(
        train_dataset=sums(11), num_prompts_per_round=count, num_generations=3,
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
    )  # fmt: skip
    trainer.train()
    drawn = []
    for index in (0, 1):
        samples = read_samples(trainer, index, "0*.parquet")
        drawn.append({r.prompt_id for r in samples})
        assert len(drawn[-1]) == (11 if count is None else count)
        assert len(samples) == 3 * len(drawn[-1])
    assert (drawn[0] != drawn[1]) == (count is not None)


class GoldSampler:
    """Gives every prompt its gold completion."""

    def __init__(self, completions) -> None:
        self.completions = completions

    def suggest_batch_size(self, longest_prompt, max_completion_length):
        return 4

    def sample(self, requests, options, batch_size, on_tokens=None):
        for index, request in enumerate(requests):
            yield index, SampledCompletion(self.completions[request.prompt_ids], "eos")

    def release(self):
        pass


def test_a_round_on_forced_gold_samples_is_plain_fine_tuning(
    build_star, tiny_model, word_tokenizer, tmp_path
) -> None:
    """ST-26: the same weights as SFTTrainer on the gold rows, same steps, seed and order."""
    trainer = build_star(
        num_rounds=1, num_generations=1, rationalize=False, max_steps=6,
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
    )  # fmt: skip
    play, eos = trainer.self_play, word_tokenizer.eos_token_id
    gold = {
        play.formatter.token_ids(row, few_shot=False): (
            *word_tokenizer.encode(f"so {row.solution}"), eos,
        )
        for row in play.rows
    }  # fmt: skip
    object.__setattr__(play.collector, "sampler", GoldSampler(gold))
    trainer.train()
    rows = build_training_rows(
        load_kept(trainer.run.folder(0)), play.training_prompt_ids(play.rows), eos, seed=42
    )
    assert len(rows) == len(play.rows)
    plain = SFTTrainer(
        tiny_model(word_tokenizer),
        SFTConfig(str(tmp_path / "sft"), max_steps=6, per_device_train_batch_size=4,
                  learning_rate=1e-2, report_to=[], disable_tqdm=True, bf16=False, use_cpu=True,
                  gradient_checkpointing=False, save_strategy="no"),
        train_dataset=rows,
        processing_class=word_tokenizer,
    )  # fmt: skip
    set_seed(42)
    plain.train()
    assert_equal(
        {n: p.detach() for n, p in trainable_parameters(plain.model).items()},
        {n: p.detach() for n, p in trainable_parameters(trainer.model).items()},
    )


def test_the_gradient_is_the_monte_carlo_estimate_of_equation_2(build_star, tiny_model) -> None:
    """ST-27: Σ over kept of ∇ log p(completion | prompt), divided by the number of tokens."""
    trainer = build_star(num_rounds=1, rationalize=False)
    played = trainer.play_round(0)
    batch = trainer.data_collator([played.training_rows[i] for i in range(played.num_examples)])
    tokens = int((batch["labels"] != -100).sum())
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=tokens)
    loss.backward()
    computed = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    plain = trainer.self_play.training_prompt_ids(trainer.self_play.rows)
    total = 0.0
    for rollout in load_kept(trainer.run.folder(0)):
        prompt = plain[rollout.prompt_id]
        ids = torch.tensor([[*prompt, *rollout.completion_ids]])
        log_probs = trainer.model(ids).logits[0].log_softmax(-1)
        for offset, token in enumerate(rollout.completion_ids):
            total = total + log_probs[len(prompt) - 1 + offset, token]
    (-total / tokens).backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(computed[name], parameter.grad, atol=1e-6, rtol=1e-4)


class ScoreByRound:
    """A reward that four held-out prompts get by a fixed script, training prompts always."""

    __name__ = "score_by_round"

    def __init__(self, heldout) -> None:
        self.heldout, self.graded = heldout, 0

    def __call__(self, completions, is_heldout=(False,), **kwargs):
        if is_heldout[0]:
            value = self.heldout[self.graded // 8]  # a greedy completion of each, and a sample
            self.graded += len(completions)
            return [value] * len(completions)
        return [1.0] * len(completions)


def test_the_run_stops_without_gain_and_loads_the_best_round(build_star, sums, recorder) -> None:
    """ST-28, CD-9: ties go to the earlier round; the best round's weights are in place at the end."""
    heldout = sums(4, first=90).add_column("is_heldout", [True] * 4)
    trainer = build_star(
        num_rounds=5, eval_dataset=heldout, stop_after_rounds_without_gain=1, callbacks=[recorder],
        reward_funcs=ScoreByRound([0.0, 1.0, 1.0, 1.0, 1.0, 1.0]), rationalize=False,
    )  # fmt: skip
    finish_whatever(trainer)
    trainer.train()
    assert [line["round"] for line in trainer.run.lines] == [0, 1]
    assert_equal(recorder.copy(trainer.model), recorder.weights_at_train_end[0])


def test_the_untrained_model_is_kept_if_every_round_is_worse(build_star, sums, recorder) -> None:
    heldout = sums(4, first=90).add_column("is_heldout", [True] * 4)
    trainer = build_star(
        eval_dataset=heldout, reward_funcs=ScoreByRound([1.0, 0.0, 0.0]), rationalize=False,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    finish_whatever(trainer)
    initial = recorder.copy(trainer.model)
    trainer.train()
    assert len(trainer.run.lines) == 2
    assert_equal(recorder.copy(trainer.model), initial)


def test_steps_go_on_over_rounds_in_every_log_line(build_star, recorder) -> None:
    trainer = build_star(num_rounds=3, callbacks=[recorder])
    output = trainer.train()
    losses = [log for log in recorder.logs if "loss" in log]
    assert [log["step"] for log in losses] == list(range(1, 10))
    assert [log["round"] for log in losses] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all("round" in log for log in recorder.logs)
    assert output.global_step == 9
    assert [e["step"] for e in trainer.state.log_history if "loss" in e] == list(range(1, 10))


def test_rounds_are_told_to_callbacks_beside_the_parent_s_events(build_star, recorder) -> None:
    build_star(callbacks=[recorder]).train()
    one = [("train_begin", None), ("train_end", None)]
    assert recorder.events == [
        event for i in (0, 1) for event in [("round_begin", i), *one, ("round_end", i)]
    ]


class StopAtStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


def test_a_callback_that_stops_training_ends_the_run(build_star) -> None:
    trainer = build_star(num_rounds=3, callbacks=[StopAtStep(2)])
    trainer.train()
    assert [line["steps"] for line in trainer.run.lines] == [2]


def test_packing_puts_all_selected_tokens_into_full_rows(build_star) -> None:
    trainer = build_star(num_rounds=1, packing=True, max_length=64, rationalize=False)
    trainer.train()
    rows = trainer.train_dataset
    kept = load_kept(trainer.run.folder(0))
    assert len(rows) < len(kept)
    assert sum(map(len, rows["input_ids"])) == sum(
        len(r.prompt_ids) + len(r.completion_ids) for r in kept
    )
    assert all(len(ids) <= 64 for ids in rows["input_ids"])


def test_examples_longer_than_max_length_are_dropped_and_counted(build_star) -> None:
    trainer = build_star(num_rounds=1, max_length=11, rationalize=False, num_generations=8)
    trainer.train()
    rows = pq.read_table(trainer.run.folder(0) / "selection.parquet").to_pylist()
    assert sum(row["outcome"] == "too_long" for row in rows) > 0
    assert max(map(len, trainer.train_dataset["input_ids"])) <= 11


def test_evaluation_leaves_training_as_it_was(build_star, sums) -> None:
    """EV-7, on the trainer: the same losses with and without evaluations between the steps."""
    losses = []
    for folder, strategy in (("a", "no"), ("b", "steps")):
        heldout = sums(24).select(range(16, 20))
        trainer = build_star(folder, eval_dataset=heldout, eval_strategy=strategy, eval_steps=1,
                             peft_config=LoraConfig(**LORA, lora_dropout=0.2), num_rounds=1)  # fmt: skip
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        seen = [e for e in trainer.state.log_history if "eval_accuracy" in e]
        assert len(seen) >= (3 if strategy == "steps" else 1)
    assert losses[0] == losses[1]


def test_a_held_out_score_is_the_same_later_from_the_saved_model(build_star, sums) -> None:
    """EV-8."""
    heldout = sums(24).select(range(16, 24))
    settings = {"eval_dataset": heldout, "num_generations_eval": 4, "num_rounds": 1}
    trainer = build_star(**settings)
    trainer.train()
    inside = trainer.run.lines[0]["eval"]
    saved = AutoModelForCausalLM.from_pretrained(trainer.run.folder(0) / "model")
    later = build_star("later", model=saved, **settings).evaluate()
    assert {k: later[k] for k in inside} == inside
    assert not math.isnan(inside["eval_accuracy"])
