"""Torch's own companions of an optimizer: schedulers, clipping, averages of the parameters."""

import copy
import inspect
import io
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from kfac import KFAC, LevenbergMarquardt

# SequentialLR steps its parts so, in some versions of torch.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
Factory = Callable[[torch.optim.Optimizer], Any]
STEPS = 6
EVERY_STEP: dict[str, Any] = {
    "fisher": "type-2", "factor_update_period": 1, "inverse_update_period": 1, "kl_clip": None,
}  # fmt: skip
SCHEDULERS: dict[type, Factory] = {
    lr_scheduler.LambdaLR: lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.8**step),
    lr_scheduler.MultiplicativeLR: lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.8),
    lr_scheduler.StepLR: lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    lr_scheduler.MultiStepLR: lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.5),
    lr_scheduler.ConstantLR: lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    lr_scheduler.LinearLR: lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    lr_scheduler.ExponentialLR: lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    lr_scheduler.PolynomialLR: lambda o: lr_scheduler.PolynomialLR(o, 4, 2.0),
    lr_scheduler.CosineAnnealingLR: lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    lr_scheduler.CosineAnnealingWarmRestarts: (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2)
    ),
    lr_scheduler.SequentialLR: lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.StepLR(o, 1, 0.5)], [2]
    ),
    lr_scheduler.ChainedScheduler: lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.StepLR(o, 1, 0.5)], o
    ),
    lr_scheduler.ReduceLROnPlateau: lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    lr_scheduler.CyclicLR: lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    lr_scheduler.OneCycleLR: lambda o: lr_scheduler.OneCycleLR(o, 0.1, STEPS),
    SWALR: lambda o: SWALR(o, 0.01, 3),
}
# These bring learning rates and momenta of their own.
CYCLES = (lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR)
every_scheduler = pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 3, dtype=torch.float64, generator=generator)
    return x, (x[:, 0] > 0).long()


def vector(parameters: Iterable[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


def closure_of(model: nn.Module, criterion: nn.Module, optimizer: KFAC, step: int) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = batch(step)
        loss: Tensor = criterion(model(x), y)
        loss.backward()
        return loss

    return closure


def advance(scheduler: Any) -> None:
    """One step of a scheduler; a plateau is told of a loss that stays."""
    scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))


class UnitSteps:
    """K-FAC with lr=1 and without momentum, on a model that follows another one: −Δ."""

    def __init__(self) -> None:
        self.model, self.criterion = net(), nn.CrossEntropyLoss()
        settings = EVERY_STEP | {"lr": 1.0, "momentum": 0.0}
        self.optimizer = KFAC(self.model, criterion=self.criterion, **settings)

    def direction(self, model: nn.Module, step: int) -> Tensor:
        """Δ of the step that starts at a model's parameters."""
        self.model.load_state_dict(model.state_dict())
        before = vector(self.model.parameters())
        self.optimizer.step(closure_of(self.model, self.criterion, self.optimizer, step))
        return before - vector(self.model.parameters())


@pytest.mark.promise("`torch.optim.lr_scheduler`")
def test_every_scheduler_of_torch_is_covered() -> None:
    found = {
        kind
        for _, kind in inspect.getmembers(lr_scheduler, inspect.isclass)
        if issubclass(kind, (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau))
    }
    abstract = {lr_scheduler.LRScheduler, lr_scheduler._LRScheduler}
    missing = found - abstract - SCHEDULERS.keys()
    assert not missing, f"not covered: {missing}"


@every_scheduler
@pytest.mark.promise("`torch.optim.lr_scheduler`")
def test_plain_steps_follow_the_scheduler(kind: type) -> None:
    """p ← p − lr·m, m ← momentum·m + Δ with the lr and momentum that SGD would have."""
    model, criterion, unit = net(), nn.CrossEntropyLoss(), UnitSteps()
    optimizer = KFAC(model, criterion=criterion, lr=0.1, momentum=0.9, **EVERY_STEP)
    other = torch.optim.SGD(net().parameters(), lr=0.1, momentum=0.9)
    schedulers = [SCHEDULERS[kind](o) for o in (optimizer, other)]
    buffer, seen = torch.zeros_like(vector(model.parameters())), []
    for step in range(STEPS):
        mine, theirs = optimizer.param_groups[0], other.param_groups[0]
        assert (mine["lr"], mine["momentum"]) == (theirs["lr"], theirs["momentum"])
        seen.append(mine["lr"])
        buffer = mine["momentum"] * buffer + unit.direction(model, step)
        expected = vector(model.parameters()) - mine["lr"] * buffer
        optimizer.step(closure_of(model, criterion, optimizer, step))
        torch.testing.assert_close(vector(model.parameters()), expected, rtol=1e-9, atol=1e-12)
        other.step()
        for scheduler in schedulers:
            advance(scheduler)
    assert len(set(seen)) > 1


@every_scheduler
@pytest.mark.promise("`torch.optim.lr_scheduler`")
def test_automatic_steps_with_a_given_lr_follow_the_scheduler(kind: type) -> None:
    """δ ← −lr·Δ + μ·δ with the scheduled lr, and the momentum μ that the quadratic model chose."""
    model, criterion, unit = net(), nn.CrossEntropyLoss(), UnitSteps()
    optimizer = KFAC(model, criterion=criterion, lr=0.1, momentum="auto", **EVERY_STEP)
    scheduler = SCHEDULERS[kind](optimizer)
    delta = torch.zeros_like(vector(model.parameters()))
    for step in range(STEPS):
        lr, momentum = (optimizer.param_groups[0][key] for key in ("lr", "momentum"))
        direction, before = unit.direction(model, step), vector(model.parameters())
        optimizer.step(closure_of(model, criterion, optimizer, step))
        chosen = optimizer.diagnostics()["momentum"] if momentum == "auto" else momentum
        delta = chosen * delta - lr * direction
        after = vector(model.parameters())
        torch.testing.assert_close(after, before + delta, rtol=1e-9, atol=1e-12)
        advance(scheduler)
    assert (momentum == "auto") == (kind not in CYCLES)
    assert optimizer.diagnostics()["rejected_steps"] == 0


@every_scheduler
@pytest.mark.promise("`torch.optim.lr_scheduler`")
def test_an_automatic_lr_cannot_be_scheduled(kind: type) -> None:
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, lr="auto", momentum="auto")
    if kind in CYCLES:
        SCHEDULERS[kind](optimizer)
        assert isinstance(optimizer.param_groups[0]["lr"], float)
        return

    def train() -> None:
        scheduler = SCHEDULERS[kind](optimizer)
        for step in range(STEPS):
            optimizer.step(closure_of(model, criterion, optimizer, step))
            advance(scheduler)

    for _ in range(2):  # loaded groups are no less strict
        with pytest.raises(TypeError, match="There is nothing to schedule"):
            train()
        assert optimizer.param_groups[0]["lr"] == "auto"
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.promise("`torch.load(weights_only=True)`")
def test_automatic_settings_are_saved_as_plain_strings() -> None:
    optimizer = KFAC(net(), criterion=nn.CrossEntropyLoss(), lr="auto", momentum="auto")
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    (group,) = torch.load(file, weights_only=True)["param_groups"]
    assert type(group["lr"]) is type(group["momentum"]) is str
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state_dict()["param_groups"] == [group]


def test_other_strings_in_a_group_stay_what_they_are() -> None:
    layer = nn.Linear(2, 2)
    groups = [{"params": list(layer.parameters()), "name": "body"}]
    optimizer = KFAC(layer, groups)
    optimizer.load_state_dict(optimizer.state_dict())
    assert type(optimizer.param_groups[0]["name"]) is str


@pytest.mark.parametrize(
    "clip",
    [
        lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e-2),
        lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e-2, float("inf")),
        lambda parameters: nn.utils.clip_grad_value_(parameters, 1e-3),
    ],
    ids=["norm", "largest element", "value"],
)
@pytest.mark.promise("`clip_grad_norm_`, edits of `.grad` before `step`")
def test_clipping_changes_the_gradient_and_not_the_factors(clip: Any) -> None:
    """(A ⊗ G + λI)⁻¹ of the clipped gradient, with the factors of the plain one."""
    model, criterion = net(), nn.CrossEntropyLoss()
    settings = EVERY_STEP | {"lr": 0.1, "momentum": 0.0, "damping": 0.3, "inverse": "eigen"}
    optimizer = KFAC(model, criterion=criterion, **settings)
    x, y = batch(0)
    criterion(model(x), y).backward()
    clip(model.parameters())
    layer: Any = model[2]
    gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], dim=1)
    inputs = torch.cat([model[:2](x), torch.ones(8, 1).double()], dim=1)
    p = model(x).softmax(1)
    a = inputs.T @ inputs / 8
    g = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    damped = torch.kron(g, a) + 0.3 * torch.eye(10).double()
    direction = torch.linalg.solve(damped, gradient.flatten()).view(2, 5)
    expected = torch.cat([layer.weight, layer.bias[:, None]], dim=1) - 0.1 * direction
    optimizer.step()
    torch.testing.assert_close(torch.cat([layer.weight, layer.bias[:, None]], dim=1), expected)


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


@pytest.mark.promise("`AveragedModel`, `get_ema_multi_avg_fn`, `update_bn`, `SWALR`")
@pytest.mark.parametrize("decay", [None, 0.5])
def test_averaged_models_are_those_of_the_parameters(decay: float | None) -> None:
    """θ̄ is the mean, or the exponential average, of what K-FAC has trained; training goes on."""

    def train(average: bool) -> tuple[nn.Module, list[Tensor], Any]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))
        model.double()
        criterion = nn.CrossEntropyLoss()
        optimizer = KFAC(model, criterion=criterion, lr=0.1, factor_update_period=2)
        scheduler = SWALR(optimizer, 0.02, 2)
        multi = None if decay is None else get_ema_multi_avg_fn(decay)
        averaged = AveragedModel(model, multi_avg_fn=multi)
        seen = []
        for step in range(STEPS):
            optimizer.step(closure_of(model, criterion, optimizer, step))
            scheduler.step()
            seen.append(vector(model.parameters()))
            if average:
                averaged.update_parameters(model)
                averaged(batch(step)[0])  # an evaluation with gradients
                update_bn([batch(step)[0]], averaged)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
        return model, seen, averaged

    model, seen, averaged = train(average=True)
    expected = seen[0]
    for count, latest in enumerate(seen[1:], start=1):
        share = 1 / (count + 1) if decay is None else 1 - decay
        expected = (1 - share) * expected + share * latest
    torch.testing.assert_close(vector(averaged.module.parameters()), expected)
    inputs = averaged.module[0](batch(STEPS - 1)[0])
    torch.testing.assert_close(averaged.module[1].running_mean, inputs.mean(0))
    alone, _, _ = train(average=False)
    torch.testing.assert_close(dict(model.state_dict()), dict(alone.state_dict()), rtol=0, atol=0)


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


@pytest.mark.promise("TensorBoard, `diagnostics()`")
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lr": "auto", "momentum": "auto", "damping": LevenbergMarquardt(search_period=2)},
        {"graft": "adam", "burn_in": 1, "inverse": "ekfac"},
    ],
    ids=["plain", "automatic", "grafted"],
)
def test_every_diagnostic_can_be_logged(settings: dict[str, Any], tmp_path: Any) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion=criterion, **settings)
    logged: list[dict[str, float]] = []
    with SummaryWriter(tmp_path) as writer:
        for step in range(3):
            optimizer.step(closure_of(model, criterion, optimizer, step))
            logged.append(optimizer.diagnostics())
            for key, value in logged[-1].items():
                writer.add_scalar(f"kfac/{key}", value, step)
    found = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert set(found.Tags()["scalars"]) == {f"kfac/{key}" for row in logged for key in row}
    for key, (step, row) in itertools.product(logged[-1], enumerate(logged)):
        if key in row:
            events = {event.step: event.value for event in found.Scalars(f"kfac/{key}")}
            assert events[step] == pytest.approx(row[key], nan_ok=True)


@pytest.mark.promise("`torch.optim.lr_scheduler`")
@pytest.mark.parametrize("start", [0.1, 1 / 3, 0.9])
def test_a_ramp_down_may_miss_zero_by_rounding(start: float) -> None:
    lowest = []
    for length in range(1, 25):
        layer = nn.Linear(2, 2)
        optimizer = KFAC(layer, lr=0.3, factor_update_period=100)
        scheduler = lr_scheduler.LinearLR(optimizer, start, end_factor=0.0, total_iters=length)
        for _ in range(length + 1):
            optimizer.zero_grad()
            layer(torch.ones(3, 2)).sum().backward()
            optimizer.step()
            scheduler.step()
        lowest.append(optimizer.param_groups[0]["lr"])
    assert min(lowest) < 0  # else this tests nothing
