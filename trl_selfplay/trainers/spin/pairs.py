"""Pair the data's completions with the opponent's, and find superficial differences.

In: the rollouts of a round and the tokens of the data's completions. Out: the outcome of every rollout,
pairs (chosen: the data's completion, rejected: the opponent's, exactly as sampled), and warnings. Pure
functions of records.

Source: SPIN, arXiv 2401.01335, equation 4.7: y from the data, y' sampled by the opponent.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from statistics import fmean
from typing import Any

from trl_selfplay.rollouts.completions import ChosenTokens
from trl_selfplay.rollouts.funnel import Outcome
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.rows import Pair
from trl_selfplay.rollouts.selection import Selection

# Thresholds are ours: a single token that half of the pairs can be told apart by, a length that
# tells apart nine of ten. Below this many pairs chance alone gives such numbers.
_TELLING_SHARE = 0.5
_TELLING_LENGTH = 0.9
_FEWEST_PAIRS = 16


def select_pairs(
    rollouts: Sequence[Rollout], chosen: Mapping[str, ChosenTokens], max_length: int | None
) -> Selection:
    """Select the opponent's completions that are trained on, each against the data's.

    Truncated completions are dropped: they would teach that the opponent doesn't end or, with an added
    EOS, that it ends within sentences. Empty completions are recognized by their first token.
    Completions equal to the data's have loss ln 2 and no gradient for any policy. Pairs whose longer
    side exceeds `max_length` are dropped, never truncated. Equal completions of one prompt are kept,
    because they represent the opponent's distribution.

    Args:
        rollouts: Rollouts of one round, each (prompt_id, sample_index) once.
        chosen: Tokens of the data's completions by prompt id.
        max_length: Maximum tokens of prompt and completion; None for no limit.
    """
    return Selection.of(
        rollouts,
        lambda rollout: _outcome(rollout, chosen[rollout.prompt_id], max_length),
        unsolved=("truncated", "empty", "identical", "too_long"),
    )


def _outcome(rollout: Rollout, tokens: ChosenTokens, max_length: int | None) -> Outcome:
    if rollout.is_truncated:
        return "truncated"
    if not rollout.completion.strip():
        return "empty"
    if rollout.completion_ids == tokens.chosen_ids:
        return "identical"
    longest = max(len(rollout.completion_ids), len(tokens.chosen_ids))
    if max_length is not None and len(tokens.prompt_ids) + longest > max_length:
        return "too_long"
    return "kept"


def pair_up(rollouts: Iterable[Rollout], chosen: Mapping[str, ChosenTokens]) -> Iterator[Pair]:
    """Yield each completion of the opponent as the rejected side of a pair with the data's.

    The rejected side ends with EOS only if EOS was sampled.
    """
    for r in rollouts:
        tokens = chosen[r.prompt_id]
        yield Pair(
            prompt_id=r.prompt_id,
            prompt_ids=tokens.prompt_ids,
            chosen_ids=tokens.chosen_ids,
            rejected_ids=r.completion_ids,
        )


def pair_metrics(
    selection: Selection, chosen: Mapping[str, ChosenTokens], num_examples: int
) -> dict[str, float]:
    """Return the metrics of a round: play/… of the samples, select/… of the pairs."""
    facts, counts = selection.facts, selection.funnel.unhinted
    sampled = len(facts.rollouts)
    of_chosen = [len(chosen[prompt_id].chosen_ids) for prompt_id in facts.prompt_ids]
    distinct = {
        blake2b(repr((r.prompt_id, r.completion_ids)).encode(), digest_size=16).digest()
        for _, r in facts.rollouts.scan()
    }
    return {
        "play/completions": float(sampled),
        "play/mean_length": fmean(facts.lengths.tolist()),
        "play/mean_length_chosen": fmean(of_chosen[prompt] for prompt in facts.prompts.tolist()),
        "play/truncated": counts.truncated / sampled,
        "play/identical": counts.identical / sampled,
        "play/empty": counts.empty / sampled,
        "play/distinct": len(distinct) / sampled,
        "select/kept": float(counts.kept),
        "select/examples": float(num_examples),
    }


def find_giveaways(
    pairs: Iterable[tuple[Sequence[int], Sequence[int]]],
    decode: Callable[[int], str],
    eos_token_ids: Sequence[int],
) -> list[str]:
    """Return superficial differences between the data's and the opponent's completions.

    They are looked for in the first token, the last token, the last one before EOS, and the length. A
    discriminator that can use one of these learns format instead of content.

    Args:
        pairs: (chosen, rejected) token ids; too few give no result.
        decode: Returns the text of a token.
        eos_token_ids: Tokens that end a completion.

    Returns:
        One sentence with numbers per difference.
    """
    eos = set(eos_token_ids)
    picks = (
        ("first token", lambda ids: ids[:1]),
        ("last token", lambda ids: ids[-1:]),
        ("last token before EOS", lambda ids: ids[-2:-1] if ids[-1] in eos else ids[-1:]),
    )
    tokens = {name: (Counter[Any](), Counter[Any]()) for name, _ in picks}  # of both sides
    lengths = (Counter[int](), Counter[int]())
    for pair in pairs:
        for side, ids in enumerate(pair):
            lengths[side][len(ids)] += 1
            for name, pick in picks:
                tokens[name][side][tuple(pick(ids))] += 1
    count = lengths[0].total()
    if count < _FEWEST_PAIRS:
        return []
    found = []
    for place, (of_chosen, of_rejected) in tokens.items():
        token, difference = max(
            (
                (t, (of_chosen[t] - of_rejected[t]) / count)
                for t in sorted({*of_chosen, *of_rejected})
            ),
            key=lambda entry: abs(entry[1]),
        )
        if abs(difference) > _TELLING_SHARE:
            text = repr(decode(token[0])) if token else "nothing"
            found.append(
                f"the {place} is {text} in {of_chosen[token] / count:.0%} of the data's "
                f"completions and in {of_rejected[token] / count:.0%} of the opponent's"
            )
    longer = _share_longer(*lengths)
    if max(longer, 1.0 - longer) > _TELLING_LENGTH:
        means = [fmean(side.keys(), side.values()) for side in lengths]
        found.append(
            f"length alone tells {max(longer, 1.0 - longer):.0%} of them apart (mean "
            f"{means[0]:.0f} tokens in the data, {means[1]:.0f} of the opponent)"
        )
    return found


def _share_longer(first: Counter[int], second: Counter[int]) -> float:
    """Return the probability that a member of `first` exceeds one of `second`, ties as 1/2 (AUC)."""
    wins = 0.0
    for length, times in first.items():
        below = sum(n for other, n in second.items() if other < length)
        wins += times * (below + 0.5 * second[length])
    return wins / (first.total() * second.total())
