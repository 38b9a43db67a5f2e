"""Imports in `kfac` point one way, and lead to torch and the standard library only."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent / "kfac"
SOURCES = {p.relative_to(ROOT.parent): p.read_text() for p in ROOT.rglob("*.py")}

# What a part of the package may import of it; a part is a module or folder directly in kfac/.
NOTHING: set[str] = set()
ALLOWED = {
    **dict.fromkeys(
        ["arguments", "averaging", "compilation", "covariance", "damping", "factors"], NOTHING
    ),
    **dict.fromkeys(["assignment", "fisher", "graph", "group_settings", "trainable"], NOTHING),
    "hooks": {"compilation"},
    **dict.fromkeys(["forward_mode", "names", "products", "schedules", "update"], NOTHING),
    "example_gradients": {"products"},
    "layers": {"covariance", "example_gradients", "factors"},
    "inverse": {"damping", "factors", "products"},
    "checkpoint": {"factors"},
    "fallback": {"checkpoint", "update"},
    "statistics": {"example_gradients", "layers", "recorder"},
    "ties": {"layers"},
    "param_groups": {"layers", "names", "ties"},
    "summary": {"layers", "names"},
    "vectors": {"fisher"},
    "recorder": {"hooks"},
    "jacobian_products": {"forward_mode", "hooks", "recorder"},
    "fisher_products": {"fisher", "jacobian_products", "recorder"},
    **dict.fromkeys(["quadratic_model", "levenberg_marquardt"], NOTHING),
    "linear_calls": {"compilation", "layers"},
    "gradient_check": {"graph", "layers"},
    "uses": {"graph", "layers"},
    "taps": {"graph", "hooks", "layers", "linear_calls", "statistics", "uses"},
    "calls": {"names", "recorder", "statistics"},
    "capture": {
        "calls",
        "compilation",
        "fisher",
        "gradient_check",
        "graph",
        "hooks",
        "layers",
        "linear_calls",
        "names",
        "recorder",
        "statistics",
        "taps",
        "vectors",
    },
    "directions": {"layers"},
    "grafting": {"directions", "update"},
    "objective": {"preconditioner", "quadratic_model", "update"},
    "rewind": {"curvature", "hooks", "preconditioner"},
    "state": {"automatic", "checkpoint", "fallback", "grafting", "names", "preconditioner"},
    "distributed": NOTHING,
    "kronecker": {"damping", "factors", "layers", "products"},
    "curvature": {
        "checkpoint",
        "directions",
        "distributed",
        "example_gradients",
        "factors",
        "inverse",
        "kronecker",
        "layers",
    },
}
SEES_EVERYTHING = {"automatic", "optimizer", "preconditioner", "__init__"}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}


def imports(path: Path, source: str) -> set[str]:
    """Dotted names of the modules that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.parent.parts[: len(path.parts) - node.level])
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            # `from kfac import damping` imports a part, `from kfac.damping import x` a name in it.
            names = [f"{base}.{a.name}" for a in node.names] if base == "kfac" else [base]
            found |= set(names)
    return found


def part(path: Path) -> str:
    return path.with_suffix("").parts[1]


def parts_imported(path: Path, source: str) -> set[str]:
    own = {n.split(".")[1] for n in imports(path, source) if n.startswith("kfac.")}
    return own - {part(path)}


def violations(sources: dict[Path, str]) -> list[str]:
    found = []
    for path, source in sources.items():
        name = part(path)
        outside = {n.split(".")[0] for n in imports(path, source)}
        foreign = outside - {"kfac", "torch"} - sys.stdlib_module_names
        inside = parts_imported(path, source) - {"arguments"}
        upward = set() if name in SEES_EVERYTHING else inside - ALLOWED.get(name, NOTHING)
        found += [f"{path} imports {n}" for n in sorted(foreign | upward)]
        found += [f"{path} has a name without a subject"] * bool(
            {*path.with_suffix("").parts} & FORBIDDEN_NAMES
        )
    return found


def order(sources: dict[Path, str]) -> list[str]:
    """The parts from bottom to top; a cycle is a `CycleError`."""
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        graph.setdefault(part(path), set()).update(parts_imported(path, source))
    return list(TopologicalSorter(graph).static_order())


def test_imports_point_one_way() -> None:
    assert violations(SOURCES) == []


def test_there_are_no_cycles() -> None:
    assert order(SOURCES)[-1] == "__init__"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("inverse/bad.py", "from kfac.layers import Layer"),
        ("inverse/bad.py", "from ..layers import Layer"),
        ("inverse/bad.py", "def f():\n    import kfac.layers.conv"),
        ("factors.py", "from kfac import schedules"),
        ("factors.py", "from .schedules import Scheduled"),
        ("covariance/bad.py", "from kfac.factors import Bucket"),
        ("layers/bad.py", "from kfac.inverse import Eigen"),
        ("new.py", "import kfac.optimizer"),
        ("optimizer.py", "import numpy as np"),
        ("utils.py", ""),
        ("layers/helpers.py", ""),
    ],
)
def test_a_violation_is_found(file: str, source: str) -> None:
    assert len(violations({Path("kfac") / file: source})) == 1


def test_a_cycle_is_found() -> None:
    cycle = {
        Path("kfac/optimizer.py"): "from kfac.preconditioner import Preconditioner",
        Path("kfac/preconditioner.py"): "import kfac.optimizer",
    }
    with pytest.raises(ValueError, match="cycle"):
        order(cycle)
