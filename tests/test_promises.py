"""Every row of `docs/compatibility.md` is kept true by tests, which name it with `promise`."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
PAGE = (ROOT / "docs/compatibility.md").read_text()
TABLE = re.compile(r"^\|[^\n]*\|\n\|[-|]+\|\n((?:\|[^\n]*\|\n)+)", re.MULTILINE)


def promised(page: str) -> list[str]:
    """The first cell of every row of every table."""
    return [row.split("|")[1].strip() for rows in TABLE.findall(page) for row in rows.splitlines()]


def kept(source: str) -> list[str]:
    """What the markers of a file name, by a text or by a constant of the file."""
    tree = ast.parse(source)
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    named = [
        constants.get(call.args[0].id) if isinstance(call.args[0], ast.Name) else call.args[0]
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "promise"
    ]
    return [row.value for row in named if isinstance(row, ast.Constant)]


def test_rows_and_markers_are_found() -> None:
    page = "| use | treatment |\n|---|---|\n| hooks | run |\n| `copy` | works |\n\nNot | a row |\n"
    source = "COPY = '`copy`'\n@mark.promise('hooks')\n@mark.promise(COPY)\ndef test(): ...\n"
    assert promised(page) == kept(source) == ["hooks", "`copy`"]


def test_no_row_stands_twice() -> None:
    rows = promised(PAGE)
    assert sorted(rows) == sorted(set(rows))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_markers_name_rows(path: Path) -> None:
    assert set(kept(path.read_text())) <= set(promised(PAGE))


def test_every_row_has_a_marker() -> None:
    found = {row for path in TESTS for row in kept(path.read_text())}
    assert [row for row in promised(PAGE) if row not in found] == []
