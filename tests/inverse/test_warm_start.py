"""Eigendecompositions that start from the last ones: within their tolerance, or exact."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutants import Replacement, replace
from torch import Tensor, nn

import kfac.inverse.eigen as eigen
import kfac.inverse.rotations as rotations
from kfac import KFAC, Eigen, Ekfac
from kfac.factors import BlockShape
from kfac.inverse.rotations import follow, in_basis, misfit, tangents, turned

LAMBDA = 1e-2
SHAPE = BlockShape(1, 9, 6)
State = dict[str, Tensor]


def covariances(count: int, size: int, seed: int, rows: int = 40) -> Tensor:
    """Sample covariances ``[count, 1, size, size]`` with a spectrum that falls off."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, rows, size, generator=generator, dtype=torch.float64)
    x *= torch.arange(1, size + 1, dtype=torch.float64).pow(-0.7)
    return x.mT @ x / rows


def factors_of(count: int = 1, seed: int = 0) -> State:
    return {"A": covariances(count, 9, seed), "G": covariances(count, 6, seed + 100)}


def moved(factors: State, share: float, seed: int = 7) -> State:
    """A running average some batches later."""
    return {
        name: (1 - share) * factor + share * covariances(len(factor), factor.shape[-1], seed)
        for name, factor in factors.items()
    }


def refresh(
    factors: State,
    previous: State | None = None,
    strategy: Eigen | None = None,
    block: BlockShape = SHAPE,
    damping: float = LAMBDA,
) -> tuple[State, Tensor]:
    strategy = strategy or Eigen(warm_start=True)
    like = next(iter(factors.values()))
    if previous is None:
        shapes = strategy.state_shapes(block)
        previous = {key: like.new_zeros(len(like), *shapes[key]) for key in shapes}
    return strategy.refresh(block, factors, like.new_full((len(like),), damping), previous)


def damped_block(factors: State, layer: int) -> Tensor:
    dense = torch.kron(factors["G"][layer, 0], factors["A"][layer, 0])
    return dense + LAMBDA * torch.eye(len(dense), dtype=dense.dtype)


def errors(state: State, factors: State) -> list[float]:
    """Errors of preconditioned gradients relative to the dense solve, in the norm of F + λI."""
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(len(factors["A"]), 1, 6, 9, generator=generator, dtype=torch.float64)
    damping = torch.full((len(gradient),), LAMBDA, dtype=torch.float64)
    found = Eigen().precondition(state, gradient, damping)
    result = []
    for layer in range(len(gradient)):
        matrix = damped_block(factors, layer)
        exact = torch.linalg.solve(matrix, gradient[layer].flatten())
        off = found[layer].flatten() - exact
        result.append(float((off @ matrix @ off / (exact @ matrix @ exact)).sqrt()))
    return result


def bound(tolerance: float) -> float:
    epsilon = (9**0.5 + 6**0.5) * tolerance
    return epsilon / (1 - epsilon)


class Work:
    """Counts the matrices that are decomposed, and those that are rotated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.decomposed = self.rotated = 0
        replace(eigen, "eigenbasis", self.decompose)(monkeypatch)
        replace(rotations, "turned", self.rotate)(monkeypatch)

    def decompose(self, original: Replacement, matrices: Tensor) -> Any:
        self.decomposed += len(matrices)
        return original(matrices)

    def rotate(self, original: Replacement, vectors: Tensor, rotated: Tensor) -> Tensor:
        self.rotated += len(vectors)
        return original(vectors, rotated)


# --- within the tolerance --------------------------------------------------------------------


def check_unmoved(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float64) -> None:
    work = Work(monkeypatch)
    factors = {name: factor.to(dtype) for name, factor in factors_of(3).items()}
    first, _ = refresh(factors)
    assert work.decomposed == 6
    second, failed = refresh(factors, first)
    assert not failed.any()
    assert work.decomposed == 6
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    if dtype == torch.float64:
        assert max(errors(second, factors)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_that_have_not_moved_keep_their_exact_decomposition_bit_for_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_unmoved(monkeypatch, dtype)


def check_moved_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = Eigen(warm_start=True, tolerance=1e-3)
    factors = factors_of(3)
    later = moved(factors, 0.02)
    first, _ = refresh(factors, strategy=strategy)
    work = Work(monkeypatch)
    second, failed = refresh(later, first, strategy)
    assert not failed.any()
    assert work.decomposed == 0
    assert work.rotated >= 6
    assert min(errors(first, later)) > bound(1e-3)
    assert 1e-9 < max(errors(second, later)) < bound(1e-3)
    for name in ("A", "G"):
        q = second[f"{name}_eigenvectors"]
        torch.testing.assert_close(q.mT @ q, torch.eye(q.shape[-1]).to(q).expand_as(q))
    third, _ = refresh(later, second, strategy)
    assert all(torch.equal(third[key], second[key]) for key in third)


def test_factors_that_have_moved_a_little_are_followed_within_the_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_moved_a_little(monkeypatch)


def test_what_is_within_the_tolerance_is_kept() -> None:
    factors = factors_of()
    first, _ = refresh(factors, strategy=(strategy := Eigen(warm_start=True, tolerance=0.1)))
    later = moved(factors, 0.01)
    second, _ = refresh(later, first, strategy)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert 1e-4 < max(errors(second, later)) < bound(0.1)


def test_a_smaller_damping_asks_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = factors_of()
    first, _ = refresh(factors, damping=10.0)
    later = moved(factors, 0.05)
    work = Work(monkeypatch)
    kept, _ = refresh(later, first, damping=10.0)
    assert torch.equal(kept["A_eigenvectors"], first["A_eigenvectors"])
    assert work.rotated == 0
    refresh(later, first, damping=1e-3)
    assert work.rotated > 0


def test_following_does_not_wear_out_the_basis() -> None:
    factors = {name: factor.float() for name, factor in factors_of(2).items()}
    state, _ = refresh(factors)
    for step in range(40):
        factors = {n: f.float() for n, f in moved(factors, 0.03, seed=step).items()}
        state, failed = refresh(factors, state)
        assert not failed.any()
        q = state["A_eigenvectors"]
        assert float((q.mT @ q - torch.eye(9)).abs().max()) < 1e-5
    double = {name: factor.double() for name, factor in factors.items()}
    assert max(errors({k: t.double() for k, t in state.items()}, double)) < bound(0.02)


# --- exact -----------------------------------------------------------------------------------


def check_drifted(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = Eigen(warm_start=True, max_rotations=3)
    factors = factors_of(3)
    first, _ = refresh(factors, strategy=strategy)
    little, far = moved(factors, 0.02), {n: f.flip(-1, -2) for n, f in factors_of(3, 50).items()}
    later = {n: torch.stack([factors[n][0], little[n][1], far[n][2]]) for n in ("A", "G")}
    work = Work(monkeypatch)
    state, failed = refresh(later, first, strategy)
    assert not failed.any()
    assert work.decomposed == 2  # A and G of the last
    unmoved, followed, decomposed = errors(state, later)
    assert max(unmoved, decomposed) < 1e-12
    assert 1e-12 < followed < bound(0.02)
    assert state["A_is_start"].flatten().tolist() == [1, 1, 1]


def test_factors_that_have_drifted_are_decomposed_and_only_they(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_drifted(monkeypatch)


def test_what_rounding_alone_takes_beyond_the_tolerance_is_always_decomposed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strategy = Eigen(warm_start=True, tolerance=1e-9)
    factors = {name: factor.float() for name, factor in factors_of().items()}
    state, _ = refresh(factors, strategy=strategy)
    work = Work(monkeypatch)
    again, _ = refresh(factors, state, strategy)
    assert (work.decomposed, work.rotated) == (2, 0)
    assert all(torch.equal(state[key], again[key]) for key in state)


def test_a_hopeless_factor_is_flagged_and_its_neighbours_are_done() -> None:
    factors = factors_of(3)
    first, _ = refresh(factors)
    later = moved(factors, 0.02)
    later["G"][1, 0, 2, 2] = float("nan")
    state, failed = refresh(later, first)
    assert failed.tolist() == [False, True, False]
    later["G"][1] = factors["G"][1]
    found = errors(state, later)
    assert max(found[0], found[2]) < bound(0.02)


@pytest.mark.parametrize("kind", ["diagonal", "identity", "block-diagonal"])
def test_factors_of_every_kind_are_followed(kind: str) -> None:
    block = BlockShape(1, 9, 6, a_kind=kind, a_block=4 if kind == "block-diagonal" else 0)
    factors = factors_of(2)
    later = moved(factors, 0.02)
    for some in (factors, later):
        if kind == "identity":
            del some["A"]
        elif kind == "diagonal":
            some["A"] = some["A"].diagonal(dim1=-2, dim2=-1)
        else:
            blocks = some["A"].new_zeros(2, 1, 3, 4, 4)
            for index, rows in enumerate((4, 4, 1)):
                here = slice(4 * index, 4 * index + rows)
                blocks[:, :, index, :rows, :rows] = some["A"][..., here, here]
            some["A"] = blocks
    strategy = Eigen(warm_start=True, tolerance=1e-6)
    state, _ = refresh(factors, strategy=strategy, block=block)
    followed, failed = refresh(later, state, strategy, block)
    exact, _ = refresh(later, strategy=Eigen(), block=block)
    assert not failed.any()
    gradient = torch.randn(2, 1, 6, 9, generator=torch.Generator().manual_seed(0)).double()
    damping = torch.full((2,), LAMBDA, dtype=torch.float64)
    expected = strategy.precondition(exact, gradient, damping)
    close = torch.testing.assert_close
    close(strategy.precondition(followed, gradient, damping), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(strategy.precondition(state, gradient, damping), expected, rtol=1e-3)


def test_every_block_has_a_flag_and_diagonals_have_none() -> None:
    block = BlockShape(2, 7, 5, "block-diagonal", "diagonal", a_block=3)
    plain = {"A_eigenvalues": (2, 7), "A_eigenvectors": (2, 3, 3, 3), "G_eigenvalues": (2, 5)}
    assert Eigen().state_shapes(block) == plain
    assert Eigen(warm_start=True).state_shapes(block) == plain | {"A_is_start": (2, 3)}


# --- the rotations ---------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", [[[2.0, 0.5], [0.5, 1.0]], [[1.0, 0.5], [0.5, 1.0]]])
def test_one_pair_takes_one_rotation(matrix: list[list[float]]) -> None:
    """Equal diagonal elements too, where the angle is 45 degrees."""
    a, eye = torch.tensor([matrix]).double(), torch.eye(2).double()[None]
    rotated = in_basis(a, turned(eye, a))
    assert float(rotated[0, 0, 1].abs()) < 1e-15
    assert float(tangents(a).abs().max()) <= 1


def test_a_diagonal_matrix_is_left_alone() -> None:
    eye = torch.eye(3).double()[None]
    assert torch.equal(turned(eye, 2 * eye), eye)


def test_the_misfit_is_that_of_its_formula() -> None:
    rotated = torch.randn(2, 4, 4, dtype=torch.float64)
    rotated = rotated + rotated.mT
    values, floor = torch.rand(2, 4, dtype=torch.float64), torch.tensor([0.1, 0.5]).double()
    for i, found in enumerate(rotations.misfit(rotated, values, floor)):
        roots = torch.diag((values[i] + floor[i]) ** -0.5)
        expected = torch.linalg.matrix_norm(roots @ (rotated[i] - values[i].diag()) @ roots) / 2
        torch.testing.assert_close(found, expected)


def test_rotations_square_the_error_where_eigenvalues_are_apart() -> None:
    noise = torch.randn(1, 5, 5, generator=torch.Generator().manual_seed(0)).double()
    a = torch.arange(1.0, 6).double().diag_embed()[None] + 1e-3 * (noise + noise.mT)
    q = torch.eye(5).double()[None]
    found = []
    for _ in range(3):
        b = in_basis(a, q)
        found.append(float(misfit(b, b.diagonal(dim1=1, dim2=2), torch.ones(1).double())))
        q = turned(q, b)
    assert found[1] < 10 * found[0] ** 2
    assert found[2] < 10 * found[1] ** 2


def test_the_limit_to_the_rotations_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    a = covariances(1, 9, 0)[0]
    values, vectors = torch.linalg.eigh(a)
    floor, later = torch.tensor([LAMBDA]).double(), 0.9 * a + 0.1 * covariances(1, 9, 1)[0]
    assert not follow(later, values.clone(), vectors.clone(), floor, 1e-8, 1).any()
    assert work.rotated == 1
    assert follow(later, values.clone(), vectors.clone(), floor, 1e-8, 20).all()


# --- in training -----------------------------------------------------------------------------


def train(inverse: Eigen, steps: int = 8) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    criterion = nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, lr=0.1, criterion=criterion, damping=0.1, inverse=inverse,
        factor_update_period=1, inverse_update_period=2, stagger_refreshes=False,
    )  # fmt: skip
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(torch.randn(64, 5).double()), torch.randint(0, 3, (64,))).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", [Eigen, Ekfac])
def test_training_is_the_same_from_either_start(
    kind: type[Eigen], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small tolerance; for EKFAC the second moments move with the rotated basis."""
    cold = train(kind())
    work = Work(monkeypatch)
    warm = train(kind(warm_start=True, tolerance=1e-9, max_rotations=30))
    assert work.rotated > 0
    for mine, theirs in zip(warm, cold, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("warm_start", value) for value in (1, None, "yes")),
        *(("tolerance", value) for value in (0.0, -1e-3, float("nan"), None)),
        *(("max_rotations", value) for value in (0, -1, 1.5, True, None)),
    ],
)
@pytest.mark.parametrize("kind", [Eigen, Ekfac])
def test_the_settings_are_checked(kind: type[Eigen], setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}\({setting}=\.\.\.\) must be"):
        kind(**{setting: value})


# --- mutants ---------------------------------------------------------------------------------


def not_orthogonal(original: Any, vectors: Tensor, rotated: Tensor) -> Tensor:
    return vectors + vectors @ tangents(rotated)


MUTANTS: dict[str, tuple[str, Replacement, Callable[[pytest.MonkeyPatch], None]]] = {
    "never kept": ("misfit", lambda original, *a: original(*a) + 1, check_unmoved),
    "kept whatever it is": ("misfit", lambda original, *a: original(*a) * 0, check_moved_a_little),
    "what has drifted is accepted": (
        "misfit", lambda original, *a: original(*a) * 1e-3, check_drifted,
    ),
    "rotated the wrong way": ("tangents", lambda original, b: -original(b), check_moved_a_little),
    "not made orthogonal again": ("turned", not_orthogonal, check_moved_a_little),
    "Qᵀ where Q belongs": (
        "in_basis", lambda original, a, q: original(a, q.mT), check_moved_a_little,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "mutant", "check"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(
    name: str,
    mutant: Replacement,
    check: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace(rotations, name, mutant)(monkeypatch)
    with pytest.raises(AssertionError):
        check(monkeypatch)


def test_mutant_the_flags_of_other_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(eigen, "follow", lambda original, *a: original(*a).roll(1))(monkeypatch)
    with pytest.raises(AssertionError):
        check_drifted(monkeypatch)
