"""A run killed at any moment goes on to what an uninterrupted run gives."""

import json
import random
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_from_disk
from processes import call
from resumable_run import Kill, run
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForSequenceClassification

PHASES = ("sampling", "grading", "training", "evaluating", "any")
# Upper ends of the countdowns, in events of the phase (seconds for "any"): early enough to hit what
# is left of a run that was killed before.
LAST_EVENT = {
    "sampling": 30, "grading": 4, "training": 3, "evaluating": 16, "any": 5.0, "judging": 60,
}  # fmt: skip


@pytest.fixture
def resumable(tmp_path, saved_tiny_model, sums):
    """Return a function that runs (or goes on with) a run in a process of its own: its exit code."""
    rows = tmp_path / "rows.json"
    table = sums(16).to_list()
    rows.write_text(json.dumps({"train": table[:12], "heldout": table[12:]}))

    def go(folder: str, kill: Kill | None = None, *method: str | None) -> int:
        return call(run, str(tmp_path / folder), str(saved_tiny_model), str(rows), kill, *method)

    return go


def read_run(folder: Path):
    """Return what must be equal: lines without seconds, rollouts, rows trained on, weights."""
    lines = [
        json.loads(line) for line in (folder / "_rounds" / "rounds.jsonl").read_text().splitlines()
    ]
    for line in lines:
        del line["seconds"]
    shards = {
        str(path.relative_to(folder)): pq.read_table(path).to_pylist()
        for path in sorted((folder / "_rounds").rglob("*.parquet"))
    }
    rows = [
        load_from_disk(str(path)).to_list() for path in sorted(folder.glob("_rounds/*/dataset"))
    ]
    return lines, shards, rows, load_file(folder / "adapter_model.safetensors")


def kill_and_resume(
    resumable, tmp_path, seeds, scorer=None, method="STaR", least_kills=4, phases=PHASES
) -> None:
    assert resumable("whole", None, scorer, method) == 0
    expected = read_run(tmp_path / "whole")
    assert len(expected[0]) == len(expected[2]) == (2 if scorer is None else 4)
    killed = 0
    for seed in seeds:
        folder = f"killed-{seed // 4}"  # four kills hit one run, one after the other
        rng = random.Random(seed)
        phase = phases[seed % len(phases)]
        last = LAST_EVENT[phase]
        kill = Kill(phase, rng.uniform(1, last) if phase == "any" else rng.randrange(int(last)))
        exit_code = resumable(folder, kill, scorer, method)
        assert exit_code in (0, -signal.SIGKILL)
        killed += exit_code == -signal.SIGKILL
    for number in sorted({seed // 4 for seed in seeds}):
        assert resumable(f"killed-{number}", None, scorer, method) == 0
        *found, weights = read_run(tmp_path / f"killed-{number}")
        assert found == list(expected[:-1])
        assert weights.keys() == expected[-1].keys()
        assert all(torch.equal(tensor, expected[-1][name]) for name, tensor in weights.items())
    assert killed >= least_kills


@pytest.mark.slow
def test_a_run_killed_in_each_phase_resumes_to_the_same_samples_and_scores(
    resumable, tmp_path
) -> None:
    kill_and_resume(resumable, tmp_path, range(8))


@pytest.mark.slow
def test_rest_with_a_reward_model_killed_in_each_phase_resumes_alike(
    resumable, tmp_path, word_tokenizer
) -> None:
    """Percentile thresholds, real-valued scores and several Improve steps a Grow step."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(word_tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=word_tokenizer.pad_token_id,
    )  # fmt: skip
    folder = tmp_path / "scorer"
    LlamaForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    kill_and_resume(resumable, tmp_path, range(8), str(folder))


@pytest.mark.slow
def test_irpo_killed_in_each_phase_resumes_to_the_same_pairs_log_probs_and_weights(
    resumable, tmp_path
) -> None:
    """IR-5."""
    kill_and_resume(resumable, tmp_path, range(5), method="IRPO", least_kills=3)


@pytest.mark.slow
def test_a_run_with_the_policy_as_judge_killed_in_each_phase_resumes_alike(
    resumable, tmp_path
) -> None:
    """Judgements are on disk like samples, those of held-out prompts too."""
    phases = ("judging", *PHASES[:4])
    kill_and_resume(resumable, tmp_path, range(5), method="judge", phases=phases)
    assert list((tmp_path / "whole" / "_rounds").glob("round-001/evaluation/judgements/*.parquet"))


@pytest.mark.full
def test_many_kills_at_random_moments_leave_no_trace(resumable, tmp_path) -> None:
    kill_and_resume(resumable, tmp_path, range(100, 132), least_kills=20)
