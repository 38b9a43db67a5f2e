"""What must not change the step: repetition, micro-batches, reduction, AMP's scale, coordinates."""

import copy
from collections.abc import Callable
from itertools import product

import oracles
import pytest
import torch
from test_exactness import PLAIN, close, rand, randn
from torch import Tensor, nn

from kfac import KFAC

Batch = tuple[Tensor, Tensor]

FISHERS = {
    "empirical": {"fisher": "empirical"},
    "empirical, criterion": {"fisher": "empirical", "criterion": True},
    "forward-only": {"fisher": "forward-only"},
    "forward-only, criterion": {"fisher": "forward-only", "criterion": True},
    "type-2": {"fisher": "type-2", "criterion": True},
}

CRITERIA: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "cross-entropy": lambda: (nn.CrossEntropyLoss(label_smoothing=0.1), torch.arange(8) % 3),
    "binary": lambda: (nn.BCEWithLogitsLoss(pos_weight=torch.full((3,), 2.0)), rand(8, 3).round()),
    "squared error": lambda: (nn.MSELoss(), randn(8, 3)),
}


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def problem(name: str = "cross-entropy") -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    criterion, target = CRITERIA[name]()
    return net().double(), criterion.double(), randn(8, 2, 5, 5), target


def settings_of(fisher: str, criterion: nn.Module) -> dict:
    settings = dict(FISHERS[fisher])
    if settings.pop("criterion", False):
        settings["criterion"] = criterion
    else:
        settings["loss_reduction"] = criterion.reduction
    return settings


def trained(
    model: nn.Module,
    criterion: nn.Module,
    batches: list[Batch],
    fisher: str,
    divisor: float = 1.0,
    scaler: torch.amp.GradScaler | None = None,
    before_step: Callable[[KFAC], None] = lambda optimizer: None,
    steps: int = 2,
    **settings: object,
) -> list[Tensor]:
    """Parameters after two steps, each accumulated over all batches, from a copy of the model."""
    model, criterion = copy.deepcopy((model, criterion))
    plain = PLAIN | settings_of(fisher, criterion) | {"lr": 0.5} | settings
    optimizer = KFAC(model, **plain)
    for _ in range(steps):
        optimizer.zero_grad()
        for x, y in batches:
            loss = criterion(model(x), y) / divisor
            (loss if scaler is None else scaler.scale(loss)).backward()
        before_step(optimizer)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return [p.detach() for p in model.parameters()]


def micro_batches(x: Tensor, y: Tensor, count: int) -> list[Batch]:
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


def summed(criterion: nn.Module) -> nn.Module:
    criterion = copy.deepcopy(criterion)
    criterion.reduction = "sum"
    return criterion


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", CRITERIA)
def test_repeating_the_batch_changes_nothing(name: str, fisher: str, inverse: str) -> None:
    model, criterion, x, y = problem(name)
    repeated = [(torch.cat([x] * 8), torch.cat([y] * 8))]
    expected = trained(model, criterion, [(x, y)], fisher, inverse=inverse)
    close(trained(model, criterion, repeated, fisher, inverse=inverse), expected)


def check_micro_batches(name: str, fisher: str, count: int, sharing: str = "expand") -> None:
    model, criterion, x, y = problem(name)
    batches = micro_batches(x, y, count)
    expected = trained(model, criterion, [(x, y)], fisher, weight_sharing=sharing)
    close(trained(model, criterion, batches, fisher, count, weight_sharing=sharing), expected)


@pytest.mark.promise("closures, gradient accumulation")
@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("name", CRITERIA)
def test_micro_batches_equal_one_batch(name: str, fisher: str, sharing: str, count: int) -> None:
    check_micro_batches(name, fisher, count, sharing)


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize(
    ("name", "fisher"),
    # without a criterion the loss terms are the examples, as in cross-entropy
    [(n, f) for n, f in product(CRITERIA, FISHERS) if "criterion" in FISHERS[f] or "cross" in n],
)
def test_summed_loss_steps_like_the_mean(name: str, fisher: str, count: int) -> None:
    model, criterion, x, y = problem(name)
    batches = micro_batches(x, y, count)
    expected = trained(model, criterion, [(x, y)], fisher)
    close(trained(model, summed(criterion), batches, fisher), expected)


@pytest.mark.parametrize("fisher", [f for f in FISHERS if "criterion" in FISHERS[f]])
def test_uneven_micro_batches_of_a_summed_loss_equal_one_batch(fisher: str) -> None:
    model, _, x, y = problem()
    weights = torch.tensor([0.5, 2.0, 1.3], dtype=torch.float64)
    criterion = nn.CrossEntropyLoss(weights, ignore_index=1)
    batches = list(zip(x.split([1, 2, 5]), y.split([1, 2, 5]), strict=True))
    expected = trained(model, criterion, [(x, y)], fisher)
    close(trained(model, summed(criterion), batches, fisher), expected)


@pytest.mark.parametrize("fisher", FISHERS)
def test_summed_loss_steps_like_the_mean_between_factor_updates(fisher: str) -> None:
    model, criterion, x, y = problem()
    batches, settings = micro_batches(x, y, 2), {"factor_update_period": 2, "steps": 4}
    expected = trained(model, criterion, [(x, y)], fisher, **settings)
    close(trained(model, summed(criterion), batches, fisher, **settings), expected)


# Several forwards before one backward: (losses of the micro-batches) -> how they come about

Losses = Callable[[nn.Module, nn.Module, list[Batch]], list[Tensor]]


def forward_by_forward(model: nn.Module, criterion: nn.Module, batches: list[Batch]):
    return [criterion(model(x), y) for x, y in batches]


def all_forwards_first(model: nn.Module, criterion: nn.Module, batches: list[Batch]):
    outputs = [model(x) for x, _ in batches]
    return [criterion(output, y) for output, (_, y) in zip(outputs, batches, strict=True)]


def by_function(model: nn.Module, criterion: nn.Module, batches: list[Batch]):
    smoothing, reduction = criterion.label_smoothing, criterion.reduction
    return [
        nn.functional.cross_entropy(model(x), y, label_smoothing=smoothing, reduction=reduction)
        for x, y in batches
    ]


@pytest.mark.promise("several forward passes before one `backward`")
@pytest.mark.parametrize("sizes", [[4, 4], [2, 6], [6, 2]], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("losses", [forward_by_forward, all_forwards_first, by_function])
@pytest.mark.parametrize("fisher", FISHERS)
def test_several_forwards_may_share_one_backward(
    fisher: str, losses: Losses, reduction: str, sizes: list[int]
) -> None:
    model, criterion, x, y = problem()
    criterion.reduction = reduction
    expected = trained(model, criterion, [(x, y)], fisher, steps=1)
    optimizer = KFAC(model, **PLAIN | settings_of(fisher, criterion) | {"lr": 0.5})
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    shares = [size / 8 if reduction == "mean" else 1 for size in sizes]
    parts = zip(losses(model, criterion, batches), shares, strict=True)
    sum(loss * share for loss, share in parts).backward()
    optimizer.step()
    close([p.detach() for p in model.parameters()], expected)


# AMP


def scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("fisher", FISHERS)
def test_amp_scale_changes_nothing(fisher: str, count: int) -> None:
    model, criterion, x, y = problem()
    batches = micro_batches(x, y, count)
    expected = trained(model, criterion, batches, fisher, count)
    close(trained(model, criterion, batches, fisher, count, scaler()), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_unscale_and_clipping_see_the_plain_gradient(fisher: str, reduction: str) -> None:
    model, criterion, x, y = problem()
    criterion.reduction = reduction

    def clip(optimizer: KFAC) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        assert nn.utils.clip_grad_norm_(parameters, 1e-2) > 1e-2

    def unscale_and_clip(optimizer: KFAC) -> None:
        amp.unscale_(optimizer)
        clip(optimizer)

    amp = scaler()
    expected = trained(model, criterion, [(x, y)], fisher, before_step=clip)
    actual = trained(model, criterion, [(x, y)], fisher, 1, amp, unscale_and_clip, grad_scaler=amp)
    close(actual, expected)


@pytest.mark.parametrize("fisher", FISHERS)
def test_unscale_without_the_scaler_is_an_error_only_for_the_empirical_fisher(fisher: str) -> None:
    model, criterion, x, y = problem()
    amp = scaler()

    def run() -> list[Tensor]:
        return trained(model, criterion, [(x, y)], fisher, 1, amp, amp.unscale_)

    if "empirical" in fisher:
        with pytest.raises((RuntimeError, ValueError), match="grad_scaler"):
            run()
    else:
        close(run(), trained(model, criterion, [(x, y)], fisher))


def steps_around_an_overflow(fisher: str, overflow: bool, unscale: bool = False) -> list[Tensor]:
    model, criterion, x, y = problem()
    amp = scaler()
    plain = PLAIN | settings_of(fisher, criterion) | {"lr": 0.5, "momentum": 0.9}
    optimizer = KFAC(model, **plain, grad_scaler=amp)
    for factor in (1.0, torch.inf, 1.0, 1.0) if overflow else (1.0, 1.0, 1.0):
        inputs = x if factor == 1 else 10 * x
        optimizer.zero_grad()
        amp.scale(factor * criterion(model(inputs), y)).backward()
        before = [p.clone() for p in model.parameters()]
        if unscale:
            amp.unscale_(optimizer)
        amp.step(optimizer)
        amp.update()
        moved = any(not p.equal(b) for p, b in zip(model.parameters(), before, strict=True))
        assert moved == (factor == 1), "a step with overflow must not move, any other must"
    return [p.detach() for p in model.parameters()]


def check_overflow(fisher: str, unscale: bool = False) -> None:
    expected = steps_around_an_overflow(fisher, overflow=False, unscale=unscale)
    close(steps_around_an_overflow(fisher, overflow=True, unscale=unscale), expected)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_step_with_overflow_leaves_no_trace(fisher: str, unscale: bool) -> None:
    check_overflow(fisher, unscale)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_a_batch_that_is_not_finite_leaves_no_trace(
    fisher: str, inverse: str, value: float
) -> None:
    results = []
    for factors in ((1.0, value, 1.0, 1.0), (1.0, 1.0, 1.0)):
        model, criterion, x, y = problem()
        plain = PLAIN | settings_of(fisher, criterion) | {"lr": 0.5, "momentum": 0.9}
        optimizer = KFAC(model, **plain, inverse=inverse)
        for factor in factors:
            optimizer.zero_grad()
            criterion(model(x * factor), y).backward()
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    close(*results)


def test_zero_grad_after_a_step_that_the_user_skipped_discards_its_statistics() -> None:
    model, criterion, x, y = problem()
    expected = trained(model, criterion, [(x, y)], "type-2")
    model, criterion = copy.deepcopy((model, criterion))
    optimizer = KFAC(model, **PLAIN | {"lr": 0.5}, fisher="type-2", criterion=criterion)
    for factor in (10, 1, 10, 1):
        optimizer.zero_grad()
        criterion(model(factor * x), y).backward()
        if factor == 1:
            optimizer.step()
    close([p.detach() for p in model.parameters()], expected)


# Running average and damping


def check_running_average(decay: float = 0.7, period: int = 1) -> None:
    model, criterion, x, y = problem()
    plain = PLAIN | {"lr": 0.0, "factor_decay": decay, "factor_update_period": period}
    reference, loss = copy.deepcopy((model, criterion))
    optimizer = KFAC(model, **plain, fisher="type-2", criterion=criterion)
    values: dict[str, list[tuple[Tensor, Tensor]]] = {"0": [], "4": []}
    for step in range(4):
        inputs = (1 + step) * x.roll(step, 0)
        optimizer.zero_grad()
        criterion(model(inputs), y).backward()
        optimizer.step()
        for name in values:
            if step % period == 0:
                layer = oracles.observe(reference, name, inputs, y, loss)
                pair = oracles.input_factor(layer), oracles.exact_output_factor(layer)
                values[name].append(pair)
            for actual, seen in zip(
                optimizer.factor(name), zip(*values[name], strict=True), strict=True
            ):
                close(actual, oracles.weighted_average(seen, decay))


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("decay", [0.0, 0.7, 0.99])
def test_running_average_is_exact_from_the_first_update_on(decay: float, period: int) -> None:
    check_running_average(decay, period)


def check_damping_is_not_accumulated(inverse: str = "eigen") -> None:
    model, criterion, x, y = problem()
    optimizer = KFAC(model, **PLAIN, inverse=inverse, fisher="type-2", criterion=criterion)
    initial = copy.deepcopy(model.state_dict())
    for step in range(3):
        model.load_state_dict(initial)
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        state = {name: p.clone() for name, p in model.state_dict().items()}
        if step == 0:
            expected = state
        close(state, expected)


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
def test_damping_is_not_accumulated(inverse: str) -> None:
    check_damping_is_not_accumulated(inverse)


@pytest.mark.parametrize("inverse", ["eigen", "cholesky"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_large_damping_is_gradient_descent(fisher: str, inverse: str) -> None:
    model, criterion, x, y = problem()
    gradients = oracles.gradients(model, x, y, criterion)
    damping = 1e16
    settings = {"inverse": inverse, "damping": damping, "lr": damping, "steps": 1}
    actual = trained(model, criterion, [(x, y)], fisher, **settings)
    for after, before, gradient in zip(actual, model.parameters(), gradients.values(), strict=True):
        torch.testing.assert_close(after, before.detach() - gradient, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("inverse", ["eigen", "cholesky", "newton-schulz", "inverse-free"])
def test_autocast_around_the_step_changes_nothing(inverse: str) -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model, criterion = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), nn.MSELoss()
        optimizer = KFAC(model, lr=0.1, criterion=criterion, inverse=inverse)
        criterion(model(torch.randn(8, 3)), torch.randn(8, 2)).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            optimizer.step()
        results.append([p.detach() for p in model.parameters()])
    assert all(map(torch.equal, *results))
