"""GRPO scripts with tools and environments run unchanged but for the names of the two classes."""

import sys
from types import SimpleNamespace

import pytest
import trl
from bigram_policy import CHAT_STEPS, bigram_model, family_template, word_tokenizer

import trl_selfplay
from trl_selfplay.rollouts.stored import load_samples

TOOLS = '''
from datasets import Dataset
from library import GRPOConfig, GRPOTrainer


def add(a: int, b: int) -> int:
    """
    Adds two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The sum of the two integers.
    """
    return a + b


def says_yes(completions, **kwargs):
    return [float("yes" in completion[-1]["content"]) for completion in completions]


trainer = GRPOTrainer(
    model=model,
    args=GRPOConfig(
        output_dir=folder, learning_rate=1e-5, per_device_train_batch_size=4, num_generations=4,
        temperature=1.0, max_completion_length=60, max_tool_calling_iterations=2, max_steps=2,
        report_to="none", use_cpu=True, bf16=False, save_strategy="no", gradient_checkpointing=False,
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": f"Q {i} + 4 = ?"}], "solution": "yes"}
            for i in range(4)
        ]
    ),
    processing_class=tokenizer,
    reward_funcs=says_yes,
    tools=[add],
)
trainer.train()
'''
ENVIRONMENT = TOOLS.replace(
    TOOLS[TOOLS.index("def add") : TOOLS.index("trainer = ")],
    '''class SumEnv:
    def reset(self, **kwargs) -> str | None:
        self.sum = 0
        return " Q"

    def add(self, a: int, b: int) -> int:
        """
        Add two integers to the sum.

        Args:
            a: The first integer.
            b: The second integer.

        Returns:
            The sum after the call.
        """
        self.sum += a + b
        return self.sum

    def get_reward(self) -> float:
        return float(self.sum > 0)


''',
).replace("    reward_funcs=says_yes,\n    tools=[add],\n", "    environment_factory=SumEnv,\n")
# Awaited, with a time limit of its own by a signal.
ASYNC = TOOLS.replace("from library", "import asyncio\nimport signal\n\nfrom library").replace(
    TOOLS[TOOLS.index("def add") : TOOLS.index("def says_yes")],
    '''async def add(a: int, b: int) -> int:
    """
    Adds two integers.

    Args:
        a: The first integer.
        b: The second integer.
    """
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(5)
    await asyncio.sleep(0)
    signal.alarm(0)
    return a + b


''',
)
# Two kinds of environments that draw at random, by a column, whose rows repeat; classes with variables around them.
GAMES = '''
import random

from datasets import Dataset
from library import GRPOConfig, GRPOTrainer


def make_environments(most):
    class Open:
        def reset(self, **kwargs) -> str | None:
            self.sum = random.randrange(10)
            return f" {self.sum} ?"

        def add(self, a: int, b: int) -> int:
            """
            Add two integers to the sum.

            Args:
                a: The first integer.
                b: The second integer.
            """
            if self.sum > most:
                raise ValueError("Game over.")
            self.sum += a + b
            return self.sum

        async def get_reward(self) -> float:
            return float(self.sum >= 7)

    class Hidden(Open):
        def reset(self, **kwargs) -> None:
            super().reset()

    return {"open": Open, "hidden": Hidden}


trainer = GRPOTrainer(
    model=model,
''' + TOOLS[TOOLS.index("    args=") : TOOLS.index("    train_dataset=")] + '''
    train_dataset=Dataset.from_dict({"environment": ["open", "hidden"] * 6}),
    processing_class=tokenizer,
    environment_factory=make_environments(9),
)
trainer.train()
'''  # fmt: skip
SCRIPTS = {"tools": TOOLS, "environment": ENVIRONMENT, "async": ASYNC, "games": GAMES}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("GRPO", "tools"), ("STaR", "tools"), ("ReSTEM", "tools"), ("IRPO", "tools"),
        ("GRPO", "environment"), ("ReSTEM", "environment"), ("GRPO", "async"), ("IRPO", "async"),
        ("GRPO", "games"), ("ReSTEM", "games"),
    ],
)  # fmt: skip
def test_two_steps_of_a_grpo_script_with_tools(tmp_path, monkeypatch, name, kind) -> None:
    """TRL's own class first: the script is one that runs there."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer = word_tokenizer(family_template("qwen2_5"))
    library = trl if name == "GRPO" else trl_selfplay
    classes = {each: getattr(library, each) for each in (f"{name}Config", f"{name}Trainer")}
    monkeypatch.setitem(sys.modules, "library", SimpleNamespace(**classes))
    given = {
        "model": bigram_model(tokenizer, CHAT_STEPS),
        "tokenizer": tokenizer,
        "folder": str(tmp_path / "run"),
        "__name__": "script",
    }
    exec(compile(SCRIPTS[kind].replace("GRPO", name), "script.py", "exec"), given)
    trainer = given["trainer"]
    steps = [line["step"] for line in trainer.state.log_history if "tools/call_frequency" in line]
    if name == "GRPO":
        assert trainer.state.global_step == 2
        assert steps
        return
    assert [line["steps"] for line in trainer.run.lines] == [2, 2, 2]
    samples = [r for line in trainer.run.lines for r in samples_of(trainer, line["round"])]
    called = [r for r in samples if any(m["role"] == "tool" for m in r.messages)]
    assert called
    if kind == "games":
        assert len(trainer.self_play.rows) == 12
        assert {r.environment_reward for r in called if r.halt is None} == {1.0}
        results = [m["content"] for r in called for m in r.messages if m["role"] == "tool"]
        assert "Error: ValueError: Game over." in results
    if kind == "environment":
        assert {r.environment_reward for r in called if r.halt is None} == {1.0}
        assert trainer.self_play.collector.scorer.names == ("SumEnv",)
    assert all(len(turns_of(r)) <= 2 for r in samples)


def samples_of(trainer, round_index):
    return load_samples(trainer.run.folder(round_index))


def turns_of(rollout):
    """Return the turns whose calls were made."""
    roles = [m["role"] for m in rollout.messages]
    return [i for i, role in enumerate(roles[:-1]) if (role, roles[i + 1]) == ("assistant", "tool")]
