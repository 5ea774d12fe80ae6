"""A random stream for every sample: Gumbel noise that doesn't depend on the batch.

In: the identity of a sample (seed, round, phase, prompt, sample index), a step and the vocabulary.
Out: the noise that turns an argmax over logits into a draw from their softmax. It is a pure function
of (key, step, token id), so a sample is the same alone, in any batch and after a resume.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch

from trl_selfplay.generation.sampler import Phase

# Number of elements hashed at once on a CPU: bits and scratch of one chunk (8 bytes per element) fit
# into the second-level cache of two cores.
CPU_CHUNK_ELEMENTS = 1 << 17
# On other devices a chunk only bounds the scratch memory (512 MiB).
DEVICE_CHUNK_ELEMENTS = 1 << 26

_GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
# The multipliers of lowbias32, as signed 32-bit integers.
_LOWBIAS_1 = 0x7FEB352D
_LOWBIAS_2 = 0x846CA68B - (1 << 32)


def stream_key(seed: int, round_index: int, phase: Phase, prompt_id: str, sample_index: int) -> int:
    """Return the 64-bit key of one sample's random stream, the same in every process."""
    canonical = json.dumps(
        [int(seed), int(round_index), phase, prompt_id, int(sample_index)], separators=(",", ":")
    )
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "big")


def token_words(vocab_size: int, device: torch.device | str) -> torch.Tensor:
    """Return one well-mixed 32-bit word per token id, int32 (V,); compute it once per run."""
    mixed = _splitmix64(np.arange(vocab_size, dtype=np.uint64) * _GOLDEN_GAMMA)
    return torch.from_numpy((mixed >> np.uint64(32)).astype(np.uint32).view(np.int32)).to(device)


def gumbel_noise(
    words: torch.Tensor,
    keys: Sequence[int],
    steps: int | Sequence[int],
    out: torch.Tensor | None = None,
    chunk_elements: int | None = None,
) -> torch.Tensor:
    """Draw the Gumbel(0, 1) noise of one decoding step.

    Hashes (key, step, token) to 31 bits x, takes v = (x + 1/2) / 2^31 and returns
    -log(-log(1 - v)). Small v are exact to float32's relative precision, so that the upper tail,
    which decides rare draws, is fine-grained and reaches +22; the lower end is -2.8.

    Args:
        words: `token_words(V, device)`, int32 (V,).
        keys: 64-bit stream keys, one per row.
        steps: Index of the token in its completion, from 0; one for all rows or one per row.
        out: Float32 (rows, V) to write to, or None for a new tensor.
        chunk_elements: Number of elements hashed at once; only affects the speed.

    Returns:
        Float32 (rows, V) on the device of `words`.

    Source:
        The Gumbel-max trick, e.g. Maddison et al., arXiv 1411.0030, section 2. Mixing: lowbias32
        (C. Wellons, "Prospecting for Hash Functions") with the second row word in its middle.
    """
    rows, vocab_size = len(keys), words.numel()
    device = words.device
    if out is None:
        out = torch.empty((rows, vocab_size), dtype=torch.float32, device=device)
    if chunk_elements is None:
        on_cpu = device.type == "cpu"
        chunk_elements = CPU_CHUNK_ELEMENTS if on_cpu else DEVICE_CHUNK_ELEMENTS
    chunk = max(1, min(rows, chunk_elements // vocab_size))
    bits = torch.empty((chunk, vocab_size), dtype=torch.int32, device=device)
    scratch = torch.empty_like(bits)
    row_words = torch.from_numpy(_row_words(keys, steps))  # (rows, 2)
    if device.type == "cuda":  # which is still computing the logits, so don't wait for it
        row_words = row_words.pin_memory().to(device, non_blocking=True)
    else:
        row_words = row_words.to(device)
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        x, s = bits[: stop - start], scratch[: stop - start]
        torch.bitwise_xor(words, row_words[start:stop, :1], out=x)
        _xor_with_shifted(x, 16, s)
        x.mul_(_LOWBIAS_1)
        x.bitwise_xor_(row_words[start:stop, 1:])
        _xor_with_shifted(x, 15, s)
        x.mul_(_LOWBIAS_2)
        _xor_with_shifted(x, 16, s)
        x.bitwise_and_(0x7FFFFFFF)
        noise = out[start:stop].copy_(x)
        # -v, kept above -1: the largest x round to 2^31 as float32
        noise.mul_(-(2.0**-31)).sub_(2.0**-32).clamp_(min=-(1.0 - 2.0**-24))
        noise.log1p_().neg_().log_().neg_()
    return out


def _row_words(keys: Sequence[int], steps: int | Sequence[int]) -> np.ndarray:
    """Return two 32-bit words for each (key, step), int32 (rows, 2)."""
    state = np.array([key & 0xFFFFFFFFFFFFFFFF for key in keys], dtype=np.uint64)
    counts = np.atleast_1d(np.asarray(steps, dtype=np.uint64)) + np.uint64(1)
    offset = counts * _GOLDEN_GAMMA  # wraps around
    return _splitmix64(state + offset).view(np.int32).reshape(len(keys), 2)


def _splitmix64(z: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's output function to 64-bit words; uint64 arithmetic wraps around."""
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def _xor_with_shifted(x: torch.Tensor, shift: int, scratch: torch.Tensor) -> None:
    """Compute x ^= x >>> shift in place; the mask makes int32's arithmetic shift a logical one."""
    torch.bitwise_right_shift(x, shift, out=scratch)
    scratch.bitwise_and_((1 << (32 - shift)) - 1)
    x.bitwise_xor_(scratch)
