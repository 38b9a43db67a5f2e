"""Modules may come and go after construction, if the optimizer is told."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from mutants import replace
from torch import Tensor, nn

from kfac import KFAC, Preconditioner
from kfac.curvature import Curvature

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
SETTINGS: dict[str, Any] = {"lr": 0.1, "momentum": 0.5, "fisher": "mc"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.middle: nn.Module = nn.Identity()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.body(x).tanh()))


def run(model: nn.Module, optimizer: Any, criterion: nn.Module, steps: int = 1) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        criterion(model(x), torch.arange(6) % 3).backward()
        optimizer.step()


def start(**settings: Any) -> tuple[Net, KFAC, nn.Module]:
    model, criterion = Net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, **SETTINGS | settings)
    run(model, optimizer, criterion, 3)
    return model, optimizer, criterion


def layer() -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(4, 4).double()


@pytest.mark.parametrize("inverse", ["cholesky", "ekfac"])
def test_nothing_changes_where_nothing_has_changed(inverse: str) -> None:
    (model, optimizer, criterion), (other, updated, its_criterion) = (
        start(inverse=inverse) for _ in range(2)
    )
    updated.update_layers()
    run(model, optimizer, criterion, 20)
    run(other, updated, its_criterion, 20)
    # One more update of the factors, right after the call.
    assert updated.diagnostics()["factor_updates"] == optimizer.diagnostics()["factor_updates"] + 1
    for name in ("body", "head"):
        assert updated.factor(name)[0].shape == optimizer.factor(name)[0].shape


@pytest.mark.promise("modules added, removed or replaced after construction")
def test_layers_that_stay_keep_factors_and_inverses() -> None:
    model, optimizer, criterion = start()
    before = copy.deepcopy(optimizer.state_dict()["kfac"]["layers"])
    model.middle = layer()
    optimizer.add_param_group({"params": model.middle.parameters(), "lr": 0.01})
    after = optimizer.state_dict()["kfac"]["layers"]
    for name in ("body", "head"):
        for kind in ("factors", "inverse"):
            for key, tensor in before[name][kind].items():
                assert torch.equal(tensor, after[name][kind][key])
        assert after[name]["ready"]
    assert not after["middle"]["ready"]
    weight = model.middle.weight.detach().clone()
    run(model, optimizer, criterion)
    assert optimizer.state_dict()["kfac"]["layers"]["middle"]["ready"]
    assert not torch.equal(weight, model.middle.weight)
    assert optimizer.param_groups[1]["lr"] == 0.01
    assert optimizer.diagnostics()["steps"] == 4


@pytest.mark.promise("`add_param_group` after construction")
def test_a_new_layer_steps_as_if_it_had_been_there_from_the_start() -> None:
    """With fresh factors of all layers both optimizers know the same."""
    settings = SETTINGS | {"momentum": 0.0, "factor_decay": 0.0, "inverse_update_period": 1}
    settings |= {"factor_update_period": 1, "fisher": "type-2"}
    model, optimizer, criterion = start(**settings)
    model.middle = layer()
    other, its_criterion = copy.deepcopy(model), nn.CrossEntropyLoss()
    optimizer.add_param_group({"params": model.middle.parameters()})
    run(model, optimizer, criterion, 2)
    run(other, KFAC(other, criterion=its_criterion, **settings), its_criterion, 2)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        close(p, q)


def test_a_removed_layer_is_forgotten() -> None:
    model, optimizer, criterion = start()
    removed, model.body = model.body, nn.Identity()
    optimizer.update_layers()
    assert [row.parameter for row in optimizer.summary() if row.treatment == "kfac"] == [
        "head.weight",
        "head.bias",
    ]
    assert not removed._forward_hooks
    with pytest.raises(KeyError, match="body"):
        optimizer.factor("body")
    run(model, optimizer, criterion)


@pytest.mark.promise("modules added, removed or replaced after construction")
def test_a_replaced_layer_starts_anew() -> None:
    model, optimizer, criterion = start()
    model.body = layer()
    optimizer.add_param_group({"params": model.body.parameters()})
    assert not optimizer.state_dict()["kfac"]["layers"]["body"]["ready"]
    assert optimizer.factor("body")[0].abs().sum() == 0
    run(model, optimizer, criterion)


@pytest.mark.promise("parameters unfrozen after construction")
def test_freezing_and_unfreezing() -> None:
    model, criterion = Net(), nn.CrossEntropyLoss()
    model.body.requires_grad_(False)
    optimizer = KFAC(model, criterion=criterion, **SETTINGS)
    run(model, optimizer, criterion, 2)
    model.body.requires_grad_(True)
    assert optimizer.summary()[0].treatment == "fallback"
    optimizer.update_layers()
    assert optimizer.summary()[0].treatment == "kfac"
    run(model, optimizer, criterion)
    assert optimizer.factor("body")[1].abs().sum() > 0
    model.head.requires_grad_(False)
    optimizer.update_layers()
    head = model.head.weight.detach().clone()
    run(model, optimizer, criterion, 2)
    assert torch.equal(head, model.head.weight)


def test_the_fallback_keeps_its_state() -> None:
    model, criterion = Net(), nn.CrossEntropyLoss()
    model.middle = nn.PReLU(4).double()
    optimizer = KFAC(model, criterion=criterion, fallback="adamw", **SETTINGS)
    run(model, optimizer, criterion, 3)
    optimizer._fallback.optimizer.param_groups[0]["lr"] = 0.02
    extra = nn.PReLU(4).double()
    model.middle = nn.Sequential(model.middle, extra)
    optimizer.add_param_group({"params": extra.parameters()})
    inner = optimizer._fallback.optimizer
    assert inner.state[model.middle[0].weight]["step"] == 3
    assert inner.param_groups[0]["lr"] == 0.02
    run(model, optimizer, criterion)
    assert inner.state[model.middle[0].weight]["step"] == 4
    assert inner.state[extra.weight]["step"] == 1


def test_a_group_that_cannot_be_added_changes_nothing() -> None:
    model, optimizer, criterion = start(skip=["head"])
    parts = model.head
    del model.head
    new = layer()
    with pytest.raises(ValueError, match="skip"):
        optimizer.add_param_group({"params": new.parameters()})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="damping"):
        optimizer.add_param_group({"params": new.parameters(), "damping": -1.0})
    assert len(optimizer.param_groups) == 1
    model.head = parts
    run(model, optimizer, criterion)


@pytest.mark.promise("`add_param_group` after construction")
def test_groups_added_later_may_have_schedules_of_their_own() -> None:
    model, optimizer, criterion = start()
    model.middle = layer()
    damping = [1.0, 1.0, 1.0, 0.5, 0.25]
    optimizer.add_param_group(
        {"params": model.middle.parameters(), "damping": lambda step: damping[step]}
    )
    assert optimizer.param_groups[1]["damping"] == 0.5
    run(model, optimizer, criterion, 2)
    assert optimizer.param_groups[1]["damping"] == 0.25


def test_the_preconditioner_follows_too() -> None:
    model = Net()
    preconditioner = Preconditioner(model)
    model.middle = layer()
    preconditioner.update_layers()
    assert preconditioner.summary().fraction("kfac") == 1.0
    model(torch.randn(6, 4).double()).square().mean().backward()
    preconditioner.step()
    assert preconditioner.factor("middle")[1].abs().sum() > 0


def test_mutant_factors_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    replace(Curvature, "adopt", lambda original, self, other: None)(monkeypatch)
    with pytest.raises(AssertionError):
        test_layers_that_stay_keep_factors_and_inverses()
