"""The table of commands: what is listed, what is imported, and the exit codes of wrong use."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from trl_selfplay.commands.dispatch import COMMANDS, main
from trl_selfplay.commands.recipes import find_recipe

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("flags", [[], ["--help"], ["-h"]])
def test_help_lists_each_command_in_one_line(flags, capsys) -> None:
    assert main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in COMMANDS.items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert line.split(maxsplit=1)[1] == command.summary
    assert max(map(len, lines)) <= 80


def test_help_loads_neither_torch_nor_trl() -> None:
    code = (
        "import sys; from trl_selfplay.commands.dispatch import main; main(['--help'])\n"
        "sys.exit(bool({'torch', 'trl', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(("given", "meant"), [("strat", "star"), ("rest-en", "rest_em")])
def test_an_unknown_command_is_wrong_use_and_the_nearest_is_named(given, meant, capsys) -> None:
    assert main([given, "--smoke"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"there is no command '{given.replace('-', '_')}'. Did you mean '{meant}'?" in said.err


def test_each_function_of_the_table_takes_the_flags() -> None:
    for command in COMMANDS.values():
        if not command.is_recipe:
            module, _, function = command.target.partition(":")
            path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
            found = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
            (run,) = [each for each in found if each.name == function]
            assert [each.arg for each in run.args.args] == ["flags"]


def test_the_page_shows_an_example_of_each_command() -> None:
    """tests/test_commands.py takes them as they stand."""
    text = (ROOT / "docs/commands.md").read_text()
    for name in COMMANDS:
        assert f"`trl-selfplay {name} " in text, name


def test_each_recipe_of_the_table_exists() -> None:
    recipes = [c.target for c in COMMANDS.values() if ":" not in c.target]
    assert len(recipes) == 9
    assert all(find_recipe(name) == ROOT / "recipes" / name for name in recipes)
    with pytest.raises(FileNotFoundError, match=r"there is no recipe 'nowhere\.py'"):
        find_recipe("nowhere")
