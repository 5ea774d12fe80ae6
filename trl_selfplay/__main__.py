"""Run `python -m trl_selfplay`, the same as `trl-selfplay`.

In: the process's arguments. Out: its exit code.
"""

import sys

from trl_selfplay.commands.dispatch import main

if __name__ == "__main__":
    sys.exit(main())
