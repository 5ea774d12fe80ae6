"""Give back the memory of tensors that are gone: to the accelerator, and on a CPU to the system.

In: an error. Out: whether it says that memory ran out.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def return_freed_memory() -> None:
    """Collect garbage, empty the accelerator's cache, and let the C library give back free pages.

    glibc keeps what large tensors leave between small ones: after sampling with SmolLM2-135M about
    0.4 GiB, on top of which training would then grow.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries lack it
        if trim is not None:
            trim(0)


@contextmanager
def fast_collections() -> Iterator[None]:
    """Leave what exists now out of garbage collections until this context ends.

    A full collection visits all objects of all imported modules, which takes about a third of a second,
    and a round needs about ten. An object is still freed when nothing refers to it any more; only
    cycles of objects that exist now have to wait.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error of torch says that the device or the system is out of memory."""
    text = str(error).lower()
    signs = ("can't allocate memory", "out of memory", "cublas_status_alloc_failed")
    return isinstance(error, torch.OutOfMemoryError) or any(sign in text for sign in signs)
