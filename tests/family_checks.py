"""What every family of models must do, or be refused for: be sampled as `generate` does, and train.

In: a tiny model of a family. Out: an outcome, or an error where the family does neither.
"""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from causal_classes import EOS, VOCAB_SIZE, build_tiny
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import trl_selfplay
from trl_selfplay.generation.random_streams import stream_key
from trl_selfplay.generation.sampler import SampleRequest, SamplingOptions
from trl_selfplay.generation.transformers_sampler import TransformersSampler
from trl_selfplay.generation.trial import try_model

TRAINERS = ("STaR", "ReSTEM", "SPIN", "IRPO", "QuietSTaR")
# Many ids end a completion, so that rows leave early and their places are filled again.
EOS_IDS = (EOS, *range(3, VOCAB_SIZE, 16))
_LENGTH = 12


@dataclass(frozen=True)
class Outcome:
    """What became of a family, and the reason or the kind of rows."""

    kind: str
    reason: str = ""


def draw(lengths: Sequence[int], prefix_length: int = 0) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(sum(lengths))

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, VOCAB_SIZE, (count,), generator=generator).tolist())

    prefix = tokens(prefix_length)
    return [prefix + tokens(length) for length in lengths]


def check_sampling(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Outcome:
    """Compare greedy rows, ragged and with a shared prefix, with `generate` one by one."""
    try:
        traits = try_model(model)
    except ValueError as error:
        return Outcome("refused", str(error))
    sampler = TransformersSampler(model, tokenizer, traits=traits)
    options = SamplingOptions(_LENGTH, temperature=0.0, eos_token_ids=EOS_IDS)
    kind = "as generate"
    ragged, shared = draw([12, 3, 9, 9, 1, 6]), draw([2, 7, 4], prefix_length=20)
    for prompts, num_samples in ((ragged, 1), (shared, 2)):
        requests = requests_for(prompts, num_samples)
        found = dict(sampler.sample(requests, options, 4))
        for start, prompt in enumerate(prompts):
            ours = [found[start * num_samples + k].completion_ids for k in range(num_samples)]
            assert len(set(ours)) == 1
            theirs = generated(model, prompt)
            if differs(ours[0], *theirs):
                # RoBERTa's `generate` hands over positions that its forward doesn't use itself.
                alone = computed_anew(model, prompt)
                assert not differs(ours[0], *alone), f"{prompt}: {ours[0]} is not {alone[0]}"
                assert differs(alone[0], *theirs)
                kind = "as its forward"
    options = SamplingOptions(8, temperature=1.0, eos_token_ids=EOS_IDS)
    requests = requests_for(ragged, 2)
    together = dict(sampler.sample(requests, options, 5))
    for i, request in enumerate(requests[:4]):
        (_, alone), *_ = sampler.sample([request], options, 1)
        assert together[i].completion_ids == alone.completion_ids
    return Outcome(kind, traits.padding)


def requests_for(prompts: Sequence[tuple[int, ...]], num_samples: int) -> list[SampleRequest]:
    return [
        SampleRequest(prompt, stream_key(0, 0, "train", str(prompt), k))
        for prompt in prompts
        for k in range(num_samples)
    ]


def differs(ours: Sequence[int], theirs: Sequence[int], is_certain: Sequence[bool]) -> bool:
    """Return whether two texts part where no rounding may have chosen."""
    for a, b, certain in zip(ours, theirs, is_certain, strict=False):
        if a != b or not certain:
            return certain
    return False


def generated(model: PreTrainedModel, prompt: tuple[int, ...]) -> tuple[list[int], list[bool]]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_LENGTH,
            do_sample=False, eos_token_id=list(EOS_IDS), pad_token_id=0, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
    return out.sequences[0, len(prompt) :].tolist(), [is_certain(step[0]) for step in out.logits]


def computed_anew(model: PreTrainedModel, prompt: tuple[int, ...]) -> tuple[list[int], list[bool]]:
    tokens: list[int] = []
    certain: list[bool] = []
    while len(tokens) < _LENGTH and not set(tokens) & set(EOS_IDS):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        certain.append(is_certain(logits))
    return tokens, certain


def is_certain(logits: torch.Tensor) -> bool:
    first, second = logits.float().topk(2).values.tolist()
    return first - second > 1e-3


SETTINGS: dict[str, Any] = {
    "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "max_steps": 1,
    "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-2, "max_length": 24,
    "per_device_train_batch_size": 2, "gradient_checkpointing": False,
}  # fmt: skip
ROUNDS: dict[str, Any] = {
    "num_rounds": 1, "num_generations": 2, "temperature": 1.0, "max_completion_length": 6,
}  # fmt: skip
PROMPTS = ["ab", "cde", "f", "ghij"]


def check_training(
    family: str, trainer: str, folder: Path, tokenizer: PreTrainedTokenizerBase, **settings: Any
) -> Outcome:
    """Train a family for one step of one round, with the setting that a refusal may ask for."""
    model = build_tiny(family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    try:
        built = build_trainer(trainer, model, folder, tokenizer, **settings)
    except ValueError as error:
        innermost = traceback.extract_tb(error.__traceback__)[-1].filename
        if Path(trl_selfplay.__file__).parent not in Path(innermost).parents:
            raise
        if "Set router_aux_loss_coef=0.0" not in str(error):
            return Outcome("refused", str(error))
        asked = {"router_aux_loss_coef": 0.0}
        outcome = check_training(family, trainer, folder, tokenizer, **asked)
        return replace(outcome, reason=f"with {asked}")
    output = built.train()
    assert torch.isfinite(torch.tensor(output.training_loss))
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    return Outcome("trained")


def build_trainer(trainer: str, model: Any, folder: Path, tokenizer: Any, **settings: Any) -> Any:
    # Most samples end, and are trained on.
    model.generation_config.eos_token_id = list(range(1, VOCAB_SIZE, 2))
    config_class = getattr(trl_selfplay, f"{trainer}Config")
    trainer_class = getattr(trl_selfplay, f"{trainer}Trainer")
    if trainer == "QuietSTaR":
        args = config_class(
            str(folder), **SETTINGS, thought_length=2, num_ahead_tokens=2, **settings
        )
        texts = Dataset.from_dict({"text": [f"{p} {p} {p}" for p in PROMPTS]})
        return trainer_class(model, args, train_dataset=texts, processing_class=tokenizer)
    changes = {"rationalize": False} if trainer == "STaR" else {}
    args = config_class(str(folder), **SETTINGS, **ROUNDS, **changes, **settings)
    if trainer == "SPIN":
        rows = {"prompt": PROMPTS, "completion": ["x", "yz", "w", "v"]}
        graded = {}
    else:
        rows = {"prompt": PROMPTS, "solution": ["x", "yz", "w", "v"]}
        # For IRPO one of a prompt's two completions is right and the other is wrong.
        right = (1.0, 0.0) if trainer == "IRPO" else (1.0, 1.0)
        graded = {"reward_funcs": lambda completions, **_: [
            right[i % 2] for i in range(len(completions))
        ]}  # fmt: skip
    return trainer_class(
        model,
        args=args,
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        **graded,
    )
