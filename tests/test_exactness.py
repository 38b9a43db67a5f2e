"""One `step()` of the public optimizer is the dense solve that theory prescribes, in float64.

`EXACT` holds problems whose Fisher block *is* A ⊗ G: the step must equal −(F + λI)⁻¹ g with F the
generalised Gauss-Newton block of the actual loss from explicit Jacobians. `GENERAL` holds problems
where A ⊗ G is an approximation: the step must equal the one from factors that are written out.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import oracles
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from kfac import KFAC

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-9)
randn = partial(torch.randn, dtype=torch.float64)
rand = partial(torch.rand, dtype=torch.float64)

PLAIN = {
    "lr": 1.0,
    "momentum": 0.0,
    "damping": 0.3,
    "kl_clip": None,
    "factor_decay": 0.9,
    "factor_update_period": 1,
    "inverse_update_period": 1,
}


@dataclass
class Problem:
    model: nn.Module
    inputs: Tensor
    target: Tensor
    criterion: nn.Module  # reduction="mean"
    sharing: str = "expand"
    terms: float = 0.0  # the criterion's own normaliser, for the empirical Fisher

    def __post_init__(self) -> None:
        self.model.double()
        self.criterion.double()


def train_step(optimizer: KFAC, problem: Problem) -> None:
    optimizer.zero_grad()
    problem.criterion(problem.model(problem.inputs), problem.target).backward()
    optimizer.step()


def start(problem: Problem, **settings: object) -> tuple[KFAC, Problem]:
    """An optimizer for a copy of the problem: the references never see its hooks."""
    problem = copy.deepcopy(problem)
    defaults = PLAIN | {"criterion": problem.criterion, "weight_sharing": problem.sharing}
    return KFAC(problem.model, **defaults | settings), problem


def parameters(problem: Problem) -> dict[str, Tensor]:
    """Parameters now, per layer, `[groups, d_out, d_in (+ 1)]`."""
    values = {name: p.detach().clone() for name, p in problem.model.named_parameters()}
    return oracles.parameter_blocks(problem.model, values)


def movement(problem: Problem, **settings: object) -> dict[str, Tensor]:
    """How far one step moves each layer."""
    optimizer, trained = start(problem, **settings)
    train_step(optimizer, trained)
    before = parameters(problem)
    return {name: after - before[name] for name, after in parameters(trained).items()}


def gradient_blocks(problem: Problem) -> dict[str, Tensor]:
    data = problem.inputs, problem.target, problem.criterion
    return oracles.parameter_blocks(problem.model, oracles.gradients(problem.model, *data))


def observe(problem: Problem, name: str) -> oracles.Layer:
    return oracles.observe(problem.model, name, problem.inputs, problem.target, problem.criterion)


def with_sum(criterion: nn.Module) -> nn.Module:
    criterion = copy.deepcopy(criterion)
    criterion.reduction = "sum"
    return criterion


# Problems whose Fisher block is A ⊗ G

CLASSES = 3
CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.3])


def linear_net(bias: bool = True, sizes: tuple[int, ...] = (5, 4, 6, CLASSES)) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(a, b, bias) for a, b in pairwise(sizes)))


def tanh_net(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(5, 6, bias), nn.Tanh(), nn.Linear(6, 4, bias), nn.Tanh(), nn.Linear(4, CLASSES)
    )


def pixel_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 1), nn.Tanh(), nn.Conv2d(4, CLASSES, 1))


def labels(*shape: int) -> Tensor:
    """Every class occurs; where the criterion ignores label 1, examples are ignored."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % CLASSES


def probabilities(*shape: int) -> Tensor:
    return randn(*shape).softmax(1)


def one_input(criterion: nn.Module, target: Tensor) -> Problem:
    """A nonlinear net on one input, repeated for every target: A = a aᵀ, whatever the loss."""
    return Problem(tanh_net(), randn(1, 5).repeat(len(target), 1), target, criterion)


def one_colour(criterion: nn.Module, target: Tensor) -> Problem:
    """The same for targets with extra dimensions: a net on images of a single colour."""
    size = target.shape[0], target.shape[-2], target.shape[-1]
    image = randn(1, 2, 1, 1).expand(size[0], 2, *size[1:]).contiguous()
    return Problem(pixel_net(), image, target, criterion)


def pooled_convolution(bias: bool = True, channels: int = 4, **geometry: object) -> Problem:
    """Convolution, mean over positions, Linear: exact with "reduce", per group."""
    model = nn.Sequential(
        nn.Conv2d(channels, 4, bias=bias, **geometry),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    return Problem(model, randn(5, channels, 7, 6), randn(5, 2), nn.MSELoss(), "reduce")


CE, BCE, MSE = nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss

LOSSES: dict[str, Callable[[], Problem]] = {
    "cross-entropy": lambda: one_input(CE(), labels(5)),
    "label smoothing": lambda: one_input(CE(label_smoothing=0.2), labels(5)),
    "class weights": lambda: one_input(CE(CLASS_WEIGHTS), labels(5)),
    "ignore_index": lambda: one_input(CE(ignore_index=1), labels(5)),
    "ignore_index outside": lambda: one_input(CE(), torch.tensor([0, -100, 2, 1, -100])),
    "class weights, label smoothing, ignore_index": lambda: one_input(
        CE(CLASS_WEIGHTS, ignore_index=1, label_smoothing=0.2), labels(5)
    ),
    "probability targets": lambda: one_input(CE(), probabilities(4, CLASSES)),
    "probability targets, class weights": lambda: one_input(
        CE(CLASS_WEIGHTS), probabilities(4, CLASSES)
    ),
    "probability targets, class weights, label smoothing": lambda: one_input(
        CE(CLASS_WEIGHTS, label_smoothing=0.2), probabilities(4, CLASSES)
    ),
    "cross-entropy of pixels": lambda: one_colour(CE(), labels(2, 2, 2)),
    "cross-entropy of pixels, class weights, ignore_index": lambda: one_colour(
        CE(CLASS_WEIGHTS, ignore_index=1), labels(2, 2, 2)
    ),
    "probability targets of pixels": lambda: one_colour(
        CE(CLASS_WEIGHTS), probabilities(2, CLASSES, 2, 2)
    ),
    "binary cross-entropy": lambda: one_input(BCE(), rand(4, CLASSES).round()),
    "soft binary targets": lambda: one_input(BCE(), rand(4, CLASSES)),
    "pos_weight": lambda: one_input(BCE(pos_weight=CLASS_WEIGHTS), rand(4, CLASSES).round()),
    "pos_weight, soft targets": lambda: one_input(BCE(pos_weight=CLASS_WEIGHTS), rand(4, CLASSES)),
    "binary weight per class": lambda: one_input(BCE(CLASS_WEIGHTS), rand(4, CLASSES).round()),
    "binary weight per example, pos_weight": lambda: one_input(
        BCE(torch.rand(4, 1), pos_weight=CLASS_WEIGHTS), rand(4, CLASSES).round()
    ),
    "pos_weight of pixels": lambda: one_colour(
        BCE(pos_weight=CLASS_WEIGHTS[:, None, None]), rand(2, CLASSES, 2, 2).round()
    ),
    "squared error": lambda: one_input(MSE(), randn(4, CLASSES)),
    "squared error of pixels": lambda: one_colour(MSE(), randn(2, CLASSES, 2, 2)),
}

NETS: dict[str, Callable[[], Problem]] = {
    "deep linear net": lambda: Problem(linear_net(), randn(7, 5), randn(7, CLASSES), MSE()),
    "deep linear net without bias": lambda: Problem(
        linear_net(bias=False), randn(7, 5), randn(7, CLASSES), MSE()
    ),
    "one example, cross-entropy": lambda: one_input(CE(), labels(1)),
    "one example, class weights": lambda: one_input(CE(CLASS_WEIGHTS), labels(1)),
    "one example, label smoothing": lambda: one_input(CE(label_smoothing=0.1), labels(1)),
    "one example, without bias": lambda: Problem(tanh_net(False), randn(1, 5), labels(1), CE()),
    "sequences": lambda: Problem(linear_net(), randn(4, 3, 5), randn(4, 3, CLASSES), MSE()),
    "sequences of sequences": lambda: Problem(
        linear_net(bias=False), randn(3, 2, 2, 5), randn(3, 2, 2, CLASSES), MSE()
    ),
    "1×1 convolutions": lambda: Problem(
        nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, CLASSES, 1)),
        randn(3, 2, 2, 3),
        randn(3, CLASSES, 2, 3),
        MSE(),
    ),
}

GEOMETRIES: dict[str, dict] = {
    "3×3": {"kernel_size": 3},
    "3×3 without bias": {"kernel_size": 3, "bias": False},
    "1×1": {"kernel_size": 1},
    "2×3": {"kernel_size": (2, 3), "padding": (1, 0)},
    "padding": {"kernel_size": 3, "padding": 1},
    "padding above half of the kernel": {"kernel_size": 2, "padding": 2},
    "stride": {"kernel_size": 3, "stride": 2},
    "stride, padding": {"kernel_size": 3, "stride": (2, 3), "padding": (1, 2)},
    "stride above the kernel": {"kernel_size": 1, "stride": 2},
    "stride equal to the kernel": {"kernel_size": 2, "stride": 2, "bias": False},
    "dilation": {"kernel_size": 3, "dilation": 2},
    "dilation, stride, padding": {
        "kernel_size": (2, 3),
        "dilation": (3, 2),
        "stride": (1, 2),
        "padding": (2, 1),
    },
    "same, odd kernel": {"kernel_size": 3, "padding": "same"},
    "same, even kernel": {"kernel_size": (2, 4), "padding": "same"},
    "same, dilation": {"kernel_size": (3, 2), "dilation": (1, 3), "padding": "same"},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "valid, stride": {"kernel_size": 3, "stride": 2, "padding": "valid"},
    "groups": {"kernel_size": 3, "groups": 2, "padding": 1},
    "groups without bias": {"kernel_size": 2, "groups": 2, "bias": False},
    "groups, stride, dilation": {"kernel_size": 2, "groups": 2, "stride": 2, "dilation": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "depthwise multiplier": {"kernel_size": 3, "groups": 2, "channels": 2},
} | {
    f"{mode}{name}": {"padding_mode": mode, "kernel_size": 3} | geometry
    for mode in ("circular", "reflect", "replicate")
    for name, geometry in {
        "": {"padding": 1},
        ", uneven padding, stride": {"padding": (2, 1), "stride": 2},
        ", same, even kernel": {"kernel_size": (2, 4), "padding": "same", "dilation": (2, 1)},
        ", groups": {"padding": 1, "groups": 2, "bias": False},
    }.items()
}

CONVOLUTIONS: dict[str, Callable[[], Problem]] = {
    name: partial(pooled_convolution, **geometry) for name, geometry in GEOMETRIES.items()
}

EXACT = LOSSES | NETS | CONVOLUTIONS


def build(problems: dict[str, Callable[[], Problem]], name: str) -> Problem:
    torch.manual_seed(0)
    return problems[name]()


# The references against each other


@pytest.mark.parametrize("name", NETS | CONVOLUTIONS)
def test_reference_ggn_is_the_hessian_where_the_net_is_linear(name: str) -> None:
    problem = build(EXACT, name)
    if any(isinstance(module, nn.Tanh) for module in problem.model):
        return  # only linear in its last layer; covered by the others
    for layer in oracles.layer_names(problem.model):
        module = problem.model.get_submodule(layer)

        def loss(blocks: Tensor, layer: str = layer, module: nn.Module = module) -> Tensor:
            matrix = blocks.flatten(0, 1)
            values = {f"{layer}.weight": matrix[:, : module.weight[0].numel()]}
            values[f"{layer}.weight"] = values[f"{layer}.weight"].reshape(module.weight.shape)
            if module.bias is not None:
                values[f"{layer}.bias"] = matrix[:, -1]
            output = functional_call(problem.model, values, (problem.inputs,))
            return problem.criterion(output, problem.target)

        blocks = oracles.to_blocks(module, module.weight.detach(), module.bias)
        dense = jacrev(jacrev(loss))(blocks.detach()).flatten(4).flatten(1, 2)
        expected = torch.stack([dense[g, :, g].flatten(1) for g in range(len(blocks))])
        data = problem.inputs, problem.target, problem.criterion
        close(oracles.ggn_blocks(problem.model, layer, *data), expected)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_reference_patches_times_weight_is_the_convolution(name: str) -> None:
    problem = build(CONVOLUTIONS, name)
    layer = problem.model[0]
    rows = oracles.input_rows(layer, problem.inputs, len(problem.inputs))
    weight = oracles.to_blocks(layer, layer.weight, layer.bias)
    output = torch.einsum("ntgi,goi->ntgo", rows, weight)
    close(output, oracles.output_rows(layer, layer(problem.inputs), len(problem.inputs)))


@pytest.mark.parametrize("name", EXACT)
def test_reference_fisher_block_is_a_kronecker_product(name: str) -> None:
    problem = build(EXACT, name)
    for layer in oracles.layer_names(problem.model):
        seen = observe(problem, layer)
        a = oracles.input_factor(seen, problem.sharing)
        g = oracles.exact_output_factor(seen, problem.sharing)
        data = problem.inputs, problem.target, problem.criterion
        close(oracles.kronecker(a, g), oracles.ggn_blocks(problem.model, layer, *data))


# Where the Fisher block is A ⊗ G


def check_natural_gradient(problem: Problem, **settings: object) -> None:
    moved = movement(problem, inverse="eigen", fisher="type-2", **settings)
    data = problem.inputs, problem.target, problem.criterion
    for layer, gradient in gradient_blocks(problem).items():
        fisher = oracles.ggn_blocks(problem.model, layer, *data)
        close(moved[layer], -oracles.solve(fisher, PLAIN["damping"], gradient))


@pytest.mark.promise("`nn.CrossEntropyLoss`")
@pytest.mark.promise("`nn.BCEWithLogitsLoss`")
@pytest.mark.promise("`nn.MSELoss`")
@pytest.mark.parametrize("name", EXACT)
def test_step_is_the_dense_natural_gradient(name: str) -> None:
    check_natural_gradient(build(EXACT, name))


@pytest.mark.promise('`reduction="mean"`, `"sum"` and `"none"`')
@pytest.mark.parametrize("name", LOSSES)
def test_step_is_that_of_the_mean_loss_for_a_summed_one(name: str) -> None:
    problem = build(LOSSES, name)
    moved = movement(
        replace(problem, criterion=with_sum(problem.criterion)), inverse="eigen", fisher="type-2"
    )
    for layer, expected in movement(problem, inverse="eigen", fisher="type-2").items():
        close(moved[layer], expected)


def test_weight_sharing_may_depend_on_the_layer() -> None:
    problem = build(CONVOLUTIONS, "padding")
    by_layer = {"0": "reduce", "3": "expand"}
    assert list(by_layer) == oracles.layer_names(problem.model)
    check_natural_gradient(problem, weight_sharing=lambda name, module: by_layer[name])


# Where A ⊗ G is an approximation: factors written out


class Mixer(nn.Module):
    """A linear net that mixes positions between its two layers."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 3), nn.Linear(3, 2)
        self.activation = activation
        self.register_buffer("mix", torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.activation(torch.einsum("st,ntd->nsd", self.mix, self.embed(x))))


class Twice(nn.Module):
    """A layer that is called twice: its calls count as positions."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).tanh()).tanh())


class Windows(nn.Module):
    """A layer that sees two windows per example in its leading dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 3), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        windows = self.inner(x.unflatten(1, (2, -1)).flatten(0, 1)).tanh()
        return self.head(windows.unflatten(0, (len(x), -1)).mean(dim=(1, 2)))


class LastDimension(nn.Module):
    """Brings the classes from the last dimension to the one where cross-entropy wants them."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


def convolution_net(**geometry: object) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, **geometry),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d((1, 2)),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )


def general_classifier(criterion: nn.Module, terms: float) -> Problem:
    return Problem(tanh_net(), randn(6, 5), labels(6), criterion, terms=terms)


def general_convolution(**geometry: object) -> Problem:
    return Problem(convolution_net(**geometry), randn(4, 2, 6, 5), labels(4), CE(), terms=4)


GENERAL: dict[str, Callable[[], Problem]] = {
    "classifier": lambda: general_classifier(CE(), 6),
    "class weights": lambda: general_classifier(CE(CLASS_WEIGHTS), 2 * CLASS_WEIGHTS.sum().item()),
    "class weights, label smoothing, ignore_index": lambda: general_classifier(
        CE(CLASS_WEIGHTS, ignore_index=1, label_smoothing=0.2),
        2 * (CLASS_WEIGHTS[0] + CLASS_WEIGHTS[2]).item(),
    ),
    "regression": lambda: Problem(
        tanh_net(), randn(6, 5), randn(6, CLASSES), MSE(), terms=6 * CLASSES
    ),
    "binary, pos_weight": lambda: Problem(
        tanh_net(),
        randn(6, 5),
        rand(6, CLASSES).round(),
        BCE(pos_weight=CLASS_WEIGHTS),
        terms=6 * CLASSES,
    ),
    "language model": lambda: Problem(
        nn.Sequential(tanh_net(), LastDimension()), randn(3, 4, 5), labels(3, 4), CE(), terms=12
    ),
    "language model on a flat batch": lambda: Problem(
        nn.Sequential(tanh_net(), nn.Flatten(0, 1)), randn(3, 4, 5), labels(12), CE(), terms=12
    ),
    "linear net that mixes positions": lambda: Problem(
        Mixer(nn.Identity()), randn(4, 3, 4), randn(4, 2, 2), MSE(), terms=16
    ),
    "net that mixes positions": lambda: Problem(
        Mixer(nn.Tanh()), randn(4, 3, 4), randn(4, 2, 2), MSE(), terms=16
    ),
    "layer called twice": lambda: Problem(Twice(), randn(6, 4), labels(6), CE(), terms=6),
    "windows": lambda: Problem(Windows(), randn(3, 6, 4), labels(3), CE(), terms=3),
    "convolution": lambda: general_convolution(kernel_size=3),
    "convolution, stride, padding": lambda: general_convolution(
        kernel_size=(3, 2), stride=2, padding=1
    ),
    "convolution, dilation": lambda: general_convolution(kernel_size=2, dilation=2, bias=False),
    "convolution, circular": lambda: general_convolution(
        kernel_size=3, padding=2, padding_mode="circular"
    ),
    "convolution, groups": lambda: general_convolution(kernel_size=3, groups=2, padding="same"),
    "segmentation": lambda: Problem(
        nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, CLASSES, 1)),
        randn(2, 2, 3, 3),
        labels(2, 3, 3),
        CE(CLASS_WEIGHTS, ignore_index=1),
        terms=6 * (CLASS_WEIGHTS[0] + CLASS_WEIGHTS[2]).item(),
    ),
}

SOLVES = {
    "eigen": oracles.solve_exact_damping,
    "cholesky": oracles.solve_factored_damping,
    "newton-schulz": oracles.solve_factored_damping,
}


def output_factor(problem: Problem, layer: oracles.Layer, fisher: str) -> Tensor:
    if fisher == "empirical":
        return oracles.empirical_output_factor(layer, problem.terms, problem.sharing)
    if fisher == "forward-only":
        return oracles.identity_output_factor(layer)
    return oracles.exact_output_factor(layer, problem.sharing)


def check_factors(problem: Problem, inverse: str, fisher: str, **settings: object) -> None:
    moved = movement(problem, inverse=inverse, fisher=fisher, **settings)
    for name, gradient in gradient_blocks(problem).items():
        layer = observe(problem, name)
        a = oracles.input_factor(layer, problem.sharing)
        g = output_factor(problem, layer, fisher)
        # an identity factor has nothing to damp: the other takes all of λ, which is exact
        solve = SOLVES["eigen" if fisher == "forward-only" else inverse]
        close(moved[name], -solve(a, g, PLAIN["damping"], gradient))


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", GENERAL)
def test_step_is_the_solve_with_explicit_factors(name: str, sharing: str, fisher: str) -> None:
    problem = replace(build(GENERAL, name), sharing=sharing)
    check_factors(problem, "eigen", fisher)
    check_factors(problem, "cholesky", fisher)
    check_factors(problem, "newton-schulz", fisher)


@pytest.mark.parametrize("inverse", ["cholesky", "newton-schulz"])
@pytest.mark.parametrize("name", EXACT)
def test_stored_inverses_are_the_dense_factored_damping(name: str, inverse: str) -> None:
    check_factors(build(EXACT, name), inverse, "type-2")


@pytest.mark.parametrize("name", ["classifier", "language model", "convolution, groups"])
@pytest.mark.parametrize("fisher", ["empirical", "forward-only"])
def test_without_criterion_the_loss_terms_are_the_examples(name: str, fisher: str) -> None:
    problem = build(GENERAL, name)
    problem.terms = len(problem.inputs)
    check_factors(problem, "eigen", fisher, criterion=None)


def test_loss_terms_override_the_batch_size() -> None:
    problem = build(GENERAL, "language model")
    check_factors(problem, "eigen", "empirical", criterion=None, loss_terms=12)


@pytest.mark.parametrize("name", ["classifier", "net that mixes positions", "convolution"])
def test_factors_are_public_in_the_layout_of_the_weight(name: str) -> None:
    problem = build(GENERAL, name)
    optimizer, trained = start(problem, fisher="type-2")
    train_step(optimizer, trained)
    for name in oracles.layer_names(problem.model):
        a, g = optimizer.factor(name)
        layer = observe(problem, name)
        close(a, oracles.input_factor(layer))
        close(g, oracles.exact_output_factor(layer))


def test_factors_keep_their_precision_under_autocast() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = KFAC(model, **PLAIN, fisher="empirical")
    x, y = torch.randn(40, 5), torch.arange(40) % 3
    gradients = []

    def listen(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(gradients.append)

    model[0].register_forward_hook(listen)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    a, g = optimizer.factor("0")
    assert a.dtype == g.dtype == torch.float32
    rows = torch.cat([x, torch.ones(40, 1)], dim=1).double()
    delivered = gradients[0].double()
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-7)
    close(a[0].double(), rows.T @ rows / 40)
    close(g[0].double(), 40 * delivered.T @ delivered)


# Sampled Fisher

SAMPLED = {
    name: GENERAL[name]
    for name in (
        "classifier",
        "class weights, label smoothing, ignore_index",
        "regression",
        "binary, pos_weight",
        "language model",
        "net that mixes positions",
        "layer called twice",
        "segmentation",
    )
} | {
    "probability targets": lambda: replace(
        general_classifier(CE(CLASS_WEIGHTS), 6), target=probabilities(6, CLASSES)
    ),
}


def sampled_factors(
    problem: Problem, draws: int, **settings: object
) -> dict[str, tuple[Tensor, Tensor]]:
    """A and G of every draw, `[draws, groups, d, d]`, by layer."""
    still = {"fisher": "mc", "lr": 0.0, "factor_decay": 0.0, "seed": 1}
    optimizer, trained = start(problem, **still | settings)
    drawn: dict[str, list] = {name: [] for name in oracles.layer_names(problem.model)}
    for _ in range(draws):
        train_step(optimizer, trained)
        for name in drawn:
            drawn[name].append([factor.clone() for factor in optimizer.factor(name)])
    return {
        name: tuple(map(torch.stack, zip(*pairs, strict=True))) for name, pairs in drawn.items()
    }


def check_sampled_fisher(problem: Problem, draws: int = 200, **settings: object) -> None:
    for name, (a, g) in sampled_factors(problem, draws, **settings).items():
        layer = observe(problem, name)
        expected = oracles.input_factor(layer, problem.sharing)
        close(a, expected.expand_as(a))
        error = (g.mean(0) - oracles.exact_output_factor(layer, problem.sharing)).abs()
        bound = 5 * g.std(0) / draws**0.5
        assert (g.std(0) > 0).any()
        assert (error <= bound + 1e-12).all(), (name, (error / bound).max())


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_fisher_is_unbiased(name: str) -> None:
    check_sampled_fisher(build(SAMPLED, name))


def test_sampled_fisher_is_unbiased_with_several_samples() -> None:
    check_sampled_fisher(build(SAMPLED, "classifier"), num_samples=3)


def test_sampled_fisher_is_unbiased_with_reduced_positions() -> None:
    problem = build(SAMPLED, "net that mixes positions")
    check_sampled_fisher(replace(problem, sharing="reduce"))


def test_several_samples_reduce_the_variance() -> None:
    problem = build(SAMPLED, "classifier")

    def spread(num_samples: int) -> float:
        _, g = sampled_factors(problem, 100, num_samples=num_samples)["0"]
        return g.var(0).sum().item()

    assert spread(8) < spread(1) / 4


# Update rule: exact curvature at every iterate, then torch's SGD

UPDATES: dict[str, dict] = {
    "plain": {"lr": 0.3},
    "momentum": {"lr": 0.3, "momentum": 0.8},
    "nesterov": {"lr": 0.3, "momentum": 0.8, "nesterov": True},
    "weight decay": {"lr": 0.3, "weight_decay": 0.1},
    "momentum, weight decay": {"lr": 0.3, "momentum": 0.8, "weight_decay": 0.1},
    "all": {"lr": 0.3, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
}


def check_updates(rule: dict, clip: float | None = None, maximize: bool = False) -> None:
    problem = build(NETS, "deep linear net")
    settings = {"factor_decay": 0.0, "kl_clip": clip, "maximize": maximize} | rule
    optimizer, trained = start(problem, inverse="eigen", fisher="type-2", **settings)
    rules = {name: oracles.Descent(**rule) for name in oracles.layer_names(problem.model)}
    sign = -1.0 if maximize else 1.0
    for _ in range(3):
        problem.model.load_state_dict(trained.model.state_dict())
        data = problem.inputs, problem.target, problem.criterion
        gradients = {name: sign * g for name, g in gradient_blocks(problem).items()}
        directions = {
            name: oracles.solve(
                oracles.ggn_blocks(problem.model, name, *data), PLAIN["damping"], gradient
            )
            for name, gradient in gradients.items()
        }
        scale = 1.0
        if clip is not None:
            scale = oracles.clip_scale(directions.values(), gradients.values(), rule["lr"], clip)
            assert scale < 1
        train_step(optimizer, trained)
        before, after = parameters(problem), parameters(trained)
        for name, update in rules.items():
            close(after[name], update(before[name], scale * directions[name]))


@pytest.mark.parametrize("name", UPDATES)
def test_update_is_that_of_sgd_with_decoupled_weight_decay(name: str) -> None:
    check_updates(UPDATES[name])


@pytest.mark.parametrize("name", ["plain", "all"])
def test_kl_clip_scales_the_step_before_momentum_and_weight_decay(name: str) -> None:
    check_updates(UPDATES[name], clip=1e-3)


def test_kl_clip_leaves_a_small_step_alone() -> None:
    problem = build(NETS, "deep linear net")
    clipped = movement(problem, kl_clip=1e6, inverse="eigen", fisher="type-2")
    for name, expected in movement(problem, inverse="eigen", fisher="type-2").items():
        close(clipped[name], expected)


def test_maximize_ascends() -> None:
    check_updates(UPDATES["plain"], maximize=True)
