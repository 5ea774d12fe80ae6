"""What a run takes, phase by phase: the record that `estimate` returns, and its table."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What a driver and its libraries take before the first tensor, as measured on an H200, and the share
# of the rest that an allocator loses in pieces.
_CONTEXT_BYTES, _LOST_SHARE = 10**9, 0.05
GB = 10**9
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12, "KIB": 2**10, "MIB": 2**20,
          "GIB": 2**30, "TIB": 2**40}  # fmt: skip
# Less than any model with its tokenizer needs, and more than any device has.
_LEAST_BYTES, _MOST_BYTES = 10**6, 10**14


@dataclass(frozen=True, slots=True)
class Phase:
    """The memory of one phase at its peak.

    Attributes:
        name: "sampling", "reference" (scoring pairs) or "training".
        parts: Bytes by what takes them: "weights", "adapter", "gradients", "optimizer",
            "activations", "logits", "cache", "grading models", "engine".
        detail: What was assumed, such as the batch.
    """

    name: str
    parts: Mapping[str, int]
    detail: str = ""

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Estimate:
    """The memory of a run by phase, in bytes. `print` shows a table.

    Attributes:
        model: Name or class of the model.
        device: "cuda" or "cpu".
        phases: In their order within a round.
        num_parameters: All weights, adapters included.
        num_trainable: Those that are trained.
        smallest: Bytes without which nothing can run: the weights.
        advice: Changes of settings with which it would fit, each with the peak it leads to; empty
            if it fits, or if no memory was given to fit into.
        notes: What isn't counted.
    """

    model: str
    device: str
    phases: tuple[Phase, ...]
    num_parameters: int
    num_trainable: int
    smallest: int
    advice: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(phase.total for phase in self.phases)

    def phase(self, name: str) -> Phase:
        """Return a phase by its name.

        Raises:
            KeyError: The run has no such phase.
        """
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(f"there is no phase {name!r}; there are {[p.name for p in self.phases]}.")

    def fits(self, free: int) -> bool:
        """Return whether every phase fits into so many bytes."""
        return self.peak <= free

    def summary(self) -> str:
        """Return one line: the peak and each phase."""
        phases = ", ".join(f"{phase.name} {size_text(phase.total)}" for phase in self.phases)
        return f"{size_text(self.peak)} at most ({phases})"

    def __str__(self) -> str:
        trained = f"{self.num_trainable / 1e6:,.1f} M of {self.num_parameters / 1e6:,.1f} M weights"
        names = list(dict.fromkeys(name for phase in self.phases for name in phase.parts))
        width = max(len(name) for name in [*names, "total"])
        header = " " * width + "".join(f"{phase.name:>12}" for phase in self.phases)
        rows = [header]
        for name in [*names, "total"]:
            values = [p.total if name == "total" else p.parts.get(name, 0) for p in self.phases]
            rows.append(f"{name:<{width}}" + "".join(f"{size_text(value):>12}" for value in values))
        details = [f"{phase.name}: {phase.detail}" for phase in self.phases if phase.detail]
        advice = [f"to fit: {change}" for change in self.advice]
        title = f"{self.model} on {self.device}, {trained} trained"
        return "\n".join([title, *rows, *details, *self.notes, *advice])


def read_bytes(amount: Any) -> int:
    """Return an amount of memory in bytes.

    Args:
        amount: A number of bytes, or a number with its unit as text.

    Raises:
        ValueError: It isn't an amount that a device can have, such as 12 for 12 GB.

    >>> read_bytes("12GB"), read_bytes("1.5 GiB"), read_bytes(8_000_000_000)
    (12000000000, 1610612736, 8000000000)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([a-z]*)\s*", str(amount), re.IGNORECASE)
    is_number = isinstance(amount, int | float | str) and not isinstance(amount, bool)
    if not is_number or found is None or (found[2] or "B").upper() not in _UNITS:
        raise ValueError(f"memory={amount!r}; give bytes, or text such as '12GB' or '11.5GiB'.")
    count = int(float(found[1]) * _UNITS[(found[2] or "B").upper()])
    if not _LEAST_BYTES <= count <= _MOST_BYTES:
        hint = f"; if you mean gigabytes, write '{amount}GB'" if count < _LEAST_BYTES else ""
        raise ValueError(f"memory={amount!r} is {count:,} bytes, which no device has{hint}.")
    return count


def usable_bytes(gigabytes: float) -> int:
    """Return what a run can have of a card that is sold with so many gigabytes (2**30 bytes).

    >>> usable_bytes(24)
    23531313587
    """
    return int((gigabytes * 2**30 - _CONTEXT_BYTES) * (1 - _LOST_SHARE))


def size_text(count: int) -> str:
    """Return a number of bytes as text, in GB or MB; a dash for none."""
    if count == 0:
        return "–"
    return f"{count / GB:.2f} GB" if count >= GB / 100 else f"{count / 1e6:.1f} MB"
