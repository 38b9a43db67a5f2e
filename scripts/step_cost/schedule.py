"""How often steps of each class occur, and the mean step that they add up to."""

import inspect
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

from kfac import Preconditioner
from kfac.curvature import Curvature

Layers = frozenset[str]


class Periods(NamedTuple):
    """Steps between updates of the factors, and between refreshes of the inverses."""

    factor: int
    inverse: int

    def __str__(self) -> str:
        return f"{self.factor}/{self.inverse}"


class Part(NamedTuple):
    """One class of steps: its share of all steps, and its median time or what it adds."""

    name: str
    frequency: float
    milliseconds: float


@dataclass(frozen=True)
class Cycle:
    """What happens in each step until the schedule repeats: factors updated, inverses refreshed."""

    steps: tuple[tuple[bool, Layers], ...]

    @property
    def turns(self) -> list[Layers]:
        """The sets of layers that are refreshed together, in order."""
        return list(dict.fromkeys(refreshed for _, refreshed in self.steps if refreshed))

    def parts(
        self, ordinary: float, factor: float, refreshes: Mapping[Layers, float]
    ) -> list[Part]:
        """The classes of steps, from the milliseconds of each and of every set's refresh."""
        length = len(self.steps)
        updates = sum(is_update for is_update, _ in self.steps)
        counts = Counter(refreshed for _, refreshed in self.steps if refreshed)
        total = sum(count * refreshes[refreshed] for refreshed, count in counts.items())
        return [
            Part("ordinary", 1 - updates / length, ordinary),
            Part("factor", updates / length, factor),
            Part("refresh", counts.total() / length, total / max(counts.total(), 1)),
        ]

    def longest(self, ordinary: float, factor: float, refreshes: Mapping[Layers, float]) -> float:
        """Milliseconds of the longest step."""
        return max(
            (factor if is_update else ordinary) + refreshes.get(refreshed, 0.0)
            for is_update, refreshed in self.steps
        )


def mean_step(parts: list[Part]) -> float:
    """Milliseconds of the mean step: Σ frequency · milliseconds; refreshes come on top."""
    return sum(part.frequency * part.milliseconds for part in parts)


def cycle(blocks: Curvature, periods: Periods, *, staggered: bool) -> Cycle:
    """Follow the schedule; an inverse is not made twice from the same factors."""
    length = lcm(*periods)
    steps: list[tuple[bool, Layers]] = []
    outdated: Set[str] = frozenset(blocks.layers)
    for step in range(2 * length):
        is_update = step % periods.factor == 0
        if is_update:
            outdated = frozenset(blocks.layers)
        refreshed = blocks.due(step, periods.inverse, staggered=staggered) & outdated
        outdated = outdated - refreshed
        steps.append((is_update, refreshed))
    return Cycle(tuple(steps[length:]))


def parse_periods(text: str) -> Periods:
    if text == "default":
        defaults = inspect.signature(Preconditioner).parameters
        names = ("factor_update_period", "inverse_update_period")
        return Periods(*(defaults[name].default for name in names))
    factor, slash, inverse = text.partition("/")
    if not (slash and factor.isdecimal() and inverse.isdecimal() and int(factor) * int(inverse)):
        raise ArgumentTypeError(f"must be FACTOR/INVERSE, two positive integers, but got {text!r}")
    return Periods(int(factor), int(inverse))
