"""IRPO's invariants, on real runs of a tiny model."""

import json
import math
import shutil

import pytest
import torch
from datasets import Dataset, load_from_disk
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, TrainerCallback
from trl import DPOTrainer

from trl_selfplay import EmptyRoundError, IRPOTrainer
from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rounds.weights import trainable_parameters

LN_2 = math.log(2.0)


def lora(**changes):
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1,
           **changes}
    )  # fmt: skip


def rows_of(trainer, round_index):
    return load_from_disk(str(trainer.run.folder(round_index) / "dataset")).to_list()


def samples_of(trainer, round_index):
    folder = trainer.run.folder(round_index) / "samples"
    return [r for path in sorted(folder.glob("*.parquet")) for r in load_rollouts(path)]


def side_logps(model, row, side):
    """log p of each token of a completion, from the model's plain logits."""
    ids = torch.tensor([[*row["prompt_ids"], *row[side]]])
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    return logps[len(row["prompt_ids"]) - 1 :]


def expected_loss(model, rows, beta, alpha):
    """Equation 1 of the paper, row by row; also its two terms."""
    dpo, nll = [], []
    for row in rows:
        chosen, rejected = (side_logps(model, row, side) for side in ("chosen_ids", "rejected_ids"))
        ratio = (chosen.sum() - row["ref_chosen_logps"]) - (
            rejected.sum() - row["ref_rejected_logps"]
        )
        dpo.append(-torch.log(torch.sigmoid(beta * ratio)))
        nll.append(-chosen.sum() / len(row["chosen_ids"]))
    dpo, nll = torch.stack(dpo).mean(), torch.stack(nll).mean()
    return dpo + alpha * nll, dpo, nll


@pytest.fixture
def build_case(build_irpo, tiny_model, word_tokenizer, tmp_path):
    """Return a function that builds an IRPOTrainer in one of the cases of fine-tuning."""

    def build(case, **changes):
        base = tiny_model(word_tokenizer, hidden_size=64, intermediate_size=128)
        if case == "full":
            return build_irpo(model=base, **changes)
        if case == "lora":
            return build_irpo(model=base, peft_config=lora(), **changes)
        if case == "user":  # whose adapter is no longer at its initial zero
            model = get_peft_model(base, lora())
            generator = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(0, 0.2, generator=generator)
            return build_irpo(model=model, **changes)
        base.save_pretrained(tmp_path / "saved")
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        return build_irpo(model=str(tmp_path / "saved"), quantization_config=quantization,
                          peft_config=lora(), **changes)  # fmt: skip

    return build


def test_the_parent_is_trls(build_irpo) -> None:
    assert issubclass(IRPOTrainer, DPOTrainer)
    trainer = build_irpo()
    assert trainer.ref_model is None
    assert trainer.args.start_from == "previous"


@pytest.mark.parametrize(
    "case", ["full", "lora", "user", pytest.param("nf4", marks=pytest.mark.slow)]
)
def test_the_dpo_term_begins_at_ln_2_in_every_round(build_case, pair_recorder, case) -> None:
    """IR-2, under gradient accumulation."""
    trainer = build_case(case, callbacks=[pair_recorder], gradient_accumulation_steps=2,
                         per_device_train_batch_size=3, nll_coef=0.5)  # fmt: skip
    trainer.train()
    assert sorted(pair_recorder.steps) == [0, 1, 2]
    for steps in pair_recorder.steps.values():
        assert steps[0]["loss"] - 0.5 * steps[0]["nll"] == pytest.approx(LN_2, abs=1e-4)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            assert steps[0][name] == pytest.approx(0.0, abs=1e-5)
        # The rounds do move the policy, or the assertion would hold of any reference.
        assert abs(steps[-1]["rewards/margins"]) > 1e-4


def test_the_loss_is_the_papers_row_by_row(build_irpo) -> None:
    """IR-3: at a batch of rows of unequal lengths, and its gradient."""
    trainer = build_irpo(num_rounds=1, beta=0.3, nll_coef=0.7)
    trainer.train()  # so that the policy isn't its reference any more
    rows = rows_of(trainer, 0)[:5]
    lengths = [len(row["chosen_ids"]) for row in rows]
    assert len(set(lengths)) > 1
    model = trainer.model.eval()
    expected, dpo, nll = expected_loss(model, rows, beta=0.3, alpha=0.7)
    assert abs(float(dpo.detach()) - LN_2) > 1e-3
    model.zero_grad()
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    loss = trainer.compute_loss(model, trainer.data_collator(rows))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-3)
    # TRL's "sft" loss counts tokens alike, so long rows count more.
    by_token = -sum(side_logps(model, row, "chosen_ids").sum() for row in rows) / sum(lengths)
    assert abs(float((by_token - nll).detach())) > 1e-3


def test_the_likelihood_is_per_token_that_the_policy_wrote(build_irpo) -> None:
    """IR-3, of completions with tokens that it only read."""
    trainer = build_irpo(beta=1e-9)
    rows = [
        {"prompt_ids": [5, 6], "chosen_ids": [8, 9, 10, 1], "rejected_ids": [7, 1],
         "chosen_mask": [1, 0, 0, 1], "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0},
        {"prompt_ids": [5], "chosen_ids": [9, 1], "rejected_ids": [7, 8, 1],
         "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0},
    ]  # fmt: skip
    first, second = (side_logps(trainer.model.eval(), row, "chosen_ids") for row in rows)
    expected = (-(first[0] + first[3]) / 2 - second.mean()) / 2
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    assert float((loss - LN_2).detach()) == pytest.approx(float(expected.detach()), abs=1e-5)


def test_predict_gives_the_loss_of_pairs(build_irpo) -> None:
    trainer = build_irpo(num_rounds=1, beta=0.3, nll_coef=0.7)
    trainer.train()
    rows = rows_of(trainer, 0)[:4]
    expected, _, _ = expected_loss(trainer.model.eval(), rows, beta=0.3, alpha=0.7)
    with pytest.warns(FutureWarning, match="return_outputs"):
        metrics = trainer.predict(Dataset.from_list(rows)).metrics
    assert metrics["test_loss"] == pytest.approx(float(expected.detach()), abs=1e-5)


class KeepsBatches(IRPOTrainer):
    """Keeps the rows' tokens of every batch that it is trained on."""

    def training_step(self, model, inputs, *args, **kwargs):
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        self.batches.append([row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)])
        return super().training_step(model, inputs, *args, **kwargs)


def test_accumulated_batches_give_the_step_of_all_their_rows(build_irpo) -> None:
    """IR-3: one step of plain gradient descent over two batches of three rows."""
    trainer = build_irpo(
        num_rounds=1, max_steps=1, per_device_train_batch_size=3, gradient_accumulation_steps=2,
        optim="sgd", learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0,
        weight_decay=0.0,
    )  # fmt: skip
    trainer.__class__, trainer.batches = KeepsBatches, []
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    rows = {(*row["prompt_ids"], *row["chosen_ids"]): [] for row in rows_of(trainer, 0)}
    for row in rows_of(trainer, 0):
        rows[*row["prompt_ids"], *row["chosen_ids"]].append(row)
    used = []
    for batch in trainer.batches[-2:]:  # before them a step on the placeholder is tried
        half = len(batch) // 2
        for chosen, rejected in zip(batch[:half], batch[half:], strict=True):
            used.append(next(row for row in rows[tuple(chosen)]
                             if [*row["prompt_ids"], *row["rejected_ids"]] == rejected))  # fmt: skip
    assert len(used) == 6
    after = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        parameter.data.copy_(before[name])
    trainer.model.zero_grad()
    expected_loss(trainer.model.eval(), used, beta=0.1, alpha=1.0)[0].backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(
            after[name], before[name] - 0.1 * parameter.grad, atol=1e-6, rtol=1e-4
        )


def test_pairs_are_the_sampled_tokens_and_none_is_cut(build_irpo) -> None:
    """IR-1 and IR-4, on a run whose samples are often cut."""
    trainer = build_irpo(num_rounds=1, max_completion_length=12, num_generations=16)
    played = trainer.play_round(0)
    samples = {(r.prompt_id, r.completion_ids): r for r in samples_of(trainer, 0)}
    assert any(r.is_truncated for r in samples.values())
    per_prompt = {}
    for row in played.training_rows:
        chosen, rejected = (
            samples[row["prompt_id"], tuple(row[side])] for side in ("chosen_ids", "rejected_ids")
        )
        assert tuple(row["prompt_ids"]) == chosen.prompt_ids == rejected.prompt_ids
        assert (chosen.reward, rejected.reward) == (1.0, 0.0)
        assert chosen.finish == rejected.finish == "eos"
        per_prompt[row["prompt_id"]] = per_prompt.get(row["prompt_id"], 0) + 1
    assert 0 < max(per_prompt.values()) <= 2
    assert played.num_examples == len(played.training_rows) == played.metrics["select/examples"]


def test_pairs_do_not_depend_on_the_size_of_a_batch(build_irpo) -> None:
    """IR-1."""
    pairs = []
    for size in (3, 40):
        trainer = build_irpo(f"size-{size}", num_rounds=1)
        sampler = trainer.self_play.collector.sampler
        sampler.suggest_batch_size = lambda longest_prompt, max_completion_length, n=size: n
        rows = trainer.play_round(0).training_rows
        pairs.append(rows.remove_columns(["ref_chosen_logps", "ref_rejected_logps"]).to_list())
    assert pairs[0] == pairs[1]


class Stop(TrainerCallback):
    """Interrupts the run at a step of a round, or as a round's training begins or ends."""

    def __init__(self, round_index, moment) -> None:
        self.at, self.now = (round_index, moment), None

    def on_round_begin(self, args, state, control, round_index, **kwargs):
        self.now = round_index

    def on_train_begin(self, args, state, control, **kwargs):
        self.stop("training begins")

    def on_step_end(self, args, state, control, **kwargs):
        self.stop(f"step {state.global_step}")

    def on_round_end(self, args, state, control, round_index, **kwargs):
        self.stop("round ends")

    def stop(self, moment):
        if (self.now, moment) == self.at:
            raise KeyboardInterrupt


MOMENTS = [(0, "training begins"), (0, "round ends"), (1, "training begins"), (1, "step 1"),
           (1, "step 2")]  # fmt: skip


@pytest.mark.parametrize(
    ("peft", "moments"),
    [
        pytest.param(True, [(1, "step 2")], id="lora"),
        pytest.param(False, MOMENTS, id="full, all", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_resumes_to_the_same_pairs_log_probs_and_weights(
    build_irpo, sums, gold_answers, peft, moments
) -> None:
    """IR-5."""
    settings = {"num_rounds": 2, "save_strategy": "steps", "save_steps": 1,
                "eval_dataset": sums(4, first=50), "load_best_round_at_end": False,
                "gold_dataset": gold_answers(6)}  # fmt: skip

    def build(folder, **changes):
        return build_irpo(folder, **settings, **changes, peft_config=lora() if peft else None)

    whole = build("whole")
    whole.train()
    for round_index, moment in moments:
        with pytest.raises(KeyboardInterrupt):
            build("parts", callbacks=[Stop(round_index, moment)]).train()
        resumed = build("parts")
        resumed.train(resume_from_checkpoint=True)
        for t in range(2):
            assert rows_of(resumed, t) == rows_of(whole, t)
        weights = trainable_parameters(whole.model)
        for name, parameter in trainable_parameters(resumed.model).items():
            assert torch.equal(parameter, weights[name]), name
        shutil.rmtree(resumed.args.output_dir)


def test_prompts_with_one_side_are_counted_and_a_round_of_them_is_empty(build_irpo) -> None:
    """IR-6."""

    def rewarding(value):
        return lambda completions, **kwargs: [value] * len(completions)

    trainer = build_irpo("right", reward_funcs=rewarding(1.0), num_rounds=1)
    with pytest.raises(EmptyRoundError, match="No prompt has both a right and a wrong completion"):
        trainer.train()
    played = build_irpo("again", reward_funcs=rewarding(1.0), num_rounds=1).play_round(0)
    assert played.metrics["select/prompts_without_wrong"] == 12
    assert played.funnel.unhinted.unpaired == played.funnel.correct > 0
    assert (played.num_examples, len(played.training_rows)) == (0, 0)
    trainer = build_irpo("wrong", reward_funcs=rewarding(0.0), num_rounds=1)
    with pytest.raises(EmptyRoundError, match="wrong answer format"):
        trainer.train()


def test_human_completions_are_graded_and_chosen(build_irpo, gold_answers) -> None:
    """Where no sample is right, the right human one is the chosen side; a wrong one is on none."""
    gold = gold_answers(4).to_list()
    gold[3]["completion"] = " 9 9"

    def human_alone(completions, prompts, solution, **kwargs):
        right = {row["completion"].strip() for row in gold[:3]}
        return [float(c.strip() in right) for c in completions]

    trainer = build_irpo(num_rounds=1, reward_funcs=human_alone,
                         gold_dataset=Dataset.from_list(gold))  # fmt: skip
    trainer.train()
    rows = rows_of(trainer, 0)
    human = {r.completion_ids: r for r in trainer.gold.rollouts}
    assert {human[tuple(row["chosen_ids"])].completion.strip() for row in rows} == {
        row["completion"].strip() for row in gold[:3]
    }
    (line,) = trainer.run.lines
    assert (line["funnel"]["gold"], line["funnel"]["kept"]) == (3, 0)
    assert len(rows) == 6


def test_human_completions_are_graded_with_the_solution_that_they_are_for(
    build_irpo, gold_answers, sums
) -> None:
    """Where a prompt has several training rows."""
    (row,) = gold_answers(1).to_list()
    wanted = {" 7": "7", " 8": "8"}
    gold = [{**row, "completion": c, "solution": s} for c, s in wanted.items()]
    rows = [{"prompt": row["prompt"], "solution": s} for s in wanted.values()]
    trainer = build_irpo(
        train_dataset=Dataset.from_list([*rows, *sums(4, first=20).to_list()]),
        gold_dataset=Dataset.from_list(gold),
    )
    graded = trainer.self_play.grade_gold(trainer.gold, trainer.run.root / "gold.parquet")
    assert [rollout.reward for rollout in graded] == [1.0, 1.0]
    assert {r.completion: trainer.gold.rows[r.prompt_id].solution for r in graded} == wanted


def test_gold_of_other_prompts_is_refused(build_irpo, gold_answers, sums) -> None:
    with pytest.raises(ValueError, match="2 prompts that are not in `train_dataset`"):
        build_irpo(gold_dataset=gold_answers(4, first=10))
    with pytest.raises(ValueError, match="gold_dataset"):
        build_irpo(gold_dataset=gold_answers(2, first=50), eval_dataset=sums(4, first=50))


def test_another_gold_dataset_is_another_run(build_irpo, gold_answers) -> None:
    build_irpo(num_rounds=1, gold_dataset=gold_answers(3)).train()
    with pytest.raises(ValueError, match="gold_dataset"):
        build_irpo(num_rounds=2, gold_dataset=gold_answers(2)).train(resume_from_checkpoint=True)


def test_a_round_has_its_own_temperature(build_irpo) -> None:
    settings = {"num_rounds": 2, "max_steps": 1, "learning_rate": 0.0}
    cool, hot = (build_irpo(name, round_temperatures=values, **settings)
                 for name, values in (("cool", [1.0, 0.2]), ("hot", [1.0, 3.0])))  # fmt: skip
    cool.train()
    hot.train()
    first, second = ([samples_of(t, i) for t in (cool, hot)] for i in (0, 1))
    assert first[0] == first[1]
    assert second[0] != second[1]


def test_held_out_prompts_are_graded_and_the_card_names_the_paper(build_irpo, sums) -> None:
    trainer = build_irpo(num_rounds=2, eval_dataset=sums(4, first=50))
    trainer.train()
    log = [json.loads(text) for text in trainer.run.lines_path.read_text().splitlines()]
    assert [line["sampled_from"] for line in log] == ["base", "round 0"]
    assert [line["trained_from"] for line in log] == ["base", "round 0"]
    assert all("eval_accuracy" in line["eval"] for line in log)
    assert "eval_accuracy" in trainer.evaluate(sums(3, first=60))
    card = (trainer.run.root.parent / "README.md").read_text()
    assert "2404.19733" in card
    assert "## Rounds" in card


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"reward_funcs": None}, ValueError, "`reward_funcs` is missing"),
        ({"ref_model": "gpt2"}, ValueError, "the reference is the policy itself"),
        ({"compute_metrics": print}, ValueError, "`compute_metrics` was given"),
        ({"optimizers": (torch.optim.SGD, None)}, ValueError, "`optimizers` was given"),
        ({"few_shot_rounds": 1}, ValueError, "needs `few_shot_examples`"),
        ({"reward_funcs": [print, len]}, ValueError, "2 reward functions with weights of 1.0"),
        ({"rollout_func": print}, TypeError, "IRPOTrainer doesn't take these arguments"),
    ],
)
def test_arguments_that_cannot_work_are_refused(build_irpo, changes, kind, message) -> None:
    with pytest.raises(kind, match=message):
        build_irpo(**changes)


def test_a_single_sample_per_prompt_needs_gold_completions(build_irpo) -> None:
    with pytest.raises(ValueError, match="num_generations=1 without a `gold_dataset`"):
        build_irpo(num_generations=1)


def test_a_name_that_a_single_held_out_set_does_not_have_is_refused(build_irpo, sums) -> None:
    trainer = build_irpo(eval_dataset=sums(4, first=50))
    with pytest.raises(
        ValueError, match="no held-out set 'nope'; eval_dataset has one set without"
    ):
        trainer.evaluate("nope")
