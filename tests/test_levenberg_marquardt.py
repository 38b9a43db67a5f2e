"""Damping that follows the ratio of actual and predicted reduction."""

import math
from typing import Any

import pytest
from mutants import replace

from kfac.levenberg_marquardt import LevenbergMarquardt, reduction_ratio

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


def check_search() -> None:
    rule = LevenbergMarquardt(bounds=(1e-4, 1e4))
    for threshold, found in [(0.03, 0.1), (20.0, 100.0), (1e-9, 1e-3), (1e9, 1e4), (1.0, 1.0)]:
        asked: list[float] = []

        def ratio_at(
            damping: float, threshold: float = threshold, asked: list[float] = asked
        ) -> float:
            asked.append(damping)
            return 1.0 if damping >= threshold else NAN

        assert rule.calibrate(ratio_at) == pytest.approx(found)
        assert len(asked) == len(set(asked))
        assert len(asked) <= abs(round(math.log10(found))) + 2


def test_the_first_damping_is_the_smallest_that_predicts_well() -> None:
    check_search()


def test_the_search_does_not_step_over_a_failure() -> None:
    rule = LevenbergMarquardt()
    ratios = {1.0: 0.9, 0.1: 0.1, 0.01: 0.9, 10.0: 1.0}
    assert rule.calibrate(lambda damping: ratios[round(damping, 6)]) == 1.0


def test_the_search_begins_within_the_bounds() -> None:
    asked: list[float] = []
    rule = LevenbergMarquardt(bounds=(1e-3, 0.1))
    assert rule.calibrate(lambda damping: asked.append(damping) or 1.0) == 1e-3
    assert max(asked) == 0.1


def test_ratio_of_reductions() -> None:
    assert reduction_ratio(-3.0, -2.0) == 1.5
    assert reduction_ratio(1.0, -2.0) == -0.5
    assert math.isnan(reduction_ratio(-1.0, 0.0))
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


def test_a_mutant_that_calibrates_one_step_too_low_is_caught(monkeypatch: Any) -> None:
    too_low = lambda original, self, ratio_at: original(self, ratio_at) / 10  # noqa: E731
    replace(LevenbergMarquardt, "calibrate", too_low)(monkeypatch)
    with pytest.raises(AssertionError):
        check_search()
