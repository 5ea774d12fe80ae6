"""Train with an agent in a process of its own: `agent_process.py MODEL OUTPUT CALLS [KILL_AT]`.

Each call of the tool is a line in the file CALLS; the KILL_AT-th kills the process.
"""

import os
import signal
import sys
from pathlib import Path

from facts import fact as look_up


def fact(key: str) -> str:
    """Look a key up.

    Args:
        key: A digit.
    """
    path = Path(os.environ["CALLS"])
    with path.open("a") as file:
        file.write(f"{key}\n")
    if 0 < int(os.environ["KILL_AT"]) <= len(path.read_text().split()):
        os.kill(int(os.environ["TRAINER"]), signal.SIGKILL)
    return look_up(key)


def train(model: str, output: str, tool) -> None:
    """Train two rounds, or go on with them."""
    from fact_agent import FactAgent, questions

    from trl_selfplay import ReSTEMConfig, ReSTEMTrainer

    config = ReSTEMConfig(
        output, num_rounds=2, num_generations=2, max_completion_length=16, temperature=1.0,
        max_steps=3, report_to=[], disable_tqdm=True, gradient_checkpointing=False, use_cpu=True,
        tool_deadline=120.0,
    )  # fmt: skip
    trainer = ReSTEMTrainer(model, config, train_dataset=questions(), agent=FactAgent(tool=tool))
    trainer.train(resume_from_checkpoint=True)


if __name__ == "__main__":
    model, output, calls, kill_at = sys.argv[1:]
    os.environ |= {"CALLS": calls, "KILL_AT": kill_at, "TRAINER": str(os.getpid())}
    train(model, output, fact)
