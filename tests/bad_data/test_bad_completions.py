"""Whatever a model writes, verifiers score it, and selection and rows keep its tokens."""

import math

import pytest
import strategies as data
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tiny_models import byte_tokenizer

from trl_selfplay.rewards import choice_reward, equations_reward, exact_reward, math_reward
from trl_selfplay.rollouts.record import load_rollouts, save_rollouts
from trl_selfplay.rollouts.rows import build_training_rows
from trl_selfplay.rollouts.selection import (
    SelectionRules,
    default_normal_form,
    reasoning_path,
    select,
)
from trl_selfplay.trainers.star.rationalization import find_leak

PROFILE = settings(
    derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
SOLUTIONS = st.one_of(st.sampled_from(("7", "#### 7", "b", "x + 1")), data.ANY_TEXTS)
# What models put around an answer.
WRITTEN = st.lists(
    st.one_of(st.sampled_from(("The answer is ", "7", " = ", "<<3+4=7>>")), data.COMPLETIONS),
    max_size=4,
).map("".join)


def try_verifiers(examples: int) -> None:
    @settings(PROFILE, max_examples=examples)
    @given(st.lists(WRITTEN, min_size=1, max_size=3), SOLUTIONS)
    def attempt(completions, solution) -> None:
        columns = {
            "solution": [solution] * len(completions),
            "prompts": ["Q 3 + 4?\n(a) 6\n(b) 7"] * len(completions),
        }
        for verifier in (exact_reward, choice_reward, math_reward, equations_reward):
            scores = list(verifier(completions=completions, **columns))
            assert len(scores) == len(completions), verifier
            assert all(s is None or 0.0 <= s <= 1.0 for s in scores), (verifier, scores)
            alone = [
                list(
                    verifier(completions=completions[:1], **{k: v[:1] for k, v in columns.items()})
                )
            ]
            assert alone[0] == scores[:1], verifier  # nothing of the others
        for completion in completions:
            assert find_leak(columns["prompts"][0], completion, solution) in (
                None, "hint_marker", "mentions_hint", "answer_only", "answer_first"
            )  # fmt: skip
            hash((default_normal_form(completion), reasoning_path(completion)))

    attempt()


@pytest.mark.slow
@pytest.mark.usefixtures("patient_graders")  # alone and with others, the same ones get a verdict
def test_verifiers_score_whatever_a_model_writes() -> None:
    try_verifiers(examples=10)


@pytest.mark.full
def test_verifiers_score_whatever_a_model_writes_often() -> None:
    try_verifiers(examples=2000)


def try_rows(make_rollout, path, examples: int) -> None:
    tokenizer = byte_tokenizer()
    eos = tokenizer.eos_token_id

    def ids_of(text: str, most: int, has_ended: bool) -> tuple[int, ...]:
        ids = tokenizer(text[:most])["input_ids"][:most]  # a character has a token or more
        return (*ids, *[eos] * has_ended)

    @settings(PROFILE, max_examples=examples)
    @given(
        st.lists(
            st.tuples(data.ANY_TEXTS, st.sampled_from((None, 0.0, 1.0)), st.booleans()),
            min_size=1,
            max_size=6,
        ),
        st.none() | st.integers(1, 3),
        st.integers(8, 200),
    )
    def attempt(written, cap, budget) -> None:
        rollouts = []
        for index, (text, reward, has_ended) in enumerate(written):
            ids = ids_of(text, budget, has_ended)
            rollouts.append(
                make_rollout(
                    prompt_id=f"{index % 2:032x}", sample_index=index, completion_ids=ids,
                    completion=text, finish="eos" if has_ended else "length", reward=reward,
                    rewards=(reward,),
                )
            )  # fmt: skip
        save_rollouts(path, rollouts)
        rollouts = load_rollouts(path)
        assert [(r.completion, r.completion_ids) for r in rollouts] == [
            (text, ids_of(text, budget, ended)) for text, _, ended in written
        ]
        rules = SelectionRules(
            is_correct=lambda r: r.reward is not None and r.reward >= 1.0, seed=0, max_per_prompt=cap,
            fits=lambda r: 3 + len(r.completion_ids) <= budget,
        )  # fmt: skip
        kept = select(rollouts, rules).examples
        prompts = {f"{i:032x}": (5, 6, 7) for i in range(2)}
        rows = build_training_rows(kept, prompts, eos, seed=0)
        may_train = [
            (5, 6, 7, *r.completion_ids)
            for r in rollouts
            if r.reward == 1.0 and r.finish == "eos" and 3 + len(r.completion_ids) <= budget
        ]
        most = 2 * (cap or math.inf)
        found = [tuple(row["input_ids"]) for row in rows]
        assert len(found) <= min(most, len(may_train))
        assert set(found) <= set(may_train)
        assert bool(found) == bool(may_train)
        assert all(row["labels"] == [-100] * 3 + row["input_ids"][3:] for row in rows)

    attempt()


@pytest.mark.slow
def test_rows_hold_the_tokens_of_whatever_was_selected(make_rollout, tmp_path) -> None:
    try_rows(make_rollout, tmp_path / "shard.parquet", examples=30)


@pytest.mark.full
def test_rows_hold_the_tokens_of_whatever_was_selected_often(make_rollout, tmp_path) -> None:
    try_rows(make_rollout, tmp_path / "shard.parquet", examples=2000)
