"""Rounds of an agent: each step of a trajectory is a training example. Invariants RA-…."""

import json
from collections import Counter, defaultdict

import pytest
from datasets import load_from_disk
from fact_agent import FactAgent, fact, questions
from tiny_rewards import contains_solution

from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.tools.agent import MalformedAction
from trl_selfplay.tools.record import ToolResult

SETTINGS = {"num_rounds": 2, "num_generations": 2, "max_completion_length": 16, "temperature": 1.0}


def prefers_low_digits(completions, step_kind, question, **kwargs):
    """Rank a step's samples by their first word."""
    assert {"solution", "gold"}.isdisjoint(kwargs)
    words = [(c.split() or ["none"])[0] for c in completions]
    return [9.0 - int(w) if w.isdigit() else 100.0 for w in words]


@pytest.fixture
def build(build_rest_em):
    def build_one(folder="run", *, agent=None, **changes):
        given = {"train_dataset": questions(), "reward_funcs": None, **SETTINGS, **changes}
        return build_rest_em(folder, agent=agent or FactAgent(), **given)

    return build_one


def read_lines(trainer):
    return [json.loads(line) for line in trainer.run.lines_path.read_text().splitlines()]


def steps_of(trainer, round_index):
    """Return the samples of each step number, by prompt text: trajectories may share a prompt."""
    folder, steps = trainer.run.folder(round_index) / "samples", []
    while (folder / f"step{len(steps)}-plan.json").exists():
        found = defaultdict(list)
        for path in sorted(folder.glob(f"step{len(steps)}-[0-9]*.parquet")):
            for rollout in load_rollouts(path):
                found[rollout.prompt_id].append(rollout)
        steps.append(list(found.values()))
    return steps


def observed(tool, call):
    try:
        return ToolResult(call.name, tool(**call.arguments))
    except LookupError as error:
        return ToolResult(call.name, str(error), failed=True)


class Replay:
    """The algorithm once more, from the samples on disk: what goes on, what is trained on, what is asked."""

    def __init__(self, trainer, round_index, rank=None) -> None:
        tokenizer = trainer.processing_class
        agent, self.examples, self.changed, self.num_calls = FactAgent(), [], 0, 0
        self.failures, self.kinds, self.prompts = Counter(), Counter(), Counter()
        states = [
            agent.begin(row["prompt"])
            for row in questions()
            for _ in range(trainer.args.num_generations)
        ]
        for groups in steps_of(trainer, round_index):
            by_prompt = defaultdict(list)
            for group in groups:
                assert [r.sample_index for r in group] == list(range(agent.num_step_samples))
                by_prompt[group[0].prompt].append(group)
            asked = [agent.next_step(state, few_shot=False) for state in states]
            assert Counter(step.prompt for step in asked) == Counter(g[0].prompt for g in groups)
            same = {step.prompt: (step, state) for step, state in zip(asked, states, strict=True)}
            states = [
                after
                for step, before in same.values()
                for group in by_prompt[step.prompt]
                for after in self._play(agent, before, step, group, rank, tokenizer)
            ]
            states = [s for s in states if agent.next_step(s, few_shot=False) is not None]
        assert not states

    def _play(self, agent, state, step, group, rank, tokenizer):
        means = [r.logprob / len(r.completion_ids) for r in group]
        first = means.index(max(means))  # the lowest index of the highest
        moves = []
        for rollout in group:
            try:
                moves.append(None if rollout.is_truncated else agent.act(state, rollout.completion))
            except MalformedAction:
                moves.append(None)
        self.prompts[step.prompt] += 1
        if moves[first] is None:
            self.failures[step.kind] += not group[first].is_truncated
            return
        target = first
        if rank is not None:
            scores = rank([r.completion for r in group], step_kind=None, question=None)
            scores = [s if m is not None else -1.0 for s, m in zip(scores, moves, strict=True)]
            best = max(scores)
            target = first if scores[first] == best else scores.index(best)
            self.changed += target != first
        self.kinds[step.kind] += 1
        ids = list(group[target].completion_ids)
        if group[target].finish == "stop":
            ids.append(tokenizer.eos_token_id)
        prompt_ids = tokenizer(step.prompt)["input_ids"]
        self.examples.append(((*prompt_ids, *ids), (*[-100] * len(prompt_ids), *ids)))
        move = moves[first]
        if move.call is None:
            yield move.state
        else:
            self.num_calls += 1
            yield agent.observe(move.state, observed(fact, move.call))


@pytest.mark.parametrize("rank", [None, prefers_low_digits], ids=["perplexity", "ranked"])
def test_each_step_is_an_example_whose_prompt_is_the_state_and_whose_target_is_the_best(
    build, recorder, rank
) -> None:
    """RA-1, RA-2, RA-3, RA-4, RA-5, RA-9, RA-11, RA-13, and what is logged."""
    trainer = build(reward_funcs=rank, callbacks=[recorder])
    trainer.train()
    asked = []
    for round_index, line in enumerate(read_lines(trainer)):
        replay = Replay(trainer, round_index, rank)
        rows = load_from_disk(trainer.run.folder(round_index) / "dataset")
        found = [(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows]
        assert Counter(found) == Counter(replay.examples)
        assert len(found) == sum(replay.kinds.values()) == line["examples"]
        metrics = line["metrics"]
        for kind in ("look", "answer"):
            assert metrics[f"select/examples/{kind}"] == replay.kinds[kind]
            assert metrics[f"play/parse_failures/{kind}"] == replay.failures[kind]
        assert metrics["play/calls_per_question"] == replay.num_calls / 6
        share = replay.changed / len(replay.examples)
        assert metrics["select/targets_changed"] == pytest.approx(share)
        asked.append({p: n for p, n in replay.prompts.items() if p in set(first_prompts())})
    assert asked == [dict.fromkeys(first_prompts(), 2)] * 2  # RA-9
    assert rank is None or replay.changed
    first, second = recorder.weights_at_train_begin  # RA-13: both from the base
    assert all((first[name] == second[name]).all() for name in first)


def first_prompts():
    agent = FactAgent()
    return [
        agent.next_step(agent.begin(row["prompt"]), few_shot=False).prompt for row in questions()
    ]


@pytest.mark.slow
def test_a_student_learns_the_steps_and_asks_no_tool(
    build, tmp_path, tiny_model, byte_tokenizer, word_tokenizer
) -> None:
    """RA-14 for steps: as stored; and with another tokenizer, as texts."""

    def rows(folder, index):
        found = load_from_disk(str(folder / "_rounds" / f"round-{index:03d}" / "dataset"))
        return sorted((row["input_ids"], row["labels"]) for row in found.to_list())

    def texts(rows, tokenizer):
        decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in rows]
        return Counter(" ".join(text.split()) for text in decoded)

    heldout = {
        "eval_dataset": questions(2, first=6, solution=str), "eval_reward_funcs": contains_solution,
        "num_generations_eval": 0,
    }  # fmt: skip
    build(**heldout).train()
    of_policy = rows(tmp_path / "run", 1)
    assert of_policy
    agent = FactAgent(tool=fact)
    for name, tokenizer in (("same", word_tokenizer), ("other", byte_tokenizer)):
        small = tmp_path / name
        tiny_model(tokenizer, hidden_size=16).save_pretrained(small)
        tokenizer.save_pretrained(small)
        out = tmp_path / f"student-{name}"
        trainer = build(
            agent=agent, student_model=str(small), student_args={"output_dir": str(out)}, **heldout
        )

        def refuse(*args):
            raise AssertionError("a sampler or a tool was asked")

        trainer.self_play.collector.sampler.sample = refuse
        trainer.self_play.tools.call = refuse
        trainer.train(resume_from_checkpoint=True)
        of_student = rows(out, 0)
        if name == "same":
            assert of_student == of_policy
        assert texts(of_student, tokenizer) == texts(of_policy, word_tokenizer)
        assert len(list((out / "_rounds").glob("*/evaluation/greedy-00000.parquet"))) == 2
