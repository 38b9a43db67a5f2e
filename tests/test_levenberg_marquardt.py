"""Damping that follows the ratio of actual and predicted reduction."""

import math
from typing import Any

import pytest
from mutants import replace

from kfac.levenberg_marquardt import LevenbergMarquardt, Trial, reduction_ratio

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *[("initial", value) for value in (0.0, -1.0, NAN, INF, "auto", True, 1e-9, 1e9)],
        *[("period", value) for value in (0, -1, 2.5, None, True)],
        *[("search_period", value) for value in (0, -1, 2.5, True)],
        *[("decay", value) for value in (0.0, 1.0, 1.5, NAN, "slow")],
        *[("bounds", value) for value in ((0.0, 1.0), (1.0, 1.0), (2.0, 1.0), (1.0,), 1.0, None)],
        *[("bounds", value) for value in ((1e-3, INF), (NAN, 1.0), [1e-3, 1.0])],
    ],
)
def test_a_bad_setting_fails_at_construction(argument: str, value: Any) -> None:
    settings = {argument: value}
    with pytest.raises(ValueError, match=rf"LevenbergMarquardt\({argument}=...\) must be "):
        LevenbergMarquardt(**settings)


def check_rule() -> None:
    rule = LevenbergMarquardt(period=3, decay=0.5, bounds=(1e-4, 1e4), least_ratio=-2.0)
    for ratio, factor, early in [
        (0.76, 1 / 8, 1 / 2),
        (5.0, 1 / 8, 1 / 2),
        (0.75, 1.0, 1.0),
        (0.25, 1.0, 1.0),
        (0.24, 8.0, 2.0),
        (-2.0, 8.0, 2.0),
        (-2.1, 4096.0, 4096.0),
        (NAN, 4096.0, 4096.0),
        (INF, 1 / 8, 1 / 2),
        (-INF, 4096.0, 4096.0),
    ]:
        assert rule.adapted(1.0, ratio, 2) == rule.adapted(1.0, ratio, 1001) == factor
        assert rule.adapted(1.0, ratio, 0) == rule.adapted(1.0, ratio, 7) == early


def test_steps_that_made_it_much_worse_are_not_kept() -> None:
    rule = LevenbergMarquardt(least_ratio=-2.0)
    assert rule.accepts(-2.0)
    assert rule.accepts(INF)
    for ratio in (-2.1, -INF, NAN):
        assert not rule.accepts(ratio)


def test_damping_follows_the_ratio() -> None:
    check_rule()


def test_damping_stays_within_its_bounds() -> None:
    rule = LevenbergMarquardt(bounds=(1e-2, 10.0))
    low = high = 1.0
    for _ in range(100):
        low, high = rule.adapted(low, 1.0, 99), rule.adapted(high, 0.0, 99)
    assert (low, high) == (1e-2, 10.0)
    assert rule.adapted(1e-2, 0.0, 99) > 1e-2
    assert rule.adapted(10.0, 1.0, 99) < 10.0


def test_damping_is_adapted_once_in_a_period_and_more_often_at_first() -> None:
    rule = LevenbergMarquardt(period=5)
    due = [step + 1 for step in range(40) if rule.is_due(step)]
    assert due == [1, 2, 4, 5, 8, 10, 15, 16, 20, 25, 30, 35, 40]
    assert all(LevenbergMarquardt(period=1).is_due(step) for step in range(3))


def test_candidates_are_as_it_is_and_a_step_to_either_side() -> None:
    rule = LevenbergMarquardt(search_period=3, decay=0.5, bounds=(0.1, 10.0))
    assert rule.candidates(1.0) == [1.0, 0.125, 8.0]
    assert rule.candidates(10.0) == [10.0, 1.25]
    assert [step for step in range(10) if rule.is_searched(step)] == [0, 3, 6, 9]
    assert not LevenbergMarquardt().is_searched(0)


class Trials:
    """Trials whose change and ρ are given from λ = 100 down by powers of ten, the last for all.

    Attributes:
        asked: The λ that were tried.
    """

    def __init__(self, *given: tuple[float, float]) -> None:
        self.given = given
        self.asked: list[float] = []

    def __call__(self, damping: float) -> Trial:
        self.asked.append(damping)
        index = min(max(2 - round(math.log10(damping)), 0), len(self.given) - 1)
        return Trial(damping, *self.given[index])


GOOD, BAD = (-1.0, 0.9), (-1.0, 0.2)

# What is given, and the λ that is found.
SEARCHES = {
    "predicted well everywhere": ([GOOD], 1e-3),
    "predicted well as far as 0.1": ([GOOD, GOOD, GOOD, (-1.0, 0.5), (-1.0, 0.49)], 0.1),
    "not predicted, but 5% better each": (
        [GOOD, GOOD, (-1.0, 0.6), (-1.06, 0.1), (-1.12, 0.1), (-1.13, 0.1)], 1e-2,
    ),
    "no step over a failure": ([GOOD, GOOD, GOOD, BAD, GOOD], 1.0),
    "up to what is predicted": ([(-0.6, 0.6), (-0.5, 0.4), (-0.5, 0.4), GOOD], 100.0),
    "not up from what is better": ([GOOD, (-0.9, 0.9), (-1.0, 0.4), (-1.0, 0.4)], 1.0),
    "down from what is better": ([GOOD, (-0.9, 0.9), (-1.0, 0.4), (-1.1, 0.4), (9.0, -9)], 0.1),
    "nothing reduces anything": ([(1.0, -1.0), (2.0, -1.0)], 1e3),
    "not finite": ([(-0.1, 0.7), (NAN, NAN)], 100.0),
    "not finite below": ([GOOD, GOOD, GOOD, (NAN, NAN)], 1.0),
    "not finite above": ([GOOD, (NAN, NAN), (-1.0, 0.1), (-1.0, 0.1)], 1.0),
}  # fmt: skip


def check_search() -> None:
    for given, found in SEARCHES.values():
        trials = Trials(*given)
        trial = LevenbergMarquardt().calibrate(trials)
        assert trial.damping == pytest.approx(found)
        assert trial == trials(trial.damping) or trial.ratio != trial.ratio
        asked = trials.asked[:-1]
        assert len(asked) == len(set(asked))
        assert len(asked) <= abs(round(math.log10(found))) + 3


def test_the_first_damping_predicts_well_or_reduces_more() -> None:
    check_search()


def test_the_search_stays_within_the_bounds() -> None:
    trials = Trials(GOOD)
    assert LevenbergMarquardt(bounds=(1e-2, 0.1)).calibrate(trials).damping == 1e-2
    assert max(trials.asked) == 0.1
    trials = Trials(BAD)
    assert LevenbergMarquardt(bounds=(1e-2, 20.0)).calibrate(trials).damping == 20.0
    assert max(trials.asked) == 20.0


def check_lowering() -> None:
    rule = LevenbergMarquardt()
    for given, found in [
        ([GOOD], 1.0),  # to be predicted well is not enough
        ([GOOD, GOOD, (-1.0, 0.9), (-1.06, -1.0), (-1.07, 1.0)], 0.1),
        ([GOOD, GOOD, GOOD, BAD, (-2.0, 0.1)], 1.0),
        ([GOOD, GOOD, BAD, *[(-1.1 - i / 10, 0.1) for i in range(5)]], 1e-3),
        ([GOOD, GOOD, (1.0, -1.0), (0.5, -1.0)], 1.0),
    ]:
        assert rule.lowered(1.0, Trials(*given)).damping == pytest.approx(found)
    assert rule.lowered(1e-3, Trials(GOOD, GOOD, BAD)).damping == 1e-3
    assert rule.lowered(2e-4, Trials(GOOD, GOOD, BAD)).damping == 2e-4


def test_damping_is_lowered_to_where_it_reduces_more() -> None:
    check_lowering()


def test_damping_is_looked_for_in_early_steps_unless_it_is_given() -> None:
    sought = [step for step in range(100) if LevenbergMarquardt().is_sought(step)]
    assert sought == [0, 1, 3, 7, 15]
    assert not any(LevenbergMarquardt(initial=1.0).is_sought(step) for step in range(100))


def test_ratio_of_reductions() -> None:
    assert reduction_ratio(-3.0, -2.0) == 1.5
    assert reduction_ratio(1.0, -2.0) == -0.5
    assert math.isnan(reduction_ratio(-1.0, 0.0))
    assert math.isnan(reduction_ratio(1.0, 2.0))
    assert math.isnan(reduction_ratio(NAN, -1.0))


@pytest.mark.parametrize(
    ("mutant", "test"),
    [
        (
            lambda original, self, damping, ratio, step: (
                damping**2 / original(self, damping, ratio, step)
            ),
            check_rule,
        ),
        (
            lambda original, self, damping, ratio, step: (
                damping if ratio != ratio else original(self, damping, ratio, step)
            ),
            check_rule,
        ),
        (
            lambda original, self, damping, ratio, step: (
                damping * (original(self, damping, ratio, step) / damping) ** (1 / self.period)
            ),
            check_rule,
        ),
    ],
    ids=["inverted", "NaN keeps the damping", "decay without its period"],
)
def test_mutants_of_the_rule_are_caught(mutant: Any, test: Any, monkeypatch: Any) -> None:
    replace(LevenbergMarquardt, "adapted", mutant)(monkeypatch)
    with pytest.raises(AssertionError):
        test()


@pytest.mark.parametrize(
    ("owner", "name", "mutant", "test"),
    [
        (
            LevenbergMarquardt, "calibrate",
            lambda original, self, trial_at: trial_at(original(self, trial_at).damping / 10),
            check_search,
        ),
        (
            Trial, "improves_on",
            lambda original, self, other: self.change < other.change, check_search,
        ),
        (Trial, "improves_on", lambda original, self, other: False, check_search),
        (
            LevenbergMarquardt, "_descend",
            lambda original, self, trial, trial_at, by_prediction: original(
                self, trial, trial_at, by_prediction=True
            ),
            check_lowering,
        ),
    ],
    ids=["one too low", "any reduction", "prediction only", "lowered by prediction"],
)  # fmt: skip
def test_mutants_of_the_search_are_caught(
    owner: Any, name: str, mutant: Any, test: Any, monkeypatch: Any
) -> None:
    replace(owner, name, mutant)(monkeypatch)
    with pytest.raises(AssertionError):
        test()
