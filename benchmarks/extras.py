"""Resolve and install each extra of this package in a fresh environment, and run what needs it.

In: pyproject.toml, and the package index that uv is configured for. Out: a table on standard output;
the exit code is 1 if an extra doesn't resolve, install or work.

    pip install uv && python benchmarks/extras.py            # resolves all, installs all but vllm
    python benchmarks/extras.py --install vllm               # installs that one: more than 8 GB
"""

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13")
LARGE = ("vllm",)  # resolved, and installed on request
PLAIN = "(none)"
# What the extra is for, tried in an environment that holds nothing else.
CHECKS = {
    PLAIN: ["python", "-c", "import trl_selfplay as t; [getattr(t, name) for name in t.__all__]"],
    "demo": [
        "python",
        "-c",
        "import gguf, matplotlib.pyplot, reasoning_gym, rich; import trl_selfplay.demos.words",
    ],
    "math": [
        "python",
        "-c",
        "from trl_selfplay.rewards import math_reward\n"
        "if __name__ == '__main__':\n"
        "    found = math_reward(completions=['It is \\\\boxed{\\\\frac12}.'], solution=['0.5'])\n"
        "    assert found == [1.0], found",
    ],
    "test": ["pytest", "--collect-only", "-q", "-m", ""],
    "dev": ["ruff", "check", "."],
    "vllm": ["python", "-c", "import vllm; from trl_selfplay import STaRTrainer"],
}


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command in the repository, and return what it printed and its exit code."""
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, **options)  # type: ignore[call-overload, no-any-return]


def resolve(extra: str, python: str) -> str:
    """Return the number of packages that an extra and the package itself need, or "fails"."""
    chosen = [] if extra == PLAIN else ["--extra", extra]
    command = ["uv", "pip", "compile", "pyproject.toml", "--python-version", python, *chosen]
    done = run([*command, "--quiet", "--no-header", "--no-annotate"])
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return "fails"
    return str(len(done.stdout.splitlines()))


def install(extra: str, folder: Path) -> tuple[str, str, str]:
    """Install an extra into a new environment and try it; return outcome, gigabytes and seconds."""
    environment, started = folder / extra.strip("()"), time.monotonic()
    run(["uv", "venv", "--quiet", "--python", sys.executable, str(environment)])
    wanted = "." if extra == PLAIN else f".[{extra}]"
    interpreter = str(environment / "bin" / "python")
    done = run(["uv", "pip", "install", "--quiet", "--python", interpreter, "-e", wanted])
    seconds = f"{time.monotonic() - started:.0f}"
    if done.returncode == 0:
        size = sum(p.stat().st_size for p in environment.rglob("*") if p.is_file()) / 1e9
        program, *arguments = CHECKS[extra]
        done = run([str(environment / "bin" / program), *arguments])
        outcome = "works" if done.returncode == 0 else "installed, and fails"
    else:
        size, outcome = 0.0, "can't be installed"
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-3000:], file=sys.stderr)
    shutil.rmtree(environment, ignore_errors=True)  # another one needs the room
    return outcome, f"{size:.1f}", seconds


def main() -> int:
    """Print one row per extra."""
    parser = argparse.ArgumentParser(description=__doc__)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    names = [PLAIN, *extras]
    parser.add_argument(
        "--install", nargs="*", choices=names, help="default: all but the large ones"
    )
    parser.add_argument(
        "--folder", type=Path, help="where environments are made, on the disk of uv's cache"
    )
    given = parser.parse_args()
    installed = given.install
    if installed is None:
        installed = [name for name in names if name not in LARGE]
    print(f"Python {platform.python_version()}, uv {version('uv')}, {time.strftime('%Y-%m-%d')}\n")
    print(f"| Extra | {' | '.join(f'Packages on {v}' for v in PYTHONS)} | Result | GB | Seconds |")
    print("|---|" + "---|" * (len(PYTHONS) + 3))
    failed = False
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        for name in names:
            counts = [resolve(name, python) for python in PYTHONS]
            outcome = ("resolved, not installed", "", "")
            if name in installed:
                outcome = install(name, Path(folder))
            failed |= "fails" in counts or outcome[0] not in ("works", "resolved, not installed")
            shown = name if name == PLAIN else f"`{name}`"
            print(f"| {shown} | {' | '.join([*counts, *outcome])} |", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
