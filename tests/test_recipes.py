"""The recipes run as they are: the demo, LoRA, 4 bits, all weights; their files parse."""

import json
import sys
from dataclasses import fields
from pathlib import Path

import plain_tools
import pytest
from datasets import Dataset, load_from_disk
from processes import run_script
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig, ScriptArguments, SFTConfig
from trl.rewards import think_format_reward
from trl.scripts.grpo import GRPOScriptArguments

from trl_selfplay import QuietSTaRConfig, QuietSTaRModel, STaRConfig, estimate
from trl_selfplay.demos.script_arguments import (
    GradedScriptArguments,
    load_named_dataset,
    load_reward_func,
    load_sets,
    load_splits,
    load_tools,
    model_arguments,
    prepare,
    student_arguments,
)
from trl_selfplay.estimation.record import usable_bytes
from trl_selfplay.rewards import VerifierReward, exact_reward
from trl_selfplay.rollouts.record import load_rollouts
from trl_selfplay.tools.record import ToolResult

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def star(load_script):
    return load_script(RECIPES / "star.py")


@pytest.fixture
def quiet_star(load_script):
    return load_script(RECIPES / "quiet_star.py")


@pytest.fixture
def sums_folder(tmp_path, sums):
    """A dataset on disk with other column names, as many public ones have."""
    folder = tmp_path / "sums"
    folder.mkdir()
    for name, rows in (("train", sums(12)), ("test", sums(4, first=50))):
        lines = [json.dumps({"question": r["prompt"], "answer": r["solution"]}) for r in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def reward_module(tmp_path, monkeypatch):
    """A user's reward function in the working directory."""
    (tmp_path / "my_rewards.py").write_text(
        "def contains(completions, solution, **kwargs):\n"
        "    return [float(s in c.split()) for c, s in zip(completions, solution)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_rewards.contains"
    sys.modules.pop("my_rewards", None)


FLAGS = {
    "lora": ["--use_peft", "--lora_target_modules", "all-linear"],
    "4-bit": ["--use_peft", "--lora_target_modules", "all-linear", "--load_in_4bit"],
    "all weights": [],
}


def test_prompts_that_are_chat_turns_already_stay_as_they_are(star) -> None:
    turns = [{"role": "user", "content": "1 + 1?"}]
    arguments = GradedScriptArguments(chat=True)
    rows = Dataset.from_list([{"prompt": turns, "solution": "2"}])
    assert prepare(rows, arguments)[0]["prompt"] == turns
    plain = Dataset.from_list([{"prompt": "1 + 1?", "solution": "2"}])
    assert prepare(plain, arguments)[0]["prompt"] == turns


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLAGS)
def test_star_trains_a_model_and_dataset_from_disk(
    star, kind, sums_folder, saved_chat_model, reward_module, tmp_path
) -> None:
    output = tmp_path / "out"
    flags = [
        *("--model_name_or_path", str(saved_chat_model), "--dataset_name", str(sums_folder)),
        *("--prompt_column", "question", "--solution_column", "answer"),
        *("--reward_funcs", reward_module, "--output_dir", str(output), "--use_cpu"),
        *("--num_rounds", "2", "--num_generations", "4", "--temperature", "1.0"),
        *("--max_completion_length", "8", "--max_steps", "2", "--learning_rate", "1e-2"),
        *("--report_to", "none", "--disable_tqdm", "true", *FLAGS[kind]),
    ]
    star.main(*star.parse_arguments(flags))
    lines = [json.loads(x) for x in (output / "_rounds/rounds.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [2, 2]
    assert all(line["examples"] > 0 for line in lines)
    assert all("eval_accuracy" in line["eval"] for line in lines)
    saved = "model.safetensors" if kind == "all weights" else "adapter_model.safetensors"
    assert (output / saved).exists()
    # The same command again refuses, and with this flag finds nothing left to do.
    with pytest.raises(FileExistsError, match="resume_from_checkpoint"):
        star.main(*star.parse_arguments(flags))
    star.main(*star.parse_arguments([*flags, "--resume_from_checkpoint", "true"]))
    assert len((output / "_rounds/rounds.jsonl").read_text().splitlines()) == 2


# What each demo prints: the number at its end.
DEMOS = {
    "star": ("star-demo", "Greedy accuracy on 8 prompts"),
    "spin": ("spin-demo", "Right result in the data's style"),
    "rest_em": ("rest-em-demo", "Greedy accuracy on 8 prompts"),
    "irpo": ("irpo-demo", "Greedy accuracy on 8 prompts"),
    "rest": ("rest-demo", "Greedy accuracy on 8 prompts"),
    "rft": ("rft-demo", "Greedy accuracy on 8 prompts"),
    "star_then_grpo": ("star-then-grpo-demo", "Greedy accuracy on 8 prompts after GRPO"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_runs_from_one_command(tiny_demo_model, name, tmp_path) -> None:
    """At its smallest, with a tiny model in the place of the demo's, which test_commands.py runs."""
    folder, said = DEMOS[name]
    flags = ["--smoke", "--seed", "0"]
    if name == "irpo":  # right and wrong completions of one prompt
        flags += ["--num_generations", "8", "--temperature", "1.5"]
    code, printed = run_script(RECIPES / f"{name}.py", flags, tmp_path)
    assert code == 0, printed[-3000:]
    assert said in printed
    if name != "spin":
        assert "funnel: sampled" in printed
    if name == "star":
        assert "The demo differs from the paper: 2 completions per prompt" in printed
    lines = (tmp_path / folder / "_rounds/rounds.jsonl").read_text().splitlines()
    assert all(json.loads(line)["steps"] > 0 for line in lines)
    assert (tmp_path / folder / "rounds.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / folder / "adapter_model.safetensors").exists()


def test_the_quick_demo_changes_the_demo_and_nothing_else(star, tmp_path) -> None:
    flags = ["--output_dir", str(tmp_path)]
    full, quick = (star.parse_arguments([*flags, *more]) for more in ([], ["--quick"]))
    assert (quick[0].quick, quick[1].max_steps) == (True, star.QUICK["max_steps"])
    for before, after in zip(full, quick, strict=True):
        changed = {
            f.name for f in fields(before) if getattr(before, f.name) != getattr(after, f.name)
        }
        assert changed <= {"quick", "logging_dir", *star.QUICK}
    given = star.parse_arguments([*flags, "--quick", "--max_steps", "3"])
    assert given[1].max_steps == 3


@pytest.mark.slow
def test_the_demo_of_programs_runs_and_reads_other_columns(
    load_script, tiny_demo_model, tmp_path
) -> None:
    """The tiny model, which knows no Python, keeps nothing."""
    code, printed = run_script(RECIPES / "star_code.py", ["--smoke", "--seed", "0"], tmp_path)
    assert code == 0, printed[-3000:]
    assert "Greedy accuracy on 8 prompts not used for selection: 0.000" in printed
    parsed = load_script(RECIPES / "star_code.py").parse_arguments(
        ["--dataset_name", "x", "--tests_column", "test_list", "--output_dir", str(tmp_path)]
    )
    assert parsed[0].tests_column == "test_list"


@pytest.mark.slow
def test_the_demo_with_tools_runs_with_a_model_that_calls_none(tiny_demo_model, tmp_path) -> None:
    code, printed = run_script(RECIPES / "rest_react.py", ["--smoke", "--seed", "0"], tmp_path)
    assert code == 0, printed[-3000:]
    assert "Greedy accuracy on 8 prompts not used for selection: 0.000" in printed


@pytest.fixture
def tool_module(tmp_path, monkeypatch):
    """A user's tool in the working directory."""
    (tmp_path / "my_tools.py").write_text(
        "def add(a: int, b: int) -> int:\n"
        '    """Add two numbers.\n\n    Args:\n        a: One.\n        b: Another.\n    """\n'
        "    return a + b\n\n\n"
        "def search(query: str) -> str:\n"
        '    """Search.\n\n    Args:\n        query: What for.\n    """\n'
        "    return query\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "my_tools.add"
    sys.modules.pop("my_tools", None)


@pytest.mark.slow
def test_tools_of_one_s_own_are_named_by_import_path(
    load_script, sums_folder, saved_chat_model, reward_module, tool_module, tmp_path
) -> None:
    recipe = load_script(RECIPES / "rest_react.py")
    flags = [
        *("--model_name_or_path", str(saved_chat_model), "--dataset_name", str(sums_folder)),
        *("--prompt_column", "question", "--solution_column", "answer", "--tools", tool_module),
        *("--reward_funcs", reward_module, "--output_dir", str(tmp_path / "out"), "--use_cpu"),
        *("--num_rounds", "1", "--num_generations", "2", "--max_completion_length", "8"),
        *("--max_steps", "1", "--on_empty_round", "stop", "--report_to", "none"),
        *("--disable_tqdm", "true", "--tool_format", "react"),
    ]
    recipe.main(*recipe.parse_arguments(flags))
    (path,) = (tmp_path / "out/_rounds/round-000/samples").glob("0*.parquet")
    assert "<unk> <unk> <unk>" in load_rollouts(path)[0].prompt  # what describes the tool


def test_the_recipe_with_tools_says_what_it_lacks(load_script, tool_module, tmp_path) -> None:
    recipe = load_script(RECIPES / "rest_react.py")
    flags = ["--dataset_name", "x", "--output_dir", str(tmp_path)]

    def load(*more):
        return recipe.load_tools(recipe.parse_arguments([*flags, *more])[0])

    with pytest.raises(ValueError, match=r"no tools: give --tools my_tools\.search"):
        load()
    assert [tool(1, 2) for tool in load("--tools", tool_module)["tools"]] == [3]
    with pytest.raises(ImportError, match="my_tools has no function 'subtract'"):
        load("--tools", "my_tools.subtract")
    with pytest.raises(ValueError, match="--agent needs one tool"):
        load("--agent", "--tools", tool_module, tool_module)
    demo = ["--output_dir", str(tmp_path), "--use_cpu", "--tools", tool_module]
    with pytest.raises(ValueError, match="without a dataset: the demo's questions"):
        recipe.main(*recipe.parse_arguments(demo))
    with pytest.raises(ValueError, match=r"--agent needs one tool, .* no --environment_factory"):
        load("--agent", "--tools", tool_module, "--environment_factory", tool_module)


@pytest.mark.slow
def test_the_paper_s_questions_are_played_from_a_local_file(
    load_script, saved_chat_model, tool_module, tmp_path
) -> None:
    """A model that knows no action: its round says so, and ends."""
    row = {"id": "0", "question": "Who built it?", "answer": "Ada", "type": "bridge", "level": "hard",
           "supporting_facts": {"title": ["It"], "sent_id": [0]},
           "context": {"title": ["It"], "sentences": [["Ada built it."]]}}  # fmt: skip
    (tmp_path / "hotpot.jsonl").write_text(json.dumps(row))
    recipe = load_script(RECIPES / "rest_react.py")
    flags = [
        *("--preset", "hotpot_qa", "--tools", tool_module.replace("add", "search")),
        *("--dataset_name", str(tmp_path / "hotpot.jsonl"), "--use_cpu"),
        *("--model_name_or_path", str(saved_chat_model), "--output_dir", str(tmp_path / "out")),
        *("--max_completion_length", "8", "--on_empty_round", "stop", "--report_to", "none"),
        *("--disable_tqdm", "true"),
    ]
    recipe.main(*recipe.parse_arguments(flags))
    (path,) = (tmp_path / "out/_rounds/round-000/samples").glob("step0-0*.parquet")
    assert len(load_rollouts(path)) == 4
    assert (tmp_path / "out/report.html").exists()


def test_the_agent_of_the_recipe_has_examples_of_each_step(
    load_script, tool_module, tmp_path
) -> None:
    recipe = load_script(RECIPES / "rest_react.py")
    search = tool_module.replace("add", "search")
    flags = ["--dataset_name", "x", "--agent", "--tools", search, "--output_dir", str(tmp_path)]
    agent = recipe.load_tools(recipe.parse_arguments(flags)[0])["agent"]
    state, kinds = agent.begin("Who?"), []
    for action in (
        "Search(query='who')", "Summary(text='Ada')", "Terminate()", "Answer(text='Ada')", "Keep()",
        "Keep()",
    ):  # fmt: skip
        step = agent.next_step(state, few_shot=True)
        kinds.append(step.kind)
        assert step.prompt.count("action =") > 2
        move = agent.act(state, action)
        result = ToolResult("search", "Ada was it.")
        state = agent.observe(move.state, result) if move.call else move.state
    assert kinds == ["decision", "summarization", "decision", "answer", "relevance", "grounding"]
    assert (agent.next_step(state, few_shot=True), agent.answer(state)) == (None, "Ada")


@pytest.mark.slow
def test_v_star_trains_a_verifier_of_a_finished_run(
    star, load_script, sums_folder, saved_chat_model, reward_module, tmp_path
) -> None:
    data = ["--dataset_name", str(sums_folder), "--prompt_column", "question"]
    data += ["--solution_column", "answer", "--use_cpu", "--report_to", "none"]
    data += ["--disable_tqdm", "true", "--max_steps", "2", "--use_peft"]
    flags = [
        *("--model_name_or_path", str(saved_chat_model), "--reward_funcs", reward_module),
        *("--num_rounds", "1", "--num_generations", "6", "--temperature", "1.0"),
        *("--max_completion_length", "16", "--output_dir", str(tmp_path / "star"), *data),
    ]
    star.main(*star.parse_arguments(flags))
    recipe = load_script(RECIPES / "v_star.py")
    flags = ["--model_name_or_path", str(tmp_path / "star"), *data]
    flags += ["--output_dir", str(tmp_path / "verifier")]
    with pytest.raises(ValueError, match="give --samples"):
        recipe.main(*recipe.parse_arguments(flags))
    recipe.main(*recipe.parse_arguments([*flags, "--samples", str(tmp_path / "star")]))
    scores = VerifierReward(str(tmp_path / "verifier"), score="ratio")(["Q 1 + 2 = ?"], ["so 3"])
    assert scores[0] is not None


@pytest.mark.slow
def test_the_demo_of_v_star_trains_generator_and_verifier(tiny_demo_model, tmp_path) -> None:
    code, printed = run_script(RECIPES / "v_star.py", ["--smoke", "--seed", "0"], tmp_path)
    assert code == 0, printed[-3000:]
    table = printed[printed.index("the verifier's best of k") :].splitlines()[1:5]
    assert table[0].split() == ["score", "k=1", "k=2", "k=4"]
    assert [line.split()[0] for line in table[1:]] == ["sum", "mean", "ratio"]
    assert len({line.split()[1] for line in table[1:]}) == 1  # one of one is no choice
    for folder in ("v-star-demo", "v-star-demo/generator"):
        assert (tmp_path / folder / "adapter_model.safetensors").exists()
        lines = (tmp_path / folder / "_rounds/rounds.jsonl").read_text().splitlines()
        assert [json.loads(line)["steps"] for line in lines] == [2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FLAGS)
def test_quiet_star_trains_a_model_and_text_from_disk(
    quiet_star, kind, saved_chat_model, tmp_path, capsys
) -> None:
    texts = [f"Q {a} + {b} = ? so {(a + b) % 10}" for a in range(4) for b in range(3)]
    folder, output = tmp_path / "texts", tmp_path / "out"
    folder.mkdir()
    for name, part in (("train", texts[4:]), ("test", texts[:4])):
        lines = [json.dumps({"text": text}) for text in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    flags = [
        *("--model_name_or_path", str(saved_chat_model), "--dataset_name", str(folder)),
        *("--output_dir", str(output), "--use_cpu", "--max_steps", "2", "--learning_rate", "1e-2"),
        *("--thought_length", "2", "--num_ahead_tokens", "2", "--eval_strategy", "steps"),
        *("--report_to", "none", "--disable_tqdm", "true", *FLAGS[kind]),
    ]
    quiet_star.main(*quiet_star.parse_arguments(flags))
    saved = "model.safetensors" if kind == "all weights" else "adapter_model.safetensors"
    assert (output / saved).exists()
    assert (output / "gains.png").read_bytes()[:4] == b"\x89PNG"
    assert "with, held-out" in (output / "report.html").read_text()
    said = capsys.readouterr().out
    assert "Held-out loss in nats per token" in said
    assert "held-out lines" not in said  # those are the demo's
    ids = AutoTokenizer.from_pretrained(saved_chat_model)(texts[0], return_tensors="pt")
    text = QuietSTaRModel.from_pretrained(output).generate(ids["input_ids"], max_new_tokens=2)
    assert text.shape[1] > ids["input_ids"].shape[1]


@pytest.mark.slow
def test_the_quiet_star_demo_runs_at_its_smallest_size(tmp_path) -> None:
    code, printed = run_script(RECIPES / "quiet_star.py", ["--smoke"], tmp_path)
    assert code == 0, printed[-3000:]
    assert "Answers of 16 held-out lines, after: loss" in printed
    folder = tmp_path / "quiet-star-demo"
    assert (folder / "gains.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "quiet_star.safetensors").exists()
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_dataset_switches_the_quiet_star_demo_off(quiet_star, tmp_path) -> None:
    _, config, model, _ = quiet_star.parse_arguments(["--output_dir", str(tmp_path)])
    assert (config.num_ahead_tokens, config.thought_length) == (1, 4)
    assert not model.use_peft
    flags = ["--dataset_name", "x", "--output_dir", str(tmp_path)]
    _, config, model, _ = quiet_star.parse_arguments(flags)
    assert (config.num_ahead_tokens, config.thought_length) == (4, 8)
    flags = ["--smollm2", "--max_steps", "7", "--output_dir", str(tmp_path)]
    script, config, model, _ = quiet_star.parse_arguments(flags)
    assert (script.smollm2, model.use_peft, config.max_steps) == (True, True, 7)


def test_every_flag_of_the_sft_script_is_known_to_quiet_star(quiet_star) -> None:
    classes = (
        quiet_star.QuietSTaRScriptArguments,
        QuietSTaRConfig,
        ModelConfig,
        DatasetMixtureConfig,
    )
    everything = [f.name for c in classes for f in fields(c)]
    assert len(everything) == len(set(everything))
    theirs = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
    assert {f.name for c in theirs for f in fields(c)} <= set(everything)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_without_a_dataset_the_flags_defaults_are_the_demo(load_script, path, tmp_path) -> None:
    recipe = load_script(path)
    for flags, changes in (([], {}), (["--smoke"], recipe.SMOKE)):
        parsed = recipe.parse_arguments([*flags, "--output_dir", str(tmp_path)])
        given = {name: value for part in parsed for name, value in vars(part).items()}
        wanted = recipe.DEMO | changes | {"output_dir": str(tmp_path)}
        assert {name: given[name] for name in wanted} == wanted


def test_a_flag_of_another_trainer_is_an_error_that_says_what_to_do(load_script, tmp_path) -> None:
    recipe = load_script(RECIPES / "spin.py")
    flags = ["--dataset_name", "x", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="pairs aren't packed") as raised:
        recipe.parse_arguments(
            [*flags, "--packing", "--eos_token", "<eos>", "--no_such=1", "--nun-rounds", "2"]
        )
    assert "--eos_token: leave it out; set `tokenizer.eos_token`" in str(raised.value)
    assert "--no_such: leave it out; it is unknown" in str(raised.value)
    assert "--nun_rounds: it is unknown; did you mean 'num_rounds'?" in str(raised.value)


def test_flags_win_over_the_demo_and_a_dataset_switches_it_off(star, tmp_path) -> None:
    _, config, *_ = star.parse_arguments(["--num_rounds", "1", "--output_dir", str(tmp_path)])
    assert (config.num_rounds, config.num_generations) == (1, 8)
    _, config, model, _ = star.parse_arguments(["--dataset_name", "x", "--output_dir", "y"])
    assert (config.num_generations, model.use_peft) == (1, False)


def test_grpo_takes_star_s_flags_but_its_own_schedule(load_script, tmp_path) -> None:
    recipe = load_script(RECIPES / "star_then_grpo.py")
    flags = ["--output_dir", str(tmp_path), "--use_cpu", "--dataset_name", "x", "--seed", "7"]
    flags += ["--max_completion_length", "99", "--learning_rate", "0.5", "--num_generations", "4"]
    flags += ["--temperature", "0.8"]
    script, config, *_ = recipe.parse_arguments([*flags, "--grpo", '{"max_steps": 3, "beta": 0.1}'])
    found = recipe.grpo_config(config, script.grpo)
    assert (found.max_completion_length, found.num_generations, found.seed) == (99, 4, 7)
    assert (found.max_steps, found.beta, found.output_dir) == (3, 0.1, str(tmp_path / "grpo"))
    assert found.learning_rate == GRPOConfig(str(tmp_path), use_cpu=True, bf16=False).learning_rate


# hidden and inner size, layers, heads, key heads, vocabulary
QWEN_3B = (2048, 11_008, 36, 16, 2, 151_936)
QWEN_7B = (3584, 18_944, 28, 28, 4, 152_064)


def qwen(hidden_size, intermediate_size, layers, heads, key_heads, vocab_size):
    """Return a configuration of Qwen2.5."""
    return Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        tie_word_embeddings=vocab_size < 152_000,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "card", "sizes"),
    [
        ("qlora_8gb", 8, QWEN_3B),
        pytest.param("qlora_16gb", 16, QWEN_7B, marks=pytest.mark.slow),
        pytest.param("qlora_24gb", 24, QWEN_7B, marks=pytest.mark.slow),
        pytest.param("full_80gb", 80, QWEN_7B, marks=pytest.mark.slow),
    ],
)
def test_the_file_of_a_card_fits_it(star, name, card, sizes) -> None:
    path = RECIPES / f"{name}.yaml"
    command = path.read_text().splitlines()[0]
    assert command == f"# python recipes/star.py --config recipes/{name}.yaml"
    script, config, model, _ = star.parse_arguments(["--config", str(path)])
    assert (script.prompt_column, script.solution_column, script.chat) == (
        "question",
        "answer",
        True,
    )
    assert (model.use_peft, model.load_in_4bit) == ("qlora" in name, "qlora" in name)
    arguments = model_arguments(config, model)
    free = usable_bytes(card)
    found = estimate(qwen(*sizes), config, **arguments, memory=free, device="cuda")
    assert found.fits(free)
    assert found.advice == ()
    billions = float(model.model_name_or_path.split("-")[1].removesuffix("B"))
    assert found.num_parameters / 1e9 == pytest.approx(billions, rel=0.15)


@pytest.mark.slow
def test_a_finished_run_trains_a_student_from_the_command_line(
    star, load_script, sums_folder, saved_chat_model, saved_tiny_model, reward_module, tmp_path
) -> None:
    """RA-14: `--resume --student_model`; with hinted samples in the mixture."""
    output = tmp_path / "out"
    flags = [
        *("--model_name_or_path", str(saved_chat_model), "--dataset_name", str(sums_folder)),
        *("--prompt_column", "question", "--solution_column", "answer"),
        *("--reward_funcs", reward_module, "--output_dir", str(output), "--use_cpu"),
        *("--num_rounds", "1", "--num_generations", "2", "--temperature", "1.0"),
        *("--max_completion_length", "16", "--max_steps", "2", "--report_to", "none"),
        *("--disable_tqdm", "true"),
    ]
    star.main(*star.parse_arguments(flags))
    student = ["--student_model", str(saved_tiny_model), "--student_args", '{"max_steps": 3}']
    star.main(*star.parse_arguments([*flags, "--resume", *student]))

    def rows(folder):
        found = load_from_disk(str(folder / "_rounds/round-000/dataset"))
        return sorted((row["input_ids"], row["labels"]) for row in found)

    assert rows(output / "student") == rows(output)
    (line,) = [json.loads((output / "student/_rounds/rounds.jsonl").read_text())]
    assert line["steps"] == 3
    assert json.loads((output / "_rounds/rounds.jsonl").read_text())["funnel"]["hinted_kept"]
    rest_em = load_script(RECIPES / "rest_em.py")
    script, *_ = rest_em.parse_arguments(["--student_model", "small", "--student_args", "[1]"])
    with pytest.raises(ValueError, match=r"student_args='\[1\]' is no JSON object"):
        student_arguments(script)


def test_every_flag_of_the_grpo_script_is_known() -> None:
    ours = {f.name for f in fields(GradedScriptArguments)}
    assert {f.name for f in fields(GRPOScriptArguments)} <= ours
    # the other classes are the same ones, and none hides a field of another
    everything = [
        f.name
        for c in (GradedScriptArguments, STaRConfig, ModelConfig, DatasetMixtureConfig)
        for f in fields(c)
    ]
    assert len(everything) == len(set(everything))


def test_reward_functions_are_found_by_name_path_or_model_id(reward_module) -> None:
    assert load_reward_func("exact_reward") is exact_reward
    assert load_reward_func("think_format_reward") is think_format_reward
    assert load_reward_func("some/reward-model-1.5") == "some/reward-model-1.5"
    found = load_reward_func(reward_module)
    assert found(completions=["so 3"], solution=["3"]) == [1.0]
    punish = load_reward_func("get_soft_overlong_punishment")
    assert punish(completion_ids=[[0] * 10]) == [0.0]
    with pytest.raises(ValueError, match="no reward function 'exact_rewrd'"):
        load_reward_func("exact_rewrd")


def test_reward_functions_of_one_argument_are_named_with_it(tmp_path, monkeypatch) -> None:
    pytest.importorskip("reasoning_gym")
    (tmp_path / "my_checks.py").write_text(
        "def is_even(answer):\n    return int(answer) % 2 == 0\n"
        "def above(limit):\n    return lambda completions, **kwargs: [len(c) > limit for c in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    puzzle = load_reward_func("puzzle_reward:chain_sum")
    assert (puzzle.__name__, puzzle.name) == ("chain_sum_reward", "chain_sum")
    assert load_reward_func("checker_reward:my_checks.is_even")(["4", "Answer: 5"]) == [1.0, 0.0]
    assert load_reward_func("my_checks.above:2.5")(["ab", "abc"]) == [False, True]
    with pytest.raises(ValueError, match="give its argument behind a colon, puzzle_reward:…"):
        load_reward_func("puzzle_reward")
    with pytest.raises(ValueError, match="no task 'nonesuch'"):
        load_reward_func("puzzle_reward:nonesuch")


def test_a_function_of_one_s_own_module_may_follow_a_colon(reward_module) -> None:
    found = load_reward_func(reward_module.replace(".", ":"))
    assert found(completions=["so 3", "4"], solution=["3", "3"]) == [1.0, 0.0]
    with pytest.raises(ImportError, match="my_rewards has no function 'absent'"):
        load_reward_func("my_rewards:absent")


def test_tools_and_environments_are_named_by_import_path(star, tmp_path) -> None:
    def load(*flags):
        return load_tools(star.parse_arguments([*flags, "--output_dir", str(tmp_path)])[0])

    assert load() == {"tools": None, "environment_factory": None}
    assert load("--tools", "plain_tools.add", "plain_tools.look_up") == {
        "tools": [plain_tools.add, plain_tools.look_up], "environment_factory": None,
    }  # fmt: skip
    found = load("--environment_factory", "plain_tools.Counter")
    assert found["environment_factory"] is plain_tools.Counter
    with pytest.raises(ImportError, match="plain_tools has no function 'absent'"):
        load("--tools", "plain_tools.absent")
    for path in RECIPES.glob("*.py"):  # each that takes reward functions takes tools
        text = path.read_text()
        assert "load_reward_funcs(" not in text or "load_tools(" in text, path


def test_a_model_without_a_dataset_is_refused_and_without_both_the_demo_is_told(
    star, tmp_path, capsys
) -> None:
    def load(*flags):
        script, _, model, data = star.parse_arguments([*flags, "--output_dir", str(tmp_path)])
        return load_sets(script, data, star.PRESETS, model)

    with pytest.raises(ValueError, match=r"no dataset\. Add --dataset_name"):
        load("--model_name_or_path", "m")
    assert load() is None
    assert "No dataset is named (--dataset_name): this is the demo" in capsys.readouterr().out
    assert load("--smoke", "--model_name_or_path", "m") is None
    assert load("--quick") is None
    assert capsys.readouterr().out == ""


def test_a_flag_isn_t_taken_for_a_longer_one(star, tmp_path) -> None:
    with pytest.raises(ValueError, match="--num_round: it is unknown; did you mean 'num_rounds'"):
        star.parse_arguments(["--num_round", "3", "--output_dir", str(tmp_path)])


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_a_dataset_may_be_a_file(star, sums, kind, tmp_path) -> None:
    path = tmp_path / f"sums.{kind}"
    getattr(sums(3), f"to_{kind.removesuffix('l')}")(str(path))
    script, _, model, data = star.parse_arguments(
        ["--dataset_name", str(path), "--output_dir", str(tmp_path)]
    )
    sets = load_sets(script, data, None, model)
    assert sets["train_dataset"]["prompt"] == sums(3)["prompt"]
    assert sets["eval_dataset"] is None
    train, test = load_splits(script, data)
    assert (len(train), test) == (3, None)
    script.dataset_train_split, script.dataset_test_split = "train[:2]", "train[2:]"
    assert [len(split) for split in load_splits(script, data)] == [2, 1]


def test_a_file_of_another_kind_is_refused_at_once(star, tmp_path) -> None:
    (tmp_path / "sums.txt").write_text("1 + 1")
    with pytest.raises(ValueError, match=r"sums.txt' is a file, and its name ends in none of"):
        load_named_dataset(str(tmp_path / "sums.txt"))


def test_plain_prompts_become_chat_turns_on_request(star, sums) -> None:
    script, *_ = star.parse_arguments(["--chat", "--dataset_name", "x", "--output_dir", "y"])
    rows = prepare(sums(2), script)
    assert rows[0]["prompt"] == [{"role": "user", "content": "Q 0 + 0 = ?"}]


def test_a_recipe_is_at_most_150_lines_long() -> None:
    for path in RECIPES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 150, path
