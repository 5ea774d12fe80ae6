"""What Quiet-STaR adds to a model: the vectors that begin and end a thought, and the mixing head.

In: a causal language model and its tokenizer. Out: one module, attached to the model as
`quiet_star`, so that optimizer, checkpoints, PEFT and data parallelism treat it like any other.
Source: Quiet-STaR, arXiv 2403.09629, sections 4.2 to 4.4; shapes from the official code.
"""

from collections import OrderedDict
from typing import Any

import torch
from peft import PeftModel
from torch import nn

# Name of the attribute, which also appears in `modules_to_save` and in saved weights.
ATTRIBUTE = "quiet_star"
# The start and end vectors are initialized to this text's embedding.
INITIAL_TEXT = "---"
# Names of the two tokens in the paper's code. Thoughts never contain them.
META_TOKENS = ("<|startthought|>", "<|endthought|>")


class ThoughtModule(nn.Module):
    """The start and end vectors of a thought and the mixing head, in float32.

    Vectors are stored divided by `scale`. Adam's steps have the size of the learning rate whatever
    the gradient, so the vectors move `scale` times as far per step.

    Args:
        initial: Initial value (d,) of both vectors, as wide as the model's states.
        scale: Factor between the stored and the actual vectors.
    """

    def __init__(self, initial: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.scale = scale
        hidden_size = len(initial)
        stored = initial.detach().float() / scale
        self.vectors = nn.Parameter(torch.stack([stored, stored]))  # (2, d): start, end
        # Named layers: PEFT shortens the numbers of unnamed ones ("all-linear" on experts) to names
        # such as "0", which are those of the model's layers too.
        self.head = nn.Sequential(
            OrderedDict(
                mixing_input=nn.Linear(2 * hidden_size, hidden_size),
                first_relu=nn.ReLU(),
                mixing_hidden=nn.Linear(hidden_size, hidden_size),
                second_relu=nn.ReLU(),
                mixing_weight=nn.Linear(hidden_size, 1, bias=False),
            )
        )
        last: Any = self.head[-1]
        nn.init.zeros_(last.weight)
        self.to(initial.device, torch.float32)

    def rescale(self, scale: float) -> None:
        """Change the scale; the vectors stay the same up to rounding."""
        if scale == self.scale:
            return
        with torch.no_grad():
            self.vectors.mul_(self.scale / scale)
        self.scale = scale

    def start_and_end(self) -> torch.Tensor:
        """Return the input embeddings that begin and end a thought, float32 (2, d)."""
        return self.vectors * self.scale

    def forward(self, base: torch.Tensor, thought: torch.Tensor) -> torch.Tensor:
        """Return the thought's mixing weight w for states (…, d), unbounded, float32 (…, 1).

        The mixed state is (1 − w)·base + w·thought. As in the official code, w multiplies the
        thought; in the paper's equation 2 it multiplies the base.
        """
        with torch.autocast(base.device.type, enabled=False):
            weight: torch.Tensor = self.head(torch.cat([base, thought], dim=-1).float())
        return weight


def mix(
    module: Any, base: torch.Tensor, thought: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix states (…, d); return the mixed states and the weights, float32 (…).

    Mixing states before a linear head mixes the logits: p ∝ p_base^(1−w) · p_thought^w. A soft cap
    on logits applies after mixing.

    Source: Quiet-STaR, arXiv 2403.09629, equation 2.
    """
    weight = module(base, thought)
    return base + weight.to(base.dtype) * (thought - base), weight.squeeze(-1)


def attach_thought_module(model: Any, tokenizer: Any, scale: float, seed: int) -> None:
    """Attach a `quiet_star` module to a causal language model, unless it has one.

    Existing adapters are left alone. Weights loaded later replace the initial ones.

    Args:
        model: A causal language model, not wrapped in PEFT.
        tokenizer: Tokenizes "---", whose embedding the vectors start as. None: the mean embedding.
        scale: See `ThoughtModule`.
        seed: Seeds the mixing head's first layers; the global random state isn't changed.
    """
    if hasattr(model, ATTRIBUTE):
        return
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        initial = _initial_vector(embeddings, tokenizer)
        module = ThoughtModule(initial.cpu(), scale).to(device)
    setattr(model, ATTRIBUTE, module)


def _initial_vector(embeddings: Any, tokenizer: Any) -> torch.Tensor:
    """Return the mean embedding of the tokens of "---", or of the whole vocabulary if it has none."""
    ids: list[int] = []
    if tokenizer is not None:
        ids = tokenizer(INITIAL_TEXT, add_special_tokens=False)["input_ids"]
        ids = [i for i in ids if i != tokenizer.unk_token_id]
    if not ids:
        return embeddings.weight.float().mean(0)
    index = torch.tensor(ids, device=embeddings.weight.device)
    return embeddings(index).float().mean(0)


def unwrap_causal_lm(model: Any) -> Any:
    """Return the causal language model inside a PEFT model, or the model itself if it isn't one."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def trained_module(causal_lm: Any) -> ThoughtModule:
    """Return the trainable thought module; PEFT keeps a frozen original beside it."""
    module = getattr(causal_lm, ATTRIBUTE)
    if hasattr(module, "modules_to_save"):
        module = module.modules_to_save[module.active_adapters[0]]
    assert isinstance(module, ThoughtModule)
    return module


def barred_token_ids(tokenizer: Any) -> list[int]:
    """Return the ids of tokens that no thought may contain: the tokenizer's own thought tokens."""
    if tokenizer is None:
        return []
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary[token] for token in META_TOKENS if token in vocabulary)
