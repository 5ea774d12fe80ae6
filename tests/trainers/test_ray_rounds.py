"""Whole runs that sample on a Ray cluster: equal to those in one process, also after faults."""

import threading
from dataclasses import replace

import psutil
import pytest
from local_ray import SHARE
from patience import ENDS_S
from peft import LoraConfig
from tiny_rewards import contains_solution

from trl_selfplay.generation.vllm_process import EngineFailure
from trl_selfplay.rollouts.record import load_rollouts

pytestmark = pytest.mark.slow
RAY = {"use_ray": True, "ray_num_workers": 2, "ray_cpus_per_worker": SHARE}
SETTINGS = {
    "peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_alpha=8),
    "num_rounds": 1,
}  # fmt: skip


class Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        import os

        return os._exit, (1,)


def samples(trainer):
    """Return the samples of the round by what names them; the shards may be others."""
    rollouts = [
        rollout
        for path in sorted(trainer.run.root.glob("round-000/samples/*.parquet"))
        for rollout in load_rollouts(path)
    ]
    return {(r.phase, r.prompt_id, r.sample_index): (r.completion_ids, r.reward) for r in rollouts}


def all_end(processes):
    return psutil.wait_procs(processes, timeout=ENDS_S)[1] == []


def engine_of(trainer):
    return trainer.self_play.collector.sampler._engine


def test_a_run_on_ray_equals_one_in_process_also_if_a_worker_is_killed(
    local_ray, build_star, worker_processes
) -> None:
    expected = build_star("in-process", **SETTINGS)
    expected.train()
    killed = []

    def reward(completions, solution, **kwargs):
        if not killed and (found := worker_processes()):
            killed.append(found[0])
            found[0].kill()
        return contains_solution(completions, solution)

    trainer = build_star("ray", **SETTINGS, **RAY, reward_funcs=reward)
    trainer.train()
    assert killed
    assert samples(trainer) == samples(expected)
    assert samples(trainer)
    assert all_end(worker_processes())
    record = engine_of(trainer).engine_record
    assert (record["engine"], record["sampler"], record["dtype"]) == (
        "ray",
        "transformers",
        "float32",
    )


def test_what_is_sampled_before_all_workers_die_is_kept(local_ray, build_star, monkeypatch) -> None:
    expected = build_star("in-process", **SETTINGS)
    expected.train()
    settings = {**SETTINGS, **RAY, "ray_num_workers": 1}

    are_dead = threading.Event()

    def reward(completions, solution, **kwargs):
        engine = engine_of(trainer)
        engine._plan = replace(engine._plan, tokenizer=Deadly())
        for worker in list(engine._workers):
            engine._ray.kill(worker.actor)
        are_dead.set()
        return contains_solution(completions, solution)

    reward.__name__ = "contains_solution"  # with which the run goes on
    trainer = build_star("ray", **settings, reward_funcs=reward)
    engine_of(trainer).suggest_batch_size = lambda *lengths: 2  # a shard of two prompts
    sampler = trainer.self_play.collector.sampler
    sample, calls = sampler.sample, []

    def sample_before_and_after(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # the first shard is being graded
            assert are_dead.wait(ENDS_S)
        return sample(*arguments)

    monkeypatch.setattr(sampler, "sample", sample_before_and_after)
    with pytest.raises(EngineFailure, match="Ray workers were lost"):
        trainer.train()
    kept = samples(trainer)
    assert 0 < len(kept) < len(samples(expected))
    resumed = build_star("ray", **settings, reward_funcs=contains_solution)
    resumed.train(resume_from_checkpoint=True)
    assert samples(resumed) == samples(expected)


def test_a_reward_function_that_raises_ends_the_run_and_its_workers(
    local_ray, build_star, worker_processes
) -> None:
    def reward(completions, solution, **kwargs):
        raise ZeroDivisionError("no grade")

    settings = {**SETTINGS, **RAY, "ray_num_workers": 1}
    trainer = build_star("ray", **settings, reward_funcs=reward)
    with pytest.raises(RuntimeError, match="no grade"):
        trainer.train()
    assert samples(trainer)
    assert all_end(worker_processes())
