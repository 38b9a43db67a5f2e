"""Every row of `docs/compatibility.md` is kept true by tests, which name it with `promise`."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs/compatibility.md").read_text()
TABLE = re.compile(r"^\|[^\n]*\|\n\|[-|]+\|\n((?:\|[^\n]*\|\n)+)", re.MULTILINE)


def promised(page: str) -> list[str]:
    """The first cell of every row of every table."""
    return [row.split("|")[1].strip() for rows in TABLE.findall(page) for row in rows.splitlines()]


def kept(source: str) -> list[str]:
    """What the markers of a file name."""
    return [
        call.args[0].value
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr == "promise"
        and isinstance(call.args[0], ast.Constant)
        and isinstance(call.args[0].value, str)
    ]


def test_rows_and_markers_are_found() -> None:
    page = "| use | treatment |\n|---|---|\n| hooks | run |\n| `copy` | works |\n\nNot | a row |\n"
    source = "@pytest.mark.promise('hooks')\n@pytest.mark.promise('`copy`')\ndef test(): ...\n"
    assert promised(page) == kept(source) == ["hooks", "`copy`"]


def test_no_row_stands_twice() -> None:
    rows = promised(PAGE)
    assert sorted(rows) == sorted(set(rows))


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda p: p.stem)
def test_markers_name_rows(path: Path) -> None:
    assert set(kept(path.read_text())) <= set(promised(PAGE))
