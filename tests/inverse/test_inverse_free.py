"""A root of the inverse follows the factors by matrix products, in any precision."""

from collections.abc import Callable
from functools import partial
from typing import Any

import oracles
import pytest
import test_exactness as exactness
import torch
from mutants import Replacement, replace
from test_newton_schulz import LAMBDA, cast, distance, factors_with, moved, shape_of, solved
from torch import Tensor, nn

import kfac.inverse.inverse_free as inverse_free
from kfac import KFAC, Cholesky, InverseFree
from kfac.factors import BlockShape
from kfac.inverse import Inverse

LONG = InverseFree(iterations=60)
State = dict[str, Tensor]


def zeros(strategy: Inverse, block: BlockShape, like: Tensor) -> State:
    shapes = strategy.state_shapes(block)
    return {key: like.new_zeros(len(like), *shape) for key, shape in shapes.items()}


def refresh(
    factors: State,
    last: State | None = None,
    strategy: Inverse | None = None,
    block: BlockShape | None = None,
    damping: float = LAMBDA,
) -> tuple[State, Tensor]:
    strategy, block = strategy or InverseFree(), block or shape_of(factors)
    first = next(iter(factors.values()))
    last = last or zeros(strategy, block, first)
    return strategy.refresh(block, factors, first.new_full((len(first),), damping), last)


def check_exact(condition: float = 1e3, size: int = 12, rank: int | None = None) -> None:
    factors = factors_with(condition, size, rank=rank)
    state, failed = refresh(factors, strategy=LONG)
    assert not failed.any()
    for name in ("A", "G"):
        assert distance(state[f"{name}_inverse"], solved(factors, name)) < 1e-8


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("a matrix was decomposed")


# --- where the factors stay ------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("size", [2, 12, 150])
@pytest.mark.parametrize("condition", [2, 1e4, 1e7])
def test_many_updates_converge_to_the_dense_solve(
    condition: float, size: int, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        for name in ("cholesky", "cholesky_ex", "eigh", "qr", "svd", "inv", "solve"):
            if name not in {"qr", "inv"}:  # which the problem and its solution are made with
                patch.setattr(torch.linalg, name, refuse)
        check_exact(condition, size, rank)


@pytest.mark.parametrize("name", ["classifier", "language model", "convolution, groups"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_a_step_is_the_solve_with_explicit_factors(name: str, fisher: str) -> None:
    problem = exactness.build(exactness.GENERAL, name)
    found = exactness.movement(problem, inverse=LONG, fisher=fisher)
    for layer_name, gradient in exactness.gradient_blocks(problem).items():
        layer = exactness.observe(problem, layer_name)
        a = oracles.input_factor(layer, problem.sharing)
        g = exactness.output_factor(problem, layer, fisher)
        forward_only = fisher == "forward-only"
        solve = oracles.solve_exact_damping if forward_only else oracles.solve_factored_damping
        exactness.close(found[layer_name], -solve(a, g, exactness.PLAIN["damping"], gradient))


def blocks_of(dense: Tensor, size: int) -> Tensor:
    """Blocks on the diagonal ``[layers, groups, blocks, size, size]``, the last filled up."""
    count = -(-dense.shape[-1] // size)
    blocks = dense.new_zeros(*dense.shape[:2], count, size, size)
    for index in range(count):
        rows = slice(index * size, min((index + 1) * size, dense.shape[-1]))
        width = rows.stop - rows.start
        blocks[:, :, index, :width, :width] = dense[..., rows, rows]
    return blocks


def check_factors_of_every_kind() -> None:
    diagonal = torch.rand(2, 3, 5, dtype=torch.float64)
    dense = factors_with(1e3, 10)["A"].expand(2, 3, 10, 10)
    for factors, block in (
        ({"A": diagonal, "G": dense}, BlockShape(3, 5, 10, a_kind="diagonal")),
        ({"A": dense}, BlockShape(3, 10, 5, g_kind="identity")),
        ({"G": diagonal}, BlockShape(3, 7, 5, a_kind="identity", g_kind="diagonal")),
        (
            {"A": blocks_of(dense, 4), "G": dense},
            BlockShape(3, 10, 10, a_kind="block-diagonal", a_block=4),
        ),
    ):
        state, failed = refresh(factors, strategy=LONG, block=block)
        expected, _ = refresh(factors, strategy=Cholesky(), block=block)
        assert not failed.any()
        for key, inverse in expected.items():
            torch.testing.assert_close(state[key], inverse, rtol=1e-8, atol=1e-8)
        later, _ = refresh(factors, state, LONG, block)
        assert all(torch.equal(later[key], tensor) for key, tensor in state.items())


def test_factors_of_every_kind() -> None:
    check_factors_of_every_kind()


def check_an_update() -> None:
    """On eigenvalues h of KᵀMK an update is h (1 − β/2 (h − 1))²."""
    generator = torch.Generator().manual_seed(0)
    m = factors_with(10, 9)["A"][:, 0] + 0.1 * torch.eye(9, dtype=torch.float64)
    k = torch.randn(1, 9, 9, generator=generator, dtype=torch.float64)
    k *= (1.5 / torch.linalg.matrix_norm(k.mT @ m @ k, 2)).sqrt()
    for step_size in (1.0, 0.3):
        h = torch.linalg.eigvalsh(k.mT @ m @ k)
        found = inverse_free._updated(k, k.mT @ m @ k, step_size)
        expected = (h * (1 - step_size / 2 * (h - 1)) ** 2).sort().values
        torch.testing.assert_close(torch.linalg.eigvalsh(found.mT @ m @ found), expected)


def test_what_an_update_does_to_eigenvalues() -> None:
    check_an_update()


def test_one_update_is_that_of_the_paper_where_the_last_inverse_was_exact() -> None:
    """K (I − β₁ m), m = ½ (Kᵀ U K + δ Kᵀ K − I), for an average that has moved by β₁ (U − A)."""
    share, delta = 0.05, 0.1
    a, u = (factors_with(10, 9, seed=seed)["A"][0, 0] for seed in (0, 1))
    eye = torch.eye(9, dtype=torch.float64)
    k = torch.linalg.cholesky(torch.linalg.inv(a + delta * eye))
    m = (k.T @ u @ k + delta * k.T @ k - eye) / 2
    new = (1 - share) * a + share * u + delta * eye
    found = inverse_free._updated(k[None], (k.T @ new @ k)[None], 1.0)[0]
    torch.testing.assert_close(found, k @ (eye - share * m), rtol=1e-12, atol=1e-12)


# --- where they move -------------------------------------------------------------------------


def check_following(strategy: Inverse, dtype: torch.dtype, limit: float) -> None:
    """The largest error of A's inverse over 20 refreshes, 3% of movement before each."""
    factors = factors_with(1e3, 24)
    state, _ = refresh(cast(factors, dtype), strategy=LONG)
    for _ in range(20):
        factors = moved(factors, 0.03)
        state, failed = refresh(cast(factors, dtype), state, strategy)
        assert not failed.any()
        assert distance(state["A_inverse"], solved(factors, "A")) < limit


@pytest.mark.parametrize(
    ("iterations", "dtype", "limit"),
    [
        (1, torch.float64, 2e-3),  # of the order of 0.03²
        (2, torch.float64, 1e-5),
        (5, torch.float64, 1e-9),
        (5, torch.float32, 1e-4),
    ],
)
def test_the_inverse_follows_factors_that_move(
    iterations: int, dtype: torch.dtype, limit: float
) -> None:
    check_following(InverseFree(iterations=iterations), dtype, limit)


def check_jumps() -> None:
    """Whatever the factors do in between, the error falls to nothing within a few refreshes."""
    factors = cast(factors_with(1e3, 24), torch.float32)
    state, _ = refresh(factors)
    for scale in (1e3, 1e-6, 30.0, 1 / 30, 1.0):
        later = {name: factor * scale for name, factor in factors.items()}
        for i in range(6):
            nudged = {name: factor * (1 + 1e-4 * i) for name, factor in later.items()}
            state, failed = refresh(nudged, state)
            assert not failed.any()
        assert distance(state["A_inverse"], solved(nudged, "A")) < 2e-2


def test_jumps_of_the_factors_are_survived() -> None:
    check_jumps()


def check_bad_starts() -> None:
    factors = factors_with(1e2)
    cold, _ = refresh(factors)
    for value in (float("nan"), float("inf"), 1e8):
        bad = cold | {
            "A_root": torch.full_like(cold["A_root"], value),
            "A_sketch": torch.zeros_like(cold["A_sketch"]),
        }
        state, failed = refresh(factors, bad)
        assert not failed.any()
        torch.testing.assert_close(state["A_inverse"], cold["A_inverse"])


def test_a_bad_start_is_ignored() -> None:
    check_bad_starts()


# --- low precision ---------------------------------------------------------------------------


def check_bfloat16(condition: float, limit: float) -> None:
    """Forty refreshes of moving factors, all in bfloat16."""
    factors, state = factors_with(condition, 40), None
    for _ in range(40):
        factors = moved(factors, 0.1)
        state, failed = refresh(cast(factors, torch.bfloat16), state)
        assert not failed.any()
        inverse = state["A_inverse"].double()[0, 0]
        assert torch.linalg.eigvalsh(inverse).min() > -0.01 * inverse.norm()  # rounding of K Kᵀ
        assert distance(inverse, solved(factors, "A")[0, 0]) < limit


@pytest.mark.parametrize(
    ("condition", "limit"), [(2, 0.1), (10, 0.3), (1e2, 1.0), (1e4, 1.01), (1e6, 1.01), (1e8, 1.01)]
)
def test_in_bfloat16_it_stays_finite_and_near(condition: float, limit: float) -> None:
    check_bfloat16(condition, limit)


def check_the_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 20, 200):
        directions = torch.randn(50, size, 1, generator=generator, dtype=torch.float64)
        single = directions @ directions.mT
        flat = torch.eye(size, dtype=torch.float64).expand(50, size, size)
        for matrices in (single, flat, 1e30 * (single + flat)):
            ratio = inverse_free.norm_estimate(matrices) / torch.linalg.matrix_norm(matrices, 2)
            assert ratio.min() > 0.6
            assert ratio.max() < 1.3 * size ** (1 / 8)


def test_the_norm_is_estimated() -> None:
    check_the_norm()


# --- stacks, failures, resuming --------------------------------------------------------------


def test_one_matrix_does_not_depend_on_its_neighbours() -> None:
    each = [factors_with(c, seed=i) for i, c in enumerate((1e2, 1e5, 5.0))]
    together = {name: torch.cat([f[name] for f in each]) for name in ("A", "G")}
    expected, _ = refresh(together)
    for i, factors in enumerate(each):
        alone, _ = refresh(factors)
        torch.testing.assert_close(alone["A_inverse"][0], expected["A_inverse"][i])
    together["G"][1, 0, 2, 2] = float("nan")
    state, failed = refresh(together)
    assert failed.tolist() == [False, True, False]
    for i in (0, 2):
        torch.testing.assert_close(state["G_inverse"][i], expected["G_inverse"][i])


def check_the_same_factors(dtype: torch.dtype) -> None:
    factors = cast(factors_with(1e4, 40, count=3), dtype)
    first, _ = refresh(factors)
    second, _ = refresh(factors, first)
    assert all(torch.equal(first[key], second[key]) for key in first)
    for i in range(3):  # refreshed on its own, a product may round differently
        mine = {name: factor[i : i + 1] for name, factor in factors.items()}
        last = {key: tensor[i : i + 1] for key, tensor in first.items()}
        alone, _ = refresh(mine, last)
        assert all(torch.equal(alone[key], last[key]) for key in last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_factors_leave_the_inverse_as_it_is_bit_for_bit(dtype: torch.dtype) -> None:
    check_the_same_factors(dtype)


def test_a_factor_that_has_changed_off_its_diagonal_only_is_not_the_same() -> None:
    factors = factors_with(1e2)
    first, _ = refresh(factors)
    flipped = factors["A"].clone()
    flipped[..., 0, 1:] *= -1
    flipped[..., 1:, 0] *= -1
    state, _ = refresh(factors | {"A": flipped}, first, LONG)
    assert distance(state["A_inverse"], solved(factors | {"A": flipped}, "A")) < 1e-8


def check_a_new_damping() -> None:
    """That of a factor beside which it is nearly lost in rounding."""
    factors = cast(factors_with(1e7, 12), torch.float32)
    first, _ = refresh(factors)
    for damping in (0.5 * LAMBDA, 2 * LAMBDA):
        state, _ = refresh(factors, first, damping=damping)
        assert not torch.equal(state["A_inverse"], first["A_inverse"])


def test_a_new_damping_is_noticed() -> None:
    check_a_new_damping()


def test_a_failed_refresh_keeps_the_last_good_inverse_and_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(3, 2)
    optimizer = KFAC(
        model, lr=0.1, inverse="inverse-free", factor_update_period=1, inverse_update_period=1
    )

    def train_step() -> State:
        optimizer.zero_grad()
        model(torch.randn(6, 3)).square().mean().backward()
        optimizer.step()
        return optimizer.state_dict()["kfac"]["layers"][""]["inverse"]

    good = {key: tensor.clone() for key, tensor in train_step().items()}
    with monkeypatch.context() as patch:
        patch.setattr(inverse_free, "_updated", lambda k, h, step: k * float("nan"))
        kept = train_step()
        assert all(torch.equal(good[key], kept[key]) for key in good)
        assert optimizer.diagnostics()["failed_refreshes"] == 1
    assert not torch.equal(good["A_inverse"], train_step()["A_inverse"])
    assert optimizer.diagnostics()["failed_refreshes"] == 1


def test_damping_waits_for_a_refresh() -> None:
    assert not InverseFree().damping_is_live


# --- mutants ---------------------------------------------------------------------------------


def upwards(original: Any, root: Tensor, whitened: Tensor, step_size: float) -> Tensor:
    return 2 * root - original(root, whitened, step_size)


def twice_the_step(original: Any, root: Tensor, whitened: Tensor, step_size: float) -> Tensor:
    return 2 * original(root, whitened, step_size) - root


def from_the_left(original: Any, root: Tensor, whitened: Tensor, step_size: float) -> Tensor:
    eye = torch.eye(root.shape[-1], dtype=root.dtype).expand_as(root)
    return original(eye, whitened, step_size) @ root


def turned_around(original: Any, left: Tensor, right: Tensor) -> Tensor:
    is_inverse = left.data_ptr() == right.data_ptr()
    return original(right, left) if is_inverse else original(left, right)


def only_the_diagonal(original: Any, matrices: Tensor, amount: Tensor) -> Tensor:
    return original(matrices.diagonal(dim1=-2, dim2=-1).diag_embed(), amount)


def no_damping(original: Any, matrices: Tensor, amount: Tensor) -> Tensor:
    return original(matrices, torch.zeros_like(amount))


def no_estimate(original: Any, matrices: Tensor) -> Tensor:
    return torch.ones_like(original(matrices))


def always_warm(original: Any, matrices: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    root, whitened = original(matrices, last)
    is_first = (last == 0).all()
    return (root, whitened) if is_first else (last, inverse_free.in_basis(matrices, last))


def always_cold(original: Any, matrices: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    return original(matrices, torch.zeros_like(last))


MUTANTS: dict[str, tuple[str, Replacement, Callable[[], None]]] = {
    "a step in the other direction": ("_updated", upwards, check_exact),
    "½ forgotten": ("_updated", twice_the_step, check_an_update),
    "K updated from the left": (
        "_updated", from_the_left,
        partial(check_following, InverseFree(), torch.float64, 1e-9),
    ),
    "KᵀK instead of KKᵀ": (
        "_product", turned_around,
        partial(check_following, InverseFree(), torch.float64, 1e-9),
    ),
    "the norm taken for 1": ("norm_estimate", no_estimate, check_jumps),
    "powers without a root": (
        "norm_estimate", lambda original, m: original(m) ** 4, check_the_norm,
    ),
    "always from the last K": ("_start", always_warm, check_bad_starts),
    "always from the identity": (
        "_start", always_cold, partial(check_following, InverseFree(), torch.float64, 1e-9),
    ),
    "damping lost in rounding": (
        "_representable", lambda original, m, amount: m, partial(check_bfloat16, 1e4, 1.01),
    ),
    "the same factors are inverted again": (
        "_same", lambda original, s, last: original(s, -last),
        partial(check_the_same_factors, torch.float32),
    ),
    "a factor is recognised by its trace": (
        "_sketch", only_the_diagonal,
        test_a_factor_that_has_changed_off_its_diagonal_only_is_not_the_same,
    ),
    "a factor is recognised without its damping": ("_sketch", no_damping, check_a_new_damping),
    "an inverse is never refreshed": (
        "_same", lambda original, s, last: last.abs().sum(1) > 0,
        partial(check_following, InverseFree(), torch.float64, 1e-9),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "mutant", "check"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(
    name: str, mutant: Replacement, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    replace(inverse_free, name, mutant)(monkeypatch)
    with pytest.raises(AssertionError):
        check()
