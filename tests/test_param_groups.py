"""Every parameter is accounted for, with the reason."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from kfac import KFAC


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu()) * self.scale


class Subclass(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


class OwnInitialisation(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)

    def reset_parameters(self) -> None:
        nn.init.eye_(self.weight)


def summary_of(model: nn.Module, **settings: object) -> dict[str, tuple[str, str]]:
    rows = KFAC(model, lr=0.1, **settings).summary()
    assert [r.parameter for r in rows] == [name for name, _ in model.named_parameters()]
    return {r.parameter: (r.treatment, r.reason) for r in rows}


def test_supported_layers_are_under_kfac() -> None:
    summary = summary_of(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)))
    assert {treatment for treatment, _ in summary.values()} == {"kfac"}


@pytest.mark.promise("subclasses of the above")
def test_a_subclass_that_computes_what_its_base_does_is_taken_for_it() -> None:
    summary = summary_of(nn.Sequential(OwnInitialisation()))
    assert summary["0.weight"] == ("kfac", "")


@pytest.mark.promise("parametrised weights (`torch.nn.utils.parametrizations`)")
@pytest.mark.promise("other modules")
@pytest.mark.parametrize(
    ("model", "parameter", "treatment", "reason"),
    [
        (nn.Sequential(nn.PReLU()), "0.weight", "fallback", "PReLU is not supported"),
        (nn.Sequential(Subclass(2, 2)), "0.weight", "fallback", "a subclass of Linear"),
        (Tied(), "one.weight", "kfac", "one block with two"),
        (Tied(), "one.bias", "fallback", "without it: shared by several modules"),
        (Tied(), "scale", "fallback", "Tied is not supported"),
        (
            nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)),
            "0.weight",
            "untrained",
            "frozen",
        ),
        (
            nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2)),
            "0.parametrizations.weight.original0",
            "fallback",
            "ParametrizationList is not supported",
        ),
        (
            nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "bias_k",
            "fallback",
            "not part of a linear layer",
        ),
    ],
)
def test_what_is_left_out_is_shown_with_the_reason(
    model: nn.Module, parameter: str, treatment: str, reason: str
) -> None:
    found = summary_of(model)[parameter]
    assert found[0] == treatment
    assert reason in found[1]


@pytest.mark.parametrize("entry", ["0", "body", "body.*", nn.Conv2d, nn.Sequential])
def test_skip_takes_names_globs_and_types_and_covers_what_is_inside(
    entry: str | type[nn.Module],
) -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Conv2d(1, 2, 3)), "0": nn.Linear(2, 2)})
    skipped = {
        name for name, (how, why) in summary_of(model, skip=[entry]).items() if how == "fallback"
    }
    expected = "0" if entry == "0" else "body"
    assert skipped == {n for n, _ in model.named_parameters() if n.startswith(expected)}


@pytest.mark.promise("frozen weights")
def test_a_frozen_weight_leaves_its_bias_to_the_fallback() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    assert summary_of(model)["0.bias"] == ("fallback", "its weight is not trained")


def test_a_frozen_bias_leaves_its_weight_under_kfac() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    model[0].bias.requires_grad_(False)
    optimizer = KFAC(model, lr=0.1)
    row = optimizer.summary()[0]
    assert (row.treatment, row.factors) == ("kfac", "A 1×2×2, G 1×3×3")
    model(torch.randn(4, 2)).square().mean().backward()
    optimizer.step()


def test_parameters_that_were_not_given_are_not_touched() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = KFAC(model, model[1].parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    model(torch.randn(4, 2)).square().mean().backward()
    optimizer.step()
    assert torch.equal(before, model[0].weight)
    assert optimizer.summary()[0].reason == "not given to the optimizer"


@pytest.mark.usefixtures("no_blocks")
def test_a_factor_above_the_limit_keeps_its_diagonal() -> None:
    optimizer = KFAC(nn.Linear(20, 3), lr=0.1, max_factor_dim=10)
    assert optimizer.summary()[0].factors == "A 1×21, G 1×3×3"


def test_a_factor_above_the_limit_keeps_blocks_on_its_diagonal() -> None:
    optimizer = KFAC(nn.Linear(20, 3), lr=0.1, max_factor_dim=10)
    assert optimizer.summary()[0].factors == "A 1×3×7×7, G 1×3×3"


def test_the_printed_table_has_a_line_per_parameter_and_the_shares() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.PReLU(10))
    text = str(KFAC(model, lr=0.1).summary())
    assert len(text.splitlines()) == 2 + 3 + 1
    assert text.splitlines()[-1] == "of all parameters: 90.0% kfac, 10.0% fallback, 0.0% untrained"


def test_memory_is_known_before_the_first_step() -> None:
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, lr=0.1)
    estimate = optimizer.memory_estimate()
    factors = 4 * (5 * 5 + 3 * 3)
    assert estimate == {
        "factors": factors, "pending": factors, "inverses": factors, "momentum": 4 * 15,
    }  # fmt: skip
    model(torch.randn(4, 4)).square().mean().backward()
    optimizer.step()
    assert optimizer.memory_estimate() == estimate


def test_names_are_free_of_wrappers() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    inner[0] = torch.compile(inner[0])
    wrapped = torch.compile(nn.DataParallel(inner))
    names = [row.parameter for row in KFAC(wrapped, lr=0.1).summary()]
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_a_module_that_is_called_module_is_no_wrapper() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module, self.fc = Backbone(), nn.Linear(2, 2)

    assert {"module.fc.weight", "fc.weight"} < summary_of(Model()).keys()


def test_a_module_under_two_names_is_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = self.two = nn.Linear(2, 2)

    assert {treatment for treatment, _ in summary_of(Twice()).values()} == {"kfac"}


def test_entries_of_skip_may_overlap() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    summary = summary_of(model, skip=("0", "0*", nn.Linear))
    assert {treatment for treatment, _ in summary.values()} == {"fallback"}


def test_trained_parameters_outside_the_model_are_shown() -> None:
    model, temperature = nn.Linear(2, 2), nn.Parameter(torch.ones(1))
    optimizer = KFAC(model, [*model.parameters(), temperature], lr=0.1)
    (model(torch.ones(3, 2)) * temperature).square().mean().backward()
    optimizer.step()
    assert temperature.item() != 1
    assert optimizer.summary()[2].parameter == "(outside the model) 0"


@pytest.mark.promise("parameters unfrozen after construction")
def test_parameters_that_are_unfrozen_later_are_trained() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = KFAC(model, lr=0.1)
    assert optimizer.summary()[0].treatment == "untrained"
    model[0].requires_grad_(True)
    before = model[0].weight.detach().clone()
    model(torch.randn(4, 2)).square().mean().backward()
    optimizer.step()
    assert not torch.equal(before, model[0].weight)
    assert optimizer.summary()[0].treatment == "fallback"
