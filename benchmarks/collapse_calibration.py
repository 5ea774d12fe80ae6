"""Calibrate the detectors of collapse on policies that are tables: no network, exact updates.

A policy gives each of 200 training and 200 held-out prompts a distribution over 48 paths, which lead to 6
answers, one of them right. A round draws 16 paths per prompt, and 16 and one more per held-out prompt. The
last one stands for the greedy completion, so that its score is as noisy as a score can be.

- Copies: the policy stays as it is for 8 rounds. Whatever a detector says is a false alarm. Its rate is
  the share of runs with at least one alarm.
- Drifts: the policy changes in each round as a kind of collapse would have it. The detection rate is the
  share of runs in which the detector that the drift is meant for has spoken, and the median of the first
  round in which it did.

Every reading is taken by the functions that a training run calls. Two minutes on one core:

    OMP_NUM_THREADS=1 python benchmarks/collapse_calibration.py
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from trl_selfplay.evaluation.detectors import DETECTORS, Detector, take_readings
from trl_selfplay.evaluation.diversity import PromptSamples, RoundSamples, Samples
from trl_selfplay.evaluation.evidence import Evidence, Reading
from trl_selfplay.rollouts.funnel import Funnel, OutcomeCounts

DATE = "2026-11-26"
NUM_PROMPTS, NUM_SAMPLES, NUM_PATHS, NUM_ANSWERS, NUM_ROUNDS = 200, 16, 48, 6, 8
RIGHT, COMMON = 0, 1  # answers: the right one; the one that is the same text for all prompts
IS_RIGHT = np.arange(NUM_PATHS) % NUM_ANSWERS == RIGHT
MAX_PER_PROMPT = 4


@dataclass
class World:
    """A policy, and what else the detectors see. Probabilities are (P, K), by prompt and path."""

    train: np.ndarray
    held_out: np.ndarray
    other: np.ndarray  # right answers of a further set, (P,)
    lengths: np.ndarray  # tokens of each path, (P, K)
    cut: float = 0.02  # share that is cut by length
    repetitive: float = 0.002  # share of the kept
    hinted: float = 0.2  # share of the kept
    accepted: float = 0.002  # wrong ones that the verifier takes for right
    warmup: int = 10
    steps: int = 40
    weights: str = "capped"  # how many are kept of a prompt


def build_world(rng: np.random.Generator) -> World:
    """Draw prompts of all difficulties."""

    def policy() -> np.ndarray:
        skill = rng.normal(-0.5, 1.5, (NUM_PROMPTS, 1))
        logits = rng.normal(0.0, 1.5, (NUM_PROMPTS, NUM_PATHS)) + skill * IS_RIGHT
        return normalised(np.exp(logits))

    lengths = rng.integers(20, 60, (NUM_PROMPTS, NUM_PATHS))
    return World(policy(), policy(), rng.beta(2, 2, NUM_PROMPTS), lengths)


def normalised(weights: np.ndarray) -> np.ndarray:
    """Return rows that sum to one."""
    return weights / weights.sum(axis=1, keepdims=True)


# --- a round -------------------------------------------------------------------------------------


@dataclass
class Round:
    """What a round leaves to compare with."""

    samples: RoundSamples
    held_out: Samples
    scores: dict[str, float]
    other: dict[str, float]


def summarize(
    policy: np.ndarray, counts: np.ndarray, lengths: np.ndarray, accepted: np.ndarray
) -> dict[str, PromptSamples]:
    """Return what the detectors know of counts of paths, (P, K); `accepted` paths are correct."""
    logs = np.log(np.maximum(policy, 1e-300))
    answers = counts.reshape(len(counts), -1, NUM_ANSWERS).sum(axis=1)
    found = {}
    for i, row in enumerate(counts):
        right = row * accepted[i]
        tokens = int((row * lengths[i]).sum())
        found[f"{i:03d}"] = PromptSamples(
            forms=tuple(row[row > 0].tolist()),
            correct_forms=tuple(right[right > 0].tolist()),
            answers=tuple(answers[i][answers[i] > 0].tolist()),
            num_top=int(answers[i, COMMON]),
            num_tokens=tokens,
            num_graded=int(row.sum()),
            total_reward=float(right.sum()),
            best_reward=float(right.sum() > 0),
            logprob=float((row * logs[i]).sum()),
            num_logprob_tokens=tokens,
        )
    return found


def play(world: World, rng: np.random.Generator) -> tuple[Round, Funnel, tuple[int, int]]:
    """Draw a round's samples, select, and draw the held-out ones of the same policy."""
    counts = rng.multinomial(NUM_SAMPLES, world.train)
    # Which wrong paths the verifier accepts is a property of the path.
    luck = np.random.default_rng(7).random(world.train.shape)
    accepted = IS_RIGHT | (luck < world.accepted)
    samples = RoundSamples(summarize(world.train, counts, world.lengths, accepted))
    right = counts * accepted
    if world.weights == "capped":
        kept = np.minimum((right > 0).cumsum(axis=1), MAX_PER_PROMPT) * (right > 0)
        kept = (kept > 0) & ((right > 0).cumsum(axis=1) <= MAX_PER_PROMPT)
    else:
        kept = right
    of_prompt = kept.sum(axis=1)
    samples.kept = {f"{i:03d}": int(n) for i, n in enumerate(of_prompt) if n}
    total = int(of_prompt.sum())
    samples.num_repetitive = int(rng.binomial(total, world.repetitive))
    samples.kept_forms = np.flatnonzero(kept).astype(np.uint64)
    num_hinted = int(rng.binomial(total, world.hinted))
    num_cut = int(rng.binomial(counts.sum(), world.cut))
    funnel = Funnel(
        prompts=NUM_PROMPTS,
        prompts_solved=int((right.sum(axis=1) > 0).sum()),
        unhinted=OutcomeCounts(truncated=num_cut, kept=total - num_hinted,
                               failed=int(counts.sum()) - num_cut - total + num_hinted),
        hinted=OutcomeCounts(kept=num_hinted, failed=3 * num_hinted),
    )  # fmt: skip
    is_wrong = float((kept * ~IS_RIGHT).sum()) / max(total, 1)
    checked = min(total, 100)
    rejected = int(rng.binomial(checked, is_wrong)), checked
    held_counts = rng.multinomial(NUM_SAMPLES, world.held_out)
    everywhere = np.broadcast_to(IS_RIGHT, world.held_out.shape)
    held_out = summarize(world.held_out, held_counts, world.lengths, everywhere)
    is_solved = rng.random(NUM_PROMPTS) < (world.held_out * IS_RIGHT).sum(axis=1)
    transfers = rng.random(NUM_PROMPTS) < world.other
    names = [f"{i:03d}" for i in range(NUM_PROMPTS)]
    scores, other = (dict(zip(names, map(float, v), strict=True)) for v in (is_solved, transfers))
    return Round(samples, held_out, scores, other), funnel, rejected


def run(rng: np.random.Generator, drift: Callable[[World, int], None]) -> list[dict[str, Reading]]:
    """Return the readings of each round of one run."""
    world = build_world(rng)
    untrained, *_ = play(world, rng)
    first = before = None
    newly: list[tuple[float, float, float]] = []
    earlier_kept = np.array([], np.uint64)
    best, sampler = untrained, untrained
    found = []
    for index in range(NUM_ROUNDS):
        now, funnel, rejected = play(world, rng)  # sampled by the weights that `sampler` scored
        first = first or now
        solved = {i: own.num_correct > 0 for i, own in now.samples.prompts.items()}
        if before is not None:
            newly.append((
                np.mean([solved[i] and not before[i] for i in solved]),
                np.mean([before[i] and not solved[i] for i in solved]),
                1.0 - np.mean(list(solved.values())),
            ))  # fmt: skip
        before = solved
        drift(world, index)  # the training of the round
        after, *_ = play(world, rng)
        evidence = Evidence(
            index, now.samples, first.samples, funnel, is_graded=True,
            newly_solved=newly, earlier_kept=earlier_kept if index else None, rejected=rejected,
            votes=True, sampler_scores=sampler.scores, sampler_heldout=sampler.held_out,
            steps=world.steps, warmup_steps=world.warmup, untrained=untrained.scores,
            best=best.scores, scores=after.scores, best_name="the best",
            untrained_samples=untrained.held_out, scored_samples=after.held_out,
            other_sets={"other": (untrained.other, after.other)}, has_other_check=True,
        )  # fmt: skip
        found.append(take_readings(evidence))
        earlier_kept = np.union1d(earlier_kept, now.samples.kept_forms)
        if sum(after.scores.values()) > sum(best.scores.values()):
            best = after
        sampler = after
    return found


# --- drifts --------------------------------------------------------------------------------------


def no_drift(world: World, index: int) -> None:
    """Copies of one round."""


def sharpen(world: World, index: int) -> None:
    """Unfiltered self-training at temperature .7: p ∝ p^(1/.7), exactly, on all prompts."""
    world.train, world.held_out = (
        normalised(p ** (1 / 0.7)) for p in (world.train, world.held_out)
    )


def sharpen_slowly(world: World, index: int) -> None:
    """The same at temperature .95."""
    world.train, world.held_out = (
        normalised(p ** (1 / 0.95)) for p in (world.train, world.held_out)
    )


def split(world: World, index: int) -> None:
    """Right answers become likelier where they were likely, and vanish elsewhere."""
    likely = (world.held_out * IS_RIGHT).sum(axis=1, keepdims=True) > 0.15
    world.held_out = normalised(
        world.held_out * np.where(IS_RIGHT, np.where(likely, 1.5, 0.7), 1.0)
    )


def memorise(world: World, index: int) -> None:
    """EM on the training prompts alone: right paths become twice as likely."""
    world.train = normalised(world.train * np.where(IS_RIGHT, 2.0, 1.0))


def forget(world: World, index: int) -> None:
    """Right paths of held-out prompts lose a fifth of their weight."""
    world.held_out = normalised(world.held_out * np.where(IS_RIGHT, 0.8, 1.0))


def hack(world: World, index: int) -> None:
    """Training samples score higher, held-out ones are right less often."""
    memorise(world, index)
    forget(world, index)


def agree_on_errors(world: World, index: int) -> None:
    """Each prompt's samples gather on its likeliest path, and held-out scores fall."""
    world.train = normalised(world.train**1.3)
    forget(world, index)


def stagnate(world: World, index: int) -> None:
    """Solved prompts are solved always, the others never."""
    solved = (world.train * IS_RIGHT).sum(axis=1, keepdims=True) > 0.05
    world.train = normalised(world.train * np.where(IS_RIGHT, np.where(solved, 20.0, 1e-6), 1.0))


def one_answer(world: World, index: int) -> None:
    """The same answer gains on all prompts."""
    world.train = normalised(
        world.train * np.where(np.arange(NUM_PATHS) % NUM_ANSWERS == COMMON, 1.5, 1.0)
    )


def lose_paths(world: World, index: int) -> None:
    """Among right paths the likeliest gain; how often answers are right stays as it is."""
    right = world.train * IS_RIGHT
    sharper = right**1.4
    world.train = np.where(
        IS_RIGHT,
        sharper * (right.sum(1) / np.maximum(sharper.sum(1), 1e-300))[:, None],
        world.train,
    )


def lengthen(world: World, index: int) -> None:
    """A fifth more tokens in each round, so that more are cut."""
    world.lengths = (world.lengths * 1.2).astype(int)
    world.cut *= 1.4


def loop_in_text(world: World, index: int) -> None:
    """Twice as many repetitive completions in each round."""
    world.repetitive *= 2.0


def concentrate(world: World, index: int) -> None:
    """Nothing is deduplicated or capped; one prompt in ten is solved ever more often, the others seldom."""
    world.weights = "all"
    is_one = (np.arange(NUM_PROMPTS) % 10 == 0)[:, None]
    right = (world.train * IS_RIGHT).sum(axis=1, keepdims=True)
    goal = (right + np.where(is_one, 0.95, 0.08)) / 2
    world.train = world.train * np.where(IS_RIGHT, goal / right, (1 - goal) / (1 - right))


def starve(world: World, index: int) -> None:
    """Fewer steps in each round."""
    world.steps //= 2


def lean_on_hints(world: World, index: int) -> None:
    """The hinted share grows."""
    world.hinted = min(0.9, world.hinted + 0.1)


def fool(world: World, index: int) -> None:
    """The verifier takes more and more wrong paths for right."""
    world.accepted += 0.02


def lose_transfer(world: World, index: int) -> None:
    """The further set loses 3 % of its score."""
    world.other = world.other * 0.97


DRIFTS: dict[str, Callable[[World, int], None]] = {
    "held-out-fall": forget,
    "sharpening": split,
    "generalisation-gap": memorise,
    "coverage": stagnate,
    "distinct-ratio": sharpen,
    "distinct-correct": lose_paths,
    "answer-entropy": sharpen,
    "token-entropy": sharpen,
    "length-drift": lengthen,
    "truncation": lengthen,
    "repetition": loop_in_text,
    "concentration": concentrate,
    "starvation": starve,
    "hint-share": lean_on_hints,
    "reward-against-check": hack,
    "false-positives": fool,
    "vote-drift": agree_on_errors,
    "one-answer": one_answer,
    "transfer": lose_transfer,
    "duplicates-of-history": sharpen,
}


# --- rates ---------------------------------------------------------------------------------------


def first_alarms(
    drift: Callable[[World, int], None], num_runs: int, seed: int, names: list[str]
) -> dict[str, list[int | None]]:
    """Return, by detector, the round of the first alarm of each run, or None."""
    found: dict[str, list[int | None]] = {name: [] for name in names}
    detectors = [detector for detector in DETECTORS if detector.name in names]
    for index in range(num_runs):
        rounds = run(np.random.default_rng((seed, index)), drift)
        for detector in detectors:
            found[detector.name].append(first_round(detector, rounds))
    return found


def first_round(detector: Detector, rounds: list[dict[str, Reading]]) -> int | None:
    """Return the first round in which a detector raises an alarm."""
    return next(
        (
            i
            for i, of in enumerate(rounds)
            if detector.name in of and detector.fires(of[detector.name])
        ),
        None,
    )


def main() -> None:
    """Measure the rates, and write them down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--drifting", type=int, default=40)
    results = Path(__file__).parent / "results"
    parser.add_argument("--results", type=Path, default=results / "collapse_calibration.md")
    args = parser.parse_args()
    names = [detector.name for detector in DETECTORS]
    false = first_alarms(no_drift, args.copies, 0, names)
    of_drift: dict[Callable[[World, int], None], dict[str, list[int | None]]] = {}
    for drift in dict.fromkeys(DRIFTS.values()):
        meant = [name for name, own in DRIFTS.items() if own is drift]
        of_drift[drift] = first_alarms(drift, args.drifting, 1, meant)
    lines = [
        "# Rates of the detectors of collapse",
        "",
        f"Table policies, {NUM_PROMPTS} prompts, {NUM_SAMPLES} samples, {NUM_ROUNDS} rounds; "
        f"{args.copies} runs of copies, {args.drifting} of each drift; {DATE}. Script: "
        "`benchmarks/collapse_calibration.py`, which explains the columns.",
        "",
        "| alarm | threshold | standard errors | false alarms | drift | detected | in round (median) |",
        "|---|---|---|---|---|---|---|",
    ]
    for detector in DETECTORS:
        if detector.name not in DRIFTS:
            continue
        alarms = sum(found is not None for found in false[detector.name])
        drift = DRIFTS[detector.name]
        rounds = [found for found in of_drift[drift][detector.name] if found is not None]
        when = f"{median(rounds):g}" if rounds else "–"
        lines.append(
            f"| {detector.id} {detector.name} | {detector.threshold:g} | {detector.num_errors:g} | "
            f"{alarms / args.copies:.1%} | {drift.__name__} | {len(rounds) / args.drifting:.0%} | "
            f"{when} |"
        )
    args.results.write_text("\n".join(lines) + "\n")
    print(json.dumps({n: sum(f is not None for f in v) for n, v in false.items()}))


if __name__ == "__main__":
    main()
