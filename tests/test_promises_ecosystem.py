"""Torch's own companions of an optimizer: schedulers, clipping, averages of the parameters."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac import KFAC, LevenbergMarquardt

EVERY_STEP: dict[str, Any] = {
    "fisher": "type-2", "factor_update_period": 1, "inverse_update_period": 1, "kl_clip": None,
}  # fmt: skip


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    return x, (x[:, 0] > 0).long()


def vector(parameters: Iterable[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


@pytest.mark.promise("gradient accumulation before the closure, with `LevenbergMarquardt`")
def test_levenberg_marquardt_refuses_gradients_from_before_the_closure() -> None:
    """The closure's loss is not the one that the gradients are of, so ρ would be wrong."""
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, lr=0.1, damping=LevenbergMarquardt())
    halves = [tuple(t.chunk(2)[i] for t in batch(0)) for i in range(2)]

    def backward(half: Any) -> Tensor:
        loss: Tensor = criterion(model(half[0]), half[1]) / 2
        loss.backward()
        return loss

    before = vector(model.parameters())
    backward(halves[0])
    with pytest.raises(RuntimeError, match="accumulated before the closure"):
        optimizer.step(lambda: backward(halves[1]))
    torch.testing.assert_close(vector(model.parameters()), before, rtol=0, atol=0)
    optimizer.zero_grad()
    optimizer.step(lambda: (optimizer.zero_grad(), sum(map(backward, halves)))[1])
    assert optimizer.diagnostics()["steps"] == 1


class OwnLoss(nn.Module):
    """Computes its loss itself, and returns its output, converted or as it is."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        super().__init__()
        self.net, self.dtypes = net(), dtypes

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        loss = nn.functional.cross_entropy(logits, y)
        for dtype in self.dtypes:
            logits = logits.to(dtype)
        return {"loss": loss, "logits": logits}


@pytest.mark.promise("outputs that are dicts, tuples or objects")
def test_the_loss_may_come_from_the_output_before_its_conversion() -> None:
    """Under accelerate in bfloat16 models return copies of what they compute their loss from."""
    models = [OwnLoss(), OwnLoss(torch.float32, torch.float64)]
    for model in models:
        settings = EVERY_STEP | {"outputs": "logits", "lr": 0.1}
        optimizer = KFAC(model, criterion=nn.CrossEntropyLoss(), **settings)
        for step in range(2):
            optimizer.zero_grad()
            model(*batch(step))["loss"].backward()
            optimizer.step()
    found, expected = (vector(model.parameters()) for model in models)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
