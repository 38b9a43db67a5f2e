"""State dicts: exact resume, safe loading, errors that change nothing."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac import KFAC, Eigen, Preconditioner

# BatchNorm stands where the examples of a batch may mix.
pytestmark = pytest.mark.filterwarnings("ignore:fisher='type-2' is exact only if the examples")

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "empirical": {"fisher": "empirical"},
    "mc": {"fisher": "mc"},
    "type-2, eigen": {"fisher": "type-2", "inverse": "eigen"},
    "forward-only": {"fisher": "forward-only"},
    "newton-schulz": {"fisher": "mc", "inverse": "newton-schulz"},
    "newton-schulz, at every step": {"inverse": "newton-schulz", "inverse_update_period": 1},
    "inverse-free": {"fisher": "mc", "inverse": "inverse-free"},
    "inverse-free, at every step": {"inverse": "inverse-free", "inverse_update_period": 1},
    "warm start": {"inverse": Eigen(warm_start=True)},
    "warm start, at every step": {"inverse": Eigen(warm_start=True), "inverse_update_period": 1},
    "some refreshes skipped": {"inverse_update_period": 1, "refresh_tolerance": 0.5},
    "grafted": {"fisher": "mc", "graft": "adam"},
    "adamw fallback": {"fisher": "mc", "fallback": "adamw"},
    "scheduled": {"damping": lambda step: 0.1 / (step + 1), "factor_update_period": 1},
    "blocks": {"max_factor_dim": 10},
    "diagonal": {"max_factor_dim": 1},
}


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.PReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 2, 4, 4, generator=generator)
    return x, torch.randint(0, 3, (6,), generator=generator)


class Run:
    """A training run with a model, an optimizer and a scheduler."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.model = net()
        self.criterion = nn.CrossEntropyLoss()
        periods = {"factor_update_period": 2, "inverse_update_period": 5}
        self.optimizer = KFAC(self.model, lr=0.05, criterion=self.criterion, **(periods | settings))
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 20)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            x, y = batch(step)
            self.optimizer.zero_grad()
            self.criterion(self.model(x), y).backward()
            self.optimizer.step()
            self.scheduler.step()

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        parts = (self.model, self.optimizer, self.scheduler)
        torch.save([part.state_dict() for part in parts], file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        states = torch.load(file, weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.scheduler), states, strict=True):
            part.load_state_dict(state)


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize("settings", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    settings: dict[str, Any], stop: int
) -> None:
    whole, first, second = Run(settings), Run(settings), Run(settings)
    whole.train(0, 12)
    first.train(0, stop)
    second.train(0, 2)  # state of its own, which loading must replace
    second.load(first.save())
    second.train(stop, 12)
    for mine, theirs in zip(
        whole.model.state_dict().values(), second.model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert whole.optimizer.diagnostics()["steps"] == second.optimizer.diagnostics()["steps"] == 12


def test_factors_are_not_part_of_the_model() -> None:
    assert Run({}).model.state_dict().keys() == net().state_dict().keys()


def test_factors_keep_their_own_dtype() -> None:
    model = nn.Linear(3, 2).bfloat16()
    optimizer = KFAC(model, lr=0.1)
    model(torch.randn(4, 3, dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    other = KFAC(copy.deepcopy(model), lr=0.1)
    other.load_state_dict(saved)
    assert all(factor.dtype == torch.float32 for factor in other.factor(""))
    assert all(map(torch.equal, optimizer.factor(""), other.factor("")))


def without_layer(state: dict[str, Any]) -> None:
    del state["kfac"]["layers"]["4"]


def with_extra_layer(state: dict[str, Any]) -> None:
    state["kfac"]["layers"]["head"] = state["kfac"]["layers"]["4"]


def with_wrong_shape(state: dict[str, Any]) -> None:
    state["kfac"]["layers"]["4"]["factors"]["A"] = torch.zeros(1, 3, 3)


def without_inverse(state: dict[str, Any]) -> None:
    del state["kfac"]["layers"]["0"]["inverse"]["G_inverse"]


def of_another_strategy(state: dict[str, Any]) -> None:
    state["kfac"]["inverse"] = "eigen"


def of_another_fisher(state: dict[str, Any]) -> None:
    state["kfac"]["fisher"] = "empirical"


def of_another_version(state: dict[str, Any]) -> None:
    state["kfac"]["version"] = 99


def of_another_optimizer(state: dict[str, Any]) -> None:
    del state["kfac"]


def without_a_seed(state: dict[str, Any]) -> None:
    del state["kfac"]["seed"]


def without_a_weight(state: dict[str, Any]) -> None:
    del state["kfac"]["layers"]["0"]["weight"]


def with_another_fallback(state: dict[str, Any]) -> None:
    state["fallback"] = {}


def without_a_group(state: dict[str, Any]) -> None:
    state["param_groups"] = []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_layer, "lacks the layers 4"),
        (with_extra_layer, "does not have: head"),
        (with_wrong_shape, "factors of shapes .* for the layer '4'"),
        (without_inverse, "inverse of shapes .* for the layer '0'"),
        (of_another_strategy, "inverse='eigen'"),
        (of_another_fisher, "fisher='empirical'"),
        (of_another_version, "format version 99 and was saved by a newer release"),
        (of_another_optimizer, "format version 2, but has None"),
        (without_a_seed, "lacks seed"),
        (without_a_weight, "lacks weight"),
        (with_another_fallback, "differ in fallback="),
        (without_a_group, "parameter group"),
    ],
)
def test_a_state_that_does_not_fit_is_an_error_and_changes_nothing(
    damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    run, other = Run({}), Run({})
    run.train(0, 3)
    state = copy.deepcopy(run.optimizer.state_dict())
    damage(state)
    other.train(0, 1)
    before = copy.deepcopy(other.optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        other.optimizer.load_state_dict(state)
    assert_equal(before, other.optimizer.state_dict())


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for mine, theirs in zip(one, other, strict=True):
            assert_equal(mine, theirs)
    else:
        assert one == other


def test_the_state_of_another_fallback_is_an_error_and_changes_nothing() -> None:
    saved = Run({"fallback": "adamw"}).optimizer.state_dict()
    other = Run({"fallback": lambda groups: torch.optim.SGD(groups, lr=0.1)}).optimizer
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"the state is of AdamW.*this optimizer has SGD"):
        other.load_state_dict(saved)
    assert_equal(before, other.state_dict())


def test_copying_the_optimizer_itself_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot be pickled or deep-copied"):
        copy.deepcopy(Run({}).optimizer)


def test_a_preconditioner_resumes_too() -> None:
    def start() -> tuple[nn.Module, nn.Module, Preconditioner, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model, criterion = net(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        return model, criterion, Preconditioner(model, criterion=criterion), optimizer

    def train(run: tuple[Any, ...], first: int, last: int) -> None:
        model, criterion, preconditioner, optimizer = run
        for step in range(first, last):
            x, y = batch(step)
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            preconditioner.step()
            optimizer.step()

    whole, first, second = start(), start(), start()
    train(whole, 0, 12)
    train(first, 0, 5)
    for part, saved in zip(second, first, strict=True):
        if not isinstance(part, nn.CrossEntropyLoss):
            part.load_state_dict(saved.state_dict())
    train(second, 5, 12)
    assert all(map(torch.equal, whole[0].parameters(), second[0].parameters()))
