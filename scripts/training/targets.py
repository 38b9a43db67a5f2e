"""When a task counts as learnt."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from training.results import Evaluation, Record

Metric = Literal["loss", "accuracy"]


@dataclass(frozen=True)
class Target:
    """A value that the loss has to fall to, or the accuracy to rise to, on the evaluation set."""

    metric: Metric
    value: float

    def reached(self, evaluation: Evaluation) -> bool:
        value = evaluation.value(self.metric)
        return value >= self.value if self.metric == "accuracy" else value <= self.value

    def first(self, record: Record) -> Evaluation | None:
        return next(filter(self.reached, record.evaluations), None)

    def __str__(self) -> str:
        if self.metric == "accuracy":
            return f"accuracy {self.value:.1%}"
        return f"loss {self.value:.4g}"


@dataclass(frozen=True)
class BestOf:
    """The best that a yardstick gets to within so many steps, over its learning rates."""

    contender: str
    steps: int
    metric: Metric = "loss"

    def resolve(self, records: Iterable[Record]) -> Target:
        """From the records of the yardstick, one for every learning rate."""
        values = [
            evaluation.value(self.metric)
            for record in records
            for evaluation in record.evaluations
            if evaluation.step <= self.steps
        ]
        return Target(self.metric, best(self.metric, values))


def best(metric: Metric, values: Iterable[float]) -> float:
    """The highest accuracy or the lowest loss."""
    if metric == "accuracy":
        return max(values, default=-math.inf)
    return min(values, default=math.inf)
