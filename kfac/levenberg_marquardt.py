"""Levenberg-Marquardt: damping that follows how well the quadratic model predicts the loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kfac.arguments import POSITIVE, POSITIVE_INTEGER, Constraint, check

_INITIAL = Constraint("a finite number > 0 or None", lambda v: v is None or POSITIVE.accepts(v))
_DECAY = Constraint("a number in (0, 1)", lambda v: POSITIVE.accepts(v) and v < 1)
_BOUNDS = Constraint(
    "two finite numbers, 0 < lower < upper",
    lambda v: (
        isinstance(v, tuple) and len(v) == 2 and all(map(POSITIVE.accepts, v)) and v[0] < v[1]
    ),
)
_SEARCH = Constraint("an integer >= 1 or None", lambda v: v is None or POSITIVE_INTEGER.accepts(v))
_LEAST_RATIO = Constraint("a number <= 1/4", lambda v: isinstance(v, (int, float)) and v <= 1 / 4)


# λ is searched for on a geometric grid with this ratio, down to this value.
_GRID, _LEAST_FOUND = 10.0, 1e-3


@dataclass(frozen=True)
class Trial:
    """What became of the step from some λ, on the batch of the step.

    Attributes:
        damping: λ.
        change: h(θ + δ) − h(θ).
        ratio: ρ.
    """

    damping: float
    change: float
    ratio: float

    @property
    def is_predicted(self) -> bool:
        """Whether the model has predicted the change well enough to start with: ρ ≥ ½."""
        return self.ratio >= 1 / 2

    def improves_on(self, other: "Trial") -> bool:
        """Whether the step reduces the objective, and by 5% more than another one."""
        return self.change < min(0.0, 1.05 * other.change)


T = TypeVar("T", bound=Trial)


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Settings for a damping λ that adapts itself, and the rule by which it does.

        ρ > 3/4:  λ ← λ·decay^period        ρ < 1/4:  λ ← λ / decay^period

    every ``period`` steps, and by a single power of the decay after the steps 1, 2, 4, 8, … of the
    first ``4·period``, in which a step is most likely to go wrong. ρ is the reduction of the loss
    divided by what the quadratic model has predicted. Where no first λ is given it is found, and in
    those early steps looked for again, see :meth:`calibrate` and :meth:`lowered`. λ stays within
    its bounds: on a smooth stretch ρ > 3/4 would otherwise drive it to where the first rough one
    makes the run diverge. A step that is undone raises it by ``4·period`` powers.

    Args:
        initial: λ of the first step, within the bounds; None to find it on the first batch, see
            :meth:`calibrate`.
        period: Steps between two adaptations.
        decay: ω in (0, 1), per step.
        bounds: Smallest and largest λ, in units of the Fisher.
        search_period: Steps between two searches for a damping γ² that the preconditioner has for
            itself, see :meth:`candidates`; None to damp it by λ, too.
        least_ratio: A step with a smaller ρ is undone, as is one to where the loss is not finite;
            by default every step that is seen to increase the objective.

    Raises:
        ValueError: If an argument violates its constraint.

    Source:
        Martens & Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate
        Curvature", sections 6.5 and 6.6; there λ has no bounds and starts at 150.
    """

    initial: float | None = None
    period: int = 5
    decay: float = 19 / 20
    bounds: tuple[float, float] = (1e-4, 1e3)
    least_ratio: float = 0.0
    search_period: int | None = None

    def __post_init__(self) -> None:
        for argument, value, constraint in (
            ("initial", self.initial, _INITIAL),
            ("period", self.period, POSITIVE_INTEGER),
            ("decay", self.decay, _DECAY),
            ("bounds", self.bounds, _BOUNDS),
            ("least_ratio", self.least_ratio, _LEAST_RATIO),
            ("search_period", self.search_period, _SEARCH),
        ):
            remedy = f"The default is {getattr(type(self), argument)}."
            check("LevenbergMarquardt", argument, value, constraint, remedy)
        lower, upper = self.bounds
        within = Constraint(
            f"within bounds={self.bounds}", lambda v: v is None or lower <= v <= upper
        )
        check(
            "LevenbergMarquardt", "initial", self.initial, within, "Widen the bounds, or pass None."
        )

    def is_due(self, step: int) -> bool:
        """Whether λ is adapted after the step that follows ``step`` completed ones."""
        return self._is_early(step) or self._ends_period(step)

    def is_sought(self, step: int) -> bool:
        """Whether λ is looked for in the step that follows ``step`` completed ones."""
        return self.initial is None and (step == 0 or self._is_early(step))

    def _is_early(self, step: int) -> bool:
        return step < 4 * self.period and (step + 1).bit_count() == 1

    def _ends_period(self, step: int) -> bool:
        return (step + 1) % self.period == 0

    def adapted(self, damping: float, ratio: float, step: int) -> float:
        """The λ that follows from ρ.

        Args:
            damping: λ.
            ratio: ρ; NaN, of a loss that is not finite, counts as a bad prediction.
            step: Number of completed steps before the one that ρ is of.

        Source:
            Martens & Grosse 2015, section 6.5.
        """
        factor = self.decay ** (self.period if self._ends_period(step) else 1)
        if ratio > 3 / 4:
            damping *= factor
        elif not self.accepts(ratio):
            damping /= self.decay ** (4 * self.period)
        elif not ratio >= 1 / 4:
            damping /= factor
        return self._bounded(damping)

    def accepts(self, ratio: float) -> bool:
        """Whether a step with this ρ is kept."""
        return ratio >= self.least_ratio

    def is_searched(self, step: int) -> bool:
        """Whether γ² is searched for in the step that follows ``step`` completed ones."""
        return self.search_period is not None and step % self.search_period == 0

    def candidates(self, damping: float) -> list[float]:
        """Dampings of the preconditioner to choose from: γ² as it is, smaller and larger.

        Args:
            damping: γ².

        Returns:
            γ² times 1, ω^T and ω^−T, within the bounds, T steps being the search period.

        Source:
            Martens & Grosse 2015, section 6.6: of the three, the one whose step has the least M(δ).
        """
        assert self.search_period is not None
        factor = self.decay**self.search_period
        values = [self._bounded(damping * f) for f in (1.0, factor, 1 / factor)]
        return list(dict.fromkeys(values))

    def calibrate(self, trial_at: Callable[[float], T]) -> T:
        """Find the first λ, on a geometric grid from 1 on.

        Goes down from 1 while the step from the smaller λ is predicted well, ρ ≥ ½, or reduces the
        objective by 5% more. If neither holds for 1 itself, compared with 10, it goes up until a
        step is predicted well. So a λ is never chosen beyond one that has failed. A small λ
        shortens the first stretch where it is right, and wrecks it where it is not.

        Args:
            trial_at: Tries the step from a λ; must leave no trace.

        Returns:
            The trial of the λ that was found, within the bounds.

        Cost:
            One trial for every point between the start and the result, and one or two more.
        """
        trial, rises = trial_at(self._bounded(1.0)), False
        while not trial.is_predicted and trial.damping < self.bounds[1]:
            upper = trial_at(self._bounded(trial.damping * _GRID))
            if trial.improves_on(upper):
                break
            trial, rises = upper, True
        return trial if rises else self._descend(trial, trial_at, by_prediction=True)

    def lowered(self, damping: float, trial_at: Callable[[float], T]) -> T:
        """Go down from λ by factors of 10 while that reduces the objective by 5% more.

        The first batch need not be like those that follow, nor the first point.

        Args:
            damping: λ.
            trial_at: Tries the step from a λ; must leave no trace.

        Returns:
            The trial of the λ that was found.

        Cost:
            One trial for every point between λ and the result, and one more.
        """
        return self._descend(trial_at(damping), trial_at, by_prediction=False)

    def _descend(self, trial: T, trial_at: Callable[[float], T], *, by_prediction: bool) -> T:
        # Some nets fit a batch with any λ, by saturating.
        least = max(_LEAST_FOUND, self.bounds[0])
        while trial.damping > least:
            lower = trial_at(max(trial.damping / _GRID, least))
            if not (lower.improves_on(trial) or (by_prediction and lower.is_predicted)):
                break
            trial = lower
        return trial

    def _bounded(self, damping: float) -> float:
        lower, upper = self.bounds
        return min(max(damping, lower), upper)


def reduction_ratio(change: float, predicted: float) -> float:
    """ρ = (h(θ + δ) − h(θ)) / (M(δ) − M(0)); NaN where no reduction was predicted.

    Args:
        change: h(θ + δ) − h(θ), of the whole objective on the batch of the step.
        predicted: M(δ) − M(0), negative for a step that the model chose; with a given learning rate
            a step may be too long for that.

    Source:
        Martens & Grosse 2015, section 6.5.
    """
    return change / predicted if predicted < 0 else math.nan
