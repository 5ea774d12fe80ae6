"""Read the tests of programming tasks.

In: tests as text, lists or JSON, in the forms of MBPP, HumanEval and programming contests. Out:
`CallTests` or `InputTests`, and what keeps tests from running beside the program.
"""

import ast
import builtins
import functools
import importlib.util
import json
import symtable
import sys
import textwrap
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

# The function that tests in HumanEval's form define.
CHECK = "check"
# A name in the instrumented tests that no test uses.
MARK = "__holds__"
_BUILTINS = frozenset(dir(builtins))
# They look for tests elsewhere, and some raise nothing if one fails.
_RUNNERS = ("unittest.main", "pytest.main", "doctest.testmod")
_LITERALS: tuple[type, ...] = (
    *(int, float, complex, str, bytes, bytearray, tuple, list, dict, set, range, Fraction),
    *(deque, Counter, OrderedDict, type(iter([]))),
)
_LITERAL_ATTRIBUTES = frozenset().union(*map(dir, _LITERALS))
_USES_OF_VALUES = (
    ast.Assert,
    ast.BinOp,
    ast.BoolOp,
    ast.ClassDef,
    ast.Compare,
    ast.ExceptHandler,
    ast.For,
    ast.UnaryOp,
)


@dataclass(frozen=True, slots=True)
class CallTests:
    """Tests that call functions of the program.

    Attributes:
        source: Python text whose marked statements are the checks.
        names: The functions that the tests call and the program defines.
        num_checks: Number of checks.
        entry_point: The function that `check(candidate)` gets; None: the program's last one, or no
            such function.
        takes_candidate: Whether `source` defines `check`.
        obstacle: Why the tests can't run apart from the program; None if they can.
    """

    source: str
    names: tuple[str, ...]
    num_checks: int
    entry_point: str | None
    takes_candidate: bool
    obstacle: str | None


@dataclass(frozen=True, slots=True)
class InputTests:
    """What a program reads from standard input, and what it should then print."""

    pairs: tuple[tuple[str, str], ...]

    @property
    def num_checks(self) -> int:
        """Number of checks."""
        return len(self.pairs)


def read_tests(
    tests: Any, entry_point: str | None = None, starter: str = ""
) -> CallTests | InputTests:
    """Return tests in a form that can be run.

    Args:
        tests: A list of texts with assert statements, each a check; one text, in which each statement
            that asserts something is a check, at its top level or within `check(candidate)`, if it
            defines that; a list of dicts with `input` and `output`; a dict with `inputs` and
            `outputs`, two lists. Any of these as JSON text.
        entry_point: The function that is tested.
        starter: Code that the program starts with. Functions that it defines besides the tested
            one belong to the tests.

    Raises:
        ValueError: The tests are empty, don't compile, or have another form.
    """
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):  # no assert begins like this
        try:
            tests = json.loads(tests)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the tests are neither Python nor JSON: {error}") from error
    if isinstance(tests, Mapping):
        return _read_pairs_by_column(tests)
    if isinstance(tests, str):
        return _read_tree(_parse_test(tests, "the test code"), entry_point, starter)
    if not isinstance(tests, (list, tuple)):
        raise ValueError(f"the tests are {tests!r:.80}, of type {type(tests).__name__}")  # noqa: TRY004
    if not tests:
        raise ValueError("there are no tests")
    if all(isinstance(test, str) for test in tests):
        trees = [_parse_test(test, f"test {index}") for index, test in enumerate(tests)]
        body = [statement for tree in trees for statement in _as_one_check(tree)]
        return _read_tree(ast.Module(body, []), entry_point, starter)
    if all(isinstance(test, Mapping) and {"input", "output"} <= test.keys() for test in tests):
        return _read_pairs([test["input"] for test in tests], [test["output"] for test in tests])
    raise ValueError(
        f"the tests are a list that starts with {tests[0]!r:.80}; give assert statements, or dicts "
        "with `input` and `output`"
    )


def _read_pairs_by_column(tests: Mapping[str, Any]) -> InputTests:
    for inputs, outputs in (("inputs", "outputs"), ("input", "output")):
        if inputs in tests and outputs in tests:
            if tests.get("fn_name"):
                raise ValueError(
                    f"the tests call the function {tests['fn_name']!r} (`fn_name`); give assert "
                    "statements in place of pairs"
                )
            columns = tests[inputs], tests[outputs]
            if any(isinstance(c, str) or not isinstance(c, Sequence) for c in columns):
                raise ValueError(f"`{inputs}` and `{outputs}` of the tests have to be lists")
            return _read_pairs(*columns)
    raise ValueError(
        f"the tests are a dict with the keys {list(tests)!r:.80}; give `inputs` and `outputs`"
    )


def _read_pairs(inputs: Sequence[Any], outputs: Sequence[Any]) -> InputTests:
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"the tests have {len(inputs)} inputs and {len(outputs)} outputs")
    pairs = []
    for index, pair in enumerate(zip(inputs, outputs, strict=True)):
        lines = ["\n".join(p) if _is_lines(p) else p for p in pair]
        if not all(isinstance(text, str) for text in lines):
            raise ValueError(f"test {index} is {pair!r:.80}; give input and output as text")
        if not lines[1].split():
            raise ValueError(f"test {index} expects no output, which an empty program prints")
        pairs.append((lines[0], lines[1]))
    return InputTests(tuple(pairs))


def _is_lines(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(line, str) for line in value)


def same_output(printed: str, expected: str) -> bool:
    """Return whether two outputs have the same words, whatever the white space between them."""
    return printed.split() == expected.split()


def parse(source: str) -> ast.Module:
    """Return the syntax tree of a text, without a warning about it.

    Raises:
        ValueError: It isn't Python.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"{error.msg} in line {error.lineno}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError(f"nested too deep: {error}") from error


def _parse_test(source: str, what: str) -> ast.Module:
    try:
        return parse(textwrap.dedent(source))
    except ValueError as error:
        raise ValueError(f"{what} doesn't compile: {error}") from error


def _as_one_check(tree: ast.Module) -> list[ast.stmt]:
    """Return the statements of a list's entry: as one, if they assert something."""
    if len(tree.body) > 1 and any(_is_check(statement, set()) for statement in tree.body):
        return [ast.If(ast.Constant(True), tree.body, [])]
    return tree.body


def _read_tree(tree: ast.Module, entry_point: str | None, starter: str) -> CallTests:
    if not tree.body:
        raise ValueError("there are no tests")
    check = next((s for s in tree.body if isinstance(s, ast.FunctionDef) and s.name == CHECK), None)
    if check is not None:
        entry_point = entry_point or _checked_name(tree) or last_function(starter)
        tree.body = [s for s in tree.body if not _is_call_of_check(s)]
        if len(check.args.args) + len(check.args.posonlyargs) != 1:
            raise ValueError("`check` of the tests has to take one argument, the function")
    _refuse_what_never_fails(tree)
    helpers = _needed_helpers(tree, entry_point, starter)
    tree.body = [*helpers, *tree.body]
    names, modules = _names_of_program(tree, entry_point, check is not None)
    candidate = (*check.args.posonlyargs, *check.args.args)[0].arg if check else None
    obstacle = _find_obstacle(tree, {*names, *([candidate] if candidate else [])})
    tree.body = [ast.Import([ast.alias(name)]) for name in modules] + tree.body
    missing = next((name for name in _imported(tree) if not _is_installed(name)), None)
    if missing:
        raise ValueError(f"the tests import {missing!r}, which isn't installed")
    num_checks = _mark_checks(tree if check is None else check, _checking_functions(tree))
    if not num_checks:
        raise ValueError(
            "the tests have no assert statement" + (" in `check`" if check is not None else "")
        )
    if not (names or candidate in {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}):
        raise ValueError("the tests call no function of the program")
    source = ast.unparse(ast.fix_missing_locations(tree))
    return CallTests(source, names, num_checks, entry_point, check is not None, obstacle)


def last_function(source: str) -> str | None:
    """Return the name of the last function that a text defines at its top level."""
    try:
        body = parse(source).body
    except ValueError:
        return None
    names = [s.name for s in body if isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return names[-1] if names else None


def _is_call_of_check(statement: ast.AST) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Call)
        and isinstance(statement.value.func, ast.Name)
        and statement.value.func.id == CHECK
    )


def _checked_name(tree: ast.Module) -> str | None:
    """Return the argument of a call `check(f)` in the tests themselves."""
    for statement in filter(_is_call_of_check, ast.walk(tree)):
        (argument, *_) = statement.value.args or [None]  # type: ignore[attr-defined]
        if isinstance(argument, ast.Name):
            return argument.id
    return None


def _needed_helpers(tree: ast.Module, entry_point: str | None, starter: str) -> list[ast.stmt]:
    """Return the starter's statements without the tested function, if the tests use any of them."""
    try:
        body = parse(starter).body
    except ValueError:
        return []
    tested = entry_point or last_function(starter)
    helpers = [s for s in body if getattr(s, "name", None) != tested]
    defined = _bound(ast.Module(helpers, []))
    return helpers if defined & _free_names(tree)[0] else []


def _scopes(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _scopes(child)


def _symbols(tree: ast.Module) -> symtable.SymbolTable:
    return symtable.symtable(ast.unparse(ast.fix_missing_locations(tree)), "tests", "exec")


def _bound(tree: ast.Module) -> set[str]:
    """Return the names that a module defines, wherever in it."""
    top = _symbols(tree)
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    for scope in _scopes(top):
        declared = (s for s in scope.get_symbols() if s.is_declared_global() and s.is_assigned())
        bound |= {symbol.get_name() for symbol in declared}
    return bound


def _free_names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Return the names that a module uses and doesn't define: others, and those of built-ins."""
    bound, used = _bound(tree), set()
    for scope in _scopes(_symbols(tree)):
        is_top = scope.get_type() == "module"
        used |= {
            symbol.get_name()
            for symbol in scope.get_symbols()
            if symbol.is_referenced() and (is_top or symbol.is_global())
        }
    free = used - bound
    return free - _BUILTINS, free & _BUILTINS


def _names_of_program(
    tree: ast.Module, entry_point: str | None, has_check: bool
) -> tuple[tuple[str, ...], list[str]]:
    """Return the names that only the program can define, and modules that the tests forgot to import.

    A function named like a built-in, such as `sum`, is the program's only if the tests are about
    it: a program must not replace `len` in the tests.
    """
    free, built_in = _free_names(tree)
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    called = {call.func.id for call in calls}  # type: ignore[attr-defined]
    bases = {
        n.value.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
    }
    modules = {n for n in free & bases - called if n in sys.stdlib_module_names}
    names = free - modules
    if entry_point in built_in:
        names.add(entry_point)
    elif not names and not entry_point and not has_check:
        tested = sorted(built_in & called)
        if len(tested) > 1:
            raise ValueError(
                f"the tests call no function but {', '.join(tested)}; name the tested one in the "
                "column `entry_point`"
            )
        names |= {*tested}
    return tuple(sorted(names)), sorted(modules)


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


@functools.lru_cache
def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a module that was made by hand has no spec
        return module in sys.modules


def _find_obstacle(tree: ast.Module, names: set[str]) -> str | None:
    """Return why a proxy can't stand for a function of the program in these tests, or None."""
    parent = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    callables = names | {b for b in _BUILTINS - _bound(tree) if callable(getattr(builtins, b))}
    callables |= {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    }
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]
    results: dict[str, str] = {}  # variables that hold what a call returned
    for call in calls:
        name = call.func.id  # type: ignore[attr-defined]
        if isinstance(stored := parent[call], ast.Assign):
            results |= {t.id: name for t in stored.targets if isinstance(t, ast.Name)}
        for argument in [*call.args, *(keyword.value for keyword in call.keywords)]:
            if what := _unsendable_in(argument, callables, names):
                return f"{name!r} gets {what} as an argument"
    for node in ast.walk(tree):
        above = parent.get(node)
        if isinstance(node, (ast.AsyncFunctionDef, ast.Await)):
            return "the tests are asynchronous"
        if isinstance(node, ast.Attribute):
            of = results.get(node.value.id) if isinstance(node.value, ast.Name) else None
            if node.value in calls:
                of = node.value.func.id  # type: ignore[attr-defined]
            if of and (node.attr not in _LITERAL_ATTRIBUTES or _looks_like_class(of)):
                return f"{of!r} returns an object with {node.attr!r}"
        called = node.func if isinstance(node, ast.Call) else None
        if called in calls or (isinstance(called, ast.Name) and called.id in results):
            return "the tests call what the program returns"
        if isinstance(above, ast.withitem) and node in calls:
            return "the tests enter a context that the program returns"
        if isinstance(node, ast.Name) and node.id in names and not isinstance(node.ctx, ast.Store):
            if isinstance(above, (ast.Attribute, ast.Subscript)):
                return f"the tests look into {node.id!r}"
            if isinstance(above, _USES_OF_VALUES) or (
                isinstance(above, ast.Call)
                and isinstance(above.func, ast.Name)
                and above.func.id in ("isinstance", "issubclass", "len", "list", "sorted")
            ):
                return f"the tests use {node.id!r} as a value, not as a function"
    return None


def _looks_like_class(name: str) -> bool:
    return name[:1].isupper() and "_" not in name and not name.isupper()


def _unsendable_in(argument: ast.expr, callables: set[str], names: set[str]) -> str | None:
    """Return what in an argument isn't a value: a function or an object; or None."""
    match argument:
        case ast.Lambda():
            return "a lambda"
        case ast.Name(name) if name in callables:
            return f"the function {name!r}"
        case ast.Call(ast.Name(name)) if name in names and _looks_like_class(name):
            return f"an object, {name}(…),"
        case ast.List() | ast.Tuple() | ast.Set() | ast.Dict() | ast.Starred() | ast.IfExp():
            inner = (n for n in ast.iter_child_nodes(argument) if isinstance(n, ast.expr))
            found = (_unsendable_in(each, callables, names) for each in inner)
            return next(filter(None, found), None)
    return None


def _is_check(node: ast.AST, checking: set[str]) -> bool:
    """Return whether a statement asserts something, itself or by calling a function that does."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Lambda():
            return False
        case ast.Assert(ast.Constant(value)) if value:
            return False
        case ast.Assert() | ast.Raise():
            return True
        case ast.Call(ast.Name(name)) if name in checking:
            return True
        case ast.Call(ast.Attribute(_, name)) if name in checking or _is_assertion(name):
            return True
    return any(_is_check(child, checking) for child in ast.iter_child_nodes(node))


def _is_assertion(name: str) -> bool:
    """Return whether a library's function asserts something, by its name."""
    return name.startswith("assert") or name == "raises"


def _checking_functions(tree: ast.Module) -> set[str]:
    """Return the functions and methods that assert something, those of libraries included."""
    nodes = list(ast.walk(tree))
    functions = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name != CHECK]
    imports = (n for n in nodes if isinstance(n, ast.ImportFrom))
    checking = {a.asname or a.name for n in imports for a in n.names if _is_assertion(a.name)}
    previous: set[str] | None = None
    while checking != previous:  # a function may call one that asserts
        previous = checking
        calling = {f.name for f in functions if any(_is_check(s, checking) for s in f.body)}
        checking = checking | calling
    return checking


def _refuse_what_never_fails(tree: ast.Module) -> None:
    """Raise ValueError for tests that only a runner such as pytest would call, or that always hold."""
    nodes = list(ast.walk(tree))
    tuples = (n for n in nodes if isinstance(n, ast.Assert) and isinstance(n.test, ast.Tuple))
    if always := next(tuples, None):
        raise ValueError(f"`{ast.unparse(always):.80}` always holds; leave out the parentheses")
    runner = next(
        (r for n in nodes if isinstance(n, ast.Call) and (r := ast.unparse(n.func)) in _RUNNERS),
        None,
    )
    if runner:
        raise ValueError(f"the tests call {runner}, which doesn't find them; call them one by one")
    used = {n.id for n in nodes if isinstance(n, ast.Name)}
    used |= {n.attr for n in nodes if isinstance(n, ast.Attribute)}
    for function in nodes:
        if (
            isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            and function.name not in used | {CHECK}
            and not function.name.startswith("__")
            and any(
                isinstance(n, ast.Assert)
                or (isinstance(n, ast.Attribute) and _is_assertion(n.attr))
                for n in ast.walk(function)
            )
        ):
            raise ValueError(f"the tests never call {function.name!r}, which asserts something")


def _mark_checks(scope: ast.Module | ast.FunctionDef, checking: set[str]) -> int:
    """Put each statement that asserts something into a block that notes whether it held."""
    count = 0
    for index, statement in enumerate(scope.body):
        if _is_check(statement, checking):
            mark = ast.Call(ast.Name(MARK, ast.Load()), [ast.Constant(count)], [])
            scope.body[index] = ast.With([ast.withitem(mark)], [statement])
            count += 1
    return count
