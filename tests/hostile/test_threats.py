"""The page of threats names tests that exist, and every hostile test stands on it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "threats.md").read_text("utf-8")


def names_in(path: Path) -> set[str]:
    """Names of the test functions of a file, those in classes too."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    functions = (node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {node.name for node in functions if node.name.startswith("test_")}


def test_every_test_on_the_page_exists() -> None:
    """By file and name."""
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 50
    missing = [f"{file}::{test}" for file, test in named if test not in names_in(TESTS / file)]
    assert missing == []


def test_every_row_is_tried() -> None:
    """Each row of a table names a test."""
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    headers = ("| attack |", "| what happens |")
    untried = [row for row in rows if "::" not in row and not row.startswith(headers)]
    assert untried == []


def test_every_hostile_file_stands_on_the_page() -> None:
    """A new file of hostile tests has a row."""
    files = {path.name for path in Path(__file__).parent.glob("test_*.py")} - {Path(__file__).name}
    assert {file for file in files if f"hostile/{file}" not in PAGE} == set()
