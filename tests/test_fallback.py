"""Parameters that K-FAC does not take are trained all the same."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac import KFAC


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Tanh(), nn.Linear(4, 2))


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, factor: float = 1.0
) -> list[Tensor]:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor**step)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=generator)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return [p.detach().clone() for p in model[1].parameters()]


def only_fallback(model: nn.Module) -> list[nn.Parameter]:
    """Freeze everything else, so that another optimizer sees the same gradients."""
    for index in (0, 3):
        model[index].requires_grad_(False)
    return list(model[1].parameters())


FACTORIES: dict[str, Any] = {
    "adamw": ("adamw", lambda p: torch.optim.AdamW(p, weight_decay=0.0)),
    "own": (
        lambda groups: torch.optim.RMSprop(groups, lr=0.01),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
    ),
}


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_fallback_optimizer_equals_that_optimizer_under_the_same_schedule(
    name: str, factor: float
) -> None:
    fallback, make = FACTORIES[name]
    mine, theirs = net(), net()
    optimizer = KFAC(mine, only_fallback(mine), lr=0.3, fallback=fallback)
    found = train(mine, optimizer, factor=factor)
    expected = train(theirs, make(only_fallback(theirs)), factor=factor)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_default_fallback_is_sgd_with_the_same_settings() -> None:
    mine, theirs = net(), net()
    settings = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    found = train(mine, KFAC(mine, only_fallback(mine), **settings))
    expected = train(theirs, torch.optim.SGD(only_fallback(theirs), **settings))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_a_learning_rate_of_zero_trains_nothing(fallback: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    train(model, KFAC(model, lr=0.0, fallback=fallback))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_a_bad_batch_leaves_everything_as_it_was(fallback: str) -> None:
    model = net()
    optimizer = KFAC(model, lr=0.1, fallback=fallback, factor_update_period=1)
    train(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    factors = optimizer.factor("0")
    optimizer.zero_grad()
    model(torch.full((5, 3), float("nan"))).square().mean().backward()
    optimizer.step()
    after = (model.state_dict(), optimizer.state_dict()["state"])
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    for index, state in before[1].items():
        assert torch.equal(state["momentum_buffer"], after[1][index]["momentum_buffer"])
    assert all(map(torch.equal, factors, optimizer.factor("0")))
    diagnostics = optimizer.diagnostics()
    assert (diagnostics["nonfinite_batches"], diagnostics["dropped_statistics"]) == (1, 2)


def test_a_fallback_ascends_too() -> None:
    model = net()
    parameters = only_fallback(model)
    before = [p.detach().clone() for p in parameters]
    optimizer = KFAC(model, parameters, lr=0.1, maximize=True, fallback="adamw")
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    for parameter, old in zip(parameters, before, strict=True):
        assert ((parameter - old) * parameter.grad).sum() > 0


def test_a_function_keeps_the_weight_decay_of_its_own() -> None:
    model = net()
    made = []

    def make(groups: Any) -> torch.optim.Optimizer:
        made.append(torch.optim.AdamW(groups, weight_decay=0.3))
        return made[0]

    train(model, KFAC(model, lr=0.1, fallback=make))
    assert made[0].param_groups[0]["weight_decay"] == 0.3


def test_adamw_follows_the_weight_decay_of_the_group() -> None:
    model = net()
    optimizer = KFAC(model, lr=0.1, fallback="adamw")
    optimizer.param_groups[0]["weight_decay"] = 0.2
    train(model, optimizer, steps=1)
    inner = optimizer.state_dict()["fallback"]["optimizer"]["param_groups"][0]
    assert inner["weight_decay"] == 0.2


def test_sparse_gradients_are_refused() -> None:
    model = nn.ParameterDict({"table": nn.Parameter(torch.ones(5, 3))})
    model["head"] = nn.Parameter(torch.ones(3, 2))
    optimizer = KFAC(model, lr=0.1)
    rows = F.embedding(torch.arange(4), model["table"], sparse=True)
    (rows @ model["head"]).square().mean().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


def test_empty_parameters_do_no_harm() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    model.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    optimizer = KFAC(model, lr=0.1)
    (model(torch.ones(2, 3)).square().mean() + model.empty.sum()).backward()
    optimizer.step()
    assert model[0].weight.isfinite().all()


def test_gradients_stay_as_the_user_left_them() -> None:
    model = net()
    optimizer = KFAC(model, lr=0.1, fallback="adamw", loss_reduction="sum")
    model(torch.randn(5, 3)).square().sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(b, p.grad) for b, p in zip(before, model.parameters(), strict=True))
