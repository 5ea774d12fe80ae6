"""Text from models, tools and servers as tokenizers and files take it."""

import ast
from pathlib import Path

import trl_selfplay
from trl_selfplay.generation.valid_text import valid_text


def test_half_a_surrogate_pair_becomes_a_question_mark_and_all_else_stays() -> None:
    assert valid_text("a\ud83d, \udc00 and 😀\0ß") == "a?, ? and 😀\0ß"


def test_text_is_cleaned_in_one_place() -> None:
    """A second such function would soon differ."""
    package = Path(trl_selfplay.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node).endswith(".decode()"):
                inner = node.func.value
                if isinstance(inner, ast.Call) and "replace" in ast.unparse(inner):
                    found.add(path.name)
    assert found == {"valid_text.py"}
