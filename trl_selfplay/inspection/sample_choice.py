"""Choose the samples of a round that a report shows: a bounded number, the same prompts in every round.

In: rollouts with their outcomes, streamed. Out: the chosen ones and how many there are of each outcome.
Memory holds the chosen ones alone.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import zip_longest
from typing import TypeVar

from trl_selfplay.rollouts.record import Rollout

Kind = TypeVar("Kind")

# Samples of one prompt with one outcome; more of them crowd out other prompts.
_MOST_PER_PROMPT = 2


@dataclass(frozen=True, slots=True)
class ChosenSamples:
    """What was chosen of a round.

    Attributes:
        samples: Rollouts and their outcomes, one of each outcome in turn.
        totals: How many there were of each outcome.
    """

    samples: tuple[tuple[Rollout, str], ...]
    totals: Mapping[str, int]


def choose_samples(
    rollouts: Iterable[tuple[Rollout, str]], limit: int, seed: int = 0
) -> ChosenSamples:
    """Choose at most `limit` rollouts, shared among the outcomes as equally as their numbers allow.

    Prompts are ranked by a hash of seed and id, so that every round shows the same prompts as far as it
    has samples of them. Of a prompt, at most two samples of each outcome are chosen.

    Args:
        rollouts: With their outcomes; a prompt's samples follow one another.
        limit: The most to choose.
        seed: Another seed chooses other prompts.
    """
    heaps: dict[tuple[str, bool], list[tuple[int, int, int, Rollout]]] = {}
    totals: Counter[str] = Counter()
    last, of_prompt = "", Counter[tuple[str, bool]]()
    rank = 0
    for number, (rollout, outcome) in enumerate(rollouts):
        if rollout.prompt_id != last:
            last, of_prompt = rollout.prompt_id, Counter()
            digest = blake2b(f"{seed}/{last}".encode(), digest_size=6).digest()
            rank = int.from_bytes(digest)
        kind = (outcome, rollout.hinted)
        totals[outcome] += 1
        of_prompt[kind] += 1
        if of_prompt[kind] > _MOST_PER_PROMPT:
            continue
        heap = heaps.setdefault(kind, [])
        entry = (-rank, -rollout.sample_index, number, rollout)  # the largest rank leaves first
        if len(heap) < limit:
            heapq.heappush(heap, entry)
        elif heap and entry > heap[0]:
            heapq.heapreplace(heap, entry)
    shares = share_out({kind: len(heap) for kind, heap in heaps.items()}, limit)
    of_kinds = [
        [
            (rollout, kind[0])
            for *_, rollout in sorted(heaps[kind], key=lambda entry: entry[:3], reverse=True)
        ][: shares[kind]]
        for kind in sorted(heaps, key=lambda kind: (kind[0] != "kept", kind))
    ]
    mixed = (each for row in zip_longest(*of_kinds) for each in row if each is not None)
    return ChosenSamples(tuple(mixed), dict(sorted(totals.items())))


def share_out(counts: Mapping[Kind, int], limit: int) -> dict[Kind, int]:
    """Share a limit out among kinds, none of which gets more than it has.

    >>> share_out({"kept": 2, "failed": 90, "leaked": 90}, 12)
    {'kept': 2, 'failed': 5, 'leaked': 5}
    """
    shares = dict.fromkeys(counts, 0)
    left = limit
    while left > 0 and (open_ := [kind for kind in counts if shares[kind] < counts[kind]]):
        share = max(left // len(open_), 1)
        for kind in open_:
            more = min(share, counts[kind] - shares[kind], left)
            shares[kind] += more
            left -= more
    return shares
