"""Run a recipe as a command: the file itself, as `python recipes/NAME.py` does.

In: a recipe's name and flags. Out: an exit code. The recipes are beside the package in a source tree,
and inside it in a wheel.
"""

import contextlib
import runpy
import sys
from itertools import chain, pairwise
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


def find_recipe(name: str) -> Path:
    """Return the path of a recipe, or of another file in its folder, such as "qlora_8gb.yaml".

    Args:
        name: A file name; without a suffix, that of a script.

    Raises:
        FileNotFoundError: There is no such recipe.
    """
    file_name = name if Path(name).suffix else f"{name}.py"
    for folder in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes"):
        if (folder / file_name).is_file():
            return folder / file_name
    raise FileNotFoundError(
        f"there is no recipe {file_name!r} in {_PACKAGE / 'recipes'} or "
        f"{_PACKAGE.parent / 'recipes'}; install the package again."
    )


def run_recipe(name: str, flags: list[str]) -> int:
    """Run a recipe in this process, with these flags in place of the process's own."""
    script = find_recipe(name)
    before, sys.argv = sys.argv, [str(script), *find_config(flags)]
    try:
        # The help calls it COMMAND.
        runpy.run_path(str(script), {"COMMAND": f"trl-selfplay {script.stem}"}, "__main__")
    finally:
        sys.argv = before
    return 0


def find_config(flags: list[str]) -> list[str]:
    """Return flags in which the name of a recipes' YAML file behind `--config` is its path.

    `--config=NAME`, which TRL's parser doesn't know, becomes `--config NAME`.
    """
    words = (f.split("=", 1) if f.startswith("--config=") else [f] for f in flags)
    found = list(chain.from_iterable(words))
    for place, (flag, value) in enumerate(list(pairwise(found)), 1):
        if flag == "--config" and Path(value).name == value and not Path(value).exists():
            with contextlib.suppress(FileNotFoundError):  # the parser says that there is none
                found[place] = str(find_recipe(value))
    return found
