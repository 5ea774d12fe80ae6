"""What each detector measures and when it raises an alarm. Invariants CD-1, CD-2, CD-4, CD-8, CD-10."""

import re
from dataclasses import replace
from math import inf, log2
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_selfplay.evaluation.detectors import (
    DETECTOR_OF,
    DETECTORS,
    Action,
    alarm_record,
    take_readings,
)
from trl_selfplay.evaluation.diversity import PromptSamples, RoundSamples, summarize_samples
from trl_selfplay.evaluation.evidence import Evidence
from trl_selfplay.rollouts.funnel import Funnel, OutcomeCounts
from trl_selfplay.rollouts.selection import default_normal_form as form

ROOT = Path(__file__).parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"


def fired(evidence: Evidence) -> set[str]:
    readings = take_readings(evidence)
    return {name for name, reading in readings.items() if DETECTOR_OF[name].fires(reading)}


def value(evidence: Evidence, name: str) -> float:
    return take_readings(evidence)[name].value


def round_of(make_rollout, texts, rewards=None, length=4, outcomes=()) -> RoundSamples:
    """Summarize rollouts made from a list of texts for each prompt; the text is the answer."""
    rollouts = [
        make_rollout(
            prompt_id=f"p{p}", sample_index=s, completion=text, completion_ids=(5,) * length,
            logprob=-1.0 * length, reward=1.0 if rewards is None else rewards[p][s],
        )
        for p, group in enumerate(texts)
        for s, text in enumerate(group)
    ]  # fmt: skip
    return summarize_samples(rollouts, form, 1.0, str, outcomes)


def later(first: RoundSamples, now: RoundSamples, **changes) -> Evidence:
    return replace(Evidence(2, now, first, is_graded=True), **changes)


def texts(count, prompts=40):
    return [[f"{p} {s % count}" for s in range(8)] for p in range(prompts)]


def scores(share, size=200):
    return {str(i): float(i < share * size) for i in range(size)}


# --- the table -----------------------------------------------------------------------------------


def test_names_are_slugs_and_ids_are_those_of_one_detector_each() -> None:
    assert len({d.id for d in DETECTORS}) == len(DETECTORS) == len(DETECTOR_OF)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", d.name) for d in DETECTORS)
    assert all(d.remedy.endswith(".") and d.measure.__doc__ for d in DETECTORS)


def test_an_alarm_says_round_number_interval_remedy_and_where_to_read_on(make_rollout) -> None:
    first, now = (round_of(make_rollout, texts(n)) for n in (8, 1))
    reading = take_readings(later(first, now))["distinct-ratio"]
    detector = DETECTOR_OF["distinct-ratio"]
    record = alarm_record(detector, reading, 2, Action.STOP)
    assert record == {
        "id": "D5", "name": "distinct-ratio", "value": 0.875, "low": 0.875, "high": 0.875,
        "threshold": 0.5, "action": "stop", "text": record["text"],
    }  # fmt: skip
    for part in ("round 2: 0.12 of a", "1.00 in round 0", "95 % interval", detector.remedy,
                 "docs/troubleshooting.md#alarm-distinct-ratio"):  # fmt: skip
        assert part in record["text"]


# --- silence -------------------------------------------------------------------------------------


def copies(load_script, num_runs) -> dict[str, int]:
    script = load_script(BENCHMARKS / "collapse_calibration.py")
    names = [d.name for d in DETECTORS]
    found = script.first_alarms(script.no_drift, num_runs, 3, names)
    return {name: sum(first is not None for first in own) for name, own in found.items()}


def test_copies_of_one_round_are_silent(load_script) -> None:
    """CD-1, few runs with few prompts."""
    assert max(copies(load_script, 4).values()) <= 1


@pytest.mark.full
def test_at_most_one_run_of_copies_in_twenty_has_an_alarm_of_a_detector(load_script) -> None:
    """CD-1."""
    assert max(copies(load_script, 200).values()) <= 10


def test_one_round_alone_is_compared_with_nothing(make_rollout) -> None:
    """CD-10: what remains says something of the round itself."""
    now = round_of(make_rollout, texts(1), outcomes=["kept"] * 320)
    evidence = Evidence(0, now, now, Funnel(40, 40, OutcomeCounts(kept=320)), is_graded=True)
    assert set(take_readings(evidence)) <= {"truncation", "repetition", "concentration"}
    assert fired(evidence) == set()
    assert take_readings(Evidence(3)) == {}


def test_a_change_within_two_standard_errors_is_silent_whatever_its_size(make_rollout) -> None:
    first = round_of(make_rollout, [["a", "b", "c", "d"], ["a", "b", "c", "d"]])
    now = round_of(make_rollout, [["a", "a", "a", "a"], ["a", "b", "c", "d"]])
    reading = take_readings(later(first, now))["distinct-ratio"]
    assert not DETECTOR_OF["distinct-ratio"].fires(replace(reading, value=0.9, error=0.5))
    assert DETECTOR_OF["distinct-ratio"].fires(replace(reading, value=0.9, error=0.4))
    assert not DETECTOR_OF["distinct-ratio"].fires(replace(reading, value=0.5, error=0.0))


# --- held-out scores -----------------------------------------------------------------------------


@pytest.mark.parametrize(("now", "fires"), [(0.6, False), (0.49, False), (0.4, True)])
def test_a_fall_below_the_best_round_is_told(now, fires) -> None:
    """D1: the same prompts are lost, so 2 of 200 are within three standard errors."""
    evidence = Evidence(3, best=scores(0.5), scores=scores(now), best_name="round 1")
    assert ("held-out-fall" in fired(evidence)) is fires
    assert value(evidence, "held-out-fall") == pytest.approx(0.5 - now)


def test_sharpening_is_pass_at_1_up_and_pass_at_k_down(make_rollout) -> None:
    """CD-2: half of the prompts solved nearly always, the others lost; silent where both rise."""
    rng = np.random.default_rng(0)
    names = texts(8, 60)
    before = round_of(make_rollout, names, (rng.random((60, 8)) < 0.3).astype(float).tolist())
    lost = np.array([[0.9 if p % 2 else 0.0] * 8 for p in range(60)])
    sharp = round_of(make_rollout, names, (rng.random((60, 8)) < lost).astype(float).tolist())
    better = round_of(make_rollout, names, (rng.random((60, 8)) < 0.8).astype(float).tolist())
    heard = [
        Evidence(2, untrained_samples=before.prompts, scored_samples=now.prompts)
        for now in (sharp, better)
    ]
    assert [fired(evidence) for evidence in heard] == [{"sharpening"}, set()]
    assert "pass@8" in take_readings(heard[0])["sharpening"].finding


def rates(share, prompts=100):
    return {
        str(i): PromptSamples(forms=(8,), correct_forms=(round(8 * share),), num_graded=8)
        for i in range(prompts)
    }


@pytest.mark.parametrize(("heldout", "fires"), [(0.5, True), (0.75, False)])
def test_a_gap_between_training_and_held_out_prompts_is_told(heldout, fires) -> None:
    """D3."""
    evidence = later(
        RoundSamples(rates(0.5)), RoundSamples(rates(0.75)),
        untrained_samples=rates(0.5), sampler_heldout=rates(heldout),
    )  # fmt: skip
    assert value(evidence, "generalisation-gap") == pytest.approx(0.75 - heldout)
    assert ("generalisation-gap" in fired(evidence)) is fires


@pytest.mark.parametrize(
    ("reward", "check", "fires"), [(0.75, 0.3, True), (0.75, 0.6, False), (0.5, 0.3, False)]
)
def test_a_reward_that_rises_while_another_check_falls_is_told(reward, check, fires) -> None:
    """D15."""
    sides = [
        RoundSamples({i: replace(own, total_reward=8.0 * r) for i, own in rates(0.5).items()})
        for r in (0.5, reward)
    ]
    evidence = later(*sides, untrained=scores(0.5), scores=scores(check))
    assert "reward-against-check" not in take_readings(evidence)
    evidence.has_other_check = True
    assert ("reward-against-check" in fired(evidence)) is fires


@pytest.mark.parametrize(
    ("now", "check", "fires"), [((8,), 0.3, True), ((8,), 0.6, False), ((2, 6), 0.3, False)]
)
def test_votes_that_agree_more_on_worse_answers_are_told(now, check, fires) -> None:
    """D17."""
    sides = [
        RoundSamples({str(i): PromptSamples(forms=(8,), answers=a) for i in range(50)})
        for a in ((6, 2), now)
    ]
    evidence = later(*sides, untrained=scores(0.5), scores=scores(check), votes=True)
    assert ("vote-drift" in fired(evidence)) is fires


def test_the_worst_of_the_further_sets_is_told() -> None:
    """D19."""
    sets = {"a": (scores(0.5), scores(0.48)), "b": (scores(0.5), scores(0.3))}
    evidence = Evidence(1, other_sets=sets)
    assert fired(evidence) == {"transfer"}
    assert "'b'" in take_readings(evidence)["transfer"].finding


def test_a_sure_fall_is_told_beside_a_larger_unsure_one() -> None:
    """D19."""
    few = {str(i): float(i % 2) for i in range(10)}
    unsure = (few, {**few, "0": 1.0, "1": 0.0, "3": 0.0, "5": 0.0, "7": 0.0})
    for names in (("few", "sure"), ("sure", "few")):
        falls = {"few": unsure, "sure": (scores(0.5), scores(0.35))}
        evidence = Evidence(1, other_sets={name: falls[name] for name in names})
        assert fired(evidence) == {"transfer"}
        assert value(evidence, "transfer") == pytest.approx(0.15)
    risen = {"a": (scores(0.3), scores(0.4)), "b": (scores(0.3), scores(0.3))}
    assert value(Evidence(1, other_sets=risen), "transfer") == 0.0
    sudden = (scores(1.0), scores(0.0))  # of all alike, so without a standard error
    evidence = Evidence(1, other_sets={"a": falls["sure"], "b": sudden})
    assert value(evidence, "transfer") == 1.0


# --- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("history", "count"),
    [
        ([(0.05, 0.0, 0.5), (0.0, 0.0, 0.5)], 1),
        ([(0.0, 0.0, 0.5), (0.005, 0.1, 0.5)], 2),
        ([(0.0, 0.0, 0.5), (0.02, 0.0, 0.5)], 0),
        ([(0.0, 0.0, 0.0), (0.0, 0.0, 0.0)], 0),  # all are solved
    ],
)
def test_two_rounds_that_solve_hardly_any_prompt_anew_are_told(history, count) -> None:
    """D4."""
    evidence = Evidence(3, newly_solved=history)
    assert value(evidence, "coverage") == count
    assert ("coverage" in fired(evidence)) == (count == 2)


def test_a_collapse_onto_one_text_is_told(make_rollout) -> None:
    """D5 and D6."""
    first, now = (round_of(make_rollout, texts(n)) for n in (6, 1))
    assert {"distinct-ratio", "distinct-correct"} <= fired(later(first, now))


def test_newly_solved_prompts_do_not_look_like_lost_paths(make_rollout) -> None:
    """CD-4: the new ones are hard, with one path each."""
    solved, hard = [1.0] * 8, [1.0] + [0.0] * 7
    first = round_of(make_rollout, texts(8, 4), [solved, solved, [0.0] * 8, [0.0] * 8])
    now = round_of(make_rollout, texts(8, 4), [solved, solved, hard, hard])
    assert value(later(first, now), "distinct-correct") == 0.0


@pytest.mark.parametrize("name", ["distinct-ratio", "answer-entropy", "token-entropy"])
@pytest.mark.parametrize(("sampler", "fires"), [(0.5, True), (0.8, False)])
def test_less_diversity_is_told_unless_the_model_has_learnt(name, sampler, fires) -> None:
    """D5, D7 and D8."""
    sides = [
        RoundSamples({
            str(i): PromptSamples(
                forms=forms, answers=answers, logprob=-80.0 * nats, num_logprob_tokens=80
            )
            for i in range(40)
        })
        for forms, answers, nats in (((1,) * 8, (2, 2, 2, 2), 0.5), ((8,), (7, 1), 0.2))
    ]  # fmt: skip
    evidence = later(*sides, untrained=scores(0.5), sampler_scores=scores(sampler))
    assert (name in fired(evidence)) is fires
    assert value(evidence, "token-entropy") == pytest.approx(0.6)
    unknown = replace(evidence, is_graded=False, untrained=None)  # as SPIN's without graders
    assert name not in fired(unknown)


def test_without_held_out_prompts_the_rewards_tell_whether_the_model_has_learnt() -> None:
    sides = [
        RoundSamples({
            str(i): PromptSamples(forms=(8,), answers=answers, num_graded=8, total_reward=total)
            for i in range(40)
        })
        for answers, total in (((2, 2, 2, 2), 2.0 + 0.0), ((7, 1), 7.0))
    ]  # fmt: skip
    assert "answer-entropy" not in fired(later(*sides))
    sides[1] = sides[0].__class__(
        {i: replace(s, total_reward=2.0) for i, s in sides[1].prompts.items()}
    )
    assert "answer-entropy" in fired(later(*sides))


@pytest.mark.parametrize(("length", "speaks"), [(4, False), (9, True), (1, True), (7, False)])
def test_lengths_are_told_beyond_half_and_double(make_rollout, length, speaks) -> None:
    """D9."""
    first, now = (round_of(make_rollout, texts(8, 10), length=n) for n in (4, length))
    evidence = later(first, now)
    assert value(evidence, "length-drift") == pytest.approx(abs(log2(length / 4)))
    assert ("length-drift" in fired(evidence)) is speaks


def test_one_answer_to_all_prompts_is_told() -> None:
    """D17b: the most frequent answer may be another one than in round 0."""
    sides = [
        RoundSamples({
            str(i): PromptSamples(forms=(8,), answers=(top, 8 - top), num_top=top if i % 2 else 0)
            for i in range(60)
        })
        for top in (1, 6)
    ]  # fmt: skip
    assert value(later(*sides), "one-answer") == pytest.approx(0.75 / 2 - 0.125 / 2)
    assert "one-answer" in fired(later(*sides))


@pytest.mark.parametrize("seed", range(5))
def test_drift_estimates_the_divergence_and_is_never_negative(seed) -> None:
    """CD-7: 0 for equal weights; on average over draws, KL(p_t ‖ p_0) of two distributions."""
    rng = np.random.default_rng(seed)
    now, base = rng.dirichlet([1.0] * 6, 2)
    pairs = list(zip(np.log(now), np.log(base), strict=True))
    values = [value(Evidence(1, log_probs=[pair]), "drift-from-base") for pair in pairs]
    assert min(values) >= 0.0
    assert float(now @ values) == pytest.approx(float(now @ np.log(now / base)))
    assert value(Evidence(1, log_probs=[(-3.0, -3.0)] * 4), "drift-from-base") == 0.0


# --- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize(("truncated", "warns"), [(10, False), (11, True)])
def test_more_than_a_tenth_cut_by_length_is_told(truncated, warns) -> None:
    """D10."""
    funnel = Funnel(20, 5, OutcomeCounts(truncated=truncated, kept=100 - truncated))
    assert fired(Evidence(2, funnel=funnel)) == ({"truncation"} if warns else set())
    assert take_readings(Evidence(0, funnel=Funnel(0, 0, OutcomeCounts()))) == {}


@pytest.mark.parametrize(
    ("hinted", "unhinted", "warns"), [(50, 50, False), (60, 50, True), (0, 0, False)]
)
def test_more_than_half_hinted_is_told(hinted, unhinted, warns) -> None:
    """D14."""
    funnel = Funnel(20, 5, OutcomeCounts(kept=unhinted), OutcomeCounts(kept=hinted))
    assert ("hint-share" in fired(Evidence(0, funnel=funnel))) is warns


@pytest.mark.parametrize("part", [1.0, 0.9])
@pytest.mark.parametrize("count", [1, 2, 9, 10, 100])
def test_a_share_of_few_completions_is_silent(part, count) -> None:
    """D10, D14, D16: a share of 1 has a standard error as well."""
    hit = max(1, round(part * count))
    funnel = Funnel(20, 5, OutcomeCounts(truncated=hit, kept=count - hit), OutcomeCounts(kept=hit))
    evidence = Evidence(0, funnel=replace(funnel, hinted=OutcomeCounts()), rejected=(hit, count))
    hinted = Evidence(0, funnel=Funnel(20, 5, OutcomeCounts(kept=count - hit), funnel.hinted))
    expected = {"truncation", "false-positives"} if count >= 10 else set()
    assert fired(evidence) == expected
    assert fired(hinted) == ({"hint-share"} if count >= 10 else set())
    reading = take_readings(hinted)["hint-share"]
    assert reading.error == pytest.approx((reading.high - reading.low) / 3.92)
    assert reading.error > 0.0


@given(st.integers(0, 50), st.integers(0, 50))
def test_starvation_is_told_exactly_with_fewer_steps_than_warm_up(steps, warmup_steps) -> None:
    """ST-17 and CD-8."""
    evidence = Evidence(3, steps=steps, warmup_steps=warmup_steps)
    assert ("starvation" in fired(evidence)) == (steps < warmup_steps)


def test_starvation_tells_how_far_the_rate_gets() -> None:
    """ST-17: the paper's first round ends at 0.4 of the rate."""
    assert "40%" in take_readings(Evidence(0, steps=40, warmup_steps=100))["starvation"].finding


def test_repetition_concentration_and_duplicates_are_counted_among_the_kept() -> None:
    """D11, D12, D20."""
    now = RoundSamples({}, {"a": 90, **{str(i): 1 for i in range(10)}}, 6)
    now.kept_forms = np.arange(100, dtype=np.uint64)
    evidence = Evidence(1, now, earlier_kept=np.arange(4, 300, dtype=np.uint64))
    assert value(evidence, "repetition") == pytest.approx(0.06)
    assert value(evidence, "concentration") == pytest.approx(1 - 100**2 / 8110 / 11)
    assert value(evidence, "duplicates-of-history") == pytest.approx(0.96)
    assert fired(evidence) == {"repetition", "concentration", "duplicates-of-history"}


@pytest.mark.parametrize(("rejected", "fires"), [(10, False), (15, True)])
def test_kept_completions_that_another_verifier_rejects_are_told(rejected, fires) -> None:
    """D16."""
    assert ("false-positives" in fired(Evidence(0, rejected=(rejected, 100)))) is fires


def test_the_page_on_collapse_has_each_detector_as_it_is() -> None:
    page = (ROOT / "docs/collapse.md").read_text()
    rows = re.findall(r"^\| (D\d+b?) \| `(.+?)` \| (.+?) \| (.+?) \| (.+) \|$", page, re.M)
    limits = ["none" if d.threshold == inf else f"{d.threshold:g}" for d in DETECTORS]
    assert rows == [
        (d.id, d.name, d.value, limit, d.remedy) for d, limit in zip(DETECTORS, limits, strict=True)
    ]
