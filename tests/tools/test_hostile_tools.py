"""RA-8: whatever a tool does, its call has a result, and later calls find what they would have found."""

import os
import time
from contextlib import closing

import hostile_tools
import pytest
from hostile_tools import WITHOUT_ARGUMENTS, Shelf, hang, seven, shelf, typed
from patience import ENDS_S
from test_environments import children_of

from trl_selfplay.tools.record import ToolCall
from trl_selfplay.tools.tool_set import ToolSet

DIED, NOTHING = "the process died", "the tool returned nothing"
CONTENT = {
    "return_dict": "{'a': [1, None]}",
    "return_bytes": r"b'\xff'",
    "answer_later": "later",
    "return_surrogate": "a?b",
    "return_parts": "ab",
    "print_much": "printed",
    "close_streams": "closed",
    "fork": "parent",
    "leave_processes": "left",
    "start_threads": "started",
    "change_settings": "changed",
    "change_mask": "22",
    "ignore_signal": "ignored",
}
ERRORS = {
    "raise_unprintable": "UnprintableError: (an error that can't be printed)",
    "interrupt": "KeyboardInterrupt: ",
    "exit_python": "SystemExit: bye",
    "exit_process": DIED,
    "kill_itself": DIED,
    "recurse": "RecursionError: maximum recursion depth exceeded",
    "use_all_memory": "MemoryError: ",
    "return_nothing": NOTHING,
    "return_blanks": NOTHING,
    "return_unprintable": "LookupError: no text",
    "return_object": "the tool returned a object, which is no text",
    "generate": "the tool returned a generator, which is no text",
    "return_image": "the tool returned ['image']; only text can be shown",
    "read_input": "EOFError: EOF when reading a line",
    "close_all_files": DIED,
    "write_into_all_files": DIED,
}


@pytest.fixture(scope="module")
def tools():
    with closing(ToolSet([*WITHOUT_ARGUMENTS, typed, shelf.find, shelf], ENDS_S)) as found:
        yield found


def call(tools, name, **arguments):
    return tools.call(ToolCall(name, arguments))


def settings(tools):
    found = call(tools, "show_settings")
    assert not found.failed
    return found.content


@pytest.mark.parametrize("name", [*CONTENT, *ERRORS])
def test_a_call_has_a_result_and_changes_nothing_for_later_ones(tools, name) -> None:
    before = settings(tools)
    result = call(tools, name)
    if name in CONTENT:
        assert (result.content, result.failed) == (CONTENT[name], False)
    else:
        assert result.failed
        assert result.content.startswith(f"Error: {ERRORS[name]}")
    assert settings(tools) == before


def test_every_tool_of_the_module_is_called(tools) -> None:
    shows = {"return_tensor", "show_settings", "show_process", "draw_from_numpy", "draw_from_torch"}
    assert {each.__name__ for each in WITHOUT_ARGUMENTS} == {
        *(*CONTENT, *ERRORS, *shows, "hang", "return_much")
    }


def test_a_long_result_is_cut_with_a_note(tools) -> None:
    result = call(tools, "return_much")
    assert not result.failed
    assert len(result.content) < 100_100
    assert result.content.endswith("é… (cut: 10,000,000 characters)")


@pytest.mark.slow
def test_a_tool_may_import_a_large_library(tools) -> None:
    result = call(tools, "return_tensor")
    assert (result.content, result.failed) == ("tensor([1, 2])", False)


def test_a_call_that_hangs_is_ended_at_its_deadline_with_its_process() -> None:
    with closing(ToolSet([hang], 0.3)) as tools:
        result = call(tools, "hang")
        assert (result.content, result.failed) == ("Error: no answer within 0.3 s", True)
        (server,) = tools._processes._servers
        while len(children_of(server._process.pid)) > 1:
            time.sleep(0.01)
    assert server._process.poll() is not None


def test_a_process_is_used_again_unless_a_call_changed_it(tools) -> None:
    first = call(tools, "show_process")
    assert call(tools, "show_process") == first
    call(tools, "exit_python")
    assert call(tools, "show_process") == first
    call(tools, "change_settings")
    assert call(tools, "show_process") != first


def test_what_the_first_call_of_a_process_leaves_running_is_not_there_in_later_ones() -> None:
    with closing(ToolSet([hostile_tools.leave_processes], ENDS_S)) as tools:
        assert call(tools, "leave_processes").content == "left"
        assert tools._processes._idle == []


@pytest.mark.parametrize(
    "name", [pytest.param("draw_from_torch", marks=pytest.mark.slow), "draw_from_numpy"]
)
def test_a_library_that_a_call_imports_draws_as_one_that_was_there(tools, name) -> None:
    call(tools, "change_settings")  # the next call is the first of its process
    drawn = [tools.open({}, 5).call(ToolCall(name, {})).content for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert tools.open({}, 6).call(ToolCall(name, {})).content != drawn[0]


def test_what_a_tool_leaves_running_ends_with_its_process(tools) -> None:
    before = {*children_of(os.getpid())}
    for _ in range(3):  # a process may keep what its first call started
        call(tools, "leave_processes")
    tools.close()
    while {*children_of(os.getpid())} - before:
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ({"number": 1}, "(1, 't', 'x', [], {}, None)"),
        (
            {"number": 1, "text": "a", "either": "y", "numbers": [1, 2], "table": {"a": 2}, "perhaps": None},
            "(1, 'a', 'y', [1, 2], {'a': 2}, None)",
        ),
        ({"number": 3.0}, "(3.0, 't', 'x', [], {}, None)"),
    ],
)  # fmt: skip
def test_arguments_reach_a_tool_as_they_were_written(tools, arguments, shown) -> None:
    result = call(tools, "typed", **arguments)
    assert (result.content, result.failed) == (shown, False)


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ({}, "number is missing"),
        ({"number": "1"}, "number is '1', not of type integer"),
        ({"number": 1.5}, "number is 1.5, not of type integer"),
        ({"number": True}, "number is True, not of type integer"),
        ({"number": None}, "number is None, not of type integer"),
        ({"number": [1]}, "number is [1], not of type integer"),
        ({"number": 1, "text": {}}, "text is {}, not of type string"),
        ({"number": 1, "either": "z"}, "either is 'z', not one of ['x', 'y']"),
        ({"number": 1, "numbers": 1}, "numbers is 1, not of type array"),
        ({"number": 1, "numbers": [1, "2"]}, "numbers[1] is '2', not of type integer"),
        ({"number": 1, "table": []}, "table is [], not of type object"),
        ({"number": 1, "table": {"a": "b"}}, "table['a'] is 'b', not of type number"),
        ({"number": 1, "perhaps": 3}, "perhaps is 3, not of type null or string"),
        ({"number": 1, "other": 3}, "there is no argument 'other'; known: number, text,"),
        ({"number": 1, "\ud800": 3}, "there is no argument '\\ud800'; known: number, text,"),
    ],
)
def test_arguments_of_another_type_are_an_observation(tools, arguments, wrong) -> None:
    result = call(tools, "typed", **arguments)
    assert result.failed
    assert result.content.startswith(f"Error: wrong arguments: {wrong}")
    result.content.encode()


@pytest.mark.parametrize("column", [["typed"], '["typed"]'])
def test_a_row_calls_the_tools_that_its_own_column_names(tools, column) -> None:
    with closing(tools.open({"tools": column}, 1)) as session:
        assert not session.call(ToolCall("typed", {"number": 1})).failed
        refused = session.call(ToolCall("show_process", {}))
        assert refused.content == "Error: no tool 'show_process'; known: typed"


def test_methods_objects_and_partials_are_tools(tools) -> None:
    assert call(tools, "find", letter="E").content == "Emma, Evelina"
    assert call(tools, "Shelf", index=2).content == "Dracula"
    with closing(ToolSet([seven], ENDS_S)) as partials:
        (schema,) = partials.schemas
        properties = schema["function"]["parameters"]["properties"]
        assert [*properties] == ["text", "either", "numbers", "perhaps"]
        assert call(partials, "typed").content == "(7, 't', 'x', [], {'a': 1.5}, None)"
        assert call(partials, "typed", number=8).failed
        assert call(partials, "typed", table={}).failed


@pytest.mark.parametrize(
    ("tool", "error", "words"),
    [
        (lambda a: a, ValueError, "needs a name to be called by"),
        (len, ValueError, r"can't be described .*[^.]\. Give each argument"),
        (Shelf.__init__, ValueError, "can't be described"),
        (hostile_tools.without_arguments, ValueError, "can't be described"),
        (3, TypeError, "give a list of functions"),
        (Shelf.find, ValueError, r"'find' is a method without its instance, .* Shop\(\)\.find"),
        (hostile_tools.yield_later, ValueError, "'yield_later' is an async generator"),
        (hostile_tools.YieldsLater(), ValueError, "'YieldsLater' is an async generator"),
    ],
)
def test_what_cannot_be_a_tool_is_refused_at_once(tool, error, words) -> None:
    with pytest.raises(error, match=words):
        ToolSet([tool], 5.0)


def test_other_mistakes_are_told_at_once() -> None:
    with pytest.raises(TypeError, match="give a list"):
        ToolSet(typed, 5.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two tools are named 'typed'"):
        ToolSet([typed, seven], 5.0)
    for deadline in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tool_deadline"):
            ToolSet([typed], deadline)


def test_a_tool_that_cannot_be_sent_or_loaded_is_an_error() -> None:
    lines = (line for line in "ab")

    def next_line() -> str:
        """Return the next line."""
        return next(lines)

    with pytest.raises(TypeError, match="make it inside the function"):
        ToolSet([next_line], 5.0)

    class Unloadable:
        __name__ = "unloadable"

        def __call__(self) -> None:
            """Do nothing."""

        def __setstate__(self, state):
            raise LookupError("gone")

        def __getstate__(self):
            return {"a": 1}

    with closing(ToolSet([Unloadable()], 5.0)) as tools, pytest.raises(RuntimeError, match="gone"):
        call(tools, "unloadable")


def test_closing_ends_the_server_although_a_fork_holds_its_socket_open(monkeypatch) -> None:
    monkeypatch.setattr("trl_selfplay.tools.tool_processes._END_DEADLINE_S", ENDS_S)
    tools = ToolSet([typed], ENDS_S)
    call(tools, "typed", number=1)
    (server,) = tools._processes._servers
    held = os.dup(server._control.fileno())
    tools.close()
    os.close(held)
    assert server._process.returncode == 0  # it was asked to end, not killed


def test_a_server_that_was_killed_is_started_again(tools) -> None:
    first = call(tools, "show_process")
    (server,) = tools._processes._servers
    server._process.kill()
    server._process.wait()
    second = call(tools, "show_process")
    assert not second.failed
    assert second != first
