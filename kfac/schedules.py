"""Settings that may change with the step: a constant or a function ``step -> value``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from kfac.arguments import Constraint, check

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class Scheduled(Generic[T]):
    """A constant or a function of the number of completed steps, checked whenever it is read.

    Args:
        owner: Name of the class whose argument this is, for messages.
        argument: Name of the argument.
        value: A constant, or a callable that maps the number of completed steps to one.
        constraint: What every value must be.

    Raises:
        ValueError: If the constant, or the value at step 0, violates the constraint.
    """

    owner: str
    argument: str
    value: T | Callable[[int], T]
    constraint: Constraint

    def __post_init__(self) -> None:
        self.at(0)

    @property
    def is_constant(self) -> bool:
        """Whether the value is the same at every step."""
        return not callable(self.value)

    def at(self, step: int) -> T:
        """Return the value after ``step`` completed steps."""
        if not callable(self.value):
            check(
                self.owner, self.argument, self.value, self.constraint,
                "Pass a constant, or a function of the step.",
            )  # fmt: skip
            return self.value
        value = self.value(step)
        check(
            self.owner,
            self.argument,
            value,
            self.constraint,
            f"It is of its schedule at step {step}: correct the function.",
        )
        return value


def growing_period(step: int) -> int:
    """Period of factor updates that starts at 1 and grows by 1 every 100 steps, to 10.

    The curvature changes fastest at the start of a training, and a statistic then costs no more
    than later.
    """
    return min(10, 1 + step // 100)


def growing_refresh_period(step: int) -> int:
    """Five times :func:`growing_period`."""
    return 5 * growing_period(step)
