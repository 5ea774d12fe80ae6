"""The shape of the package: which module may import which, and what none of them may do."""

import ast
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trl_selfplay"
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 600

# The order in which data passes the folders and the methods; each may import those before it. What
# a trainer's constructor or `train` calls comes before `trainers`; the demos use the trainers,
# and the commands use all.
FLOW = (
    "memory",
    "confidential",
    "forks",
    "file_mask",
    "disk",
    "termination",
    "peers",
    "generation",
    "estimation",
    "rewards",
    "tools",
    "rollouts",
    "evaluation",
    "rounds",
    "inspection",
    "trainers",
    "trainers.star",
    "trainers.rest_em",
    "trainers.spin",
    "trainers.irpo",
    "trainers.v_star",
    "trainers.quiet_star",
    "demos",
    "commands",
    "__main__",
)
METHODS = {stage for stage in FLOW if stage.startswith("trainers.")}
# Parts of TRL that we may import; tests/test_trl_contract.py pins what we use of them.
TRL_MODULES = {"trl", "trl.models", "trl.rewards"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> set[str]:
    """Return every module that a file imports, also inside functions."""
    tree = ast.parse(path.read_text(), str(path))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            found.add(node.module or "")
            # `from package import module` imports the module
            for alias in node.names:
                inner = ROOT.joinpath(*(node.module or "").split("."), alias.name)
                if inner.with_suffix(".py").exists() or inner.is_dir():
                    found.add(f"{node.module}.{alias.name}")
    return found


def own_imports(path: Path) -> set[str]:
    return {m for m in imported_modules(path) if m.split(".")[0] == "trl_selfplay"}


def stage_of(module: str) -> str:
    """Return the folder or file at the top that a module is in, or the method."""
    parts = module.split(".")[1:]
    method = ".".join(parts[:2])
    return method if method in METHODS else (parts or [""])[0]


def test_every_module_has_its_place_in_the_flow() -> None:
    assert {stage_of(name_of(path)) for path in MODULES} - {""} == set(FLOW)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_imports_only_from_those_before_it(path) -> None:
    stage = stage_of(name_of(path))
    if stage == "":  # the lazy table names modules of any stage
        return
    allowed = {*FLOW[: FLOW.index(stage) + 1]}
    if stage in METHODS:  # a method can be read, or deleted, as a whole
        allowed -= METHODS - {stage}
    later = {module for module in own_imports(path) if stage_of(module) not in allowed}
    assert later == set()


def test_no_module_needs_itself() -> None:
    """Also within a package, where the order of the flow says nothing."""
    graph = {
        name_of(path): own_imports(path) - {name_of(path)} for path in MODULES if path != MODULES[0]
    }
    assert MODULES[0] == PACKAGE / "__init__.py"
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_has_a_docstring_and_at_most_600_lines(path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_known_parts_of_trl_are_imported(path) -> None:
    used = {module for module in imported_modules(path) if module.split(".")[0] == "trl"}
    assert used <= TRL_MODULES
    assert "trl.experimental" not in path.read_text()


def test_no_module_is_a_drawer() -> None:
    drawers = {"utils", "util", "common", "misc", "helpers", "base"}
    assert drawers.isdisjoint(path.stem for path in MODULES)


def test_what_is_imported_at_the_top_is_a_dependency() -> None:
    """Everything else is imported where it is used, and belongs to an extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {
        requirement.split(">")[0].strip().replace("-", "_")
        for requirement in project["dependencies"]
    }
    used = set()
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used.add((node.module or "").split(".")[0])
    third_party = used - sys.stdlib_module_names - {"trl_selfplay"}
    assert third_party <= declared


def test_readers_of_a_run_import_no_torch() -> None:
    """Importing torch takes longer than a report."""
    modules = sorted(name_of(path) for path in (PACKAGE / "inspection").glob("*.py"))
    heavy = "{'torch', 'transformers', 'trl', 'datasets'}"
    code = f"import sys, {', '.join(modules)}; print(*sorted({heavy} & sys.modules.keys()))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert found.stdout.split() == []
