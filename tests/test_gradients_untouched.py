"""Hooks are invisible: gradients stay bit-identical, and only the training passes are counted."""

import copy
from collections.abc import Callable

import oracles
import pytest
import torch
import torch.nn.functional as F
from test_exactness import PLAIN, close, randn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac import KFAC

# BatchNorm stands where the examples of a batch may mix.
pytestmark = pytest.mark.filterwarnings("ignore:fisher='type-2' is exact only if the examples")

FISHERS = {
    "empirical": {"fisher": "empirical"},
    "empirical, criterion": {"fisher": "empirical", "criterion": True},
    "forward-only": {"fisher": "forward-only"},
    "mc": {"fisher": "mc", "criterion": True},
    "type-2": {"fisher": "type-2", "criterion": True},
}


class Checkpointed(nn.Sequential):
    """Recomputes its middle in the backward pass: a convolution, dropout, in-place activation."""

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self)
        first, middle, last = (nn.Sequential(*layers[i:j]) for i, j in ((0, 3), (3, 8), (8, 11)))
        return last(checkpoint(middle, first(x), use_reentrant=False))


def net(kind: type[nn.Sequential] = nn.Sequential, inplace: bool = True) -> nn.Sequential:
    """With dropout, a norm layer, in-place activations directly after K-FAC's layers."""
    torch.manual_seed(0)
    return kind(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=inplace),
        nn.BatchNorm2d(4),
        nn.Dropout(0.3),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.ReLU(inplace=inplace),
        nn.Flatten(),
        nn.Linear(16, 6),
        nn.ReLU(inplace=inplace),
        nn.Dropout(0.3),
        nn.Linear(6, 3),
    ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (6,), generator=generator)


def make(model: nn.Module, fisher: str, criterion: nn.Module, **settings: object) -> KFAC:
    chosen = dict(FISHERS[fisher])
    if chosen.pop("criterion", False):
        chosen["criterion"] = criterion
    return KFAC(model, **PLAIN | {"lr": 0.0, "seed": 0} | chosen | settings)


def gradients_of_three_steps(
    model: nn.Module, criterion: nn.Module, optimizer: torch.optim.Optimizer
) -> list[Tensor]:
    gradients = []
    torch.manual_seed(1)
    for step in range(3):
        x, y = batch(step)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        gradients += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        gradients += [p.grad.clone() for p in model.parameters()]
    gradients += [buffer.clone() for buffer in model.buffers()]
    return [*gradients, torch.rand(1)]  # the global random stream is untouched too


def check_gradients(
    fisher: str, kind: type[nn.Sequential] = nn.Sequential, **settings: object
) -> None:
    plain, criterion = net(kind), nn.CrossEntropyLoss(label_smoothing=0.1)
    expected = gradients_of_three_steps(
        plain, criterion, torch.optim.SGD(plain.parameters(), lr=0.0)
    )
    model = net(kind)
    optimizer = make(model, fisher, criterion, **settings)
    actual = gradients_of_three_steps(model, criterion, optimizer)
    assert all(map(torch.equal, actual, expected))
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


@pytest.mark.parametrize("kind", [nn.Sequential, Checkpointed])
@pytest.mark.parametrize("fisher", FISHERS)
def test_gradients_are_bit_identical(fisher: str, kind: type[nn.Sequential]) -> None:
    check_gradients(fisher, kind)


@pytest.mark.parametrize("fisher", FISHERS)
def test_gradients_are_bit_identical_with_rare_factor_updates(fisher: str) -> None:
    check_gradients(fisher, factor_update_period=2, inverse_update_period=2)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_step_leaves_the_gradient_alone(fisher: str, reduction: str) -> None:
    model, criterion = net(), nn.CrossEntropyLoss(reduction=reduction)
    optimizer = make(model, fisher, criterion, lr=0.1, weight_decay=0.1, kl_clip=1e-3)
    x, y = batch(0)
    criterion(model(x), y).backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


# What is counted. Loops that differ from the plain one must yield its factors and its step.

Loop = Callable[[nn.Module, nn.Module, KFAC, Tensor, Tensor], None]


def plain_loop(model: nn.Module, criterion: nn.Module, optimizer: KFAC, x: Tensor, y: Tensor):
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()


def zero_grad_before_backward(model, criterion, optimizer, x, y):
    loss = criterion(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def zero_grad_before_criterion(model, criterion, optimizer, x, y):
    output = model(x)
    optimizer.zero_grad()
    criterion(output, y).backward()
    optimizer.step()


def zero_grad_after_step(model, criterion, optimizer, x, y):
    criterion(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


def zero_grad_of_the_model(model, criterion, optimizer, x, y):
    model.zero_grad()
    criterion(model(x), y).backward()
    optimizer.step()


def closure(model, criterion, optimizer, x, y):
    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        return loss

    optimizer.step(evaluate)


def functional_loss(model, criterion, optimizer, x, y):
    optimizer.zero_grad()
    smoothing, reduction = criterion.label_smoothing, criterion.reduction
    F.cross_entropy(model(x), y, label_smoothing=smoothing, reduction=reduction).backward()
    optimizer.step()


def logging_without_grad(model, criterion, optimizer, x, y):
    optimizer.zero_grad()
    output = model(x)
    loss = criterion(output, y)
    with torch.no_grad():
        criterion(output, y)
    criterion(output.detach(), y)
    loss.backward()
    with torch.no_grad():
        criterion(output, y)
    criterion(output.detach(), y)
    optimizer.step()


def logging_before(model, criterion, optimizer, x, y):
    optimizer.zero_grad()
    output = model(x)
    with torch.no_grad():
        criterion(output, y)
    criterion(output, y).backward()
    optimizer.step()


def evaluation_between(model, criterion, optimizer, x, y):
    def evaluate() -> None:
        training, state = model.training, torch.get_rng_state()
        model.eval()
        with torch.no_grad():
            criterion(model(5 * x[:3]), y[:3])
        with torch.inference_mode():
            criterion(model(7 * x[:1]), y[:1])
        model.train(training)
        torch.set_rng_state(state)

    evaluate()
    optimizer.zero_grad()
    evaluate()
    loss = criterion(model(x), y)
    evaluate()
    loss.backward()
    evaluate()
    optimizer.step()
    evaluate()


def forward_without_criterion(model, criterion, optimizer, x, y):
    with torch.no_grad():
        model.eval()(3 * x)
    model.train()
    plain_loop(model, criterion, optimizer, x, y)
    with torch.no_grad():
        model.eval()(3 * x)
    model.train()


def two_models_side_by_side(model, criterion, optimizer, x, y):
    """Another K-FAC trains another model with the same criterion object."""
    other = nn.Linear(4, 3).double()
    settings = PLAIN | {"criterion": criterion}
    other_optimizer = KFAC(other, **settings)
    optimizer.zero_grad()
    loss, other_loss = criterion(model(x), y), criterion(other(x[:, 0, 0, :4]), y)
    loss.backward()
    other_loss.backward()
    optimizer.step()
    other_optimizer.step()
    other_optimizer.remove_hooks()


def another_models_loss(model, criterion, optimizer, x, y):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    other = nn.Linear(4, 3).double()
    with torch.random.fork_rng():
        criterion(other(randn(9, 4)), torch.zeros(9, dtype=torch.long)).backward()
    loss.backward()
    optimizer.step()


LOOPS: dict[str, Loop] = {
    loop.__name__: loop
    for loop in (
        zero_grad_before_backward,
        zero_grad_before_criterion,
        zero_grad_after_step,
        zero_grad_of_the_model,
        closure,
        functional_loss,
        logging_without_grad,
        logging_before,
        evaluation_between,
        forward_without_criterion,
        another_models_loss,
        two_models_side_by_side,
    )
}


def without_randomness(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def outcome(
    fisher: str,
    loop: Loop,
    kind: type[nn.Sequential] = nn.Sequential,
    reduction: str = "mean",
    **settings: object,
) -> list[Tensor]:
    """Parameters and factors after three steps."""
    model = without_randomness(net(kind))
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1, reduction=reduction)
    optimizer = make(model, fisher, criterion, lr=0.3, **settings)
    for step in range(3):
        loop(model, criterion, optimizer, *batch(step))
    factors = [f for name in oracles.layer_names(model) for f in optimizer.factor(name)]
    return [p.detach() for p in model.parameters()] + factors


def check_loop(
    fisher: str, loop: Loop, kind: type[nn.Sequential] = nn.Sequential, reduction: str = "mean"
) -> None:
    settings = {} if "criterion" in FISHERS[fisher] else {"loss_reduction": reduction}
    expected = outcome(fisher, plain_loop, reduction=reduction, **settings)
    actual = outcome(fisher, loop, kind, reduction, **settings)
    for a, b in zip(actual, expected, strict=True):
        close(a, b)


@pytest.mark.promise("one criterion object for several models")
@pytest.mark.promise("a forward pass without a backward pass")
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("fisher", FISHERS)
def test_only_the_training_pass_is_counted(fisher: str, loop: str, reduction: str) -> None:
    check_loop(fisher, LOOPS[loop], reduction=reduction)


def check_checkpointing(fisher: str) -> None:
    check_loop(fisher, plain_loop, Checkpointed)


@pytest.mark.parametrize("fisher", FISHERS)
def test_checkpointing_counts_every_layer_once(fisher: str) -> None:
    check_checkpointing(fisher)


@pytest.mark.parametrize("fisher", FISHERS)
def test_inplace_activations_change_nothing(fisher: str) -> None:
    criterion = nn.CrossEntropyLoss()
    results = []
    for inplace in (False, True):
        model = without_randomness(net(inplace=inplace))
        optimizer = make(model, fisher, criterion, lr=0.3)
        for step in range(2):
            plain_loop(model, criterion, optimizer, *batch(step))
        results.append([p.detach() for p in model.parameters()])
    close(*results)


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_copy_of_the_model_does_not_feed_the_factors(fisher: str) -> None:
    def loop(model, criterion, optimizer, x, y):
        average = copy.deepcopy(model)
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        F.cross_entropy(average(3 * x), y).backward()
        loss.backward()
        F.cross_entropy(average(5 * x), y).backward()
        optimizer.step()

    check_loop(fisher, loop)


# Where targets matter and the criterion is not called, the Fisher cannot be known

UNKNOWN: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "class weights": (
        lambda: nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)),
        lambda out: F.cross_entropy(out, torch.zeros(6, dtype=torch.long)),
    ),
    "pos_weight": (
        lambda: nn.BCEWithLogitsLoss(pos_weight=torch.full((3,), 2.0, dtype=torch.float64)),
        lambda out: F.binary_cross_entropy_with_logits(out, torch.zeros_like(out)),
    ),
}


@pytest.mark.promise("a loss computed without calling the criterion object")
@pytest.mark.parametrize("fisher", ["mc", "type-2"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_targets_are_an_error_where_the_fisher_needs_them(name: str, fisher: str) -> None:
    model, (make_criterion, loss) = net(), UNKNOWN[name]
    optimizer = make(model, fisher, make_criterion())

    def step() -> None:
        loss(model(batch(0)[0])).backward()
        optimizer.step()

    with pytest.raises((RuntimeError, ValueError), match="criterion"):
        step()


class Recomputed(nn.Module):
    """Recomputes a layer with the reentrant kind of checkpointing."""

    def __init__(self, first: nn.Module, kind: str) -> None:
        super().__init__()
        self.first, self.inner, self.head = first, nn.Linear(5, 5), nn.Linear(5, 3)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.kind == "plain":
            return self.head(self.inner(hidden))
        return self.head(checkpoint(self.inner, hidden, use_reentrant=True))


FIRST = {"kfac": lambda: nn.Linear(5, 5), "fallback": lambda: nn.PReLU(5)}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("fisher", ["empirical", "empirical, criterion", "forward-only"])
def test_reentrant_checkpointing_changes_nothing(fisher: str, first: str) -> None:
    x, y = randn(6, 5), torch.arange(6) % 3
    results = []
    for kind in ("plain", "reentrant"):
        torch.manual_seed(0)
        model, criterion = Recomputed(FIRST[first](), kind).double(), nn.CrossEntropyLoss()
        optimizer = make(model, fisher, criterion, lr=0.3)
        plain_loop(model, criterion, optimizer, x, y)
        results.append([p.detach() for p in model.parameters()])
    close(*results)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("fisher", ["mc", "type-2"])
def test_reentrant_checkpointing_is_refused_with_a_remedy(fisher: str, first: str) -> None:
    model, criterion = Recomputed(FIRST[first](), "reentrant").double(), nn.CrossEntropyLoss()
    optimizer = make(model, fisher, criterion)
    with pytest.raises(RuntimeError, match="use_reentrant"):
        plain_loop(model, criterion, optimizer, randn(6, 5), torch.arange(6) % 3)


class Elsewhere(nn.Module):
    """Uses a layer's weight without calling the layer, too."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(self.shared(x).tanh(), self.shared.weight))


@pytest.mark.promise("a weight used without calling its module")
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_weight_that_is_also_used_elsewhere_is_noticed(fisher: str) -> None:
    model, criterion = Elsewhere().double(), nn.CrossEntropyLoss()
    optimizer = make(model, fisher, criterion)
    with pytest.raises((RuntimeError, UserWarning), match="shared"):
        plain_loop(model, criterion, optimizer, randn(6, 5), torch.arange(6) % 3)
