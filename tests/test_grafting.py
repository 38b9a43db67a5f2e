"""With a graft, each layer's step has K-FAC's direction and another optimizer's length."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import oracles
import pytest
import torch
from test_cuda import Convolutions, Tokens
from test_exactness import (
    EXACT,
    PLAIN,
    UPDATES,
    Problem,
    close,
    gradient_blocks,
    linear_net,
    parameters,
    randn,
    start,
    train_step,
)
from torch import Tensor, nn

from kfac import KFAC

GRAFTS = ["sgd", "adam"]
PROBLEMS: dict[str, Callable[[], Problem]] = {
    name: EXACT[name]
    for name in ("deep linear net", "deep linear net without bias", "3×3", "groups")
} | {
    "equal layers": lambda: Problem(
        linear_net(sizes=(4, 4, 4, 4)), randn(7, 4), randn(7, 4), nn.MSELoss()
    )
}


def reference(graft: str, gradients: list[Tensor]) -> Tensor:
    return gradients[-1] if graft == "sgd" else oracles.adam_update(gradients)


@pytest.mark.parametrize("graft", GRAFTS)
@pytest.mark.parametrize("rule", ["plain", "all"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_a_step_has_the_natural_gradients_direction_and_the_others_length(
    name: str, rule: str, graft: str
) -> None:
    torch.manual_seed(0)
    problem = PROBLEMS[name]()
    settings = {"fisher": "type-2", "inverse": "eigen", "factor_decay": 0.0, "graft": graft}
    optimizer, trained = start(problem, **settings, **UPDATES[rule])
    rules = {name: oracles.Descent(**UPDATES[rule]) for name in oracles.layer_names(problem.model)}
    history: dict[str, list[Tensor]] = {name: [] for name in rules}
    for _ in range(3):
        problem.model.load_state_dict(trained.model.state_dict())
        data = problem.inputs, problem.target, problem.criterion
        expected = {}
        for layer, gradient in gradient_blocks(problem).items():
            history[layer].append(gradient)
            fisher = oracles.ggn_blocks(problem.model, layer, *data)
            direction = oracles.solve(fisher, PLAIN["damping"], gradient)
            expected[layer] = oracles.grafted(direction, reference(graft, history[layer]))
        train_step(optimizer, trained)
        before, after = parameters(problem), parameters(trained)
        for layer, update in rules.items():
            close(after[layer], update(before[layer], expected[layer]))


def test_adams_length_is_that_of_torch() -> None:
    gradients = [randn(4, 3) for _ in range(5)]
    parameter = nn.Parameter(randn(4, 3))
    adam = torch.optim.Adam([parameter], lr=1.0, betas=(0.0, 0.999))
    for count, gradient in enumerate(gradients, 1):
        before, parameter.grad = parameter.detach().clone(), gradient
        adam.step()
        close(before - parameter, oracles.adam_update(gradients[:count]))


# Every kind of layer: the blocks by hand, as parameters or rows of them

Blocks = list[list[tuple[str, slice]]]
ALL = slice(None)


def together(*names: str) -> Blocks:
    return [[(f"{name}.{kind}", ALL) for kind in ("weight", "bias")] for name in names]


BLOCKS: dict[str, tuple[type[nn.Module], Blocks]] = {
    "convolutions": (Convolutions, together("0", "1", "3", "4", "6")),
    "tokens": (
        Tokens,
        [
            [("table.weight", ALL), ("head.bias", ALL)],
            [("bag.weight", ALL)],
            *(
                [(f"attention.in_proj_{kind}", slice(4 * i, 4 * i + 4)) for kind in kinds]
                for i in range(3)
                for kinds in [("weight", "bias")]
            ),
            *together("attention.out_proj", "norm", "body"),
        ],
    ),
}


def flat(values: Mapping[str, Tensor], block: list[tuple[str, slice]]) -> Tensor:
    return torch.cat([values[name][rows].flatten() for name, rows in block])


def step_of(model: nn.Module, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """How far the first step moves each parameter, and its gradient."""
    model, criterion = copy.deepcopy(model), nn.CrossEntropyLoss()
    plain = {"lr": 1.0, "momentum": 0.0, "kl_clip": None, "fisher": "empirical"}
    optimizer = KFAC(model, criterion=criterion, **plain | settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, target = model.batch(torch.Generator().manual_seed(1))
    criterion(model(x), target).backward()
    optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    return moved, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("most", [1024, 5, 1])
@pytest.mark.parametrize("graft", GRAFTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_is_rescaled_as_a_whole(name: str, graft: str, most: int) -> None:
    torch.manual_seed(0)
    make, blocks = BLOCKS[name]
    model = make().double()
    own, gradients = step_of(model, max_factor_dim=most)
    found, _ = step_of(model, max_factor_dim=most, graft=graft, kl_clip=1e-9)
    covered = {name for block in blocks for name, _ in block}
    assert covered == {name for name, _ in model.named_parameters()}
    for block in blocks:
        update = reference(graft, [flat(gradients, block)])
        if update.norm() > 1e-3:  # the keys' bias has none but rounding errors
            close(flat(found, block), oracles.grafted(flat(own, block), update))


# What a step does besides


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def optimizer_of(model: nn.Module, **settings: Any) -> KFAC:
    return KFAC(model, lr=0.01, factor_update_period=1, fisher="empirical", **settings)


def train(model: nn.Module, optimizer: KFAC, factors: list[float]) -> list[Tensor]:
    for index, factor in enumerate(factors):
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(6, 3, generator=generator).to(model[0].weight.dtype)
        optimizer.zero_grad()
        (factor * model(x).square().mean()).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_parameters_of_the_fallback_are_not_grafted() -> None:
    results = []
    for graft in (None, "sgd", "adam"):
        model = net()
        results.append(train(model, optimizer_of(model, graft=graft), [1.0])[2])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("graft", GRAFTS)
def test_a_gradient_of_zero_moves_nothing(graft: str) -> None:
    model = net()
    optimizer = optimizer_of(model, graft=graft, momentum=0.0)
    before = train(model, optimizer, [1.0])
    optimizer.zero_grad()
    (0.0 * model(torch.ones(6, 3, dtype=torch.float64)).sum()).backward()
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert optimizer.diagnostics()["nonfinite_batches"] == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e300])
def test_a_bad_batch_leaves_the_averages_alone(bad: float) -> None:
    model = net()
    optimizer = optimizer_of(model, graft="adam")
    before = train(model, optimizer, [1.0, 1.0])
    state = copy.deepcopy(optimizer.state_dict()["state"])
    train(model, optimizer, [bad])
    assert all(map(torch.equal, before, model.parameters()))
    after = optimizer.state_dict()["state"]
    assert {"graft_average", "graft_weight"} < state[0].keys()
    for index, mine in state.items():
        assert all(torch.equal(value, after[index][key]) for key, value in mine.items())


@pytest.mark.parametrize("graft", GRAFTS)
def test_a_gradient_scaler_changes_nothing(graft: str) -> None:
    results = []
    for scale in (None, 2.0**60):
        model, criterion = net(), nn.MSELoss()
        optimizer = optimizer_of(model, graft=graft, criterion=criterion)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        for factor in (torch.inf, 1.0, 1.0) if scale else (1.0, 1.0):
            optimizer.zero_grad()
            x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3)
            scaler.scale(factor * criterion(model(x), x[:, :2])).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(list(model.parameters()))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_learning_rates_of_groups_apply_to_the_grafted_step() -> None:
    moved = []
    for lr in (0.01, 0.03):
        model = net()
        weights = [p for p in model.parameters() if p.dim() > 1]
        groups = [
            {"params": weights},
            {"params": [p for p in model.parameters() if p.dim() == 1], "lr": lr},
        ]
        before = [p.detach().clone() for p in model.parameters()]
        after = train(model, KFAC(model, groups, lr=0.01, graft="sgd"), [1.0])
        moved.append([a - b for a, b in zip(after, before, strict=True)])
    close(moved[1][0], moved[0][0])
    close(moved[1][1], 3 * moved[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_averages_keep_their_precision_and_resume(dtype: torch.dtype) -> None:
    whole = net(dtype)
    optimizer = optimizer_of(whole, graft="adam")
    expected = train(whole, optimizer, [0.01] * 4)
    weight = optimizer.state[whole[0].weight]["graft_average"]
    assert weight.dtype == torch.promote_types(dtype, torch.float32)
    assert all(value.isfinite().all() for value in expected)
    first, second = net(dtype), net(dtype)
    optimizer, other = optimizer_of(first, graft="adam"), optimizer_of(second, graft="adam")
    train(first, optimizer, [0.01] * 2)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        for member, its in ((first, optimizer), (second, other)):
            train(member, its, [0.01] * 3)
        assert all(map(torch.equal, first.parameters(), second.parameters()))


def test_state_without_a_graft_may_be_continued_with_one() -> None:
    model = net()
    plain = optimizer_of(model)
    train(model, plain, [1.0, 1.0])
    saved = plain.state_dict()
    plain.remove_hooks()
    optimizer = optimizer_of(model, graft="adam")
    optimizer.load_state_dict(saved)
    before = train(model, optimizer, [])
    assert not all(map(torch.equal, before, train(model, optimizer, [1.0])))


def test_the_averages_are_in_the_memory_estimate() -> None:
    model = net(torch.float32)
    optimizer = optimizer_of(model, graft="adam")
    estimate = optimizer.memory_estimate()
    train(model, optimizer, [1.0])
    state = [s for s in optimizer.state.values() if "graft_average" in s]
    tensors = [s[key] for s in state for key in ("graft_average", "graft_weight")]
    assert estimate["graft"] == sum(t.numel() * t.element_size() for t in tensors)
    assert optimizer_of(net(), graft="sgd").memory_estimate()["graft"] == 0
