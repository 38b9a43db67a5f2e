"""The one form in which a bad argument is reported: owner, argument, constraint, value, remedy."""

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Constraint:
    """What a value must be: words for the message and the test itself."""

    text: str
    accepts: Callable[[Any], bool]


def argument_error(
    owner: str, argument: str, constraint: str, value: object, remedy: str
) -> ValueError:
    """Build the error that every check of this package raises."""
    return ValueError(f"{owner}({argument}=...) must be {constraint}, but got {value!r}. {remedy}")


def check(owner: str, argument: str, value: object, constraint: Constraint, remedy: str) -> None:
    """Raise ``ValueError`` unless ``value`` meets ``constraint``."""
    if not constraint.accepts(value):
        raise argument_error(owner, argument, constraint.text, value, remedy)


def nearest(name: str, choices: Iterable[str]) -> str:
    """A question after the choice that a misspelt name is nearest to; empty if none is near."""
    found = difflib.get_close_matches(name, list(choices), n=1)
    return f"Did you mean {found[0]!r}?" if found else ""


def one_of(choices: Sequence[object]) -> Constraint:
    """Membership in a short list of values."""
    return Constraint(
        "one of " + ", ".join(map(repr, choices)),
        lambda value: any(type(value) is type(c) and value == c for c in choices),
    )


def _is_real(value: object) -> bool:
    # The exact type is looked at first since groups are checked at every step.
    is_number = type(value) is float or (isinstance(value, Real) and not isinstance(value, bool))
    return is_number and math.isfinite(value)  # type: ignore[arg-type]


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


POSITIVE = Constraint("a finite number > 0", lambda v: _is_real(v) and v > 0)
NON_NEGATIVE = Constraint("a finite number >= 0", lambda v: _is_real(v) and v >= 0)
UNIT_INTERVAL = Constraint("a number in [0, 1)", lambda v: _is_real(v) and 0 <= v < 1)
FRACTION = Constraint("a number in (0, 1]", lambda v: _is_real(v) and 0 < v <= 1)
POSITIVE_INTEGER = Constraint("an integer >= 1", lambda v: _is_integer(v) and v >= 1)
NON_NEGATIVE_INTEGER = Constraint("an integer >= 0", lambda v: _is_integer(v) and v >= 0)
INTEGER = Constraint("an integer", _is_integer)
BOOLEAN = Constraint("True or False", lambda v: isinstance(v, bool))
