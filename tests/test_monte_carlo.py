"""Sampled labels: over many seeds the mean of G is the G of `"type-2"`, for every loss and layer.

`"type-2"` sends one vector per output element of an example. It is exact as long as examples do not
mix, so nothing with a gradient of its own stands in front of the batch norm here.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import oracles
import pytest
import torch
from mutants import replace
from torch import Tensor, nn

from kfac import KFAC
from kfac.fisher import Bernoulli, CrossEntropy, Gaussian, _TermwiseLikelihood
from kfac.vectors import OutputVectors

# BatchNorm stands where the examples of a batch may mix.
pytestmark = pytest.mark.filterwarnings("ignore:fisher='type-2' is exact only if the examples")

SEEDS = 40
CLASSES, WIDTH = 3, 4
STILL: dict[str, Any] = {
    "lr": 0.0, "momentum": 0.0, "kl_clip": None, "damping": 1.0, "inverse": "cholesky",
    "factor_update_period": 1, "inverse_update_period": 1,
}  # fmt: skip


# Models


class Sequences(nn.Module):
    """Tokens to logits of the next ones, by a table that is also the output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(CLASSES, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.att = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.table(tokens))
        x = x + self.att(x, x, x, need_weights=False)[0]
        x = self.inner(self.inner(x).tanh()).tanh()
        return self.head(x).transpose(1, 2)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 4, 2, groups=2)
        self.up = nn.ConvTranspose1d(4, 2, 2, stride=2)
        self.head = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.norm(x)).tanh().flatten(2)
        return self.head(self.up(x).tanh().mean(2))


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(5, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.bag(tokens).tanh())


@dataclass
class Problem:
    model: nn.Module
    inputs: Tensor
    criterion: nn.Module
    target: Tensor
    layers: tuple[str, ...] = ()


PROJECTIONS = tuple(f"att.{name}_proj" for name in ("q", "k", "v", "out"))
MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...], tuple[str, ...]]] = {
    "sequences": (Sequences, (16, 3), ("table", "norm", *PROJECTIONS, "inner", "head")),
    "images": (Images, (12, 4, 3, 3), ("norm", "conv", "up", "head")),
    "bags": (Bags, (24, 4), ("bag", "head")),
}


# Losses

WEIGHTS = torch.tensor([0.2, 3.0, 1.0])
CRITERIA: dict[str, Callable[[], nn.Module]] = {
    "class weights, label smoothing": lambda: nn.CrossEntropyLoss(WEIGHTS, label_smoothing=0.5),
    "class weights, ignore_index": lambda: nn.CrossEntropyLoss(WEIGHTS, ignore_index=1),
    "binary, pos_weight": lambda: nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)),
    "squared error": nn.MSELoss,
}


def target_of(criterion: nn.Module, output: Tensor) -> Tensor:
    if isinstance(criterion, nn.CrossEntropyLoss):
        shape = output[:, 0].shape
        return (torch.arange(shape.numel()) ** 2 % 5 % CLASSES).reshape(shape)
    values = torch.randn(output.shape, dtype=output.dtype)
    return values if isinstance(criterion, nn.MSELoss) else (values > 0).double()


def build(model: str, loss: str) -> Problem:
    torch.manual_seed(0)
    kind, shape, layers = MODELS[model]
    net, criterion = kind().double(), CRITERIA[loss]().double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.6)
    inputs = torch.randn(shape).double() if model == "images" else torch.randint(0, CLASSES, shape)
    return Problem(net, inputs, criterion, target_of(criterion, net(inputs)), layers)


# Estimates


def output_factors(problem: Problem, **settings: Any) -> list[Tensor]:
    """G of every layer for one batch; of a tied table, of either of its uses."""
    optimizer = KFAC(problem.model, criterion=problem.criterion, **STILL | settings)
    problem.criterion(problem.model(problem.inputs), problem.target).backward()
    optimizer.step()
    optimizer.remove_hooks()
    states = optimizer.state_dict()["kfac"]["layers"]
    return [states[name]["factors"]["G"].clone() for name in problem.layers]


def sampled(problem: Problem, **settings: Any) -> list[Tensor]:
    """G of every layer `[seeds, groups, d_out, d_out]`."""
    drawn = [output_factors(problem, fisher="mc", seed=seed, **settings) for seed in range(SEEDS)]
    return [torch.stack(factors) for factors in zip(*drawn, strict=True)]


@cache
def estimates(model: str, loss: str, **settings: Any) -> list[Tensor]:
    return sampled(build(model, loss), **settings)


def assert_unbiased(found: list[Tensor], expected: list[Tensor]) -> None:
    """Every element within five standard errors."""
    for drawn, exact in zip(found, expected, strict=True):
        assert (drawn.std(0) > 0).any()
        bound = 5 * drawn.std(0) / len(drawn) ** 0.5
        assert ((drawn.mean(0) - exact).abs() <= bound + 1e-12).all()


def check_bias(model: str, loss: str, **settings: Any) -> None:
    sharing = {key: settings[key] for key in settings if key == "weight_sharing"}
    expected = output_factors(build(model, loss), fisher="type-2", **sharing)
    assert_unbiased(estimates(model, loss, **settings), expected)


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("loss", CRITERIA)
@pytest.mark.parametrize("model", MODELS)
def test_the_sampled_fisher_is_unbiased(model: str, loss: str, num_samples: int) -> None:
    check_bias(model, loss, num_samples=num_samples)


@pytest.mark.parametrize("model", MODELS)
def test_it_is_unbiased_for_summed_gradients(model: str) -> None:
    check_bias(model, "class weights, label smoothing", num_samples=3, weight_sharing="reduce")


def check_bias_where_examples_mix() -> None:
    """In front of a batch norm only independent labels of all examples give the exact G."""
    problem = build("images", "squared error")
    conv, norm, *rest = problem.model.conv, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, CLASSES)
    model = nn.Sequential(conv, norm, nn.Tanh(), *rest).double()
    problem.model, problem.layers = model, ("0",)
    data = problem.inputs, problem.target, problem.criterion
    exact = oracles.exact_output_factor(oracles.observe(copy.deepcopy(model), "0", *data))
    assert_unbiased(sampled(problem), [exact])


@pytest.mark.promise("BatchNorm in training mode")
def test_it_is_unbiased_where_examples_mix() -> None:
    check_bias_where_examples_mix()


@pytest.mark.parametrize("loss", CRITERIA)
@pytest.mark.parametrize("model", MODELS)
def test_more_samples_have_less_variance_in_proportion(model: str, loss: str) -> None:
    one, three = (
        sum(drawn.var(0).sum().item() for drawn in estimates(model, loss, num_samples=n))
        for n in (1, 3)
    )
    assert 3 / 2 < one / three < 3 * 2


# Mutants


def hotter(original: Callable, self: _TermwiseLikelihood, rows: Tensor, *rest: Any) -> Tensor:
    """Labels of a distribution twice as far from certain, with the right probabilities."""
    p, drawn = rows.softmax(1), original(self, rows / 2, *rest)
    return drawn - (rows / 2).softmax(1) + p


def without_smoothing(original: Callable, self: CrossEntropy, *arguments: Any) -> Tensor:
    smoothing, self.criterion.label_smoothing = self.criterion.label_smoothing, 0.0
    result = original(self, *arguments)
    self.criterion.label_smoothing = smoothing
    return result


def unscaled(original: Callable, self: OutputVectors, *arguments: Any) -> Iterator[Tensor]:
    for vector in original(self, *arguments):
        yield vector * self.num_samples**0.5


def one_draw_for_all(original: Callable, self: Gaussian, rows: Tensor, generator: Any) -> Tensor:
    return original(self, rows[:1], generator).expand_as(rows)


def binary(original: Callable, self: Bernoulli, rows: Tensor, generator: Any) -> Tensor:
    """Fair coins."""
    return rows.sigmoid() - torch.randint(0, 2, rows.shape, generator=generator).to(rows)


SAMPLES = "sample_rows"
MUTANTS: dict[str, tuple[Callable, Callable]] = {
    "labels of a hotter distribution": (
        replace(CrossEntropy, SAMPLES, hotter),
        partial(check_bias, "bags", "class weights, ignore_index", num_samples=3),
    ),
    "fair coins": (
        replace(Bernoulli, SAMPLES, binary),
        partial(check_bias, "bags", "binary, pos_weight", num_samples=3),
    ),
    "variance of the labels 1 instead of ½": (
        replace(Gaussian, SAMPLES, lambda original, *a: original(*a) * 2**0.5),
        partial(check_bias, "bags", "squared error"),
    ),
    "label smoothing ignored": (
        replace(CrossEntropy, "sample", without_smoothing),
        partial(check_bias, "bags", "class weights, label smoothing", num_samples=3),
    ),
    "samples added up, not averaged": (
        replace(OutputVectors, "draw", unscaled),
        partial(check_bias, "bags", "class weights, ignore_index", num_samples=3),
    ),
    "one draw for all positions": (
        replace(Gaussian, SAMPLES, one_draw_for_all),
        partial(check_bias, "sequences", "squared error", num_samples=3),
    ),
    "one draw for all examples": (
        replace(Gaussian, SAMPLES, one_draw_for_all), check_bias_where_examples_mix
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test = MUTANTS[name]
    test()
    estimates.cache_clear()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test()
    estimates.cache_clear()
