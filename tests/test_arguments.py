"""A bad value of any argument fails at construction, in one form."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kfac import (
    KFAC,
    Cholesky,
    Eigen,
    InverseFree,
    LevenbergMarquardt,
    NewtonSchulz,
    Preconditioner,
)

NAN, INF = float("nan"), float("inf")
CRITERION = nn.CrossEntropyLoss()


def frozen_model() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


def groups(**settings: Any) -> Callable[[nn.Module], list[dict[str, Any]]]:
    return lambda model: [{"params": list(model.parameters()), **settings}]


# (argument, bad value, other arguments); a callable under "params" is given the model.
KFAC_ONLY: list[tuple[str, Any, dict[str, Any]]] = [
    *[("lr", value, {}) for value in (-0.1, NAN, INF, "0.1", None, torch.ones(2))],
    *[("lr", torch.tensor(value), {}) for value in (-1.0, NAN)],
    *[("momentum", value, {}) for value in (-0.1, 1.0, NAN, True, "automatic")],
    ("lr", "automatic", {}),
    ("nesterov", 1, {}),
    ("nesterov", True, {"momentum": 0.0}),
    *[("weight_decay", value, {}) for value in (-1e-4, INF, None)],
    ("maximize", "yes", {}),
    *[("model_fraction", value, {}) for value in (0.0, -0.5, 1.5, NAN, "all", 0.5)],
    *[("kl_clip", value, {}) for value in (0.0, -1.0, NAN, "automatic")],
    *[("burn_in", value, {}) for value in (-1, 1.0, True, None, lambda step: 1)],
    *[("graft", value, {}) for value in ("momentum", "Adam", True, 1.0)],
    *[("graft", "sgd", {"criterion": CRITERION, key: "auto"}) for key in ("lr", "momentum")],
    ("graft", "adam", {"criterion": CRITERION, "damping": LevenbergMarquardt()}),
    *[("fallback", value, {"skip": ["*"]}) for value in ("adam", None, 3)],
    ("fallback", lambda groups: "not an optimizer", {"skip": ["*"]}),
    ("fallback", lambda groups: torch.optim.SGD([torch.ones(1)], 1.0), {"skip": ["*"]}),
    ("lr", -1.0, {"params": groups(lr=-1.0)}),
    ("damping", 0.0, {"params": groups(damping=0.0)}),
    ("params", "factor_decay", {"params": groups(factor_decay=0.5)}),
    ("params", "kl_clip", {"params": groups(kl_clip=1.0)}),
]
SHARED: list[tuple[str, Any, dict[str, Any]]] = [
    ("model", "not a module", {}),
    *[("damping", value, {}) for value in (0.0, -1.0, NAN, INF, None, "automatic", True)],
    ("damping", lambda step: 0.0, {}),
    *[("criterion", value, {}) for value in (nn.L1Loss(), nn.CrossEntropyLoss, "mean")],
    ("reduction", "none", {"criterion": nn.CrossEntropyLoss(reduction="none")}),
    *[("outputs", value, {}) for value in (1.5, True, ["logits"])],
    *[("fisher", value, {"criterion": CRITERION}) for value in ("exact", "MC", 1)],
    *[("fisher", value, {}) for value in ("mc", "type-2")],
    *[("num_samples", value, {}) for value in (0, -1, 1.5, True, None)],
    *[("max_vectors", value, {}) for value in (0, 2.0, None)],
    *[("loss_reduction", value, {}) for value in ("none", "average", 1)],
    ("loss_reduction", "sum", {"criterion": CRITERION}),
    *[("loss_terms", value, {}) for value in (0, 1.5, "batch")],
    ("loss_terms", 4, {"criterion": CRITERION}),
    ("outputs", "logits", {}),
    *[("num_samples", 2, {"fisher": fisher}) for fisher in ("empirical", "forward-only")],
    *[("position_mask", value, {}) for value in (1, torch.ones(2))],
    *[("weight_sharing", value, {}) for value in ("mean", None, lambda name, module: None)],
    *[("inverse", value, {}) for value in ("qr", Cholesky, None, 1)],
    *[("factor_decay", value, {}) for value in (-0.1, 1.0, NAN, None)],
    *[("factor_fraction", value, {}) for value in (0.0, -0.5, 1.5, NAN, True, None, "all")],
    *[("factor_update_period", value, {}) for value in (0, -1, 1.5, True)],
    ("factor_update_period", lambda step: 0, {}),
    *[("stagger_refreshes", value, {}) for value in (1, None, "yes")],
    *[("refresh_tolerance", value, {}) for value in (0.0, -0.1, NAN, INF, True, "automatic")],
    *[("inverse_update_period", value, {}) for value in (0, 2.5, "never")],
    ("inverse_update_period", lambda step: step / 2, {}),
    ("grad_scaler", 1024.0, {}),
    *[("skip", value, {}) for value in ("0", [1], [nn.Linear(1, 1)], ["nothing"], [nn.LSTM])],
    *[("max_factor_dim", value, {}) for value in (0, 1.5, None)],
    *[("seed", value, {}) for value in (1.5, None, "zero")],
]
TABLE = [
    *[(KFAC, *row) for row in KFAC_ONLY],
    *[(owner, *row) for owner in (KFAC, Preconditioner) for row in SHARED],
    *[
        (Preconditioner, "params", "of the wrong kind", {"params": wrong})
        for wrong in (
            lambda model: torch.ones(3),
            lambda model: model.named_parameters(),
            lambda model: [{"params": model.parameters()}],
        )
    ],
]


def _without_address(value: object) -> str:
    return re.sub(r" at 0x\w+", "", repr(value))


@pytest.mark.parametrize(
    ("owner", "argument", "value", "others"),
    TABLE,
    ids=[
        f"{owner.__name__}-{argument}-{_without_address(value)}"[:60]
        for owner, argument, value, _ in TABLE
    ],
)
def test_a_bad_value_fails_at_construction(
    owner: type, argument: str, value: Any, others: dict[str, Any]
) -> None:
    model = value if argument == "model" else nn.Sequential(nn.Linear(2, 2))
    arguments = {k: v(model) if k == "params" else v for k, v in others.items()}
    in_signature = argument in inspect.signature(owner).parameters
    if in_signature and argument not in {"model", "params"} and "params" not in others:
        arguments[argument] = value
    with pytest.raises(
        ValueError, match=rf"\({argument}=\.\.\.\) must be .*, but got .*\. \S.*[.?]$"
    ) as info:
        owner(model, **arguments)
    assert str(info.value).split("(")[0] in {owner.__name__, "CrossEntropyLoss"}


def test_every_argument_has_a_row() -> None:
    covered = {argument for _, argument, _, _ in TABLE}
    arguments = set(inspect.signature(KFAC).parameters)
    assert arguments - covered == set()


def test_a_model_without_trained_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"params=\.\.\.\) must be .*, but got '2 frozen ones'"):
        KFAC(frozen_model(), lr=0.1)


@pytest.mark.promise("lazy modules")
def test_a_lazy_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Run one forward pass before"):
        KFAC(nn.Sequential(nn.LazyLinear(2)), lr=0.1)


@pytest.mark.parametrize("strategy", [Cholesky, Eigen, InverseFree, NewtonSchulz])
@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_a_strategy_checks_its_own_settings(strategy: type, value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"{strategy.__name__}\(max_consecutive_failures=\.\.\.\)"
    ):
        strategy(max_consecutive_failures=value)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("max_iterations", value) for value in (0, -1, 1.5, True, None)),
        *(("tolerance", value) for value in (0.0, -1e-3, NAN, None)),
    ],
)
def test_the_iteration_checks_its_own_settings(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"NewtonSchulz\({setting}=\.\.\.\) must be"):
        NewtonSchulz(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("iterations", value) for value in (0, -1, 1.5, True, None)),
        *(("step_size", value) for value in (0.0, -0.5, 1.5, NAN, INF, True, None, "1")),
    ],
)
def test_the_inverse_free_update_checks_its_own_settings(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"InverseFree\({setting}=\.\.\.\) must be"):
        InverseFree(**{setting: value})


def test_a_schedule_that_turns_bad_fails_before_anything_changes() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = KFAC(model, lr=0.1, damping=lambda step: 1.0 if step < 1 else -1.0)
    x = torch.randn(4, 3)
    for step in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        before = [p.detach().clone() for p in model.parameters()]
        if step == 0:
            optimizer.step()
    factors = optimizer.factor("")
    with pytest.raises(ValueError, match=r"damping.*-1\.0.*its schedule at step 1"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert all(map(torch.equal, factors, optimizer.factor("")))


def test_an_edited_damping_is_checked() -> None:
    model = nn.Linear(3, 2)
    optimizer = KFAC(model, lr=0.1)
    optimizer.param_groups[0]["damping"] = -1e-2
    model(torch.randn(4, 3)).square().mean().backward()
    with pytest.raises(ValueError, match=r"damping.*-0\.01.*edited in a parameter group"):
        optimizer.step()


def test_the_result_of_loss_terms_is_checked() -> None:
    model = nn.Linear(3, 2)
    optimizer = KFAC(model, lr=0.1, loss_terms=lambda x: -len(x))
    with pytest.raises(ValueError, match=r"loss_terms.*-4.*returned by the function"):
        model(torch.randn(4, 3))
    assert optimizer.diagnostics()["steps"] == 0


def test_numbers_of_other_libraries_become_plain_ones() -> None:
    numpy = pytest.importorskip("numpy")
    model = nn.Linear(3, 2)
    values = numpy.array([0.1, 0.9, 0.01])
    schedule = lambda step: values[2]  # noqa: E731
    optimizer = KFAC(model, lr=values[0], momentum=values[1], damping=schedule)
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    group = optimizer.param_groups[0]
    assert {type(group[key]) for key in ("lr", "momentum", "damping")} == {float}
