"""`lr="auto"`, `momentum="auto"` and `damping=LevenbergMarquardt()` through the public optimizer.

The oracle builds the Fisher matrix of all parameters from explicit Jacobians and the Kronecker
factors of every layer element by element, and minimises the quadratic model with Newton's method.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from mutants import replace
from test_exactness import close, labels, randn
from torch import Tensor, nn

import kfac.automatic
from kfac import KFAC, LevenbergMarquardt, Preconditioner
from kfac.automatic import AutomaticStep, ModelSettings
from kfac.curvature import Curvature
from kfac.levenberg_marquardt import Trial
from kfac.objective import Objective
from kfac.rewind import Start

LAMBDA, ETA = 0.2, 0.05
PERIODS = {"factor_update_period": 1, "inverse_update_period": 1, "factor_decay": 0.0}


class Scaled(nn.Module):
    """A parameter that K-FAC does not take, in front of two layers that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, 2.0, -1.0, 1.0]))
        self.inside, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.inside(x * self.scale).tanh())
        return head


@dataclass
class Problem:
    model: nn.Module = field(
        default_factory=lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    )
    criterion: nn.Module = field(default_factory=nn.CrossEntropyLoss)
    batches: list[tuple[Tensor, Tensor]] = field(
        default_factory=lambda: [(randn(7, 4), labels(7)) for _ in range(4)]
    )

    def __post_init__(self) -> None:
        self.model.double()

    def optimizer(self, **settings: Any) -> KFAC:
        defaults: dict[str, Any] = {
            "lr": "auto", "momentum": "auto", "damping": LAMBDA, "weight_decay": ETA,
            "criterion": self.criterion, "fisher": "type-2", **PERIODS,
        }  # fmt: skip
        return KFAC(self.model, **defaults | settings)

    def closure(self, optimizer: KFAC, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = self.criterion(self.model(batch[0]), batch[1])
            loss.backward()
            return loss

        return evaluate

    def train(self, optimizer: KFAC, steps: int = 4) -> None:
        for batch in self.batches[:steps]:
            optimizer.step(self.closure(optimizer, batch))


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def reference_model(
    model: nn.Module,
    criterion: nn.Module,
    batch: tuple[Tensor, Tensor],
    last: Tensor,
    fixed: tuple[float | None, float | None],
    damping: float = LAMBDA,
    own_damping: float = LAMBDA,
) -> tuple[Tensor, float]:
    """δ as one vector and M(δ) − M(0), from explicit matrices."""
    parameters = list(model.parameters())
    theta = torch.cat([p.detach().flatten() for p in parameters])
    loss = criterion(model(batch[0]), batch[1])
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
    j = oracles.jacobian(model, batch[0])
    fisher = j.T @ oracles.loss_hessian(model(batch[0]), batch[1], criterion) @ j
    slope = gradient + ETA * theta
    direction, rest = torch.zeros_like(slope), slope.clone()
    numbers = torch.arange(len(slope)).split([p.numel() for p in parameters])
    places = dict(zip(parameters, numbers, strict=True))
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        seen = oracles.observe(model, name, *batch, criterion)
        a, g = oracles.input_factor(seen), oracles.exact_output_factor(seen)
        at = torch.cat([places[layer.weight], places[layer.bias]])
        block = oracles.to_blocks(
            layer, slope[places[layer.weight]].view_as(layer.weight), slope[places[layer.bias]]
        )
        solved = oracles.solve_factored_damping(a, g, own_damping + ETA, block)[0]
        direction[at] = torch.cat([solved[:, :-1].flatten(), solved[:, -1]])
        rest[at] = 0
    directions, given = [direction, last], [fixed[0], fixed[1]]
    if rest.any():
        directions.append(rest)
        given.append(fixed[0])
    d = torch.stack(directions)
    start = torch.tensor([c or 0.0 for c in given]).double()
    free = torch.eye(len(d)).double()[[i for i, c in enumerate(given) if c is None]]
    curvature = fisher + (damping + ETA) * torch.eye(len(fisher)).double()

    def value(c: Tensor) -> Tensor:
        delta = (start + c @ free) @ d
        return 0.5 * delta @ curvature @ delta + slope @ delta

    zero = torch.zeros(len(free)).double()
    hessian = torch.autograd.functional.hessian(value, zero)
    solution = torch.linalg.lstsq(
        hessian, -torch.autograd.functional.jacobian(value, zero)[:, None], driver="gelsd"
    ).solution[:, 0]
    return (start + solution @ free) @ d, float(value(solution))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layers": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
    "a parameter of the fallback": Scaled,
}
GIVEN: dict[str, tuple[dict[str, Any], tuple[float | None, float | None]]] = {
    "everything automatic": ({}, (None, None)),
    "momentum given": ({"momentum": 0.7}, (None, 0.7)),
    "no momentum": ({"momentum": 0.0}, (None, 0.0)),
    "learning rate given": ({"lr": 0.3, "kl_clip": None}, (-0.3, None)),
}


def check_steps(model: str, given: str, **settings: Any) -> None:
    torch.manual_seed(0)
    problem = Problem(MODELS[model]())
    reference = copy.deepcopy(problem)
    extra, fixed = GIVEN[given]
    optimizer = problem.optimizer(**extra, **settings)
    last = torch.zeros(sum(p.numel() for p in reference.model.parameters())).double()
    for batch in problem.batches:
        delta, _ = reference_model(reference.model, reference.criterion, batch, last, fixed)
        before = torch.cat([p.flatten() for p in values(problem.model)])
        optimizer.step(problem.closure(optimizer, batch))
        after = torch.cat([p.flatten() for p in values(problem.model)])
        torch.testing.assert_close(after - before, delta, rtol=1e-7, atol=1e-8)
        last = delta
        with torch.no_grad():
            for mine, theirs in zip(
                reference.model.parameters(), problem.model.parameters(), strict=True
            ):
                mine.copy_(theirs)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("model", MODELS)
def test_steps_minimise_the_model(model: str, given: str) -> None:
    check_steps(model, given)


def check_schedule() -> None:
    """A learning rate or a momentum that is given may change from step to step."""
    for given, at in [
        ({"lr": 0.3, "kl_clip": None}, lambda x: (-x, None)),
        ({"momentum": 0.3}, lambda x: (None, x)),
    ]:
        torch.manual_seed(0)
        problem = Problem()
        optimizer = problem.optimizer(**given)
        (key,) = given.keys() & {"lr", "momentum"}
        last = torch.zeros(sum(p.numel() for p in problem.model.parameters())).double()
        for step, batch in enumerate(problem.batches):
            optimizer.param_groups[0][key] = value = 0.3 / (step + 1)
            delta, _ = reference_model(
                copy.deepcopy(problem.model), problem.criterion, batch, last, at(value)
            )
            before = torch.cat([p.flatten() for p in values(problem.model)])
            optimizer.step(problem.closure(optimizer, batch))
            after = torch.cat([p.flatten() for p in values(problem.model)])
            torch.testing.assert_close(after - before, delta, rtol=1e-7, atol=1e-8)
            last = delta


def test_what_is_given_may_follow_a_schedule() -> None:
    check_schedule()


def test_groups_that_do_not_make_a_single_step_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    problem = Problem(model)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    optimizer = KFAC(model, groups, lr=0.2, momentum="auto", criterion=problem.criterion)
    problem.train(optimizer, 1)
    before = values(model)
    optimizer.param_groups[1]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="Give all of them the same lr"):
        problem.train(optimizer, 1)
    assert_equal(values(model), before)


def check_search() -> None:
    torch.manual_seed(0)
    problem = Problem()
    reference = copy.deepcopy(problem)
    rule = LevenbergMarquardt(initial=LAMBDA, search_period=2, decay=0.5, least_ratio=-1e9)
    optimizer = problem.optimizer(damping=rule)
    last = torch.zeros(sum(p.numel() for p in reference.model.parameters())).double()
    own = LAMBDA
    chosen = []
    for step, batch in enumerate(problem.batches):
        damping = optimizer.param_groups[0]["damping"]
        tried = [own, own / 4, own * 4] if step % 2 == 0 else [own]
        net, criterion, free = reference.model, reference.criterion, (None, None)
        found = [reference_model(net, criterion, batch, last, free, damping, c) for c in tried]
        (last, _), own = min(zip(found, tried, strict=True), key=lambda pair: pair[0][1])
        before = torch.cat([p.flatten() for p in values(problem.model)])
        optimizer.step(problem.closure(optimizer, batch))
        after = torch.cat([p.flatten() for p in values(problem.model)])
        torch.testing.assert_close(after - before, last, rtol=1e-7, atol=1e-8)
        assert optimizer.diagnostics()["preconditioner_damping"] == pytest.approx(own)
        chosen.append(own)
        with torch.no_grad():
            for mine, theirs in zip(
                reference.model.parameters(), problem.model.parameters(), strict=True
            ):
                mine.copy_(theirs)
    assert len(set(chosen)) > 1  # the search has gone somewhere


def test_the_preconditioner_takes_the_damping_whose_step_the_model_likes_best() -> None:
    check_search()


def test_diagnostics_hold_the_coefficients() -> None:
    torch.manual_seed(0)
    problem = Problem()
    optimizer = problem.optimizer(momentum=0.7)
    problem.train(optimizer, 2)
    found = optimizer.diagnostics()
    assert found["momentum"] == 0.7
    assert found["lr"] > 0
    assert found["damping"] == LAMBDA


def least_squares() -> Problem:
    x, y = randn(20, 4), randn(20, 3)
    return Problem(nn.Linear(4, 3), nn.MSELoss(), [(x, y)] * 2)


def test_one_step_solves_linear_least_squares() -> None:
    problem = least_squares()
    optimizer = problem.optimizer(damping=1e-12, weight_decay=0.0)
    problem.train(optimizer, 1)
    x, y = problem.batches[0]
    ones = torch.cat([x, torch.ones(20, 1).double()], dim=1)
    expected = torch.linalg.lstsq(ones, y).solution.T
    found = torch.cat([problem.model.weight, problem.model.bias[:, None]], dim=1)
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)


def check_ratio(weight_decay: float) -> None:
    problem = least_squares()
    rule = LevenbergMarquardt(initial=1e-9, bounds=(1e-9, 1.0), period=1)
    optimizer = problem.optimizer(damping=rule, weight_decay=weight_decay, kl_clip=None, lr=0.3)
    problem.train(optimizer, 2)
    assert optimizer.diagnostics()["reduction_ratio"] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_the_prediction_is_exact_for_a_quadratic_objective(weight_decay: float) -> None:
    check_ratio(weight_decay)


def test_the_curvature_may_be_estimated_from_some_of_the_examples() -> None:
    found = []
    for repeated in (1, 3):
        torch.manual_seed(0)
        problem = Problem(batches=[(randn(8, 4), labels(8)) for _ in range(3)])
        problem.batches = [(x.repeat(repeated, 1), y.repeat(repeated)) for x, y in problem.batches]
        optimizer = problem.optimizer(model_fraction=1 / repeated)
        problem.train(optimizer)
        found.append(values(problem.model))
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_a_summed_loss_takes_the_same_steps() -> None:
    found = []
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        problem = Problem(criterion=nn.CrossEntropyLoss(reduction=reduction))
        rule = LevenbergMarquardt(initial=0.1, period=2)
        optimizer = problem.optimizer(damping=rule)
        problem.train(optimizer)
        found.append((values(problem.model), optimizer.diagnostics()["damping"]))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        close(one, other)
    assert found[0][1] == found[1][1]


def test_micro_batches_take_the_step_of_the_whole() -> None:
    found = []
    for parts in (1, 2):
        torch.manual_seed(0)
        problem = Problem(batches=[(randn(8, 4), labels(8)) for _ in range(3)])
        optimizer = problem.optimizer()
        for x, y in problem.batches:

            def closure(x: Tensor = x, y: Tensor = y, parts: int = parts) -> float:
                optimizer.zero_grad()  # noqa: B023
                total = 0.0
                for some, target in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    loss = problem.criterion(problem.model(some), target) / parts  # noqa: B023
                    loss.backward()
                    total += loss.item()
                return total

            optimizer.step(closure)
        found.append(values(problem.model))
    for one, other in zip(*found, strict=True):
        close(one, other)


# What must leave no trace


def noisy() -> Problem:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)
    )
    return Problem(model)


def check_evaluations() -> None:
    found = []
    nearly = math.nextafter(0.1, 1)
    rule = LevenbergMarquardt(initial=0.1, bounds=(0.1, nearly), period=1, least_ratio=-1e9)
    for damping in (0.1, rule):
        torch.manual_seed(0)
        problem = noisy()
        optimizer = problem.optimizer(damping=damping, fisher="mc")
        problem.train(optimizer)
        state = [p.detach() for p in problem.model.state_dict().values()]
        gradients = [p.grad for p in problem.model.parameters()]
        found.append([*state, *gradients, torch.rand(3)])
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_evaluating_a_step_leaves_no_trace() -> None:
    check_evaluations()


def everything(problem: Problem, optimizer: KFAC) -> dict[str, Any]:
    engine = optimizer.state_dict()["kfac"]
    return {
        "parameters": values(problem.model),
        "buffers": [b.clone() for b in problem.model.buffers()],
        "last steps": [optimizer.state[p].get("last_step") for p in problem.model.parameters()],
        "layers": {
            name: {key: copy.deepcopy(layer[key]) for key in ("factors", "weight", "inverse")}
            for name, layer in engine["layers"].items()
        },
        "random numbers": torch.get_rng_state(),
    }


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, Mapping):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal(value, other[key])
    elif isinstance(one, list):
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    else:
        assert one == other


def check_rejection(there: float, search_period: int | None = None) -> None:
    problem = noisy()
    rule = LevenbergMarquardt(
        initial=0.1, period=3, decay=0.5, bounds=(1e-4, 1e4), search_period=search_period
    )
    optimizer = problem.optimizer(damping=rule, factor_decay=0.9, fisher="mc")
    problem.train(optimizer, 2)
    before, figures = everything(problem, optimizer), optimizer.diagnostics()
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = problem.closure(optimizer, problem.batches[2])()
        return loss if calls == 1 else loss * there

    optimizer.step(closure)
    assert calls == 2
    assert_equal(everything(problem, optimizer), before)
    found = optimizer.diagnostics()
    assert found["rejected_steps"] == 1
    assert found["damping"] == figures["damping"] / 0.5**12
    assert found.get("preconditioner_damping") == figures.get("preconditioner_damping")
    problem.train(optimizer, 4)
    assert not torch.equal(values(problem.model)[0], before["parameters"][0])


@pytest.mark.parametrize("search_period", [None, 1])
@pytest.mark.parametrize("there", [1e6, math.nan, math.inf])
def test_a_step_that_made_it_worse_is_undone_bit_for_bit(
    there: float, search_period: int | None
) -> None:
    check_rejection(there, search_period)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_changes_nothing(bad: float) -> None:
    problem = Problem()
    optimizer = problem.optimizer(damping=LevenbergMarquardt(initial=0.1))
    problem.train(optimizer, 2)
    before = everything(problem, optimizer)
    x, y = problem.batches[2]
    optimizer.step(problem.closure(optimizer, (x * bad, y)))
    assert_equal(everything(problem, optimizer), before)
    assert optimizer.diagnostics()["nonfinite_batches"] == 1


def check_retreat(harm: str = "loss not finite") -> None:
    problem = Problem()
    rule = LevenbergMarquardt(initial=0.1, bounds=(1e-4, 1e4))
    optimizer = problem.optimizer(damping=rule)
    problem.train(optimizer, 1)
    before, damping = values(problem.model), optimizer.diagnostics()["damping"]
    x, y = problem.batches[1]
    optimizer.step(problem.closure(optimizer, (x, y)))
    there = values(problem.model)[0][0, 0]
    scale = {"loss not finite": math.inf, "loss far above all others": 1e3}.get(harm, 1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.criterion(problem.model(x), y)
        # The last step has led to where nothing can be evaluated any more.
        is_there = problem.model[0].weight[0, 0] == there
        loss = loss * torch.where(is_there, scale, 1.0)
        loss.backward()
        if harm == "gradient not finite" and is_there:
            problem.model[0].weight.grad[1, 1] = math.nan
        return loss

    optimizer.step(closure)
    for one, other in zip(values(problem.model), before, strict=True):
        close(one, other)
    found = optimizer.diagnostics()
    assert found["rejected_steps"] == 1
    assert found["nonfinite_batches"] == (harm != "loss far above all others")
    assert found["damping"] > damping
    assert all("last_step" not in optimizer.state[p] for p in problem.model.parameters())
    optimizer.step(closure)
    assert not torch.equal(values(problem.model)[0], before[0])


@pytest.mark.parametrize(
    "harm", ["loss not finite", "gradient not finite", "loss far above all others"]
)
def test_a_step_is_taken_back_if_the_next_batch_shows_that_it_went_wrong(harm: str) -> None:
    check_retreat(harm)


@pytest.mark.parametrize("settings", [{"lr": 0.1}, {"momentum": 0.9}, {}], ids=str)
def test_with_a_given_damping_no_step_is_taken_back_because_the_loss_has_risen(
    settings: dict[str, Any],
) -> None:
    """The same step would follow, and be taken back again, for ever."""
    problem = Problem()
    optimizer = problem.optimizer(**{"kl_clip": None} | settings)
    batch = problem.batches[0]
    for step in range(4):
        before, scale = values(problem.model), 1e3 if step == 2 else 1.0
        calls = []

        def closure(scale: float = scale, calls: list[None] = calls) -> Tensor:
            calls.append(None)
            loss = problem.closure(optimizer, batch)()
            return loss * (scale if len(calls) == 1 else 1.0)

        optimizer.step(closure)
        assert len(calls) == 1
        assert not torch.equal(values(problem.model)[0], before[0])
    assert optimizer.diagnostics()["rejected_steps"] == 0
    assert optimizer.diagnostics()["nonfinite_batches"] == 0


def test_with_a_given_damping_steps_to_where_nothing_is_finite_give_one_warning() -> None:
    problem = Problem()
    optimizer = problem.optimizer(lr=0.1, kl_clip=None)
    start = values(problem.model)[0]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.criterion(problem.model(problem.batches[0][0]), problem.batches[0][1])
        is_there = (problem.model[0].weight - start).abs().max() > 1e-12
        loss = loss * torch.where(is_there, math.inf, 1.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.warns(UserWarning, match="Lower lr .*raise damping.*LevenbergMarquardt"):
        optimizer.step(closure)
    optimizer.step(closure)
    optimizer.step(closure)  # is taken back without a further warning, which would be an error
    assert optimizer.diagnostics()["rejected_steps"] == 2
    assert optimizer.diagnostics()["nonfinite_batches"] == 2


@pytest.mark.parametrize("step", [0, 1, 4], ids=["trial", "search", "ratio"])
def test_a_closure_that_fails_when_called_again_changes_nothing(step: int) -> None:
    problem = Problem()
    problem.batches *= 2
    optimizer = problem.optimizer(damping=LevenbergMarquardt(), factor_decay=0.9)
    problem.train(optimizer, step)
    before = everything(problem, optimizer)
    evaluate, calls = problem.closure(optimizer, problem.batches[step]), []

    def closure() -> Tensor:
        calls.append(None)
        if len(calls) > 1:
            raise OSError("the data are gone")
        return evaluate()

    with pytest.raises(OSError, match="the data are gone"):
        optimizer.step(closure)
    assert_equal(everything(problem, optimizer), before)


def check_hard_batch() -> None:
    """A batch whose loss is large wherever it is evaluated is one to learn from."""
    problem = Problem()
    optimizer = problem.optimizer(damping=LevenbergMarquardt(initial=0.1))
    problem.train(optimizer, 2)
    before = values(problem.model)
    evaluate = problem.closure(optimizer, problem.batches[2])

    def closure() -> Tensor:
        loss = evaluate() * 1e3
        for parameter in problem.model.parameters():
            parameter.grad *= 1e3
        return loss

    optimizer.step(closure)
    assert optimizer.diagnostics()["rejected_steps"] == 0
    assert optimizer.diagnostics()["nonfinite_batches"] == 0
    assert not torch.equal(values(problem.model)[0], before[0])


def test_a_batch_that_is_hard_anywhere_is_no_reason_to_go_back() -> None:
    check_hard_batch()


def test_periods_grow_unless_they_are_given() -> None:
    def periods(**settings: Any) -> list[tuple[int, int]]:
        engine = KFAC(nn.Linear(2, 2), criterion=nn.MSELoss(), **settings)._engine
        return [
            (engine.factor_update_period.at(step), engine.inverse_update_period.at(step))
            for step in (0, 99, 100, 5000)
        ]

    assert periods() == [(10, 100)] * 4
    assert periods(lr="auto") == [(1, 5), (1, 5), (2, 10), (10, 50)]
    assert periods(lr="auto", inverse_update_period=7) == [(1, 7), (1, 7), (2, 7), (10, 7)]


@dataclass(frozen=True)
class TrialByHand(Trial):
    delta: Tensor


def tried(problem: Problem, batch: tuple[Tensor, Tensor], last: Tensor, at: float) -> TrialByHand:
    net, criterion = copy.deepcopy(problem.model), problem.criterion
    delta, predicted = reference_model(net, criterion, batch, last, (None, None), at, at)
    before = objective(net, criterion, batch)
    moved = torch.nn.utils.parameters_to_vector(net.parameters()) + delta
    torch.nn.utils.vector_to_parameters(moved, net.parameters())
    change = objective(net, criterion, batch) - before
    return TrialByHand(at, change, change / predicted, delta)


@torch.no_grad()
def objective(net: nn.Module, criterion: nn.Module, batch: tuple[Tensor, Tensor]) -> float:
    decay = sum(float(p.square().sum()) for p in net.parameters())
    return float(criterion(net(batch[0]), batch[1])) + 0.5 * ETA * decay


class StartHigh(LevenbergMarquardt):
    def calibrate(self, trial_at: Any) -> Any:
        return trial_at(10.0)


def check_found() -> None:
    """The first steps are those of a search among steps from explicit matrices."""
    torch.manual_seed(0)
    problem = Problem()
    reference = copy.deepcopy(problem)
    rule = StartHigh(decay=0.5, least_ratio=-1e9)
    optimizer = problem.optimizer(damping=rule)
    last = torch.zeros(sum(p.numel() for p in reference.model.parameters())).double()
    path = []
    for step, batch in enumerate(problem.batches[:2]):
        trial_at = partial(tried, reference, batch, last)
        damping = optimizer.diagnostics()["damping"]
        found = rule.lowered(damping, trial_at) if step else rule.calibrate(trial_at)
        before = torch.cat([p.flatten() for p in values(problem.model)])
        optimizer.step(problem.closure(optimizer, batch))
        after = torch.cat([p.flatten() for p in values(problem.model)])
        torch.testing.assert_close(after - before, found.delta, rtol=1e-7, atol=1e-8)
        last = found.delta
        diagnostics = optimizer.diagnostics()
        adapted = rule.adapted(found.damping, found.ratio, step)
        assert diagnostics["damping"] == pytest.approx(adapted)
        assert diagnostics["reduction_ratio"] == pytest.approx(found.ratio, rel=1e-6)
        path += [damping, found.damping]
        reference.model.load_state_dict(problem.model.state_dict())
    assert path[2] > path[3]


def test_the_damping_is_found_by_trying_steps() -> None:
    check_found()


class StayAfterTrial(LevenbergMarquardt):
    def lowered(self, damping: float, trial_at: Any) -> Any:
        found = trial_at(damping)
        trial_at(damping / 10)
        return found


@pytest.mark.parametrize("inverse", ["cholesky", "eigen"])
def test_a_damping_that_was_only_tried_leaves_the_inverses_as_they_were(inverse: str) -> None:
    problem = Problem()
    rule = StayAfterTrial(least_ratio=-1e9)
    optimizer = problem.optimizer(damping=rule, inverse=inverse, inverse_update_period=100)
    problem.train(optimizer, 1)
    before = copy.deepcopy(optimizer._engine.blocks.states)
    optimizer.step(problem.closure(optimizer, problem.batches[1]))
    assert_equal(optimizer._engine.blocks.states, before)


# Resuming, and what is refused


@pytest.mark.parametrize("inverse", ["cholesky", "eigen", "ekfac"])
def test_a_resumed_run_is_the_same(inverse: str) -> None:
    found = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        problem = noisy()
        settings: dict[str, Any] = {
            "damping": LevenbergMarquardt(period=2), "factor_decay": 0.9, "inverse": inverse,
            "inverse_update_period": 3, "fisher": "mc",
        }  # fmt: skip
        optimizer = problem.optimizer(**settings)
        for step, batch in enumerate(problem.batches):
            if interrupted and step == 3:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer.remove_hooks()
                optimizer = problem.optimizer(**settings)
                optimizer.load_state_dict(saved)
            optimizer.step(problem.closure(optimizer, batch))
        found.append(everything(problem, optimizer) | {"numbers": optimizer.diagnostics()})
    assert_equal(found[1]["parameters"], found[0]["parameters"])
    assert_equal(found[1]["layers"], found[0]["layers"])
    assert found[1]["numbers"]["damping"] == found[0]["numbers"]["damping"]


def test_state_without_the_automatic_part_is_refused() -> None:
    problem = Problem()
    optimizer = problem.optimizer()
    saved = optimizer.state_dict()
    del saved["automatic"]
    with pytest.raises(
        ValueError, match="state dict is not of automatic steps, but this optimizer is"
    ):
        optimizer.load_state_dict(saved)


AUTOMATIC: list[dict[str, Any]] = [
    {"lr": "auto"},
    {"momentum": "auto"},
    {"damping": LevenbergMarquardt()},
]


@pytest.mark.parametrize("automatic", AUTOMATIC, ids=str)
def test_a_closure_is_needed(automatic: dict[str, Any]) -> None:
    optimizer = KFAC(nn.Linear(2, 2), criterion=nn.MSELoss(), **automatic)
    with pytest.raises(RuntimeError, match=r"step\(closure\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("criterion", None),
        ("fallback", "adamw"),
        ("nesterov", True),
        ("maximize", True),
        ("grad_scaler", torch.amp.GradScaler("cpu")),
    ],
)
@pytest.mark.parametrize("automatic", AUTOMATIC, ids=str)
def test_what_the_model_cannot_honour_is_refused(
    automatic: dict[str, Any], argument: str, value: Any
) -> None:
    settings = {"criterion": nn.MSELoss(), **automatic, argument: value}
    with pytest.raises(ValueError, match=rf"KFAC\({argument}="):
        KFAC(nn.Linear(2, 2), **settings)


@pytest.mark.parametrize("key", ["lr", "momentum", "damping"])
def test_groups_may_not_differ_in_what_the_model_chooses(key: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), key: 0.5}]
    with pytest.raises(ValueError, match="weight_decay"):
        KFAC(model, groups, lr="auto", criterion=nn.MSELoss())


def test_a_preconditioner_has_no_steps_to_adapt_its_damping_by() -> None:
    with pytest.raises(ValueError, match="damping"):
        Preconditioner(nn.Linear(2, 2), damping=LevenbergMarquardt())  # type: ignore[arg-type]


def test_a_closure_without_a_backward_pass_is_an_error_that_changes_nothing() -> None:
    problem = Problem()
    optimizer = problem.optimizer()
    before = values(problem.model)
    x, y = problem.batches[0]
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: problem.criterion(problem.model(x), y))
    assert_equal(values(problem.model), before)


# Mutants


def forgotten(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    return replace(Start, name, lambda original, self: None)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[..., None], tuple]] = {
    "weight decay missing from the preconditioner's damping": (
        replace(
            Objective, "preconditioner_damping",
            lambda original, self, d: dict.fromkeys(original(self, d), d),
        ),
        check_steps, ("layers", "everything automatic"),
    ),
    "the damping missing from the model": (
        replace(kfac.automatic, "quadratic_model", lambda original, *a, damping, **k: original(
            *a, damping=[0.0] * len(damping), **k
        )),
        check_steps, ("layers", "everything automatic"),
    ),
    "the slope is that of the objective twice": (
        replace(Objective, "of", lambda original, *a: (
            lambda o: setattr(o, "loss_gradients", o.gradients) or o
        )(original(*a))),
        check_steps, ("layers", "everything automatic"),
    ),
    "parameters of the fallback left where they are": (
        replace(Objective, "move", lambda original, self, step: original(
            self, {p: d for p, d in step.items() if p.dim() != 1 or len(p) != 4}
        )),
        check_steps, ("a parameter of the fallback", "everything automatic"),
    ),
    "the last step forgotten": (
        replace(AutomaticStep, "_choose", lambda original, self, objective, damping: (
            objective.last.clear() or original(self, objective, damping)
        )),
        check_steps, ("layers", "everything automatic"),
    ),
    "the decay missing from the change": (
        replace(Objective, "decay_change", lambda original, self, step: 0.0),
        check_ratio, (0.5,),
    ),
    "random numbers and buffers of another call": (
        forgotten("_restore_surroundings"), check_evaluations, (),
    ),
    "the curvature not restored": (
        replace(Curvature, "restore", lambda original, self, snapshot: None),
        check_rejection, (1e6,),
    ),
    "parameters not restored": (
        replace(Objective, "restore", lambda original, self, values: None),
        check_rejection, (1e6,),
    ),
    "surroundings not restored": (forgotten("restore"), check_rejection, (1e6,)),
    "the last step kept after a retreat": (
        replace(AutomaticStep, "_retreat", lambda original, *arguments: None), check_retreat, (),
    ),
    "the schedule not followed": (
        replace(ModelSettings, "at", lambda original, self, groups: self), check_schedule, (),
    ),
    "gradients not looked at": (
        replace(AutomaticStep, "_is_sound", lambda original, self, loss: math.isfinite(loss)),
        check_retreat, ("gradient not finite",),
    ),
    "any finite loss will do": (
        replace(AutomaticStep, "_is_sound", lambda original, self, loss: math.isfinite(loss)),
        check_retreat, ("loss far above all others",),
    ),
    "back from any hard batch": (
        replace(AutomaticStep, "_evaluates_soundly", lambda original, self, evaluated: True),
        check_hard_batch, (),
    ),
    "trials leave the parameters where they went": (
        replace(Objective, "restore", lambda original, self, values: None), check_found, (),
    ),
    "the first candidate is taken": (
        replace(LevenbergMarquardt, "candidates", lambda original, self, damping: [damping]),
        check_search, (),
    ),
    "the last candidate is kept": (
        replace(AutomaticStep, "_search", lambda original, self, rule, objective, damping: (
            original(self, rule, objective, damping),
            setattr(
                self, "preconditioner_damping", rule.candidates(self.preconditioner_damping)[-1]
            ),
        )[0]),
        check_search, (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test, arguments = MUTANTS[name]
    test(*arguments)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test(*arguments)
