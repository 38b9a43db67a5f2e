"""Newton-Schulz inverts damped factors like a decomposition, by matrix products only."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from mutants import Replacement, replace
from torch import Tensor, nn

import kfac.inverse.newton_schulz as newton_schulz
from kfac import KFAC, Cholesky, NewtonSchulz
from kfac.factors import BlockShape
from kfac.inverse.factored import FactoredDamping

LAMBDA = 1e-4
ON_BOTH = math.sqrt(LAMBDA)  # what λ adds to A and to G where their mean eigenvalues are equal


def spectrum_with(condition: float, size: int, rank: int | None) -> Tensor:
    """Eigenvalues of a factor whose damped form has this condition number."""
    largest = ON_BOTH * (condition - 1)
    values = torch.logspace(0, -math.log10(condition), size, dtype=torch.float64) * largest
    values[-1 if rank is None else rank :] = 0
    return values


def factors_with(
    condition: float, size: int = 12, count: int = 1, rank: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """A and G with the same spectrum, so that π = 1, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, count, 1, size, size)
    q = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q
    a, g = q @ spectrum_with(condition, size, rank).diag() @ q.mT
    return {"A": (a + a.mT) / 2, "G": (g + g.mT) / 2}


def moved(factors: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Factors some steps later: every quadratic form has changed by that share at most."""
    generator = torch.Generator().manual_seed(7)
    result = {}
    for name, factor in factors.items():
        noise = torch.randn(factor.shape, generator=generator, dtype=factor.dtype)
        noise = (noise + noise.mT) / 2
        noise *= share / torch.linalg.matrix_norm(noise, 2)[..., None, None]
        values, vectors = torch.linalg.eigh(factor)
        root = vectors @ values.clamp(min=0).sqrt().diag_embed() @ vectors.mT
        result[name] = factor + root @ noise @ root
    return result


def shape_of(factors: dict[str, Tensor]) -> BlockShape:
    kinds = {3: "diagonal", 4: "dense"}
    return BlockShape(
        next(iter(factors.values())).shape[1],
        *(factors[name].shape[-1] if name in factors else 3 for name in ("A", "G")),
        *(kinds[factors[name].dim()] if name in factors else "identity" for name in ("A", "G")),
    )


def zeros(strategy: FactoredDamping, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state before the first refresh."""
    like = next(iter(factors.values()))
    shapes = strategy.state_shapes(shape_of(factors))
    return {key: like.new_zeros(len(like), *shape) for key, shape in shapes.items()}


def refresh(
    factors: dict[str, Tensor],
    previous: dict[str, Tensor] | None = None,
    strategy: FactoredDamping | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    strategy = strategy or NewtonSchulz()
    first = next(iter(factors.values()))
    damping = first.new_full((len(first),), LAMBDA)
    previous = previous or zeros(strategy, factors)
    return strategy.refresh(shape_of(factors), factors, damping, previous)


def cast(factors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: factor.to(dtype) for name, factor in factors.items()}


def solved(factors: dict[str, Tensor], name: str) -> Tensor:
    """The inverses of a damped factor by LU in float64, one after the other."""
    factor, other = factors[name].double(), factors["G" if name == "A" else "A"].double()
    eye = torch.eye(factor.shape[-1], dtype=torch.float64)
    inverses = torch.empty_like(factor)
    for layer, mine in enumerate(factor[:, 0]):
        ratio = mine.trace() / other[layer, 0].trace()  # of equal sizes, so of the means too
        inverses[layer, 0] = torch.linalg.inv(mine + (ratio * LAMBDA).sqrt() * eye)
    return inverses


def distance(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


class Products:
    """Counts the iterations of a refresh, one entry for each factor that was iterated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        replace(newton_schulz, "_iterate", self.iterate)(monkeypatch)

    def iterate(self, original: Any, x: Tensor, r: Tensor, bound: Tensor, limit: int) -> Tensor:
        result = original(x, r, bound, limit)
        # The fewest iterations that give the same result are all that were made.
        self.counts.append(
            next(n for n in range(limit + 1) if torch.equal(original(x, r, bound, n), result))
        )
        return result


def only_by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a matrix was decomposed")

    monkeypatch.setattr(newton_schulz, "robustly", refuse)


# --- the inverse -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("size", [2, 12, 150])
@pytest.mark.parametrize(
    ("dtype", "condition", "tolerance"),
    [
        (torch.float64, 2, 1e-12),
        (torch.float64, 1e4, 1e-11),
        (torch.float64, 1e8, 1e-7),
        # The condition number times the rounding that damping a factor in float32 comes with.
        (torch.float32, 2, 1e-6),
        (torch.float32, 1e4, 2e-3),
        (torch.float32, 1e5, 2e-2),
    ],
)
def test_ill_conditioned_factors_are_inverted_by_products(
    dtype: torch.dtype,
    condition: float,
    tolerance: float,
    size: int,
    rank: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only_by_products(monkeypatch)
    factors = cast(factors_with(condition, size, rank=rank), dtype)
    state, failed = refresh(factors)
    assert not failed.any()
    for name in ("A", "G"):
        assert distance(state[f"{name}_inverse"], solved(factors, name)) < tolerance


def test_what_is_too_ill_conditioned_is_decomposed() -> None:
    for condition in (1e5, 1e7, 1e9):
        factors = cast(factors_with(condition, 60, rank=5), torch.float32)
        state, failed = refresh(factors)
        by_cholesky, _ = refresh(factors, strategy=Cholesky())
        assert not failed.any()
        assert torch.equal(state["A_inverse"], by_cholesky["A_inverse"]) == (condition > 1e5)


def check_one_matrix_does_not_depend_on_its_neighbours() -> None:
    conditions = (1e3, 1e7, 5.0)
    each = [factors_with(c, seed=i) for i, c in enumerate(conditions)]
    together = {name: torch.cat([f[name] for f in each]) for name in ("A", "G")}
    state, failed = refresh(together)
    assert not failed.any()
    for i, factors in enumerate(each):
        assert distance(state["A_inverse"][i], solved(factors, "A")[0]) < 1e-8
        alone, _ = refresh(factors)
        torch.testing.assert_close(
            state["A_inverse"][i], alone["A_inverse"][0], rtol=1e-9, atol=1e-12
        )


def test_one_matrix_does_not_depend_on_its_neighbours() -> None:
    check_one_matrix_does_not_depend_on_its_neighbours()


def test_diagonal_and_identity_factors() -> None:
    diagonal = torch.rand(2, 3, 5, dtype=torch.float64)
    dense = factors_with(1e3, 4)["A"].expand(2, 3, 4, 4)
    for factors in ({"A": diagonal, "G": dense}, {"A": dense}, {"G": diagonal}):
        state, failed = refresh(factors)
        expected, _ = refresh(factors, strategy=Cholesky())
        assert not failed.any()
        for key, inverse in expected.items():
            torch.testing.assert_close(state[key], inverse, rtol=1e-9, atol=1e-9)
        assert state.keys() - expected.keys() == {
            f"{name}_residual" for name, factor in factors.items() if factor.dim() == 4
        }


def test_a_limit_to_the_iterations_leaves_the_rest_to_cholesky(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    factors = factors_with(1e6)
    by_cholesky, _ = refresh(factors, strategy=Cholesky())
    state, failed = refresh(factors, strategy=NewtonSchulz(max_iterations=3))
    assert not failed.any()
    assert torch.equal(state["A_inverse"], by_cholesky["A_inverse"])
    assert not state["A_residual"].any()  # it is no start for the next refresh
    assert (refresh(factors)[0]["A_residual"] > 0).all()
    products = Products(monkeypatch)
    refresh(factors, strategy=NewtonSchulz(max_iterations=3))
    assert products.counts == [3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_of_a_norm_allows_for_rounding(dtype: torch.dtype) -> None:
    eye = torch.eye(64, dtype=dtype)
    ones = torch.ones(64, 64, dtype=dtype)  # one direction, so trace and norms are equal
    expected = torch.tensor([1.0, 64.0], dtype=dtype) * (1 + 64 * torch.finfo(dtype).eps)
    assert torch.equal(newton_schulz.norm_bound(torch.stack([eye, ones])), expected)
    wide = torch.randn(3, 5, 9, dtype=dtype)
    bounds = newton_schulz.norm_bound(wide @ wide.mT)
    assert (bounds >= torch.linalg.matrix_norm(wide @ wide.mT, 2)).all()


def test_every_block_has_a_residual_and_diagonals_have_none() -> None:
    block = BlockShape(2, 7, 5, "block-diagonal", "diagonal", a_block=3)
    assert NewtonSchulz().state_shapes(block) == {
        "A_inverse": (2, 3, 3, 3), "A_residual": (2, 3), "G_inverse": (2, 5),
    }  # fmt: skip
    dense = NewtonSchulz().state_shapes(BlockShape(2, 7, 5))
    assert (dense["A_residual"], dense["G_residual"]) == ((2, 1), (2, 1))


# --- from the last inverse -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_good_start_saves_iterations_and_gives_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_by_products(monkeypatch)
    products = Products(monkeypatch)
    factors = factors_with(1e4)
    last, _ = refresh(cast(factors, dtype))
    later = cast(moved(factors, 0.02), dtype)
    products.counts.clear()
    state, failed = refresh(later, last)
    warm = products.counts.copy()
    cold, _ = refresh(later)
    assert not failed.any()
    assert max(warm) <= 5 < 8 <= min(products.counts[2:])
    assert distance(last["A_inverse"], solved(later, "A")) > 1e-3
    tolerance = 5e-4 if dtype == torch.float32 else 1e-10
    assert distance(state["A_inverse"], solved(later, "A")) < tolerance
    assert distance(state["A_inverse"], cold["A_inverse"].double()) < tolerance / 10


def bad_starts(factors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    good, _ = refresh(factors)
    changed = [
        {"inverse": good["A_inverse"] * 3},
        {"inverse": -good["A_inverse"]},
        {"inverse": torch.full_like(good["A_inverse"], float("nan"))},
        {"inverse": torch.full_like(good["A_inverse"], float("inf"))},
        {"residual": torch.full_like(good["A_residual"], float("nan"))},
        {"inverse": torch.zeros_like(good["A_inverse"])},
    ]
    return [good | {f"A_{k}": t for k, t in change.items()} for change in changed]


def check_a_bad_start_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    only_by_products(monkeypatch)
    factors = factors_with(1e4)
    cold, _ = refresh(factors)
    for start in bad_starts(factors):
        state, failed = refresh(factors, start)
        assert not failed.any()
        assert torch.equal(state["A_inverse"], cold["A_inverse"])


def test_a_bad_start_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    check_a_bad_start_is_ignored(monkeypatch)


@pytest.mark.parametrize(
    ("dtype", "condition"), [(torch.float32, c) for c in (10, 1e5, 1e6, 1e7)] + [(None, 1e8)]
)
def test_the_same_factors_give_the_same_inverse_bit_for_bit(
    dtype: torch.dtype | None, condition: float
) -> None:
    factors = cast(factors_with(condition, 40), dtype or torch.float64)
    first, _ = refresh(factors)
    second, _ = refresh(factors, first)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_starts_do_not_drift_over_many_refreshes() -> None:
    factors = factors_with(1e5, 30)
    state, _ = refresh(cast(factors, torch.float32))
    for _ in range(30):
        factors = moved(factors, 0.01)
        state, failed = refresh(cast(factors, torch.float32), state)
        assert not failed.any()
    assert distance(state["G_inverse"], solved(cast(factors, torch.float32), "G")) < 5e-3


# --- failures --------------------------------------------------------------------------------


def test_a_hopeless_factor_is_flagged_and_its_neighbours_are_done() -> None:
    factors = factors_with(1e3, count=3)
    expected, _ = refresh(factors)
    factors["G"] = factors["G"].clone()
    factors["G"][1, 0, 2, 2] = float("nan")
    state, failed = refresh(factors)
    assert failed.tolist() == [False, True, False]
    for i in (0, 2):
        torch.testing.assert_close(state["G_inverse"][i], expected["G_inverse"][i])


def test_an_indefinite_factor_is_flagged() -> None:
    factors = factors_with(1e3)
    factors["A"] = factors["A"] - torch.eye(12, dtype=torch.float64)
    _, failed = refresh(factors)
    assert failed.all()


def failing(matrices: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    count = len(matrices)
    return (torch.full_like(matrices, float("nan")),), torch.ones(count, dtype=torch.bool)


def test_a_failed_refresh_keeps_the_last_good_inverse_and_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = KFAC(
        model, lr=0.1, inverse="newton-schulz", factor_update_period=1, inverse_update_period=1
    )

    def train_step() -> dict[str, Tensor]:
        optimizer.zero_grad()
        model(torch.randn(6, 3)).square().mean().backward()
        optimizer.step()
        return optimizer.state_dict()["kfac"]["layers"][""]["inverse"]

    good = {key: tensor.clone() for key, tensor in train_step().items()}
    with monkeypatch.context() as patch:
        patch.setattr(newton_schulz, "_iterate", lambda x, r, bound, limit: x * float("nan"))
        patch.setattr(newton_schulz, "inverse_by_cholesky", failing)
        kept = train_step()
        assert all(torch.equal(good[key], kept[key]) for key in good)
        assert optimizer.diagnostics()["failed_refreshes"] == 1
    assert not torch.equal(good["A_inverse"], train_step()["A_inverse"])
    assert optimizer.diagnostics()["failed_refreshes"] == 1


# --- mutants ---------------------------------------------------------------------------------


def unbounded(original: Any, matrices: Tensor) -> Tensor:
    return torch.ones_like(original(matrices))


def one_iteration(original: Any, x: Tensor, r: Tensor, bound: Tensor, limit: int) -> Tensor:
    return original(x, r, bound, 1)


def in_the_wrong_order(original: Any, x: Tensor, r: Tensor, bound: Tensor, limit: int) -> Tensor:
    return original(x, r, bound, limit).roll(1, 0)


def as_if_all_were_the_first(
    original: Any, x: Tensor, r: Tensor, bound: Tensor, limit: int
) -> Tensor:
    return original(x, r, bound[:1].expand(len(bound)), limit)


def whatever_the_start(
    original: Any, matrices: Tensor, amount: Tensor, last: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, _, bound = original(matrices, amount, torch.zeros_like(last), torch.zeros_like(residual))
    return last, newton_schulz._residual(matrices, last), bound


def kept_if_near(
    original: Any, matrices: Tensor, amount: Tensor, last: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return original(matrices, amount, last, residual + 3)


def check_by_products(condition: float, monkeypatch: pytest.MonkeyPatch) -> None:
    test_ill_conditioned_factors_are_inverted_by_products(
        torch.float64, condition, 1e-7, 12, None, monkeypatch
    )


MUTANTS: dict[str, tuple[str, Replacement, Callable[[pytest.MonkeyPatch], None]]] = {
    "M not scaled by its norm": ("norm_bound", unbounded, partial(check_by_products, 1e4)),
    "one iteration only": ("_iterate", one_iteration, partial(check_by_products, 1e4)),
    "matrices come back in another order": (
        "_iterate", in_the_wrong_order,
        lambda _: check_one_matrix_does_not_depend_on_its_neighbours(),
    ),
    "as many iterations for all as for the first": (
        "_iterate", as_if_all_were_the_first,
        lambda _: check_one_matrix_does_not_depend_on_its_neighbours(),
    ),
    "the last inverse is the start although it is bad": (
        "_start", whatever_the_start, check_a_bad_start_is_ignored,
    ),
    "a stale inverse is kept": (
        "_start", kept_if_near,
        partial(test_a_good_start_saves_iterations_and_gives_the_same, torch.float64),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "mutant", "check"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(
    name: str,
    mutant: Replacement,
    check: Callable[[pytest.MonkeyPatch], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace(newton_schulz, name, mutant)(monkeypatch)
    with pytest.raises(AssertionError):
        check(monkeypatch)


def test_mutant_refreshed_twice_is_not_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the residual of the last refresh, a resumed run would differ in its last digits."""

    def never_kept(
        original: Any, matrices: Tensor, amount: Tensor, last: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return original(matrices, amount, last, residual * 1e-3)

    replace(newton_schulz, "_start", never_kept)(monkeypatch)
    with pytest.raises(AssertionError):
        test_the_same_factors_give_the_same_inverse_bit_for_bit(torch.float32, 1e5)
