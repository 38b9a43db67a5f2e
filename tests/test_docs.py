"""Every example in the documentation runs, every link and name in it leads somewhere."""

import ast
import inspect
import re
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest

import kfac

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
TARGET = re.compile(r"\bmake ((?:[a-z]+ ?)+)")
FILE = re.compile(r"\b(?:scripts|configs|tests|docs|kfac)/[\w/]+\.(?:py|toml|md)\b")


class Example(NamedTuple):
    code: str
    output: str | None  # of a block of plain text that follows at once


def examples(text: str) -> Iterator[tuple[int, Example]]:
    fences = list(FENCE.finditer(text))
    for fence, following in zip_longest(fences, fences[1:]):
        if fence[1] != "python":
            continue
        shown = None
        if following and following[1] == "text":
            between = text[fence.end() : following.start()]
            shown = following[2] if not between.strip() else None
        yield text[: fence.start()].count("\n") + 1, Example(fence[2], shown)


EXAMPLES = {
    f"{name}:{line}": example for name, text in TEXTS.items() for line, example in examples(text)
}


def anchor(heading: str) -> str:
    words = re.sub(r"[^\w\s-]", "", heading).strip().lower()
    return re.sub(r"[-\s]+", "-", words)


def prose(text: str) -> str:
    return FENCE.sub("", text)


def missing_links(name: str, text: str) -> list[str]:
    missing = []
    for link in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, fragment = link.partition("#")
        page = (ROOT / name).parent / file if file else ROOT / name
        anchors = [anchor(h) for h in HEADING.findall(prose(page.read_text()))] if fragment else []
        if not page.exists() or (fragment and fragment not in anchors):
            missing.append(link)
    return missing


def missing_targets(text: str) -> list[str]:
    shown = [fence[2] for fence in FENCE.finditer(text) if fence[1] == "bash"]
    shown += re.findall(r"`([^`\n]+)`", prose(text))
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for block in shown for line in block.splitlines() if line.startswith("make")]
    return [t for line in lines for m in TARGET.findall(line) for t in m.split() if t not in known]


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, output = EXAMPLES[name]
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    if output is not None:
        assert capsys.readouterr().out == output


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name: str) -> None:
    assert missing_links(name, TEXTS[name]) == []


@pytest.mark.parametrize("name", TEXTS)
def test_files_and_make_targets_exist(name: str) -> None:
    assert missing_targets(TEXTS[name]) == []
    assert [file for file in FILE.findall(TEXTS[name]) if not (ROOT / file).exists()] == []


def test_the_checks_can_fail() -> None:
    assert missing_links("README.md", "[a](docs/nowhere.md) [b](README.md#nothing)") == [
        "docs/nowhere.md",
        "README.md#nothing",
    ]
    assert missing_targets("```bash\nmake test coffee\n```\nand `make tea`") == ["coffee", "tea"]


def test_the_site_has_every_page_and_no_other() -> None:
    listed = re.findall(r"^  - .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in ROOT.glob("docs/*.md"))


def test_parts_that_pages_share_exist() -> None:
    shared = [m for text in TEXTS.values() for m in re.findall(r'^--8<-- "(.+):(.+)"$', text, re.M)]
    assert shared
    for name, section in shared:
        assert TEXTS[name].count(f"[start:{section}]") == TEXTS[name].count(f"[end:{section}]") == 1


def documented_defaults() -> dict[str, str]:
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", TEXTS["docs/arguments.md"], re.MULTILINE)
    return {name: default.strip("` ") for name, default in rows}


def test_every_argument_is_documented_with_its_default() -> None:
    documented = documented_defaults()
    arguments = inspect.signature(kfac.KFAC).parameters
    assert documented.keys() == arguments.keys()
    for name, text in documented.items():
        try:
            default = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            continue  # said in words
        assert default == arguments[name].default, name


def test_every_public_name_is_in_the_reference() -> None:
    for name in kfac.__all__:
        assert f"::: kfac.{name}" in TEXTS["docs/api.md"]
