"""Factors above `max_factor_dim` keep blocks on their diagonal: dense ones with the rest set to 0.

The oracle zeroes everything outside the blocks of factors that are written out, and solves densely.
"""

import copy
from collections.abc import Callable
from itertools import count
from typing import Any

import oracles
import pytest
import torch
from mutants import replace
from test_exactness import (
    GENERAL,
    PLAIN,
    SOLVES,
    Problem,
    build,
    close,
    gradient_blocks,
    movement,
    observe,
    output_factor,
    randn,
    start,
    train_step,
)
from torch import Tensor, nn

import kfac.inverse.factored
import kfac.layers.base
import kfac.products
from kfac import KFAC, Ekfac
from kfac.factors import as_kind
from kfac.layers.base import factor_kind

PROBLEMS = GENERAL | {
    "1d, many channels": lambda: Problem(
        nn.Sequential(
            nn.Conv1d(7, 5, 3, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)
        ),
        randn(4, 7, 7), torch.arange(4) % 3, nn.CrossEntropyLoss(), terms=4,
    ),
    "groups of many channels": lambda: Problem(
        nn.Sequential(
            nn.Conv2d(10, 4, 2, groups=2, padding=1, padding_mode="reflect"),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, bias=False),
        ),
        randn(3, 10, 3, 4), torch.arange(3), nn.CrossEntropyLoss(), terms=3,
    ),
    "transposed": lambda: Problem(
        nn.Sequential(
            nn.ConvTranspose1d(6, 5, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(35, 3)
        ),
        randn(4, 6, 3), torch.arange(4) % 3, nn.CrossEntropyLoss(), terms=4,
    ),
}  # fmt: skip
LIMITS = [3, 4, 7]


def rows_of_a_block(size: int, limit: int, together: int) -> int:
    """The fewest blocks of equal size, at most `limit`, whose borders are between channels."""
    together = together if together <= limit else 1
    units = -(-size // together)
    return next(rows for n in count(1) if (rows := -(-units // n) * together) <= limit)


def masked(factor: Tensor, rows: int) -> Tensor:
    index = torch.arange(factor.shape[-1]) // rows
    return torch.where(index[:, None] == index, factor, 0.0)


def kernel_of(layer: nn.Module) -> int:
    return torch.Size(getattr(layer, "kernel_size", ())).numel()


def block_factors(problem: Problem, name: str, fisher: str, limit: int) -> tuple[Tensor, Tensor]:
    seen = observe(problem, name)
    a = oracles.input_factor(seen, problem.sharing)
    g = output_factor(problem, seen, fisher)
    together = kernel_of(problem.model.get_submodule(name))
    return (
        masked(a, rows_of_a_block(a.shape[-1], limit, together)),
        masked(g, rows_of_a_block(g.shape[-1], limit, 1)),
    )


def check(problem: Problem, inverse: str, fisher: str, limit: int) -> None:
    moved = movement(problem, inverse=inverse, fisher=fisher, max_factor_dim=limit)
    for name, gradient in gradient_blocks(problem).items():
        a, g = block_factors(problem, name, fisher, limit)
        solve = SOLVES["eigen" if fisher == "forward-only" else inverse]
        close(moved[name], -solve(a, g, PLAIN["damping"], gradient))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_step_is_the_solve_with_blocks_of_explicit_factors(
    name: str, sharing: str, limit: int
) -> None:
    problem = build(PROBLEMS, name)
    problem.sharing = sharing
    for inverse in SOLVES:
        check(problem, inverse, "type-2", limit)


@pytest.mark.parametrize("fisher", ["empirical", "forward-only"])
@pytest.mark.parametrize("name", ["classifier", "1d, many channels", "groups of many channels"])
def test_for_every_fisher(name: str, fisher: str) -> None:
    for limit in LIMITS:
        check(build(PROBLEMS, name), "cholesky", fisher, limit)


@pytest.mark.parametrize("limit", [*LIMITS, 100])
def test_ekfac_measures_eigenvalues_in_the_basis_of_the_blocks(limit: int) -> None:
    problem = build(PROBLEMS, "1d, many channels")
    optimizer, trained = start(
        problem, fisher="empirical", inverse=Ekfac(), max_factor_dim=limit, lr=0.0
    )
    for _ in range(2):
        train_step(optimizer, trained)
    for name in oracles.layer_names(problem.model):
        a, g = block_factors(problem, name, "empirical", limit)
        by_example = []
        for x, y in zip(problem.inputs, problem.target, strict=True):
            one = copy.copy(problem)
            one.inputs, one.target = x[None], y[None]
            by_example.append(gradient_blocks(one)[name])
        dense = torch.stack(by_example).flatten(2)
        fisher = torch.einsum("ngi,ngj->gij", dense, dense) / len(dense)
        block = optimizer.curvature()[name]._matrix
        for group, (left, right) in enumerate(zip(a, g, strict=True)):
            columns = [
                torch.eye(len(f)).double() if q is None else unfolded(q[group], len(f))
                for q, f in ((block.q_a, left), (block.q_g, right))
            ]
            for q, f in zip(columns, (left, right), strict=True):
                rotated = q.T @ f @ q
                close(rotated, rotated.diagonal().diag())
                close(q.T @ q, torch.eye(len(f)).double())
            basis = torch.kron(columns[1].contiguous(), columns[0].contiguous())
            expected = (basis.T @ fisher[group] @ basis).diagonal()
            # The first batch is in the average as λ_G λ_A, with the weight of one of two.
            first = torch.outer(
                (columns[1].T @ right @ columns[1]).diagonal(),
                (columns[0].T @ left @ columns[0]).diagonal(),
            )
            decay = PLAIN["factor_decay"]
            mixed = (decay * first.flatten() + expected) / (1 + decay)
            close(block.eigenvalues[group].flatten(), mixed)


def unfolded(factor: Tensor, rows: int) -> Tensor:
    """Blocks `[blocks, b, b]` or a matrix, as a matrix of so many rows."""
    return (factor if factor.dim() == 2 else torch.block_diag(*factor))[:rows, :rows]


@pytest.mark.parametrize("limit", LIMITS)
def test_the_public_factors_are_the_blocks(limit: int) -> None:
    problem = build(PROBLEMS, "groups of many channels")
    optimizer, trained = start(problem, fisher="type-2", max_factor_dim=limit)
    train_step(optimizer, trained)
    for name in oracles.layer_names(problem.model):
        expected = block_factors(problem, name, "type-2", limit)
        for found, dense in zip(optimizer.factor(name), expected, strict=True):
            for one, other in zip(found, dense, strict=True):
                close(unfolded(one, len(other)), other)
                assert one.shape[-1] <= limit


@pytest.mark.parametrize("together", [1, 4, 9, 50])
@pytest.mark.parametrize("limit", [1, 2, 7, 40, 100])
def test_blocks_are_as_few_and_as_equal_as_the_limit_allows(limit: int, together: int) -> None:
    for size in (1, 5, 40, 41, 300):
        kind, rows = factor_kind(size, limit, together)
        expected = rows_of_a_block(size, limit, together)
        if size <= limit:
            assert (kind, rows) == ("dense", 0)
        elif expected == 1 or -(-size // expected) > 32:
            assert (kind, rows) == ("diagonal", 0)
        else:
            assert (kind, rows) == ("block-diagonal", expected)


def test_a_mask_of_positions_reaches_the_blocks() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(6, 5).double(), randn(3, 4, 6)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    optimizer = KFAC(Masked(model), lr=0.1, max_factor_dim=4, position_mask="mask", loss_terms=3)
    optimizer._engine.model(x, mask).square().mean().backward()
    optimizer.step()
    rows = torch.cat([x, torch.ones(3, 4, 1).double()], 2)[mask > 0]
    close(unfolded(optimizer.factor("inner")[0][0], 7), masked(rows.T @ rows / len(rows), 4))


class Masked(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x) * mask.unsqueeze(-1)


def kept(matrix: Tensor, rows: int | None) -> Tensor:
    """`[1, d, d]` as blocks of so many rows, None for a diagonal."""
    if rows is None:
        return matrix.diagonal(dim1=1, dim2=2).clone()
    blocks = -(-matrix.shape[-1] // rows)
    if blocks == 1:
        return matrix
    padded = nn.functional.pad(matrix[0], 2 * (0, blocks * rows - matrix.shape[-1]))
    pieces = [padded[i : i + rows, i : i + rows] for i in range(0, blocks * rows, rows)]
    return torch.stack(pieces)[None]


@pytest.mark.parametrize("to", [None, 2, 3, 4, 9])
@pytest.mark.parametrize("of", [None, 2, 3, 5, 7])
def test_one_kind_as_another(of: int | None, to: int | None) -> None:
    matrix, extra = randn(1, 7, 7), 2
    held = masked(matrix, of) if of else matrix.diagonal(0, 1, 2).diag_embed()
    larger = nn.functional.pad(held, 2 * (0, extra))
    expected = masked(larger, to) if to else larger
    like = kept(torch.zeros(1, 7 + extra, 7 + extra).double(), to)
    close(as_kind(kept(matrix, of), like), kept(expected, to))


def resumed(**settings: Any) -> tuple[list[Tensor], list[Tensor]]:
    results = []
    for interrupted in (False, True):
        problem = build(PROBLEMS, "1d, many channels")
        optimizer, trained = start(problem, fisher="empirical", max_factor_dim=4, **settings)
        for step in range(6):
            if interrupted and step == 3:
                weights = copy.deepcopy(trained.model.state_dict())
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer, trained = start(
                    problem, fisher="empirical", max_factor_dim=4, **settings
                )
                trained.model.load_state_dict(weights)
                optimizer.load_state_dict(saved)
            train_step(optimizer, trained)
        results.append([p.detach() for p in trained.model.parameters()])
    return results[0], results[1]


@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "ekfac", "newton-schulz", "inverse-free"])
def test_a_resumed_run_is_the_same(inverse: str) -> None:
    whole, resumed_run = resumed(inverse=inverse, inverse_update_period=4)
    for one, other in zip(whole, resumed_run, strict=True):
        assert torch.equal(one, other)


def replace_product(change: Callable[[Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], None]:
    """A mutant: the blocks on the right are changed."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        kinds = kfac.products._PRODUCTS_FROM_RIGHT
        original = kinds[5]
        patch.setitem(kinds, 5, lambda matrix, blocks: original(matrix, change(blocks)))

    return plant


MUTANTS = {
    "zeros count for the mean eigenvalue": replace(
        kfac.inverse.factored, "factored_damping",
        lambda original, a, g, damping, d_in, d_out: original(
            a, g, damping, a.shape[2:-1].numel(), g.shape[2:-1].numel()
        ),
    ),
    "borders inside of a channel": replace(
        kfac.layers.base, "factor_kind", lambda original, size, most, _=1: original(size, most)
    ),
    "blocks in the wrong order": replace_product(lambda blocks: blocks.flip(-3)),
    "transposed blocks": replace_product(lambda blocks: blocks.mT),
}  # fmt: skip


def check_all() -> None:
    problem = build(PROBLEMS, "1d, many channels")
    for limit in LIMITS:
        for inverse in SOLVES:
            check(problem, inverse, "type-2", limit)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_all()
    MUTANTS[name](monkeypatch)
    with pytest.raises(AssertionError):
        check_all()


def test_kronecker_blocks_are_those_of_the_dense_matrix() -> None:
    problem = build(PROBLEMS, "1d, many channels")
    optimizer, trained = start(problem, fisher="type-2", max_factor_dim=4, lr=0.0)
    train_step(optimizer, trained)
    for name, block in optimizer.curvature().items():
        a, g = block_factors(problem, name, "type-2", 4)
        layer = problem.model.get_submodule(name)
        outputs, inputs = len(layer.weight), layer.weight[0].numel()
        order = [o * (inputs + 1) + i for o in range(outputs) for i in range(inputs)]
        order += [o * (inputs + 1) + inputs for o in range(outputs)]
        expected = torch.kron(g[0].contiguous(), a[0].contiguous())[order][:, order]
        close(block.to_dense(), expected)
        close(block.trace(), expected.trace())
        v = randn(len(expected))
        damped = expected + 0.3 * torch.eye(len(expected)).double()
        close(block.solve(v, 0.3), torch.linalg.solve(damped, v))
        close(block.logdet(0.3), damped.logdet())
