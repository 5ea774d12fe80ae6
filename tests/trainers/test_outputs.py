"""What a run leaves, and what of it a push to the Hub would take along."""

import functools
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EarlyStoppingCallback,
    TrainerCallback,
)

from trl_selfplay.rollouts.kept_prompts import load_prompts
from trl_selfplay.rollouts.record import SCHEMA
from trl_selfplay.rounds.log import place_of, say_where_interrupted
from trl_selfplay.rounds.run import RoundProgress

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"]}


def test_a_push_would_upload_model_card_and_tokenizer_alone(build_star, tmp_path) -> None:
    trainer = build_star(peft_config=LoraConfig(**LORA), save_steps=1)
    trainer.train()
    paths = [
        str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()
    ]
    # The patterns of transformers' Trainer.push_to_hub.
    uploaded = set(filter_repo_objects(paths, ignore_patterns=["_*", "checkpoint-*/**"]))
    assert uploaded == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "training_args.bin",
    }  # fmt: skip
    card = (tmp_path / "run" / "README.md").read_text()
    assert "STaR" in card
    tags = {line for line in card.splitlines() if line.startswith("- ")}
    assert {"- trl", "- sft", "- trl-selfplay", "- star"} <= tags
    assert "| 1 " in card.replace("|1", "| 1")


def test_the_model_of_the_end_is_in_output_dir(build_star, tmp_path) -> None:
    trainer = build_star(num_rounds=1)
    trainer.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run").state_dict()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(saved[name], weight), name
    text = "Q 1 + 2 = ?"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer(text).input_ids == trainer.processing_class(text).input_ids


def test_an_interruption_before_the_first_round_is_told_as_that(caplog) -> None:
    place = functools.partial(place_of, RoundProgress(((),)))
    with pytest.raises(KeyboardInterrupt), say_where_interrupted(place):
        raise KeyboardInterrupt
    assert "interrupted before round 0; resume with train(resume" in caplog.text


def test_a_finished_run_says_so_when_it_is_resumed(build_star, capsys) -> None:
    settings = {"num_rounds": 1, "max_steps": 1}
    trained = build_star(**settings).train()
    assert "finished before" not in capsys.readouterr().out
    again = build_star(**settings)
    assert again.train(resume_from_checkpoint=True).global_step == trained.global_step
    card = (Path(again.args.output_dir) / "README.md").read_text()
    assert card.count("\n\n## Rounds\n") == 1
    assert f"all 1 rounds in {again.args.output_dir} were finished" in capsys.readouterr().out


def test_a_finished_round_leaves_what_is_documented(build_star, sums) -> None:
    trainer = build_star(
        peft_config=LoraConfig(**LORA), save_steps=1, eval_dataset=sums(4, first=90)
    )
    trainer.train()
    root = trainer.run.root
    lines = [json.loads(line) for line in (root / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1]
    for line in lines:
        assert {
            "round", "sampled_from", "trained_from", "funnel", "rewards", "eval", "gain",
            "gain_standard_error", "seconds", "tokens", "examples", "steps", "learning_rate",
        } <= line.keys()  # fmt: skip
    assert "eval_before" in lines[0]
    assert "eval_before" not in lines[1]
    for index in (0, 1):
        folder = root / f"round-{index:03d}"
        assert pq.read_schema(folder / "samples" / "00000.parquet").names == SCHEMA.names
        assert (folder / "selection.parquet").exists()
        assert (folder / "dataset").is_dir()
        assert (folder / "model" / "adapter_model.safetensors").exists()
        assert list((folder / "evaluation").glob("*.parquet"))
        assert not list(folder.glob("checkpoint-*"))


def test_full_fine_tuning_keeps_the_last_and_the_best_model_alone(build_star) -> None:
    trainer = build_star(num_rounds=3)
    trainer.train()
    kept = [i for i in range(3) if (trainer.run.folder(i) / "model").exists()]
    assert kept == [2]


def test_early_stopping_and_the_best_checkpoint_work_inside_a_round(build_star, sums) -> None:
    """With a rate of 0 no evaluation is better than the first, so the third ends the training."""
    trainer = build_star(
        num_rounds=2, max_steps=6, eval_dataset=sums(4, first=90), eval_strategy="steps",
        eval_steps=1, save_steps=1, load_best_model_at_end=True, learning_rate=0.0,
        metric_for_best_model="eval_pass@1", callbacks=[EarlyStoppingCallback(2)],
    )  # fmt: skip
    trainer.train()
    assert [line["steps"] for line in trainer.run.lines] == [3, 3]  # and not the run
    scores = [entry["eval_pass@1"] for entry in trainer.state.log_history if "eval_pass@1" in entry]
    assert len(scores) >= 3
    assert len(set(scores)) == 1


def test_several_held_out_sets_are_evaluated_inside_a_round(build_star, sums) -> None:
    """The parent looks up the metric of the first set, whose name may be that of a metric."""
    sets = {"acc": sums(4, first=90), "b": sums(4, first=80)}
    trainer = build_star(
        eval_dataset=sets, num_rounds=1, max_steps=2, eval_strategy="steps", eval_steps=1,
        save_steps=1, load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.run.chosen_metric == "eval_acc_accuracy"
    assert trainer.run.lines[0]["eval"].keys() >= {"eval_acc_accuracy", "eval_b_accuracy"}


def test_held_out_prompts_that_nothing_can_grade_leave_the_round_going(build_star, sums) -> None:
    def abstains_on_held_out(prompts, completions, **kwargs):
        train = {row["prompt"] for row in sums(12)}
        return [1.0 if prompt in train else None for prompt in prompts]

    trainer = build_star(
        eval_dataset=sums(4, first=90), reward_funcs=abstains_on_held_out, num_rounds=1,
        max_steps=2, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()
    assert trainer.run.lines[0]["steps"] == 2


def test_logs_after_training_stand_at_the_last_step(build_star, sums, recorder) -> None:
    trainer = build_star(eval_dataset=sums(4, first=90), callbacks=[recorder])
    trainer.train()
    trainer.evaluate(metric_key_prefix="eval_later")
    assert recorder.logs[-1]["step"] == 6


def test_completions_are_printed_with_their_rewards_on_request(build_star, capsys) -> None:
    build_star("quiet", num_rounds=1).train()
    assert "[reward" not in capsys.readouterr().out
    build_star(num_rounds=1, log_completions=True, num_completions_to_print=3).train()
    assert capsys.readouterr().out.count("[reward") == 3


def test_several_held_out_sets_are_scored_and_the_first_chooses(build_star, sums) -> None:
    sets = {"select": sums(4, first=90), "report": sums(4, first=80)}
    trainer = build_star(eval_dataset=sets, num_rounds=1)
    trainer.train()
    assert {"eval_select_accuracy", "eval_report_accuracy"} <= trainer.run.lines[0]["eval"].keys()
    assert trainer.run.chosen_metric == "eval_select_accuracy"
    one = trainer.evaluate("report")
    assert one["eval_accuracy"] == trainer.evaluate(sets["report"])["eval_accuracy"]


def test_the_log_history_holds_every_held_out_score_after_a_resume_too(build_star, sums) -> None:
    whole = build_star("whole", num_rounds=3, eval_dataset=sums(4, first=90))
    whole.train()
    lines = whole.run.lines
    scores = [lines[0]["eval_before"], *(line["eval"] for line in lines)]
    logged = [e for e in whole.state.log_history if "eval_accuracy" in e]
    assert [{n: e[n] for n in s} for e, s in zip(logged, scores, strict=True)] == scores
    build_star("cut", num_rounds=2, eval_dataset=sums(4, first=90)).train()
    resumed = build_star("cut", num_rounds=3, eval_dataset=sums(4, first=90))
    resumed.train(resume_from_checkpoint=True)
    for trainer in (whole, resumed):
        for entry in trainer.state.log_history:
            # the parent counts tokens anew in a new process
            for name in [n for n in entry if n.endswith(("runtime", "per_second", "num_tokens"))]:
                del entry[name]
    assert resumed.state.log_history == whole.state.log_history


def exits(completions, **kwargs):
    sys.exit(0)


def test_no_way_of_a_function_to_exit_ends_a_run_without_a_word(build_star, caplog) -> None:
    with pytest.raises(
        RuntimeError,
        match=r"'exits' raised SystemExit: 0 \(line \d+ of .*\)\. The samples are on disk",
    ):
        build_star(reward_funcs=exits).train()
    with pytest.raises(SystemExit):
        build_star("other", normal_form=exits).train()
    assert "interrupted in round 0; resume with train(resume_from_checkpoint=True)" in caplog.text


class StepWatcher(TrainerCallback):
    """Keeps the steps that the trackers see, and those that the parent counts."""

    def __init__(self) -> None:
        self.logged, self.counted = [], []

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.logged.append((logs["round"], state.global_step))
            state.trial_name = f"noted at step {state.global_step}"

    def on_step_end(self, args, state, control, **kwargs):
        self.counted.append(state.global_step)


def test_logged_steps_go_on_over_rounds_while_the_parent_counts_anew(build_star) -> None:
    watcher = StepWatcher()
    trainer = build_star(max_steps=2, callbacks=[watcher])
    trainer.train()
    assert watcher.counted == [1, 2, 1, 2]
    assert watcher.logged == [(0, 1), (0, 2), (1, 3), (1, 4)]
    history = [line["step"] for line in trainer.state.log_history if "loss" in line]
    assert history == [1, 2, 3, 4]
    assert trainer.state.trial_name == "noted at step 4"  # what a callback notes isn't lost
    assert trainer.progress is None


def test_a_run_keeps_its_prompts_and_a_finished_one_of_an_earlier_version_gets_them(
    build_star, tmp_path, sums
) -> None:
    build_star(num_rounds=1).train()
    path = tmp_path / "run" / "_rounds" / "prompts.parquet"
    kept = load_prompts(path)
    assert sorted(kept[i].prompt for i in kept) == sorted(sums(12)["prompt"])
    path.unlink()
    build_star(num_rounds=1).train(resume_from_checkpoint=True)
    assert [*load_prompts(path)] == [*kept]


def test_steps_go_on_from_a_warm_up_to_the_rounds_also_after_a_resume(
    build_rest_em, gold_answers
) -> None:
    settings = {"warm_up_on_gold": True, "gold_dataset": gold_answers(5), "max_steps": 2}
    build_rest_em(num_rounds=1, **settings).train()
    trainer = build_rest_em(num_rounds=2, **settings)
    trainer.train(resume_from_checkpoint=True)
    steps = [line["step"] for line in trainer.state.log_history if "loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]
