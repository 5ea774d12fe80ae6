"""Few-shot examples that are longer than any completion may be are told before anything is sampled."""

from types import SimpleNamespace

import pytest
from plain_tools import add

from trl_selfplay import ReSTEMConfig
from trl_selfplay.rollouts.rendering import FewShotExample, PromptFormatter
from trl_selfplay.rounds.example_lengths import warn_of_long_examples
from trl_selfplay.tools.tool_set import ToolSet

SHORT = FewShotExample("Q", "yes", None)
FOUND = "It is known that " + "they add up. " * 5
IN_WORDS = f'Action: add({{"a": 3, "b": 4}})\nObservation: {FOUND}\nyes'
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3, "b": 4}}}
IN_MESSAGES = [
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "add", "content": [{"type": "text", "text": FOUND}]},
    {"role": "assistant", "content": "yes"},
]


def warn(tokenizer, completion, most, *, tools=True, shown=True):
    examples = [SHORT, FewShotExample("Q", completion, None)]
    config = ReSTEMConfig("run", max_completion_length=most, bf16=False)
    return warn_of_long_examples(
        SimpleNamespace(
            formatter=PromptFormatter(tokenizer, examples),
            config=config,
            toolbox=ToolSet([add], 1.0) if tools else None,
            shows_examples=lambda round_index: shown,
        )
    )


@pytest.mark.parametrize(
    ("completion", "length"),
    [(IN_WORDS, len(IN_WORDS)), (IN_MESSAGES, len(FOUND) + len("yes"))],
    ids=["words", "messages"],
)
def test_an_example_longer_than_a_completion_may_be_is_told(byte_tokenizer, completion, length):
    """By tokens, which are bytes here; an example that just fits is none."""
    text = warn(byte_tokenizer, completion, length - 1)
    assert text.startswith(
        "1 of 2 few_shot_examples have longer completions than "
        f"max_completion_length={length - 1} allows, the longest {length} tokens, results of tools included."
    )
    assert warn(byte_tokenizer, completion, length) is None
    assert warn(byte_tokenizer, completion, 1, shown=False) is None
    assert "results" not in warn(byte_tokenizer, completion, 1, tools=False)
