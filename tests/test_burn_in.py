"""Before the first step, `burn_in` calls of `step` update the factors and nothing else."""

import copy
from itertools import combinations
from typing import Any

import oracles
import pytest
import torch
from test_exactness import PLAIN, close, labels, parameters, randn, start
from test_exactness import Problem as Batch
from torch import Tensor, nn

from kfac import KFAC, LevenbergMarquardt

DECAY = 0.7


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
        self.double()


def batches(count: int) -> list[Batch]:
    """One model, and a batch of other inputs for every step."""
    model = Net()
    return [
        Batch(model, (1 + i) * randn(7, 4), labels(7), nn.CrossEntropyLoss()) for i in range(count)
    ]


def call(optimizer: KFAC, trained: Batch, batch: Batch, parts: int = 1) -> None:
    optimizer.zero_grad()
    whole = zip(batch.inputs.chunk(parts), batch.target.chunk(parts), strict=True)
    for x, y in whole:
        (trained.criterion(trained.model(x), y) * len(x) / len(batch.inputs)).backward()
    optimizer.step()


SETTINGS: dict[str, Any] = {
    "fisher": "type-2", "factor_decay": DECAY, "factor_update_period": 10,
    "inverse_update_period": 100, "damping": 0.3, "lr": 1.0, "kl_clip": None,
}  # fmt: skip
SOLVERS = {
    "eigen": oracles.solve_exact_damping,
    "ekfac": oracles.solve_exact_damping,  # before its first basis it has measured nothing
    "cholesky": oracles.solve_factored_damping,
    "newton-schulz": oracles.solve_factored_damping,
}


@pytest.mark.parametrize("burn_in", [0, 1, 3])
@pytest.mark.parametrize("inverse", SOLVERS)
def test_the_first_step_has_the_average_over_all_batches(inverse: str, burn_in: int) -> None:
    data = batches(burn_in + 1)
    reference = data[0].model
    settings = SETTINGS | {"inverse": inverse, "burn_in": burn_in, "momentum": 0.0}
    optimizer, trained = start(data[0], **settings)
    before = copy.deepcopy(trained.model.state_dict())
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in oracles.layer_names(reference)}
    for index, batch in enumerate(data):
        assert all(torch.equal(before[k], v) for k, v in trained.model.state_dict().items())
        call(optimizer, trained, batch)
        for name, moments in seen.items():
            layer = oracles.observe(reference, name, batch.inputs, batch.target, batch.criterion)
            moments.append((oracles.input_factor(layer), oracles.exact_output_factor(layer)))
        numbers = optimizer.diagnostics()
        assert (numbers["steps"], numbers["factor_updates"]) == (index == burn_in, index + 1)
    data[-1].model = reference
    gradients = oracles.parameter_blocks(
        reference,
        oracles.gradients(reference, data[-1].inputs, data[-1].target, data[-1].criterion),
    )
    old, new = parameters(data[-1]), parameters(trained)
    for name, moments in seen.items():
        a, g = (oracles.weighted_average(values, DECAY) for values in zip(*moments, strict=True))
        for mine, theirs in zip(optimizer.factor(name), (a, g), strict=True):
            close(mine, theirs)
        close(new[name] - old[name], -SOLVERS[inverse](a, g, 0.3, gradients[name]))


@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
def test_nothing_else_moves(fallback: str) -> None:
    data = batches(4)
    optimizer, trained = start(
        data[0], **SETTINGS | {"burn_in": 3}, momentum=0.9, weight_decay=0.1, fallback=fallback,
        graft="adam",
    )  # fmt: skip
    before = copy.deepcopy((trained.model.state_dict(), optimizer.state_dict()))
    for batch in data[:3]:
        call(optimizer, trained, batch)
    after = optimizer.state_dict()
    assert all(torch.equal(before[0][k], v) for k, v in trained.model.state_dict().items())
    assert {**after, "kfac": None} == {**before[1], "kfac": None}
    assert optimizer.diagnostics()["inverse_refreshes"] == 0
    assert optimizer.diagnostics()["burn_in_steps"] == 3
    call(optimizer, trained, data[3])
    assert not any(torch.equal(before[0][k], v) for k, v in trained.model.state_dict().items())


def test_periods_and_schedules_begin_with_the_first_step() -> None:
    data = batches(8)
    asked: list[int] = []

    def damping(step: int) -> float:
        asked.append(step)
        return 0.3

    periods = {"factor_update_period": 2, "inverse_update_period": 3, "stagger_refreshes": False}
    optimizer, trained = start(data[0], **SETTINGS | periods | {"damping": damping, "burn_in": 3})
    asked.clear()
    found = []
    for batch in data:
        call(optimizer, trained, batch)
        numbers = optimizer.diagnostics()
        found.append((numbers["factor_updates"], numbers["inverse_refreshes"]))
    assert [updates for updates, _ in found] == [1, 2, 3, 4, 4, 5, 5, 6]
    assert [refreshes for _, refreshes in found] == [0, 0, 0, 3, 3, 3, 6, 6]
    assert asked == [0, 0, 0, 0, 1, 2, 3, 4]


def test_micro_batches_make_one_step_of_the_burn_in() -> None:
    factors = []
    for parts in (1, 7):
        data = batches(2)
        optimizer, trained = start(data[0], **SETTINGS | {"burn_in": 2})
        for batch in data:
            call(optimizer, trained, batch, parts)
        assert optimizer.diagnostics()["burn_in_steps"] == 2
        factors.append([f for name in ("0", "4") for f in optimizer.factor(name)])
    for mine, theirs in zip(*factors, strict=True):
        close(mine, theirs)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_batch_counts_and_leaves_no_trace(bad: float) -> None:
    data = batches(3)
    optimizer, trained = start(data[0], **SETTINGS | {"burn_in": 3})
    call(optimizer, trained, data[0])
    factors = optimizer.factor("0")
    data[1].inputs = data[1].inputs * bad
    call(optimizer, trained, data[1])
    assert all(map(torch.equal, factors, optimizer.factor("0")))
    numbers = optimizer.diagnostics()
    assert (numbers["burn_in_steps"], numbers["nonfinite_batches"]) == (2, 1)


def test_an_overflow_is_no_step_of_the_burn_in() -> None:
    data = batches(2)
    optimizer, trained = start(data[0], **SETTINGS | {"burn_in": 1})
    scaler = torch.amp.GradScaler("cpu")
    for factor, counted in ((torch.inf, 0), (1.0, 1)):
        optimizer.zero_grad()
        loss = trained.criterion(trained.model(data[0].inputs), data[0].target)
        scaler.scale(factor * loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.diagnostics()["burn_in_steps"] == counted


def test_every_step_of_the_burn_in_draws_labels_of_its_own() -> None:
    data = batches(1)
    data[0].inputs, data[0].target = randn(40, 4), labels(40)
    optimizer, trained = start(
        data[0], **SETTINGS | {"fisher": "mc", "factor_decay": 0.0, "lr": 0.0}, burn_in=3
    )
    found = []
    for _ in range(4):
        call(optimizer, trained, data[0])
        found.append(optimizer.factor("4")[1])
    assert not any(torch.equal(one, other) for one, other in combinations(found, 2))


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("fisher", ["mc", "empirical"])
def test_a_run_resumes_within_the_burn_in(fisher: str, stop: int) -> None:
    data = batches(7)
    settings = SETTINGS | {"fisher": fisher, "burn_in": 3, "factor_update_period": 1}
    whole, expected = start(data[0], **settings)
    for batch in data:
        call(whole, expected, batch)
    first, half = start(data[0], **settings)
    for batch in data[:stop]:
        call(first, half, batch)
    second, resumed = start(data[0], **settings)
    call(second, resumed, data[-1])
    resumed.model.load_state_dict(half.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for batch in data[stop:]:
        call(second, resumed, batch)
    assert all(map(torch.equal, expected.model.parameters(), resumed.model.parameters()))
    assert whole.diagnostics() == second.diagnostics()


def test_a_state_with_steps_has_its_burn_in_behind_it() -> None:
    data = batches(2)
    plain, trained = start(data[0], **SETTINGS)
    call(plain, trained, data[0])
    saved = plain.state_dict()
    saved["kfac"]["version"] = 1  # some of which were saved before there was a burn-in
    del saved["kfac"]["burned_in"]
    plain.remove_hooks()
    optimizer = KFAC(
        trained.model, **PLAIN | SETTINGS | {"burn_in": 5}, criterion=trained.criterion
    )
    optimizer.load_state_dict(saved)
    call(optimizer, trained, data[1])
    assert optimizer.diagnostics()["steps"] == 2


def test_layers_may_change_within_the_burn_in() -> None:
    data = batches(2)
    optimizer, trained = start(data[0], **SETTINGS | {"burn_in": 2})
    call(optimizer, trained, data[0])
    optimizer.update_layers()
    call(optimizer, trained, data[1])
    assert optimizer.diagnostics()["factor_updates"] == 2
    assert optimizer.diagnostics()["burn_in_steps"] == 2


@pytest.mark.parametrize(
    "automatic",
    [
        {"lr": "auto", "momentum": "auto"},
        {"lr": "auto", "momentum": "auto", "damping": LevenbergMarquardt()},
    ],
    ids=str,
)
def test_automatic_steps_begin_after_it(automatic: dict[str, Any]) -> None:
    data = batches(3)
    model, criterion = data[0].model, nn.CrossEntropyLoss()
    settings = {"criterion": criterion, "fisher": "type-2", "factor_decay": DECAY} | automatic
    optimizer = KFAC(model, burn_in=2, **settings)
    calls: list[float] = []

    def take(optimizer: KFAC, model: nn.Module, batch: Batch) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = criterion(model(batch.inputs), batch.target)
            loss.backward()
            calls.append(loss.item())
            return loss

        assert optimizer.step(closure).item() == calls[0]

    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        optimizer.step()
    before = copy.deepcopy(model.state_dict())
    for batch in data[:2]:
        calls.clear()
        take(optimizer, model, batch)
        assert len(calls) == 1
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    twin = copy.deepcopy(model)
    other = KFAC(twin, **settings)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for mine, its in ((optimizer, model), (other, twin)):
        calls.clear()
        take(mine, its, data[2])
        assert mine.diagnostics()["factor_updates"] == 3
    assert not any(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
