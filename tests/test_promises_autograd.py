"""Autograd used in other ways than `model(x)`, `backward()`, `step()`: the factors stay right.

Loops that must count as the plain one are compared with it in float64, factors and steps; what must
not count has to leave statistics, counters and factors bit-identical.
"""

import copy
import pickle
from collections.abc import Callable, Iterable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_exactness import PLAIN, close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac import KFAC, LevenbergMarquardt
from kfac.recorder import Recorder

# Torch's own, of `torch.func.jvp` and of nested reentrant regions.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad"),
]

FISHERS: dict[str, dict[str, Any]] = {
    "empirical": {"fisher": "empirical"},
    "empirical with a criterion": {"fisher": "empirical", "criterion": True},
    "forward-only": {"fisher": "forward-only"},
    "mc": {"fisher": "mc", "criterion": True},
    "type-2": {"fisher": "type-2", "criterion": True},
}
BY_BACKWARD = ["empirical", "empirical with a criterion", "forward-only"]
CURVATURES: dict[str, dict[str, Any]] = {
    "expand": {},
    "reduce": {"weight_sharing": "reduce"},
    "reduce and ekfac": {"inverse": "ekfac", "weight_sharing": "reduce"},
}


def curvatures(fishers: Iterable[str]) -> list[Any]:
    """Every Fisher with every way to take its statistics."""
    return [
        pytest.param(FISHERS[fisher] | CURVATURES[name], id=f"{fisher}-{name}")
        for fisher, name in product(fishers, CURVATURES)
        if ("ekfac" in name) != (fisher == "forward-only") or name == "expand"
    ]


ONE_EACH = [
    pytest.param(FISHERS[fisher] | CURVATURES[name], id=f"{fisher}-{name}")
    for fisher, name in (
        ("empirical", "reduce and ekfac"),
        ("empirical with a criterion", "expand"),
        ("forward-only", "reduce"),
        ("mc", "reduce and ekfac"),
        ("type-2", "expand"),
    )
]


def make(model: nn.Module, settings: dict[str, Any], **others: Any) -> tuple[KFAC, nn.Module]:
    criterion = nn.CrossEntropyLoss()
    chosen = PLAIN | {"lr": 0.3, "damping": 0.05} | settings | others
    if chosen.get("criterion"):
        chosen["criterion"] = criterion
    return KFAC(model, **chosen), criterion


def state_of(optimizer: KFAC) -> list[Any]:
    """All numbers that a stray pass could change, as they are."""
    optimizer._engine.capture.statistics.flush()
    found: list[Any] = [optimizer.diagnostics(), optimizer._engine.capture.terms]

    def collect(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                collect(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                collect(item)
        else:
            found.append(value)

    collect(optimizer.state_dict())
    for bucket in optimizer._engine.blocks.buckets:
        collect(bucket.pending)
    return found


# Activation checkpointing

Run = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]
RUNS: dict[str, Run] = {
    "plain": lambda function, x: function(x),
    "non-reentrant": partial(checkpoint, use_reentrant=False),
    "reentrant": partial(checkpoint, use_reentrant=True),
}


class Recomputed(nn.Module):
    """Two layers on every position of a sequence, then one; regions are run by `run`."""

    def __init__(self, regions: str, run: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()
        self.regions, self.run = regions, RUNS[run]

    def forward(self, x: Tensor) -> Tensor:
        run, first, inner = self.run, self.first, self.inner
        if self.regions == "all":
            return run(lambda z: self.head(inner(first(z).tanh()).tanh().mean(1)), x)
        if self.regions == "nested":
            x = run(lambda z: run(lambda u: inner(u).tanh(), first(z).tanh()).sin(), x)
        elif self.regions == "nested, nothing else inside":
            x = run(lambda z: run(lambda u: inner(first(u)).tanh(), z), x)
        elif self.regions == "a module twice inside":
            x = run(lambda z: inner(inner(z).tanh()), first(x))
        elif self.regions == "a module in two regions":
            x = run(lambda z: inner(z).tanh(), run(lambda z: inner(z).tanh(), first(x)))
        elif self.regions == "a module inside and outside":
            x = run(lambda z: inner(z).tanh(), inner(first(x)).tanh())
        return self.head(x.mean(1))


REGIONS = [
    "all", "nested", "nested, nothing else inside", "a module twice inside",
    "a module in two regions", "a module inside and outside",
]  # fmt: skip


def sequences(examples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 3, 4, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.randint(3, (examples,), generator=generator)


def one_call(model: nn.Module, criterion: nn.Module, optimizer: KFAC, step: int) -> None:
    x, y = sequences(6, step)
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()


def two_calls(model: nn.Module, criterion: nn.Module, optimizer: KFAC, step: int) -> None:
    """Of different sizes, before one backward pass."""
    (x, y), (other_x, other_y) = sequences(6, step), sequences(4, step + 10)
    optimizer.zero_grad()
    (criterion(model(x), y) + criterion(model(other_x), other_y)).backward()
    optimizer.step()


def a_call_in_between(model: nn.Module, criterion: nn.Module, optimizer: KFAC, step: int) -> None:
    """A call with gradients enabled and without a backward pass."""
    (x, y), (other_x, _) = sequences(6, step), sequences(4, step + 10)
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    model(other_x)
    loss.backward()
    optimizer.step()


def two_passes(model: nn.Module, criterion: nn.Module, optimizer: KFAC, step: int) -> None:
    """Through one graph."""
    x, y = sequences(6, step)
    optimizer.zero_grad()
    output = model(x)
    criterion(output, y).backward(retain_graph=True)
    criterion(output.flip(0), y).backward()
    optimizer.step()


LOOPS = [one_call, two_calls, a_call_in_between, two_passes]


def outcomes(regions: str, run: str, settings: dict[str, Any]) -> dict[str, list[Tensor | None]]:
    """Parameters and factors after a step of every loop."""
    model = Recomputed(regions, run)
    optimizer, criterion = make(model, settings)
    found = {}
    for step, loop in enumerate(LOOPS):
        loop(model, criterion, optimizer, step)
        factors = [f for layer in optimizer._engine.layers for f in optimizer.factor(layer.name)]
        found[loop.__name__] = [p.detach().clone() for p in model.parameters()] + factors
    return found


@pytest.mark.promise("`use_reentrant=False`")
@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("settings", ONE_EACH)
def test_checkpointing_changes_nothing(settings: dict[str, Any], regions: str) -> None:
    close(outcomes(regions, "non-reentrant", settings), outcomes(regions, "plain", settings))


@pytest.mark.promise("`use_reentrant=True`")
@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("settings", curvatures(BY_BACKWARD))
def test_reentrant_checkpointing_changes_nothing(settings: dict[str, Any], regions: str) -> None:
    close(outcomes(regions, "reentrant", settings), outcomes(regions, "plain", settings))


@pytest.mark.promise("`use_reentrant=True`")
@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("fisher", ["mc", "type-2"])
def test_reentrant_checkpointing_is_refused_by_a_fisher_pass(fisher: str, regions: str) -> None:
    model = Recomputed(regions, "reentrant")
    optimizer, criterion = make(model, FISHERS[fisher])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"[Ll]ayer .*Fisher pass.*use_reentrant=False"):
        one_call(model, criterion, optimizer, 0)
    assert all(map(torch.equal, model.parameters(), before))
    assert optimizer.diagnostics()["steps"] == optimizer.diagnostics()["factor_updates"] == 0


class Fused(torch.autograd.Function):
    """An identity, as a stand-in for any function that is not torch's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Conditioned(nn.Module):
    """A layer that is called without gradients, too; nothing is run again in a backward pass."""

    def __init__(self, kind: str, is_fused: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.is_fused = kind, is_fused
        self.head, self.target = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
        if kind == "on itself":
            del self.target

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            hidden = (self.head if self.kind == "on itself" else self.target)(x)
        output = self.head(x + hidden.mean(-1, keepdim=True)).mean(1)
        return Fused.apply(output) if self.is_fused else output


@pytest.mark.promise("`use_reentrant=True`")
@pytest.mark.promise("derivatives by an input (`autograd.grad(loss, x)`: attacks, saliency)")
@pytest.mark.parametrize("kind", ["on itself", "on a layer that has no other use"])
@pytest.mark.parametrize("settings", ONE_EACH)
def test_layers_called_without_gradients_are_not_taken_for_checkpointing(
    settings: dict[str, Any], kind: str
) -> None:
    terms = []
    for is_attacked in (False, True):
        model = Conditioned(kind)
        optimizer, criterion = make(model, settings)
        x, y = sequences(6)
        if is_attacked:
            torch.autograd.grad(criterion(model(x), y), x)
            output = model(x)
            torch.autograd.grad(criterion(output, y), output)
        assert float(optimizer._engine.capture.terms) == 0
        criterion(model(x), y).backward()
        terms.append(float(optimizer._engine.capture.terms))
    assert terms == [6, 6]


@pytest.mark.promise("`use_reentrant=True`")
@pytest.mark.parametrize("settings", [FISHERS["empirical"], FISHERS["empirical with a criterion"]])
def test_a_derivative_by_the_output_of_a_checkpointed_model_counts_no_terms(
    settings: dict[str, Any],
) -> None:
    optimizer, criterion = make(model := Recomputed("all", "reentrant"), settings)
    x, y = sequences(6)
    output = model(x)
    torch.autograd.grad(criterion(output, y), output, retain_graph=True)
    assert float(optimizer._engine.capture.terms) == 0
    criterion(output, y).backward()
    assert float(optimizer._engine.capture.terms) == 6


def call_through_a_checkpoint(
    run: str, settings: dict[str, Any], loss: Callable[..., Tensor] | None = None
) -> list[Tensor | None]:
    """The model as a whole is run by `run`, twice before a backward pass."""
    model = Recomputed("nested", "plain")
    optimizer, criterion = make(model, settings)
    loss = loss or criterion
    for step in range(3):
        (x, y), (other_x, other_y) = sequences(6, step), sequences(4, step + 10)
        optimizer.zero_grad()
        (loss(RUNS[run](model, x), y) + loss(RUNS[run](model, other_x), other_y)).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()] + list(optimizer.factor("inner"))


@pytest.mark.promise("`use_reentrant=False`")
@pytest.mark.parametrize("settings", ONE_EACH)
def test_the_whole_model_may_be_checkpointed(settings: dict[str, Any]) -> None:
    for loss in (None, F.cross_entropy):
        expected = call_through_a_checkpoint("plain", settings, loss)
        close(call_through_a_checkpoint("non-reentrant", settings, loss), expected)


@pytest.mark.promise("`use_reentrant=True`")
@pytest.mark.parametrize("settings", curvatures(BY_BACKWARD))
def test_the_whole_model_may_be_checkpointed_reentrantly(settings: dict[str, Any]) -> None:
    for loss in (None, F.cross_entropy):
        expected = call_through_a_checkpoint("plain", settings, loss)
        close(call_through_a_checkpoint("reentrant", settings, loss), expected)


@pytest.mark.promise("`use_reentrant=True`")
@pytest.mark.parametrize("loss", [None, F.cross_entropy])
@pytest.mark.parametrize("fisher", ["mc", "type-2"])
def test_a_reentrant_checkpoint_of_the_whole_model_is_refused_by_a_fisher_pass(
    fisher: str, loss: Callable[..., Tensor] | None
) -> None:
    with pytest.raises(RuntimeError, match=r"layer .*Fisher pass.*use_reentrant=False"):
        call_through_a_checkpoint("reentrant", FISHERS[fisher], loss)


@pytest.mark.promise("a second `backward` through the same graph (`retain_graph=True`)")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_every_backward_pass_through_a_graph_adds_its_own_gradients(sharing: str) -> None:
    model, (x, y) = nn.Linear(4, 3).double(), sequences(6)
    optimizer, _ = make(model, {"fisher": "empirical", "weight_sharing": sharing})
    output = model(x)
    targets = [y.view(6, 1).expand(6, 3), y.flip(0).view(6, 1).expand(6, 3)]
    losses = [F.cross_entropy(output.mT, target) for target in targets]
    expected = torch.zeros(3, 3, dtype=torch.float64)
    for loss in losses:
        (gradient,) = torch.autograd.grad(loss, output, retain_graph=True)
        rows = gradient.flatten(0, 1) if sharing == "expand" else gradient.sum(1)
        expected += 6 * rows.T @ rows
    losses[0].backward(retain_graph=True)
    losses[1].backward()
    optimizer.step()
    close(optimizer.factor("")[1][0], expected)


# Derivatives of derivatives

ACCUMULATES = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    x, y = sequences(6, step)
    return x[:, 0].detach(), y


@ACCUMULATES
@pytest.mark.promise("`backward(create_graph=True)`")
@pytest.mark.parametrize("settings", curvatures(FISHERS))
def test_a_training_pass_may_create_a_graph(settings: dict[str, Any]) -> None:
    results = []
    for create_graph in (False, True):
        model = net()
        optimizer, criterion = make(model, settings)
        for step in range(3):
            x, y = batch(step)
            optimizer.zero_grad()
            criterion(model(x), y).backward(create_graph=create_graph)
            for parameter in model.parameters():
                parameter.grad = parameter.grad.detach()  # breaks the cycle, as torch advises
            optimizer.step()
        results.append([p.detach() for p in model.parameters()] + list(optimizer.factor("0")))
    close(*results)


@pytest.mark.promise("derivatives of gradients (Hessian-vector products)")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_gradients_by_hand_with_a_graph_are_refused_with_the_cause(
    fisher: str, reduction: str
) -> None:
    model = net()
    optimizer, criterion = make(model, FISHERS[fisher])
    if reduction == "sum":
        criterion = nn.CrossEntropyLoss(reduction="sum")
        chosen = FISHERS[fisher]
        extra = {"criterion": criterion} if "criterion" in chosen else {"loss_reduction": "sum"}
        optimizer = KFAC(model, **PLAIN | chosen | extra)
    parameters, (x, y) = list(model.parameters()), batch()
    before = [p.detach().clone() for p in parameters]
    gradients = torch.autograd.grad(criterion(model(x), y), parameters, create_graph=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.detach()
    with pytest.raises(RuntimeError, match=r"loss\.backward\(create_graph=True\)"):
        optimizer.step()
    assert all(map(torch.equal, parameters, before))


# What leaves the factors alone. Each gets the model, the criterion, a batch and its output.

Disturbance = Callable[[nn.Module, nn.Module, Tensor, Tensor, Tensor], object]


def no_grad(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, _: Tensor) -> None:
    with torch.no_grad():
        criterion(model(3 * x), y)


def inference_mode(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, _: Tensor) -> None:
    with torch.inference_mode():
        criterion(model(3 * x[:2]), y[:2])


def evaluation(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, _: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        criterion(model(3 * x[:2]), y[:2])
    model.train()


def evaluation_with_gradients(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, _: Tensor
) -> None:
    model.eval()
    model(3 * x[:2])
    model.train()


def saliency(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, _: Tensor) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(criterion(model(x), y), x)


def an_inner_derivative(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, _: Tensor
) -> None:
    x = x.clone().requires_grad_()
    torch.autograd.grad(criterion(model(x), y), x, create_graph=True)


def jacobian(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, _: Tensor) -> None:
    torch.autograd.functional.jacobian(model, x)


def hessian_vector_product(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, _: Tensor
) -> None:
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(criterion(model(x), y), parameters, create_graph=True)
    torch.autograd.grad(gradients, parameters, [torch.ones_like(p) for p in parameters])


def derivatives_by_parameters(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, output: Tensor
) -> None:
    """Of the training loss and of another one, to log or to weigh losses by."""
    parameters = list(model.parameters())
    torch.autograd.grad(criterion(output, y), parameters[:2], retain_graph=True)
    torch.autograd.grad(criterion(model(2 * x), y), parameters)


def functional_transforms(
    model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, _: Tensor
) -> None:
    own = {name: p.detach() for name, p in model.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return criterion(torch.func.functional_call(model, values, (x,)), y)

    torch.func.grad(loss)(own)
    torch.func.jvp(loss, (own,), (own,))
    torch.func.vmap(lambda z: torch.func.functional_call(model, own, (z,)))(x)


def other_weights(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, _: Tensor) -> None:
    """Those of another model, which are trained, and some made of the model's own."""
    others = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
    criterion(torch.func.functional_call(model, others, (x,)), y).backward()
    assert others["0.weight"].grad is not None
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    made = {name: 2 * p for name, p in model.named_parameters()}
    criterion(torch.func.functional_call(model, made, (x,)), y).backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient


def a_copy(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, _: Tensor) -> None:
    other = copy.deepcopy(model)
    F.cross_entropy(other(3 * x), y).backward()
    F.cross_entropy(pickle.loads(pickle.dumps(model))(3 * x), y).backward()


DISTURBANCES: list[Disturbance] = [
    no_grad, inference_mode, evaluation, evaluation_with_gradients, saliency, an_inner_derivative,
    jacobian, hessian_vector_product, functional_transforms, other_weights, a_copy,
]  # fmt: skip


@pytest.mark.promise("evaluation, logging, `no_grad` between steps")
@pytest.mark.promise("derivatives by an input (`autograd.grad(loss, x)`: attacks, saliency)")
@pytest.mark.promise("derivatives of gradients (Hessian-vector products)")
@pytest.mark.promise("`torch.func` transforms of the model or the criterion")
@pytest.mark.promise("`torch.func.functional_call` with other weights")
@pytest.mark.promise("a copied or pickled model")
@pytest.mark.parametrize("disturb", DISTURBANCES)
@pytest.mark.parametrize("settings", ONE_EACH)
def test_the_factors_are_left_alone(settings: dict[str, Any], disturb: Disturbance) -> None:
    model = net()
    optimizer, criterion = make(model, settings, momentum=0.9)
    for step in range(2):
        x, y = batch(step)
        optimizer.zero_grad()
        output = model(x)
        loss = criterion(output, y)
        for is_over in (False, True):
            before = copy.deepcopy(state_of(optimizer))
            disturb(model, criterion, x, y, output)
            assert_identical(state_of(optimizer), before)
            if not is_over:
                loss.backward()
        optimizer.step()


@pytest.mark.promise("evaluation, logging, `no_grad` between steps")
@pytest.mark.promise("gradients from `torch.autograd.grad(loss, parameters)`")
@pytest.mark.parametrize("disturb", [*DISTURBANCES, derivatives_by_parameters])
@pytest.mark.parametrize("settings", ONE_EACH)
def test_a_disturbed_run_is_the_same(settings: dict[str, Any], disturb: Disturbance) -> None:
    results = []
    for is_disturbed in (False, True):
        model = net()
        optimizer, criterion = make(model, settings, momentum=0.9)
        for step in range(2):
            x, y = batch(step)
            optimizer.zero_grad()
            output = model(x)
            loss = criterion(output, y)
            if is_disturbed:
                disturb(model, criterion, x, y, output)
            loss.backward(retain_graph=True)
            if is_disturbed:
                disturb(model, criterion, x, y, output)
            optimizer.step()
            if is_disturbed:
                disturb(model, criterion, x, y, model(x))
        results.append([p.detach() for p in model.parameters()] + list(optimizer.factor("0")))
    assert_identical(*results)


def assert_identical(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other) if isinstance(mine, Tensor) else mine == other


@pytest.mark.promise("`torch.func.functional_call` with the model's own weights")
@pytest.mark.parametrize("settings", ONE_EACH)
def test_a_functional_call_with_the_own_weights_is_a_call(settings: dict[str, Any]) -> None:
    results = []
    for is_functional in (False, True):
        model = net()
        optimizer, criterion = make(model, settings)
        for step in range(2):
            x, y = batch(step)
            optimizer.zero_grad()
            own = dict(model.named_parameters())
            output = torch.func.functional_call(model, own, (x,)) if is_functional else model(x)
            criterion(output, y).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()] + list(optimizer.factor("0")))
    assert_identical(*results)


def adapted_loss(model: nn.Module, criterion: nn.Module, *, to_differentiate: bool) -> Tensor:
    """The loss after a gradient step, as a function of the parameters before it (MAML)."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    x, y = batch(0)
    gradients = torch.autograd.grad(
        criterion(model(x), y), parameters, create_graph=to_differentiate
    )
    values = [p - 0.1 * g for p, g in zip(parameters, gradients, strict=True)]
    x, y = batch(1)
    output = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
    return criterion(output, y)


@pytest.mark.promise("`torch.func.functional_call` with other weights")
@pytest.mark.parametrize("to_differentiate", [False, True])
@pytest.mark.parametrize("settings", ONE_EACH)
def test_a_loss_after_an_inner_step_is_refused_with_the_cause(
    settings: dict[str, Any], to_differentiate: bool
) -> None:
    model = net()
    optimizer, criterion = make(model, settings)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    adapted_loss(model, criterion, to_differentiate=to_differentiate).backward()
    with pytest.raises(RuntimeError, match=r"other weights.*functional_call"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert optimizer.diagnostics()["factor_updates"] == 0


# Gradient penalties


def critic_loss(
    critic: nn.Module, loss: Callable[..., Tensor], step: int, *, penalty: float
) -> Tensor:
    """Of a critic between two clouds of points, with a gradient penalty between them (WGAN-GP)."""
    real, _ = batch(step)
    fake, weight = real.flip(0) * 0.5 + 1, torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
    ones = torch.ones(6, 1, dtype=torch.float64)
    total = loss(critic(real), ones) + loss(critic(fake), 0 * ones)
    if penalty:
        between = (weight * real + (1 - weight) * fake).requires_grad_()
        score = critic(between)
        (slope,) = torch.autograd.grad(score, between, torch.ones_like(score), create_graph=True)
        total = total + penalty * (slope.norm(dim=1) - 1).square().mean()
    return total


def critic() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def with_squares(fisher: str) -> tuple[dict[str, Any], nn.Module]:
    criterion = nn.MSELoss()
    settings = PLAIN | FISHERS[fisher] | {"lr": 0.1}
    return settings | ({"criterion": criterion} if "criterion" in settings else {}), criterion


@pytest.mark.promise("`create_graph=True` inside the loss (gradient penalties)")
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_gradient_penalty_trains_with_the_gradients_of_a_plain_run(fisher: str) -> None:
    model = critic()
    settings, criterion = with_squares(fisher)
    optimizer, losses = KFAC(model, **settings), []
    for _ in range(8):
        twin = critic()
        twin.load_state_dict(model.state_dict())
        expected = torch.autograd.grad(
            critic_loss(twin, F.mse_loss, 0, penalty=1.0), list(twin.parameters())
        )
        optimizer.zero_grad()
        loss = critic_loss(model, criterion, 0, penalty=1.0)
        loss.backward()
        assert_identical([p.grad for p in model.parameters()], list(expected))
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


@pytest.mark.promise("`create_graph=True` inside the loss (gradient penalties)")
@pytest.mark.parametrize("fisher", ["mc", "type-2"])
def test_a_gradient_penalty_adds_no_curvature_to_a_likelihood(fisher: str) -> None:
    factors = []
    for penalty in (0.0, 1.0):
        model = critic()
        settings, criterion = with_squares(fisher)
        optimizer = KFAC(model, **settings)
        critic_loss(model, criterion, 0, penalty=penalty).backward()
        optimizer.step()
        factors.append([*optimizer.factor("0"), *optimizer.factor("2")])
    assert_identical(*factors)


@pytest.mark.promise("`create_graph=True` inside the loss (gradient penalties)")
@pytest.mark.parametrize("fisher", ["empirical", "empirical with a criterion"])
def test_the_empirical_fisher_has_the_gradients_of_loss_and_penalty(fisher: str) -> None:
    plain, inputs, zeros = critic(), [], []

    def perturb(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(F.pad(args[0].detach(), (0, 1), value=1.0))
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[-1]

    plain[0].register_forward_hook(perturb)
    loss = critic_loss(plain, F.mse_loss, 0, penalty=1.0)
    gradients, rows = torch.cat(torch.autograd.grad(loss, zeros)), torch.cat(inputs)

    model = critic()
    settings, criterion = with_squares(fisher)
    optimizer = KFAC(model, **settings)
    critic_loss(model, criterion, 0, penalty=1.0).backward()
    optimizer.step()
    a, g = optimizer.factor("0")
    close(a[0], rows.T @ rows / 18)
    close(g[0], 12 * gradients.T @ gradients)  # 12 terms, of two means


@pytest.mark.promise("`create_graph=True` inside the loss (gradient penalties)")
def test_an_automatic_step_minimises_a_loss_with_a_gradient_penalty() -> None:
    model, criterion, losses = critic(), nn.MSELoss(), []
    optimizer = KFAC(
        model, lr="auto", momentum="auto", damping=LevenbergMarquardt(), criterion=criterion
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = critic_loss(model, criterion, 0, penalty=1.0)
        loss.backward()
        return loss

    for _ in range(8):
        losses.append(optimizer.step(closure).item())
    assert losses[-1] < 0.5 * losses[0]


# Hooks of others

Log = list[str]


def on_forward(model: nn.Module, log: Log) -> None:
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, n=name: log.append(f"before {n}"))
        module.register_forward_hook(lambda *_, n=name: log.append(f"after {n}"))


def on_module_backward(model: nn.Module, log: Log) -> None:
    for name, module in model.named_modules():
        module.register_full_backward_pre_hook(lambda *_, n=name: log.append(f"before {n}"))
        module.register_full_backward_hook(lambda *_, n=name: log.append(f"after {n}"))


def on_activations(model: nn.Module, log: Log) -> None:
    def watch(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: log.append("gradient"))

    for module in model.modules():
        module.register_forward_hook(watch)


def on_parameters(model: nn.Module, log: Log) -> None:
    for name, parameter in model.named_parameters():
        parameter.register_hook(lambda _, n=name: log.append(f"gradient of {n}"))
        parameter.register_post_accumulate_grad_hook(lambda _, n=name: log.append(f"added to {n}"))


def hooked_run(
    settings: dict[str, Any] | None,
    add_hooks: Callable[[nn.Module, Log], None] | None,
    when: str = "before",
) -> tuple[list[Any], Log]:
    """Parameters and factors after two steps, with hooks put on before or after the optimizer."""
    model, log = net(), Log()
    if add_hooks and when == "before":
        add_hooks(model, log)
    optimizer: Any = torch.optim.SGD(model.parameters())
    criterion: nn.Module = nn.CrossEntropyLoss()
    if settings is not None:
        optimizer, criterion = make(model, settings)
    if add_hooks and when == "after":
        add_hooks(model, log)
    for step in range(2):
        x, y = batch(step)
        optimizer.zero_grad()
        criterion(model(x.requires_grad_()), y).backward()
        optimizer.step()
    factors = [*optimizer.factor("0"), *optimizer.factor("2")] if settings is not None else []
    return [p.detach() for p in model.parameters()] + factors, log


@pytest.mark.promise("hooks of others that observe")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "add_hooks", [on_forward, on_module_backward, on_activations, on_parameters]
)
@pytest.mark.parametrize("settings", ONE_EACH)
def test_hooks_of_others_change_nothing(
    settings: dict[str, Any], add_hooks: Callable[[nn.Module, Log], None], when: str
) -> None:
    expected, _ = hooked_run(settings, None)
    found, log = hooked_run(settings, add_hooks, when)
    assert_identical(found, expected)
    _, plain_log = hooked_run(None, add_hooks, when)
    sees_fisher_passes = add_hooks in (on_module_backward, on_activations)
    if settings["fisher"] in ("mc", "type-2") and sees_fisher_passes:
        assert len(log) > len(plain_log)
        assert set(log) == set(plain_log)
    else:
        assert log == plain_log


@pytest.mark.promise("hooks of others that observe")
def test_hooks_on_the_optimizer_run_once_a_step() -> None:
    model, log = net(), Log()
    optimizer, criterion = make(model, FISHERS["mc"])
    optimizer.register_step_pre_hook(lambda *_: log.append("before"))
    optimizer.register_step_post_hook(lambda *_: log.append("after"))
    x, y = batch()
    criterion(model(x), y).backward()
    optimizer.step()
    assert log == ["before", "after"]


class Times(nn.Module):
    """Multiplies by 2; its backward pass by another number."""

    def __init__(self, backward: float = 2.0) -> None:
        super().__init__()
        self.backward = backward

    def forward(self, x: Tensor) -> Tensor:
        doubled = 2 * x
        return doubled + (self.backward - 2) * (x - x.detach())


def scaled_output(model: nn.Sequential) -> None:
    model[0].register_forward_hook(lambda _, args, output: 2 * output)


def scaled_input(model: nn.Sequential) -> None:
    model[2].register_forward_pre_hook(lambda _, args: (2 * args[0],))


def scaled_gradient(model: nn.Sequential) -> None:
    def scale(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = 2 * output
        output.register_hook(lambda gradient: 1.5 * gradient)
        return output

    model[0].register_forward_hook(scale)


CHANGES: dict[str, tuple[Callable[[nn.Sequential], None], int, float]] = {
    "output": (scaled_output, 1, 2.0),
    "input": (scaled_input, 2, 2.0),
    "gradient": (scaled_gradient, 1, 3.0),
}


@pytest.mark.promise("hooks of others that replace inputs, outputs or gradients of activations")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("settings", ONE_EACH)
def test_what_hooks_replace_is_as_if_a_module_did_it(
    settings: dict[str, Any], change: str, when: str
) -> None:
    replace, place, backward = CHANGES[change]
    x, y = batch()
    results = []
    for by_hook in (True, False):
        layers = list(net())
        if not by_hook:
            layers.insert(place, Times(backward))
        model = nn.Sequential(*layers)
        first, last = (name for name, m in model.named_children() if isinstance(m, nn.Linear))
        if by_hook and when == "before":
            replace(model)
        optimizer, criterion = make(model, settings)
        if by_hook and when == "after":
            replace(model)
        criterion(model(x), y).backward()
        optimizer.step()
        factors = [*optimizer.factor(first), *optimizer.factor(last)]
        results.append([p.detach() for p in model.parameters()] + factors)
    close(*results)


@pytest.mark.promise("hooks of others that replace inputs, outputs or gradients of activations")
def test_a_hook_that_comes_before_the_tap_is_noticed() -> None:
    model = net()
    optimizer, criterion = make(model, FISHERS["mc"])
    model[0].register_forward_hook(lambda _, args, output: 2 * output, prepend=True)
    x, y = batch()
    criterion(model(x), y).backward()
    with pytest.warns(UserWarning, match="The gradient of the weight of the layer '0' differs"):
        optimizer.step()


@pytest.mark.promise("hooks of others that replace the gradients of weights")
def test_a_hook_that_changes_the_gradient_of_a_weight_is_noticed_once() -> None:
    model = net()
    optimizer, criterion = make(model, FISHERS["mc"])
    model[0].weight.register_hook(lambda gradient: 2 * gradient)
    for step in range(2):
        x, y = batch(step)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        expected = model[0].weight.grad.clone()
        if step == 0:
            with pytest.warns(UserWarning, match="something changes its gradient"):
                optimizer.step()
        else:
            optimizer.step()
        assert torch.equal(model[0].weight.grad, expected)


@pytest.mark.promise("`torch.func.functional_call` with other weights")
@pytest.mark.parametrize("fisher", FISHERS)
def test_layers_with_their_own_weights_count_in_a_call_with_some_others(fisher: str) -> None:
    model, twin, (x, y) = net(), net(), batch()
    others = {name: 2 * p.detach() for name, p in model[2].named_parameters(prefix="2")}
    twin.load_state_dict(others, strict=False)
    optimizer, criterion = make(model, FISHERS[fisher])
    expected, twin_criterion = make(twin, FISHERS[fisher])
    criterion(torch.func.functional_call(model, others, (x,)), y).backward()
    optimizer.step()
    twin_criterion(twin(x), y).backward()
    expected.step()
    assert_identical(list(optimizer.factor("0")), list(expected.factor("0")))
    assert torch.equal(model[0].weight, twin[0].weight)


@pytest.mark.promise("`torch.func.functional_call` with other weights")
def test_an_automatic_step_refuses_a_call_with_some_other_weights() -> None:
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(), batch()
    others = {name: 2 * p.detach() for name, p in model[2].named_parameters(prefix="2")}
    optimizer = KFAC(model, lr="auto", criterion=criterion)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(torch.func.functional_call(model, others, (x,)), y)
        loss.backward()
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"other weights.*functional_call"):
        optimizer.step(closure)
    assert all(map(torch.equal, model.parameters(), before))


# Ways to call layers and models

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(4, 3), (6, 5, 4)),
    "Conv1d": (lambda: nn.Conv1d(4, 3, 3, padding=1), (6, 4, 5)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2), (6, 4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 3, 2), (6, 4, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2), (6, 4, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), (6, 4, 3, 3)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 3, 2), (6, 4, 2, 2, 2)),
    "LayerNorm": (lambda: nn.LayerNorm(4), (6, 5, 4)),
    "RMSNorm": (lambda: nn.RMSNorm(4), (6, 5, 4)),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), (6, 4, 5, 5)),
    "BatchNorm1d": (lambda: nn.BatchNorm1d(4), (6, 4, 5)),
    "BatchNorm2d": (lambda: nn.BatchNorm2d(4), (6, 4, 5, 5)),
    "BatchNorm3d": (lambda: nn.BatchNorm3d(4), (6, 4, 3, 3, 3)),
    "InstanceNorm1d": (lambda: nn.InstanceNorm1d(4, affine=True), (6, 4, 5)),
    "InstanceNorm2d": (lambda: nn.InstanceNorm2d(4, affine=True), (6, 4, 5, 5)),
    "InstanceNorm3d": (lambda: nn.InstanceNorm3d(4, affine=True), (6, 4, 3, 3, 3)),
    "Embedding": (lambda: nn.Embedding(7, 4), (6, 5)),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(7, 4), (6, 5)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(4, 2, batch_first=True), (6, 5, 4)),
}


def as_it_is(x: Tensor) -> Tensor:
    return x


def permuted(x: Tensor) -> Tensor:
    """The same numbers with the axes in memory the other way round."""
    order = list(range(x.dim()))[::-1]
    return x.permute(order).contiguous().permute(order)


def strided(x: Tensor) -> Tensor:
    """The same numbers with gaps between them."""
    return x.repeat_interleave(2, -1)[..., ::2]


def channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


def expanded(x: Tensor) -> Tensor:
    """The first example again and again, in the same memory."""
    return x[:1].expand_as(x)


def copied(x: Tensor) -> Tensor:
    return expanded(x).contiguous()


class Calling(nn.Module):
    """Hands its input to a layer by position or by name."""

    def __init__(self, layer: nn.Module, by_name: bool) -> None:
        super().__init__()
        self.layer, self.by_name = layer, by_name

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.MultiheadAttention):
            if self.by_name:
                output, _ = self.layer(query=x, key=x, value=x)
            else:
                output, _ = self.layer(x, x, x)
        elif self.by_name:
            name = "x" if isinstance(self.layer, nn.RMSNorm) else "input"
            output = self.layer(**{name: x})
        else:
            output = self.layer(x)
        return output.flatten(1).sin()


def step_of_a_layer(
    kind: str,
    settings: dict[str, Any],
    layout: Callable[[Tensor], Tensor] = as_it_is,
    *,
    by_name: bool = False,
    weight_layout: Callable[[Tensor], Tensor] = as_it_is,
) -> list[Tensor | None]:
    """Parameters and factors after two steps on inputs and weights of some memory layout."""
    torch.manual_seed(0)
    make_layer, shape = LAYERS[kind]
    model = Calling(make_layer(), by_name).double()
    generator = torch.Generator().manual_seed(1)
    if "Embedding" in kind:
        x = torch.randint(7, shape, generator=generator)
    else:
        x = torch.randn(shape, dtype=torch.float64, generator=generator)
        # Without it torch 2.6 crashes in the backward pass of a GroupNorm, channels last.
        x.requires_grad_()
    for parameter in model.parameters():
        parameter.data = weight_layout(parameter.data)
    optimizer, criterion = make(model, settings)
    y = torch.arange(6) % 3
    for _ in range(2):
        optimizer.zero_grad()
        criterion(model(layout(x)), y).backward()
        optimizer.step()
    factors = [f for layer in optimizer._engine.layers for f in optimizer.factor(layer.name)]
    assert factors
    return [p.detach().contiguous() for p in model.parameters()] + factors


@pytest.mark.promise("keyword arguments")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_inputs_may_be_given_by_name(fisher: str, kind: str) -> None:
    found = step_of_a_layer(kind, FISHERS[fisher], by_name=True)
    assert_identical(found, step_of_a_layer(kind, FISHERS[fisher]))


@pytest.mark.promise("inputs and weights that are not contiguous, or channels last")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "settings", [FISHERS["mc"] | {"weight_sharing": "reduce"}, {"inverse": "ekfac"}]
)
def test_memory_layouts_change_nothing(settings: dict[str, Any], kind: str) -> None:
    expected = step_of_a_layer(kind, settings)
    for layout in (permuted, strided, channels_last):
        close(step_of_a_layer(kind, settings, layout), expected)
        close(step_of_a_layer(kind, settings, layout, weight_layout=layout), expected)
    close(step_of_a_layer(kind, settings, expanded), step_of_a_layer(kind, settings, copied))


# Nested tensors


def nested(layout: torch.layout, width: int = 4) -> Tensor:
    rows = [torch.ones(length, width, dtype=torch.float64) for length in (2, 3)]
    return torch.nested.nested_tensor(rows, layout=layout)


class Nesting(nn.Module):
    """Computes with nested tensors somewhere."""

    def __init__(self, where: str, layout: torch.layout) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
        self.where, self.layout = where, layout

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "input":
            return torch.nested.to_padded_tensor(self.first(x), 0.0).sum(1)
        if self.where == "inside":
            x = self.first(x)
            parts = torch.nested.as_nested_tensor([x[:1], x[1:]], layout=self.layout)
            return torch.nested.to_padded_tensor(self.last(parts), 0.0).sum(1)
        x = self.last(self.first(x))
        return torch.nested.as_nested_tensor([x[:1], x[1:]], layout=self.layout)


NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")


@NESTED
@pytest.mark.promise("nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("where", ["input", "inside"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_nested_tensors_are_refused_by_the_layer(
    fisher: str, where: str, layout: torch.layout
) -> None:
    model = Nesting(where, layout)
    optimizer, _ = make(model, FISHERS[fisher])
    x = nested(layout) if where == "input" else torch.ones(3, 4, dtype=torch.float64)
    name = "first" if where == "input" else "last"
    with pytest.raises(RuntimeError, match=f"layer '{name}' was called with a nested tensor.*skip"):
        model(x)
    with torch.no_grad():
        assert not model(x).is_nested  # an evaluation may use them
    optimizer.remove_hooks()
    model(x).sum().backward()


@NESTED
@pytest.mark.promise("nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_output_of_the_model_is_refused(layout: torch.layout) -> None:
    model = Nesting("output", layout)
    _optimizer, _ = make(model, FISHERS["mc"])
    with pytest.raises(RuntimeError, match="output is a nested tensor"):
        model(torch.ones(3, 4, dtype=torch.float64))


@NESTED
@pytest.mark.promise("nested tensors")
def test_the_nested_tensors_of_an_evaluated_transformer_are_no_matter() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True).double()
    mask = torch.tensor([[False, False, True], [False, False, False]])
    x = torch.ones(2, 3, 4, dtype=torch.float64)
    optimizer, _ = make(model, FISHERS["empirical"])
    model(x, src_key_padding_mask=mask).square().mean().backward()
    before = state_of(optimizer)
    model.eval()
    with torch.no_grad():
        model(x, src_key_padding_mask=mask)
    assert_identical(state_of(optimizer), before)
    optimizer.step()


# Automatic steps


def automatic_run(
    model: nn.Module, fisher: str, call: Callable[[Tensor], Tensor] | None = None
) -> list[Tensor]:
    """Parameters after some steps that the quadratic model chooses."""
    criterion, call = nn.CrossEntropyLoss(), call or model
    optimizer = KFAC(
        model, lr="auto", momentum="auto", damping=LevenbergMarquardt(period=2),
        fisher=FISHERS[fisher]["fisher"], criterion=criterion, factor_update_period=1,
    )  # fmt: skip
    for step in range(4):
        x, y = sequences(6, step)

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = criterion(call(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
    return [p.detach() for p in model.parameters()]


@pytest.mark.promise("`use_reentrant=False`")
@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_checkpointing_changes_no_automatic_step(fisher: str, regions: str) -> None:
    expected = automatic_run(Recomputed(regions, "plain"), fisher)
    close(automatic_run(Recomputed(regions, "non-reentrant"), fisher), expected)


@pytest.mark.promise("`use_reentrant=False`")
@pytest.mark.promise("`use_reentrant=True`")
@pytest.mark.parametrize("run", ["non-reentrant", "reentrant"])
def test_a_checkpoint_of_the_whole_model_changes_no_automatic_step(run: str) -> None:
    expected = automatic_run(Recomputed("nested", "plain"), "empirical")
    model = Recomputed("nested", "plain")
    close(automatic_run(model, "empirical", partial(RUNS[run], model)), expected)


@pytest.mark.promise("`use_reentrant=True`")
@pytest.mark.parametrize("regions", REGIONS)
@pytest.mark.parametrize("fisher", ["empirical", "forward-only"])
def test_reentrant_regions_are_refused_by_automatic_steps(fisher: str, regions: str) -> None:
    model = Recomputed(regions, "reentrant")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"automatic step.*use_reentrant=False"):
        automatic_run(model, fisher)
    assert all(map(torch.equal, model.parameters(), before))


class Hiding(torch.autograd.Function):
    """Runs a layer without gradients, and again in the backward pass: a library's checkpoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ctx.layer(x)
        torch.autograd.backward(output, gradient)
        return x.grad, None


@pytest.mark.promise("`use_reentrant=True`")
@pytest.mark.parametrize("fisher", ["empirical", "forward-only"])
def test_other_reentrant_regions_are_refused_by_automatic_steps(fisher: str) -> None:
    """Those whose layers are called outside of the regions, too, when they are entered."""
    model = Recomputed("a module inside and outside", "plain")
    model.run = lambda _, x: Hiding.apply(x, model.inner)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"automatic step.*use_reentrant=False"):
        automatic_run(model, fisher)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.promise("`use_reentrant=True`")
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_layers_called_without_gradients_are_not_refused_by_automatic_steps(fisher: str) -> None:
    expected = automatic_run(Conditioned("on itself", is_fused=False), fisher)
    close(automatic_run(Conditioned("on itself"), fisher), expected)


class Counting(nn.Module):
    """Its output depends on buffers that a call adds to, replaces, registers, fills or deletes."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.layer, self.change, self.noted = nn.Linear(4, 3), change, 0
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("late", None)
        self.register_buffer("spare", torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        shift = self.count
        if self.change == "added to from the second call on":
            if self.late is not None:
                self.spare += 1
            self.late = torch.ones(1)
            shift = self.spare.mean()
        elif self.change == "replaced by another shape":
            self.count = torch.cat([self.count, self.count + 1])
            shift = self.count.sum()
        elif self.change == "registered":
            if not hasattr(self, "new"):
                self.register_buffer("new", torch.zeros(3))
            self.new = self.new + 1
            shift = self.new.sum()
        elif self.change == "filled":
            shift = torch.zeros(1) if self.late is None else self.late
            self.late = shift + 1
        elif self.change == "deleted" and "spare" in self._buffers:
            shift = self.spare.sum()
            del self.spare
        elif self.change == "registered, and noted in a number":
            if not self.noted:
                self.noted += 1
                self.register_buffer("new", torch.ones(3))
            shift = self.new.sum()
        elif self.change == "only a number":
            self.noted += 1
            shift = self.noted
        elif self.change == "a new number":
            self.made = getattr(self, "made", 0) + 1
            shift = self.made
        return self.layer(x) + shift


CHANGES_OF_BUFFERS = [
    "added to from the second call on", "replaced by another shape", "registered", "filled",
    "deleted", "registered, and noted in a number", "only a number",
    "a new number",
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES_OF_BUFFERS)
def test_a_call_is_repeated_with_the_buffers_that_it_found(change: str) -> None:
    model = Counting(change).double()
    recorder = Recorder(model)
    for step in range(3):
        x, _ = batch(step)
        call = recorder.begin((x,), {})
        output = model(x)
        recorder.end(call, output)
        recorder.add_loss([call], output, None)
        after = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for _ in range(2):
            (repeated,) = call.run(model, {})
            assert torch.equal(repeated, output)
        buffers = dict(model.named_buffers())
        assert buffers.keys() == after.keys()
        assert all(torch.equal(buffers[name], after[name]) for name in after)


class Busy(nn.Module):
    """Calls one layer three times, in-place activations after it and after another."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 3).double()
        self.activation = nn.ELU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.activation(self.inner(x))
        return self.activation(self.head(x.mean(1)))


@pytest.mark.promise("in-place activations")
@pytest.mark.promise("one module called several times in a forward pass")
@pytest.mark.parametrize("settings", ONE_EACH)
def test_in_place_activations_change_nothing(settings: dict[str, Any]) -> None:
    results = []
    for inplace in (False, True):
        model = Busy(inplace)
        optimizer, criterion = make(model, settings)
        for step, loop in enumerate(LOOPS):
            loop(model, criterion, optimizer, step)
        results.append([p.detach() for p in model.parameters()] + list(optimizer.factor("inner")))
    close(*results)


@pytest.mark.promise("in-place activations")
@pytest.mark.promise("one module called several times in a forward pass")
@pytest.mark.parametrize("fisher", FISHERS)
def test_in_place_activations_change_no_automatic_step(fisher: str) -> None:
    close(automatic_run(Busy(True), fisher), automatic_run(Busy(False), fisher))


@pytest.mark.promise("one module called several times in a forward pass")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_calls_of_one_module_are_further_positions(sharing: str) -> None:
    """A and the empirical G of a layer that is called three times on 3 positions, written out."""
    plain, inputs, zeros, (x, y) = Busy(False), [], [], sequences(6)

    def perturb(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(F.pad(args[0].detach(), (0, 1), value=1.0))
        zeros.append(torch.zeros_like(output, requires_grad=True))
        return output + zeros[-1]

    plain.inner.register_forward_hook(perturb)
    gradients = torch.cat(torch.autograd.grad(F.cross_entropy(plain(x), y), zeros), 1)
    rows = torch.cat(inputs, 1)
    model = Busy(True)
    optimizer, criterion = make(model, {"fisher": "empirical", "weight_sharing": sharing})
    one_call(model, criterion, optimizer, 0)
    a, g = optimizer.factor("inner")
    rows = rows.flatten(0, 1) if sharing == "expand" else rows.mean(1)
    gradients = gradients.flatten(0, 1) if sharing == "expand" else gradients.sum(1)
    close(a[0], rows.T @ rows / len(rows))
    close(g[0], 6 * gradients.T @ gradients)


@pytest.mark.promise("evaluation, logging, `no_grad` between steps")
@pytest.mark.filterwarnings("ignore:fisher='type-2' is exact only if the examples")
@pytest.mark.parametrize("fisher", FISHERS)
def test_an_evaluation_changes_no_automatic_step(fisher: str) -> None:
    """Before the call of the model, between it and its backward pass, and after that."""
    expected = automatic_run(net_with_dropout(), fisher)
    model = net_with_dropout()

    def evaluate() -> None:
        random = torch.get_rng_state()
        model.eval()
        with torch.no_grad():
            model(sequences(4, 20)[0])
        with torch.inference_mode():
            model(sequences(3, 21)[0])
        model.train()
        torch.set_rng_state(random)

    def call(x: Tensor) -> Tensor:
        evaluate()
        output = model(x)
        evaluate()
        output.register_hook(lambda _: evaluate())
        return output

    assert_identical(automatic_run(model, fisher, call), expected)


def net_with_dropout() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 5), nn.Dropout(0.2), nn.Flatten(), nn.BatchNorm1d(15), nn.Linear(15, 3)
    return nn.Sequential(*layers).double()


# Copies, and models that move

COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.promise("a copied or pickled model")
@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("settings", ONE_EACH)
def test_a_copy_trains_with_an_optimizer_of_its_own(settings: dict[str, Any], kind: str) -> None:
    """The copy is made in the middle of a step; both then train as if there were no other."""
    models, optimizers, criteria = [net()], [], []
    optimizer, criterion = make(models[0], settings)
    x, y = batch(0)
    loss = criterion(models[0](x), y)
    models.append(COPIES[kind](models[0]))
    own, own_criterion = make(models[1], settings)
    loss.backward()
    optimizer.step()
    criteria, optimizers = [criterion, own_criterion], [optimizer, own]
    own_criterion(models[1](x), y).backward()
    own.step()
    for step in (1, 2):
        x, y = batch(step)
        losses = []
        for model, trained_by, measure in zip(models, optimizers, criteria, strict=True):
            trained_by.zero_grad()
            losses.append(measure(model(x), y))
        for loss in losses:
            loss.backward()
        for trained_by in optimizers:
            trained_by.step()
    first, second = (
        [p.detach() for p in model.parameters()] + list(trained_by.factor("0"))
        for model, trained_by in zip(models, optimizers, strict=True)
    )
    assert_identical(first, second)


@pytest.mark.promise("a copied or pickled model")
@pytest.mark.parametrize("fisher", FISHERS)
def test_an_exponential_moving_average_of_the_model_changes_nothing(fisher: str) -> None:
    results = []
    for is_averaged in (False, True):
        model = net()
        optimizer, criterion = make(model, FISHERS[fisher])
        average = torch.optim.swa_utils.AveragedModel(model) if is_averaged else None
        for step in range(3):
            x, y = batch(step)
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            if average is not None:
                average.update_parameters(model)
                F.cross_entropy(average(x), y)
        results.append([p.detach() for p in model.parameters()] + list(optimizer.factor("0")))
    assert_identical(*results)


@pytest.mark.promise("`model.to(device)` and `model.to(dtype)` before the first step")
@pytest.mark.parametrize("settings", ONE_EACH)
def test_a_model_may_change_its_dtype_before_the_first_step(settings: dict[str, Any]) -> None:
    results = []
    for is_moved_late in (False, True):
        model = net().float()
        if not is_moved_late:
            model.double()
        optimizer, criterion = make(model, settings)
        if is_moved_late:
            model.double()
        for step in range(3):
            x, y = batch(step)
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        assert all(p.dtype == torch.float64 for p in model.parameters())
        factors = [f.double() for f in optimizer.factor("0") if f is not None]
        results.append([p.detach() for p in model.parameters()] + factors)
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)  # factors stay in float32


@pytest.mark.promise("`model.to(device)` and `model.to(dtype)` before the first step")
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_model_may_be_made_half_before_the_first_step(fisher: str) -> None:
    results = []
    for is_moved_late in (False, True):
        model = net().float()
        if not is_moved_late:
            model.bfloat16()
        optimizer, criterion = make(model, FISHERS[fisher])
        model.bfloat16()
        for step in range(2):
            x, y = batch(step)
            optimizer.zero_grad()
            criterion(model(x.bfloat16()), y).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()] + list(optimizer.factor("0")))
    assert_identical(*results)
