"""A TOML file and `key=value` overrides become one checked, frozen settings object."""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from experiment.errors import RunError
from experiment.settings_schema import Table, describe_problem, problem_key


class Settings(BaseModel):
    """Base of every settings table: no unknown keys, no conversions, no changes afterwards."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


S = TypeVar("S", bound=Settings)


def load_settings(schema: type[S], path: Path, overrides: Sequence[str] = ()) -> S:
    """Read `path`, put the overrides (`optimizer.lr=0.1`) on top and check the result.

    Raises:
        RunError: one line per problem, each with the file or override that it comes from.
    """
    table = read_table(path)
    sources = {}
    for override in overrides:
        key, value = parse_override(override)
        put(table, key, value, override)
        sources[key] = f"override {override}"
    try:
        return schema.model_validate(table)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            source = source_of(problem_key(schema, problem), sources, str(path))
            lines.append(f"{source}: {describe_problem(schema, table, problem)}")
        raise RunError("\n".join(lines)) from None


def read_table(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"Cannot read the settings file {path}: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is not valid TOML: {error}.") from None


def parse_override(override: str) -> tuple[str, Any]:
    """Split `key=value`; the value is read as TOML, a bare word as a string."""
    key, separator, text = override.partition("=")
    if not separator or not all(part.isidentifier() for part in key.split(".")):
        raise RunError(f"override {override}: must look like key=value, such as optimizer.lr=0.1.")
    try:
        return key, tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return key, text


def put(table: Table, key: str, value: Any, override: str) -> None:
    *parents, leaf = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise RunError(f"override {override}: {parent} is a value, not a table of settings.")
    table[leaf] = value


def source_of(key: str, sources: dict[str, str], default: str) -> str:
    """The last override that set `key`, a table around it or something in it."""
    for changed, source in reversed(sources.items()):
        if f"{key}.".startswith(f"{changed}.") or changed.startswith(f"{key}."):
            return source
    return default


def differing_keys(one: Table, other: Table, prefix: str = "") -> list[str]:
    """Dotted keys of the values in which two dumped settings differ."""
    keys = []
    for name in sorted(one.keys() | other.keys()):
        left, right = one.get(name), other.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            keys += differing_keys(left, right, f"{prefix}{name}.")
        elif left != right:
            keys.append(prefix + name)
    return keys
