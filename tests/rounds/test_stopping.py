"""Where the chat template ends a turn, told from what it writes after two different completions."""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from trl_selfplay.rollouts.prompts import load_prompt_rows
from trl_selfplay.rollouts.rendering import PromptFormatter
from trl_selfplay.rounds.stopping import end_of_turn, warn_of_end

TURNS = (
    "{% for m in messages %}{% if not loop.first and m.role == loop.previtem.role %}"
    "{{ raise_exception('two turns of one role') }}{% endif %}<{{ m.role }}>{{ m.content }}END\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "1 + 1?"}
BEGUN = {"role": "assistant", "content": "so it is "}


@pytest.fixture
def stages(byte_tokenizer):
    """Return a function that makes what the check reads of a trainer's stages."""

    def build(prompt, template=TURNS, eos="<eos>", stop_strings=None):
        byte_tokenizer.chat_template = template
        rows = load_prompt_rows(Dataset.from_list([{"prompt": prompt}]), "train_dataset")
        return SimpleNamespace(
            rows=rows,
            formatter=PromptFormatter(byte_tokenizer),
            eos_token_ids=tuple(byte_tokenizer(eos)["input_ids"]),
            config=SimpleNamespace(stop_strings=stop_strings),
        )

    return build


@pytest.mark.parametrize("prompt", [[USER], [USER, BEGUN]])
def test_the_end_is_what_follows_any_completion(stages, byte_tokenizer, prompt) -> None:
    play = stages(prompt)
    assert byte_tokenizer.decode(end_of_turn(play)) == "END\n"
    assert "ends the assistant's turn with 'E'" in warn_of_end(play)
    assert "`tokenizer.eos_token = 'E'`" in warn_of_end(play)


def test_nothing_is_said_where_the_turn_ends_with_eos_or_a_stop_string(stages) -> None:
    assert warn_of_end(stages([USER], TURNS.replace("END", "<eos>"))) is None
    assert warn_of_end(stages([USER], stop_strings=["END"])) is None
    assert warn_of_end(stages("1 + 1?")) is None


def test_a_template_that_ends_no_turn_is_told(stages) -> None:
    play = stages([USER], TURNS.replace("END\n", ""))
    assert end_of_turn(play) == ()
    assert "writes nothing after the assistant's turn" in warn_of_end(play)


def test_a_template_that_renders_no_answer_is_left_alone(stages) -> None:
    refuses = "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('no') }}"
    play = stages([USER], refuses + "{% endif %}{{ m.content }}{% endfor %}")
    assert end_of_turn(play) is None
    assert warn_of_end(play) is None
