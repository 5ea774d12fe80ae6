import ast
import json
import subprocess
import sys
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest

import trl_selfplay

ROOT = Path(__file__).parent.parent
OPTIONAL = {
    "reasoning_gym",
    "gguf",
    "matplotlib",
    "math_verify",
    "latex2sympy2_extended",
    "vllm",
    "nbclient",
}


def packages_loaded_by(statement: str) -> tuple[set[str], str]:
    """Run a statement in a new interpreter: the top-level packages it loads, and what it says.

    The standard library is left out.
    """
    script = f"""
import json, sys
before = set(sys.modules)
{statement}
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}}
print()
print(json.dumps(sorted(loaded - sys.stdlib_module_names)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    said, _, loaded = done.stdout.rstrip().rpartition("\n")
    return set(json.loads(loaded)), said + done.stderr


def test_importing_the_package_loads_nothing_else_and_is_silent() -> None:
    assert packages_loaded_by("import trl_selfplay") == ({"trl_selfplay"}, "")


def test_importing_a_trainer_loads_no_optional_package() -> None:
    loaded, _ = packages_loaded_by("from trl_selfplay import STaRConfig, STaRTrainer")
    assert "trl" in loaded
    assert not loaded & OPTIONAL


def test_importing_the_rewards_loads_no_optional_package() -> None:
    loaded, said = packages_loaded_by("import trl_selfplay.rewards")
    assert not loaded & OPTIONAL
    assert said == ""


@pytest.mark.parametrize("name", trl_selfplay.__all__)
def test_every_public_name_can_be_imported(name) -> None:
    namespace: dict[str, object] = {}
    exec(f"from trl_selfplay import {name}", namespace)
    assert namespace[name] is getattr(trl_selfplay, name)
    assert name in dir(trl_selfplay)


def test_the_names_that_later_work_relies_on_are_public() -> None:
    assert {"STaRConfig", "STaRTrainer", "EmptyRoundError", "Rollout"} <= set(trl_selfplay.__all__)


def test_type_checkers_see_the_names_that_are_imported_lazily() -> None:
    tree = ast.parse((ROOT / "trl_selfplay" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == trl_selfplay._MODULE_OF
    assert set(trl_selfplay.__all__) == {*seen, "__version__"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="STaR2"):
        trl_selfplay.STaR2  # noqa: B018


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert trl_selfplay.__version__ == project["version"]


def test_type_information_is_shipped() -> None:
    assert files("trl_selfplay").joinpath("py.typed").is_file()
