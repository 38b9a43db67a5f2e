"""On a GPU the steps are those of the CPU."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac import KFAC

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SETTINGS: dict[str, dict[str, Any]] = {
    "empirical": {"fisher": "empirical"},
    "type-2": {"fisher": "type-2"},
    "type-2, reduce, eigen": {"fisher": "type-2", "weight_sharing": "reduce", "inverse": "eigen"},
    "forward-only": {"fisher": "forward-only"},
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(64, 3),
    ).double()


def train(model: nn.Module, device: str, settings: dict[str, Any]) -> list[Tensor]:
    criterion = nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion, factor_update_period=2, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(6, 2, 4, 4, generator=generator, dtype=torch.float64).to(device)
        optimizer.zero_grad()
        criterion(model(x), (torch.arange(6) % 3).to(device)).backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize("name", SETTINGS)
def test_steps_on_a_gpu_equal_those_on_the_cpu(name: str) -> None:
    model = net()
    moved = copy.deepcopy(model).cuda()
    for mine, theirs in zip(
        train(moved, "cuda", SETTINGS[name]), train(model, "cpu", SETTINGS[name]), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_a_model_may_move_to_the_gpu_after_construction() -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, lr=0.1, criterion=criterion)
    model.cuda()
    x = torch.randn(6, 2, 4, 4, dtype=torch.float64, device="cuda")
    criterion(model(x), torch.zeros(6, dtype=torch.int64, device="cuda")).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
