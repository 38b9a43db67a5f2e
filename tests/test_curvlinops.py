"""Factors and matrices agree with those of `curvlinops`, an independent package, where both apply.

Its scope: Linear, Conv2d in one group with zero padding; cross-entropy, squared error and binary
cross-entropy without weights. Grouped convolutions are outside of it (it averages the patches over
the groups), and so are other padding modes (it reads the amount of padding only).
"""

import copy
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, cast

import pytest
import test_exactness as exactness
import torch
from test_exactness import BCE, CE, CLASSES, MSE, Problem, close, labels, rand, randn, tanh_net
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
    from curvlinops import KFACInverseLinearOperator, KFACLinearOperator

from kfac import KFAC

Batches = list[tuple[Tensor, Tensor]]
Factors = tuple[Tensor, Tensor]


class Pooled(nn.Module):
    """Positions go through two layers each, then an example's mean over them to the classes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.middle, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.inner(x).tanh()).tanh().flatten(1, -2).mean(1))


def convolution(**geometry: Any) -> Problem:
    model = nn.Sequential(
        nn.Conv2d(2, 4, **geometry),
        nn.Tanh(),
        nn.Conv2d(4, 3, (3, 1), padding="same", bias=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d((1, 2)),
        nn.Flatten(),
        nn.Linear(6, CLASSES),
    )
    return Problem(model, randn(4, 2, 7, 6), labels(4), CE())


ONE_TERM: dict[str, Callable[[], Problem]] = {
    "cross-entropy": lambda: Problem(tanh_net(), randn(6, 5), labels(6), CE()),
    "squared error": lambda: Problem(tanh_net(False), randn(6, 5), randn(6, CLASSES), MSE()),
    "binary": lambda: Problem(tanh_net(), randn(6, 5), rand(6, CLASSES).round(), BCE()),
    "sequences": lambda: Problem(Pooled(), randn(5, 4, 5), labels(5), CE()),
    "sequences of sequences": lambda: Problem(
        Pooled(), randn(3, 2, 3, 5), randn(3, CLASSES), MSE()
    ),
    "convolution": lambda: convolution(kernel_size=3),
    "convolution, stride, padding": lambda: convolution(kernel_size=(3, 2), stride=2, padding=1),
    "convolution, dilation": lambda: convolution(kernel_size=2, dilation=(2, 1), bias=False),
}

SEVERAL_TERMS: dict[str, Callable[[], Problem]] = {
    "language model": exactness.GENERAL["language model"],
    "squared error of sequences": lambda: Problem(
        tanh_net(), randn(3, 4, 5), randn(3, 4, CLASSES), MSE()
    ),
}

PROBLEMS = ONE_TERM | SEVERAL_TERMS


def build(name: str, sharing: str) -> Problem:
    torch.manual_seed(0)
    return replace(PROBLEMS[name](), sharing=sharing)


def theirs(
    problem: Problem, fisher: str, batches: Batches | None = None, **settings: Any
) -> KFACLinearOperator:
    """Their operator for a copy of the problem's model, bias and weight in one block as in ours."""
    model = copy.deepcopy(problem.model)
    operator = KFACLinearOperator(
        model,
        problem.criterion,
        list(model.parameters()),
        batches or [(problem.inputs, problem.target)],
        fisher_type=fisher,
        kfac_approx=problem.sharing,
        separate_weight_and_bias=False,
        check_deterministic=False,
        **settings,
    )
    operator.compute_kronecker_factors()
    return operator


def in_our_convention(problem: Problem, operator: KFACLinearOperator) -> dict[str, Factors]:
    """Their factors as ours, `[1, d, d]`: the one place that knows of a difference in scale.

    For a mean loss there is none: A is a mean over examples and positions, and G carries the mean
    over loss terms, including the output elements over which squared error and binary cross-entropy
    average. Their factors of a summed loss are those of the summed loss, in G; ours are those of
    the mean loss for either.
    """
    scale = 1.0
    if problem.criterion.reduction == "sum":
        terms = problem.target.numel()  # one per label or target value
        scale = 1 / terms
    state = operator.state_dict()
    a, g = state["input_covariances"], state["gradient_covariances"]
    return {name: (a[name][None], scale * g[name][None]) for name in g}


def ours(problem: Problem, fisher: str, **settings: Any) -> KFAC:
    optimizer, trained = exactness.start(problem, fisher=fisher, lr=0.0, **settings)
    exactness.train_step(optimizer, trained)
    return optimizer


def check_factors(problem: Problem, fisher: str) -> None:
    optimizer = ours(problem, fisher)
    expected = in_our_convention(problem, theirs(problem, fisher))
    assert expected.keys() == optimizer.curvature().keys()
    for name, (a, g) in expected.items():
        found_a, found_g = optimizer.factor(name)
        close(found_a, a)
        close(torch.eye(g.shape[-1], dtype=g.dtype)[None] if found_g is None else found_g, g)


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ONE_TERM)
def test_factors_agree(name: str, sharing: str, fisher: str) -> None:
    check_factors(build(name, sharing), fisher)


@pytest.mark.parametrize(
    ("sharing", "fisher"),
    [
        ("expand", "type-2"),
        ("expand", "empirical"),
        ("expand", "forward-only"),
        ("reduce", "empirical"),
        ("reduce", "forward-only"),
    ],
)
@pytest.mark.parametrize("name", SEVERAL_TERMS)
def test_factors_agree_with_several_loss_terms_per_example(
    name: str, sharing: str, fisher: str
) -> None:
    check_factors(build(name, sharing), fisher)


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("name", ["cross-entropy", "squared error", "binary", "language model"])
def test_factors_of_a_summed_loss_differ_by_the_number_of_terms(name: str, fisher: str) -> None:
    problem = build(name, "expand")
    problem = replace(problem, criterion=exactness.with_sum(problem.criterion))
    expected = in_our_convention(problem, theirs(problem, fisher))
    optimizer = ours(problem, fisher)
    for layer, (a, g) in expected.items():
        close(optimizer.factor(layer)[0], a)
        close(optimizer.factor(layer)[1], g)


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize("name", ["squared error", "language model", "convolution"])
def test_factors_of_micro_batches_agree(name: str, fisher: str) -> None:
    problem = build(name, "expand")
    inputs = torch.cat([problem.inputs, randn(*problem.inputs.shape)])
    batches: Batches = [(x, problem.target) for x in inputs.chunk(2)]
    expected = in_our_convention(problem, theirs(problem, fisher, batches))
    optimizer, trained = exactness.start(problem, fisher=fisher, lr=0.0)
    for x, y in batches:
        (trained.criterion(trained.model(x), y) / 2).backward()
    optimizer.step()
    for layer, factors in expected.items():
        for found, factor in zip(optimizer.factor(layer), factors, strict=True):
            close(found, factor)


# Sampled Fisher


def their_samples(problem: Problem, seeds: Iterable[int]) -> dict[str, Tensor]:
    """G of every seed, `[draws, 1, d, d]`, by layer."""
    operators = [theirs(problem, "mc", seed=seed) for seed in seeds]
    drawn = [in_our_convention(problem, operator) for operator in operators]
    return {name: torch.stack([factors[name][1] for factors in drawn]) for name in drawn[0]}


def our_samples(problem: Problem, draws: int) -> dict[str, Tensor]:
    optimizer, trained = exactness.start(problem, fisher="mc", lr=0.0, factor_decay=0.0, seed=1)
    drawn: dict[str, list[Tensor]] = {}
    for _ in range(draws):
        exactness.train_step(optimizer, trained)
        for name in optimizer.curvature():
            drawn.setdefault(name, []).append(cast(Tensor, optimizer.factor(name)[1]))
    return {name: torch.stack(values) for name, values in drawn.items()}


def check_means(one: Tensor, other: Tensor) -> None:
    """Means of independent draws differ by at most 5 standard errors of their difference."""
    error = (one.mean(0) - other.mean(0)).abs()
    bound = 5 * (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
    assert (bound > 0).any()
    assert (error <= bound + 1e-12).all()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["cross-entropy", "squared error", "binary", "language model"])
def test_sampled_factors_agree(name: str, sharing: str) -> None:
    problem = build(name, sharing)
    found, expected = our_samples(problem, 150), their_samples(problem, range(150))
    for layer in expected:
        check_means(found[layer], expected[layer])


# Where the two differ


def all_terms_in_one_vector(problem: Problem, layer: str) -> Tensor:
    """G from one vector per class for all terms of an example at once, written out."""
    seen = exactness.observe(problem, layer)
    jacobian = seen.jacobian.sum(2, keepdim=True) if problem.sharing == "reduce" else seen.jacobian
    terms = jacobian.unflatten(0, (-1, problem.target.shape[-1]))
    summed = terms.sum(0)  # output elements of one class; another example's are zero
    scale = (2 / problem.target.numel()) ** 0.5
    return torch.einsum("cntgo,cntgp->gop", scale * summed, scale * summed)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_type_2_differs_by_cross_terms_where_positions_with_a_loss_each_meet(sharing: str) -> None:
    """They send one vector per class for all positions, which adds cross terms between positions.

    These vanish where no layer in between mixes positions and nothing is summed over them. In the
    mean over samples they vanish always, so that their own sampled factors agree with our exact
    ones and not with theirs.
    """
    torch.manual_seed(0)
    problem = replace(exactness.GENERAL["net that mixes positions"](), sharing=sharing)
    exact = in_our_convention(problem, theirs(problem, "type-2"))["embed"][1]
    close(exact, all_terms_in_one_vector(problem, "embed"))
    found = cast(Tensor, ours(problem, "type-2").factor("embed")[1])
    assert (found - exact).abs().max() > 0.1 * found.abs().max()
    sampled = their_samples(problem, range(150))["embed"]
    check_means(sampled, found.expand(2, *found.shape))
    with pytest.raises(AssertionError):
        check_means(sampled, exact.expand(2, *exact.shape))


# Matrices


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("name", ONE_TERM)
def test_matrices_agree(name: str, fisher: str) -> None:
    problem = build(name, "expand")
    operator, blocks = theirs(problem, fisher), ours(problem, fisher).curvature()
    size = operator.shape[0]
    dense = operator @ torch.eye(size, dtype=torch.float64)
    close(torch.block_diag(*(block.to_dense() for block in blocks.values())), dense)
    close(blocks.trace(), operator.trace)


@pytest.mark.parametrize("name", ["binary", "squared error of sequences", "convolution"])
def test_damped_inverses_agree(name: str) -> None:
    problem = build(name, "expand")
    operator, blocks = theirs(problem, "type-2"), ours(problem, "type-2").curvature()
    inverse = KFACInverseLinearOperator(operator, damping=0.1, use_exact_damping=True)
    v = randn(operator.shape[0])
    parts = v.split([block.shape[0] for block in blocks.values()])
    solved = [block.solve(part, 0.1) for block, part in zip(blocks.values(), parts, strict=True)]
    close(torch.cat(solved), inverse @ v)


def test_determinants_of_regular_matrices_agree() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    problem = Problem(model, randn(9, 4), randn(9, 3), MSE())
    blocks = ours(problem, "type-2").curvature()
    close(blocks.logdet(0), theirs(problem, "type-2").logdet)
