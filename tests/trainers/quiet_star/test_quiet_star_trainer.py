import copy
import re
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from naive_thoughts import naive_scores
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import Starcoder2Config, Starcoder2ForCausalLM
from trl import SFTConfig, SFTTrainer

from trl_selfplay import QuietSTaRConfig, QuietSTaRTrainer
from trl_selfplay.trainers.quiet_star.construction import refuse_replicas
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


def random_rows(count=16, length=12, seed=0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 20, (length,), generator=generator).tolist() for _ in range(count)]
    return Dataset.from_dict({"input_ids": rows})


SETTINGS = {
    "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "max_steps": 3,
    "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, "weight_decay": 0.0,
    "per_device_train_batch_size": 4, "gradient_checkpointing": False,
}  # fmt: skip
THOUGHTS = {"thought_length": 3, "num_ahead_tokens": 2}


def wake(trainer, seed=3) -> None:
    generator = torch.Generator().manual_seed(seed)
    last = getattr(trainer.causal_lm, ATTRIBUTE).head[-1].weight
    with torch.no_grad():
        last.copy_(torch.randn(last.shape, generator=generator))


@pytest.fixture
def quiet_trainer(tmp_path, tiny_model, word_tokenizer):
    """Build a trainer on a tiny Llama: `quiet_trainer(lora=False, awake=False, **config)`."""

    def build(*, lora=False, awake=False, rows=None, eval_rows=None, model=None, **changes):
        args = QuietSTaRConfig(str(tmp_path / "run"), **{**SETTINGS, **THOUGHTS, **changes})
        trainer = QuietSTaRTrainer(
            tiny_model(word_tokenizer) if model is None else model,
            args,
            train_dataset=random_rows() if rows is None else rows,
            eval_dataset=eval_rows,
            processing_class=word_tokenizer,
            peft_config=LoraConfig(**LORA) if lora else None,
        )
        if awake:
            wake(trainer)
        return trainer

    return build


def batch_of(trainer, count=4):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(count)])


def weights_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def step_gradients(trainer, batch):
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._batch_index["train"] = 0
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), grads


def assert_equal_gradients(one, two, tolerance=1e-6) -> None:
    assert set(one) == set(two)
    for name in one:
        size = two[name].abs().max().clamp(min=1.0)
        torch.testing.assert_close(one[name] / size, two[name] / size, atol=tolerance, rtol=0)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_trains_everything_that_should_train(quiet_trainer, lora, checkpointing) -> None:
    """QS-13 and QS-14: adapters, every head layer and both vectors move; a LoRA base doesn't."""
    trainer = quiet_trainer(lora=lora, awake=True, gradient_checkpointing=checkpointing)
    before, frozen = weights_of(trainer.model), {}
    for name, parameter in trainer.model.named_parameters():
        if not parameter.requires_grad:
            frozen[name] = parameter.detach().clone()
    assert any(ATTRIBUTE in name for name in before)
    assert bool(frozen) == lora
    if lora:
        assert all("lora_" in n or f"{ATTRIBUTE}.modules_to_save" in n for n in before)
    trainer.train()
    after = weights_of(trainer.model)
    for name, weight in before.items():
        assert not torch.equal(weight, after[name]), name
    vectors = [n for n in before if n.endswith("vectors")]
    assert len(vectors) == 1
    moved = (before[vectors[0]] != after[vectors[0]]).any(1)
    assert moved.tolist() == [True, True]
    for name, weight in frozen.items():
        assert torch.equal(weight, trainer.model.get_parameter(name)), name
    in_optimizer = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(trainer.model.get_parameter(n)) for n in before}


def test_without_thoughts_it_is_sft_exactly(quiet_trainer, tmp_path, tiny_model, word_tokenizer):
    """`num_thoughts=0`: the same losses and weights, bit for bit, and no module."""
    ours = quiet_trainer(num_thoughts=0)
    theirs = SFTTrainer(
        tiny_model(word_tokenizer),
        SFTConfig(str(tmp_path / "sft"), **SETTINGS),
        train_dataset=random_rows(),
        processing_class=word_tokenizer,
    )
    for trainer in (ours, theirs):
        trainer.train()
    assert not hasattr(ours.model, ATTRIBUTE)
    losses = [[h["loss"] for h in t.state.log_history if "loss" in h] for t in (ours, theirs)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    for name, parameter in theirs.model.named_parameters():
        assert torch.equal(parameter, ours.model.get_parameter(name))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("ahead", [1, 3])
def test_with_a_fresh_head_the_loss_is_that_of_plain_text(quiet_trainer, alpha, ahead) -> None:
    """QS-1: on the tokens that count, weighted as documented."""
    trainer = quiet_trainer(base_loss_weight=alpha, num_ahead_tokens=ahead, reinforce_weight=0.0)
    batch = batch_of(trainer)
    loss, _ = step_gradients(trainer, dict(batch))
    with torch.no_grad():
        log_probs = trainer.model(batch["input_ids"]).logits.log_softmax(-1)[:, :-1]
    nll = -log_probs.gather(-1, batch["labels"][:, 1:, None]).squeeze(-1)  # (B, 11)
    talks = torch.stack([nll[:, t : 11 - ahead + 1 + t].mean() for t in range(ahead)])
    expected = alpha * nll.mean() + (1 - alpha) * talks.mean()
    assert loss == pytest.approx(expected.item(), abs=1e-5)


def test_dropout_outside_of_modules_leaves_the_loss_what_it_is(quiet_trainer) -> None:
    """QS-1 on a model whose layers drop out by functions, in train mode."""
    sizes = {"vocab_size": 21, "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}  # fmt: skip
    torch.manual_seed(0)
    noisy = {"residual_dropout": 0.3, "embedding_dropout": 0.3, "attention_dropout": 0.3}
    model = Starcoder2ForCausalLM(Starcoder2Config(**sizes, **noisy)).float()
    trainer = quiet_trainer(model=model, reinforce_weight=0.0, num_ahead_tokens=1)
    batch = batch_of(trainer)
    loss, _ = step_gradients(trainer, dict(batch))
    with torch.no_grad():
        log_probs = trainer.model.eval()(batch["input_ids"]).logits.log_softmax(-1)[:, :-1]
    nll = -log_probs.gather(-1, batch["labels"][:, 1:, None]).squeeze(-1)
    assert loss == pytest.approx(nll.mean().item(), abs=1e-5)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss_and_no_gradient(quiet_trainer, side, lora) -> None:
    """QS-16."""
    trainer = quiet_trainer(awake=True, lora=lora)
    plain = batch_of(trainer)
    pad = (5, 0) if side == "left" else (0, 5)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    padded = {k: torch.nn.functional.pad(plain[k], pad, value=v) for k, v in fill.items()}
    loss, grads = step_gradients(trainer, plain)
    other_loss, other_grads = step_gradients(trainer, padded)
    assert other_loss == pytest.approx(loss, abs=1e-5)
    assert_equal_gradients(other_grads, grads, 1e-5)


def test_rows_of_different_lengths_equal_each_alone(quiet_trainer) -> None:
    """QS-16: a batch is the token-weighted sum of its rows with their thoughts."""
    rows = [[3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15]]
    trainer = quiet_trainer(awake=True, rows=Dataset.from_dict({"input_ids": rows}))
    both = batch_of(trainer, 2)
    trainer._count_step([both], torch.device("cpu"))
    assert trainer._step_counts.tolist() == [7 + 4, 6 + 3]
    num_tokens = torch.tensor(7 + 4)
    trainer.model.train()
    together = trainer.compute_loss(trainer.model, both, num_items_in_batch=num_tokens).item()
    alone = 0.0
    for i, row in enumerate(rows):
        batch = trainer.data_collator([trainer.train_dataset[i]])
        assert batch["input_ids"].shape == (1, len(row))
        trainer.args.per_device_train_batch_size = 1
        trainer._batch_index["train"] = i
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=num_tokens)
        alone += loss.item()
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_accumulated_batches_equal_one_batch(quiet_trainer, fraction) -> None:
    """QS-18: 4 × 1 against 1 × 4 over three steps, thoughts and columns included."""
    losses, weights = [], []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = quiet_trainer(
            awake=True, thought_fraction=fraction, optim="sgd", learning_rate=0.1,
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        losses.append([h["loss"] for h in trainer.state.log_history if "loss" in h])
        weights.append(weights_of(trainer.model))
    for other in (1, 2):
        assert losses[other] == pytest.approx(losses[0], abs=1e-5)
        for name, weight in weights[0].items():
            torch.testing.assert_close(weights[other][name], weight, atol=2e-6, rtol=1e-5)


def test_recomputed_activations_change_nothing(quiet_trainer) -> None:
    """QS-19: losses and gradient norms of a run; attention knows its layout in the backward pass."""
    runs = []
    for checkpointing in (False, True):
        trainer = quiet_trainer(awake=True, gradient_checkpointing=checkpointing)
        trainer.train()
        logs = [h for h in trainer.state.log_history if "loss" in h]
        runs.append([(h["loss"], h["grad_norm"]) for h in logs])
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]), atol=1e-6, rtol=1e-6)


def test_a_backward_pass_outside_a_training_step_fails_rather_than_recompute_wrongly(
    quiet_trainer,
) -> None:
    """QS-19: recomputation without the layout would see every token."""
    trainer = quiet_trainer(gradient_checkpointing=True)
    trainer.model.train()
    trainer.model.gradient_checkpointing_enable()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    with pytest.raises(RuntimeError):
        loss.backward()


def test_a_plain_forward_is_the_same_before_and_after(quiet_trainer, tiny_model, word_tokenizer):
    """QS-21: attention, mode, config and logits, with weights that don't move."""
    model = tiny_model(word_tokenizer)
    ids = torch.arange(3, 15)[None]
    config = copy.deepcopy(model.config.to_dict())
    with torch.no_grad():
        logits = model(ids).logits
    trainer = quiet_trainer(model=model, learning_rate=0.0, eval_rows=random_rows(4, seed=1))
    trainer.train()
    trainer.evaluate()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)
        text = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert text.shape == (1, 15)
    assert model.config._attn_implementation == "sdpa"
    after = model.config.to_dict()
    assert {k: v for k, v in after.items() if k != "use_cache"} == {
        k: v for k, v in config.items() if k != "use_cache"
    }


def test_evaluation_repeats_itself_and_thinks_in_eval_mode(quiet_trainer) -> None:
    trainer = quiet_trainer(awake=True, eval_rows=random_rows(6, seed=1))
    first, second = trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]
    assert first == second
    trainer.args.seed = 1
    assert trainer.evaluate()["eval_loss"] != first  # other thoughts


def test_a_step_without_room_for_thoughts_is_plain_text(quiet_trainer) -> None:
    """Rows of two tokens have no column with two tokens after it."""
    rows = concatenate_datasets([random_rows(4, length=2), random_rows(4)])
    trainer = quiet_trainer(awake=True, rows=rows)
    loss, grads = step_gradients(trainer, batch_of(trainer))
    batch = batch_of(trainer)
    with torch.no_grad():
        log_probs = trainer.model(batch["input_ids"]).logits.log_softmax(-1)
    nll = -log_probs[:, 0].gather(-1, batch["input_ids"][:, 1:]).mean()
    assert loss == pytest.approx(0.5 * nll.item(), abs=1e-5)
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert any(ATTRIBUTE in n for n in grads)  # as data parallelism needs it


@pytest.mark.parametrize(
    ("baseline", "temperature"),
    [("mean", 0.7), ("leave_one_out", 1.0), ("base", 1.3)],
)
def test_loss_and_gradients_are_those_of_one_thought_at_a_time(
    quiet_trainer, baseline, temperature
) -> None:
    """QS-7, QS-8, QS-10: equations 6 to 8 by hand, of rows with and without labels."""
    alpha, weight, ahead, count = 0.3, 2.0, 2, 3
    rows = Dataset.from_dict(
        {
            "input_ids": [[3, 9, 5, 6, 17, 8, 4], [4, 5, 11, 7, 3]],
            "labels": [[-100, -100, -100, 6, 17, 8, 4], [4, 5, 11, 7, 3]],
        }
    )
    trainer = quiet_trainer(
        awake=True, rows=rows, num_thoughts=count, base_loss_weight=alpha, reinforce_weight=weight,
        reinforce_baseline=baseline, thought_temperature=temperature,
    )  # fmt: skip
    batch = batch_of(trainer, 2)
    loss, grads = step_gradients(trainer, batch)
    trainer._batch_index["train"] = 0
    thinking, thoughts = trainer.think(batch)
    assert thinking.columns.tolist() == [[2, 3, 4], [0, 1, 2]]

    model, base, talk, policy = trainer.causal_lm, [], [], []
    for b, row in enumerate(rows):
        ids = torch.tensor(row["input_ids"])
        log_probs = model(ids[None]).logits[0].log_softmax(-1)
        labels = row["labels"]
        base += [-log_probs[j - 1, ids[j]] for j in range(1, len(ids)) if labels[j] != -100]
        for u, column in enumerate(thinking.columns[b].tolist()):
            scores = [
                naive_scores(
                    model, ids, column, thoughts.tokens[b, u * count + k], ahead, temperature
                )
                for k in range(count)
            ]
            rewards = torch.stack([s.talk.sum() for s in scores]).detach()
            plain = sum(log_probs[column + t, ids[column + 1 + t]] for t in range(ahead)).detach()
            compared = {
                "mean": (rewards - rewards.mean()).clamp(min=0),
                "leave_one_out": rewards - (rewards.sum() - rewards) / (count - 1),
                "base": (rewards - plain).clamp(min=0),
            }[baseline]
            talk += [-s.talk.mean() for s in scores]
            policy += [-a * s.thought.sum() for a, s in zip(compared, scores, strict=True)]
    expected = (
        alpha * torch.stack(base).mean()
        + (1 - alpha) * torch.stack(talk).mean()
        + weight * torch.stack(policy).mean()
    )
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    trainer.model.zero_grad()
    expected.backward()
    naive = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    assert_equal_gradients(grads, naive, tolerance=2e-6)


@pytest.mark.parametrize("length", [2, 3])
def test_rows_without_room_for_a_thought_are_refused(quiet_trainer, length) -> None:
    """Before the first step: four tokens ahead, and at most `length` with a label."""
    rows = Dataset.from_dict(
        {
            "input_ids": [[3, 4, 5, 6, 7, 8]] * 3,
            "labels": [[-100] * (6 - length) + [7] * length] * 3,
        }
    )
    advice = (
        f"no row has more than {length}. Set num_ahead_tokens={length} or less, raise max_length"
    )
    with pytest.raises(ValueError, match=re.escape(advice)):
        quiet_trainer(rows=rows, num_ahead_tokens=4)


def test_one_process_with_several_gpus_is_refused() -> None:
    with pytest.raises(ValueError, match="one process sees 2 GPUs"):
        refuse_replicas(SimpleNamespace(n_gpu=2, parallelism_config=None))
    refuse_replicas(SimpleNamespace(n_gpu=1, parallelism_config=None))


def test_texts_that_are_split_over_processes_are_refused() -> None:
    config = SimpleNamespace(cp_size=2, sp_size=1)
    with pytest.raises(ValueError, match="parallelism_config has cp_size=2"):
        refuse_replicas(SimpleNamespace(n_gpu=1, parallelism_config=config))


def test_only_a_checkpoint_keeps_the_thoughts_in_its_model_file(quiet_trainer, tmp_path) -> None:
    trainer = quiet_trainer()
    for name, keeps in (("checkpoint-3", True), ("checkpoints", False)):
        trainer.save_model(str(tmp_path / name))
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            assert any(ATTRIBUTE in key for key in file.keys()) is keeps  # noqa: SIM118


def test_tied_embeddings_and_own_thought_tokens_work(tiny_model, word_tokenizer, quiet_trainer):
    word_tokenizer.add_tokens(["<|startthought|>", "<|endthought|>"])
    model = tiny_model(word_tokenizer, tie_word_embeddings=True)
    trainer = quiet_trainer(model=model, awake=True)
    _, thoughts = trainer.think(batch_of(trainer))
    assert thoughts.tokens.max() < 21
    trainer.train()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_completion_only_rows_think_where_the_completion_begins(quiet_trainer) -> None:
    rows = Dataset.from_dict(
        {"input_ids": [[3, 4, 5, 6, 7, 8]], "labels": [[-100, -100, -100, 6, 7, 8]]}
    )
    trainer = quiet_trainer(rows=rows)
    thinking, _ = trainer.think(batch_of(trainer, 1))
    assert thinking.columns.tolist() == [[2, 3]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rows": random_rows(2, 510)}, ValueError, "Set max_length to at most 506"),
        ({"eval_rows": random_rows(2, 510)}, ValueError, "reaches position"),
    ],
)
def test_texts_too_long_for_their_thoughts_are_refused(
    quiet_trainer, changes, error, message
) -> None:
    """512 positions; the thought of 3 + 2 and one true token need 6."""
    with pytest.raises(error, match=message):
        quiet_trainer(max_length=None, **changes)


def test_arguments_that_cannot_work_are_refused(
    tmp_path, tiny_model, word_tokenizer, quiet_trainer
) -> None:
    """QS-23: at construction, with the reason."""
    model = tiny_model(word_tokenizer)
    args = QuietSTaRConfig(str(tmp_path), **SETTINGS)
    common = {"train_dataset": random_rows(), "processing_class": word_tokenizer}
    with pytest.raises(TypeError, match="args is of type SFTConfig"):
        QuietSTaRTrainer(model, SFTConfig(str(tmp_path), **SETTINGS), **common)
    with pytest.raises(ValueError, match="compute_metrics"):
        QuietSTaRTrainer(model, args, compute_metrics=print, **common)
    adapted = get_peft_model(tiny_model(word_tokenizer), LoraConfig(**LORA))
    assert isinstance(adapted, PeftModel)
    with pytest.raises(ValueError, match="the model has adapters already"):
        QuietSTaRTrainer(adapted, args, **common)
    model.config._attn_implementation = "paged|eager"
    with pytest.raises(ValueError, match=r"attn_implementation='paged\|eager'"):
        quiet_trainer(model=model)


def test_a_model_is_loaded_by_name_with_its_arguments(saved_tiny_model, tmp_path) -> None:
    args = QuietSTaRConfig(
        str(tmp_path / "run"), model_init_kwargs={"attn_implementation": "eager"}, **SETTINGS
    )
    trainer = QuietSTaRTrainer(str(saved_tiny_model), args, train_dataset=random_rows())
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.model.dtype == torch.float32
    assert hasattr(trainer.model, ATTRIBUTE)
    trainer.train()


@pytest.mark.slow
def test_a_4_bit_base_trains_its_head_and_vectors(tiny_model, word_tokenizer, tmp_path) -> None:
    """QS-13 with nf4 weights on a CPU."""
    from transformers import BitsAndBytesConfig

    folder = tmp_path / "model"
    tiny_model(word_tokenizer, hidden_size=128, intermediate_size=128).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    trainer = QuietSTaRTrainer(
        str(folder),
        QuietSTaRConfig(str(tmp_path / "run"), **SETTINGS, **THOUGHTS),
        train_dataset=random_rows(),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=LoraConfig(**LORA),
    )
    wake(trainer)
    before = weights_of(trainer.model)
    module = [n for n in before if ATTRIBUTE in n]
    assert all(before[n].dtype == torch.float32 for n in module)
    trainer.train()
    for name, weight in weights_of(trainer.model).items():
        assert not torch.equal(weight, before[name]), name


def test_losses_with_and_without_thoughts_are_logged(quiet_trainer, capsys) -> None:
    """The parent's keys too; the loss is the sum of its logged parts."""
    trainer = quiet_trainer(awake=True, eval_rows=random_rows(6, seed=1), reinforce_weight=0.5)
    trainer.train()
    first = trainer.state.log_history[0]
    for name in ("entropy", "mean_token_accuracy", "num_tokens", "thought/helped"):
        assert name in first
    parts = 0.5 * first["thought/base_loss"] + 0.5 * first["thought/talk_loss"]
    assert first["loss"] == pytest.approx(parts + 0.5 * first["thought/policy_loss"], abs=1e-5)
    assert first["thought/policy_loss"] > 0
    assert first["num_tokens"] == 4 * 12
    assert first["thought/weight_min"] < first["thought/weight_p50"] < first["thought/weight_max"]
    scores = trainer.evaluate()
    parts = 0.5 * scores["eval_thought/base_loss"] + 0.5 * scores["eval_thought/talk_loss"]
    assert scores["eval_loss"] == pytest.approx(parts, abs=1e-5)
    printed = capsys.readouterr().out
    assert "thoughts that helped most:" in printed
    assert "nats  …" in printed


def test_the_card_names_a_base_model_in_a_local_folder(quiet_trainer, tmp_path) -> None:
    trainer = quiet_trainer()
    trainer.model.config._name_or_path = str(tmp_path)
    trainer.create_model_card()
    card = (tmp_path / "run" / "README.md").read_text()
    assert (
        f"fine-tuned version of a model in a local folder, {tmp_path.name.replace('_', chr(92) + '_')}."
        in card
    )
    assert str(tmp_path) not in card
