"""A user's working folder: a model, a dataset with two splits, and reward functions of their own."""

import json
from pathlib import Path

import pytest

REWARDS = '''
import os
import signal
from pathlib import Path


def contains(completions, solution, **kwargs):
    return [float(s in c.split()) for c, s in zip(completions, solution)]


def stopped_once(completions, solution, **kwargs):
    """Be where the user presses Ctrl-C, once: in round 1."""
    if Path("out/_rounds/round-001").exists() and not Path("stopped").exists():
        Path("stopped").touch()
        os.killpg(0, signal.SIGINT)
    return contains(completions, solution)


def broken(completions, **kwargs):
    return {}["missing"]
'''


@pytest.fixture
def work_folder(tmp_path, saved_tiny_model, sums) -> Path:
    data = tmp_path / "data"
    data.mkdir()
    for split, rows in (("train", sums(12)), ("test", sums(4, first=50))):
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    return tmp_path
