"""The wheel has the commands and the recipes that they run; so has one that is built from the sdist."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
ROOT = Path(__file__).parent.parent.parent


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a "wheel" or an "sdist", as pip would, and return its path."""
    code = f"import sys, hatchling.build; hatchling.build.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(folder)], cwd=source, check=True)
    (built,) = folder.iterdir()
    return built


def test_a_wheel_holds_the_command_and_all_recipes(tmp_path) -> None:
    archive = build("sdist", ROOT, tmp_path / "sdist")
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    folder = ROOT / "recipes"  # with configurations of accelerate, and of clusters
    recipes = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
    recipes = {name for name in recipes if "__pycache__" not in name}
    for origin, name in ((ROOT, "tree"), (source, "of-sdist")):
        with zipfile.ZipFile(build("wheel", origin, tmp_path / name)) as wheel:
            names = wheel.namelist()
            (entry_points,) = [n for n in names if n.endswith("entry_points.txt")]
            assert (
                "trl-selfplay = trl_selfplay.commands.dispatch:main"
                in wheel.read(entry_points).decode()
            )
            inside = "trl_selfplay/recipes/"
            assert {n.removeprefix(inside) for n in names if n.startswith(inside)} == recipes


@pytest.mark.slow
def test_a_command_runs_from_a_wheel(work_folder, tmp_path) -> None:
    with zipfile.ZipFile(build("wheel", ROOT, tmp_path / "wheel")) as wheel:
        wheel.extractall(tmp_path / "installed")
    arguments = [
        *("star", "--model_name_or_path", "./tiny-model", "--dataset_name", "./data"),
        *("--reward_funcs", "my_rewards.contains", "--output_dir", "out", "--use_cpu"),
        *("--num_rounds", "1", "--num_generations", "4", "--temperature", "1.0"),
        *("--max_completion_length", "8", "--max_steps", "1", "--report_to", "none"),
        *("--on_empty_round", "stop"),
    ]
    code = (
        "import sys, runpy, trl_selfplay; print(trl_selfplay.__file__)\n"
        "runpy.run_module('trl_selfplay', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=work_folder, check=False, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed"), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(str(tmp_path / "installed"))
    assert (work_folder / "out/_rounds/rounds.jsonl").exists()
