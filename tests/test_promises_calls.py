"""Ways to call a model that mean the same give the same step."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac import KFAC

FISHERS = ["empirical", "type-2", "forward-only"]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def trained(
    model: nn.Module, fisher: str, loss: Callable[[nn.Module, nn.Module], Tensor]
) -> list[Tensor]:
    criterion = nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, lr=0.5, damping=0.1, kl_clip=None, fisher=fisher, criterion=criterion,
        factor_update_period=1, inverse_update_period=1,
    )  # fmt: skip
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, criterion).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    for p, q in zip(one, other, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


class Twins(nn.Module):
    """Calls one net for each of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net(x) - self.net(y)


@pytest.mark.promise("siamese networks")
@pytest.mark.parametrize("fisher", FISHERS)
def test_two_calls_by_the_loop_are_those_of_a_model_that_calls_twice(fisher: str) -> None:
    x, y, labels = torch.randn(6, 4).double(), torch.randn(6, 4).double(), torch.arange(6) % 3
    loop = trained(net(), fisher, lambda model, criterion: criterion(model(x) - model(y), labels))
    model = trained(Twins(), fisher, lambda model, criterion: criterion(model(x, y), labels))
    assert_equal(loop, model)


@pytest.mark.promise("siamese networks")
@pytest.mark.parametrize("fisher", FISHERS)
def test_outputs_that_are_concatenated_are_those_of_one_call(fisher: str) -> None:
    x, labels = torch.randn(6, 4).double(), torch.arange(6) % 3
    whole = trained(net(), fisher, lambda model, criterion: criterion(model(x), labels))
    parts = trained(
        net(),
        fisher,
        lambda model, criterion: criterion(torch.cat([model(x[:2]), model(x[2:])]), labels),
    )
    assert_equal(parts, whole)


@pytest.mark.promise("sequence-first inputs `[T, N, C]`")
@pytest.mark.promise("logits flattened to `[N·T, V]`")
@pytest.mark.parametrize("fisher", ["empirical", "forward-only"])
def test_the_order_of_time_and_examples_does_not_matter(fisher: str) -> None:
    x, labels = torch.randn(2, 5, 4).double(), torch.arange(10).reshape(2, 5) % 3

    def of(x: Tensor, labels: Tensor) -> Callable[[nn.Module, nn.Module], Tensor]:
        return lambda model, criterion: criterion(model(x).flatten(0, 1), labels.flatten())

    first = trained(net(), fisher, of(x, labels))
    last = trained(net(), fisher, of(x.transpose(0, 1), labels.mT))
    assert_equal(last, first)


@pytest.mark.promise("sequence-first inputs `[T, N, C]`")
def test_sampled_labels_are_unbiased_whichever_axis_is_first() -> None:
    x, labels = torch.randn(2, 5, 4).double(), torch.arange(10).reshape(2, 5) % 3
    criterion = nn.CrossEntropyLoss()

    def g_factor(x: Tensor, labels: Tensor, **settings: object) -> Tensor:
        model = net()
        optimizer = KFAC(model, criterion=criterion, factor_update_period=1, **settings)
        criterion(model(x).flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        factor = optimizer.factor("2")[1]
        assert factor is not None
        return factor

    exact = g_factor(x, labels, fisher="type-2")
    sampled = g_factor(
        x.transpose(0, 1), labels.mT, fisher="mc", num_samples=400
    )  # of 4,000 labels: errors of one or two percent
    assert (sampled - exact).norm() < 0.06 * exact.norm()


@pytest.mark.promise("copying or pickling the optimizer")
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_the_optimizer_cannot_be_copied_or_pickled(duplicate: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match=r"Construct one for the copy.*load_state_dict"):
        duplicate(KFAC(net()))


class Checkpointed(nn.Module):
    """A region with a buffer runs again in every backward pass."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


@pytest.mark.promise("`use_reentrant=False`")
@pytest.mark.parametrize("mode", ["forward", "double-backward"])
def test_automatic_steps_leave_buffers_of_checkpointed_regions_alone(mode: str) -> None:
    x, labels = torch.randn(16, 4), torch.arange(16) % 3
    counts = []
    for automatic in (False, True):
        model, criterion = Checkpointed(), nn.CrossEntropyLoss()
        settings = {"lr": "auto", "momentum": "auto"} if automatic else {"lr": 0.1}
        optimizer = KFAC(model, criterion=criterion, factor_update_period=1, **settings)
        if automatic:
            optimizer._automatic._products.jacobian.mode = mode

        def closure(model=model, criterion=criterion, optimizer=optimizer) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = criterion(model(x), labels)
            loss.backward()
            return loss

        for _ in range(2):
            optimizer.step(closure)
        counts.append(int(model.body[1].num_batches_tracked))
    assert counts[0] == counts[1]
