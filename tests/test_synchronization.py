"""A step that refreshes nothing never makes the host wait for the device."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac import KFAC, Eigen
from kfac.curvature import Curvature
from kfac.directions import Directions

# What reads a number off a tensor, or has a shape that depends on one.
WAITING = (
    "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero",
    "aten.equal", "aten.unique", "aten._unique", "aten.repeat_interleave.Tensor",
)  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if str(func).startswith(WAITING):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with Waits() as waits:
        yield
    assert waits.found == []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale, self.head = nn.PReLU(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.scale(self.norm(self.conv(x))).flatten(2).mT
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "eigen": {"inverse": "eigen"},
    "ekfac": {"inverse": "ekfac"},
    "warm start": {"inverse": Eigen(warm_start=True)},
    "some refreshes skipped": {"refresh_tolerance": 0.5},
    "reduce": {"weight_sharing": "reduce"},
    "empirical": {"fisher": "empirical"},
    "without a trust region": {"kl_clip": None, "nesterov": True, "weight_decay": 0.1},
    "grafted by the gradient": {"graft": "sgd"},
    "grafted by Adam": {"graft": "adam"},
    "small factors": {"max_factor_dim": 3},
}
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]


def check(device: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, criterion = Net().to(device), nn.CrossEntropyLoss()
    optimizer = KFAC(
        model, lr=0.01, criterion=criterion, factor_update_period=2, inverse_update_period=4,
        stagger_refreshes=False, **settings,
    )  # fmt: skip
    x = torch.randn(6, 3, 4, 4).to(device)
    target = (torch.arange(6) % 3).to(device)
    for step in range(8):
        loss = criterion(model(x), target)
        if step < 2 or step % 4 == 0:
            loss.backward()
            optimizer.step()  # the first check of gradients, the first inverses, a refresh
        else:
            with no_waiting(device):
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_an_ordinary_step_and_a_factor_step_wait_for_nothing(name: str, device: str) -> None:
    check(device, SETTINGS[name])


def test_mutant_a_number_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable = Curvature.precondition

    def reading(self: Curvature, gradients: dict, damping: dict) -> Directions:
        found: Directions = original(self, gradients, damping)
        assert all(float(stack.direction.sum()) < float("inf") for stack in found.stacks)
        return found

    monkeypatch.setattr(Curvature, "precondition", reading)
    with pytest.raises(AssertionError):
        check("cpu", {})
