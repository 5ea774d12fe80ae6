"""Seconds and peak memory of work on a device, and a card of less memory than the one at hand.

In: a function to run. Out: seconds after everything queued has run; bytes. GB are 10^9 bytes.
"""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

GB = 10**9
# What CUDA itself takes of a card, outside of PyTorch's allocator.
CONTEXT = 6 * 10**8


def wait_for(device: str) -> None:
    """Wait until everything queued on the device has run."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(device: str, run: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    wait_for(device)
    started = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - started


def restart_peak(device: str) -> None:
    """Forget what was in use before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def read_peak(device: str) -> dict[str, int]:
    """Return bytes: the peak of tensors and of what the allocator held; what the card now lacks.

    On a CPU, the peak is that of the process.
    """
    if device == "cuda":
        free, total = torch.cuda.mem_get_info()
        return {
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "used_on_card": total - free,
        }
    status = Path("/proc/self/status").read_text()
    return {"allocated": int(status.split("VmHWM:")[1].split()[0]) * 1024}


def clean_up(device: str) -> None:
    """Free what nothing refers to."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def card_of(device: str, gigabytes: float | None) -> Iterator[None]:
    """Let PyTorch take no more than a card of this size would leave it; None: all of the card."""
    if device != "cuda":
        yield
        return
    total = torch.cuda.get_device_properties(0).total_memory
    wanted = total if gigabytes is None else gigabytes * GB - CONTEXT
    torch.cuda.set_per_process_memory_fraction(min(1.0, wanted / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
