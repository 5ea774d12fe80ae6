"""The table of detectors of collapse, and when a reading raises an alarm.

In: `Evidence` of a round, filled as the round goes on. Out: a `Reading` per detector, warnings as text, and
records for rounds.jsonl. An alarm needs a value above its threshold and above two of its standard errors, or three where
that is the only bound. A share has to be that of at least 10. The thresholds come from
benchmarks/collapse_calibration.py.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import Any

from trl_selfplay.evaluation import heldout_measures, sample_measures
from trl_selfplay.evaluation.evidence import Evidence, Reading


class Action(StrEnum):
    """What an alarm does."""

    IGNORE = "ignore"
    """Nothing; its number is still recorded."""
    WARN = "warn"
    """Log a warning."""
    STOP = "stop"
    """Log a warning, and end the run after the round. The run can be resumed."""
    BEST_ROUND = "best_round"
    """The same, and load the weights with the best held-out score."""


@dataclass(frozen=True, slots=True)
class Detector:
    """One detector.

    Attributes:
        id: Its number in the table.
        name: Its name in rounds.jsonl, in `alarm_actions` and as an anchor in docs/troubleshooting.md.
        measure: Returns its reading, or None without evidence.
        value: What the value is, for the documentation.
        threshold: An alarm needs a value above it …
        num_errors: … and above this many of its standard errors.
        remedy: What to do.
        action: What an alarm does by default.
    """

    id: str
    name: str
    measure: Callable[[Evidence], Reading | None]
    value: str
    threshold: float
    remedy: str
    num_errors: float = 2.0
    action: Action = Action.WARN

    def fires(self, reading: Reading) -> bool:
        """Return whether a reading raises an alarm."""
        is_sure = reading.value > self.num_errors * reading.error
        return reading.counts and is_sure and reading.value > self.threshold


_MORE_DIVERSE = (
    "Raise temperature, deduplicate, lower max_per_prompt, or train each round from the base "
    "(start_from='base')."
)
_READ = "Read some: is the reward met by length alone? max_completion_length bounds them."

DETECTORS: tuple[Detector, ...] = (
    Detector(
        "D1",
        "held-out-fall",
        heldout_measures.measure_heldout_fall,
        "held-out score of the best round so far minus this one's",
        0.0,
        "Stop, and keep the best round (load_best_round_at_end, stop_after_rounds_without_gain); or "
        "lower the learning rate.",
        num_errors=3.0,
    ),
    Detector(
        "D2",
        "sharpening",
        heldout_measures.measure_sharpening,
        "fall of held-out pass@k since before training, while pass@1 has risen",
        0.0,
        _MORE_DIVERSE,
    ),
    Detector(
        "D3",
        "generalisation-gap",
        heldout_measures.measure_gap,
        "growth of pass@1 on training prompts minus pass@1 on held-out ones since round 0",
        0.1,
        "Train fewer steps, add prompts, or stop.",
    ),
    Detector(
        "D4",
        "coverage",
        sample_measures.measure_coverage,
        "rounds in a row in which under 1 % of the prompts are newly solved",
        1.0,
        "Sample more (num_generations), add easier prompts, or show hints (rationalize=True).",
    ),
    Detector(
        "D5",
        "distinct-ratio",
        sample_measures.measure_distinct,
        "relative fall of distinct completions per sample since round 0, without a higher score",
        0.5,
        _MORE_DIVERSE,
    ),
    Detector(
        "D6",
        "distinct-correct",
        sample_measures.measure_distinct_correct,
        "relative fall of distinct correct completions per solved prompt since round 0",
        0.3,
        _MORE_DIVERSE,
    ),
    Detector(
        "D7",
        "answer-entropy",
        sample_measures.measure_answer_entropy,
        "relative fall of the entropy of a prompt's answers since round 0, without a higher score",
        0.15,
        _MORE_DIVERSE,
    ),
    Detector(
        "D8",
        "token-entropy",
        sample_measures.measure_token_entropy,
        "relative fall of the entropy per token since round 0, without a higher score",
        0.15,
        "Train fewer steps, or lower the learning rate.",
    ),
    Detector(
        "D9",
        "length-drift",
        sample_measures.measure_length_drift,
        "log2 of mean tokens per completion over those of round 0, without its sign",
        1.0,
        _READ,
    ),
    Detector(
        "D10",
        "truncation",
        sample_measures.measure_truncation,
        "share of completions cut by length",
        0.1,
        "Raise max_completion_length, set stop_strings, or check that the model knows its EOS token.",
    ),
    Detector(
        "D11",
        "repetition",
        sample_measures.measure_repetition,
        "share of kept completions that repeat themselves",
        0.02,
        "Let a reward function reject such completions, or lower the learning rate.",
    ),
    Detector(
        "D12",
        "concentration",
        sample_measures.measure_concentration,
        "one minus the effective share of the prompts that have kept completions",
        0.5,
        "Lower max_per_prompt.",
    ),
    Detector(
        "D13",
        "starvation",
        sample_measures.measure_starvation,
        "share of the warm-up that is not reached",
        0.0,
        "Lower warmup_steps, or sample more (num_generations, num_prompts_per_round). STaR's first "
        "rounds are so by design (STaRConfig.from_paper).",
    ),
    Detector(
        "D14",
        "hint-share",
        sample_measures.measure_hint_share,
        "share of kept completions that were sampled with a hint",
        0.5,
        "Reaching an answer that is shown proves little: read some of them, and consider "
        "rationalize=False or more samples without hint (num_generations).",
    ),
    Detector(
        "D15",
        "reward-against-check",
        heldout_measures.measure_reward_against_check,
        "fall of the held-out score under eval_reward_funcs, while the reward has risen",
        0.0,
        "The reward is exploited: freeze or retrain the reward model, or stop.",
    ),
    Detector(
        "D16",
        "false-positives",
        sample_measures.measure_false_positives,
        "share of kept completions that eval_reward_funcs reject",
        0.1,
        "Read some of them, and mend the reward function before you train on more.",
    ),
    Detector(
        "D17",
        "vote-drift",
        heldout_measures.measure_vote_drift,
        "fall of the held-out score of a run without labels, while agreement has risen",
        0.0,
        "Stop rounds without labels, or raise the threshold of the vote.",
    ),
    Detector(
        "D17b",
        "one-answer",
        sample_measures.measure_one_answer,
        "rise of the share of the most frequent answer to all prompts since round 0",
        0.1,
        "Read some completions: does the reward accept that answer everywhere? Lower max_per_prompt.",
    ),
    Detector(
        "D18",
        "drift-from-base",
        sample_measures.measure_drift,
        "estimate of KL(now ‖ before round 0), nats per completion; only recorded",
        inf,
        "Train each round from the base (start_from='base').",
        action=Action.IGNORE,
    ),
    Detector(
        "D19",
        "transfer",
        heldout_measures.measure_transfer,
        "surest fall of the score of a further held-out set since before training",
        0.0,
        "Train each round from the base (start_from='base'), mix in other data, or use adapters.",
        num_errors=3.0,
    ),
    Detector(
        "D20",
        "duplicates-of-history",
        sample_measures.measure_duplicates,
        "share of kept completions that an earlier round kept too",
        0.95,
        "Nothing new is learnt: stop, add prompts, or raise temperature.",
    ),
)

DETECTOR_OF: dict[str, Detector] = {detector.name: detector for detector in DETECTORS}
WHERE = "docs/troubleshooting.md#alarm-"


def take_readings(evidence: Evidence, known: Iterable[str] = ()) -> dict[str, Reading]:
    """Return the readings of the detectors whose evidence is there, by name, without those known."""
    skipped = set(known)
    found: dict[str, Reading] = {}
    for detector in DETECTORS:
        reading = None if detector.name in skipped else detector.measure(evidence)
        if reading is not None:
            found[detector.name] = reading
    return found


def warning_text(detector: Detector, reading: Reading, round_index: int) -> str:
    """Return what is logged of an alarm."""
    return f"round {round_index}: {reading.finding}. {detector.remedy} See {WHERE}{detector.name}."


def alarm_record(
    detector: Detector, reading: Reading, round_index: int, action: Action
) -> dict[str, Any]:
    """Return what rounds.jsonl records of an alarm."""
    return {
        "id": detector.id,
        "name": detector.name,
        "value": reading.value,
        "low": reading.low,
        "high": reading.high,
        "threshold": detector.threshold,
        "action": str(action),
        "text": warning_text(detector, reading, round_index),
    }
