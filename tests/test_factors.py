"""Buckets: which layers share one, and which statistics enter the averages."""

from itertools import product

import pytest
import torch
from torch import Tensor

from kfac.factors import BlockShape, Bucket, as_kind, fill_buckets, whole_blocks

CPU, YES, ONE = torch.device("cpu"), torch.tensor(True), torch.ones(())
SMALL, LARGE = BlockShape(1, 2, 3), BlockShape(2, 4, 3)


def bucket(*names: str) -> Bucket:
    return Bucket(list(names), SMALL, torch.float64, CPU)


def feed(target: Bucket, index: int, a: float, g: float, rows: int | Tensor = 1) -> None:
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
        ("identity", "block-diagonal", {"G": (2, 2, 2, 2)}),
    ],
)
def test_kinds_of_factors_decide_what_is_stored(a_kind, g_kind, shapes) -> None:
    assert BlockShape(2, 4, 3, a_kind, g_kind, g_block=2).factor_shapes() == shapes


def tensors_of(target: Bucket) -> list[Tensor]:
    return [target.weight, *target.factors.values(), *target.pending.values()]


def test_a_bucket_moves_and_is_converted_as_a_whole() -> None:
    target = bucket("a")
    feed(target, 0, 1.0, 1.0)
    before = tensors_of(target)
    target.to(CPU, torch.float64)
    assert all(one is other for one, other in zip(before, tensors_of(target), strict=True))
    target.to(CPU, torch.float32)
    assert target.dtype == torch.float32
    for one, other in zip(before, tensors_of(target), strict=True):
        assert torch.equal(one.float(), other)
    target.to(torch.device("meta"), torch.float32)
    assert target.device.type == "meta"
    assert all(tensor.device.type == "meta" for tensor in tensors_of(target))


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


@pytest.mark.parametrize("factor", ["A", "G", "S"])
def test_every_element_of_diagonals_and_second_moments_is_looked_at(factor: str) -> None:
    shape = BlockShape(2, 3, 4, "diagonal", "diagonal")
    size = Bucket(["a"], shape, torch.float64, CPU, True).pending[factor][0].numel()
    for at in range(size):
        target = Bucket(["a"], shape, torch.float64, CPU, with_second_moments=True)
        for name, pending in target.pending.items():
            target.accumulate(0, name, torch.ones_like(pending[0]), rows=1)
        target.pending[factor].view(-1)[at] = float("nan")
        assert fold(target, 0.5, ONE, YES).tolist() == [True]
        assert not any(average.any() for average in target.factors.values())


def test_every_diagonal_block_is_looked_at() -> None:
    for at in range(3):
        target = Bucket(["a"], BlockShape(1, 5, 1, "block-diagonal", a_block=2), torch.float64, CPU)
        target.accumulate(0, "A", torch.ones(1, 3, 2, 2, dtype=torch.float64), rows=1)
        target.pending["A"][0, 0, at, 0, 0] = float("inf")
        assert fold(target, 0.5, ONE, YES).tolist() == [True]


def test_numbers_of_rows_may_be_known_to_the_device_only() -> None:
    target = bucket("a", "b")
    feed(target, 0, 6.0, 1.0, rows=torch.tensor(3))
    feed(target, 1, 6.0, 1.0, rows=2)
    assert target.normalize(ONE).tolist() == [1.0, 1.0]
    assert [target.pending["A"][i].mean().item() for i in (0, 1)] == [2.0, 3.0]


def test_a_sum_of_several_processes_is_divided_by_their_number() -> None:
    target = bucket("a")
    feed(target, 0, 6.0, 4.0)
    target.fold(2 * target.normalize(ONE), 0.5, YES)
    assert values(target, 0) == (3.0, 2.0)
    assert target.weight.item() == 1.0


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


# Factors of one kind as another, with two groups of five rows

ROWS = 5
KINDS = {"dense": 0, "diagonal": 1, "blocks of 2": 2, "blocks of 3": 3, "blocks of 5": 5}


def stored(matrix: Tensor, kind: str) -> Tensor:
    """What a kind of factor keeps of matrices `[groups, rows, rows]`, element by element."""
    size = KINDS[kind]
    if size == 0:
        return matrix
    if size == 1:
        return torch.stack([m.diagonal() for m in matrix])
    blocks = torch.zeros(len(matrix), -(-ROWS // size), size, size, dtype=matrix.dtype)
    for i, j in product(range(ROWS), repeat=2):
        if i // size == j // size:
            blocks[:, i // size, i % size, j % size] = matrix[:, i, j]
    return blocks


def kept(kind: str) -> Tensor:
    """Which elements a kind of factor keeps."""
    ones, size = torch.ones(ROWS, ROWS, dtype=torch.float64), KINDS[kind] or ROWS
    return ones * torch.tensor([[i // size == j // size for j in range(ROWS)] for i in range(ROWS)])


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_a_factor_of_one_kind_is_read_as_another(source: str, target: str) -> None:
    matrix = torch.randn(2, ROWS, ROWS, dtype=torch.float64)
    like = stored(torch.full_like(matrix, 7.0), target).float()
    result = as_kind(stored(matrix, source), like)
    assert result.dtype == torch.float32
    assert torch.equal(result, stored(matrix * kept(source), target).float())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_blocks_are_seen_without_what_the_last_is_filled_up_with(size: int) -> None:
    count = -(-ROWS // size)
    factor = torch.randn(3, 2, count, size, size, dtype=torch.float64)
    parts = whole_blocks(factor, ROWS)
    blocks = [block for part in parts for block in part.unbind(2)]
    assert [block.shape[-1] for block in blocks] == [
        min(size, ROWS - size * i) for i in range(count)
    ]
    for i, block in enumerate(blocks):
        rows = block.shape[-1]
        assert torch.equal(block, factor[:, :, i, :rows, :rows])
        assert block.untyped_storage().data_ptr() == factor.untyped_storage().data_ptr()


def test_a_dense_factor_is_one_block() -> None:
    (part,) = whole_blocks(torch.zeros(3, 2, ROWS, ROWS), ROWS)
    assert part.shape == (3, 2, 1, ROWS, ROWS)
