"""The papers' presets: their datasets' columns become prompts whose golds the rewards accept.

Each dataset has a stand-in here: a folder with the columns and the splits of the one on the hub.
"""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from trl_selfplay import IRPOConfig, STaRConfig
from trl_selfplay.demos import papers
from trl_selfplay.demos.script_arguments import load_reward_funcs, load_sets, load_splits
from trl_selfplay.trainers.star.rationalization import add_hint

RECIPES = Path(__file__).parent.parent.parent / "recipes"
EVERY = [
    (recipe, name)
    for recipe, presets in {
        "star": papers.STAR, "rest_em": papers.REST_EM, "rest": papers.REST, "rft": papers.RFT,
        "irpo": papers.IRPO, "spin": papers.SPIN, "quiet_star": papers.QUIET_STAR,
        "v_star": papers.V_STAR, "rest_react": papers.REST_REACT,
    }.items()
    for name in presets
]  # fmt: skip
# Rows as published: column names, nesting and the form of answers.
ROWS = {
    "openai/gsm8k": {
        "question": "Ann has 1000 pens and buys 72. How many has she?",
        "answer": "She has 1000+72=<<1000+72=1072>>1072 pens.\n#### 1,072",
    },
    "tau/commonsense_qa": {
        "id": "1", "question": "Where are books lent?", "question_concept": "book",
        "choices": {"label": [*"ABCDE"], "text": ["bank", "library", "sea", "bed", "shop"]},
        "answerKey": "B",
    },
    "allenai/ai2_arc": {
        "id": "2", "question": "Which is a planet?",
        "choices": {"label": [*"1234"], "text": ["Moon", "Sun", "Mars", "Vega"]}, "answerKey": "3",
    },
    "DigitalLearningGmbH/MATH-lighteval": {
        "problem": "What is $\\frac{1}{2}+\\frac14$?", "level": "Level 1", "type": "Algebra",
        "solution": "Adding gives $\\frac{2}{4}+\\frac{1}{4} = \\boxed{\\frac{3}{4}}$.",
    },
    "codeparrot/apps": {
        "problem_id": 1, "question": "Read a number and print its double.",
        "solutions": json.dumps(["print(2 * int(input()))"]),
        "input_output": json.dumps({"inputs": ["2\n", "5\n"], "outputs": ["4\n", "10\n"]}),
        "difficulty": "introductory", "url": "", "starter_code": "",
    },
    "bbaaaa/iwslt14-de-en": {"translation": {"de": "Guten Tag.", "en": "Good day."}},
    "HuggingFaceH4/ultrachat_200k": {
        "prompt": "Hello?", "prompt_id": "3",
        "messages": [
            {"role": role, "content": text}
            for role, text in (("user", "Hello?"), ("assistant", "Hi."), ("user", "Bye."),
                               ("assistant", "Bye!"))
        ],
    },
    "hotpotqa/hotpot_qa": {
        "id": "4", "question": "Which of the two mills is older?", "answer": "Oberfeld Mill",
        "type": "comparison", "level": "hard", "supporting_facts": {"title": ["Mills"], "sent_id": [0]},
        "context": {"title": ["Mills"], "sentences": [["Oberfeld Mill is older."]]},
    },
    "open-web-math/open-web-math": {"url": "", "date": "", "metadata": "", "text": "Let $x = 1$."},
}  # fmt: skip
PROGRAM = "```python\nprint(2 * int(input()))\n```"


def numbered(row: dict, number: int) -> dict:
    """A row whose prompt has a number at its end, so that no two are equal."""
    row = json.loads(json.dumps(row))
    places = [row.get("translation", {}), *row.get("messages", []), row]
    for place in places:
        for key in ("de", "content", "question", "problem", "text"):
            if key in place:
                place[key] += f" ({number})"
                return row
    raise AssertionError(row)


def write_stand_in(folder: Path, preset: papers.Preset, rows: int = 4) -> list[str]:
    """Write a dataset, and return the flag that names it; none for a built one."""
    if preset.dataset_name is None:
        return []
    (folder / "data").mkdir(parents=True)
    splits = {preset.train_split.split("[")[0]: 0, preset.test_split.split("[")[0]: 10_000}
    for split, first in splits.items():
        lines = [json.dumps(numbered(ROWS[preset.dataset_name], first + n)) for n in range(rows)]
        (folder / "data" / f"{split}-00000-of-00001.jsonl").write_text("\n".join(lines))
    return ["--dataset_name", str(folder)]


@pytest.fixture
def load_preset(load_script, tmp_path):
    """Return a function that parses a recipe's flags with a preset, and loads its data."""

    def load(recipe, name, *flags):
        script = load_script(RECIPES / f"{recipe}.py")
        preset = script.PRESETS[name]
        flags = ["--preset", name, "--model_name_or_path", "m", "--use_cpu", *flags,
                 "--output_dir", str(tmp_path / "out"), *write_stand_in(tmp_path / "data", preset, 1_100)]  # fmt: skip
        arguments, config, _, mixture = script.parse_arguments(flags)
        in_splits = recipe in ("spin", "quiet_star", "rest_react")
        load_data = load_splits if in_splits else load_sets
        return arguments, config, load_data(arguments, mixture, script.PRESETS)

    return load


@pytest.mark.parametrize(("recipe", "name"), EVERY)
def test_a_preset_reads_its_dataset_s_columns(recipe, name, load_preset) -> None:
    arguments, config, data = load_preset(recipe, name)
    preset = getattr(papers, recipe.upper())[name]
    for field, value in preset.settings().items():
        assert getattr(config, field) == value, field
    if recipe == "spin":
        train, test = data
        assert [turn["content"] for turn in train[7]["messages"]] == ["Hello? (7)", "Hi."]
        assert len(test) == 500
        return
    if recipe == "rest_react":
        question = "Which of the two mills is older? (7)"
        assert data[0][7] == {"prompt": question, "solution": "Oberfeld Mill"}
        assert [len(split) for split in data] == [1100, 125]
        # What the paper samples in its first round: one trajectory per question, from all tokens.
        assert (config.num_generations, config.top_k, config.top_p) == (1, 0, 1.0)
        return
    if recipe == "quiet_star":
        assert data[0].column_names == ["text"]
        assert [len(split) for split in data] == [1000, 100]
        return
    row = data["train_dataset"][0]
    assert data["eval_dataset"][0].keys() == row.keys()
    assert ("gold_dataset" in data) == preset.with_gold
    assert isinstance(row["prompt"], list) == (recipe == "irpo")
    if name == "iwslt":  # names no reward
        return
    answer = {"apps": PROGRAM, "addition": f"Answer: {row.get('solution')}"}.get(name)
    text = answer or row.get("completion") or f"The answer is {row['solution']}."
    text = text[0]["content"] if isinstance(text, list) else text
    columns = {key: [value] for key, value in row.items() if key not in ("prompt", "completion")}
    for reward in load_reward_funcs(arguments):
        assert reward(completions=[text], **columns) == [1.0]
        if recipe != "rft":  # whose equations may be right in a wrong answer
            assert reward(completions=["The answer is (e) 17."], **columns) == [0.0]


@pytest.mark.parametrize(
    ("recipe", "name"), [(r, n) for r, n in EVERY if getattr(papers, r.upper())[n].few_shot]
)
def test_worked_examples_are_right_and_hints_show_the_answer_alone(
    recipe, name, load_preset
) -> None:
    """ST-24: a hint never has the worked steps of a solution."""
    arguments, _, data = load_preset(recipe, name)
    examples = data["few_shot_examples"]
    prompts = data["train_dataset"][:200]["prompt"]
    for example in examples:
        for reward in load_reward_funcs(arguments):
            assert reward([example["completion"]], solution=[example["solution"]]) == [1.0]
        assert example["prompt"] not in prompts
        hinted = add_hint(example["prompt"], example["solution"])
        added = len(hinted) - len(example["prompt"])
        assert 0 < added <= len(" (CORRECT)") or added == len(example["solution"]) + 3


def test_a_sum_s_scratchpad_is_that_of_the_paper() -> None:
    """STaR, arXiv 2203.14465, figure 3, whose last line has no cue."""
    assert papers.addition_row(624, 259) == {
        "prompt": "Input:\n6 2 4 + 2 5 9\nTarget:\n",
        "completion": "<scratch>\n6 2 4 + 2 5 9 , C: 0\n2 + 5 , 3 C: 1\n6 + 2 , 8 3 C: 0\n"
        ", 8 8 3 C: 0\n0 8 8 3\n</scratch>\nAnswer: 8 8 3",
        "solution": "8 8 3",
    }


def test_sums_have_one_to_five_digits_and_training_ones_are_never_held_out() -> None:
    sets = papers.addition_rows(num_train=500, num_test=100)
    train, test = ({*sets[name]["prompt"]} for name in ("train", "test"))
    assert (len(train), len(test), len(train & test)) == (500, 100, 0)
    digits = {len(line.split(" + ")[0].split()) for p in train for line in p.splitlines()[1:2]}
    assert digits == {1, 2, 3, 4, 5}


def test_flags_override_a_preset_and_what_follows_from_them(load_preset, capsys) -> None:
    arguments, config, _ = load_preset(
        "star", "gsm8k", "--num_rounds", "3", "--learning_rate", "1e-5", "--reward_funcs", "math_reward"
    )  # fmt: skip
    assert (config.num_rounds, config.round_max_steps) == (3, [40, 48, 57])
    assert arguments.reward_funcs == ["math_reward"]
    said = capsys.readouterr().out
    assert "Preset gsm8k, from the paper:" in said
    assert "temperature=0.0" in said
    assert "learning_rate=1e-05 (paper: 1e-06)" in said
    assert "num_rounds=3 (paper: 36)" in said
    assert "The paper differs from this recipe: " in said


def test_a_yaml_file_may_name_a_preset_and_override_it(load_script, tmp_path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"preset: math\nnum_rounds: 2\nmodel_name_or_path: m\nuse_cpu: true\noutput_dir: {tmp_path}"
    )
    recipe = load_script(RECIPES / "irpo.py")
    arguments, config, *_ = recipe.parse_arguments(["--config", str(tmp_path / "run.yaml")])
    assert (arguments.dataset_name, arguments.chat) == ("DigitalLearningGmbH/MATH-lighteval", True)
    assert config.round_temperatures == [0.8, 0.8]
    same = IRPOConfig.from_paper("math", num_rounds=2, output_dir=str(tmp_path), use_cpu=True)
    assert config.round_temperatures == same.round_temperatures


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--preset", "gsm"],
            r"no preset 'gsm'; there are \('addition', 'commonsense_qa', 'gsm8k'\)",
        ),
        (["--preset", "gsm8k", "--smoke"], "--smoke is the demo's smallest size"),
    ],
)
def test_a_preset_that_cannot_be_is_an_error(flags, message, load_script, tmp_path) -> None:
    recipe = load_script(RECIPES / "star.py")
    with pytest.raises(ValueError, match=message):
        recipe.parse_arguments([*flags, "--output_dir", str(tmp_path)])


def test_a_preset_whose_model_is_not_public_wants_one(load_script, tmp_path) -> None:
    recipe = load_script(RECIPES / "rest_em.py")
    with pytest.raises(ValueError, match="Name one with --model_name_or_path"):
        recipe.parse_arguments(["--preset", "math", "--use_cpu", "--output_dir", str(tmp_path)])


def test_a_dataset_with_other_columns_is_named() -> None:
    with pytest.raises(ValueError, match=r"reads openai/gsm8k.*no column 'answer'"):
        papers.STAR["gsm8k"].convert(Dataset.from_list([{"question": "1 + 1?"}]))


def test_paper_settings_are_what_from_paper_sets(tmp_path) -> None:
    config = STaRConfig.from_paper("addition", output_dir=str(tmp_path), use_cpu=True)
    for name, value in STaRConfig.paper_settings("addition").items():
        assert getattr(config, name) == value


# A size for each, by flags; nothing of what a tiny model writes is right, so only gold is trained on.
SMALL = {
    "star": ("gsm8k", ["--round_max_steps", "2", "--num_prompts_per_round", "2"]),
    "rft": ("gsm8k", ["--max_steps", "2", "--num_generations", "2"]),
    "irpo": ("arc", ["--max_steps", "2", "--num_generations", "2"]),
    "spin": ("ultrachat", ["--max_steps", "2", "--max_length", "128"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", SMALL)
def test_a_preset_runs_on_a_dataset_with_the_same_columns(
    recipe, load_script, saved_chat_model, tmp_path
) -> None:
    script, (name, size) = load_script(RECIPES / f"{recipe}.py"), SMALL[recipe]
    flags = [
        *("--preset", name, "--model_name_or_path", str(saved_chat_model), "--use_cpu", *size),
        *("--num_rounds", "1", "--max_completion_length", "4", "--on_empty_round", "stop"),
        *("--gradient_accumulation_steps", "1", "--report_to", "none", "--disable_tqdm", "true"),
        *("--output_dir", str(tmp_path / "out"), "--gradient_checkpointing", "false"),
        *write_stand_in(tmp_path / "data", script.PRESETS[name]),
    ]
    script.main(*script.parse_arguments(flags))
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert list((tmp_path / "out" / "_rounds").glob("round*"))
