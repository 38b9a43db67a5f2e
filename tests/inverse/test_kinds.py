"""Strategies on factors of every kind and several groups, against dense solves in float64."""

from itertools import product

import pytest
import torch
from torch import Tensor

from kfac.factors import BlockShape
from kfac.inverse import Cholesky, Eigen, Inverse, NewtonSchulz, merge

LAYERS, GROUPS, D_IN, D_OUT = 2, 3, 5, 4
DAMPING = torch.tensor([0.01, 0.3], dtype=torch.float64)
KINDS = {"dense": 0, "diagonal": 1, "block-diagonal": 2, "identity": 0}
STRATEGIES: dict[str, Inverse] = {
    "cholesky": Cholesky(),
    "newton-schulz": NewtonSchulz(),
    "eigen": Eigen(),
    "warm eigen": Eigen(warm_start=True),
}
PAIRS = [pair for pair in product(KINDS, repeat=2) if pair != ("identity", "identity")]


def dense(kind: str, rows: int) -> Tensor:
    """What a factor of this kind stands for, ``[layers, groups, rows, rows]``."""
    if kind == "identity":
        return torch.eye(rows, dtype=torch.float64).expand(LAYERS, GROUPS, rows, rows)
    x = torch.randn(LAYERS, GROUPS, rows, 2 * rows, dtype=torch.float64)
    size = KINDS[kind] or rows
    kept = torch.tensor([[i // size == j // size for j in range(rows)] for i in range(rows)])
    return (x @ x.mT) * kept


def stored(matrix: Tensor, kind: str) -> Tensor:
    if kind == "dense":
        return matrix
    if kind == "diagonal":
        return matrix.diagonal(dim1=2, dim2=3).clone()
    size, rows = KINDS[kind], matrix.shape[-1]
    blocks = matrix.new_zeros(LAYERS, GROUPS, -(-rows // size), size, size)
    for i, j in product(range(rows), repeat=2):
        if i // size == j // size:
            blocks[:, :, i // size, i % size, j % size] = matrix[:, :, i, j]
    return blocks


def problem(kinds: tuple[str, str]) -> tuple[BlockShape, dict[str, Tensor], Tensor, Tensor]:
    """A block, its factors as they are kept, and A and G themselves."""
    blocks = [KINDS[kind] if kind == "block-diagonal" else 0 for kind in kinds]
    block = BlockShape(GROUPS, D_IN, D_OUT, *kinds, *blocks)  # type: ignore[arg-type]
    a, g = dense(kinds[0], D_IN), dense(kinds[1], D_OUT)
    kept = {"A": (a, kinds[0]), "G": (g, kinds[1])}
    factors = {n: stored(m, kind) for n, (m, kind) in kept.items() if kind != "identity"}
    return block, factors, a, g


def before_the_first(strategy: Inverse, block: BlockShape) -> dict[str, Tensor]:
    shapes = strategy.state_shapes(block)
    return {key: DAMPING.new_zeros(LAYERS, *shape) for key, shape in shapes.items()}


def damped(a: Tensor, g: Tensor, damping: Tensor, kinds: tuple[str, str], exact: bool) -> Tensor:
    """The damped block of one layer and group, G ⊗ A."""
    eye_a, eye_g = torch.eye(D_IN).double(), torch.eye(D_OUT).double()
    if exact:
        return torch.kron(g, a) + damping * torch.kron(eye_g, eye_a)
    if "identity" in kinds:
        on_a, on_g = (damping, 0.0) if kinds[1] == "identity" else (0.0, damping)
    else:
        pi = ((a.trace() / D_IN) / (g.trace() / D_OUT)).sqrt()
        on_a, on_g = pi * damping.sqrt(), damping.sqrt() / pi
    return torch.kron(g + on_g * eye_g, a + on_a * eye_a)


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_kind_of_factors_is_inverted(name: str, kinds: tuple[str, str]) -> None:
    strategy = STRATEGIES[name]
    block, factors, a, g = problem(kinds)
    state, failed = strategy.refresh(block, factors, DAMPING, before_the_first(strategy, block))
    assert not failed.any()
    assert {key: tensor.shape[1:] for key, tensor in state.items()} == strategy.state_shapes(block)
    gradient = torch.randn(LAYERS, GROUPS, D_OUT, D_IN, dtype=torch.float64)
    step = strategy.precondition(state, gradient, DAMPING)
    exact = isinstance(strategy, Eigen)
    for i, j in product(range(LAYERS), range(GROUPS)):
        matrix = damped(a[i, j], g[i, j], DAMPING[i], kinds, exact)
        expected = torch.linalg.solve(matrix, gradient[i, j].flatten()).view(D_OUT, D_IN)
        torch.testing.assert_close(step[i, j], expected, rtol=1e-8, atol=1e-10)
    assert strategy.staleness(block, factors, DAMPING, state).max() < 1e-10


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@pytest.mark.parametrize("name", STRATEGIES)
def test_staleness_is_that_of_the_layer_that_moved(name: str, kinds: tuple[str, str]) -> None:
    strategy = STRATEGIES[name]
    block, factors, _, _ = problem(kinds)
    state, _ = strategy.refresh(block, factors, DAMPING, before_the_first(strategy, block))
    for factor in factors:
        moved = {key: tensor.clone() for key, tensor in factors.items()}
        moved[factor][1, 2] *= 1.5  # in one group
        fresh, stale = strategy.staleness(block, moved, DAMPING, state).tolist()
        assert fresh < 1e-10
        assert 0.05 < stale < 1.0


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_padding_of_the_last_block_stays_zero(name: str) -> None:
    strategy = STRATEGIES[name]
    block, factors, _, _ = problem(("block-diagonal", "dense"))
    state, _ = strategy.refresh(block, factors, DAMPING, before_the_first(strategy, block))
    for key, tensor in state.items():
        if tensor.shape[1:] == block.factor_shapes()["A"]:
            assert not tensor[:, :, -1, 1:].any(), key
            assert not tensor[:, :, -1, :, 1:].any(), key


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *product(STRATEGIES, [float("nan"), float("inf")]),
        ("cholesky", -100.0),
        ("newton-schulz", -100.0),
    ],
)
def test_one_bad_element_of_a_diagonal_fails_its_layer(name: str, bad: float) -> None:
    strategy = STRATEGIES[name]
    block, factors, _, _ = problem(("diagonal", "dense"))
    factors["A"][1, 0, 3] = bad
    _, failed = strategy.refresh(block, factors, DAMPING, before_the_first(strategy, block))
    assert failed.tolist() == [False, True]


@pytest.mark.parametrize("warm_start", [False, True])
def test_a_diagonal_below_zero_by_rounding_is_no_eigenvalue(warm_start: bool) -> None:
    strategy = Eigen(warm_start=warm_start)
    block, factors, _, _ = problem(("diagonal", "dense"))
    factors["A"][1, 0, 3] = -1e-9
    state, failed = strategy.refresh(block, factors, DAMPING, before_the_first(strategy, block))
    assert not failed.any()
    assert torch.equal(state["A_eigenvalues"], factors["A"].clamp(min=0))
    assert factors["A"][1, 0, 3] == -1e-9


def test_a_factor_of_zero_leaves_the_damping() -> None:
    strategy = Eigen(warm_start=True)
    block, factors, _, _ = problem(("dense", "dense"))
    factors["G"] = torch.zeros_like(factors["G"])
    state, failed = strategy.refresh(block, factors, DAMPING, before_the_first(strategy, block))
    assert not failed.any()
    assert strategy.staleness(block, factors, DAMPING, state).max() < 1e-10
    again, _ = strategy.refresh(block, factors, DAMPING, state)
    assert all(torch.equal(state[key], again[key]) for key in state)
    gradient = torch.randn(LAYERS, GROUPS, D_OUT, D_IN, dtype=torch.float64)
    step = strategy.precondition(state, gradient, DAMPING)
    torch.testing.assert_close(step, gradient / DAMPING.view(-1, 1, 1, 1))


def test_merging_keeps_the_state_of_some_layers() -> None:
    shapes = {"a": (4, 2, 3, 3), "b": (4,), "c": (4, 2)}
    old = {key: torch.randn(shape) for key, shape in shapes.items()}
    new = {key: torch.randn(3, *shape[1:]) for key, shape in shapes.items()}
    before = {key: tensor.clone() for key, tensor in old.items()}
    merge(old, new, torch.tensor([False, True, False]), [3, 1, 0])
    for key in shapes:
        assert torch.equal(old[key][3], new[key][0])
        assert torch.equal(old[key][1], before[key][1])
        assert torch.equal(old[key][0], new[key][2])
        assert torch.equal(old[key][2], before[key][2])
