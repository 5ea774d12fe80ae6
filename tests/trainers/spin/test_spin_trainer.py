"""SPIN's invariants, on real runs of a tiny model."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from peft import LoraConfig, PeftModel, get_peft_model
from processes import call
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from trl_selfplay import EmptyRoundError, SPINConfig, SPINTrainer, WrongOpponentError
from trl_selfplay.generation.random_streams import stream_key
from trl_selfplay.generation.sampler import SampleRequest, build_sampling_options
from trl_selfplay.rollouts.record import load_rollouts

LN_2 = math.log(2.0)
CASES = ("full", "lora", "user", "nf4", "full-path")


def lora(**changes):
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"],
           "lora_dropout": 0.1, **changes}
    )  # fmt: skip


def trained_adapter(model):
    """A user's PeftModel whose adapter is no longer at its initial zero."""
    peft_model = get_peft_model(model, lora())
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return peft_model


@pytest.fixture
def build_case(build_spin, tiny_model, word_tokenizer, tmp_path):
    """Return a function that builds a SPINTrainer in one of the cases of fine-tuning."""

    def build(case, **changes):
        base = tiny_model(word_tokenizer, hidden_size=64, intermediate_size=128)
        if case == "full":
            return build_spin(model=base, **changes)
        if case == "lora":
            return build_spin(model=base, peft_config=lora(), **changes)
        if case == "user":
            return build_spin(model=trained_adapter(base), **changes)
        base.save_pretrained(tmp_path / "saved")
        if case == "full-path":
            return build_spin(model=str(tmp_path / "saved"), **changes)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        return build_spin(
            model=str(tmp_path / "saved"),
            quantization_config=quantization,
            peft_config=lora(),
            **changes,
        )

    return build


def first_steps(recorder):
    return [recorder.steps[t][0] for t in sorted(recorder.steps)]


@pytest.mark.parametrize("case", CASES)
def test_the_loss_begins_at_ln_2_in_every_round(build_case, pair_recorder, case) -> None:
    """SP-1: rounds 0, 1 and 2, under gradient accumulation, in each case of fine-tuning."""
    trainer = build_case(case, callbacks=[pair_recorder], gradient_accumulation_steps=2,
                         per_device_train_batch_size=3)  # fmt: skip
    trainer.train()
    assert trainer.ref_model is None
    assert sorted(pair_recorder.steps) == [0, 1, 2]
    for logs in first_steps(pair_recorder):
        assert logs["loss"] == pytest.approx(LN_2, abs=1e-5)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert logs[name] == pytest.approx(0.0, abs=1e-5)
    # The rounds do move the policy, or the assertion would hold of any opponent.
    for steps in pair_recorder.steps.values():
        assert abs(steps[-1]["loss"] - LN_2) > 1e-3


def rows_of(trainer, round_index):
    return load_from_disk(str(trainer.run.folder(round_index) / "dataset"))


def batch_of(trainer, rows, count=4):
    batch = trainer.data_collator([rows[i] for i in range(count)])
    return {name: tensor.to(trainer.accelerator.device) for name, tensor in batch.items()}


def summed_logps(model, rows, side):
    """log p(completion | prompt) of each row, one by one, from the model's plain logits."""
    sums = []
    for row in rows:
        ids = torch.tensor([[*row["prompt_ids"], *row[side]]])
        logits = model(input_ids=ids).logits[0, :-1].double()
        logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        sums.append(logps[len(row["prompt_ids"]) - 1 :].sum())
    return torch.stack(sums)


def gradients(model):
    return {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, relative) -> None:
    assert found.keys() == expected.keys()
    difference = math.sqrt(sum(float((found[n] - expected[n]).square().sum()) for n in found))
    size = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert size > 0
    assert difference <= relative * size


@pytest.mark.parametrize("case", ["full", "lora", "user", "nf4"])
def test_another_opponent_does_not_begin_at_ln_2(build_case, case) -> None:
    """SP-2: against round 0's opponent (the base, the checkpoint on disk, the user's adapter as it
    came) round 1 would begin elsewhere, and the check at run time says so."""
    trainer = build_case(case, num_rounds=1, max_steps=12, learning_rate=2e-2)
    trainer.train()
    stale = batch_of(trainer, rows_of(trainer, 0))
    loss = float(trainer.compute_loss(trainer.model, stale).detach())
    assert abs(loss - LN_2) > 100 * 1e-5
    with pytest.raises(WrongOpponentError, match="round 1"):
        trainer.check_reference(trainer.model, stale, 1)
    again = trainer.store_reference(rows_of(trainer, 0).remove_columns(["ref_chosen_logps",
                           "ref_rejected_logps"]), trainer.run.root / "again")  # fmt: skip
    fresh = batch_of(trainer, again)
    assert float(trainer.compute_loss(trainer.model, fresh).detach()) == pytest.approx(
        LN_2, abs=1e-5
    )
    trainer.check_reference(trainer.model, fresh, 1)


class AgainstTheBase(SPINTrainer):
    """Compares with the model without adapters throughout."""

    def compute_ref_log_probs(self, model, inputs):
        with self.accelerator.unwrap_model(self.model).disable_adapter():
            return self.compute_policy_log_probs(model, inputs)


def test_another_opponent_can_be_set_and_the_policy_is_still_measured(
    tiny_model, word_tokenizer, answers, tmp_path
) -> None:
    args = SPINConfig(
        str(tmp_path / "run"), num_rounds=2, max_completion_length=64, max_steps=3, use_cpu=True,
        per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], disable_tqdm=True,
        load_best_round_at_end=False,
    )  # fmt: skip
    trainer = AgainstTheBase(
        trained_adapter(tiny_model(word_tokenizer)), args=args, train_dataset=answers(12),
        eval_dataset=answers(20).select(range(12, 20)), processing_class=word_tokenizer,
    )  # fmt: skip
    trainer.train()  # its margins don't begin at 0, which is no error here
    first, second = (line["eval"]["eval_logps"] for line in trainer.run.lines)
    assert abs(first - second) > 1e-3
    rows = rows_of(trainer, 1)
    with trainer.model.disable_adapter():
        base = summed_logps(trainer.model, rows, "chosen_ids")
    torch.testing.assert_close(torch.tensor(rows["ref_chosen_logps"]).double(), base, atol=1e-4, rtol=0)  # fmt: skip


def test_adapters_that_would_not_train_are_refused(
    build_spin, tiny_model, word_tokenizer, tmp_path
) -> None:
    """Before anything is sampled: as loaded for inference, under another name, or replaced."""
    trained_adapter(tiny_model(word_tokenizer)).save_pretrained(tmp_path / "adapter")
    tiny_model(word_tokenizer).save_pretrained(tmp_path / "base")
    frozen = PeftModel.from_pretrained(tiny_model(word_tokenizer), tmp_path / "adapter")
    with pytest.raises(ValueError, match="no weight of the model is trainable"):
        build_spin(model=frozen)
    named = PeftModel.from_pretrained(
        tiny_model(word_tokenizer), tmp_path / "adapter", adapter_name="style", is_trainable=True
    )
    with pytest.raises(ValueError, match=r"named \['style'\]"):
        build_spin(model=named)
    loaded = tiny_model(word_tokenizer)
    loaded.load_adapter(str(tmp_path / "adapter"))
    with (
        pytest.raises(ValueError, match="a folder that holds an adapter"),
        pytest.warns(UserWarning, match="(a second time|multiple adapters)"),
    ):
        build_spin(model=loaded, peft_config=lora())


class OneToken(TrainerCallback):
    """Leaves the second round no room for a completion."""

    def on_round_begin(self, args, state, control, round_index, **kwargs):
        if round_index == 1:
            args.max_completion_length = 1


def test_a_round_with_earlier_pairs_alone_is_empty(build_spin) -> None:
    trainer = build_spin(history_rounds=1, callbacks=[OneToken()])
    with pytest.raises(EmptyRoundError, match="round 1"):
        trainer.train()


class MoveWeights(TrainerCallback):
    """Changes the policy after the opponent was scored, as a careless callback might."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(1.2)


def test_a_policy_that_moves_before_its_first_step_stops_the_run(build_spin) -> None:
    """SP-1 at run time."""
    with pytest.raises(WrongOpponentError, match="differ from the stored ones"):
        build_spin(callbacks=[MoveWeights()]).train()


def test_the_first_gradient_does_not_depend_on_the_opponent(build_case) -> None:
    """SP-3: −(β/2)·∇[log p(y) − log p(y')]."""
    trainer = build_case("full")
    rows = trainer.play_round(0).training_rows.select(range(4))
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch_of(trainer, rows)).backward()
    found = gradients(trainer.model)
    trainer.model.zero_grad()
    chosen, rejected = (
        summed_logps(trainer.model, rows, f"{s}_ids") for s in ("chosen", "rejected")
    )
    (-trainer.beta / 2 * (chosen - rejected).mean()).backward()
    assert_close(found, gradients(trainer.model), relative=1e-5)  # float32


@pytest.mark.parametrize("case", ["full", "lora", "user", "nf4"])
def test_loss_and_gradient_are_the_papers(build_case, case) -> None:
    """SP-4: equation 4.7 in NumPy, after a round, so that the margins are not 0."""
    trainer = build_case(case, num_rounds=1, beta=0.5, max_steps=6)
    trainer.train()
    rows = rows_of(trainer, 0).select(range(4))
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, rows))
    loss.backward()
    found = gradients(trainer.model)

    trainer.model.zero_grad()
    chosen, rejected = (
        summed_logps(trainer.model, rows, f"{s}_ids") for s in ("chosen", "rejected")
    )
    references = np.array(rows["ref_chosen_logps"]) - np.array(rows["ref_rejected_logps"])
    margin = 0.5 * ((chosen - rejected).detach().numpy() - references)
    assert np.abs(margin).max() > 1e-2
    # 4-bit layers compute a padded batch in other sums than a lone row.
    tolerance = 2e-2 if case == "nf4" else 1e-5
    assert float(loss.detach()) == pytest.approx(np.log1p(np.exp(-margin)).mean(), abs=tolerance)
    slope = torch.from_numpy(-0.5 / (1 + np.exp(margin)) / len(margin))
    (slope * (chosen - rejected)).sum().backward()
    assert_close(found, gradients(trainer.model), relative=5e-2 if case == "nf4" else 1e-4)


class KeepState(TrainerCallback):
    """Keeps what a round ended with, and what its optimizer began with."""

    def __init__(self) -> None:
        self.ended, self.optimizer_states, self.optimized = [], [], []

    def on_round_end(self, args, state, control, model, round_index, **kwargs):
        self.ended.append({n: p.detach().clone() for n, p in model.state_dict().items()})

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.optimizer_states.append(len(optimizer.state))
        self.optimized.append({id(p) for g in optimizer.param_groups for p in g["params"]})


@pytest.mark.parametrize("case", ["full", "lora"])
def test_the_opponent_is_the_policy_that_the_last_round_ended_with(build_case, case) -> None:
    """SP-5: stored log-probs are those of the saved weights, loaded into another model."""
    keep = KeepState()
    trainer = build_case(case, num_rounds=2, callbacks=[keep])
    begun = {n: p.detach().clone() for n, p in trainer.model.state_dict().items()}
    trainer.train()
    other = build_case(case, folder="other").model.eval()
    for round_index, weights in ((0, begun), (1, keep.ended[0])):
        other.load_state_dict(weights)
        rows = rows_of(trainer, round_index)
        with torch.no_grad():
            for side in ("chosen", "rejected"):
                logps = summed_logps(other, rows, f"{side}_ids")
                assert logps.tolist() == pytest.approx(list(rows[f"ref_{side}_logps"]), abs=1e-4)
    assert len(keep.ended) == 2


def score_from_disk(base, folder, rows, output) -> None:
    """What a fresh process needs: the weights that a round saved, and plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(base if base else folder, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, folder) if base else model).eval()
    with torch.no_grad():
        logps = [summed_logps(model, rows, f"{s}_ids").tolist() for s in ("chosen", "rejected")]
    Path(output).write_text(json.dumps(logps))


class CopyModel(TrainerCallback):
    """Copies the first round's saved weights: full fine-tuning keeps the last round's alone."""

    def __init__(self, folder) -> None:
        self.folder = folder

    def on_round_end(self, args, state, control, round_index, **kwargs):
        if round_index == 0:
            shutil.copytree(Path(args.output_dir) / "_rounds/round-000/model", self.folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["full-path", "lora"])
def test_a_fresh_process_finds_the_stored_log_probs_from_the_saved_weights(
    build_spin, build_case, tiny_model, word_tokenizer, tmp_path, case
) -> None:
    """SP-5, with nothing of the run but the files of the round before."""
    base, saved = tmp_path / "base", tmp_path / "after-round-0"
    tiny_model(word_tokenizer, hidden_size=64, intermediate_size=128).save_pretrained(base)
    trainer = build_case(case, num_rounds=2, callbacks=[CopyModel(saved)])
    trainer.train()
    stale, output = [], tmp_path / "logps.json"
    for round_index in (0, 1):
        rows = rows_of(trainer, round_index)
        adapter_base = str(base) if case == "lora" else None
        assert call(score_from_disk, adapter_base, str(saved), rows.to_list(), str(output)) == 0
        logps = json.loads(output.read_text())
        stored = [rows[f"ref_{side}_logps"] for side in ("chosen", "rejected")]
        stale.append(max(abs(a - b) for x, y in zip(logps, stored, strict=True)
                         for a, b in zip(x, y, strict=True)))  # fmt: skip
    assert stale[1] < 1e-4  # round 1's opponent is what round 0 saved
    assert stale[0] > 1e-2  # and round 0's is not


def test_a_sampled_completion_has_the_log_prob_it_was_sampled_with(build_spin) -> None:
    """SP-6: at temperature 1 without filters."""
    trainer = build_spin()
    rows = trainer.play_round(0).training_rows
    samples = [r for p in sorted((trainer.run.folder(0) / "samples").glob("*.parquet"))
               for r in load_rollouts(p)]  # fmt: skip
    play = trainer.self_play
    options = build_sampling_options(trainer.args, play.eos_token_ids, return_logprobs=True)
    requests = [
        SampleRequest(r.prompt_ids, stream_key(trainer.args.seed, 0, "train", r.prompt_id, 0))
        for r in samples
    ]
    sampled = {
        (requests[i].prompt_ids, s.completion_ids): s.logprob
        for i, s in play.collector.sampler.sample(requests, options, 5)
    }
    for row in rows:
        key = (tuple(row["prompt_ids"]), tuple(row["rejected_ids"]))
        assert sampled[key] == pytest.approx(row["ref_rejected_logps"], abs=1e-4)


@pytest.mark.parametrize("case", ["lora", "user", "nf4"])
def test_the_opponent_does_not_move_inside_a_round(build_case, case) -> None:
    """SP-7: stored log-probs, base weights; no second adapter, nothing frozen in the optimizer."""
    keep = KeepState()
    trainer = build_case(case, num_rounds=1, callbacks=[keep])
    assert list(trainer.model.peft_config) == ["default"]
    frozen = {n: p.detach().clone() for n, p in trainer.model.named_parameters()
              if not p.requires_grad}  # fmt: skip
    entered = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    rows = rows_of(trainer, 0)
    with torch.no_grad():  # what the round ended with, then what entered it
        moved = trainer.compute_policy_log_probs(trainer.model, batch_of(trainer, rows))[0]
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(entered[name])
        opponent = trainer.compute_policy_log_probs(trainer.model, batch_of(trainer, rows))[0]
    stored = torch.tensor(rows["ref_chosen_logps"][:4])
    torch.testing.assert_close(opponent.cpu(), stored, atol=1e-4, rtol=0)
    assert (moved.cpu() - stored).abs().max() > 1e-2
    parameters = dict(trainer.model.named_parameters())
    assert all(torch.equal(parameters[n], p) for n, p in frozen.items())
    assert keep.optimized[0] == {id(p) for p in parameters.values() if p.requires_grad}
    assert not (trainer.run.folder(0) / "model" / "ref").exists()


def test_rejected_completions_are_the_sampled_tokens_and_end_as_sampled(build_spin) -> None:
    """SP-8 and SP-9: same prompt tokens, same completion tokens; cut ones are never trained on."""
    trainer = build_spin(num_rounds=1, max_completion_length=12)
    played = trainer.play_round(0)
    eos = trainer.processing_class.eos_token_id
    sampled = {(r.prompt_ids, r.completion_ids): r.finish for r in played.rollouts}
    assert "length" in sampled.values()
    for row in played.training_rows:
        assert sampled[tuple(row["prompt_ids"]), tuple(row["rejected_ids"])] == "eos"
        assert row["rejected_ids"].count(eos) == 1
        assert row["rejected_ids"][-1] == eos
        assert row["chosen_ids"].count(eos) == 1
        assert row["chosen_ids"][-1] == eos
    counts = played.funnel.unhinted
    assert counts.truncated == sum(f == "length" for f in sampled.values())
    assert counts.kept == len(played.training_rows)


def test_an_identical_pair_has_loss_ln_2_and_no_gradient(build_spin) -> None:
    """SP-10."""
    trainer = build_spin(num_rounds=1)
    trainer.train()
    rows = rows_of(trainer, 0)
    same = rows.map(lambda row: {"rejected_ids": row["chosen_ids"],
                                 "ref_rejected_logps": row["ref_chosen_logps"]})  # fmt: skip
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, same))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(LN_2, abs=1e-6)
    assert max(float(g.abs().max()) for g in gradients(trainer.model).values()) < 1e-6


def test_pairs_of_the_round_before_are_scored_by_the_new_opponent(
    build_spin, pair_recorder
) -> None:
    """SP-11, and SP-1 on such rows."""
    trainer = build_spin(history_rounds=1, callbacks=[pair_recorder], max_steps=8)
    trainer.train()
    rows = [rows_of(trainer, t) for t in range(3)]
    keys = [{(r["prompt_id"], tuple(r["rejected_ids"])): r["ref_rejected_logps"] for r in table}
            for table in rows]  # fmt: skip
    assert keys[0].keys() <= keys[1].keys()
    assert all(abs(keys[0][key] - keys[1][key]) > 1e-3 for key in keys[0])
    assert not keys[0].keys() <= keys[2].keys()  # one round back, not two
    for logs in first_steps(pair_recorder):
        assert logs["loss"] == pytest.approx(LN_2, abs=1e-5)


def test_each_round_has_a_new_optimizer_and_schedule_and_the_same_data(
    build_spin, pair_recorder
) -> None:
    """SP-15."""
    keep = KeepState()
    trainer = build_spin(callbacks=[pair_recorder, keep], warmup_steps=2)
    trainer.train()
    assert keep.optimizer_states == [0, 0, 0]
    rates = [[logs["learning_rate"] for logs in pair_recorder.steps[t]] for t in range(3)]
    assert rates[0] == rates[1] == rates[2]
    chosen = [{(r["prompt_id"], tuple(r["chosen_ids"])) for r in rows_of(trainer, t)}
              for t in range(3)]  # fmt: skip
    assert all(trainer.chosen[i].chosen_ids == ids for rows in chosen for i, ids in rows)


def test_a_round_has_its_own_beta_and_learning_rate(build_spin, pair_recorder) -> None:
    trainer = build_spin(callbacks=[pair_recorder], round_betas=[0.1, 0.5, 2.0],
                         round_learning_rates=[1e-2, 1e-3, 1e-4], lr_scheduler_type="constant")  # fmt: skip
    seen = []
    trainer.add_callback(type("Betas", (TrainerCallback,), {
        "on_train_begin": lambda self, *args, **kwargs: seen.append(trainer.beta)})())  # fmt: skip
    trainer.train()
    assert seen == [0.1, 0.5, 2.0]
    assert [s[0]["learning_rate"] for s in pair_recorder.steps.values()] == [1e-2, 1e-3, 1e-4]
