"""On the first backward pass Σ g aᵀ is compared with the gradient that autograd computes."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac import KFAC, Preconditioner
from kfac.gradient_check import GradientCheck
from kfac.layers.conv import ConvLayer
from kfac.layers.linear import LinearLayer

DIFFERS = "gradient of the weight of the layer 'first' differs by"


class Head(nn.Module):
    """Its weight is also used on the way from its output to the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)

    def loss(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        output = self(torch.randn(6, 5))
        return criterion(output, torch.arange(6) % 3) + (output @ self.first.weight).tanh().mean()


def start(model: nn.Module, fisher: str = "empirical") -> tuple[KFAC, nn.Module]:
    criterion = nn.CrossEntropyLoss()
    return KFAC(model, lr=0.1, criterion=criterion, fisher=fisher), criterion


@pytest.mark.promise("a weight used without calling its module")
@pytest.mark.parametrize("fisher", ["empirical", "mc", "type-2"])
def test_a_use_that_no_tap_sees_is_reported_once(fisher: str) -> None:
    model = Head()
    optimizer, criterion = start(model, fisher)
    model.loss(criterion).backward()
    with pytest.warns(UserWarning, match=DIFFERS):
        optimizer.step()
    model.loss(criterion).backward()
    optimizer.step()


@pytest.mark.promise("a weight used without calling its module")
def test_a_use_in_the_loss_is_reported() -> None:
    model = nn.Sequential()
    model.first = nn.Linear(5, 3)
    optimizer, criterion = start(model)
    loss = criterion(model(torch.randn(6, 5)), torch.arange(6) % 3)
    (loss + model.first.weight.square().sum()).backward()
    with pytest.warns(UserWarning, match=DIFFERS):
        optimizer.step()


@pytest.mark.parametrize(
    ("layer_type", "method", "model"),
    [
        (LinearLayer, "gradient_rows", lambda: nn.Linear(5, 3)),
        (ConvLayer, "input_rows", lambda: nn.Sequential(nn.Conv1d(1, 3, 5), nn.Flatten())),
    ],
)
def test_a_layer_that_is_not_what_it_says_is_reported(
    layer_type: type, method: str, model: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(layer_type, method)
    monkeypatch.setattr(layer_type, method, lambda *args: original(*args).roll(1, -1))
    net = nn.Sequential()
    net.first = model()
    optimizer, criterion = start(net)
    x = torch.randn(6, 5) if layer_type is LinearLayer else torch.randn(6, 1, 5)
    criterion(net(x), torch.arange(6) % 3).backward()
    with pytest.warns(UserWarning, match=r"gradient of the weight of the layer 'first"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_rounding_is_not_reported(dtype: torch.dtype, autocast: bool) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=4), nn.GELU(), nn.Flatten(1, 2), nn.LayerNorm(30),
        nn.Linear(30, 16), nn.Tanh(), nn.Flatten(), nn.Linear(240 * 16, 3),
    ).to(dtype)  # fmt: skip
    optimizer, criterion = start(model)
    x, target = torch.randn(64, 3, 32, 32, dtype=dtype), torch.arange(64) % 3
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = criterion(model(x).float(), target)
    loss.backward()
    optimizer.step()


def test_gradients_that_cancel_are_not_reported() -> None:
    """Behind a mean over positions, the gradient of an InstanceNorm's scale is exactly zero."""
    model = nn.Sequential(nn.InstanceNorm1d(4, affine=True), nn.AdaptiveAvgPool1d(1), nn.Flatten())
    optimizer, criterion = start(model)
    criterion(model(torch.randn(6, 4, 50)), torch.arange(6) % 4).backward()
    optimizer.step()


def test_micro_batches_and_scaled_losses_are_not_reported() -> None:
    model = nn.Linear(5, 3)
    optimizer, criterion = start(model)
    for _ in range(3):
        (criterion(model(torch.randn(6, 5)), torch.arange(6) % 3) / 3).backward()
    optimizer.step()


def test_a_pass_that_breaks_off_is_forgotten() -> None:
    class Breaking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 3)
            self.breaks = True

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            again = self.first(x * 2)
            again.register_hook(self.fail)
            return self.second(hidden + again)

        def fail(self, _: Tensor) -> None:
            if self.breaks:
                raise KeyError

    model = Breaking()
    optimizer, criterion = start(model)
    x, target = torch.randn(6, 5), torch.arange(6) % 3
    with pytest.raises(KeyError):
        criterion(model(x), target).backward()
    model.breaks = False
    optimizer.zero_grad()
    criterion(model(x), target).backward()
    optimizer.step()


def test_nothing_stays_on_the_weights() -> None:
    model = nn.Linear(5, 3)
    optimizer, criterion = start(model)
    criterion(model(torch.randn(6, 5)), torch.arange(6) % 3).backward()
    optimizer.step()
    assert not model.weight._backward_hooks
    reference = weakref.ref(optimizer)
    F.cross_entropy(model(torch.randn(6, 5)), torch.arange(6) % 3).backward()
    del optimizer, criterion
    gc.collect()
    assert reference() is None


def test_the_preconditioner_checks_too() -> None:
    model = Head()
    preconditioner = Preconditioner(model)
    model.loss(F.cross_entropy).backward()
    with pytest.warns(UserWarning, match=DIFFERS):
        preconditioner.step()


def test_mutant_without_the_check_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientCheck, "add", lambda *_: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT WARN"):
        test_a_use_in_the_loss_is_reported()
