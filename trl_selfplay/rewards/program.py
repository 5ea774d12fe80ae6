"""What happens in the process of one program: it is run, or its functions are called.

In: its source, and for calls a channel of requests. Out: its exit status, or a channel of answers.
Programs can change all that is here, so it decides nothing. `zygote.py` loads this file; only the
standard library is imported.
"""

import atexit
import os
import sys
import types
import typing

if typing.TYPE_CHECKING:  # set by `zygote.py`
    import trl_selfplay.rewards.literals as literals

_LENGTH_BYTES = 4
_IS_MADE_BY_CODE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def run(source: bytes) -> int:
    """Run a program as `python program.py` would, and return its exit status."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    status = 0
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        status = 1
    try:
        if "threading" in sys.modules:
            _join_threads()
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except BaseException:
        status = status or 1
    return status & 255


def _join_threads() -> None:
    import threading

    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()


def serve_calls(source: bytes, requests: int, answers: int) -> None:
    """Run a program as a module, then call its functions as requested."""
    module = types.ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        _send(answers, literals.encode(("raised", *_describe(error), ())))
    else:
        _send(answers, literals.encode(("returned", None, ())))
    while request := _read_message(requests):
        shared: list[typing.Any] = []
        name, args, kwargs = literals.decode(request, shared)
        count = len(shared)
        try:
            function: typing.Any = module
            for part in name.split("."):
                function = getattr(function, part)
            outcome: tuple[typing.Any, ...] = ("returned", function(*args, **dict(kwargs)))
        except BaseException as error:
            outcome = ("raised", *_describe(error))
        _send(answers, _encode(outcome, shared, count))


def _encode(outcome: tuple[typing.Any, ...], shared: list[typing.Any], count: int) -> bytes:
    """Return an outcome and what has become of the arguments, or why they can't be written."""
    known = shared[:count]
    try:
        return literals.encode((*outcome, tuple(map(literals.contents, known))), known.copy())
    except literals.LiteralError as error:
        return literals.encode(("raised", type(error).__name__, str(error), ()))
    except BaseException as error:
        return literals.encode(("raised", *_describe(error), ()))


def _describe(error: BaseException) -> tuple[str, str]:
    """Return the name of an exception's nearest built-in type, and its message."""
    kind = next(base for base in type(error).__mro__ if base.__flags__ & _IS_MADE_BY_CODE == 0)
    try:
        return kind.__name__, str(error)[:1000]
    except BaseException:  # a hostile __str__
        return kind.__name__, ""


def _send(channel: int, message: bytes) -> None:
    unsent = memoryview(len(message).to_bytes(_LENGTH_BYTES, "big") + message)
    while unsent:
        unsent = unsent[os.write(channel, unsent) :]


def _read_message(channel: int) -> bytes:
    header = _read(channel, _LENGTH_BYTES)
    return _read(channel, int.from_bytes(header, "big")) if header else b""


def _read(channel: int, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = os.read(channel, count - len(parts))
        if not part:
            return b""
        parts += part
    return bytes(parts)
