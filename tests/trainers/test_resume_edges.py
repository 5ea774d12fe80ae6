"""What a run does when it is taken up again in odd places: ended, damaged, or changed."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from trl_selfplay import EmptyRoundError
from trl_selfplay.disk import DamagedFileError
from trl_selfplay.rounds.run import UNTRAINED

LORA = {"target_modules": ["q_proj", "v_proj"]}


def read_eval(folder, prefix):
    return {
        p.name: p.read_bytes() for p in sorted((folder / "evaluation").glob(f"{prefix}*.parquet"))
    }


def test_a_run_that_stopped_without_gain_does_not_go_on(build_star, sums) -> None:
    changes = {
        "eval_dataset": sums(4, first=90), "stop_after_rounds_without_gain": 1, "num_rounds": 4,
        "learning_rate": 0.0,
    }  # fmt: skip
    trainer = build_star(**changes)
    trainer.train()
    assert len(trainer.run.lines) == 1
    again = build_star(**changes)
    again.train(resume_from_checkpoint=True)
    assert len(again.run.lines) == 1
    longer = build_star(**{**changes, "stop_after_rounds_without_gain": 2})
    longer.train(resume_from_checkpoint=True)
    assert len(longer.run.lines) == 2


def test_a_damaged_baseline_is_sampled_again_from_the_untrained_model(build_star, sums) -> None:
    heldout = {"eval_dataset": sums(8, first=80), "learning_rate": 0.1}
    trainer = build_star(num_rounds=1, **heldout)
    trainer.train()
    before, after = trainer.run.folder(UNTRAINED), trainer.run.folder(0)
    whole = read_eval(before, "greedy")
    assert whole != read_eval(after, "greedy")
    for path in (before / "evaluation").glob("greedy*.parquet"):
        path.write_bytes(b"damaged")
    build_star(num_rounds=2, **heldout).train(resume_from_checkpoint=True)
    assert read_eval(before, "greedy") == whole


def test_a_damaged_first_round_costs_later_ones_a_comparison_alone(build_star, caplog) -> None:
    trainer = build_star(num_rounds=1)
    trainer.train()
    for path in (trainer.run.folder(0) / "samples").glob("*.parquet"):
        path.write_bytes(b"damaged")
    longer = build_star(num_rounds=2)
    with caplog.at_level(logging.WARNING):
        longer.train(resume_from_checkpoint=True)
    assert len(longer.run.lines) == 2
    assert caplog.text.count("isn't compared with round 0's") == 1


def test_another_peft_configuration_is_another_run(build_star) -> None:
    build_star(num_rounds=1, peft_config=LoraConfig(r=4, lora_alpha=8, **LORA)).train()
    other = build_star(num_rounds=2, peft_config=LoraConfig(r=4, lora_alpha=64, **LORA))
    with pytest.raises(ValueError, match="another configuration") as raised:
        other.train(resume_from_checkpoint=True)
    differing = [line.strip() for line in str(raised.value).splitlines()[2:-1]]
    assert differing == ["peft_config.default.lora_alpha: '8' → '64'"]
    with pytest.raises(ValueError, match=r"peft_config: \['default'\] → \[\]"):
        build_star(num_rounds=2).train(resume_from_checkpoint=True)
    same = build_star(num_rounds=2, peft_config=LoraConfig(r=4, lora_alpha=8, **LORA))
    same.train(resume_from_checkpoint=True)
    assert len(same.run.lines) == 2


def shorten(prompt, solution):
    return f"{prompt} {solution}"


@pytest.mark.parametrize(
    ("name", "function"),
    [("normal_form", str.upper), ("hint_formatter", shorten), ("leak_filter", min)],
)
def test_another_function_that_selects_or_hints_is_another_run(build_star, name, function) -> None:
    build_star(num_rounds=1).train()
    with pytest.raises(ValueError, match=rf"{name}: 'trl_selfplay\..* → "):
        build_star(num_rounds=2, **{name: function}).train(resume_from_checkpoint=True)


def test_a_run_of_which_some_scores_were_taken_back_is_not_resumed(build_star) -> None:
    """The others would stay as they are, and nobody would know which."""
    trainer = build_star(num_rounds=1)
    trainer.train()
    (trainer.run.root / "regrade.json").write_text('{"round": 0, "aside": "_rounds_aside"}')
    with pytest.raises(DamagedFileError, match=r"`trl-selfplay regrade .*/run` again, then resume"):
        build_star(num_rounds=2).train(resume_from_checkpoint=True)


def test_weights_that_are_gone_are_named_before_anything_is_sampled(build_star) -> None:
    trainer = build_star(num_rounds=1)
    trainer.train()
    model = trainer.run.folder(0) / "model"
    model.rename(model.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"round-000/model is gone, and round 1 begins"):
        build_star(num_rounds=2).train(resume_from_checkpoint=True)


def test_checkpoints_that_a_kill_left_are_swept_by_a_later_round(build_star) -> None:
    trainer = build_star(num_rounds=1)
    trainer.train()
    left = trainer.run.folder(0) / "checkpoint-3"
    left.mkdir()
    build_star(num_rounds=2).train(resume_from_checkpoint=True)
    assert not left.exists()


def test_training_cut_short_by_a_callback_ends_the_run_also_after_a_kill(build_star) -> None:
    """The kill comes after the model was saved and before the round was written down."""
    trainer = build_star(num_rounds=1, max_steps=3)
    trainer.train()
    state = trainer.run.folder(0) / "trainer_state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"global_step": 1}))
    trainer.run.lines_path.unlink()
    resumed = build_star(num_rounds=3, max_steps=3)
    resumed.train(resume_from_checkpoint=True)
    assert [line["steps"] for line in resumed.run.lines] == [1]


class StopAtTrainEnd(TrainerCallback):
    """Breaks the run off after a round's last checkpoint, before its model is saved."""

    def on_train_end(self, *args, **kwargs) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("loads_best", [False, True])
def test_a_run_ended_at_its_last_checkpoint_takes_no_further_step(
    build_star, sums, loads_best
) -> None:
    """The parent itself, resumed at max_steps amid an epoch, would take one more."""
    changes = {"num_rounds": 1, "max_steps": 3, "save_steps": 1, "per_device_train_batch_size": 1}
    if loads_best:
        changes |= {
            "eval_dataset": sums(4, first=90), "eval_strategy": "steps", "eval_steps": 1,
            "load_best_model_at_end": True, "metric_for_best_model": "eval_truncated",
        }  # fmt: skip
    whole = build_star(folder="whole", **changes)
    whole.train()
    broken = build_star(folder="broken", **changes)
    broken.add_callback(StopAtTrainEnd())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    last = broken.run.folder(0) / "checkpoint-3/trainer_state.json"
    state = json.loads(last.read_text())
    assert state["epoch"] % 1 != 0
    if loads_best:  # another than the last, whatever the scores were
        state["best_model_checkpoint"] = str(last.parent.with_name("checkpoint-1"))
        last.write_text(json.dumps(state))
        expected = load_model(last.parent.with_name("checkpoint-1"))
    else:
        expected = load_model(whole.run.folder(0) / "model")
    resumed = build_star(folder="broken", **changes)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.run.lines[0]["steps"] == 3
    found = load_model(resumed.run.folder(0) / "model")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def load_model(folder):
    """Return the weights, not as a view of the file, which a test may damage."""
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return {name: weight.clone() for name, weight in weights.items()}


@pytest.mark.parametrize(
    "build", ["build_star", pytest.param("build_spin", marks=pytest.mark.slow)]
)
def test_a_checkpoint_without_its_optimizer_is_passed_over(request, build) -> None:
    """A fresh optimizer would go on to other weights than an uninterrupted run, and say nothing."""
    build = request.getfixturevalue(build)
    changes = {"num_rounds": 1, "max_steps": 3, "save_steps": 1}
    whole = build(folder="whole", **changes)
    whole.train()
    expected = load_model(whole.run.folder(0) / "model")
    for folder, more in (("deleted", {}), ("never-saved", {"save_only_model": True})):
        broken = build(folder=folder, **changes, **more)
        broken.add_callback(StopAtTrainEnd())
        with pytest.raises(KeyboardInterrupt):
            broken.train()
        for path in broken.run.folder(0).glob("checkpoint-*/optimizer.pt"):
            path.unlink()
        resumed = build(folder=folder, **changes, **more)
        resumed.train(resume_from_checkpoint=True)
        found = load_model(resumed.run.folder(0) / "model")
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def without_seconds(line):
    return {name: value for name, value in line.items() if name != "seconds"}


@pytest.mark.parametrize(
    ("build", "damaged"),
    [
        ("build_star", ["model/model.safetensors"]),
        pytest.param("build_star", ["trainer_state.json", "dataset"], marks=pytest.mark.slow),
        pytest.param(
            "build_spin",
            ["model/config.json", "dataset", "selection.parquet", "evaluation/scores.json"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_a_round_can_tell_again_is_done_again(request, caplog, sums, build, damaged) -> None:
    build = request.getfixturevalue(build)
    trainer = build(num_rounds=1)
    trainer.train()
    folder = trainer.run.folder(0)
    expected = load_model(folder / "model")
    line = json.loads(trainer.run.lines_path.read_text())
    trainer.run.lines_path.unlink()  # the kill came before the round was written down
    for name in damaged:
        path = folder / name
        for file in [path] if path.is_file() else list(path.glob("*")):
            file.write_bytes(b"\xff damaged")
    resumed = build(num_rounds=1)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=True)
    assert without_seconds(resumed.run.lines[0]) == without_seconds(line)
    found = load_model(folder / "model")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert "That training is done again" in caplog.text
    assert len(load_from_disk(folder / "dataset")) > 0


@pytest.mark.parametrize(
    ("value", "goes_on"), [("True", True), ("true", True), ("false", False), ("False", False)]
)
def test_a_flags_text_says_whether_to_go_on(build_star, value, goes_on) -> None:
    build_star(num_rounds=1).train(resume_from_checkpoint=False)
    trainer = build_star(num_rounds=1)
    if goes_on:
        trainer.train(resume_from_checkpoint=value)
        assert len(trainer.run.lines) == 1
    else:
        with pytest.raises(FileExistsError, match="already holds rounds"):
            trainer.train(resume_from_checkpoint=value)


def test_an_empty_round_goes_on_with_what_its_error_advises(build_star) -> None:
    """Selection and training read the threshold, and what was sampled and graded is kept."""
    strict = build_star(num_rounds=1, reward_threshold=2.0)
    with pytest.raises(EmptyRoundError, match="reward_threshold and max_length may change"):
        strict.train()
    samples = {p: p.read_bytes() for p in strict.run.folder(0).glob("samples/0*.parquet")}
    mended = build_star(num_rounds=1, reward_threshold=1.0, num_generations=4)
    mended.train(resume_from_checkpoint=True)
    assert {p: p.read_bytes() for p in samples} == samples
    fresh = build_star(folder="fresh", num_rounds=1)
    fresh.train()
    assert without_seconds(mended.run.lines[0]) == without_seconds(fresh.run.lines[0])


def test_a_training_that_diverged_saves_no_model_and_goes_on_at_another_rate(build_star) -> None:
    diverged = build_star(num_rounds=1, learning_rate=1e38, save_steps=1)
    with pytest.raises(FloatingPointError, match=r"diverged: .* Lower the learning rate"):
        diverged.train()
    assert not (diverged.run.folder(0) / "model").exists()
    mended = build_star(num_rounds=1, save_steps=1)
    mended.train(resume_from_checkpoint=True)
    fresh = build_star(folder="fresh", num_rounds=1, save_steps=1)
    fresh.train()
    found, expected = (load_model(t.run.folder(0) / "model") for t in (mended, fresh))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_log_history_is_that_of_all_rounds_also_after_a_stop(build_star, sums) -> None:
    changes = {"eval_dataset": sums(4, first=90)}
    whole = build_star(folder="whole", **changes)
    whole.train()
    build_star(num_rounds=1, **changes).train()
    resumed = build_star(num_rounds=2, **changes)
    resumed.train(resume_from_checkpoint=True)
    for trainer in (whole, resumed):
        scores = [
            (e["round"], e["step"], e["eval_accuracy"])
            for e in trainer.state.log_history
            if "eval_accuracy" in e and e["step"] > 0
        ]
        assert scores == [
            (line["round"], 3 * (line["round"] + 1), line["eval"]["eval_accuracy"])
            for line in trainer.run.lines
        ]
        assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [1, 2, 3, 4, 5, 6]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such lock")
def test_two_runs_in_one_output_dir_are_refused(build_star, tmp_path) -> None:
    trainer = build_star(num_rounds=1)
    code = (
        "from pathlib import Path; from trl_selfplay.disk import held_by_this_process\n"
        f"with held_by_this_process(Path({str(tmp_path / 'run')!r})): print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(RuntimeError, match="another process is training into"):
            trainer.train()
        other.communicate(b"\n")
    trainer.train()
    assert len(trainer.run.lines) == 1


def test_a_moved_run_of_other_versions_goes_on_without_a_word(build_star, tmp_path, caplog) -> None:
    """Names of versions are replaced, and a setting that only the other version knows is there."""
    settings = {"peft_config": LoraConfig(r=4, **LORA)}
    with pytest.raises(KeyboardInterrupt):
        build_star(**settings, callbacks=[StopAtTrainEnd()]).train()
    run = tmp_path / "run"
    shutil.copytree(run, tmp_path / "copy")
    caplog.clear()
    build_star(**settings).train(resume_from_checkpoint=True)
    said = caplog.messages
    moved = (tmp_path / "copy").rename(tmp_path / "moved")
    for path in [*moved.rglob("*.json"), *moved.rglob("*.md")]:
        text = re.sub(r'(_version": )"[\d.]+"', r'\1"99.0.0"', path.read_text())
        path.write_text(re.sub(r"\b(trl|transformers|peft|torch) \d[\w.+]*", r"\1 99.0.0", text))
    record = moved / "_rounds" / "config.json"
    settings_then = json.loads(record.read_text())
    del settings_then["neftune_noise_alpha"]
    record.write_text(json.dumps({**settings_then, "field_of_another_version": 3}))
    caplog.clear()
    build_star("moved", **settings).train(resume_from_checkpoint=True)
    assert caplog.messages == said  # of its samples, not of what has changed
    weights = [load_file(f / "adapter_model.safetensors") for f in (run, moved)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_damaged_card_of_a_finished_run_is_written_anew(build_star, tmp_path) -> None:
    """PEFT reads an older one as it saves the adapter."""
    settings = {"peft_config": LoraConfig(r=4, **LORA), "num_rounds": 1}
    build_star(**settings).train()
    card = tmp_path / "run" / "README.md"
    written = card.read_text()
    card.write_bytes(bytes(255 - byte for byte in card.read_bytes()))
    build_star(**settings).train(resume_from_checkpoint=True)
    assert card.read_text() == written
    card.unlink()
    card.mkdir()
    with pytest.raises(OSError, match=r"README\.md") as caught:
        build_star(**settings).train(resume_from_checkpoint=True)
    assert "The run stopped after the last round." in caught.value.__notes__[0]
