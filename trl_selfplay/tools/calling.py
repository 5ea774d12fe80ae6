"""Call a tool in a process of its own.

In: a tool, which was sent when the process began, and the arguments of a call. Out: its result as text. Runs
in a worker process, see rewards/worker.py.
"""

import asyncio
import contextlib
import inspect
import io
from collections.abc import Mapping
from typing import Any

from trl_selfplay.rewards.sent_function import loaded_function, prepare

__all__ = ["call_loaded_tool", "prepare"]

# Longer results are cut: no policy reads them, and all that is kept of a trajectory holds them.
MOST_CHARACTERS = 100_000


def call_loaded_tool(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Call the tool of this process; return `{"content": …}`, or `{"error": …}` if it raised.

    What it prints is dropped, since the process answers on its standard output.
    """
    tool = loaded_function()
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            inspect.signature(tool).bind(**arguments)
        except TypeError as error:
            return {"error": f"wrong arguments: {error}"}
        try:
            value = tool(**arguments)
            if inspect.isawaitable(value):
                value = asyncio.run(_wait_for(value))
            text = str(value)
        except Exception as error:  # whatever a tool raises is an observation
            return {"error": f"{type(error).__name__}: {error}"[:MOST_CHARACTERS]}
    if len(text) > MOST_CHARACTERS:
        text = f"{text[:MOST_CHARACTERS]}… ({len(text):,} characters, cut)"
    return {"content": text}


async def _wait_for(value: Any) -> Any:
    return await value
