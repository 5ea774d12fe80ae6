"""Hand out the shards of a phase to the processes, as they become free.

In: the number of shards, and a counter that the processes share. Out: the numbers of the shards that
this process samples. Which process takes which shard has no influence on the samples, nor on their order.
"""

from collections.abc import Callable, Iterator


def take_shards(num_shards: int, counter: Callable[[], int]) -> Iterator[int]:
    """Yield the next shard that no process has taken yet, until all are taken.

    A process takes a shard when it begins with it, so that a slow one takes fewer. One process takes
    all, in order.

    Args:
        num_shards: Number of shards of the phase.
        counter: Gives 0, 1, 2, …, each number to one process: `peers.shared_counter`.
    """
    while (number := counter()) < num_shards:
        yield number
