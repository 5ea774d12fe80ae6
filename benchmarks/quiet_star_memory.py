"""What does a Quiet-STaR step on a GPU hold at its peak? Counted under fake tensors, without a GPU.

A 0.5B model of Qwen2.5's shape in bfloat16, all weights trained with AdamW, one text, 2 thoughts per
token, 4 tokens ahead, activations recomputed in the backward pass. Most tensors are fake: they have a
shape and no values, so a step needs seconds and no memory. Token ids and masks are real, because their
values decide shapes. Every storage is counted from its creation to its end, in sampling, forward, backward
pass and AdamW's update, with chunks of the sizes that they have on a GPU.

Not counted: the CUDA context, workspaces of kernels, and the allocator's rounding and gaps. PyTorch's
attention is counted as its flash kernel for CPUs, whose saved tensors are those of CUDA's.

    python benchmarks/quiet_star_memory.py
"""

import argparse
import datetime
import sys
import weakref
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers import AutoModelForCausalLM

from trl_selfplay.generation import random_streams
from trl_selfplay.trainers.quiet_star import attention, backbone
from trl_selfplay.trainers.quiet_star.mixing import ATTRIBUTE, ThoughtModule

sys.path.insert(0, str(Path(__file__).parent))
from gpu_parts.models import CONFIGS
from quiet_star_cost import dense_step, split_step

RESULTS = Path(__file__).parent / "results" / "quiet_star_memory.md"
GB = 10**9
# Arms are those of quiet_star_cost.py; text length, thought length, tokens ahead.
CASES = (
    ("recomputed", 256, 8, 4),
    ("split", 256, 8, 4),
    ("dense", 256, 8, 4),
    ("recomputed", 256, 12, 8),
    ("recomputed", 512, 8, 4),
    ("recomputed", 1024, 8, 4),
    ("recomputed", 2048, 8, 4),
)
# Tensors without an input that hold more elements than this are fake.
MANY = 1 << 16


class FakeFloats(TorchDispatchMode):
    """Give tensors shapes alone, except small ones made of real ones; count the bytes of the former.

    Attributes:
        live: Bytes and description of each storage by its address.
        peak: Most bytes at once.
        at_peak: The descriptions of what was live then, with their bytes.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.fake = fake
        self.live: dict[int, tuple[int, str]] = {}
        self.total = self.peak = 0
        self.at_peak: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        if tensors and not any(isinstance(x, FakeTensor) for x in tensors):
            return func(*args, **kwargs)
        if not tensors:
            with self.fake:
                result = func(*args, **kwargs)
            if isinstance(result, torch.Tensor) and result.numel() <= MANY:
                return func(*args, **kwargs)
            return self.track(result)
        if func is torch.ops.aten.index.Tensor and tensors[1].dtype == torch.bool:
            # A real mask selects a known number of rows.
            places = tensors[1].nonzero().unbind(1)
            leaves, spec = tree_flatten(((args[0], [*places, *args[1][1:]]), kwargs))
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0
        converted = [
            self.fake.from_tensor(x)
            if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor)
            else x
            for x in leaves
        ]
        args, kwargs = tree_unflatten(converted, spec)
        with self.fake:
            return self.track(func(*args, **kwargs))

    def track(self, result: Any) -> Any:
        """Count the storages of an operation's results that are new."""
        for tensor in tree_leaves(result):
            if not isinstance(tensor, FakeTensor):
                continue
            storage = tensor.untyped_storage()
            address = storage._cdata
            if address in self.live:
                continue
            size = storage.nbytes()
            name = describe(tensor)
            self.live[address] = (size, name)
            weakref.finalize(storage, self.release, address)
            self.total += size
            if self.total > self.peak:
                self.peak = self.total
                self.at_peak = Counter()
                for live_size, live_name in self.live.values():
                    self.at_peak[live_name] += live_size
        return result

    def release(self, address: int) -> None:
        """Stop counting a storage."""
        self.total -= self.live.pop(address)[0]


def build(config: Any, fake: FakeTensorMode) -> Any:
    """Return a fake model with thoughts, in bfloat16."""
    with fake:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    thoughts = ThoughtModule(torch.zeros(config.hidden_size), 100.0)
    for module in thoughts.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(fake.from_tensor(parameter.detach())))
    setattr(model, ATTRIBUTE, thoughts)
    return model


def count(arm: str, text_length: int, thought_length: int, ahead: int) -> dict[str, float]:
    """Return the GB at the peak of a step and of AdamW's update, and what the former consists of."""
    fake = FakeTensorMode()
    config = CONFIGS["0.5B"]
    ids = torch.randint(10, config.vocab_size, (1, text_length))
    model = build(config, fake)
    if arm == "recomputed":
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    tracker = FakeFloats(fake)
    tracker.track([p.detach() for p in model.parameters()])
    found = {"weights": tracker.total / GB}
    with tracker:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        found["AdamW's update"] = tracker.peak / GB
        optimizer.zero_grad()
        found["AdamW's state"] = tracker.total / GB - found["weights"]
        tracker.peak = 0
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (dense_step if arm == "dense" else split_step)(model, ids, thought_length, ahead)
    found["step"] = tracker.peak / GB
    kept = {describe(p) for p in model.parameters()}
    for name, size in tracker.at_peak.items():
        if name in kept:
            continue
        kind = "logits" if name.endswith(f", {config.vocab_size})") else "activations"
        found[kind] = found.get(kind, 0.0) + size / GB
    found["gradients"] = found["step"] - sum(
        found.get(n, 0.0) for n in ("weights", "AdamW's state", "logits", "activations")
    )
    return found


def describe(tensor: torch.Tensor) -> str:
    """Return a tensor's type and shape."""
    return f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}"


def main() -> None:
    """Count all cases and write the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    attention.CPU_CHUNK_SCORES = attention.DEVICE_CHUNK_SCORES
    backbone.CPU_CHUNK_LOGITS = backbone.DEVICE_CHUNK_LOGITS
    random_streams.CPU_CHUNK_ELEMENTS = random_streams.DEVICE_CHUNK_ELEMENTS
    text = [
        "# Memory of a Quiet-STaR step, under fake tensors",
        "",
        f"Counted without a GPU by `benchmarks/quiet_star_memory.py`, which says what is counted and what "
        f"isn't; torch {version('torch')}, transformers {version('transformers')}; "
        f"{datetime.date.today().isoformat()}. A model of Qwen2.5-0.5B's shape in bfloat16, all weights "
        "trained, 1 text, 2 thoughts per token. Arms are those of `benchmarks/quiet_star_cost.py`: "
        "recomputed is the trainer's default. GB are 10^9 bytes.",
        "",
        "| arm | S | thought | ahead | peak of the step | of it weights | AdamW's state | gradients | "
        "logits | activations | peak of AdamW's update |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        found = count(*case)
        names = (
            "step", "weights", "AdamW's state", "gradients", "logits", "activations",
            "AdamW's update",
        )  # fmt: skip
        values = " | ".join(f"{found.get(name, 0.0):.2f}" for name in names)
        text.append(f"| {' | '.join(map(str, case))} | {values} |")
        print(text[-1], flush=True)
    RESULTS.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
