"""What settings classes tell about themselves: names, meanings, and words for what is wrong."""

from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher, get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Table = dict[str, Any]
Schema = type[BaseModel]


def subtables(field: FieldInfo) -> list[Schema]:
    """Tables that a field accepts: none for a value, several where `name` chooses between them."""
    options = (field.annotation, *get_args(field.annotation))
    return [kind for kind in options if isinstance(kind, type) and issubclass(kind, BaseModel)]


def tag(schema: Schema) -> str:
    """The `name` by which a table is chosen, empty if it has no such choice."""
    field = schema.model_fields.get("name")
    options = get_args(field.annotation) if field else ()
    return str(options[0]) if len(options) == 1 else ""


def chosen(field: FieldInfo, name: object) -> list[Schema]:
    options = subtables(field)
    return [option for option in options if tag(option) == name] or options


def fields(
    schema: Schema, table: object = None, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo]]:
    """Every dotted key; with a `table`, only the alternatives that its names choose."""
    table = table if isinstance(table, Mapping) else {}
    for name, field in schema.model_fields.items():
        yield prefix + name, field
        below = table.get(name)
        choice = below.get("name") if isinstance(below, Mapping) else None
        for option in chosen(field, choice):
            yield from fields(option, below, f"{prefix}{name}.")


def dotted_key(schema: Schema, location: tuple[int | str, ...]) -> str:
    """`optimizer.lr` for pydantic's ("optimizer", "sgd", "lr"): the choice made on the way goes."""
    parts = []
    rest = iter(location)
    known: Mapping[str, FieldInfo] = schema.model_fields
    for part in rest:
        parts.append(str(part))
        field = known.get(str(part))
        known = {}
        if field is not None:
            choice = next(rest, None) if field.discriminator else None
            options = chosen(field, choice)
            known = options[0].model_fields if options else {}
    return ".".join(parts)


def likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other).ratio()


def nearest_key(key: str, candidates: list[str]) -> str | None:
    """The candidate most like `key`, as a whole and in its last part: `lr` finds `optimizer.lr`."""
    leaf = key.rpartition(".")[2]
    scores = {
        candidate: likeness(key, candidate) + likeness(leaf, candidate.rpartition(".")[2])
        for candidate in candidates
        if likeness(leaf, candidate.rpartition(".")[2]) >= 0.6
    }
    return max(scores, key=lambda candidate: scores[candidate], default=None)


def problem_key(schema: Schema, problem: ErrorDetails) -> str:
    key = dotted_key(schema, problem["loc"])
    return f"{key}.name" if problem["type"].startswith("union_tag") else key


def describe_problem(schema: Schema, table: Table, problem: ErrorDetails) -> str:
    key = problem_key(schema, problem)
    match problem["type"]:
        case "extra_forbidden":
            nearest = nearest_key(key, [name for name, _ in fields(schema, table)])
            hint = f"; did you mean {nearest}?" if nearest else "; --help lists all settings."
            return f"{key} is not a setting{owner(schema, problem)}{hint}"
        case "missing":
            return f"{key} is required, but is not set."
        case "union_tag_not_found":
            names = ", ".join(option_names(schema, key))
            return f"{key} is required, but is not set; choose one of {names}."
        case "union_tag_invalid":
            return describe_choice(key, problem["ctx"]["tag"], option_names(schema, key))
        case "literal_error":
            options = get_args(dict(fields(schema, table))[key].annotation)
            return describe_choice(key, problem["input"], [str(name) for name in options])
        case _:
            constraint = problem["msg"].removeprefix("Input should ")
            return f"{key} must {constraint}, but got {problem['input']!r}."


def owner(schema: Schema, problem: ErrorDetails) -> str:
    """` of sgd` where a chosen table does not have the key that another one may have."""
    location = problem["loc"]
    chosen_by_name = len(location) > len(dotted_key(schema, location).split("."))
    return f" of {location[-2]}" if chosen_by_name else ""


def option_names(schema: Schema, key: str) -> list[str]:
    """What `optimizer.name` may be."""
    return [tag(option) for option in subtables(dict(fields(schema))[key.removesuffix(".name")])]


def describe_choice(key: str, value: object, options: list[str]) -> str:
    close = get_close_matches(str(value), options, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{key} must be one of {', '.join(options)}, but got {value!r}{hint}"


def describe_settings(schema: Schema, prefix: str = "") -> Iterator[str]:
    """A line per setting, for `--help`: key, default or choices, meaning."""
    # The name first: it says whose settings follow.
    for name, field in sorted(schema.model_fields.items(), key=lambda item: item[0] != "name"):
        options = subtables(field)
        if not options:
            yield f"  {prefix + name:<34}{describe_values(field)}"
            if field.description:
                yield f"      {' '.join(field.description.split())}"
        for option in options:
            yield from describe_settings(option, f"{prefix}{name}.")


def describe_values(field: FieldInfo) -> str:
    kinds = (field.annotation, *get_args(field.annotation))
    literals = [kind for kind in kinds if get_origin(kind) is Literal]
    choices = " | ".join(str(value) for kind in literals for value in get_args(kind))
    if len(literals) == 1 and "|" not in choices:
        return f"= {choices}"
    if field.is_required():
        return choices or "required"
    default = "optional" if field.default is None else f"default {field.default!r}"
    return f"{choices} ({default})" if choices else default
