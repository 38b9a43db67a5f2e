"""Refreshes that are skipped: how wrong the last inverse has become is measured, not guessed."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutants import Replacement, replace
from torch import Tensor, nn

import kfac.inverse.eigen as eigen
import kfac.inverse.factored as factored
from kfac import KFAC, Cholesky, Eigen, Ekfac, InverseFree, NewtonSchulz, Preconditioner
from kfac.factors import BlockShape
from kfac.inverse import Inverse

LAMBDA = 1e-2
STRATEGIES: list[Inverse] = [
    Cholesky(), Eigen(), Eigen(warm_start=True), Ekfac(), NewtonSchulz(),
    InverseFree(iterations=40),
]  # fmt: skip
STRATEGY = pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: repr(s)[:30])
State = dict[str, Tensor]


def covariances(size: int, groups: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, groups, 30, size, generator=generator, dtype=torch.float64)
    return x.mT @ x / 30


def factors_of(kind: str, seed: int = 0) -> tuple[BlockShape, State]:
    """Two layers of two groups each, with an A of that kind."""
    block = BlockShape(2, 10, 6, a_kind=kind, a_block=4 if kind == "block-diagonal" else 0)
    a = covariances(10, 2, seed)
    if kind == "diagonal":
        a = a.diagonal(dim1=-2, dim2=-1)
    if kind == "block-diagonal":
        blocks = a.new_zeros(2, 2, 3, 4, 4)
        for index, rows in enumerate((4, 4, 2)):
            here = slice(4 * index, 4 * index + rows)
            blocks[:, :, index, :rows, :rows] = a[..., here, here]
        a = blocks
    factors = {"G": covariances(6, 2, seed + 1)}
    return block, factors if kind == "identity" else {"A": a} | factors


def vector(damping: float) -> Tensor:
    return torch.full((2,), damping, dtype=torch.float64)


def state_of(strategy: Inverse, block: BlockShape, factors: State) -> State:
    shapes = strategy.state_shapes(block)
    previous = {key: torch.zeros(2, *shapes[key], dtype=torch.float64) for key in shapes}
    state, failed = strategy.refresh(block, factors, vector(LAMBDA), previous)
    assert not failed.any()
    return state


def staleness(
    strategy: Inverse, block: BlockShape, factors: State, state: State, damping: float = LAMBDA
) -> list[float]:
    return strategy.staleness(block, factors, vector(damping), state).tolist()


# --- the measure -----------------------------------------------------------------------------


@STRATEGY
@pytest.mark.parametrize("kind", ["dense", "block-diagonal", "diagonal", "identity"])
def test_a_fresh_inverse_is_not_stale_and_a_moved_factor_of_any_kind_is_seen(
    strategy: Inverse, kind: str
) -> None:
    block, factors = factors_of(kind)
    state = state_of(strategy, block, factors)
    assert max(staleness(strategy, block, factors, state)) < 1e-9
    for name in factors:
        later = copy.deepcopy(factors)
        later[name][1, 0] = later[name][1, 0] * 1.5
        unmoved, moved = staleness(strategy, block, later, state)
        assert moved > 0.05
        # The damping of a factor depends on the other one, but layers stay apart.
        assert unmoved < 1e-9


def relative_error(factor: Tensor, inverse: Tensor, amount: float) -> float:
    """‖M X − I‖/√d, written out."""
    eye = torch.eye(len(factor), dtype=torch.float64)
    return float(((factor + amount * eye) @ inverse - eye).norm() / len(factor) ** 0.5)


def test_it_estimates_the_error_of_the_inverse() -> None:
    """Of each strategy, to within a factor of two; for A here, because G has not moved."""
    block, factors = factors_of("dense")
    later = factors | {"A": 0.9 * factors["A"] + 0.1 * covariances(10, 2, 20)}
    for strategy in (Cholesky(), Eigen()):
        state = state_of(strategy, block, factors)
        exact = []
        for layer in range(2):
            errors = []
            for group in range(2):
                a, g = later["A"][layer, group], later["G"][layer, group]
                if isinstance(strategy, Eigen):
                    amount = LAMBDA / float(g.norm())
                    q = state["A_eigenvectors"][layer, group]
                    values = state["A_eigenvalues"][layer, group]
                    inverse = q @ (1 / (values + amount)).diag() @ q.T
                else:
                    amount = math.sqrt(LAMBDA * float(a.trace() / 10 / (g.trace() / 6)))
                    inverse = state["A_inverse"][layer, group]
                errors.append(relative_error(a, inverse, amount))
            exact.append(max(errors))
        for found, expected in zip(staleness(strategy, block, later, state), exact, strict=True):
            assert expected / 2 < found < expected * 2


def check_a_single_direction() -> None:
    block, factors = factors_of("dense")
    state = state_of(Cholesky(), block, factors)
    for seed in range(200):
        u = torch.randn(10, generator=torch.Generator().manual_seed(seed)).double()
        u *= 1.0 if seed else torch.arange(10).eq(9)  # a coordinate as well
        u /= u.norm()
        moved = factors["A"] + torch.outer(u, u) * u.new_ones(2, 2, 1, 1)
        found = min(staleness(Cholesky(), block, factors | {"A": moved}, state))
        assert found > 0.05


def test_a_single_direction_that_has_moved_is_not_missed() -> None:
    check_a_single_direction()


def check_a_new_damping() -> None:
    block, factors = factors_of("dense")
    state = state_of(Cholesky(), block, factors)
    assert min(staleness(Cholesky(), block, factors, state, 10 * LAMBDA)) > 0.1
    # Where damping takes effect at once there is nothing to refresh.
    state = state_of(Eigen(), block, factors)
    assert max(staleness(Eigen(), block, factors, state, 10 * LAMBDA)) < 1e-12


def test_a_new_damping_makes_an_inverse_stale_where_it_waits_for_a_refresh() -> None:
    check_a_new_damping()


def check_either_group() -> None:
    block, factors = factors_of("dense")
    state = state_of(Cholesky(), block, factors)
    for group in range(2):
        later = copy.deepcopy(factors)
        later["A"][:, group] *= 2
        assert min(staleness(Cholesky(), block, later, state)) > 0.1


def test_one_stale_group_is_enough() -> None:
    check_either_group()


def test_the_directions_are_always_the_same() -> None:
    block, factors = factors_of("dense")
    _, later = factors_of("dense", seed=5)
    state = state_of(Eigen(), block, factors)
    torch.manual_seed(1)
    first = staleness(Eigen(), block, later, state)
    before = torch.get_rng_state()
    assert staleness(Eigen(), block, later, state) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_not_finite_is_not_fresh() -> None:
    block, factors = factors_of("dense")
    state = state_of(Cholesky(), block, factors)
    factors["A"][0, 1, 2, 3] = float("nan")
    assert not staleness(Cholesky(), block, factors, state)[0] <= 1e9


# --- in training -----------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "factor_update_period": 1, "inverse_update_period": 2, "stagger_refreshes": False,
}  # fmt: skip


class Run:
    def __init__(self, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 5))
        self.criterion = nn.MSELoss()
        self.optimizer = KFAC(
            self.model, lr=0.05, criterion=self.criterion, **(SETTINGS | settings)
        )

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            self.optimizer.zero_grad()
            self.criterion(self.model(x), torch.zeros(16, 5)).backward()
            self.optimizer.step()

    @property
    def counts(self) -> tuple[float, float]:
        found = self.optimizer.diagnostics()
        return found["inverse_refreshes"], found["skipped_refreshes"]

    def inverses(self, layer: str) -> State:
        return self.optimizer.state_dict()["kfac"]["layers"][layer]["inverse"]


@STRATEGY
def test_a_large_tolerance_skips_every_refresh_but_the_first(strategy: Inverse) -> None:
    run = Run(inverse=strategy, refresh_tolerance=1e6)
    run.train(0, 1)
    first = [run.inverses(layer) for layer in ("0", "2", "3")]
    run.train(1, 7)
    assert run.counts == (2, 9)  # two shapes; three layers at the steps 2, 4 and 6
    for layer, inverses in zip(("0", "2", "3"), first, strict=True):
        assert all(torch.equal(inverses[k], t) for k, t in run.inverses(layer).items())


@STRATEGY
def test_a_small_tolerance_and_none_skip_nothing(strategy: Inverse) -> None:
    runs = [Run(inverse=strategy, refresh_tolerance=t) for t in (1e-7, None)]
    for run in runs:
        run.train(0, 7)
        assert run.counts == (8, 0)
    for mine, theirs in zip(*(run.model.parameters() for run in runs), strict=True):
        assert torch.equal(mine, theirs)


def check_stale_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(refresh_tolerance=0.1)
    run.train(0, 2)
    first = {layer: run.inverses(layer)["A_inverse"] for layer in ("0", "2", "3")}

    def measured(self: Cholesky, block: BlockShape, *_: object) -> Tensor:
        # Of the two layers of one shape, the second is beyond the tolerance.
        return torch.tensor([0.1, 0.2] if block.d_in == 5 else [float("nan")])

    monkeypatch.setattr(Cholesky, "staleness", measured)
    run.train(2, 3)
    same = [torch.equal(first[layer], run.inverses(layer)["A_inverse"]) for layer in first]
    assert same == [True, False, False]
    assert run.counts == (4, 1)


def test_only_stale_layers_are_refreshed_and_what_is_no_number_is_stale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_stale_layers(monkeypatch)


def test_a_layer_without_an_inverse_gets_one() -> None:
    run = Run(refresh_tolerance=1e6)
    run.train(0, 3)
    run.optimizer._engine.blocks.ready["3"] = False
    run.train(3, 5)
    assert run.counts == (3, 6)  # at the step 3 that layer alone, at 2 and 4 none
    assert run.optimizer._engine.blocks.ready["3"]


def test_a_preconditioner_takes_the_tolerance_and_new_layers_keep_it() -> None:
    model = nn.Linear(3, 2)
    preconditioner = Preconditioner(model, refresh_tolerance=1e6, **SETTINGS)
    for step in range(5):
        preconditioner.zero_grad()
        model.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        preconditioner.step()
        if step == 2:
            preconditioner.update_layers()
    assert preconditioner.diagnostics()["skipped_refreshes"] == 2


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("period", [1, 3])
@STRATEGY
def test_a_resumed_run_skips_the_same_refreshes(strategy: Inverse, period: int, stop: int) -> None:
    settings = {"inverse": strategy, "refresh_tolerance": 0.1, "factor_update_period": period}
    whole, first, second = Run(**settings), Run(**settings), Run(**settings)
    whole.train(0, 10)
    assert whole.counts[1] > 0 or period == 1
    first.train(0, stop)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.train(stop, 10)
    assert second.counts == whole.counts
    for mine, theirs in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_state_that_is_older_than_the_counter_loads() -> None:
    run = Run(refresh_tolerance=1e6)
    run.train(0, 3)
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["kfac"]["version"] = 1
    del saved["kfac"]["counters"]["skipped_refreshes"]
    run.optimizer.load_state_dict(saved)
    assert run.counts == (2, 0)


# --- mutants ---------------------------------------------------------------------------------


def in_one_direction(original: Any, factor: Tensor, rows: int) -> Tensor:
    v = torch.zeros_like(original(factor, rows))
    v[..., 0, :] = 1
    return v


def first_group(original: Any, factor: Tensor, amount: Tensor, x: Tensor, v: Tensor) -> Tensor:
    return original(factor[:, :1], amount[:, :1], x[:, :1], v[:, :1])


MUTANTS: dict[str, tuple[object, str, Replacement, Callable[[], None]]] = {
    "one coordinate only": (factored, "probes", in_one_direction, check_a_single_direction),
    "the first group only": (factored, "relative_residual", first_group, check_either_group),
    "exact: damped by the λ of the refresh": (
        eigen, "relative_residual",
        lambda original, factor, amount, x, v: original(factor, amount * 0.1, x, v),
        check_a_new_damping,
    ),
    "factored: damped by the λ of the refresh": (
        factored, "relative_residual",
        lambda original, factor, amount, x, v: original(factor, amount * 0.1**0.5, x, v),
        check_a_new_damping,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("owner", "name", "mutant", "check"), MUTANTS.values(), ids=MUTANTS)
def test_mutants_are_caught(
    owner: object,
    name: str,
    mutant: Replacement,
    check: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replace(owner, name, mutant)(monkeypatch)
    with pytest.raises(AssertionError):
        check()


def test_mutant_a_nan_counts_as_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(Tensor, "__le__", lambda original, x, y: ~(x > y))(monkeypatch)
    with pytest.raises(AssertionError):
        check_stale_layers(monkeypatch)
