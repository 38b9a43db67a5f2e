"""Mutants of a source: each differs from it in one place."""

import ast
import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from mutation.operators import called, replacements

# Calls whose arguments are texts or types for a reader or a type checker.
FOR_READERS = {"argument_error", "warn", "cast", "isinstance", "issubclass", "check"}


@dataclass(frozen=True)
class Mutant:
    """A source with one change.

    Attributes:
        path: The source, relative to the repository.
        scope: Function or class that holds the change, and how many lines after its first.
        line: Where it is in the source.
        change: The lines that it changes, after ``-`` and ``+``.
        source: The changed source.
    """

    path: str
    scope: str
    line: int
    change: str
    source: str

    @property
    def key(self) -> str:
        """What the mutant is known by as long as its function stays as it is."""
        return f"{self.path} {self.scope}\n{self.change}"


class Scope(NamedTuple):
    """A function or class, or the module."""

    name: str
    line: int


class Place(NamedTuple):
    """Where a node hangs in its tree."""

    parent: ast.AST
    field: str
    position: int | None
    node: ast.AST
    scope: Scope

    def put(self, node: ast.AST) -> None:
        if self.position is None:
            setattr(self.parent, self.field, node)
        else:
            getattr(self.parent, self.field)[self.position] = node


@dataclass(frozen=True)
class Source:
    """A source with everything that a mutant of it may change.

    Left alone are docstrings, annotations, texts of errors, decorators, base classes, imports, and
    ``strict=`` of ``zip``, which checks what holds anyway. A statement is dropped only where what
    comes after it still has a meaning: not the only ``return``, nor the first assignment of a name.
    """

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def changes(self) -> list[tuple[Place, ast.AST]]:
        """Nodes and what stands in their place in a mutant."""
        return [
            (place, other)
            for place in places(self.tree, Scope("", 1))
            for other in replacements(place.node)
            if ast.dump(other) != ast.dump(place.node)
        ]

    @cached_property
    def names(self) -> list[str]:
        """A name for every change, which other changes of the source leave as it is."""
        plain = [
            f"{self.path} {place.scope.name} {ast.dump(place.node)} {ast.dump(other)}"
            for place, other in self.changes
        ]
        alike: Counter[str] = Counter()
        numbered = []
        for name in plain:
            alike[name] += 1
            numbered.append(f"{name} {alike[name]}")
        return numbered

    def mutant(self, index: int) -> Mutant:
        place, other = self.changes[index]
        original = ast.unparse(self.tree)
        place.put(other)
        mutated = ast.unparse(ast.fix_missing_locations(self.tree))
        place.put(place.node)
        line = getattr(place.node, "lineno", getattr(place.parent, "lineno", 1))
        scope = f"{place.scope.name}+{line - place.scope.line}"
        return Mutant(self.path, scope, line, difference(original, mutated), mutated)


def read(path: Path, root: Path) -> Source:
    return Source(str(path.relative_to(root)), path.read_text())


def difference(old: str, new: str) -> str:
    """The lines that differ."""
    lines = difflib.unified_diff(old.splitlines(), new.splitlines(), n=0, lineterm="")
    changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    return "\n".join(f"{line[0]} {line[1:].strip()}" for line in changed)


def places(tree: ast.AST, scope: Scope) -> Iterator[Place]:
    """Nodes that may be replaced, in the order of the source."""
    if isinstance(tree, ast.FunctionDef | ast.ClassDef):
        scope = Scope(f"{scope.name}.{tree.name}".lstrip("."), tree.lineno)
    for field, value in ast.iter_fields(tree):
        nodes = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for index, node in nodes:
            place = Place(tree, field, index, node, scope)
            if isinstance(node, ast.AST) and not is_left_alone(place):
                if not is_fixed(place):
                    yield place
                yield from places(node, scope)


def is_left_alone(place: Place) -> bool:
    """Whether nothing below is changed either."""
    parent, field, _, node, _ = place
    match parent:
        case ast.ClassDef() | ast.FunctionDef():
            if field in ("decorator_list", "bases", "keywords", "returns"):
                return True
        case ast.arg() | ast.Raise():
            return True
        case ast.AnnAssign() if field in ("annotation", "target"):
            return True
        case ast.Call() if called(parent) in FOR_READERS and field != "func":
            return True
        case ast.UnaryOp(op=ast.USub()) if isinstance(node, ast.Constant):
            return True
        case ast.Module() if isinstance(node, ast.Assign):
            return is_for_types(node)
    match node:
        case ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.Expr(value=ast.Constant()):
            return True
        case ast.keyword(arg="strict"):
            return True
    return False


def is_for_types(assignment: ast.Assign) -> bool:
    """Whether a module gives a name to a type, or lists what it exports."""
    names = [target.id for target in assignment.targets if isinstance(target, ast.Name)]
    value = assignment.value
    if isinstance(value, ast.Subscript) and isinstance(value.value, ast.Name):
        return value.value.id[0].isupper()
    return names == ["__all__"]


def is_fixed(place: Place) -> bool:
    """Whether a node stays, though parts of it may change.

    A statement cannot be dropped if that would leave a name or a result undefined.
    """
    parent, field, index, node, _ = place
    if isinstance(node, ast.Call):
        return called(node) in FOR_READERS
    if isinstance(node, ast.Return):
        # One that ends a branch may go: what follows the branch then runs.
        return not (isinstance(parent, ast.If) and field == "body" and not parent.orelse)
    if isinstance(node, ast.Assign):
        return isinstance(parent, ast.Module | ast.ClassDef) or not overwrites(node)
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Yield | ast.YieldFrom):
        return index == 0 and len(getattr(parent, field)) == 1
    return False


def overwrites(assignment: ast.Assign) -> bool:
    """Whether what is assigned exists before: an item, an attribute, or a name that is read."""
    read = {n.id for n in ast.walk(assignment.value) if isinstance(n, ast.Name)}
    targets = [t for target in assignment.targets for t in ast.walk(target)]
    stored = {t.id for t in targets if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)}
    return stored <= read
