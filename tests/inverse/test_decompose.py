"""Decompositions survive bad matrices, and say which they could not do."""

import pytest
import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError

from kfac import KFAC, Cholesky
from kfac.inverse import cholesky
from kfac.inverse.decompose import Routine, eigenbasis, inverse_by_cholesky, robustly

EYE = torch.eye(3, dtype=torch.float64)


def positive_definite(count: int) -> Tensor:
    factor = torch.randn(count, 3, 5, dtype=torch.float64)
    return factor @ factor.mT + EYE


def test_inverses_and_eigenbases_against_the_dense_ones() -> None:
    matrices = positive_definite(4)
    (inverse,), failed = robustly(inverse_by_cholesky, matrices)
    assert not failed.any()
    torch.testing.assert_close(inverse, torch.linalg.inv(matrices))
    (values, vectors), failed = robustly(eigenbasis, matrices)
    assert not failed.any()
    torch.testing.assert_close(vectors @ values.diag_embed() @ vectors.mT, matrices)


def test_a_library_that_cannot_invert_the_whole_stack_is_asked_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cholesky_ex = torch.linalg.cholesky_ex

    def picky(matrices: Tensor) -> tuple[Tensor, Tensor]:
        if matrices.dim() == 3 or matrices[0, 0] == 7:
            raise RuntimeError("CUSOLVER_STATUS_INTERNAL_ERROR")
        return cholesky_ex(matrices)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", picky)
    matrices = positive_definite(2)
    matrices[1, 0, 0] = 7
    (inverse,), failed = inverse_by_cholesky(matrices)
    assert failed.tolist() == [False, True]
    torch.testing.assert_close(inverse[0], torch.linalg.inv(matrices[0]))


@pytest.mark.parametrize("at", [(1, 1), (0, 1)], ids=["on the diagonal", "beside it"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("routine", [inverse_by_cholesky, eigenbasis])
def test_a_matrix_that_is_not_finite_is_flagged(
    routine: Routine, bad: float, at: tuple[int, int]
) -> None:
    matrices = positive_definite(2)
    matrices[1][at] = matrices[1].mT[at] = bad
    _, failed = robustly(routine, matrices)
    assert failed.tolist() == [False, True]


def test_eigenvalues_are_those_of_the_matrix_but_not_negative() -> None:
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    small = torch.tensor([-0.5, 1e-3, 0.25], dtype=torch.float64)
    (values, vectors), failed = eigenbasis((basis * small @ basis.mT)[None])
    assert not failed.any()
    torch.testing.assert_close(values[0], small.clamp(min=0))
    torch.testing.assert_close(vectors[0].abs(), basis.abs())


def test_leading_axes_are_kept() -> None:
    matrices = positive_definite(6).view(2, 3, 3, 3)
    (values, vectors), failed = robustly(eigenbasis, matrices)
    assert (values.shape, vectors.shape, failed.shape) == ((2, 3, 3), (2, 3, 3, 3), (2, 3))


@pytest.mark.parametrize("routine", [inverse_by_cholesky, eigenbasis])
def test_a_hopeless_matrix_is_flagged_and_its_neighbours_are_done(routine: Routine) -> None:
    matrices = positive_definite(3)
    matrices[1] = float("nan")
    results, failed = robustly(routine, matrices)
    assert failed.tolist() == [False, True, False]
    assert all(result[[0, 2]].isfinite().all() for result in results)


def test_a_singular_matrix_is_inverted_with_jitter() -> None:
    singular = torch.ones(1, 3, 3, dtype=torch.float32)
    singular[0, 0, 0] -= 1e-7
    (inverse,), failed = robustly(inverse_by_cholesky, singular)
    assert not failed.any()
    assert inverse.isfinite().all()


@pytest.mark.promise("a decomposition that fails")
@pytest.mark.parametrize("needed", [1, 2, 3])
def test_remedies_are_tried_in_order_of_cost_on_what_failed_only(needed: int) -> None:
    """Jitter of the mean eigenvalue's rounding, in float64 as well, and ten times as much there."""
    bad = torch.diag(torch.tensor([3.0, 0.0, 0.0]))
    stack = torch.stack([torch.eye(3), bad, 2 * torch.eye(3)])
    tried: list[Tensor] = []

    def stubborn(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        tried.append(matrices)
        failed = torch.tensor([False, True, False]) if len(tried) == 1 else torch.tensor([True])
        return (7 * matrices,), failed if len(tried) <= needed else torch.zeros(1, dtype=torch.bool)

    (result,), failed = robustly(stubborn, stack)
    assert not failed.any()
    jitter = torch.finfo(torch.float32).eps * 3 * (3.0 / 3)
    dtypes = [torch.float32, torch.float64, torch.float64]
    amounts = [jitter, jitter, 10 * jitter]
    assert torch.equal(tried[0], stack)
    assert len(tried) == 1 + needed
    for attempt, dtype, amount in zip(tried[1:], dtypes, amounts, strict=False):
        assert attempt.dtype == dtype
        assert attempt[0].diagonal()[1:].tolist() == pytest.approx([amount, amount])
        assert attempt[0, 0, 0].item() == pytest.approx(3.0, rel=1e-5)
        assert attempt[0].count_nonzero() == 3
    assert torch.equal(result[[0, 2]], 7 * stack[[0, 2]])
    assert torch.equal(result[1], (7 * tried[-1][0]).float())


def test_a_matrix_without_a_remedy_is_reported() -> None:
    tried = []

    def hopeless(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        tried.append(matrices.dtype)
        return (matrices,), torch.ones(len(matrices), dtype=torch.bool)

    _, failed = robustly(hopeless, torch.eye(3).unsqueeze(0))
    assert tried == [torch.float32, torch.float32, torch.float64, torch.float64]
    assert failed.tolist() == [True]


@pytest.mark.parametrize("error", [LinAlgError, RuntimeError, torch.OutOfMemoryError])
def test_a_library_that_raises_for_the_whole_stack_is_asked_one_by_one(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    eigh = torch.linalg.eigh

    def picky(matrices: Tensor) -> tuple[Tensor, Tensor]:
        if matrices.dim() == 3 or matrices[0, 0] == 7:
            raise error("cannot")
        return eigh(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", picky)
    matrices = positive_definite(2)
    matrices[1, 0, 0] = 7
    (values, vectors), failed = eigenbasis(matrices)
    assert failed.tolist() == [False, True]
    torch.testing.assert_close(vectors[0] @ values[0].diag() @ vectors[0].mT, matrices[0])


def failing(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    count = len(matrices)
    return (torch.full_like(matrices, float("nan")),), torch.ones(count, dtype=torch.bool)


def train_step(model: nn.Module, optimizer: KFAC) -> None:
    optimizer.zero_grad()
    model(torch.randn(6, 3)).square().mean().backward()
    optimizer.step()


def test_a_failed_refresh_keeps_the_last_good_inverse_and_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(3, 2)
    optimizer = KFAC(
        model, lr=0.1, damping=1e-3, inverse=Cholesky(max_consecutive_failures=3),
        factor_update_period=1, inverse_update_period=1,
    )  # fmt: skip
    train_step(model, optimizer)
    good = optimizer.state_dict()["kfac"]["layers"][""]["inverse"]
    monkeypatch.setattr(cholesky, "inverse_by_cholesky", failing)
    for count in (1, 2):
        train_step(model, optimizer)
        assert optimizer.diagnostics()["failed_refreshes"] == count
    kept = optimizer.state_dict()["kfac"]["layers"][""]["inverse"]
    assert all(torch.equal(good[key], kept[key]) for key in good)
    before = model.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"layer ''.*A 4×4, G 2×2.*3 times.*damping 0\.001"):
        train_step(model, optimizer)
    assert torch.equal(before, model.weight)
