"""A training loop with timm's scaler, averages, schedules and parameter groups."""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac import KFAC

pytestmark = [
    pytest.mark.skipif(find_spec("timm") is None, reason="timm is not installed"),
    pytest.mark.promise("timm: `NativeScaler`, `ModelEmaV3`, its schedulers and groups"),
]
STEPS = 4
SETTINGS: dict[str, Any] = {"factor_update_period": 2, "inverse_update_period": 3}


def net() -> nn.Module:
    import timm

    torch.manual_seed(1)
    model: nn.Module = timm.create_model("test_resnet", num_classes=3)
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(4, 3, 32, 32, generator=generator)
    return x, torch.randint(0, 3, (4,), generator=generator)


def clip(mode: str) -> Callable[[Iterable[nn.Parameter]], Any]:
    from timm.utils.agc import adaptive_clip_grad

    return {
        "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.02),
        "value": lambda parameters: nn.utils.clip_grad_value_(parameters, 0.02),
        "agc": lambda parameters: adaptive_clip_grad(parameters, 0.02),
    }[mode]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()))


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("mode", [None, "norm", "value", "agc"])
def test_the_native_scaler_changes_nothing(mode: str | None, fisher: Any) -> None:
    """Scaled by a power of 2 and accumulated over two batches, as without a scaler."""
    from timm.utils import NativeScaler

    models, optimizers = [], []
    scaler, criterion = NativeScaler(device="cpu"), nn.CrossEntropyLoss()
    for scaled in (True, False):
        models.append(model := net())
        settings = SETTINGS | {"criterion": criterion, "fisher": fisher}
        if scaled and fisher == "empirical" and mode is not None:
            settings["grad_scaler"] = scaler._scaler
        optimizers.append(KFAC(model, lr=0.1, **settings))
    for step in range(STEPS):
        x, y = batch(step)
        need_update = step % 2 == 1
        scaler(
            criterion(models[0](x), y) / 2,
            optimizers[0],
            clip_grad=None if mode is None else 0.02,
            clip_mode=mode or "norm",
            parameters=models[0].parameters(),
            need_update=need_update,
        )
        (criterion(models[1](x), y) / 2).backward()
        if need_update:
            if mode is not None:
                clip(mode)(models[1].parameters())
            optimizers[1].step()
            for optimizer in optimizers:
                optimizer.zero_grad()
    assert_same(*models)


def test_schedules_set_the_learning_rates_of_groups_with_layer_decay() -> None:
    from timm.optim import param_groups_layer_decay
    from timm.scheduler import CosineLRScheduler, create_scheduler_v2

    def schedulers(model: nn.Module, make: Any) -> tuple[torch.optim.Optimizer, list[Any]]:
        optimizer = make(param_groups_layer_decay(model, weight_decay=0.01, layer_decay=0.5))
        first, _ = create_scheduler_v2(
            optimizer, "cosine", num_epochs=2, updates_per_epoch=2, warmup_epochs=1,
            step_on_epochs=False,
        )  # fmt: skip
        return optimizer, [first, CosineLRScheduler(optimizer, 3, lr_min=0.01)]

    model = net()
    mine, my_schedulers = schedulers(model, lambda groups: KFAC(model, groups, lr=0.1))
    other, other_schedulers = schedulers(net(), lambda groups: torch.optim.SGD(groups, lr=0.1))
    for step in range(STEPS):
        x, y = batch(step)
        nn.functional.cross_entropy(model(x), y).backward()
        mine.step()
        mine.zero_grad()
        for used in (my_schedulers, other_schedulers):
            used[0].step_update(step)
        lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in (mine, other)]
        assert lrs[0] == lrs[1]
        assert len(set(lrs[0])) > 1
    for used in (my_schedulers, other_schedulers):
        used[1].step(1)
    assert [g["lr"] for g in mine.param_groups] == [g["lr"] for g in other.param_groups]


def test_an_automatic_lr_is_not_scheduled() -> None:
    from timm.scheduler import CosineLRScheduler

    optimizer = KFAC(net(), lr="auto", criterion=nn.CrossEntropyLoss())
    with pytest.raises(TypeError, match="There is nothing to schedule"):
        CosineLRScheduler(optimizer, 3).step(1)


def test_the_average_of_the_model_follows_and_changes_nothing() -> None:
    from timm.utils import ModelEmaV3

    def train(with_average: bool) -> tuple[nn.Module, list[Tensor], Any]:
        model, criterion = net(), nn.CrossEntropyLoss()
        optimizer = KFAC(model, lr=0.1, criterion=criterion, **SETTINGS)
        average = ModelEmaV3(model, decay=0.7) if with_average else None
        weight, seen = next(model.parameters()), [next(model.parameters()).detach().clone()]
        for step in range(STEPS):
            x, y = batch(step)
            criterion(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(weight.detach().clone())
            if average is not None:
                average.update(model, step=step)
                average(x).sum().backward()  # an evaluation with gradients
        return model, seen, average

    model, seen, average = train(True)
    expected = seen[2]  # the first two updates copy
    for latest in seen[3:]:
        expected = 0.7 * expected + 0.3 * latest
    torch.testing.assert_close(next(average.module.parameters()).detach(), expected)
    assert_same(model, train(False)[0])
