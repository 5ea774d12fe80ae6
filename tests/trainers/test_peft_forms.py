"""Every PEFT form over two rounds of SPIN, IRPO and STaR: right in all respects, or refused at the start."""

import math
import random
from functools import partial

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft_forms import FORMS
from tiny_rewards import digit_share
from transformers import TrainerCallback

from trl_selfplay.generation.sampler import SampleRequest, build_sampling_options
from trl_selfplay.rounds.weights import trainable_parameters

LN_2 = math.log(2.0)
PROMPTS = ((13, 4, 13, 5, 14, 15), (13, 7, 13, 15), (13, 9))
VIRTUAL = "adds virtual tokens"
BASE = "changes the base model's weights"
STATE = "keeps a state beside its weights"
# What the trainers, TRL or PEFT refuse at construction, by what the error says.
REFUSED = {
    "lora on lm_head": "Applying a PEFT adapter to `lm_head` is not supported",
    "lora token indices of both": "`trainable_token_indices` reaches the head",
    **dict.fromkeys((f"lora {i}" for i in ("pissa", "pissa_niter", "olora", "eva", "corda",
                                           "loftq", "lora_ga")), BASE),
    "lora alora": "is an activated LoRA",
    "lora kasa": "takes singular values out of the base weights",
    "lora arrow": "routes between adapters that have been trained",
    "lily": "weighs its experts by the mean over all tokens of a batch",
    "lora velora": STATE,
    "lora monteclora": STATE,
    "adamss": "scikit-learn is required",  # PEFT's own word, where it isn't installed
    "adaption_prompt": "puts a prompt into attention",
    **dict.fromkeys(("cartridge", "cpt", "multitask prompt tuning", "p_tuning", "prefix_tuning",
                     "prompt_tuning"), VIRTUAL),
    "poly": "needs the ids of tasks",
    "shadow": "carries a state of its own",
    "xlora": "runs each forward twice",
}  # fmt: skip
# Likewise where the model comes with the adapter: TRL's DPOTrainer makes a copy beside it.
NOT_COPIED = dict.fromkeys(
    ("lora bias all", "lora bias lora_only", "lora layer_replication", "adalora"), "adds a copy"
)
# For want of another adapter, of a package, of data or of a GPU.
NOT_MADE = {"adamss", "lora arrow", "lora corda", "lora loftq", "xlora"}
REFUSED_BY_SPIN = REFUSED | {"pvera": "gives other logits for the same tokens"}


class Interrupt(TrainerCallback):
    """Stops the run after the first step of its second round."""

    def on_round_begin(self, args, state, control, round_index, **kwargs):
        self.round_index = round_index

    def on_step_end(self, args, state, control, **kwargs):
        if self.round_index == 1:
            raise KeyboardInterrupt


def state_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_state(one, two) -> None:
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


class KeepStates(TrainerCallback):
    """Keeps all weights and buffers as each round's training begins."""

    def __init__(self) -> None:
        self.begun = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.begun.append(state_of(model))


@torch.no_grad()
def shake(model) -> None:
    """Move every trainable weight, so that an adapter that does little yet does something."""
    generator = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(model).values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def assert_rows_do_not_meet(model) -> None:
    """A row's logits are the same alone, in a batch, and whatever follows it."""
    ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    together, alone = model.eval()(input_ids=ids).logits[0], model(input_ids=ids[:1]).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    begun = model(input_ids=ids[:1, :4]).logits[0]
    torch.testing.assert_close(begun, alone[:4], rtol=1e-4, atol=1e-4)


def assert_sampled_as_generated(trainer) -> None:
    options = build_sampling_options(
        trainer.args, trainer.self_play.eos_token_ids, temperature=0.0, max_completion_length=8
    )
    requests = [SampleRequest(prompt, b"") for prompt in PROMPTS]
    sampler = trainer.self_play.collector.sampler
    sampled = dict(sampler.sample(requests, options, 5))
    model = trainer.model.eval()
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        generated = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                                   do_sample=False, max_new_tokens=8)  # fmt: skip
        assert sampled[i].completion_ids == tuple(generated[0, len(prompt) :].tolist())


def check_form(build, tiny_model, tokenizer, form, recorder=None) -> None:
    """Run two rounds with a form of PEFT and look at everything that may go wrong."""

    def base():
        return tiny_model(tokenizer, initializer_range=0.1)

    settings = {"num_rounds": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 1,
                "max_completion_length": 12}  # fmt: skip
    model, keep = base(), KeepStates()
    untrained = {id(p): (name, p.detach().clone()) for name, p in model.named_parameters()}
    callbacks = [keep] if recorder is None else [keep, recorder]
    whole = build("whole", model=model, peft_config=FORMS[form](), callbacks=callbacks, **settings)
    initial = state_of(whole.model)
    whole.train()

    if recorder is not None:  # SPIN, and IRPO, whose loss has one more term
        for steps in recorder.steps.values():
            assert steps[0]["loss"] - steps[0].get("nll", 0.0) == pytest.approx(LN_2, abs=1e-6)
            assert steps[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    else:  # STaR, from the base
        for begun in keep.begun:
            assert_same_state(begun, initial)
    moved = state_of(whole.model)
    assert any(not torch.equal(moved[name], initial[name]) for name in initial)
    present = {id(p): p for p in whole.model.parameters()}
    for identity, (name, before) in untrained.items():
        assert identity in present, name
        if not present[identity].requires_grad:
            assert torch.equal(present[identity], before), name

    loaded = PeftModel.from_pretrained(base(), whole.run.folder(1) / "model").eval()
    ids = torch.tensor([PROMPTS[0]])
    torch.testing.assert_close(loaded(input_ids=ids).logits,
                               whole.model.eval()(input_ids=ids).logits)  # fmt: skip

    parts = build("parts", model=base(), peft_config=FORMS[form](), callbacks=[Interrupt()],
                  **settings)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        parts.train()
    resumed = build("parts", model=base(), peft_config=FORMS[form](), **settings)
    resumed.train(resume_from_checkpoint=True)
    weights = trainable_parameters(whole.model)
    for name, parameter in trainable_parameters(resumed.model).items():
        assert torch.equal(parameter, weights[name]), name

    shake(whole.model)
    assert_rows_do_not_meet(whole.model)
    assert_sampled_as_generated(whole)


def run_form(build, tiny_model, tokenizer, form, recorder=None) -> None:
    reason = (REFUSED if recorder is None else REFUSED_BY_SPIN).get(form)
    if reason is None:
        check_form(build, tiny_model, tokenizer, form, recorder)
        return
    with pytest.raises((ValueError, ImportError), match=reason):
        build(model=tiny_model(tokenizer), peft_config=FORMS[form]())


def draw_forms(share, seed):
    """Mark all forms as full, but for a seeded share of them."""
    drawn = random.Random(seed).sample(sorted(FORMS), round(len(FORMS) * share))
    return [f if f in drawn else pytest.param(f, marks=pytest.mark.full) for f in FORMS]


@pytest.mark.parametrize("form", draw_forms(0.05, seed=1))
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of forms that are rarely used
def test_spin_is_right_with_every_form_of_peft_or_refuses_it(
    build_spin, tiny_model, word_tokenizer, pair_recorder, form
) -> None:
    run_form(build_spin, tiny_model, word_tokenizer, form, pair_recorder)


@pytest.mark.parametrize("form", draw_forms(0.02, seed=4))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_irpo_is_right_with_every_form_of_peft_or_refuses_it(
    build_irpo, tiny_model, word_tokenizer, pair_recorder, form
) -> None:
    # A reward that about half of the short completions meet, so that every round has pairs.
    build = partial(build_irpo, reward_funcs=digit_share, reward_threshold=0.2)
    run_form(build, tiny_model, word_tokenizer, form, pair_recorder)


@pytest.mark.parametrize("form", draw_forms(0.05, seed=2))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_star_is_right_with_every_form_of_peft_or_refuses_it(
    build_star, tiny_model, word_tokenizer, form
) -> None:
    run_form(build_star, tiny_model, word_tokenizer, form)


@pytest.mark.parametrize("form", draw_forms(0.03, seed=3))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_spin_goes_on_from_a_model_with_any_form_of_adapter(
    build_spin, tiny_model, word_tokenizer, pair_recorder, form
) -> None:
    """The parent's copy of the adapter leaves no trace, and the opponent is the adapted model."""
    try:
        model = get_peft_model(tiny_model(word_tokenizer, initializer_range=0.1), FORMS[form]())
    except Exception as error:
        if form not in NOT_MADE:
            raise
        pytest.skip(f"PEFT makes no model with it here: {error}")
    shake(model)
    initial = state_of(model)
    reason = (REFUSED_BY_SPIN | NOT_COPIED).get(form)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            build_spin(model=model)
        return
    trainer = build_spin(model=model, num_rounds=1, max_steps=1, max_completion_length=24,
                         callbacks=[pair_recorder])  # fmt: skip
    assert_same_state(state_of(trainer.model), initial)
    assert list(trainer.model.peft_config) == ["default"]
    trainer.train()
    assert pair_recorder.steps[0][0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    saved = PeftModel.from_pretrained(
        tiny_model(word_tokenizer, initializer_range=0.1), trainer.run.folder(0) / "model"
    )
    weights = trainable_parameters(trainer.model)
    for name, parameter in saved.named_parameters():
        assert name not in weights or torch.equal(parameter, weights[name]), name


def adapted_model(tiny_model, tokenizer, adapters):
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(tokenizer), FORMS["lora"](), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, FORMS["lora"]())
    model.set_adapter(adapters[-1])
    return model


@pytest.mark.parametrize(
    "adapters", [("mine",), pytest.param(("first", "second"), marks=pytest.mark.slow)]
)
def test_adapters_of_other_names_are_trained_and_resumed(
    build_star, tiny_model, word_tokenizer, adapters
) -> None:
    settings = {"num_rounds": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    whole = build_star("whole", model=adapted_model(tiny_model, word_tokenizer, adapters),
                       **settings)  # fmt: skip
    whole.train()
    parts = build_star("parts", model=adapted_model(tiny_model, word_tokenizer, adapters),
                       callbacks=[Interrupt()], **settings)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        parts.train()
    resumed = build_star("parts", model=adapted_model(tiny_model, word_tokenizer, adapters),
                         **settings)  # fmt: skip
    resumed.train(resume_from_checkpoint=True)
    weights = trainable_parameters(whole.model)
    assert all(f".{adapters[-1]}." in name for name in weights)
    for name, parameter in trainable_parameters(resumed.model).items():
        assert torch.equal(parameter, weights[name]), name


def test_tied_heads_of_which_tokens_train_are_refused(
    build_star, tiny_model, word_tokenizer
) -> None:
    """TRL's log-probs would leave the trained tokens out."""
    model = tiny_model(word_tokenizer, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="`trainable_token_indices` reaches the head"):
        build_star(model=model, peft_config=FORMS["lora token indices"]())
