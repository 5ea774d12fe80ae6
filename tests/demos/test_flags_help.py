"""The help of a recipe's flags: which group a flag is in, what of TRL's is left out, how it reads."""

import re
from dataclasses import dataclass, field

import pytest
import trl

from trl_selfplay import IRPOConfig, QuietSTaRConfig, STaRConfig
from trl_selfplay.demos.flags_help import describe_script
from trl_selfplay.demos.script_arguments import GradedScriptArguments, RunScriptArguments

TITLES = ["Run", "Method: rounds, and what is trained on", "Sampling", "Training", "Model",
          "Data and rewards", "More of Training, in the words of TRL and transformers with --help_all"]  # fmt: skip


def sections(config, script=GradedScriptArguments, whole=False):
    """Return {title: text} of the help's groups, in their order."""
    owners = (script, config, trl.ModelConfig, trl.DatasetMixtureConfig)
    text = describe_script(owners, whole)
    parts = re.split(r"^(\S.*):$", text[text.index("\nRun:\n") :], flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("config", [STaRConfig, IRPOConfig])
def test_flags_stand_in_groups_the_methods_own_first(config) -> None:
    found = sections(config)
    assert list(found) == TITLES
    expected = {
        "num_rounds": 1, "reward_threshold": 1, "temperature": 2, "vllm_mode": 2, "max_length": 3,
        "learning_rate": 3, "lora_r": 4, "dataset_name": 5, "reward_funcs": 5, "resume": 0, "fsdp": 6,
    }  # fmt: skip
    for name, place in expected.items():
        holders = [title for title, text in found.items() if re.search(rf"--{name}\b", text)]
        assert holders == [TITLES[place]], name
    sampling = found["Sampling"]
    assert sampling.index("--num_generations ") < sampling.index("--use_vllm ")


def test_all_of_the_parents_flags_are_explained_on_demand() -> None:
    found = sections(STaRConfig, whole=True)
    assert list(found) == TITLES[:-1]
    assert "--fsdp TEXT" in found["Training"]
    assert len(sections(QuietSTaRConfig, RunScriptArguments, whole=True)["Training"]) > 10_000


def test_a_flag_shows_its_kind_choices_and_default() -> None:
    @dataclass
    class Arguments(RunScriptArguments):
        strength: float = field(default=0.0, metadata={"help": "How much. " + "Words. " * 20})
        parts: list[int] | None = field(default=None, metadata={"help": "Which."})
        mode: str = field(default="a", metadata={"choices": ["a", "b"], "help": "How."})

    text = sections(STaRConfig, Arguments)["Data and rewards"]
    assert re.search(r"^  --strength FLOAT +How much\.", text, re.M)
    assert "(default: 0.0)" in text
    assert re.search(r"^  --parts INT … +Which\.$", text, re.M)
    assert re.search(r"^  --mode \{a,b\} +How\. \(default: a\)$", text, re.M)
    assert max(map(len, text.splitlines())) <= 100
