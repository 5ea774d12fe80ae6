"""What `dry_run=True` finds and prints, what makes a run impossible, and that it changes nothing."""

import json
from contextlib import suppress
from itertools import groupby

import graded_process
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from processes import call, call_twice
from tiny_rewards import digit_share

from trl_selfplay.evaluation.estimates import pass_at_k
from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rounds import needs, preflight
from trl_selfplay.rounds.preflight import PreflightError
from trl_selfplay.rounds.trial_round import play_trial_round

LORA = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}


def always(completions, **kwargs):
    return [1.0] * len(completions)


def never(completions, **kwargs):
    return [0.0] * len(completions)


def silent(completions, **kwargs):
    return [None] * len(completions)


def boxed(completions, solution, **kwargs):
    """A reward function that reads one form alone."""
    return [float(f"\\boxed{{{s}}}" in c) for c, s in zip(completions, solution, strict=True)]


def findings_of(tmp_path, folder="run"):
    report = json.loads((tmp_path / folder / "preflight.json").read_text())
    return {finding["name"]: finding for finding in report["findings"]}


def samples_of(trainer):
    return [
        load_rollouts(path) for path in sorted(trainer.run.root.glob("round-*/samples/*.parquet"))
    ]


@pytest.fixture
def trials(monkeypatch):
    """The trial rounds of the test's dry runs."""
    found, real = [], preflight.play_trial_round

    def play(*args):
        found.append(real(*args))
        return found[-1]

    monkeypatch.setattr(preflight, "play_trial_round", play)
    return found


@pytest.mark.parametrize(
    "method",
    ["star", *(pytest.param(name, marks=pytest.mark.slow) for name in ("irpo", "rest_em", "spin"))],
)
def test_a_run_is_bit_equal_with_and_without_a_dry_run_before(request, trials, method) -> None:
    build = request.getfixturevalue(f"build_{method}")
    found = []
    for folder in ("with", "without"):
        trainer = build(folder, num_rounds=1, peft_config=LoraConfig(**LORA))
        if folder == "with":
            trainer.args.dry_run = True
            before = dict(vars(trainer))
            output = trainer.train()
            assert output.global_step == 0
            assert all(value is before[name] for name, value in vars(trainer).items())
            assert [p.name for p in trainer.run.root.parent.iterdir()] == ["preflight.json"]
            trainer.args.dry_run = False
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found.append((samples_of(trainer), losses, trainer.model.state_dict()))
    (samples, losses, weights), (others, other_losses, other_weights) = found
    assert samples
    assert samples == others
    assert losses == other_losses
    assert all(torch.equal(weights[name], other_weights[name]) for name in other_weights)
    # The trial's streams were its own: of so many random completions a few are equal by chance.
    own = {(r.prompt_id, r.sample_index): r for shard in samples for r in shard if not r.hinted}
    pairs = [(r, own[r.prompt_id, r.sample_index]) for r in trials[0].samples
             if (r.prompt_id, r.sample_index) in own]  # fmt: skip
    assert sum(a.completion_ids == b.completion_ids for a, b in pairs) < len(pairs) / 4


def test_what_is_found_follows_from_the_samples(build_star, tmp_path, trials, capsys) -> None:
    shown = [{"prompt": "Q 1 + 1 = ?", "completion": " so 2", "solution": "2"}]
    trainer = build_star(dry_run=True, num_rounds=3, max_completion_length=32, few_shot_examples=shown,
                         num_prompts_per_round=6, max_steps=-1, num_train_epochs=2,
                         disable_tqdm=False)  # fmt: skip
    trainer.train()
    found, (said, bars) = findings_of(tmp_path), capsys.readouterr()
    assert "preflight: 100%" in bars
    assert "preflight with hints: " in bars
    assert "round 0" not in bars
    samples = trials[0].samples
    by_prompt = [
        [r.finish != "length" and r.reward == 1.0 for r in own]
        for _, own in groupby(sorted(samples, key=lambda r: r.prompt_id), key=lambda r: r.prompt_id)
    ]
    assert [len(own) for own in by_prompt] == [8] * 12
    rewards = found["rewards"]["values"]
    assert rewards["pass@1"] == pytest.approx(sum(map(sum, by_prompt)) / 96)
    assert rewards["pass@8"] == pytest.approx(
        sum(pass_at_k(8, sum(own), 8) for own in by_prompt) / 12
    )
    assert rewards["pass@1_low"] <= rewards["pass@1"] <= rewards["pass@1_high"]
    lengths = found["lengths"]["values"]
    assert lengths["truncated"] == sum(r.finish == "length" for r in samples) / 96
    longest = max(len(r.prompt_ids) + len(r.completion_ids) for r in samples)
    assert (
        f"max_length={trainer.args.max_length} tokens; the trial's have up to {longest}"
        in (found["memory"]["text"])
    )
    kept = found["examples"]["values"]["kept"]
    assert 0 < kept <= 96  # of the run's four samples per prompt, and four with a hint
    expected = found["examples"]["values"]["examples"]
    assert expected["value"] == pytest.approx(kept / 12 * 6)
    assert expected["low"] <= expected["value"] <= expected["high"]
    assert found["examples"]["values"]["steps"]["value"] == -(-expected["value"] // 4) * 2
    assert "pass@1" in said
    assert "nothing was trained" in said
    details = found["prompts"]["details"]
    assert all(line in said for line in details)
    row = next(r for r in trainer.self_play.rows if f"row {r.row_index}," in details[0])
    for hinted, lines in (
        (False, details),
        (True, [line for line in details if "with hint" in line]),
    ):
        ids = trainer.self_play.formatter.token_ids(row, few_shot=True, hinted=hinted)
        assert lines[0].endswith(f"{len(ids)} tokens: {trainer.processing_class.decode(ids)!r}")


@pytest.mark.slow
def test_steps_are_those_that_the_parent_takes(build_star, tmp_path) -> None:
    settings = {"num_rounds": 1, "max_steps": -1, "num_train_epochs": 3, "rationalize": False,
                "gradient_accumulation_steps": 2, "max_completion_length": 32}  # fmt: skip
    trainer = build_star(**settings)
    trial = play_trial_round(trainer, tmp_path / "trial")
    output = trainer.train()
    examples = trainer.run.lines[0]["examples"]
    steps = needs.expected_steps(trainer, trial, needs.Expected(examples, examples, examples))
    assert steps.value == output.global_step


@pytest.mark.slow
def test_a_forecast_of_checkpoints_and_models_is_what_lies_on_disk(build_star, tmp_path) -> None:
    trainer = build_star(num_rounds=1, save_steps=1, save_total_limit=1, rationalize=False,
                         max_completion_length=32)  # fmt: skip
    needed = needs.bytes_of_run(trainer, play_trial_round(trainer, tmp_path / "trial"))
    trainer.train()
    whole = sum(p.nbytes for p in trainer.model.parameters())
    assert needed["models"] == whole * 5  # three of rounds, the last in output_dir, the initial one
    assert needed["checkpoints"] == 2 * 3 * whole  # Adam keeps two numbers per weight
    sampled = sum(p.stat().st_size for p in trainer.run.folder(0).glob("samples/*.parquet"))
    assert needed["samples"] == pytest.approx(sampled, rel=0.5)


@pytest.mark.parametrize(
    ("changes", "name", "message"),
    [
        ({"reward_funcs": never}, "rewards", "pass@8 0.00.*nothing to learn"),
        pytest.param({"reward_funcs": silent}, "rewards", "abstained on all", marks=pytest.mark.slow),
        pytest.param(
            {"max_completion_length": 1, "temperature": 0.01}, "lengths",
            "100% are cut at max_completion_length=1", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_a_run_that_cannot_work_is_an_error(
    build_star, tmp_path, monkeypatch, changes, name, message
) -> None:
    monkeypatch.setattr(preflight, "free_bytes", lambda folder: 1000)
    trainer = build_star(dry_run=True, rationalize=False, **changes)
    with pytest.raises(
        PreflightError, match=f"(?s)can't work:.*- {name}: .*{message}.*a larger disk"
    ):
        trainer.train()
    for what in (name, "examples", "disk"):
        assert findings_of(tmp_path)[what]["level"] == "error"


@pytest.mark.slow
def test_a_solved_task_is_a_warning(build_star, tmp_path) -> None:
    build_star(dry_run=True, reward_funcs=always, max_completion_length=200).train()
    found = findings_of(tmp_path)["rewards"]
    assert found["level"] == "warning"
    assert "almost nothing is left to learn" in found["text"]


def test_the_form_in_which_a_reward_function_reads_solutions_is_found(build_star, tmp_path) -> None:
    with pytest.raises(PreflightError, match="nothing to learn"):  # a random model boxes nothing
        build_star(dry_run=True, reward_funcs=boxed).train()
    gold = findings_of(tmp_path)["gold"]
    assert (gold["level"], gold["values"]["passed"]) == ("ok", 12)
    assert gold["values"]["form"].format("4") == "\\boxed{4}"


@pytest.mark.parametrize(
    ("wrong", "level"), [(12, "error"), pytest.param(2, "warning", marks=pytest.mark.slow)]
)
def test_gold_that_fails_the_reward_functions_is_told(
    build_irpo, sums, tmp_path, wrong, level
) -> None:
    rows = [
        {"prompt": row["prompt"], "completion": " no" if i < wrong else f" so {row['solution']}"}
        for i, row in enumerate(sums(12))
    ]
    trainer = build_irpo(dry_run=True, gold_dataset=Dataset.from_list(rows))
    if level == "error":
        with pytest.raises(
            PreflightError, match="gold: 0 of 12 completions of `gold_dataset` pass"
        ):
            trainer.train()
    else:
        trainer.train()
    gold = findings_of(tmp_path)["gold"]
    assert gold["level"] == level
    assert "reward 0.0: ' no'" in gold["details"][0] or "' no'" in " ".join(gold["details"])


OTHER_END = (
    "{% for m in messages %} {{ m.content }}{% if m.role == 'assistant' %} A{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("is_told", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_template_whose_end_of_turn_does_not_end_sampling_is_told(
    build_star, word_tokenizer, sums, tmp_path, caplog, is_told
) -> None:
    word_tokenizer.chat_template = OTHER_END if is_told else OTHER_END.replace(" A", " <eos>")
    rows = sums(12).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    trainer = build_star(dry_run=is_told, train_dataset=rows, num_rounds=1, rationalize=False,
                         reward_funcs=always, max_steps=1)  # fmt: skip
    advice = "tokenizer.eos_token = 'A'"
    trainer.train()
    if is_told:
        stop = findings_of(tmp_path)["stop"]
        assert stop["level"] == "warning"
        assert advice in stop["text"]
        preflight.warn_before_run(trainer)  # as every run does
    assert (advice in caplog.text) == is_told


def test_examples_that_are_longer_than_a_completion_may_be_are_told(
    build_star, tmp_path, caplog
) -> None:
    example = {"prompt": "Q 1 + 1 =", "completion": " so 2 so 2 so 2", "solution": "2"}
    trainer = build_star(dry_run=True, few_shot_examples=[example], max_completion_length=3,
                         num_rounds=1, reward_funcs=always)  # fmt: skip
    told = "1 of 1 few_shot_examples have longer completions than max_completion_length=3 allows"
    preflight.warn_before_run(trainer)  # as every run does
    assert told in caplog.text
    with suppress(PreflightError):  # whatever else is wrong with a random model's completions
        trainer.train()
    assert told in findings_of(tmp_path)["lengths"]["text"]


@pytest.mark.slow
def test_rewards_of_degrees_have_a_mean_and_no_pass_rate(build_rest_em, tmp_path) -> None:
    build_rest_em(dry_run=True, reward_funcs=digit_share, loss_weighting="reward",
                  max_completion_length=32).train()  # fmt: skip
    found = findings_of(tmp_path)
    assert {"mean", "low", "high"} <= set(found["rewards"]["values"])
    assert "gold" not in found


@pytest.mark.slow
def test_an_existing_run_in_the_folder_stays(build_star) -> None:
    trainer = build_star(num_rounds=1)
    trainer.train()
    before = {p: p.read_bytes() for p in trainer.run.root.rglob("*") if p.is_file()}
    build_star(num_rounds=1, dry_run=True, max_completion_length=32).train()
    assert before == {p: p.read_bytes() for p in trainer.run.root.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["STaR", "judged ReST"])
def test_two_processes_find_what_one_does(tmp_path, saved_tiny_model, method) -> None:
    settings = {"max_completion_length": 16, "dry_run": True}
    if method == "judged ReST":
        settings |= {"improve_thresholds": [0.1, 0.9], "start_from": "previous"}
    for folder, start in (("one", call), ("two", call_twice)):
        codes = start(graded_process.main, method, str(saved_tiny_model), str(tmp_path / folder),
                      json.dumps(settings))  # fmt: skip
        assert codes in (0, [0, 0])
        assert [path.name for path in (tmp_path / folder).iterdir()] == ["preflight.json"]
    one, two = (findings_of(tmp_path, folder) for folder in ("one", "two"))
    assert one.keys() == two.keys()
    for name in one.keys() - {"memory", "time", "disk"}:
        assert one[name] == two[name]
