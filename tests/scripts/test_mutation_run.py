"""The mutation run changes what it says, and tells whether a test noticed."""

import ast
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mutation_run
from mutation.mutants import Mutant, Source, difference, read
from mutation.report import Record, append, digest, load, record_of, survivors, table, unexplained
from mutation.running import Outcome, judged
from mutation.targets import MODULES, sources_of, suite_of

ROOT = Path(__file__).resolve().parents[2]


def mutants(source: Source) -> list[Mutant]:
    return [source.mutant(index) for index in range(len(source.changes))]


def changes(text: str) -> set[str]:
    """What becomes of a source."""
    found = [mutant.source for mutant in mutants(Source("module.py", text))]
    assert len(found) == len(set(found))
    return set(found)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("f(a + b)", {"f(a - b)", "pass"}),
        ("c = a @ b", {"c = b @ a"}),
        ("c = a * b", {"c = a / b"}),
        ("c = a < b", {"c = a <= b", "c = a >= b"}),
        ("c = a is b", {"c = a is not b"}),
        ("c = a and b", {"c = a or b"}),
        ("c = not a", {"c = a"}),
        ("c = -a", {"c = a"}),
        ("c = 0", {"c = 1"}),
        ("c = 1", {"c = 0", "c = 2"}),
        ("c = -2", {"c = -1", "c = 2"}),
        ("c = 0.5", {"c = 1.5", "c = -0.5"}),
        ("c = True", {"c = False"}),
        ("c = f(a, b)", {"c = f(b, a)"}),
        ("c = a if b else d", {"c = a if not b else d"}),
        ("c = [a for a in b if a]", {"c = [a for a in b if not a]"}),
        ("c = a.mT", {"c = a"}),
        ("c = a[b:d]", {"c = a[b:]", "c = a[:d]"}),
        ("c = a.amin(dim=b)", {"c = a.amax(dim=b)"}),
        ("c = a.clamp(min=b)", {"c = a.clamp(max=b)", "c = a", "c = a.clamp_(min=b)"}),
        ("c = a.mul_(b)", {"c = a.mul(b)"}),
        ("c = a.sum()", {"c = a.mean()"}),
        ("a += b", {"a -= b", "pass"}),
    ],
)
def test_every_kind_of_change(source: str, expected: set[str]) -> None:
    assert changes(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""One and 1."""',
        "import a",
        "a: list[1]",
        "def f(a: g(1)) -> h(2): ...",
        "@f(1)\ndef g(): ...",
        "class A(f(1), metaclass=g(2)): ...",
        "raise_ = None",
        "__all__ = ['a', 'b'] + c",
        "Kind = Literal[1, 2]",
        "c = f'{a + 1}'",
        "c = zip(a, strict=True)",
        "c = isinstance(a, b | d)",
        "def f():\n    c = a\n    return c",
    ],
)
def test_texts_types_and_what_cannot_go_are_left_alone(source: str) -> None:
    assert changes(source) == set()


def test_only_the_raise_of_an_error_is_dropped() -> None:
    assert changes("def f():\n    raise ValueError(1 + 1)") == {"def f():\n    pass"}


def test_a_return_is_dropped_where_others_follow() -> None:
    source = "def f(a):\n    if a:\n        return b\n    return c"
    assert changes(source) == {
        "def f(a):\n    if a:\n        pass\n    return c",
        "def f(a):\n    if not a:\n        return b\n    return c",
    }


def test_an_assignment_is_dropped_if_the_name_has_a_value_before() -> None:
    assert changes("def f(a):\n    a = g(a)\n    a.b = c\n    d = a\n    return d") == {
        "def f(a):\n    pass\n    a.b = c\n    d = a\n    return d",
        "def f(a):\n    a = g(a)\n    pass\n    d = a\n    return d",
    }


def test_the_same_change_in_two_places_has_two_names() -> None:
    twice = mutants(
        Source("m.py", "def f(a):\n    g(a)\n    g(a)\nclass A:\n  def h(a):\n    g(a)")
    )
    assert [(m.scope, m.line) for m in twice] == [("f+1", 2), ("f+2", 3), ("A.h+1", 6)]


def test_a_difference_is_the_changed_lines() -> None:
    assert difference("a\n    b\nc", "a\n    d\nc") == "- b\n+ d"


@pytest.mark.parametrize("module", MODULES)
def test_mutants_of_the_package_are_valid_and_have_tests(module: str) -> None:
    paths = sources_of(ROOT, module)
    assert all((ROOT / test).exists() for p in paths for test in suite_of(relative(p)))
    sources = [read(path, ROOT) for path in paths]
    for source in sorted(sources, key=lambda source: len(source.text))[:4]:
        for index in range(0, len(source.changes), 10):
            mutated = ast.parse(source.mutant(index).source)
            assert ast.dump(mutated) != ast.dump(source.tree)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


MUTANT = Mutant("kfac/a.py", "f", 3, "- a\n+ b", "b")


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    first = record_of("a", MUTANT, Outcome("survived", "", 1.5))
    again = record_of("a", MUTANT, Outcome("killed", "tests/test_a.py::test_b", 2.5))
    assert load(tmp_path / "runs" / "results") == {}
    append(tmp_path / "runs" / "results", first)
    append(tmp_path / "runs" / "results", again)
    assert load(tmp_path / "runs" / "results") == {digest(MUTANT): again}


def test_the_table_counts_and_survivors_have_reasons() -> None:
    def record(module: str, status: str) -> Record:
        return record_of(module, MUTANT, Outcome(status, "", 0.0))  # type: ignore[arg-type]

    records = [record("a", "killed"), record("a", "timed out"), record("b", "survived")]
    assert table(records).splitlines()[2:] == [
        "| a | 2 | 1 | 1 | 0 | 0 | 100.0% |",
        "| b | 1 | 0 | 0 | 0 | 1 | 0.0% |",
        "| all | 3 | 1 | 1 | 0 | 1 | 66.7% |",
    ]
    assert survivors(records, {MUTANT.key: "the same"}) == f"line 3 of {MUTANT.key}\n= the same"
    assert unexplained(records, {}) == records[2:]
    assert unexplained(records, {MUTANT.key: "the same"}) == []


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (0, "survived"),
        (1 << 8, "killed"),
        (90 << 8, "killed"),
        (int(signal.SIGALRM), "timed out"),
        (int(signal.SIGKILL), "timed out"),
        (int(signal.SIGSEGV), "crashed"),
    ],
)
def test_a_child_is_judged_by_its_end(status: int, expected: str, tmp_path: Path) -> None:
    (tmp_path / "failure").write_text("tests/test_a.py::test_b")
    assert judged(status, tmp_path, 1.0).status == expected


def test_tests_that_cannot_run_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "output").write_text("no such option")
    with pytest.raises(RuntimeError, match="no such option"):
        judged(4 << 8, tmp_path, 1.0)


SOURCE = """
def root(value, halvings=3):
    guess = value
    for _ in range(halvings * 10):
        guess = (guess + value / guess) / 2
    return guess
"""
TEST = """
from kfac.damping import root

def test_root():
    assert root(4.0) == 2.0
"""


def test_a_run_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A change that is noticed is told from one that is not, and the package stays as it is."""
    for path, text in {
        "kfac/__init__.py": "",
        "kfac/damping.py": SOURCE,
        "tests/test_damping.py": TEST,
        "pyproject.toml": "",
        "scripts/mutation/survivors.json": "{}",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    for test in suite_of("kfac/damping.py"):
        (tmp_path / test).touch()
    command = [sys.executable, str(ROOT / "scripts/mutation_run.py"), "--root", str(tmp_path)]
    options = ["--modules", "damping", "--jobs", "2"]
    run = subprocess.run([*command, *options], capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    results = tmp_path / "runs/mutants.jsonl"
    records = [json.loads(line) for line in results.read_text().splitlines()]
    fates = {record["key"].splitlines()[-1]: record for record in records}
    assert fates["+ guess = (guess - value / guess) / 2"]["status"] == "killed"
    assert fates["+ guess = (guess - value / guess) / 2"]["test"].endswith("::test_root")
    assert fates["+ def root(value, halvings=4):"]["status"] == "survived"
    assert "not explained" in run.stdout
    assert (tmp_path / "kfac/damping.py").read_text() == SOURCE
    # Nothing is run twice, and a survivor with a reason is no error where most are killed.
    reasons = {record["key"]: "enough" for record in records if record["status"] == "survived"}
    (tmp_path / "scripts/mutation/survivors.json").write_text(json.dumps(reasons))
    mutation_run.main(["--root", str(tmp_path), *options])
    assert "not explained" not in capsys.readouterr().out
    assert len(results.read_text().splitlines()) == len(records)
