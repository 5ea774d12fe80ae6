"""How many sequences can be decoded together, by what each of them takes.

In: traits of a model, lengths, and free bytes. Out: bytes of a sequence, and a number of sequences.
"""

from trl_selfplay.generation.model_traits import ModelTraits

# In larger batches, the time per step grows with the batch and throughput stays the same.
_LARGEST_ON_CPU = 64
_LARGEST_ON_DEVICE = 256
# A step reads all weights once for all rows, and the keys and values of each row. Once these are
# larger than the weights, a larger batch on a CPU costs memory and gains little.
_LEAST_CACHE_ON_CPU = 256 * 2**20
# The rest is for fragmentation, graders and peaks during prefill.
_SHARE_OF_FREE_MEMORY = 0.5
# Float32 copies of a row of logits in memory at once: logits, filtered, noise, sorted, hashed bits.
_LOGITS_COPIES = 6


def bytes_per_sequence(
    traits: ModelTraits, longest_prompt: int, max_completion_length: int, through_graphs: bool
) -> int:
    """Return what a sequence takes at most: keys and values, the prompt's activations, logits.

    Args:
        traits: Of the model.
        longest_prompt: In tokens.
        max_completion_length: In tokens.
        through_graphs: Whether CUDA graphs decode: keys and values of the prompt are then held
            twice, in the graphs' buffers, and as new rows on their way there.
    """
    length = longest_prompt + max_completion_length
    copied = longest_prompt if through_graphs else 0
    return (
        traits.bytes_per_token * (length + copied)
        + traits.bytes_per_prompt_token * longest_prompt
        + 4 * _LOGITS_COPIES * traits.vocab_size
    )


def largest_batch(
    traits: ModelTraits, length: int, weight_bytes: int, each: int, free: int, on_cpu: bool
) -> int:
    """Return how many sequences fit into half of the free memory and are worth decoding together.

    On a CPU, keys and values take at most as much as the weights, or 256 MiB.

    Args:
        traits: Of the model.
        length: Tokens of prompt and completion.
        weight_bytes: Of the model.
        each: Bytes of a sequence.
        free: Free bytes.
        on_cpu: Whether the model is on a CPU.
    """
    largest = _LARGEST_ON_DEVICE
    if on_cpu:
        cache = max(weight_bytes, _LEAST_CACHE_ON_CPU)
        largest = min(_LARGEST_ON_CPU, cache // (traits.bytes_per_token * length))
    fitting = int(_SHARE_OF_FREE_MEMORY * free) // each
    return max(1, min(largest, fitting))
