"""Buckets: which layers share one, and which statistics enter the averages."""

import pytest
import torch
from torch import Tensor

from kfac.factors import BlockShape, Bucket, fill_buckets

CPU, YES, ONE = torch.device("cpu"), torch.tensor(True), torch.ones(())
SMALL, LARGE = BlockShape(1, 2, 3), BlockShape(2, 4, 3)


def bucket(*names: str) -> Bucket:
    return Bucket(list(names), SMALL, torch.float64, CPU)


def feed(target: Bucket, index: int, a: float, g: float, rows: int = 1) -> None:
    target.accumulate(index, "A", torch.full((1, 2, 2), a, dtype=torch.float64), rows)
    target.accumulate(index, "G", torch.full((1, 3, 3), g, dtype=torch.float64))


def fold(target: Bucket, decay: float, g_scale: Tensor, accept: Tensor) -> Tensor:
    return target.fold(target.normalize(g_scale), decay, accept)


def values(target: Bucket, index: int) -> tuple[float, float]:
    return target.factors["A"][index].mean().item(), target.factors["G"][index].mean().item()


def test_layers_of_one_shape_dtype_and_device_share_a_bucket() -> None:
    double, single = torch.float64, torch.float32
    buckets = fill_buckets(
        ["a", "b", "c", "d"], [SMALL, LARGE, SMALL, SMALL], [double, double, double, single],
        [CPU] * 4,
    )  # fmt: skip
    assert [b.names for b in buckets] == [["a", "c"], ["b"], ["d"]]
    assert buckets[1].factors["A"].shape == (1, 2, 4, 4)


@pytest.mark.parametrize(
    ("a_kind", "g_kind", "shapes"),
    [
        ("dense", "dense", {"A": (2, 4, 4), "G": (2, 3, 3)}),
        ("diagonal", "dense", {"A": (2, 4), "G": (2, 3, 3)}),
        ("dense", "identity", {"A": (2, 4, 4)}),
    ],
)
def test_kinds_of_factors_decide_what_is_stored(a_kind, g_kind, shapes) -> None:
    assert BlockShape(2, 4, 3, a_kind, g_kind).factor_shapes() == shapes


def test_a_is_divided_by_its_rows_and_g_by_the_given_scale() -> None:
    target = bucket("a")
    feed(target, 0, 6.0, 1.0, rows=2)
    feed(target, 0, 6.0, 1.0, rows=1)
    fold(target, 0.9, torch.tensor(0.5), YES)
    assert values(target, 0) == (4.0, 1.0)


def test_a_layer_without_statistics_keeps_its_average_and_its_weight() -> None:
    target = bucket("a", "b")
    feed(target, 0, 1.0, 1.0)
    feed(target, 1, 1.0, 1.0)
    fold(target, 0.5, ONE, YES)
    feed(target, 0, 4.0, 4.0)
    fold(target, 0.5, ONE, YES)
    assert values(target, 0) == (3.0, 3.0)  # (0.5·1 + 4)/1.5
    assert values(target, 1) == (1.0, 1.0)
    assert target.weight.tolist() == [1.5, 1.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["A", "G"])
@pytest.mark.parametrize("at", [(1, 1), (0, 1)], ids=["on the diagonal", "beside it"])
def test_statistics_that_are_not_finite_are_dropped_for_their_layer_only(
    bad: float, factor: str, at: tuple[int, int]
) -> None:
    target = bucket("a", "b")
    for index in (0, 1):
        feed(target, index, 1.0, 1.0)
    spoilt = torch.zeros_like(target.pending[factor][0])
    spoilt[0][at] = bad
    target.accumulate(0, factor, spoilt)
    dropped = fold(target, 0.5, ONE, YES)
    assert dropped.tolist() == [True, False]
    assert (values(target, 0), values(target, 1)) == ((0.0, 0.0), (1.0, 1.0))
    feed(target, 0, 2.0, 2.0)
    fold(target, 0.5, ONE, YES)
    assert values(target, 0) == (2.0, 2.0)


def test_a_rejected_batch_is_forgotten() -> None:
    target = bucket("a")
    feed(target, 0, 1.0, 1.0)
    assert fold(target, 0.5, ONE, torch.tensor(False)).tolist() == [True]
    assert target.weight.item() == 0
    assert not any(pending.any() for pending in target.pending.values())


def test_discarded_statistics_leave_no_trace() -> None:
    target = bucket("a")
    feed(target, 0, float("nan"), 1.0)
    target.discard()
    feed(target, 0, 1.0, 1.0)
    fold(target, 0.5, ONE, YES)
    assert values(target, 0) == (1.0, 1.0)


def average(decays: list[float], updates: list[float]) -> Tensor:
    target = bucket("a")
    for decay, update in zip(decays, updates, strict=True):
        feed(target, 0, update, update)
        fold(target, decay, ONE, YES)
    return target.factors["A"].mean()


def test_the_average_is_exact_for_a_decay_that_changes() -> None:
    # w: 1, 1.9, 1.95;  v: 1, (0.9·1 + 2)/1.9, (0.5·1.9·v + 5)/1.95
    second = (0.9 * 1 + 2) / 1.9
    expected = (0.5 * 1.9 * second + 5) / 1.95
    assert average([0.7, 0.9, 0.5], [1.0, 2.0, 5.0]).item() == pytest.approx(expected)
