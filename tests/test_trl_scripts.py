"""TRL's own scripts run with our classes in place of theirs, as the diffs of docs/migrating.md change one."""

import importlib
import json
import re
from pathlib import Path

import pytest
import trl

import trl_selfplay

ROOT = Path(__file__).parent.parent
FLAGS = [
    "--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--max_steps", "1",
    "--per_device_train_batch_size", "2", "--save_strategy", "no",
]  # fmt: skip
SAMPLING = ["--num_rounds", "2", "--max_completion_length", "12"]
GRADED = [
    "--reward_funcs", "graders.length", "--num_generations", "4", "--temperature", "1.0",
    "--max_per_prompt", "4",
]  # fmt: skip


def replaced_classes():
    """Return (theirs, ours) for each diff: the names that its import lines change."""
    page = (ROOT / "docs/migrating.md").read_text()
    diffs = re.findall(r"^```diff\n(.*?)^```$", page, re.M | re.S)
    pairs = []
    for diff in diffs:
        (theirs,) = re.findall(r"^-from trl import (.+)$", diff, re.M)
        (ours,) = re.findall(r"^\+from trl_selfplay import (.+)$", diff, re.M)
        pairs.append((theirs.split(", "), ours.split(", ")))
    return pairs


def change(monkeypatch, theirs, ours) -> None:
    for name, other in zip(theirs, ours, strict=True):
        monkeypatch.setattr(trl, name, getattr(trl_selfplay, other))


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder with the columns of a prompt-only, a language-modelling and a preference set."""
    folder = tmp_path / "additions"
    folder.mkdir()
    rows = []
    for a in range(4):
        for b in range(3):
            answer = [{"role": "assistant", "content": f"so {a + b}"}]
            rows.append(
                {
                    "prompt": [{"role": "user", "content": f"Q {a} + {b} = ?"}],
                    "solution": str(a + b), "completion": answer, "chosen": answer,
                    "rejected": [{"role": "assistant", "content": "no"}],
                }
            )  # fmt: skip
    for name, part in (("train", rows[:9]), ("test", rows[9:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    (tmp_path / "graders.py").write_text(
        "def length(completions, **kwargs):\n"
        "    return [float(len(c[0]['content'].split()) % 2) for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def run(script, flags):
    module = importlib.import_module(f"trl.scripts.{script}")
    parsed = module.make_parser().parse_args_and_config(flags, fail_with_unknown_args=False)
    module.main(*parsed)


def test_the_diffs_change_an_import_line_each() -> None:
    assert [ours for _, ours in replaced_classes()] == [
        ["STaRConfig", "STaRTrainer"],
        ["STaRConfig", "STaRTrainer"],
        ["SPINConfig", "SPINTrainer"],
        ["QuietSTaRConfig", "QuietSTaRTrainer"],
    ]


THINKING = ["--num_ahead_tokens", "2", "--thought_length", "2"]
CASES = {
    "grpo": (0, "grpo", [*SAMPLING, *GRADED]),
    "dpo": (2, "dpo", [*SAMPLING, "--eval_strategy", "epoch"]),
    "sft to Quiet-STaR": (3, "sft", [*THINKING, "--eval_strategy", "epoch"]),
    "sft to SPIN": (None, "sft", SAMPLING),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_script_of_trl_runs_with_the_classes_of_a_diff(
    name, saved_chat_model, data, tmp_path, monkeypatch
) -> None:
    """And goes on with --resume_from_checkpoint True, which is text by then."""
    place, script, flags = CASES[name]
    theirs, ours = (
        (["SFTConfig", "SFTTrainer"], ["SPINConfig", "SPINTrainer"])
        if place is None
        else replaced_classes()[place]
    )
    change(monkeypatch, theirs, ours)
    output = tmp_path / "out"
    every = ["--model_name_or_path", str(saved_chat_model), "--dataset_name", str(data)]
    every += ["--output_dir", str(output), "--attn_implementation", "eager", *FLAGS, *flags]
    run(script, every)
    assert (output / "model.safetensors").exists()
    if ours[1] != "QuietSTaRTrainer":
        lines = (output / "_rounds/rounds.jsonl").read_text().splitlines()
        assert [json.loads(line)["steps"] for line in lines] == [1, 1]
        run(script, [*every, "--resume_from_checkpoint", "True"])
        assert len((output / "_rounds/rounds.jsonl").read_text().splitlines()) == 2
