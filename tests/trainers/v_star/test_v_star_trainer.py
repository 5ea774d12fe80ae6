"""V-STaR's invariants, on real runs of a tiny model."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM
from trl import DPOTrainer

from trl_selfplay import EmptyRoundError, VSTaRTrainer
from trl_selfplay.rewards import VerifierReward
from trl_selfplay.rollouts.selection import default_normal_form
from trl_selfplay.rollouts.stored import load_all_samples, load_samples
from trl_selfplay.rounds.weights import trainable_parameters

LN_2 = math.log(2.0)


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)


def rows_of(trainer):
    return load_from_disk(str(trainer.run.folder(0) / "dataset")).to_list()


def sampled(star):
    """All samples of a run, by prompt and completion."""
    return [r for index in range(2) for r in load_samples(star.run.folder(index))]


def test_the_parent_is_trls() -> None:
    assert issubclass(VSTaRTrainer, DPOTrainer)


@pytest.mark.parametrize("case", ["full", "lora"])
def test_the_loss_begins_at_ln_2_and_all_margins_at_0(
    star_run, build_verifier, pair_recorder, case
) -> None:
    """VS-1: policy and reference are G_SFT."""
    trainer = build_verifier(
        star_run, callbacks=[pair_recorder], peft_config=lora() if case == "lora" else None
    )
    trainer.train()
    (steps,) = pair_recorder.steps.values()
    assert steps[0]["loss"] == pytest.approx(LN_2, abs=1e-4)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert steps[0][name] == pytest.approx(0.0, abs=1e-5)
    assert abs(steps[-1]["rewards/margins"]) > 1e-6


def test_the_reference_is_the_model_that_was_fine_tuned(star_run, build_verifier) -> None:
    """VS-1: from plain logits of what STaR saved, row by row."""
    trainer = build_verifier(star_run, peft_config=lora())
    trainer.train()
    g_sft = AutoModelForCausalLM.from_pretrained(star_run.args.output_dir)
    for row in rows_of(trainer)[:6]:
        for side in ("chosen", "rejected"):
            ids = torch.tensor([[*row["prompt_ids"], *row[f"{side}_ids"]]])
            with torch.no_grad():
                logps = g_sft(input_ids=ids).logits[0, :-1].log_softmax(-1)
            logps = logps.gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :]
            assert row[f"ref_{side}_logps"] == pytest.approx(float(logps.sum()), abs=1e-4)


def test_pairs_join_right_and_wrong_completions_of_a_prompt_over_all_rounds(
    star_run, build_verifier
) -> None:
    """VS-2, VS-3 and VS-7, from the tokens as they were sampled."""
    trainer = build_verifier(star_run, max_per_prompt=3)
    trainer.train()
    rewards = {}
    rounds = Counter()
    for r in sampled(star_run):
        if not r.is_truncated:
            rewards[r.prompt_id, r.completion_ids] = r.reward
    newest = {(r.prompt_id, r.completion_ids) for r in load_samples(star_run.run.folder(1))}
    rows = rows_of(trainer)
    assert rows
    for row in rows:
        chosen, rejected = (
            (row["prompt_id"], tuple(row[f"{s}_ids"])) for s in ("chosen", "rejected")
        )
        assert rewards[chosen] == 1.0
        assert rewards[rejected] == 0.0
        rounds.update(key in newest for key in (chosen, rejected))
    assert rounds[True]
    assert rounds[False]
    assert max(Counter(row["prompt_id"] for row in rows).values()) <= 3
    pairs = [(r["prompt_id"], tuple(r["chosen_ids"]), tuple(r["rejected_ids"])) for r in rows]
    assert len(set(pairs)) == len(pairs)
    again = build_verifier(star_run, "again", max_per_prompt=3)
    again.train()
    assert rows_of(again) == rows
    other = build_verifier(star_run, "other", max_per_prompt=3, seed=7)
    other.train()
    assert rows_of(other) != rows


def test_every_pair_is_there_without_a_limit(star_run, build_verifier) -> None:
    """VS-2: as many as distinct right times distinct wrong completions; prompts of one kind have none."""
    trainer = build_verifier(star_run, max_per_prompt=None)
    trainer.train()
    forms = {True: Counter(), False: Counter()}
    for prompt_id, right, _ in {
        (r.prompt_id, r.reward == 1.0, default_normal_form(r.completion))
        for r in sampled(star_run)
        if not r.is_truncated
    }:
        forms[right][prompt_id] += 1
    expected = {p: n * forms[False][p] for p, n in forms[True].items() if forms[False][p]}
    assert Counter(row["prompt_id"] for row in rows_of(trainer)) == expected


def test_what_the_generator_was_trained_on_has_no_wrong_completion(star_run) -> None:
    """VS-3, and VS-4: each of its rounds begins with the base's weights."""
    for index, line in enumerate(star_run.run.lines):
        assert line["trained_from"] == "base"
        right = {r.completion_ids for r in sampled(star_run) if r.reward == 1.0}
        for row in load_from_disk(str(star_run.run.folder(index) / "dataset")).to_list():
            learnt = tuple(token for token in row["labels"] if token != -100)
            assert learnt in right


def test_the_generator_s_weights_stay_and_the_verifier_has_an_adapter_of_its_own(
    build_star, build_verifier, tmp_path, saved_tiny_model
) -> None:
    """VS-5, of a generator that is an adapter itself: it is merged into the verifier's base."""
    star = build_star(model=str(saved_tiny_model), peft_config=lora(), num_generations=6,
                      max_completion_length=16, rationalize=False)  # fmt: skip
    star.train()
    generator = {n: p.detach().clone() for n, p in trainable_parameters(star.model).items()}
    files = {p: p.read_bytes() for p in (tmp_path / "run").glob("*.safetensors")}
    trainer = build_verifier(star, peft_config=lora(), learning_rate=1e-1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "verifier" / "merged")
    ids = torch.tensor([[5, 6, 7, 8]])
    star.model.eval()
    torch.testing.assert_close(base(ids).logits, star.model(ids).logits, atol=1e-5, rtol=1e-4)
    trainer.train()
    for name, parameter in trainable_parameters(star.model).items():
        assert torch.equal(parameter, generator[name])
    assert {p: p.read_bytes() for p in files} == files
    verifier = VerifierReward(str(tmp_path / "verifier"), score="ratio")
    adapted = verifier.grading_model.ready()[0]
    assert isinstance(adapted, PeftModel)
    ratios = verifier(["Q 1 ", "Q 1 + 2 "], ["A 3", "no"])
    assert all(abs(ratio) > 1e-3 for ratio in ratios)
    # The base that it names is the merged one: without its adapter it is the generator.
    with adapted.disable_adapter():
        torch.testing.assert_close(
            adapted(ids).logits, star.model(ids).logits, atol=1e-5, rtol=1e-4
        )


def test_a_merged_base_that_is_damaged_is_merged_again(
    build_star, build_verifier, tmp_path, saved_tiny_model, caplog
) -> None:
    star = build_star(model=str(saved_tiny_model), peft_config=lora(), num_generations=6,
                      max_completion_length=16, rationalize=False)  # fmt: skip
    star.train()
    build_verifier(star, peft_config=lora()).train()
    merged = tmp_path / "verifier" / "merged"
    whole = {path: path.read_bytes() for path in merged.iterdir()}
    weights = merged / "model.safetensors"

    def change_a_weight():
        weights.write_bytes(whole[weights][:-1] + bytes([whole[weights][-1] ^ 1]))

    for damage in (
        change_a_weight,
        (merged / "config.json").unlink,
        lambda: (merged / "tokenizer.json").write_text(""),
        lambda: (merged / "checksums.json").write_text("{"),
    ):
        caplog.clear()
        damage()
        build_verifier(star, peft_config=lora())
        assert {path: path.read_bytes() for path in merged.iterdir()} == whole
        assert f"The adapter in {tmp_path / 'run'} is merged again." in caplog.text


def test_a_long_enough_training_tells_right_from_wrong_completions(
    star_run, build_verifier
) -> None:
    """And an interrupted one is read back."""
    trainer = build_verifier(star_run, max_steps=40, learning_rate=1e-2, max_per_prompt=None)
    trainer.train()
    verifier = VerifierReward(
        trainer.model, star_run.args.output_dir, star_run.processing_class, score="ratio"
    )
    prompts = {row.prompt_id: row.prompt for row in star_run.self_play.rows}
    rollouts = [r for r in sampled(star_run) if not r.is_truncated]
    scores = verifier(
        [prompts[r.prompt_id] for r in rollouts], [r.completion for r in rollouts],
        completion_ids=[r.completion_ids for r in rollouts],
    )  # fmt: skip
    means = {
        right: sum(s for s, r in zip(scores, rollouts, strict=True) if (r.reward == 1.0) is right)
        / sum((r.reward == 1.0) is right for r in rollouts)
        for right in (True, False)
    }
    assert means[True] > means[False] + 1.0


def test_rollouts_may_be_given_instead_of_a_run(star_run, build_verifier) -> None:
    rollouts = load_samples(star_run.run.folder(1))
    trainer = build_verifier(star_run, samples=rollouts)
    trainer.train()
    known = {(r.prompt_id, r.completion_ids) for r in rollouts}
    for row in rows_of(trainer):
        assert (row["prompt_id"], tuple(row["chosen_ids"])) in known


def test_other_samples_are_another_run(star_run, build_verifier) -> None:
    build_verifier(star_run).train()
    other = build_verifier(star_run, samples=load_samples(star_run.run.folder(1)))
    with pytest.raises(ValueError, match="samples"):
        other.train(resume_from_checkpoint=True)
    samples = load_all_samples(star_run.run.root)
    graded_again = [replace(r, reward=1.0 - r.reward) for r in samples]
    with pytest.raises(ValueError, match=r"never change:\n  sample_rewards:"):
        build_verifier(star_run, samples=graded_again).train(resume_from_checkpoint=True)
    build_verifier(star_run).train(resume_from_checkpoint=True)


def test_samples_that_cannot_work_are_refused(
    star_run, build_verifier, sums, tmp_path, make_rollout
) -> None:
    with pytest.raises(FileNotFoundError, match=r"no samples in .*nowhere/_rounds"):
        build_verifier(star_run, samples=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="none of the 12 prompts"):
        build_verifier(star_run, train_dataset=sums(3, first=500))
    with pytest.raises(ValueError, match="without rewards"):
        build_verifier(star_run, samples=[make_rollout(rewards=(), reward=None)])
    with pytest.raises(ValueError, match="has completions with results of tools"):
        build_verifier(star_run, samples=[make_rollout(completion_mask=(True, False, True))])
    with pytest.raises(ValueError, match="Leave it out"):
        build_verifier(star_run, eval_dataset=sums(3, first=500))


def test_prompts_that_are_not_in_the_dataset_are_left_out_and_counted(
    star_run, build_verifier, sums, caplog
) -> None:
    trainer = build_verifier(star_run, train_dataset=sums(8))
    assert "4 of the 12 prompts" in caplog.text
    trainer.train()
    assert {row["prompt_id"] for row in rows_of(trainer)} <= {
        r.prompt_id for r in trainer.self_play.rows
    }


def test_a_run_without_a_pair_says_so(star_run, build_verifier) -> None:
    right = [r for r in load_samples(star_run.run.folder(0)) if r.reward == 1.0]
    with pytest.raises(EmptyRoundError, match="both a right and a wrong completion"):
        build_verifier(star_run, samples=right).train()


def test_fields_of_rounds_and_sampling_are_refused(star_run, build_verifier) -> None:
    for name, value in {"num_rounds": 2, "temperature": 0.5, "num_generations": 4, "stop_strings": ["a"]}.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}=.* has no effect here"):
            build_verifier(star_run, **{name: value})
    with pytest.raises(ValueError, match="log_completions_hub_repo='s' has no effect here"):
        build_verifier(star_run, push_to_hub=True, log_completions_hub_repo="s")


@pytest.mark.slow
def test_a_verifier_s_pairs_are_counted_and_nothing_is_sampled(
    star_run, build_verifier, tmp_path
) -> None:
    build_verifier(star_run, dry_run=True).train()
    report = json.loads((tmp_path / "verifier" / "preflight.json").read_text())
    found = {finding["name"]: finding for finding in report["findings"]}
    assert not {"rewards", "lengths", "gold"} & set(found)
    trainer = build_verifier(star_run, folder="other")
    trainer.train()
    [line] = trainer.run.lines
    assert found["examples"]["values"]["examples"]["value"] == pytest.approx(line["examples"])
    assert found["disk"]["values"]["samples"] == 0
