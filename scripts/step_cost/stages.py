"""Where a step spends its time: methods of the package, wrapped from outside and put back."""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

from kfac.capture import Capture
from kfac.curvature import Curvature
from kfac.factors import Bucket
from kfac.inverse import Inverse
from kfac.layers import Layer
from kfac.preconditioner import Preconditioner
from step_cost.trainers import Trainer

FORWARD, BACKWARD, UPDATE = "forward", "backward", "update"
FISHER_PASS, FOLD, REFRESH, PRECONDITION = "Fisher pass", "fold", "refresh", "precondition"
STATISTICS = {"A": "statistics A", "G": "statistics G", "S": "statistics S"}
STAGES = (FORWARD, BACKWARD, FISHER_PASS, *STATISTICS.values(), FOLD, REFRESH, PRECONDITION, UPDATE)

MOMENTS = {
    "A": ("input_moment", "input_mean", "masked_moment", "masked_sum"),
    "G": ("gradient_moment", "gradient_sum"),
    "S": ("squared_gradients",),
}


class Clock:
    """Time spent in each stage, without the stages inside it.

    Autograd may run backward passes on a thread of its own, but the caller waits for it, so one
    stack serves both.

    Args:
        synchronize: Waits for the device.

    Attributes:
        seconds: By stage, and by what within it.
    """

    def __init__(self, synchronize: Callable[[], None]) -> None:
        self.seconds: defaultdict[tuple[str, Hashable], float] = defaultdict(float)
        self._synchronize = synchronize
        self._stack: list[tuple[str, Hashable]] = []
        self._since = 0.0

    def enter(self, stage: str, what: Hashable = None) -> None:
        self._charge()
        self._stack.append((stage, what))

    def leave(self) -> None:
        self._charge()
        self._stack.pop()

    def _charge(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def by_stage(self) -> dict[str, float]:
        """Milliseconds of every stage."""
        totals: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        for (stage, _), seconds in self.seconds.items():
            totals[stage] += 1e3 * seconds
        return totals


class Place(NamedTuple):
    """A method to wrap: whose, its name, and from its arguments the stage and what within it."""

    owner: type
    method: str
    label: Callable[..., tuple[str, Hashable]]


def places() -> list[Place]:
    """Every method that is a stage or a part of one."""

    def always(stage: str) -> Callable[..., tuple[str, Hashable]]:
        return lambda *args, **kwargs: (stage, None)

    def of_layer(stage: str) -> Callable[..., tuple[str, Hashable]]:
        return lambda layer, *args, **kwargs: (stage, layer.name)

    def of_bucket(bucket: Bucket, index: int, name: str, *_: Any) -> tuple[str, Hashable]:
        return STATISTICS[name], bucket.names[index]

    def of_shape(inverse: Inverse, state: Any, gradient: Any, *_: Any) -> tuple[str, Hashable]:
        return PRECONDITION, tuple(gradient.shape[1:])

    return [
        Place(Trainer, "forward", always(FORWARD)),
        Place(Trainer, "backward", always(BACKWARD)),
        Place(Trainer, "update", always(UPDATE)),
        Place(Capture, "_run_pass", always(FISHER_PASS)),
        Place(Preconditioner, "update_factors", always(FOLD)),
        Place(Curvature, "refresh", always(REFRESH)),
        Place(Curvature, "precondition", always(PRECONDITION)),
        Place(Bucket, "accumulate", of_bucket),
        *(
            Place(owner, method, of_layer(STATISTICS[factor]))
            for factor, methods in MOMENTS.items()
            for method in methods
            for owner in family(Layer)
            if method in vars(owner)
        ),
        *(
            Place(owner, "precondition", of_shape)
            for owner in family(Inverse)
            if "precondition" in vars(owner)
        ),
    ]


def family(owner: type[Any]) -> list[type[Any]]:
    """A class and all that derive from it, each once."""
    found = [owner]
    for child in owner.__subclasses__():
        found += [member for member in family(child) if member not in found]
    return found


@contextmanager
def stage_timers(clock: Clock) -> Iterator[None]:
    """Charge the clock with every stage inside the block."""
    wrapped = places()
    originals = [vars(place.owner)[place.method] for place in wrapped]
    try:
        for place, original in zip(wrapped, originals, strict=True):
            setattr(place.owner, place.method, timed(original, place.label, clock))
        yield
    finally:
        for place, original in zip(wrapped, originals, strict=True):
            setattr(place.owner, place.method, original)


def timed(
    function: Callable[..., Any], label: Callable[..., tuple[str, Hashable]], clock: Clock
) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        clock.enter(*label(*args, **kwargs))
        try:
            return function(*args, **kwargs)
        finally:
            clock.leave()

    return wrapper
