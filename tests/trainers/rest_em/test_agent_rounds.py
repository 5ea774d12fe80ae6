"""Rounds of an agent: each step of a trajectory is a training example. Invariants RA-…."""

import json
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace

import agent_process
import pyarrow.parquet as pq
import pytest
import torch
import trl
from bigram_policy import family_template
from datasets import concatenate_datasets, load_from_disk
from fact_agent import FactAgent, capital_of_birth, questions
from facts import fact, look
from patience import ENDS_S
from tiny_rewards import contains_solution

from trl_selfplay.disk import followed
from trl_selfplay.generation.random_streams import stream_key
from trl_selfplay.generation.sampler import SampledCompletion
from trl_selfplay.inspection.run_folder import RunFolder
from trl_selfplay.rewards import JudgeReward, exact_reward
from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.rounds import stepwise
from trl_selfplay.rounds.empty_round import EmptyRoundError
from trl_selfplay.rounds.regrading import take_scores_back
from trl_selfplay.rounds.steps import StepPrompts, load_steps
from trl_selfplay.tools.agent import MalformedAction
from trl_selfplay.tools.record import ToolResult
from trl_selfplay.tools.search_agent import SearchAgent

SETTINGS = {
    "num_rounds": 2, "num_generations": 2, "max_completion_length": 16, "temperature": 1.0,
    "tool_deadline": ENDS_S,
}  # fmt: skip


judge = JudgeReward(
    "policy", against="samples", template="{first} A {second} so", verdict=r".*?\b(A|so)\b.*",
    max_completion_length=16,
)  # fmt: skip


def prefers_low_digits(completions, step_kind, question, **kwargs):
    """Rank a step's samples by their first word."""
    assert {"solution", "gold"}.isdisjoint(kwargs)
    words = [(c.split() or ["none"])[0] for c in completions]
    return [9.0 - int(w) if w.isdigit() else 100.0 for w in words]


def grade(completions, solution, **kwargs):
    return [float(c == s) for c, s in zip(completions, solution, strict=True)]


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


@pytest.mark.parametrize(
    "rank",
    [pytest.param(None, id="perplexity", marks=pytest.mark.slow), prefers_low_digits],
)
def test_each_step_is_an_example_whose_prompt_is_the_state_and_whose_target_is_the_best(
    build, recorder, rank, tiny_model, word_tokenizer
) -> None:
    """RA-1, RA-2, RA-3, RA-4, RA-5, RA-9, RA-11, RA-13, and what is logged."""
    trainer = build(reward_funcs=rank, callbacks=[recorder], top_k=0)
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
    base, tuned = (tiny_model(word_tokenizer) for _ in range(2))
    base.load_state_dict(first)
    tuned.load_state_dict(recorder.weights_at_train_end[0])
    for round_index, (policy, other) in enumerate([(base, tuned), (tuned, base)]):  # RA-13 too
        rollout = steps_of(trainer, round_index)[0][0][0]
        assert log_prob(policy, rollout) == pytest.approx(rollout.logprob, abs=1e-4)
        assert abs(log_prob(other, rollout) - rollout.logprob) > 1e-3


@torch.no_grad()
def log_prob(model, rollout):
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    log_probs = model.eval()(ids).logits[0, :-1].log_softmax(-1)
    own = log_probs.gather(-1, ids[0, 1:, None])[len(rollout.prompt_ids) - 1 :]
    return own.sum().item()


def first_prompts():
    agent = FactAgent()
    return [
        agent.next_step(agent.begin(row["prompt"]), few_shot=False).prompt for row in questions()
    ]


class CountedTools:
    """Tools whose calls are counted, and of which one ends the process, as far as a test can see."""

    def __init__(self, tools, ends_at=None) -> None:
        self.tools, self.calls, self.keys, self.ends_at = tools, [], [], ends_at

    def __getattr__(self, name):
        return getattr(self.tools, name)

    def call(self, call, key):
        self.calls.append(call)
        self.keys.append(key)
        if len(self.calls) == self.ends_at:
            raise KeyboardInterrupt
        return self.tools.call(call, key)


def play(trainer, folder, ends_at=None):
    """Play round 0 of a trainer into a folder; return the trajectories and the calls that were made."""
    stages = trainer.self_play
    counted = CountedTools(stages.tools, ends_at)
    run = replace(stages.run, root=folder)
    stages = replace(stages, tools=counted, run=run)
    try:
        plays = stages.play_steps(stages.draw_prompts(0), 0, run.folder(0))
    except KeyboardInterrupt:
        return None, counted.calls
    return plays, counted.calls


def contents(plays):
    places = [(t.question.prompt, t.index, t.end, t.steps, t.state) for t in plays.trajectories]
    return sorted(places, key=repr), sorted(plays.rollouts, key=repr)


def test_an_interrupted_trajectory_is_the_same_and_calls_nothing_twice(build, tmp_path) -> None:
    """RA-15: recorded steps and results of calls are replayed."""
    trainer = build()
    whole, calls = play(trainer, tmp_path / "whole")
    assert len(calls) == len({repr(call) for call in calls}) > 5
    made = []
    for ends_at in (3, 6, None):
        plays, some = play(trainer, tmp_path / "parts", ends_at)
        made += some if plays else some[:-1]  # the last was in the tool when the process ended
    again, none = play(trainer, tmp_path / "parts")
    assert none == []
    assert contents(again) == contents(plays) == contents(whole)
    failed = [c for c in calls if c.arguments["key"] == "9"]
    assert Counter(map(repr, made)) - Counter(map(repr, calls)) <= Counter(map(repr, failed))


def test_the_steps_of_a_trajectory_follow_each_other_by_what_went_on(build, tmp_path) -> None:
    """RA-1 and RA-4: in their order, each prompt is the state after the sample that went on, not after the target."""
    trainer = build(reward_funcs=prefers_low_digits)
    plays, _ = play(trainer, tmp_path / "plays")
    groups = defaultdict(dict)
    for rollout in plays.rollouts:
        groups[rollout.prompt_id][rollout.sample_index] = rollout
    agent, changed = FactAgent(), 0
    for trajectory in plays.trajectories:
        state = agent.begin(trajectory.question.prompt)
        for number, step in enumerate(trajectory.steps, start=1):
            asked = agent.next_step(state, few_shot=False)
            assert (step.row.prompt, step.kind) == (asked.prompt, asked.kind)
            if step.target is None:
                assert number == len(trajectory.steps)  # RA-11: it ended there
                break
            move = agent.act(state, groups[step.row.prompt_id][step.continued].completion)
            state = move.state
            if move.call is not None:
                state = agent.observe(state, observed(fact, move.call))
            goes_on = number < len(trajectory.steps)
            changed += goes_on and step.target != step.continued
    assert changed  # else the target's prompt would be the same
    kept = load_steps(tmp_path / "plays" / "round-000" / "steps.parquet")
    played = [step.row.prompt_id for each in plays.trajectories for step in each.steps]
    assert [row.prompt_id for row in kept] == played


@pytest.mark.slow
def test_after_a_kill_in_a_call_the_run_is_that_of_an_uninterrupted_one(
    saved_tiny_model, tmp_path
) -> None:
    """RA-15, with kill -9: of the calls whose results were on disk, none is made again."""

    def rows(folder):
        folders = [folder / "_rounds" / f"round-00{i}" / "dataset" for i in (0, 1)]
        return [load_from_disk(str(each)).to_list() for each in folders]

    def start(kill_at):
        script = [sys.executable, str(agent_process.__file__)]
        told = [saved_tiny_model, tmp_path / "killed", calls, kill_at]
        return subprocess.run([*script, *map(str, told)], capture_output=True, text=True)

    calls, known = tmp_path / "calls", tmp_path / "killed" / "_rounds" / "observations.jsonl"
    assert start(kill_at=6).returncode == -signal.SIGKILL
    before = calls.read_text().split()
    kept = list(map(json.loads, known.read_text().splitlines()))
    assert set() < {event["arguments"]["key"] for event in kept} < set(before)
    done = start(kill_at=0)
    assert done.returncode == 0, done.stderr
    made = calls.read_text().split()[len(before) :]
    assert not {event["arguments"]["key"] for event in kept if not event["failed"]} & set(made)
    agent_process.train(str(saved_tiny_model), str(tmp_path / "whole"), fact)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_no_gold_answer_is_read_and_questions_count_once(build, tmp_path) -> None:
    """RA-10, RA-9: the column may be absent, or say anything."""
    found = []
    rows = [
        questions(),
        concatenate_datasets([questions(solution=str), questions(solution=lambda i: "x")]),
    ]
    for number, dataset in enumerate(rows):
        trainer = build(f"run-{number}", train_dataset=dataset, reward_funcs=prefers_low_digits)
        plays, _ = play(trainer, tmp_path / str(number))
        ids = sorted((r.completion_ids, r.logprob, r.prompt, r.reward) for r in plays.rollouts)
        targets = [(step.row.prompt, step.target) for step in plays.steps]
        found.append((ids, targets))
    assert all(each == found[0] for each in found)


@pytest.mark.slow
def test_no_two_samples_share_their_noise(build, tmp_path) -> None:
    """Two trajectories of one question begin with the same prompt."""
    trainer = build(num_generations=4, agent=FactAgent(num_step_samples=4))
    plays, _ = play(trainer, tmp_path / "plays")
    assert len({step.row.prompt_id for step in plays.steps}) == len(list(plays.steps))
    first = defaultdict(set)
    for trajectory in plays.trajectories:
        first[trajectory.question.prompt].add(trajectory.steps[0].row.prompt_id)
    drawn = {i: [] for ids in first.values() for i in ids}
    for rollout in plays.rollouts:
        if rollout.prompt_id in drawn:
            drawn[rollout.prompt_id].append(rollout.completion_ids)
    for ids in first.values():
        assert len({tuple(drawn[i]) for i in ids}) == 4


def test_an_agent_s_examples_may_be_shown_in_the_first_rounds_alone(build) -> None:
    """As the preset of the paper's questions has it."""
    agent = FactAgent()
    with pytest.raises(ValueError, match="few_shot_rounds=1 needs an agent with examples"):
        build(agent=agent, few_shot_rounds=1, few_shot_in_training=False)
    agent.has_examples = True
    play = build(agent=agent, few_shot_rounds=1, few_shot_in_training=False).self_play
    assert [play.shows_examples(round_index) for round_index in range(2)] == [True, False]


def test_a_round_whose_likeliest_actions_are_malformed_says_so(build, monkeypatch) -> None:
    """Though other samples of these steps could be read: none of them goes on."""

    class ReadsTheFirst(FactAgent):
        seen = ()

        def act(self, state, action):
            self.seen, is_first = {*self.seen, state}, state not in self.seen
            return super().act(state, "1" if is_first else "Q")

    def last_finished(samples):
        return [sample for sample in samples if not sample.is_truncated][-1]

    monkeypatch.setattr(stepwise, "continued_sample", last_finished)
    agent = ReadsTheFirst(num_step_samples=8)
    trainer = build(train_dataset=questions(2), agent=agent, num_generations=1)
    with pytest.raises(EmptyRoundError, match="could the agent read the sample that would go on"):
        trainer.train()


@pytest.mark.slow
def test_held_out_answers_are_those_of_trajectories_and_no_question_is_on_both_sides(build) -> None:
    """RA-12, and what is graded: the answer, greedily played, by eval_reward_funcs alone."""
    heldout = questions(10, 10, solution=capital_of_birth)
    trainer = build(
        num_rounds=1, eval_dataset=heldout, eval_reward_funcs=grade, num_generations_eval=2,
        agent=FactAgent(num_calls=1), max_steps=40, load_best_round_at_end=False,
    )  # fmt: skip
    trainer.train()
    folder = trainer.run.folder(0) / "evaluation"
    answers = load_rollouts(folder / "greedy-00000.parquet")
    assert {a.prompt_id for a in answers} == {r.prompt_id for r in trainer.self_play.heldout[""]}
    rows = {row.prompt_id: row for row in trainer.self_play.heldout[""]}
    steps = {
        (number, r.prompt): r
        for number in range(2)
        for path in (folder / "steps").glob(f"greedy-step{number}-[0-9]*.parquet")
        for r in load_rollouts(path)
    }
    agent, right, seen = FactAgent(num_calls=1), 0, set()
    for answer in answers:
        state, number, ends = agent.begin(rows[answer.prompt_id].prompt), 0, None
        while ends is None and (step := agent.next_step(state, few_shot=False)) is not None:
            action = steps[number, step.prompt]
            number += 1
            try:
                move = None if action.is_truncated else agent.act(state, action.completion)
            except MalformedAction:
                ends = "malformed"
            else:
                ends = "truncated" if move is None else None
            if ends is None:
                state = move.state
                if move.call is not None:
                    state = agent.observe(state, observed(fact, move.call))
        halt = "malformed" if ends == "malformed" else None
        finish, text = ("length", "") if ends else ("eos", agent.answer(state))
        assert (answer.completion, answer.halt, answer.finish) == (text, halt, finish)
        seen.add(ends)
        right += answer.reward == 1.0
        assert answer.reward == float(answer.completion == rows[answer.prompt_id].solution)
    (line,) = read_lines(trainer)
    assert line["eval"]["eval_accuracy"] == right / 10
    assert len(load_rollouts(folder / "sampled-00000.parquet")) == 20
    trained = {
        row["question_id"]
        for row in pq.read_table(trainer.run.folder(0) / "steps.parquet").to_pylist()
    }
    assert trained == {row.prompt_id for row in trainer.self_play.rows}
    assert trained.isdisjoint(rows)
    again = trainer.evaluate()
    assert again["eval_accuracy"] == line["eval"]["eval_accuracy"]
    assert None in seen


def test_all_steps_of_held_out_trajectories_are_counted_again_from_disk_too(build) -> None:
    """The answer of a trajectory is but a part of what was sampled for it."""
    trainer = build(
        eval_dataset=questions(3, 10, solution=capital_of_birth), eval_reward_funcs=grade,
        num_generations_eval=1,
    )  # fmt: skip
    folder = trainer.run.folder(0) / "evaluation"
    play = trainer.self_play
    sets = dict.fromkeys(("", "greedy-step0-"), play.heldout[""])
    first = play.score(sets, folder=folder)
    stored = [r for path in (folder / "steps").glob("*.parquet") for r in load_rollouts(path)]
    assert first.num_tokens == sum(len(r.completion_ids) for r in stored) > 0
    assert play.score(sets, folder=folder).num_tokens == first.num_tokens
    assert play.score(sets).num_tokens == first.num_tokens


def test_with_the_filter_the_steps_of_trajectories_with_good_answers_are_kept(
    build, tmp_path
) -> None:
    """The option of our own: gold answers grade whole trajectories, and nothing is ranked.

    An answer that one of the question's rows accepts is good.
    """

    def at_most(completions, solution, **kwargs):
        return [
            float(c.isdigit() and int(c) <= s) for c, s in zip(completions, solution, strict=True)
        ]

    trainer = build(
        train_dataset=concatenate_datasets(
            [questions(solution=lambda i: 6), questions(solution=lambda i: -1)]
        ),
        reward_funcs=at_most, agent_rewards="answers",
        agent=FactAgent(num_calls=1),
    )  # fmt: skip
    plays, _ = play(trainer, tmp_path / "plays")
    stages, folder = trainer.self_play, tmp_path / "plays" / "round-000"
    failed = stages.failed_steps(plays, 0, folder)
    assert failed == stages.failed_steps(plays, 0, folder)  # read back
    selection = plays.select(lambda rollout: True, failed)
    expected = {
        (step.row.prompt_id, step.continued)
        for t in plays.trajectories
        if t.end == "answered" and int(t.state.answer) <= 6
        for step in t.steps
    }
    assert {(r.prompt_id, r.sample_index) for r in selection.kept} == expected
    assert 0 < len(expected) < sum(step.target is not None for step in plays.steps)


@pytest.mark.slow
@pytest.mark.parametrize("agent_rewards", ["answers", "steps"])
def test_a_round_whose_rewards_were_wrong_is_graded_again(build, tmp_path, agent_rewards) -> None:
    """Which sample goes on depends on its perplexity alone, so no step is sampled again."""

    def low(completions, **kwargs):
        return [float((c.split() or ["none"])[0] in "01234") for c in completions]

    def accepts_all(completions, **kwargs):
        return [1.0] * len(completions)

    def finish(folder, function, eval_function):
        trainer = build(
            folder, reward_funcs=function, agent_rewards=agent_rewards, num_rounds=1, max_steps=2,
            eval_dataset=questions(10, 10, solution=capital_of_birth), num_generations_eval=1,
            eval_reward_funcs=eval_function, agent=FactAgent(num_calls=1),
            load_best_round_at_end=False,
        )  # fmt: skip
        sampled, sample = set(), trainer.self_play.collector.sampler.sample

        def watched(requests, *args):
            sampled.update(request.stream_key for request in requests)
            return sample(requests, *args)

        trainer.self_play.collector.sampler.sample = watched
        trainer.train(resume_from_checkpoint=True)
        root, (line,) = trainer.run.root, read_lines(trainer)
        del line["seconds"]
        rows = load_from_disk(str(root / "round-000" / "dataset")).to_list()
        answers = [load_rollouts(path) for path in sorted(root.glob("*/evaluation/*.parquet"))]
        return trainer, sampled, (rows, answers, line)

    *_, expected = finish("whole", low, grade)
    wrong, _, came_to = finish("run", accepts_all, accepts_all)
    assert came_to[0] != expected[0]
    take_scores_back(wrong.run.root, RunFolder.open(wrong.args.output_dir).config, 0)
    steps = [r for groups in steps_of(wrong, 0) for group in groups for r in group]
    keys = {stream_key(42, 0, "train", r.prompt_id, r.sample_index) for r in steps}
    _, sampled, found = finish("run", low, grade)
    assert keys
    assert not keys & sampled
    assert found == expected


class Script:
    """A policy that answers each kind of step with the same text, as a `Sampler`."""

    def __init__(self, tokenizer, actions) -> None:
        self.tokenizer, self.actions = tokenizer, actions

    def suggest_batch_size(self, longest_prompt, max_completion_length):
        return 4

    def release(self) -> None:
        pass

    def sample(self, requests, options, batch_size, on_tokens=None):
        assert options.return_logprobs
        assert "\n" in options.stop_strings
        for number, request in enumerate(requests):
            prompt = self.tokenizer.decode(list(request.prompt_ids))
            (action,) = (text for start, text in self.actions.items() if f"# {start}" in prompt)
            ids = self.tokenizer(f" {action}\n", add_special_tokens=False)["input_ids"]
            yield number, SampledCompletion(tuple(ids), "stop", -1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("query", "end", "seen"),
    [
        ("x", "answered", "'[1] it was y'"),
        ("broken", "answered", "ConnectionError: no network"),
        ("long", "too_long", ""),
    ],
)
def test_the_search_agent_plays_through_and_counts_what_fails(
    build, tmp_path, tiny_model, byte_tokenizer, query, end, seen
) -> None:
    """RA-7, RA-8: a failed search is a result that says so; a result that fits nowhere ends a trajectory."""
    actions = {
        "Decide": f"Search(thoughts='first', query='{query}')", "Summarize": "Summary(text='y [1]')",
        "Answer": "Answer(text='y')", "Does": "Keep()", "Do": "Rewrite(text='It was y [1].')",
    }  # fmt: skip
    actions = {f"{start} ": text for start, text in actions.items()}
    trainer = build(
        agent=SearchAgent(look, max_tool_calls=2, num_step_samples=2), num_generations=1,
        model=tiny_model(byte_tokenizer, max_position_embeddings=2048), max_completion_length=64,
        processing_class=byte_tokenizer, train_dataset=questions(1),
    )  # fmt: skip
    stages = trainer.self_play
    script = Script(byte_tokenizer, actions)
    stages = replace(stages, collector=replace(stages.collector, sampler=script))
    trainer.self_play = stages
    plays, calls = play(trainer, tmp_path / "plays")
    (trajectory,) = plays.trajectories
    assert trajectory.end == end
    assert seen in trajectory.steps[1].row.prompt if seen else len(trajectory.steps) == 1
    selection = plays.select(lambda rollout: True)
    metrics = plays.metrics(selection)
    assert metrics[f"play/trajectories_{end}"] == 1.0
    if end == "answered":
        kinds = [step.kind for step in trajectory.steps]
        assert kinds == [*["decision", "summarization"] * 2, "answer", "relevance", "grounding"]
        assert stages.agent.answer(trajectory.state) == "It was y [1]."
        assert (trajectory.num_calls, len(calls)) == (2, 2 if query == "broken" else 1)
        assert metrics["play/calls_per_question"] == 2.0
        assert metrics["tools/failure_frequency"] == float(query == "broken")
        assert len(selection.kept) == len(kinds) == 7


def test_an_answer_is_graded_by_its_own_text_and_results_are_plain_text(
    build, tmp_path, tiny_model, byte_tokenizer
) -> None:
    """Not by the tokens of the last step, where a tokenizer divides messages; nor by half an emoji."""
    byte_tokenizer.chat_template = family_template("qwen3")
    trl.add_response_schema(byte_tokenizer)
    byte_tokenizer.add_tokens(["</tool_response>"])
    actions = {
        "Decide ": "Search(query='token')", "Summarize ": "Summary(text='y')",
        "Answer the ": r"Answer(text='y \ud83d')", "Does ": "Keep()", "Do ": "Keep()",
    }  # fmt: skip
    seen = []

    def grade(completions, completion_ids, **kwargs):
        seen.extend(zip(completions, completion_ids, strict=True))
        return [1.0] * len(completions)

    def asking(first):
        rows = questions(1, first)
        return rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})

    trainer = build(
        agent=SearchAgent(look, max_tool_calls=1, num_step_samples=2, conversational=True),
        model=tiny_model(byte_tokenizer, max_position_embeddings=2048), max_completion_length=64,
        processing_class=byte_tokenizer, train_dataset=asking(0), eval_dataset=asking(1),
        eval_reward_funcs=grade, num_generations_eval=0,
    )  # fmt: skip
    trainer.self_play.collector.sampler.sample = Script(byte_tokenizer, actions).sample
    metrics = trainer.evaluate()
    ((completion, ids),) = seen
    assert completion == [{"role": "assistant", "content": "y ?"}]
    assert byte_tokenizer.decode(ids) == f"y ?{byte_tokenizer.eos_token}"
    assert metrics["eval_mean_length"] == len(ids)
    plays, _ = play(trainer, tmp_path / "plays")
    prompts = StepPrompts((step.row for step in plays.steps), trainer.self_play.formatter)
    control = byte_tokenizer.convert_tokens_to_ids("</tool_response>")
    shown = [
        i
        for i, text in enumerate(prompts)
        if "tool_response" in byte_tokenizer.decode(prompts[text])
    ]
    assert shown
    assert not any(control in ids for ids in prompts.values())


def test_each_call_draws_at_random_for_itself_and_is_followed(build, tmp_path) -> None:
    trainer = build()
    stages = trainer.self_play
    found = []
    for name in "ab":
        counted = CountedTools(stages.tools)
        run = replace(stages.run, root=tmp_path / name)
        noted = Noted()
        with followed(run.root, noted):
            played = replace(stages, tools=counted, run=run)
            played.play_steps(played.draw_prompts(0), 0, run.folder(0))
        assert len(set(counted.keys)) == len(counted.calls) > 5
        assert noted[-1] == len((run.root / "observations.jsonl").read_text().splitlines())
        found.append(
            {(repr(call), key) for call, key in zip(counted.calls, counted.keys, strict=True)}
        )
    assert found[0] == found[1]


class Noted(list):
    """Follows a folder; has the number of results after each change."""

    def written(self, path) -> None:
        if path.name == "observations.jsonl":
            self.append(len(path.read_text().splitlines()))


def test_an_agent_that_never_finishes_is_stopped_and_counted(build, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("trl_selfplay.rounds.stepwise.MOST_STEPS", 1)
    trainer = build(agent=FactAgent(num_calls=1000))
    plays, _ = play(trainer, tmp_path / "plays")
    assert {len(t.steps) for t in plays.trajectories if t.end == "endless"} == {1}
    assert None not in {t.end for t in plays.trajectories}


class StrictAgent(FactAgent):
    """Can read no action."""

    def act(self, state, action):
        raise MalformedAction("never")


def test_a_round_without_a_step_that_can_be_read_says_what_to_do(build) -> None:
    with pytest.raises(EmptyRoundError, match="No step can be learned: in none could the agent"):
        build(agent=StrictAgent()).train()


class ShownAgent(FactAgent):
    """Has an example of a look-up, which precedes every prompt."""

    has_examples = True

    def next_step(self, state, *, few_shot):
        step = super().next_step(state, few_shot=False)
        return replace(step, prompt=f"Q 1 no 2 7 {step.prompt}") if step and few_shot else step


@pytest.mark.parametrize("trained_on", [False, True])
def test_examples_are_shown_while_sampling_and_in_training_if_configured(
    build, tmp_path, trained_on
) -> None:
    """RA-1 with few-shot examples: what is trained on is the state, with or without them."""
    trainer = build(agent=ShownAgent(), few_shot_in_training=trained_on, num_generations=1)
    plays, _ = play(trainer, tmp_path / "plays")
    prompts = StepPrompts(
        load_steps(tmp_path / "plays" / "round-000" / "steps.parquet"), trainer.self_play.formatter
    )
    sampled = {rollout.prompt_id: rollout.prompt_ids for rollout in plays.rollouts}
    tokenizer = trainer.processing_class
    for trajectory in plays.trajectories:
        agent, state = ShownAgent(), ShownAgent().begin(trajectory.question.prompt)
        prompt_id = trajectory.steps[0].row.prompt_id
        shown, bare = (agent.next_step(state, few_shot=f).prompt for f in (True, False))
        assert tokenizer.decode(sampled[prompt_id]) == shown
        assert tokenizer.decode(prompts[prompt_id]) == (shown if trained_on else bare)
    assert set(prompts) == set(sampled)
    stages = trainer.self_play
    assert stages.shows_examples(0)
    assert stages.has_examples


class Bare:
    """Has the methods of an agent alone."""

    begin = next_step = act = observe = answer = lambda self, *args, **kwargs: None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"agent": object()}, TypeError, "next_step"),
        ({"agent": Bare()}, TypeError, "has no tools"),
        (
            {"agent": FactAgent(num_step_samples=0)},
            ValueError,
            "num_step_samples of the agent is 0",
        ),
        ({"agent": FactAgent(tools=fact)}, ValueError, "a list of functions"),
        ({"temperature": 0.0, "num_generations": 1}, ValueError, "copies of one action"),
        ({"gold_dataset": questions()}, ValueError, "gold_dataset"),
        (
            {"few_shot_examples": [{"prompt": "Q", "completion": "1"}]},
            ValueError,
            "by kind of step",
        ),
        ({"normal_form": str.lower}, ValueError, "normal_form"),
        ({"loss_weighting": "reward"}, ValueError, "loss_weighting='reward'"),
        ({"deduplicate": False}, ValueError, "deduplicate=False"),
        ({"eval_dataset": questions(2, 10)}, ValueError, "eval_reward_funcs"),
        ({"reward_funcs": exact_reward}, ValueError, "agent_rewards='answers'"),
        ({"agent_rewards": "answers"}, ValueError, "`reward_funcs` is missing"),
        ({"reward_funcs": judge, "agent": FactAgent(1)}, ValueError, "num_step_samples=1"),
    ],
)
def test_what_can_not_work_with_an_agent_is_refused(build, arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        build(**arguments)


def test_a_filter_without_an_agent_is_refused(build_rest_em) -> None:
    with pytest.raises(ValueError, match="needs an `agent`"):
        build_rest_em(agent_rewards="answers")


@pytest.mark.slow
def test_the_policy_can_rank_its_own_steps(build, tmp_path) -> None:
    """In a phase of its own after each step; a random model's verdicts disagree, so targets stay."""
    trainer = build(reward_funcs=judge)
    plays, _ = play(trainer, tmp_path / "plays")
    assert all(step.target in (None, step.continued) for step in plays.steps)
    assert any((tmp_path / "plays" / "round-000" / "judgements").iterdir())


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
        (trainer.run.root / "observations.jsonl").unlink(missing_ok=True)
        trainer.train(resume_from_checkpoint=True)
        of_student = rows(out, 0)
        if name == "same":
            assert of_student == of_policy
        assert texts(of_student, tokenizer) == texts(of_policy, word_tokenizer)
        assert len(list((out / "_rounds").glob("*/evaluation/greedy-00000.parquet"))) == 2
