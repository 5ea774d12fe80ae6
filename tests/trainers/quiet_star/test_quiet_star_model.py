import json
import shutil
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from naive_thoughts import logits_of, naive_scores, states_of
from peft import LoraConfig, PeftModel
from processes import call
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MaxLengthCriteria, StoppingCriteriaList

from trl_selfplay import QuietSTaRConfig, QuietSTaRModel, QuietSTaRTrainer
from trl_selfplay.generation.random_streams import gumbel_noise, stream_key, token_words
from trl_selfplay.generation.sampler import SamplingOptions
from trl_selfplay.trainers.quiet_star.decoding import DecodingOptions, generate_with_thoughts
from trl_selfplay.trainers.quiet_star.layout import ThoughtMemory
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE
from trl_selfplay.trainers.quiet_star.storage import ThoughtSettings

SETTINGS = ThoughtSettings(thought_length=3, thought_temperature=0.8, barred=(7,))


def naive_next_logits(model, row, num_thoughts=1, seed=0):
    """Think after the row's last token, one sequence at a time; return logits (V,)."""
    embed, extra = model.get_input_embeddings(), getattr(model, ATTRIBUTE)
    start, end = extra.vectors * extra.scale
    words, rows = token_words(23, "cpu"), []
    for s in range(num_thoughts):
        key = stream_key(seed, 0, "eval", str(len(row) - 1), s)
        sequence = torch.cat([embed(row), start[None]])
        for step in range(SETTINGS.thought_length):
            logits = logits_of(model, states_of(model, sequence)[-1:])
            logits[:, 7] = float("-inf")
            noisy = logits / SETTINGS.thought_temperature + gumbel_noise(words, [key], step)
            sequence = torch.cat([sequence, embed(noisy.argmax(-1))])
        after = states_of(model, torch.cat([sequence, end[None]]))[-1]
        before = states_of(model, embed(row))[-1]
        weight = extra.head(torch.cat([before, after]))
        rows.append(logits_of(model, (1 - weight) * before + weight * after))
    if num_thoughts == 1:
        return rows[0]
    return torch.stack([r.softmax(-1) for r in rows]).mean(0).log()


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma2", "gpt2"])
@pytest.mark.parametrize("num_thoughts", [1, 2])
@torch.no_grad()
def test_logits_are_those_of_thinking_at_every_prefix(family, num_thoughts, family_model, text):
    """And so no column's logits depend on what comes after it."""
    causal_lm = family_model(family)
    model = QuietSTaRModel(causal_lm, SETTINGS)
    output = model(text.ids, labels=text.ids, num_thoughts=num_thoughts)
    for b, row in enumerate(text.ids):
        for column in (0, 1, 6, 11):
            naive = naive_next_logits(causal_lm, row[: column + 1], num_thoughts)
            torch.testing.assert_close(output.logits[b, column], naive, atol=1e-4, rtol=1e-4)
    log_probs = output.logits[:, :-1].log_softmax(-1)
    nll = -log_probs.gather(-1, text.ids[:, 1:, None]).mean()
    torch.testing.assert_close(output.loss, nll)
    assert model.config._attn_implementation == ("eager" if family == "gemma2" else "sdpa")


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt2"])
@torch.no_grad()
def test_generated_text_equals_a_naive_loop(family, family_model, text) -> None:
    """QS-20: thinking before each token, from a cache, alone and in a batch padded on the left."""
    causal_lm = family_model(family)
    model = QuietSTaRModel(causal_lm, SETTINGS)
    rows = [text.ids[0], text.ids[1, :7]]
    expected = []
    for row in rows:
        for _ in range(5):
            logits = naive_next_logits(causal_lm, row)
            logits[7] = float("-inf")
            row = torch.cat([row, logits.argmax(-1, keepdim=True)])
        expected.append(row)
    settings = {"max_new_tokens": 5, "eos_token_id": []}
    for row, whole in zip(rows, expected, strict=True):
        assert torch.equal(model.generate(row[None], **settings)[0], whole)
    pad = torch.nn.functional.pad
    ids = torch.stack([rows[0], pad(rows[1], (5, 0))])
    mask = torch.stack([torch.ones(12), pad(torch.ones(7), (5, 0))]).long()
    together = model.generate(ids, mask, **settings)
    assert torch.equal(together[0], expected[0])
    assert torch.equal(together[1, 5:], expected[1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_that_gives_thoughts_no_weight_generates_plainly(family, family_model, text):
    """QS-20: the tokens of transformers' own generate."""
    causal_lm = family_model(family, awake=False)
    model = QuietSTaRModel(causal_lm, ThoughtSettings(3))
    plain = causal_lm.generate(
        text.ids, attention_mask=text.mask, max_new_tokens=6, do_sample=False
    )
    ours = model.generate(text.ids, text.mask, max_new_tokens=6)
    assert torch.equal(ours, plain)


def test_the_memory_holds_text_and_no_thoughts(family_model, text) -> None:
    """QS-20: prompt and new tokens but the last, which was never fed."""
    memory = ThoughtMemory()
    sampling = SamplingOptions(max_completion_length=4, temperature=0.0)
    generate_with_thoughts(
        family_model(), SETTINGS, DecodingOptions(), sampling, text.ids, text.mask, 0, memory=memory
    )
    assert memory.num_text_tokens == 12 + 3


def test_rows_end_with_eos_or_a_stopping_criterion(family_model, text) -> None:
    model = QuietSTaRModel(family_model(), SETTINGS)
    free = model.generate(text.ids, max_new_tokens=6, eos_token_id=[])
    stop = free[0, 13].item()
    ended = model.generate(text.ids, max_new_tokens=6, eos_token_id=stop, pad_token_id=0)
    first = (free[0, 12:] == stop).nonzero()[0].item()
    assert torch.equal(ended[0, : 13 + first], free[0, : 13 + first])
    assert (ended[0, 13 + first :] == 0).all()
    criteria = StoppingCriteriaList([MaxLengthCriteria(14)])
    assert model.generate(text.ids, max_length=20, stopping_criteria=criteria).shape == (2, 14)


def test_prompts_padded_on_the_right_are_refused(family_model, text) -> None:
    """They would go on from padding."""
    model = QuietSTaRModel(family_model(), SETTINGS)
    mask = torch.ones_like(text.ids)
    mask[1, -2:] = 0
    with pytest.raises(ValueError, match="padding_side='left'"):
        model.generate(text.ids, mask)
    assert model(text.ids, mask).logits.isfinite().all()  # scoring takes either side


@torch.no_grad()
def test_texts_and_their_thoughts_must_fit_the_positions(family_model) -> None:
    """96 positions, thoughts of 3 + 2 tokens."""
    model = QuietSTaRModel(family_model("gpt2"), SETTINGS)
    ids = torch.full((1, 92), 3)
    assert model(ids[:, :91]).logits.shape[1] == 91
    with pytest.raises(ValueError, match="Set max_length to at most 91"):
        model(ids)
    assert model.generate(ids[:, :90], max_new_tokens=2, eos_token_id=[]).shape[1] == 92
    with pytest.raises(ValueError, match="Set max_length to at most 91"):
        model.generate(ids[:, :90], max_new_tokens=3)


@pytest.fixture
def trained(tmp_path, saved_tiny_model):
    """Return a function that trains a tiny model and saves it: `trained("lora")`."""

    def build(kind: str):
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(3, 20, (8,), generator=generator).tolist() for _ in range(8)]
        args = QuietSTaRConfig(
            str(tmp_path / kind), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2,
            per_device_train_batch_size=4, learning_rate=1e-2, thought_length=3,
            num_ahead_tokens=2, save_steps=2, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = QuietSTaRTrainer(
            str(saved_tiny_model),
            args,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            peft_config=LoraConfig(r=4, target_modules="all-linear") if kind == "lora" else None,
        )
        trainer.train()
        with torch.no_grad():
            trainer.causal_lm.quiet_star.head[-1].weight.normal_(generator=generator)
        trainer.save_model()
        model = QuietSTaRModel(trainer.model, ThoughtSettings(3))
        return trainer, model, tmp_path / kind

    return build


IDS = torch.arange(3, 15)[None]


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_was_trained_loads_to_the_same_logits(kind, trained, tmp_path) -> None:
    """QS-15: as the trainer saved it, and as the model saves itself; twice the same."""
    trainer, model, folder = trained(kind)
    expected = model(IDS).logits
    for _ in range(2):
        loaded = QuietSTaRModel.from_pretrained(folder)
        torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-6, rtol=0)
    loaded.save_pretrained(tmp_path / "again")
    again = QuietSTaRModel.from_pretrained(tmp_path / "again")
    torch.testing.assert_close(again(IDS).logits, expected, atol=1e-6, rtol=0)
    module = load_file(folder / "quiet_star.safetensors")
    trained_module = trainer.causal_lm.quiet_star
    torch.testing.assert_close(module["vectors"], trained_module.vectors.detach())
    assert (expected - trainer.causal_lm(IDS).logits).abs().max() > 1e-3  # thoughts have a say


def think_anew(folder, output) -> None:
    """Load a saved model; write its logits, twice, and its text."""
    model = QuietSTaRModel.from_pretrained(folder)
    text = model.generate(IDS, max_new_tokens=4)
    torch.save((model(IDS).logits, model(IDS).logits, text), output)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_new_process_gives_the_same_logits_and_text(kind, trained) -> None:
    """QS-15."""
    _, model, folder = trained(kind)
    assert call(think_anew, str(folder), str(folder / "new.pt")) == 0
    first, second, text = torch.load(folder / "new.pt")
    torch.testing.assert_close(first, model(IDS).logits, atol=1e-6, rtol=0)
    assert torch.equal(first, second)
    assert torch.equal(text, model.generate(IDS, max_new_tokens=4))


def test_the_plain_model_loads_without_this_package(trained, saved_tiny_model) -> None:
    """In an interpreter that can't import it, without a key too many or too few."""
    runs = {kind: trained(kind) for kind in ("lora", "full")}
    folders = {kind: str(folder) for kind, (_, _, folder) in runs.items()}
    script = f"""
import sys
sys.modules["trl_selfplay"] = None
import torch
from transformers import AutoModelForCausalLM
from peft import PeftModel

def load(name):
    model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"], info
    return model

folders = {folders!r}
models = {{
    "lora": PeftModel.from_pretrained(load({str(saved_tiny_model)!r}), folders["lora"]),
    "full": load(folders["full"]),
}}
for kind, model in models.items():
    torch.save(model(torch.arange(3, 15)[None]).logits, folders[kind] + "/plain.pt")
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], check=True)
    for trainer, _, folder in runs.values():
        with torch.no_grad():
            expected = trainer.model.eval()(IDS).logits
        torch.testing.assert_close(torch.load(folder / "plain.pt"), expected, atol=1e-6, rtol=0)


def test_a_checkpoint_loads_as_well(trained) -> None:
    trainer, _, folder = trained("lora")
    loaded = QuietSTaRModel.from_pretrained(folder / "checkpoint-2")
    assert isinstance(loaded.model, PeftModel)
    weight = loaded.causal_lm.quiet_star.vectors
    torch.testing.assert_close(weight.detach(), trainer.causal_lm.quiet_star.vectors.detach())


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_another_base_is_an_error(kind, trained, tiny_model, word_tokenizer, tmp_path) -> None:
    _, _, folder = trained(kind)
    other = tiny_model(word_tokenizer, seed=1)
    with pytest.raises(ValueError, match="weights differ"):
        QuietSTaRModel.from_pretrained(folder, base_model=other)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="load the base it was trained on"):
        QuietSTaRModel.from_pretrained(folder, base_model=tmp_path / "other")


def test_a_base_in_another_precision_is_no_error(trained, saved_tiny_model) -> None:
    _, model, folder = trained("lora")
    half = QuietSTaRModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.causal_lm.quiet_star.vectors.dtype == torch.float32
    torch.testing.assert_close(half(IDS).logits.float(), model(IDS).logits, atol=0.2, rtol=0.1)


def test_nothing_is_made_up_on_load(trained, tmp_path, saved_tiny_model) -> None:
    _, _, folder = trained("lora")
    (folder / "quiet_star.safetensors").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError, match=r"has no quiet_star\.safetensors"):
        QuietSTaRModel.from_pretrained(folder)
    weights = load_file(tmp_path / "away")
    del weights["head.mixing_input.bias"]
    save_file(weights, folder / "quiet_star.safetensors")
    with pytest.raises(RuntimeError, match=r"head\.mixing_input\.bias"):
        QuietSTaRModel.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"has no quiet_star\.json"):
        QuietSTaRModel.from_pretrained(saved_tiny_model)
    settings = json.loads((folder / "quiet_star.json").read_text())
    shutil.copy(tmp_path / "away", folder / "quiet_star.safetensors")
    (folder / "quiet_star.json").write_text(json.dumps({**settings, "format": 99}))
    with pytest.raises(ValueError, match="has format 99"):
        QuietSTaRModel.from_pretrained(folder)


def test_a_model_without_thoughts_is_refused(family_model, saved_tiny_model) -> None:
    plain = AutoModelForCausalLM.from_pretrained(saved_tiny_model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no thought module"):
        QuietSTaRModel(plain, SETTINGS)
    with pytest.raises(ValueError, match="num_thoughts=0"):
        QuietSTaRModel(family_model(), SETTINGS)(IDS, num_thoughts=0)


def test_it_looks_like_a_hugging_face_model(trained, word_tokenizer) -> None:
    """What an evaluation harness asks of a model object: text scored by log-likelihood."""
    _, _, folder = trained("full")
    model = QuietSTaRModel.from_pretrained(folder)
    model.tie_weights()
    assert model.config.vocab_size == len(word_tokenizer)
    assert model.device.type == "cpu"
    assert model.can_generate()
    ids = word_tokenizer("Q 1 + 2 = ? 3", return_tensors="pt")["input_ids"].to(model.device)
    greedy = model(ids).logits[0].argmax(-1)
    assert greedy.shape == (7,)
    assert (
        model.generate(input_ids=ids, max_length=10, do_sample=False, use_cache=True).shape[1] <= 10
    )


def test_training_can_go_on_from_a_loaded_model(trained, word_tokenizer, tmp_path) -> None:
    """With thoughts of another length, as curricula need."""
    _, _, folder = trained("full")
    loaded = QuietSTaRModel.from_pretrained(folder)
    before = loaded.causal_lm.quiet_star.vectors.detach().clone()
    rows = Dataset.from_dict({"input_ids": [list(range(3, 11))] * 4})
    args = QuietSTaRConfig(
        str(tmp_path / "on"), use_cpu=True, report_to=[], max_steps=1, thought_length=2,
        num_ahead_tokens=2, learning_rate=0.0, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = QuietSTaRTrainer(
        loaded.model, args, train_dataset=rows, processing_class=word_tokenizer
    )
    trainer.train()
    assert torch.equal(trainer.causal_lm.quiet_star.vectors, before)


def test_naive_scores_and_logits_agree(family_model, text) -> None:
    """The two references of these tests say the same of one thought of one column."""
    model = family_model()
    with torch.no_grad():
        logits = QuietSTaRModel(model, SETTINGS)(text.ids[:1]).logits
        tokens, row = [], text.ids[0]
        words, key = token_words(23, "cpu"), stream_key(0, 0, "eval", "5", 0)
        embed, extra = model.get_input_embeddings(), getattr(model, ATTRIBUTE)
        sequence = torch.cat([embed(row[:6]), (extra.vectors * extra.scale)[:1]])
        for step in range(3):
            step_logits = logits_of(model, states_of(model, sequence)[-1:]) / 0.8
            step_logits[:, 7] = float("-inf")
            tokens.append((step_logits + gumbel_noise(words, [key], step)).argmax(-1))
            sequence = torch.cat([sequence, embed(tokens[-1])])
        naive = naive_scores(model, row, 5, torch.cat(tokens), 1)
    ours = logits[0, 5].log_softmax(-1)[row[6]]
    torch.testing.assert_close(ours, naive.talk[0], atol=1e-5, rtol=1e-5)
