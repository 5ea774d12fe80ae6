"""The invariants of ReST^EM (EM-…), ReST (RE-…) and RFT (RF-…), on real runs of a tiny model."""

import json
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig
from tiny_rewards import contains_solution, digit_share
from transformers import TrainerCallback

from trl_selfplay import EmptyRoundError
from trl_selfplay.disk import DamagedFileError
from trl_selfplay.evaluation.report import round_table
from trl_selfplay.rewards import equations_reward, exact_reward
from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rollouts.rows import training_completion_ids
from trl_selfplay.rollouts.selection import default_normal_form, reasoning_path
from trl_selfplay.rollouts.stored import load_kept, load_samples
from trl_selfplay.trainers.rest_em.gold import draw_gold

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}


def assert_equal(weights, others) -> None:
    assert weights.keys() == others.keys()
    for name in weights:
        assert torch.equal(weights[name], others[name]), name


def differs(weights, others) -> bool:
    return any(not torch.equal(weights[name], others[name]) for name in weights)


def read_lines(trainer):
    return [json.loads(line) for line in trainer.run.lines_path.read_text().splitlines()]


def read_rows(trainer, round_index):
    return load_from_disk(trainer.run.folder(round_index) / "dataset")


def record_sampling(trainer, recorder):
    """Return a list that gets the weights of each call of the sampler."""
    sampler, weights = trainer.self_play.collector.sampler, []
    sample = sampler.sample

    def sample_and_record(*args):
        weights.append(recorder.copy(trainer.model))
        return sample(*args)

    sampler.sample = sample_and_record
    return weights


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_every_round_trains_from_the_base_weights(build_rest_em, recorder, peft) -> None:
    """EM-1: bit for bit."""
    trainer = build_rest_em(
        num_rounds=3, callbacks=[recorder], peft_config=LoraConfig(**LORA) if peft else None
    )
    initial = recorder.copy(trainer.model)
    trainer.train()
    assert len(recorder.weights_at_train_begin) == 3
    for weights in recorder.weights_at_train_begin:
        assert_equal(weights, initial)
    assert differs(recorder.weights_at_train_end[1], initial)


def test_a_round_samples_with_the_weights_the_last_one_ended_with(build_rest_em, recorder) -> None:
    """EM-2: the weights while sampling round t are those at the end of round t - 1."""
    trainer = build_rest_em(num_rounds=3, callbacks=[recorder])
    initial, while_sampling = recorder.copy(trainer.model), record_sampling(trainer, recorder)
    trainer.train()
    ends = [initial, *recorder.weights_at_train_end[:2]]
    assert len(while_sampling) == 3
    for weights, expected in zip(while_sampling, ends, strict=True):
        assert_equal(weights, expected)


def test_a_prompt_gives_at_most_the_cap_and_all_it_has_below_it(build_rest_em) -> None:
    """EM-3, EM-4, EM-11: the cap after deduplication; fewer than the cap are all kept."""
    for cap in (1, 2, None):
        trainer = build_rest_em(f"cap-{cap}", num_generations=16, max_per_prompt=cap, num_rounds=1)
        trainer.train()
        distinct = {}
        for r in load_samples(trainer.run.folder(0)):
            if r.passes(1.0):
                form = default_normal_form(r.completion)
                distinct.setdefault(r.prompt_id, set()).add(form)
        expected = {i: len(f) if cap is None else min(cap, len(f)) for i, f in distinct.items()}
        assert Counter(r.prompt_id for r in load_kept(trainer.run.folder(0))) == expected
        if cap == 2:
            assert {1, 2} <= set(expected.values())


def test_no_gold_completion_is_trained_on_unless_given(build_rest_em) -> None:
    """EM-9: every row is a prompt with one of the model's own completions."""
    trainer = build_rest_em()
    trainer.train()
    for t in (0, 1):
        own = {
            (*r.prompt_ids, *training_completion_ids(r, trainer.self_play.eos_token_id))
            for r in load_kept(trainer.run.folder(t))
        }
        assert {tuple(ids) for ids in read_rows(trainer, t)["input_ids"]} <= own
        assert read_lines(trainer)[t]["funnel"]["gold"] == 0


def test_history_adds_what_the_newest_rounds_selected_and_nothing_twice(build_rest_em) -> None:
    """EM-15: of the newest h rounds only, deduplicated, and under one cap."""
    trainer = build_rest_em(num_rounds=3, history_rounds=1, num_generations=8, max_per_prompt=3)
    trainer.train()
    line = read_lines(trainer)[2]
    texts = [
        {(r.prompt_id, r.completion) for r in load_samples(trainer.run.folder(t)) if r.passes(1.0)}
        for t in (0, 1, 2)
    ]
    prompts = trainer.self_play.training_prompt_ids(trainer.self_play.rows)
    by_ids = {ids: i for i, ids in prompts.items()}
    counts = Counter()
    decode = trainer.processing_class.decode
    for row in read_rows(trainer, 2):
        length = sum(label == -100 for label in row["labels"])
        prompt_id = by_ids[tuple(row["input_ids"][:length])]
        text = decode(row["input_ids"][length:], skip_special_tokens=True)
        assert (prompt_id, text) in texts[2] | texts[1]
        counts[prompt_id] += 1
    assert max(counts.values()) <= 3
    assert line["funnel"]["history"] > 0
    assert line["examples"] == line["funnel"]["kept"] + line["funnel"]["history"]


def test_history_without_the_earlier_samples_is_an_error(build_rest_em) -> None:
    trainer = build_rest_em(history_rounds=1, num_rounds=1)
    trainer.train()
    for path in (trainer.run.folder(0) / "samples").glob("*.parquet"):
        path.unlink()
    trainer = build_rest_em(history_rounds=1, num_rounds=2)
    with pytest.raises(DamagedFileError, match=r"00000\.parquet can't be read"):
        trainer.train(resume_from_checkpoint=True)


# --- ReST ---


def test_an_improve_step_goes_on_from_the_one_before(build_rest, recorder) -> None:
    """RE-1, RE-13: within a Grow step, and from its last Improve step to the next Grow."""
    trainer = build_rest(callbacks=[recorder])
    initial = recorder.copy(trainer.model)
    trainer.train()
    assert len(recorder.weights_at_train_begin) == 4
    ends = [initial, *recorder.weights_at_train_end[:3]]
    for weights, expected in zip(recorder.weights_at_train_begin, ends, strict=True):
        assert_equal(weights, expected)
    lines = read_lines(trainer)
    assert [(line["grow"], line["improve"], line["threshold"]) for line in lines] == [
        (0, 0, 0.3), (0, 1, 0.6), (1, 0, 0.3), (1, 1, 0.6),
    ]  # fmt: skip
    assert [line["sampled_from"] for line in lines] == ["base", "base", "round 1", "round 1"]


def test_a_grow_step_samples_from_the_last_improve_step_not_from_the_best_one(
    build_rest, recorder, sums
) -> None:
    """RE-13: whatever the held-out score; here the untrained model's, which nothing exceeds."""

    def only_before_training(completions, **kwargs):
        return [float(not recorder.weights_at_train_end)] * len(completions)

    trainer = build_rest(
        callbacks=[recorder], eval_dataset=sums(4, first=50), num_generations_eval=0,
        eval_reward_funcs=only_before_training,
    )  # fmt: skip
    initial, while_sampling = recorder.copy(trainer.model), record_sampling(trainer, recorder)
    trainer.train()
    ends = recorder.weights_at_train_end
    # before, Grow 0, after each of its Improve steps, Grow 1, after each of its own
    expected = [initial, initial, ends[0], ends[1], ends[1], ends[2], ends[3]]
    for weights, those in zip(while_sampling, expected, strict=True):
        assert_equal(weights, those)
    assert differs(ends[1], initial)
    assert_equal(recorder.copy(trainer.model), initial)  # the best one is loaded at the end


def test_improve_steps_share_samples_and_scores_and_are_nested(build_rest) -> None:
    """RE-2, RE-3: nothing is sampled or graded between them."""
    events = []

    def reward(completions, **kwargs):
        events.append("grade")
        return digit_share(completions)

    trainer = build_rest(reward_funcs=reward, max_per_prompt=2)
    sampler = trainer.self_play.collector.sampler
    sample = sampler.sample

    def sample_and_record(*args):
        events.append("sample")
        return sample(*args)

    sampler.sample = sample_and_record
    trainer.train()
    # How many prompts are graded together depends on time.
    assert [event for event, _ in groupby(events)] == ["sample", "grade"] * 2
    for grow in (0, 2):
        rows = [
            Counter(tuple(ids) for ids in read_rows(trainer, t)["input_ids"])
            for t in (grow, grow + 1)
        ]
        assert rows[1] <= rows[0]
        assert rows[1].total() < rows[0].total()
        assert not (trainer.run.folder(grow + 1) / "samples").exists()


def test_the_learning_rate_falls_by_the_factor_from_one_improve_step_to_the_next(
    build_rest,
) -> None:
    """RE-6, also with a learning rate a Grow step."""
    trainer = build_rest(
        improve_learning_rate_factor=0.25,
        round_learning_rates=[1e-2, 2e-2],
        lr_scheduler_type="constant",
    )
    trainer.train()
    rates = [line["learning_rate"] for line in read_lines(trainer)]
    assert rates == pytest.approx([1e-2, 2.5e-3, 2e-2, 5e-3])


def test_values_of_later_grow_steps_may_change_on_resume(build_rest) -> None:
    """RE-6: they count Grow steps, of which each has two Improve steps here."""
    first = {"improve_learning_rate_factor": 0.5, "num_rounds": 1}
    build_rest(round_learning_rates=[1e-2], **first).train()
    trainer = build_rest(round_learning_rates=[1e-2, 4e-3], **{**first, "num_rounds": 2})
    trainer.train(resume_from_checkpoint=True)
    rates = [line["learning_rate"] for line in read_lines(trainer)]
    assert rates == pytest.approx([1e-2, 5e-3, 4e-3, 2e-3])


def test_gold_draws_are_nested(build_rest, gold_answers) -> None:
    """RE-3: what a higher threshold draws is part of what a lower one does."""
    gold = [replace(r, reward=i / 10) for i, r in enumerate(
        build_rest(gold_dataset=gold_answers(10)).gold.rollouts)]  # fmt: skip
    for seed in range(20):
        lower, higher = (
            {r.prompt_id for r in draw_gold([g for g in gold if g.reward > t], 0.5, n, seed)}
            for t, n in ((0.2, 8), (0.4, 6))
        )
        assert len(lower) == 4
        assert higher < lower
    ties = [replace(r, reward=1.0) for r in gold]
    first = {r.prompt_id for r in draw_gold(ties, 0.5, 8, 0)}
    assert {r.prompt_id for r in draw_gold(ties, 0.5, 4, 0)} < first


def test_gold_of_held_out_prompts_is_refused(build_rest_em, gold_answers) -> None:
    heldout = gold_answers(3, first=50).select_columns(["prompt", "solution"])
    with pytest.raises(ValueError, match=r"2 of 3 prompts of `eval_dataset` are in `gold_dataset`"):
        build_rest_em(gold_dataset=gold_answers(2, first=50), eval_dataset=heldout)


def test_gold_partly_of_other_prompts_is_graded_with_the_training_columns(
    build_rest, gold_answers
) -> None:
    trainer = build_rest(gold_dataset=gold_answers(60), num_rounds=1)
    trainer.train()
    assert len(load_rollouts(trainer.run.root / "gold.parquet")) == 60


def test_where_rewards_have_degrees_the_mean_reward_chooses_the_round(build_rest) -> None:
    assert build_rest().args.metric_for_best_model == "eval_mean_reward"
    chosen = build_rest(metric_for_best_model="eval_accuracy")
    assert chosen.args.metric_for_best_model == "eval_accuracy"


def test_a_reward_with_degrees_shows_no_counts_of_what_it_never_reaches(
    build_rest, sums, caplog
) -> None:
    trainer = build_rest(
        reward_funcs=at_most(0.9), num_rounds=1, eval_dataset=sums(2, first=90),
        num_generations_eval=0,
    )  # fmt: skip
    trainer.train()
    metrics = read_lines(trainer)[0]["metrics"]
    best = {}
    for r in load_samples(trainer.run.folder(0)):
        if r.finish == "eos":
            best[r.prompt_id] = max(r.reward, best.get(r.prompt_id, 0.0))
    assert metrics["play/best_reward"] == pytest.approx(np.mean(list(best.values())))
    assert not {"play/coverage", "play/distinct_correct"} & metrics.keys()
    assert "accuracy is 0" not in caplog.text


def test_gold_passes_the_same_filter_where_thresholds_rise(build_rest, gold_answers) -> None:
    """RE-7: graded once, and dropped below the threshold. The answers have digits for 2 of 4 words."""
    graded = []

    def reward(completions, **kwargs):
        graded.append(sorted(completions))
        return digit_share(completions)

    trainer = build_rest(
        gold_dataset=gold_answers(4), reward_funcs=reward, improve_thresholds=[0.5, 0.7]
    )
    trainer.train()
    gold = load_rollouts(trainer.run.root / "gold.parquet")
    assert [r.reward for r in gold] == [pytest.approx(3 / 5)] * 4
    assert [line["funnel"]["gold"] for line in read_lines(trainer)] == [4, 0, 4, 0]
    assert graded.count(sorted(r.completion for r in gold)) == 1


def test_an_empty_improve_step_leaves_the_weights_and_is_named(
    build_rest, recorder, caplog
) -> None:
    """RE-10: with "stop" the next Grow step begins, with "raise" the run ends."""
    trainer = build_rest(
        improve_thresholds=[0.3, 0.99], on_empty_round="stop", reward_funcs=at_most(0.9),
        callbacks=[recorder],
    )  # fmt: skip
    trainer.train()
    lines = read_lines(trainer)
    assert [line["steps"] > 0 for line in lines] == [True, False, True, False]
    assert "round 1 selected nothing" in caplog.text
    assert_equal(recorder.weights_at_train_begin[1], recorder.weights_at_train_end[0])
    trainer = build_rest("raise", improve_thresholds=[0.3, 0.99], reward_funcs=at_most(0.9))
    with pytest.raises(EmptyRoundError, match="round 1"):
        trainer.train()


def at_most(highest):
    def reward(completions, **kwargs):
        return [min(share, highest) for share in digit_share(completions)]

    return reward


def test_all_samples_below_the_first_threshold_is_an_empty_round(build_rest) -> None:
    trainer = build_rest(improve_thresholds=[0.95, 0.99], reward_funcs=at_most(0.9))
    with pytest.raises(EmptyRoundError, match="round 0"):
        trainer.train()


class HidesLines(TrainerCallback):
    """Takes rounds.jsonl away, which another process on another node may not see yet."""

    def on_round_begin(self, args, state, control, round_index, **kwargs):
        (Path(args.output_dir) / "_rounds" / "rounds.jsonl").unlink(missing_ok=True)


def test_improve_steps_that_repeat_each_other_warn(build_rest, caplog) -> None:
    """RE-11: here because all rewards are 0 or 1."""
    trainer = build_rest(
        reward_funcs=contains_solution, num_rounds=1, callbacks=[HidesLines()]
    )  # fmt: skip
    trainer.train()
    assert "round 1: this Improve step selects the same" in caplog.text


def test_improve_steps_that_differ_do_not_warn(build_rest, caplog) -> None:
    """RE-11: no filter and then one, though all rewards are 0 or 1."""
    levels = [float("-inf"), 0.5]
    build_rest(reward_funcs=contains_solution, num_rounds=1, improve_thresholds=levels).train()
    assert "selects the same" not in caplog.text


def test_the_card_counts_improve_steps_as_rounds(build_rest) -> None:
    trainer = build_rest(num_rounds=1, improve_thresholds=[0.3, 0.5])
    trainer.train()
    assert "| Rounds | 2 of 2 |" in (Path(trainer.args.output_dir) / "README.md").read_text()


def best_of_each_form(rollouts):
    """The finished completions, of equal ones of a prompt the best, of equally good the first."""
    best = {}
    for r in sorted(rollouts, key=lambda r: (-r.reward, r.sample_index)):
        if r.finish == "eos":
            best.setdefault((r.prompt_id, default_normal_form(r.completion)), r)
    return best.values()


def expected_rows(trainer, grow, level, kind):
    """What an Improve step trains on, by NumPy from the samples of its Grow step."""
    samples = load_samples(trainer.run.folder(grow))
    prompts = trainer.self_play.training_prompt_ids(trainer.self_play.rows)
    rows = Counter()
    for r in best_of_each_form(samples):
        own = np.array([s.reward for s in samples
                        if s.prompt_id == r.prompt_id and s.finish == "eos"])  # fmt: skip
        threshold = {
            "value": level,
            "percentile": np.percentile(own, level) if kind == "percentile" else 0.0,
            "interpolate": level * own.max() + (1 - level) * own.mean(),
        }[kind]
        if r.reward > threshold + 1e-12 or (kind != "value" and r.reward == own.max()):
            rows[(*prompts[r.prompt_id], *r.completion_ids)] += 1
    return rows


@pytest.mark.parametrize(
    ("kind", "levels"),
    [
        ("value", [0.1, 0.3, 0.4, 0.6]),
        ("percentile", [25.0, 50.0, 75.0]),
        ("interpolate", [0.0, 0.5, 0.9]),
    ],
)
def test_any_number_of_improve_steps_select_what_is_above_their_thresholds(
    build_rest, kind, levels
) -> None:
    """To the end, with as many samples of each Grow step as there are."""
    trainer = build_rest(improve_thresholds=levels, threshold_kind=kind, num_generations=8)
    trainer.train()
    lines = read_lines(trainer)
    assert len(lines) == 2 * len(levels)
    for line in lines:
        round_index = line["round"]
        grow = round_index - round_index % len(levels)
        rows = Counter(tuple(ids) for ids in read_rows(trainer, round_index)["input_ids"])
        assert rows == expected_rows(trainer, grow, levels[round_index - grow], kind)
    assert lines[0]["examples"] > lines[len(levels) - 1]["examples"] > 0


def test_every_improve_step_that_repeats_the_one_before_is_named(build_rest, caplog) -> None:
    """RE-11: here all three, because rewards are 0 or 1; gold is trained on as well."""
    trainer = build_rest(
        reward_funcs=contains_solution, num_rounds=1, improve_thresholds=[0.1, 0.3, 0.5, 0.7],
        threshold_kind="value",
    )  # fmt: skip
    trainer.train()
    assert [line["examples"] for line in read_lines(trainer)] == [
        read_lines(trainer)[0]["examples"]
    ] * 4
    for round_index in (1, 2, 3):
        assert f"round {round_index}: this Improve step selects the same" in caplog.text


def test_an_improve_step_whose_gold_alone_differs_repeats_nothing(
    build_rest, gold_answers, caplog
) -> None:
    """The gold completions are worth 0.5, and samples 0 or 1."""

    def reward(prompts, completions, completion_ids, solution, **kwargs):
        right = contains_solution(completions, solution)
        return [0.5 if c.startswith(" ") else r for c, r in zip(completions, right, strict=True)]

    trainer = build_rest(
        reward_funcs=reward, num_rounds=1, improve_thresholds=[0.3, 0.6, 0.8],
        gold_dataset=gold_answers(4),
    )  # fmt: skip
    trainer.train()
    assert [line["funnel"]["gold"] for line in read_lines(trainer)] == [4, 0, 0]
    assert "round 1: this Improve step selects the same" not in caplog.text
    assert "round 2: this Improve step selects the same" in caplog.text


def test_no_filter_selects_everything_that_ended(build_rest) -> None:
    """RE-4: -inf selects rewards of 0 as well."""
    trainer = build_rest(improve_thresholds=[float("-inf"), 0.6], num_rounds=1, deduplicate=False)
    trainer.train()
    samples = [r for r in load_samples(trainer.run.folder(0)) if not r.is_truncated]
    assert read_lines(trainer)[0]["examples"] == len(samples)
    assert any(r.reward == 0.0 for r in samples)


# --- RFT ---


def test_rft_trains_the_base_on_gold_and_accepted_paths(
    build_rest_em, gold_answers, recorder
) -> None:
    """RF-4, RF-5: the sampler is trained on gold, the model from the base; gold once each."""
    trainer = build_rest_em(
        num_rounds=1, warm_up_on_gold=True, gold_dataset=gold_answers(5), callbacks=[recorder],
        normal_form=reasoning_path, few_shot_in_training=False, num_generations=8,
    )  # fmt: skip
    initial, while_sampling = recorder.copy(trainer.model), record_sampling(trainer, recorder)
    trainer.train()
    begin, end = recorder.weights_at_train_begin, recorder.weights_at_train_end
    assert len(begin) == 2
    assert_equal(begin[0], initial)
    assert_equal(while_sampling[0], end[0])
    assert differs(end[0], initial)
    assert_equal(begin[1], initial)
    (line,) = read_lines(trainer)
    assert (line["sampled_from"], line["trained_from"]) == ("warm-up", "base")
    assert list(line["seconds"]) == ["warm_up", "sample", "train", "evaluate"]
    rows = Counter(tuple(ids) for ids in read_rows(trainer, 0)["input_ids"])
    for rollout in trainer.gold.rollouts:
        assert rows[(*rollout.prompt_ids, *rollout.completion_ids)] >= 1
    assert sum(rows.values()) == line["funnel"]["kept"] + 5


@pytest.mark.parametrize(("against_gold", "kept"), [(False, ["2+2=4", "4=2+2"]), (True, ["4=2+2"])])
def test_a_sample_with_golds_path_stays_beside_it_unless_asked(
    build_rest_em, monkeypatch, against_gold, kept
) -> None:
    """Samples with the paths A, A, B and gold with A: as in the authors' code gold, A and B."""
    texts = ["2 + 2 = 4", "so 2+2 = 4", "4 = 2 + 2"]
    prompt = {"prompt": "Q 2 + 2 = ?"}
    trainer = build_rest_em(
        num_rounds=1, num_generations=3, normal_form=reasoning_path,
        train_dataset=Dataset.from_list([{**prompt, "solution": "4"}]),
        gold_dataset=Dataset.from_list([{**prompt, "completion": " 2 + 2 = 4"}]),
        deduplicate_against_gold=against_gold,
    )  # fmt: skip
    sample = type(trainer.self_play).sample

    def write(self, *args):
        return [
            replace(r, completion=text, finish="eos", reward=1.0, rewards=(1.0,))
            for r, text in zip(sample(self, *args), texts, strict=True)
        ]

    monkeypatch.setattr(type(trainer.self_play), "sample", write)
    played = trainer.play_round(0)
    assert (played.funnel.gold, played.num_examples) == (1, 1 + len(kept))
    selection = pq.read_table(trainer.run.folder(0) / "selection.parquet").to_pylist()
    chosen = [s["sample_index"] for s in selection if s["outcome"] == "kept"]
    assert ["".join(reasoning_path(texts[i])) for i in chosen] == kept


def test_a_ratio_draws_gold_by_the_number_selected(build_rest_em, gold_answers) -> None:
    trainer = build_rest_em(
        num_rounds=1, gold_dataset=gold_answers(12), gold_ratio=0.5, num_generations=8
    )
    trainer.train()
    funnel = read_lines(trainer)[0]["funnel"]
    assert funnel["gold"] == min(round(0.5 * funnel["kept"]), 12)


def test_a_path_needs_the_right_answer_and_true_equations(build_rest_em) -> None:
    """RF-2: with half the weight each only both together reach the threshold."""
    trainer = build_rest_em(
        reward_funcs=[exact_reward, equations_reward], reward_weights=[0.5, 0.5], num_rounds=1
    )
    scorer = trainer.self_play.collector.scorer
    completions = ["<<2+2=4>>4. The answer is 4", "<<2+2=5>>4. The answer is 4", "The answer is 5"]
    scores = scorer.score(
        prompts=["2 + 2?"] * 3, completions=completions, completion_ids=[[1]] * 3,
        columns={"solution": ["4"] * 3},
    )  # fmt: skip
    assert [scorer.weighted(s) >= 1.0 for s in scores] == [True, False, False]


def test_gold_of_another_kind_of_prompt_is_refused(build_rest_em) -> None:
    chat = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}]
    )
    with pytest.raises(ValueError, match="gold_dataset"):
        build_rest_em(gold_dataset=chat)


def test_gold_that_is_to_be_graded_needs_a_solution(build_rest, gold_answers) -> None:
    other = gold_answers(2, first=50).remove_columns("solution")
    with pytest.raises(ValueError, match="no `solution`"):
        build_rest(gold_dataset=other)


@pytest.mark.parametrize(
    "setting",
    [{"warm_up_on_gold": True}, {"gold_ratio": 0.5}, {"deduplicate_against_gold": True}],
)
def test_settings_of_gold_need_a_gold_dataset(build_rest_em, setting) -> None:
    with pytest.raises(ValueError, match="needs a `gold_dataset`"):
        build_rest_em(**setting)


def test_held_out_rewards_that_have_degrees_are_not_counted_by_the_threshold(
    build_rest, sums
) -> None:
    trainer = build_rest(num_rounds=1, num_generations_eval=2, eval_dataset=sums(4, first=90))
    trainer.train()
    evaluation = trainer.run.folder(1) / "evaluation"
    greedy, sampled = (
        [r for path in evaluation.glob(f"{name}-*.parquet") for r in load_rollouts(path)]
        for name in ("greedy", "sampled")
    )
    scores = trainer.run.lines[1]["eval"]
    assert not [n for n in scores if "accuracy" in n or "pass@" in n]
    assert scores["eval_mean_reward"] == pytest.approx(fmean(r.reward for r in greedy))
    assert scores["eval_mean_reward_low"] <= scores["eval_mean_reward"]
    assert scores["eval_mean_sampled_reward"] == pytest.approx(fmean(r.reward for r in sampled))
    before = trainer.run.lines[0]["eval_before"]
    change = scores["eval_mean_reward"] - before["eval_mean_reward"]
    assert trainer.run.lines[1]["gain"] == pytest.approx(change)
    table = round_table(trainer.run.lines, trainer.run.chosen_metric)
    assert "mean_reward" in table
    assert "accuracy" not in table


def test_a_true_scorer_or_the_chosen_metric_counts_right_ones_of_graded_ones(
    build_rest, sums
) -> None:
    heldout = sums(4, first=90)
    for changes in (
        {"eval_reward_funcs": contains_solution},
        {"metric_for_best_model": "eval_pass@1"},
    ):
        trainer = build_rest(str(changes), num_rounds=1, eval_dataset=heldout, **changes)
        assert trainer.evaluate().keys() >= {"eval_accuracy", "eval_mean_reward"}
