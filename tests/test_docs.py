"""README, CONTRIBUTING and the files beside them say what is true of the code."""

import ast
import doctest
import importlib
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import datasets
import pytest
import yaml
from transformers import AutoTokenizer

import trl_selfplay
from trl_selfplay.commands.dispatch import COMMANDS
from trl_selfplay.evaluation.detectors import DETECTORS
from trl_selfplay.rewards.worker import close_workers
from trl_selfplay.trainers.rounds import RoundsMixin

ROOT = Path(__file__).parent.parent
CHAT_TEMPLATE = "{% for m in messages %} {{ m.content }} <eos> {% endfor %}"
# Those in docs/repository are copies, made for the site.
GUIDES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if "repository" not in p.parts]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    *(str(path.relative_to(ROOT)) for path in GUIDES),
]


def blocks(page: str, language: str) -> list[str]:
    """Return a page's code blocks of a language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    return [text for name, text in fenced if name == language]


def sides(diff: str) -> tuple[str, str]:
    """Return the texts before and after a diff."""
    lines = diff.splitlines()
    before, after = ([line[1:] for line in lines if line[:1] != sign] for sign in "+-")
    return "\n".join(before), "\n".join(after)


def source(block: str) -> str:
    """Return a block's code, without prompts and what they print."""
    return doctest.script_from_examples(block) if block.startswith(">>> ") else block


PYTHON_BLOCKS = [(page, source(block)) for page in PAGES for block in blocks(page, "python")]
# Those that say what comes out. A trainer's example needs a model from a hub.
EXAMPLES = [
    (page, block)
    for page in PAGES
    for block in blocks(page, "python")
    if "Trainer(" not in block and (">>> " in block or "assert " in block)
]
DIFFS = blocks("docs/migrating.md", "diff")
OUR_SCRIPTS = {
    "README": blocks("README.md", "python")[0],
    **{
        path.stem: blocks(f"docs/trainers/{path.name}", "python")[0]
        for path in sorted((ROOT / "docs/trainers").glob("*.md"))
        if path.stem not in ("shared", "v_star")  # the first has no example, V-STaR needs a run
    },
    **{f"after diff {place}": sides(diff)[1] for place, diff in enumerate(DIFFS)},
}


def readme_command(folder: str) -> str:
    start = f"python3 -m venv {folder}"
    (command,) = [b for b in blocks("README.md", "bash") if b.startswith(start)]
    return command.strip()


@pytest.mark.parametrize(
    ("page", "block"),
    [*PYTHON_BLOCKS, *(("docs/migrating.md", s) for diff in DIFFS for s in sides(diff))],
)
def test_a_python_block_compiles_and_names_what_it_imports(page, block) -> None:
    """What the blocks compute is tested where it can run without a hub."""
    tree = ast.parse(block, page)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and importlib.util.find_spec(node.module):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{page}: {node.module}.{alias.name}"


def test_the_page_on_other_scripts_has_a_diff_for_each_kind() -> None:
    assert len(DIFFS) == 4


@pytest.mark.parametrize("script", OUR_SCRIPTS.values(), ids=OUR_SCRIPTS)
def test_a_script_of_the_pages_builds_its_trainer(
    script, saved_tiny_model, sums, monkeypatch, tmp_path
) -> None:
    """With a tiny model and sums in place of what a hub would give, up to `train`."""
    asked: list[object] = []

    def load_dataset(*args, **kwargs):
        asked.append(args)
        rows = sums(4)
        if args[0] == "openai/gsm8k":  # question, answer, as there
            rows = rows.rename_columns({"prompt": "question", "solution": "answer"})
            rows = rows.map(lambda row: {"answer": f"because #### {row['answer']}"})
        if args[0] == "open-web-math/open-web-math":  # one column of those there
            rows = rows.map(lambda row: {"text": row["prompt"] * 8}, remove_columns=rows.features)
        if args[0] == "trl-lib/ultrafeedback_binarized":  # chosen, rejected: whole conversations
            rows = rows.map(
                lambda row: {
                    "chosen": [{"role": "user", "content": row["prompt"]},
                               {"role": "assistant", "content": row["solution"]}],
                    "rejected": [{"role": "user", "content": row["prompt"]},
                                 {"role": "assistant", "content": "no"}],
                },
                remove_columns=["prompt", "solution"],
            )  # fmt: skip
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    build, _, _ = script.partition("trainer.train()")
    small = re.sub(r"Qwen/Qwen2\.5-0\.5B(-Instruct)?", str(saved_tiny_model), build)
    tokenizer = AutoTokenizer.from_pretrained(saved_tiny_model)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(saved_tiny_model)
    small, configs = re.subn(
        r"\b((?:STaR|ReSTEM|SPIN|IRPO)Config\()",
        r"\1max_completion_length=8, report_to=[], use_cpu=True, ",
        small,
    )
    small, thinking = re.subn(r"(QuietSTaRConfig\()", r"\1report_to=[], use_cpu=True, ", small)
    small = small.replace("max_length=256", "max_length=32")
    assert configs + thinking == 1
    namespace: dict[str, object] = {}
    exec(compile(small, "README.md", "exec"), namespace)
    assert len(asked) == 1
    trainer = namespace["trainer"]
    if thinking:
        assert isinstance(trainer, trl_selfplay.QuietSTaRTrainer)
        return
    assert isinstance(trainer, RoundsMixin)
    solutions = [row.solution for row in trainer.self_play.rows]
    if isinstance(trainer, trl_selfplay.SPINTrainer):
        solutions = [messages[-1]["content"] for messages in solutions]
    assert set(solutions) == {"0", "1", "2", "3"}


@pytest.mark.parametrize(("page", "block"), EXAMPLES)
def test_an_example_of_a_page_gives_what_it_says(page, block) -> None:
    if block.startswith(">>> "):
        example = doctest.DocTestParser().get_doctest(block, {}, page, None, 0)
        assert doctest.DocTestRunner().run(example).failed == 0
    else:
        exec(compile(block, page, "exec"), {"__name__": "__main__"})
    close_workers()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) < 1200


def test_there_are_two_set_up_commands() -> None:
    assert readme_command(".venv ").endswith(" && trl-selfplay demo")
    assert readme_command(".venv-test ").endswith("pytest -n auto")
    assert len(blocks("README.md", "bash")) == 2


@pytest.mark.parametrize("folder", [".venv ", ".venv-test "])
def test_the_set_up_commands_name_extras_and_files_that_exist(folder) -> None:
    command = readme_command(folder)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(re.findall(r"\.\[(\w+)\]", command)) <= set(extras)
    for path in re.findall(r"[\w/]+\.(?:py|txt)\b", command):
        assert (ROOT / path).is_file(), path


def test_continuous_integration_runs_the_test_command_of_the_readme() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    (assignment,) = re.findall(r"^command=.*$", text, re.M)
    found = subprocess.run(
        ["bash", "-c", f'{assignment}\nprintf "%s" "$command"'],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    assert found.stdout == readme_command(".venv-test ")
    assert re.search(r'^eval "\$command"', text, re.M)
    for step in ("pytest -m slow", "ruff format --check .", "ruff check .", "mypy"):
        assert re.search(rf"^{re.escape(step)}( |$)", text, re.M), step


def test_the_script_of_continuous_integration_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", ROOT / ".ci" / "run"], check=True)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page) -> None:
    text = (ROOT / page).read_text()
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    named = re.findall(r"`((?:[\w.]+/)*[\w.]+\.(?:py|md|toml|txt|cff|ipynb|yaml))\b", text)
    for name in linked:
        path = (ROOT / page).parent / name
        # A result may still be measured, by its script.
        script = ROOT / "benchmarks" / f"{path.stem}.py"
        assert path.exists() or (path.parent.name == "results" and script.exists()), name
    for name in named:
        if name.startswith("my_"):  # the reader's own
            continue
        assert (ROOT / name).exists() or (ROOT / "trl_selfplay" / name).exists(), name


def slugs(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    plain = [re.sub(r"<[^>]+>|\[([^\]]+)\]\([^)]*\)", r"\1", each) for each in headings]
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in plain}


@pytest.mark.parametrize("page", PAGES)
def test_sections_that_a_page_links_to_exist(page) -> None:
    """By the anchors of GitHub; tests/test_docs_site.py follows those of the site."""
    text = (ROOT / page).read_text()
    for name, section in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        target = (ROOT / page).parent / name if name else ROOT / page
        assert section in slugs(target.read_text()), f"{page}: {name}#{section}"


def test_each_alarm_is_explained_where_its_warning_leads() -> None:
    explained = slugs((ROOT / "docs/troubleshooting.md").read_text())
    assert {f"alarm-{detector.name}" for detector in DETECTORS} <= explained


def test_the_page_on_commands_lists_each_that_is_there() -> None:
    text = (ROOT / "docs/commands.md").read_text()
    for name, command in COMMANDS.items():
        module, is_function, _ = command.target.partition(":")
        if not is_function or importlib.util.find_spec(module):
            assert f"`trl-selfplay {name}`" in text, name


def test_each_error_of_a_run_is_explained() -> None:
    """RuntimeErrors: the others are raised at construction, and say what to change."""
    sources = "\n".join(path.read_text() for path in (ROOT / "trl_selfplay").rglob("*.py"))
    errors = re.findall(r"^class (\w+)\(RuntimeError\)", sources, re.M)
    assert len(errors) >= 9
    explained = slugs((ROOT / "docs/troubleshooting.md").read_text())
    assert {error.lower() for error in errors} <= explained


def test_functions_that_contributing_names_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", text)
    assert len(named) >= 20
    for path, name in named:
        body: list[ast.stmt] = ast.parse((ROOT / "trl_selfplay" / path).read_text()).body
        for part in name.split("."):
            definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            found = [n for n in body if isinstance(n, definitions) and n.name == part]
            assert found, f"{path}: {name}"
            body = found[0].body


def test_the_map_of_contributing_names_every_module() -> None:
    (picture,) = blocks("CONTRIBUTING.md", "")
    for path in (ROOT / "trl_selfplay").iterdir():
        if path.suffix == ".py" and path.stem != "__init__":
            assert path.name in picture
        elif (path / "__init__.py").exists():
            assert f"{path.name}/" in picture


@pytest.mark.parametrize("trainer", [n for n in trl_selfplay.__all__ if n.endswith("Trainer")])
def test_a_trainer_has_a_readme_row_a_changelog_line_and_a_recipe(trainer) -> None:
    rows = re.findall(r"^\| .*\| `recipes/\w+\.py` \|.*$", (ROOT / "README.md").read_text(), re.M)
    rows = [row for row in rows if f"`{trainer}`" in row]
    assert rows, f"README's table of methods has no row for {trainer}"
    pages = {page for row in rows for page in re.findall(r"\]\((docs/trainers/\w+\.md)\)", row)}
    assert any(f"{trainer}(" in (ROOT / page).read_text() for page in pages)
    lines = re.findall(r"^- (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert any(f"`{trainer}`" in line for line in lines), f"CHANGELOG has no line for {trainer}"
    for recipe in (name for row in rows for name in re.findall(r"`(recipes/\w+\.py)`", row)):
        text = (ROOT / recipe).read_text()
        assert re.search(rf"\b{trainer}\(", text), f"{recipe} doesn't use {trainer}"
        assert "DEMO: dict[str, Any] = {" in text, f"{recipe} lacks the numbers of its demo"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs/trainers").glob("*.md")), ids=lambda p: p.stem
)
def test_a_table_of_fields_is_that_of_the_code(path, load_script) -> None:
    """`python docs/write_tables.py` writes them."""
    text = path.read_text()
    assert "<!-- fields: " in text
    is_right = load_script(ROOT / "docs/write_tables.py").with_tables(text) == text
    assert is_right, "run `python docs/write_tables.py`"


def test_the_citation_is_valid_and_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == trl_selfplay.__version__


def test_the_changelog_knows_this_version() -> None:
    assert trl_selfplay.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_constraints_lie_within_the_bounds_that_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    lower = dict(
        re.findall(
            r"^([\w-]+)(?:\[\w+\])?>=([\d.]+)", "\n".join(r for each in lists for r in each), re.M
        )
    )
    pinned = re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert len(pinned) >= 7
    for name, version in pinned:
        as_numbers = [tuple(map(int, v.split("."))) for v in (lower[name], version)]
        assert as_numbers[0] <= as_numbers[1], name


MODULES_WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "trl_selfplay").rglob("*.py"))
    if re.search(r"^\s*>>> ", path.read_text(), re.M)
]


@pytest.mark.parametrize("name", MODULES_WITH_EXAMPLES)
def test_examples_in_docstrings_give_what_they_say(name) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.attempted > 0
    assert outcome.failed == 0
