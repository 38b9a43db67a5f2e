"""The update against torch's SGD, the trust region against its formula."""

import copy
import math

import pytest
import torch
from torch import nn

from kfac import KFAC
from kfac.update import all_finite, descend, kl_clip_scale, predicted_change, stays_finite

YES = torch.tensor(True)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("maximize", [False, True])
def test_without_weight_decay_the_update_is_that_of_sgd(
    momentum: float, nesterov: bool, maximize: bool
) -> None:
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(3, 2, dtype=torch.float64)) for _ in range(2)]
    mine = [p.detach().clone() for p in theirs]
    buffers = [torch.zeros_like(p) for p in mine] if momentum else None
    sgd = torch.optim.SGD(theirs, lr=0.1, momentum=momentum, nesterov=nesterov, maximize=maximize)
    for _ in range(4):
        gradients = [torch.randn(3, 2, dtype=torch.float64) for _ in mine]
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.clone()
        sgd.step()
        descend(
            mine, gradients, buffers, lr=0.1, momentum=momentum, nesterov=nesterov,
            weight_decay=0.0, maximize=maximize, accept=YES,
        )  # fmt: skip
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-14, atol=1e-14)


def test_weight_decay_is_decoupled_and_per_unit_of_learning_rate() -> None:
    parameter, direction = torch.tensor([2.0]), torch.tensor([1.0])
    settings = {"momentum": 0.0, "nesterov": False, "maximize": False, "accept": YES}
    descend([parameter], [direction], None, lr=0.5, weight_decay=0.1, **settings)
    assert parameter.item() == pytest.approx(2 * (1 - 0.05) - 0.5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_predicted_change_shows_what_is_not_finite(bad: float) -> None:
    for at in range(2):
        pair = [torch.zeros(3), torch.zeros(3)]
        pair[at][1] = bad
        assert not predicted_change(pair[:1], pair[1:], [0.1]).isfinite()


def test_a_rejected_step_leaves_parameters_and_momentum_bit_for_bit() -> None:
    parameters, buffers = [torch.randn(3)], [torch.randn(3)]
    before = copy.deepcopy((parameters, buffers))
    descend(
        parameters, [torch.randn(3)], buffers, lr=0.5, momentum=0.9,
        nesterov=True, weight_decay=0.1, maximize=True, accept=torch.tensor(False),
    )  # fmt: skip
    assert torch.equal(parameters[0], before[0][0])
    assert torch.equal(buffers[0], before[1][0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_element_is_found(bad: float) -> None:
    tensors = [torch.zeros(4), torch.zeros(2, 2, dtype=torch.float64)]
    assert all_finite(tensors)
    tensors[1][1, 0] = bad
    assert not all_finite(tensors)


def test_tensors_without_elements_are_finite() -> None:
    assert all_finite([])
    assert all_finite([torch.zeros(0)])
    assert not all_finite([torch.zeros(0), torch.tensor([math.nan])])


def test_large_but_finite_gradients_are_accepted() -> None:
    assert all_finite([torch.full((1000,), 1e30)])


def test_the_trust_region_follows_its_formula_with_a_rate_per_tensor() -> None:
    directions, gradients = torch.randn(2, 5).abs(), torch.randn(2, 5).abs()
    inner = [(d * g).sum().item() for d, g in zip(directions, gradients, strict=True)]
    for kl_clip in (1e-4, 1e4):
        expected = min(1.0, math.sqrt(kl_clip / (0.1**2 * inner[0] + 0.3**2 * inner[1])))
        change = predicted_change(list(directions), list(gradients), [0.1, 0.3])
        scale = kl_clip_scale(change, kl_clip)
        assert scale.item() == pytest.approx(expected, rel=1e-6)


def test_the_trust_region_binds_in_half_precision() -> None:
    tiny = [torch.full((100,), 1e-5, dtype=torch.float16)]
    scale = kl_clip_scale(predicted_change(tiny, tiny, [10.0]), 1e-8)
    assert scale.item() == pytest.approx((1e-8 / (100 * 100 * 1e-10)) ** 0.5, rel=0.05)


def test_the_trust_region_is_open_where_there_is_no_step() -> None:
    assert kl_clip_scale(torch.zeros(()), 1e-3).item() == 1.0


def test_a_step_that_overflows_half_precision_is_rejected_or_clipped() -> None:
    def train(kl_clip: float | None) -> tuple[nn.Module, KFAC]:
        torch.manual_seed(0)
        model = nn.Linear(2, 2, bias=False).half()
        optimizer = KFAC(model, lr=1e-3, kl_clip=kl_clip, damping=1e-12, fisher="forward-only")
        model.weight.grad = torch.full((2, 2), 1.0, dtype=torch.float16)
        optimizer._engine.blocks.accumulate("", "A", 1e-9 * torch.eye(2).unsqueeze(0), 1)
        optimizer.step()
        return model, optimizer

    torch.manual_seed(0)
    before = nn.Linear(2, 2, bias=False).half().weight
    model, optimizer = train(None)
    assert torch.equal(model.weight, before)
    assert optimizer.diagnostics()["nonfinite_batches"] == 1
    model, optimizer = train(1e-9)
    assert model.weight.isfinite().all()
    assert not torch.equal(model.weight, before)
    assert optimizer.diagnostics()["nonfinite_batches"] == 0


def test_a_learning_rate_may_be_a_tensor() -> None:
    def train(lr: float | torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = KFAC(model, lr=lr, kl_clip=1e-3)
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        return model.weight.detach()

    for lr in (torch.tensor(0.1), torch.tensor([0.1])):
        torch.testing.assert_close(train(0.1), train(lr))


# In float16, whose largest number is 65504; 0.9 of it is 58953.

OVERFLOW = [
    ("a parameter", 60000.0, 0.0, None, {}, False),
    ("less of a parameter", 50000.0, 0.0, None, {}, True),
    ("a step of rate 1", 40000.0, 30000.0, None, {}, False),
    ("a smaller rate", 40000.0, 30000.0, None, {"lr": 0.1}, True),
    ("a buffer", 0.0, 30000.0, 50000.0, {"lr": 1e-4, "momentum": 0.9}, False),
    ("less of a buffer", 0.0, 30000.0, 50000.0, {"lr": 1e-4, "momentum": 0.1}, True),
    ("looking ahead", 0.0, 30000.0, 10000.0, {"momentum": 0.9, "nesterov": True}, False),
    ("not looking ahead", 0.0, 30000.0, 10000.0, {"momentum": 0.9}, True),
    ("a rate", 0.0, 0.0, None, {"lr": 1e5}, False),
    ("a rate of decay", 0.0, 0.0, None, {"lr": 1000.0, "weight_decay": 100.0}, False),
    ("decay beyond zero", 30000.0, 0.0, None, {"lr": 1.0, "weight_decay": 4.0}, False),
    ("decay to zero", 50000.0, 30000.0, None, {"lr": 1.0, "weight_decay": 1.0}, True),
    ("not a number", 0.0, math.nan, None, {}, False),
    ("infinity", 0.0, math.inf, None, {"lr": 1e-4}, False),
]


@pytest.mark.parametrize(
    ("parameter", "direction", "buffer", "settings", "expected"),
    [pytest.param(*case[1:], id=case[0]) for case in OVERFLOW],
)
@pytest.mark.parametrize("elements", [1, 1000])  # a norm of many exceeds the largest
def test_a_step_beyond_the_range_of_its_dtype_is_seen(
    elements: int,
    parameter: float,
    direction: float,
    buffer: float | None,
    settings: dict[str, float],
    expected: bool,
) -> None:
    def tensors(value: float) -> list[torch.Tensor]:
        return [torch.full((elements,), value, dtype=torch.float16), torch.zeros(0).half()]

    buffers = None if buffer is None else tensors(buffer)
    found = stays_finite(tensors(parameter), tensors(direction), buffers, **settings)
    assert found.item() is expected


@pytest.mark.parametrize(("step", "stays"), [(1e-6, True), (3e4, True), (4e4, False)])
def test_what_nesterov_adds_is_bounded_too(step: float, stays: bool) -> None:
    parameter, direction = torch.ones(2).half(), torch.full((2,), step).half()
    found = stays_finite(
        [parameter], [direction], [torch.zeros(2).half()], lr=0.1, momentum=0.9, nesterov=True
    )
    assert bool(found) is stays
