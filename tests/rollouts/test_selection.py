"""Selection is a pure function of records; its counts add up. Invariants ST-… and SE-…."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_selfplay.rollouts.funnel import Funnel, OutcomeCounts, count_causes, describe_funnel
from trl_selfplay.rollouts.played import round_metrics
from trl_selfplay.rollouts.record import Rollout
from trl_selfplay.rollouts.selection import (
    Selection,
    SelectionRules,
    default_normal_form,
    select,
    unsolved_prompts,
)


def make_rollout(
    sample_index: int = 0, completion: str | None = None, reward: float | None = 1.0, **changes: Any
) -> Rollout:
    completion = f"path {sample_index}" if completion is None else completion
    rollout = Rollout(
        round_index=0,
        phase="hint" if changes.get("hinted") else "train",
        prompt_id="p0",
        sample_index=sample_index,
        prompt_ids=(1, 2),
        completion_ids=tuple(completion.encode()),
        prompt="q",
        completion=completion,
        finish="eos",
        reward=reward,
        rewards=(reward,),
    )
    return replace(rollout, **changes)


def leaks(rollout: Rollout) -> str | None:
    for reason in ("mentions_hint", "answer_only"):
        if rollout.completion.startswith(reason):
            return reason
    return None


def run_select(
    rollouts: list[Rollout],
    reward_threshold: float = 1.0,
    history: Sequence[Rollout] = (),
    beside: Sequence[Rollout] = (),
    **changes: Any,
) -> Selection:
    options: dict[str, Any] = {
        "is_correct": lambda r: r.passes(reward_threshold),
        "leak_reason": leaks,
        "normal_form": default_normal_form,
        "seed": 0,
    }
    rules = SelectionRules(**{**options, **changes})
    return select(rollouts, rules, history=history, beside=beside)


@st.composite
def rollout_sets(draw: st.DrawFn) -> list[Rollout]:
    """Up to 5 prompts with up to 8 rollouts; hinted ones are numbered after the others."""
    rollouts = []
    for prompt in range(draw(st.integers(1, 5))):
        unhinted, hinted = draw(st.integers(1, 4)), draw(st.integers(0, 4))
        for sample_index in range(unhinted + hinted):
            rollouts.append(
                make_rollout(
                    sample_index,
                    draw(
                        st.sampled_from(["a b", "A  B", "c", "d", "mentions_hint", "answer_only"])
                    ),
                    draw(st.sampled_from([None, 0.0, 0.5, 1.0, 2.0])),
                    prompt_id=f"p{prompt}",
                    finish=draw(st.sampled_from(["eos", "stop", "length"])),
                    halt=draw(st.sampled_from([None, None, None, "malformed", "tool_limit"])),
                    hinted=sample_index >= unhinted,
                )
            )
    return rollouts


def outcomes_of(selection: Selection) -> list[tuple[Rollout, str]]:
    return list(zip(selection.rollouts, selection.outcomes, strict=True))


def select_naively(rollouts: list[Rollout], threshold: float) -> dict[tuple[str, int], str]:
    """The definition, one rollout at a time, without the cap."""
    outcomes: dict[tuple[str, int], str] = {}
    passed: list[Rollout] = []
    for r in sorted(rollouts, key=lambda r: (r.prompt_id, r.sample_index)):
        if r.halt is not None:
            outcome = r.halt
        elif r.reward is None:
            outcome = "abstained"
        elif r.finish == "length":
            outcome = "truncated"
        elif r.reward < threshold:
            outcome = "failed"
        elif r.hinted and leaks(r):
            outcome = "leaked"
        elif r.completion == "d":
            outcome = "too_long"
        elif any(
            p.prompt_id == r.prompt_id
            and p.completion.lower().split() == r.completion.lower().split()
            for p in passed
        ):
            outcome = "duplicate"
        else:
            outcome = "kept"
            passed.append(r)
        outcomes[r.prompt_id, r.sample_index] = outcome
    return outcomes


@given(rollout_sets(), st.sampled_from([0.5, 1.0]))
def test_every_rollout_gets_the_outcome_that_the_definition_gives_it(
    rollouts: list[Rollout], threshold: float
) -> None:
    """ST-7, ST-8, ST-21, SE-2, RA-7, RA-11: no failed, hinted-and-wrong, cut or abstained one is kept.

    Nor is a trajectory that ended with a call that can't be read, or with one too many.
    """
    selection = run_select(rollouts, reward_threshold=threshold, fits=lambda r: r.completion != "d")
    outcomes = {(r.prompt_id, r.sample_index): outcome for r, outcome in outcomes_of(selection)}
    assert outcomes == select_naively(rollouts, threshold)


@given(rollout_sets(), st.integers(1, 3), st.integers(0, 3))
def test_counts_add_up_for_hinted_and_unhinted(
    rollouts: list[Rollout], max_per_prompt: int, seed: int
) -> None:
    """ST-19 and SE-1."""
    selection = run_select(rollouts, max_per_prompt=max_per_prompt, seed=seed)
    for hinted, counts in ((False, selection.funnel.unhinted), (True, selection.funnel.hinted)):
        assert counts.sampled == sum(r.hinted == hinted for r in rollouts)
        tally = Counter(outcome for r, outcome in outcomes_of(selection) if r.hinted == hinted)
        assert {name: getattr(counts, name) for name in tally} == dict(tally)
    assert selection.funnel.kept == len(selection.kept)
    assert (
        sum(count for _, count in selection.funnel.leak_reasons) == selection.funnel.hinted.leaked
    )
    assert selection.funnel.unhinted.leaked == 0


@given(rollout_sets(), st.randoms(use_true_random=False), st.integers(1, 3), st.integers(0, 3))
def test_permuting_the_records_changes_nothing(
    rollouts: list[Rollout], generator: random.Random, max_per_prompt: int, seed: int
) -> None:
    """SE-4 and SE-6."""
    shuffled = list(rollouts)
    generator.shuffle(shuffled)
    options = {"max_per_prompt": max_per_prompt, "seed": seed}
    one, other = run_select(shuffled, **options), run_select(rollouts, **options)
    assert (one.rollouts, one.outcomes, one.kept) == (other.rollouts, other.outcomes, other.kept)
    assert one.funnel == other.funnel


@given(rollout_sets(), st.integers(1, 3))
def test_kept_records_are_the_given_ones_in_order_of_their_ids(
    rollouts: list[Rollout], max_per_prompt: int
) -> None:
    """SE-5 and ST-8: tokens unchanged, a subset of what was graded."""
    kept = run_select(rollouts, max_per_prompt=max_per_prompt).kept
    given_by_key = {(r.prompt_id, r.sample_index): r for r in rollouts}
    assert all(r is given_by_key[r.prompt_id, r.sample_index] for r in kept)
    assert [(r.prompt_id, r.sample_index) for r in kept] == sorted(
        (r.prompt_id, r.sample_index) for r in kept
    )


@given(rollout_sets())
@settings(max_examples=50)
def test_text_of_unselected_rollouts_has_no_influence(rollouts: list[Rollout]) -> None:
    """ST-15, the part of selection: what failed can be anything."""
    before = run_select(rollouts)
    dropped = {
        (r.prompt_id, r.sample_index)
        for r, outcome in outcomes_of(before)
        if outcome in ("abstained", "truncated", "failed", "malformed", "tool_limit")
    }
    garbled = [
        replace(r, completion="garbage", completion_ids=(9,))
        if (r.prompt_id, r.sample_index) in dropped
        else r
        for r in rollouts
    ]
    assert run_select(garbled).kept == before.kept


@pytest.mark.parametrize("threshold", [-1.0, 0.0])
def test_an_abstention_is_not_kept_whatever_the_threshold(threshold: float) -> None:
    """SE-2."""
    rollouts = [make_rollout(0, reward=None), make_rollout(1, reward=0.0)]
    assert run_select(rollouts, reward_threshold=threshold).kept == (rollouts[1],)


def test_a_reward_that_is_not_a_number_fails() -> None:
    assert run_select([make_rollout(reward=float("nan"))]).funnel.unhinted.failed == 1


def test_a_completion_cut_by_length_is_not_counted_as_correct() -> None:
    """SE-7 and ST-21."""
    funnel = run_select([make_rollout(0, finish="length"), make_rollout(1)]).funnel
    assert (funnel.sampled, funnel.finished, funnel.correct, funnel.kept) == (2, 1, 1, 1)
    assert run_select([make_rollout(0, finish="length")]).kept == ()


def test_a_hinted_completion_with_a_wrong_answer_is_dropped() -> None:
    """ST-7."""
    selection = run_select([make_rollout(0, reward=0.0), make_rollout(1, reward=0.0, hinted=True)])
    assert selection.kept == ()
    assert selection.funnel.hinted.failed == 1


def test_correct_hinted_rollouts_alone_are_asked_for_leaks() -> None:
    asked = []

    def record(rollout: Rollout) -> str | None:
        asked.append(rollout.completion)
        return None

    rollouts = [
        make_rollout(0, "unhinted"),
        make_rollout(1, "wrong", 0.0, hinted=True),
        make_rollout(2, "cut", finish="length", hinted=True),
        make_rollout(3, "right", hinted=True),
    ]
    run_select(rollouts, leak_reason=record)
    assert asked == ["right"]


def test_leak_reasons_are_counted() -> None:
    rollouts = [
        make_rollout(i, f"{reason} {i}", hinted=True)
        for i, reason in enumerate(["answer_only", "mentions_hint", "mentions_hint", "fine"])
    ]
    funnel = run_select(rollouts).funnel
    assert funnel.leak_reasons == (("answer_only", 1), ("mentions_hint", 2))
    assert (funnel.rationalized, funnel.kept, funnel.correct) == (1, 1, 0)


def test_the_cap_applies_after_deduplication() -> None:
    """SE-3: ten copies and two distinct ones under a cap of two keep two distinct ones."""
    rollouts = [make_rollout(i, "copy") for i in range(10)] + [make_rollout(10, "other")]
    selection = run_select(rollouts, max_per_prompt=2)
    assert {r.completion for r in selection.kept} == {"copy", "other"}
    assert selection.funnel.unhinted.duplicate == 9


def test_equal_completions_of_different_prompts_are_no_duplicates() -> None:
    rollouts = [make_rollout(0, "same"), make_rollout(0, "same", prompt_id="p1")]
    assert len(run_select(rollouts).kept) == 2


def test_of_duplicates_the_lowest_index_stays() -> None:
    rollouts = [make_rollout(3, "A b"), make_rollout(1, " a  B\n"), make_rollout(2, "a b")]
    assert [r.sample_index for r in run_select(rollouts).kept] == [1]


def test_without_normal_form_nothing_is_a_duplicate() -> None:
    rollouts = [make_rollout(i, "copy") for i in range(3)]
    assert len(run_select(rollouts, normal_form=None).kept) == 3


def test_the_cap_draws_evenly_and_depends_on_the_seed() -> None:
    rollouts = [make_rollout(i) for i in range(5)]
    drawn = Counter(
        r.sample_index
        for seed in range(1000)
        for r in run_select(rollouts, max_per_prompt=2, seed=seed).kept
    )
    # 1,000 draws of 2 in 5: 400 each, standard deviation sqrt(1000 * 0.4 * 0.6) = 15.5
    assert all(abs(drawn[i] - 400) < 5 * 15.5 for i in range(5))


def test_the_draw_for_a_prompt_does_not_depend_on_other_prompts() -> None:
    """SE-4: so any division of the work among processes selects the same."""
    rollouts = [make_rollout(i, prompt_id=p) for p in ("p0", "p1", "p2") for i in range(6)]
    together = run_select(rollouts, max_per_prompt=2, seed=7).kept
    apart = [
        r
        for p in ("p0", "p1", "p2")
        for r in run_select(
            [r for r in rollouts if r.prompt_id == p], max_per_prompt=2, seed=7
        ).kept
    ]
    assert list(together) == apart


def test_what_does_not_fit_makes_room_for_a_shorter_duplicate() -> None:
    """Length is looked at before deduplication: white space may be all that was too much."""
    rollouts = [make_rollout(0, "a" + " " * 50 + "b"), make_rollout(1, "a b")]
    selection = run_select(rollouts, fits=lambda r: len(r.completion_ids) < 10)
    assert selection.outcomes == ("too_long", "kept")


def test_a_selection_counts_the_outcomes_that_it_is_given() -> None:
    rollouts = [make_rollout(i, prompt_id=p) for p in ("a", "b", "c") for i in (0, 1)]
    outcomes = ("kept", "failed", "unpaired", "capped", "failed", "truncated")
    given = dict(zip([(r.prompt_id, r.sample_index) for r in rollouts], outcomes, strict=True))
    selection = Selection.of(rollouts, lambda r: given[r.prompt_id, r.sample_index])
    assert selection.kept == (rollouts[0],)
    assert selection.rollouts == rollouts
    assert (selection.funnel.prompts, selection.funnel.prompts_solved) == (3, 2)
    counts = selection.funnel.unhinted.to_dict()
    assert {name: n for name, n in counts.items() if n} == Counter(outcomes)
    unsolved = ("failed", "unpaired", "capped", "truncated")
    paired = Selection.from_outcomes(selection.facts, outcomes, unsolved=unsolved)
    assert paired.funnel.prompts_solved == 1


def test_two_records_of_one_completion_are_refused() -> None:
    with pytest.raises(ValueError, match="two rollouts with sample_index 4"):
        run_select([make_rollout(4), make_rollout(4, hinted=True)])


def test_an_ungraded_rollout_is_refused() -> None:
    with pytest.raises(ValueError, match="not graded"):
        run_select([make_rollout(reward=None, rewards=())])


def test_a_prompt_with_any_passing_sample_is_not_unsolved() -> None:
    """ST-6, the part of selection."""
    rollouts = [
        make_rollout(0, reward=0.0, prompt_id="solved"),
        make_rollout(1, prompt_id="solved"),
        make_rollout(0, finish="length", prompt_id="cut"),
        make_rollout(0, reward=0.0, prompt_id="failed"),
        make_rollout(0, reward=None, prompt_id="abstained"),
        make_rollout(0, reward=0.0, prompt_id="hinted"),
        make_rollout(1, hinted=True, prompt_id="hinted"),
    ]
    assert unsolved_prompts(rollouts, 1.0) == {"cut", "failed", "abstained", "hinted"}
    assert run_select(rollouts).funnel.prompts_solved == 1
    assert run_select(rollouts).funnel.prompts == 5


@given(rollout_sets())
def test_a_funnel_survives_json(rollouts: list[Rollout]) -> None:
    funnel = run_select(rollouts, max_per_prompt=1).funnel
    flat = json.loads(json.dumps(funnel.to_dict()))
    assert all(isinstance(value, int) for value in flat.values())
    assert Funnel.from_dict(flat) == funnel
    assert flat["sampled"] + flat["hinted_sampled"] == len(rollouts)


def test_abstentions_are_counted_by_cause() -> None:
    """Those without one are only counted; of many causes, the rarest are counted together."""
    causes = ["tie"] * 5 + ["no answer"] * 2 + [None]
    rollouts = [
        make_rollout(i, str(i), None, causes=() if cause is None else (cause,))
        for i, cause in enumerate(causes)
    ]
    funnel = run_select([*rollouts, make_rollout(9, "9", 1.0)]).funnel
    assert funnel.unhinted.abstained == 8
    assert funnel.abstain_causes == (("no answer", 2), ("tie", 5))
    assert "8 abstained (5 tie, 2 no answer)" in describe_funnel(funnel)
    assert Funnel.from_dict(json.loads(json.dumps(funnel.to_dict()))) == funnel
    many = count_causes([f"error {i}" for i in range(30)] + ["tie"] * 3)
    assert dict(many)["tie"] == 3
    assert dict(many)["other causes"] == 21
    assert len(many) == 11


def test_an_empty_round_is_an_empty_funnel() -> None:
    selection = run_select([])
    assert (selection.kept, selection.outcomes) == ((), ())
    assert selection.funnel == Funnel(0, 0, OutcomeCounts())
    assert "dropped: none" in describe_funnel(selection.funnel)


def test_a_described_funnel_names_every_loss_on_one_line() -> None:
    funnel = Funnel(
        prompts=100,
        prompts_solved=40,
        unhinted=OutcomeCounts(1, 9, 900, 0, 2, 8, 5, 75),
        hinted=OutcomeCounts(failed=20, leaked=30, kept=10),
        leak_reasons=(("answer_only", 10), ("mentions_hint", 20)),
        abstain_causes=(("tie", 1),),
    )
    assert describe_funnel(funnel) == (
        "1,000 sampled + 60 with hint → 990 finished → 90 correct → 10 rationalized → 85 kept; "
        "dropped: 1 abstained (1 tie), 9 truncated, 920 failed (20 with hint), 30 leaked "
        "(20 mentions_hint, 10 answer_only), 2 too long, 8 duplicates, 5 over the cap; 40 of 100 prompts solved "
        "without hint"
    )


def test_what_a_higher_threshold_selects_is_part_of_what_a_lower_one_does_with_history() -> None:
    """RE-3: an older, better completion is not lost to a new one of the same form."""
    new = [make_rollout(0, "same path", 0.5), make_rollout(1, "other", 0.7)]
    old = [make_rollout(5, "Same  path", 0.9, round_index=-1)]
    selected = []
    for threshold in (0.3, 0.6):
        selection = run_select(
            new, history=old, best_first=True, is_correct=lambda r, t=threshold: r.reward > t
        )
        rollouts = (*selection.kept, *selection.history)
        selected.append({(r.round_index, r.sample_index) for r in rollouts})
    assert selected == [{(-1, 5), (0, 1)}] * 2


def test_what_is_trained_on_anyway_is_no_news() -> None:
    """RF-5: a completion in the form of a gold one is a duplicate, if duplicates are dropped."""
    gold = [make_rollout(-1, "Gold  path"), make_rollout(-2, "gold path 2", prompt_id="p1")]
    rollouts = [make_rollout(0, "gold path"), make_rollout(1, "gold path 2")]
    for form, kept in ((default_normal_form, [1]), (None, [0, 1])):
        selection = run_select(rollouts, normal_form=form, beside=gold)
        assert [r.sample_index for r in selection.kept] == kept


def test_trajectories_without_an_end_are_rows_of_the_funnel() -> None:
    """RA-11 and RA-7; records of runs without tools look as they did before."""
    halts = ["malformed", "malformed", "tool_limit", None, None]
    rollouts = [make_rollout(i, halt=halt) for i, halt in enumerate(halts)]
    funnel = run_select(rollouts, max_per_prompt=1).funnel
    assert (funnel.sampled, funnel.finished, funnel.correct, funnel.kept) == (5, 2, 2, 1)
    assert describe_funnel(funnel) == (
        "5 sampled → 2 finished → 2 correct → 1 kept; dropped: 1 over the cap, 2 malformed, "
        "1 at the limit of calls; 1 of 1 prompts solved"
    )
    assert Funnel.from_dict(funnel.to_dict()) == funnel
    assert funnel.to_dict()["malformed"] == 2
    assert not {"malformed", "tool_limit"} & run_select([make_rollout()]).funnel.to_dict().keys()


def test_calls_are_counted_as_grpo_counts_them() -> None:
    """Per completion; failures per call. Without tools there is nothing to tell."""
    answer, result = {"role": "assistant", "content": "a"}, {"role": "tool", "content": "r"}
    rollouts = [
        make_rollout(0, messages=(answer, result, result, answer), num_failed_calls=1),
        make_rollout(1, messages=(answer, result, answer), num_rerendered_turns=1),
        make_rollout(2, messages=(answer,)),
        make_rollout(3, messages=(answer,), halt="malformed"),
    ]
    metrics = round_metrics(run_select(rollouts), {})
    assert metrics["tools/call_frequency"] == 3 / 4
    assert metrics["tools/failure_frequency"] == 1 / 3
    assert metrics["tools/rerendered_frequency"] == 1 / 4
    assert (metrics["play/malformed"], metrics["play/tool_limit"]) == (1 / 4, 0.0)
    none_called = round_metrics(run_select(rollouts[2:]), {})
    assert (none_called["tools/call_frequency"], none_called["tools/failure_frequency"]) == (0, 0)
    assert not [name for name in round_metrics(run_select([make_rollout()]), {}) if "tool" in name]


def test_lengths_are_those_of_what_the_policy_wrote() -> None:
    mask = (True, False, False, True, True, False)
    written = make_rollout(0, "abcdef", completion_mask=mask)
    assert round_metrics(run_select([written]), {})["play/mean_length"] == 3.0
