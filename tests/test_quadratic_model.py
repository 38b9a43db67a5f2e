"""Coefficients of a step minimise the quadratic model of the objective, by brute force."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutants import replace
from oracles import jacobian, loss_hessian
from torch import Tensor, nn

import kfac.quadratic_model
from kfac.quadratic_model import QuadraticModel, inner_products, quadratic_model

EXACT = {"rtol": 1e-8, "atol": 1e-10}


def vector(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


class Problem:
    """A random net with a damping and a weight decay of its own for every parameter."""

    def __init__(self, seed: int = 0, directions: int = 2, criterion: Any = None) -> None:
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
        self.y = y.softmax(1)
        self.criterion = criterion or nn.CrossEntropyLoss()
        self.parameters = list(self.net.parameters())
        self.damping = [0.1, 0.1, 0.3, 0.3]
        self.weight_decay = [0.02, 0.0, 0.05, 0.0]
        j = jacobian(self.net, self.x)
        hessian = loss_hessian(self.net(self.x), self.y, self.criterion)
        self.fisher = j.T @ hessian @ j
        loss = self.criterion(self.net(self.x), self.y)
        self.gradients = list(torch.autograd.grad(loss, self.parameters))
        self.directions = [
            [torch.randn_like(p) for p in self.parameters] for _ in range(directions)
        ]

    def model(self) -> QuadraticModel:
        d = torch.stack([vector(direction) for direction in self.directions])
        return quadratic_model(
            d @ self.fisher @ d.T,
            self.directions,
            self.gradients,
            self.parameters,
            damping=self.damping,
            weight_decay=self.weight_decay,
        )

    def dense(self) -> tuple[Tensor, Tensor]:
        """Matrix and gradient of the whole quadratic, from its definition."""
        sizes = [p.numel() for p in self.parameters]
        spread = lambda values: torch.cat(  # noqa: E731
            [torch.full((n,), v, dtype=torch.float64) for n, v in zip(sizes, values, strict=True)]
        )
        decay = spread(self.weight_decay)
        matrix = self.fisher + torch.diag(spread(self.damping) + decay)
        return matrix, vector(self.gradients) + decay * vector(self.parameters)

    def value(self, coefficients: Tensor) -> Tensor:
        """M(δ) − h(θ)."""
        matrix, gradient = self.dense()
        d = torch.stack([vector(direction) for direction in self.directions])
        delta = coefficients @ d
        return 0.5 * delta @ matrix @ delta + gradient @ delta


def brute_force(problem: Problem, fixed: list[float | None]) -> Tensor:
    """Newton's method on the model's value as a function of the free coefficients."""
    free = [i for i, value in enumerate(fixed) if value is None]
    start = torch.tensor([value or 0.0 for value in fixed], dtype=torch.float64)
    basis = torch.eye(len(fixed)).double()[free]
    along = lambda c: problem.value(start + c @ basis)  # noqa: E731
    zero = torch.zeros(len(free)).double()
    gradient = torch.autograd.functional.jacobian(along, zero)
    hessian = torch.autograd.functional.hessian(along, zero)
    return start - torch.linalg.solve(hessian, gradient) @ basis


FIXED: list[list[float | None]] = [
    [None],
    [None, None],
    [None, 0.9],
    [-0.05, None],
    [None, None, None],
    [None, 0.3, None],
    [-0.1, 0.9],
]


def check_minimum(fixed: list[float | None]) -> None:
    for seed in range(3):
        problem = Problem(seed, len(fixed))
        model = problem.model()
        coefficients = model.minimizer(fixed)
        if None in fixed:
            torch.testing.assert_close(coefficients, brute_force(problem, fixed), **EXACT)
        torch.testing.assert_close(model.change(coefficients), problem.value(coefficients), **EXACT)
        for value, c in zip(fixed, coefficients.tolist(), strict=True):
            assert value is None or value == c


@pytest.mark.parametrize("fixed", FIXED, ids=str)
def test_coefficients_minimise_the_model(fixed: list[float | None]) -> None:
    check_minimum(fixed)


def test_the_derivative_of_the_model_vanishes_at_the_minimum() -> None:
    problem = Problem()
    model = problem.model()
    coefficients = model.minimizer().requires_grad_()
    (gradient,) = torch.autograd.grad(model.change(coefficients), coefficients)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), **EXACT)


def test_no_step_is_predicted_to_be_better_than_the_minimum() -> None:
    problem = Problem()
    model = problem.model()
    best = model.minimizer()
    assert model.change(best) < 0
    torch.testing.assert_close(model.change(best), 0.5 * model.slopes @ best, **EXACT)
    for _ in range(20):
        assert model.change(best + 0.1 * torch.randn(2)) > model.change(best)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 1e8])
def test_units_of_a_direction_do_not_matter(size: float) -> None:
    problem = Problem()
    expected = problem.model().minimizer()
    problem.directions[1] = [size * d for d in problem.directions[1]]
    found = problem.model().minimizer() * torch.tensor([1.0, size])
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("factor", [0.0, 1.0, -3.0, 1 + 1e-12])
def test_parallel_and_zero_directions_are_harmless(factor: float) -> None:
    problem = Problem(directions=1)
    alone = problem.model()
    problem.directions.append([factor * d for d in problem.directions[0]])
    model = problem.model()
    coefficients = model.minimizer()
    assert coefficients.isfinite().all()
    step = coefficients[0] + factor * coefficients[1]
    torch.testing.assert_close(step, alone.minimizer()[0], **EXACT)
    torch.testing.assert_close(model.change(coefficients), alone.change(alone.minimizer()), **EXACT)
    if factor == 0:
        assert coefficients[1] == 0


def test_zero_directions_alone_give_no_step() -> None:
    problem = Problem()
    problem.directions = [[torch.zeros_like(p) for p in problem.parameters] for _ in range(2)]
    model = problem.model()
    assert model.minimizer().tolist() == [0, 0]
    assert model.minimizer([None, 0.9]).tolist() == [0, 0.9]
    assert model.change(model.minimizer()) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_gives_no_step(bad: float) -> None:
    model = Problem().model()
    for broken in (
        QuadraticModel(model.curvature * bad, model.slopes),
        QuadraticModel(model.curvature, model.slopes * bad),
    ):
        assert broken.minimizer().tolist() == [0, 0]


def test_one_step_along_the_natural_gradient_solves_linear_least_squares() -> None:
    problem = Problem(criterion=nn.MSELoss())
    problem.net = nn.Linear(4, 3).double()
    problem.parameters = list(problem.net.parameters())
    loss = problem.criterion(problem.net(problem.x), problem.y)
    problem.gradients = list(torch.autograd.grad(loss, problem.parameters))
    j = jacobian(problem.net, problem.x)
    problem.fisher = j.T @ loss_hessian(problem.net(problem.x), problem.y, problem.criterion) @ j
    problem.damping = problem.weight_decay = [0.0, 0.0]
    natural = torch.linalg.solve(problem.fisher, vector(problem.gradients))
    weight, bias = natural.split([12, 3])
    problem.directions = [[7.0 * weight.view(3, 4), 7.0 * bias]]  # its length does not matter
    model = problem.model()
    coefficients = model.minimizer()
    with torch.no_grad():
        for p, d in zip(problem.parameters, problem.directions[0], strict=True):
            p += coefficients[0] * d
    ones = torch.cat([problem.x, torch.ones(6, 1).double()], dim=1)
    solution = torch.linalg.lstsq(ones, problem.y).solution.T
    found = torch.cat([problem.net.weight, problem.net.bias[:, None]], dim=1)
    torch.testing.assert_close(found.detach(), solution, rtol=1e-7, atol=1e-8)
    after = problem.criterion(problem.net(problem.x), problem.y)
    ratio = (after - loss) / model.change(coefficients)  # ρ on a true quadratic
    torch.testing.assert_close(ratio.detach(), torch.ones(()).double(), **EXACT)


def test_inner_products_are_weighted_sums() -> None:
    shapes = [(3, 2), (4,), ()]
    left = [[torch.randn(s).double() for s in shapes] for _ in range(3)]
    right = [[torch.randn(s).double() for s in shapes] for _ in range(2)]
    weights = [0.5, 0.0, 2.0]
    expected = [
        [sum(w * (a * b).sum() for w, a, b in zip(weights, x, y, strict=True)) for y in right]
        for x in left
    ]
    torch.testing.assert_close(
        inner_products(left, right, weights), torch.tensor(expected).double(), **EXACT
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inner_products_of_low_precision_do_not_overflow(dtype: torch.dtype) -> None:
    x = [[torch.full((1000,), 100.0, dtype=dtype)]]
    assert inner_products(x, x, [1.0]).item() == 1e7


MUTANTS: dict[str, tuple[object, str, Callable, list[float | None]]] = {
    "damping left out": (
        kfac.quadratic_model,
        "quadratic_model",
        lambda original, *args, damping, **rest: original(
            *args, damping=[0.0] * len(damping), **rest
        ),
        [None, None],
    ),
    "weight decay missing from the curvature": (
        kfac.quadratic_model,
        "quadratic_model",
        lambda original, *args, damping, weight_decay: original(
            *args,
            damping=[d - w for d, w in zip(damping, weight_decay, strict=True)],
            weight_decay=weight_decay,
        ),
        [None, None],
    ),
    "weight decay missing from the gradient": (
        kfac.quadratic_model,
        "quadratic_model",
        lambda original, fisher, d, g, p, **rest: original(
            fisher, d, g, [torch.zeros_like(x) for x in p], **rest
        ),
        [None, None],
    ),
    "directions minimised one by one": (
        kfac.quadratic_model,
        "_solve",
        lambda original, matrix, right, tolerance: original(
            matrix.diagonal().diag(), right, tolerance
        ),
        [None, None],
    ),
    "sign": (
        QuadraticModel,
        "minimizer",
        lambda original, self, fixed=(): -original(self, fixed),
        [None],
    ),
    "fixed coefficients ignored by the free ones": (
        QuadraticModel,
        "minimizer",
        lambda original, self, fixed=(): torch.tensor(
            [
                c if value is None else value
                for value, c in zip(fixed, original(self).tolist(), strict=True)
            ]
        ).double(),
        [None, 0.9],
    ),
    "½ missing": (
        QuadraticModel,
        "change",
        lambda original, self, c: c @ self.curvature @ c + self.slopes @ c,
        [None],
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, mutant, fixed = MUTANTS[name]
    check_minimum(fixed)
    replace(owner, attribute, mutant)(monkeypatch)
    if attribute == "quadratic_model":
        monkeypatch.setitem(globals(), attribute, kfac.quadratic_model.quadratic_model)
    with pytest.raises(AssertionError):
        check_minimum(fixed)
