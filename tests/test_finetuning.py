"""Parts of a network that stand still, are added, or sometimes do not run."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from mutants import replace
from torch import Tensor, nn

from kfac import KFAC
from kfac.calls import CallReader
from kfac.factors import Bucket
from kfac.fisher import CrossEntropy, _TermwiseLikelihood

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)
randn = partial(torch.randn, dtype=torch.float64)

CLASSES, WIDTH, RANK, DAMPING, LR = 3, 4, 2, 0.3, 0.5
PLAIN: dict[str, Any] = {
    "lr": LR, "momentum": 0.0, "kl_clip": None, "damping": DAMPING, "inverse": "eigen",
    "fisher": "type-2", "factor_update_period": 1, "inverse_update_period": 1,
    "factor_decay": 0.0,
}  # fmt: skip


Batch = tuple[Any, Tensor]


def make(model: nn.Module, **settings: Any) -> tuple[KFAC, Callable[[Batch], None]]:
    """An optimizer, and a function that takes one step."""
    criterion = settings.pop("loss", nn.CrossEntropyLoss())
    optimizer = KFAC(model, criterion=criterion, **PLAIN | settings)

    def step(batch: Batch) -> None:
        inputs, target = batch
        optimizer.zero_grad()
        criterion(model(inputs), target).backward()
        optimizer.step()

    return optimizer, step


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    target = torch.arange(6) % CLASSES
    return [
        (torch.randn(6, WIDTH, generator=generator, dtype=torch.float64), target)
        for _ in range(count)
    ]


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Of what is trained, by name; the model must not have hooks."""
    model = copy.deepcopy(model)
    nn.CrossEntropyLoss()(model(batch[0]), batch[1]).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def rows_of(optimizer: KFAC) -> dict[str, tuple[str, str]]:
    """Treatment and reason by parameter."""
    return {row.parameter: (row.treatment, row.reason) for row in optimizer.summary()}


# Low-rank additions to a frozen layer


class LowRank(nn.Module):
    """A frozen layer plus scale · B A, as adapters have it."""

    def __init__(self, base: nn.Linear, scale: float = 2.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


class Adapted(nn.Module):
    def __init__(self, up: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = LowRank(nn.Linear(WIDTH, WIDTH))
        self.second = LowRank(nn.Linear(WIDTH, CLASSES))
        for layer in self.first, self.second:
            nn.init.normal_(layer.up.weight, std=up)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def low_rank_factors(model: Adapted, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """A and G of the four small layers by the chain rule, example by example."""
    first, second, scale = model.first, model.second, model.first.scale
    whole = second.base.weight + scale * second.up.weight @ second.down.weight
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for a in x:
        hidden = first(a).tanh()
        p = second(hidden).softmax(0)
        hessian = p.diag() - p.outer(p)
        to_first = whole @ (1 - hidden**2).diag()
        for name, inputs, jacobian in (
            ("first.down", a, scale * to_first @ first.up.weight),
            ("first.up", first.down.weight @ a, scale * to_first),
            ("second.down", hidden, scale * second.up.weight),
            ("second.up", second.down.weight @ hidden, scale * torch.eye(CLASSES).double()),
        ):
            pair = inputs.outer(inputs), jacobian.T @ hessian @ jacobian
            pairs.setdefault(name, []).append(pair)
    return {
        name: tuple(torch.stack(side).mean(0, keepdim=True) for side in zip(*found, strict=True))
        for name, found in pairs.items()
    }


def test_low_rank_additions_have_the_factors_and_the_step_written_out() -> None:
    model, (batch,) = Adapted(), batches(1)
    before = copy.deepcopy(model)
    optimizer, step = make(model)
    step(batch)
    slopes = gradients(before, batch)
    with torch.no_grad():
        expected = low_rank_factors(before, batch[0])
    assert slopes.keys() == {f"{name}.weight" for name in expected}
    for name, (a, g) in expected.items():
        close(optimizer.factor(name), (a, g))
        key = f"{name}.weight"
        moved = oracles.solve_exact_damping(a, g, DAMPING, slopes[key][None])[0]
        close(model.get_parameter(key), before.get_parameter(key) - LR * moved)


@pytest.mark.parametrize("inverse", ["eigen", "cholesky", "ekfac"])
def test_the_base_of_low_rank_additions_stays_bit_for_bit(inverse: str) -> None:
    model = Adapted()
    before = values(model)
    settings = {"weight_decay": 0.1, "momentum": 0.9, "inverse": inverse}
    optimizer, step = make(model, **settings)
    for batch in batches(3):
        step(batch)
    for name, value in values(model).items():
        assert torch.equal(value, before[name]) == ("base" in name)
    assert rows_of(optimizer) == {
        name: ("untrained", "frozen") if "base" in name else ("kfac", "") for name in before
    }


@pytest.mark.parametrize("inverse", ["eigen", "cholesky", "ekfac"])
@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical"])
def test_low_rank_additions_may_start_at_zero(fisher: str, inverse: str) -> None:
    """Then nothing comes back to the first of the two in the first step: its G is 0."""
    model = Adapted(up=0.0)
    before = values(model)
    optimizer, step = make(model, fisher=fisher, inverse=inverse)
    first, second = batches(2)
    step(first)
    assert not optimizer.factor("first.down")[1].any()
    assert torch.equal(model.first.down.weight, before["first.down.weight"])
    step(second)
    for name, value in values(model).items():
        assert value.isfinite().all()
        assert torch.equal(value, before[name]) == ("base" in name)


# Frozen weights, frozen biases


class Several(nn.Module):
    """Layers of many types, that have biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(1, 3, 2)
        self.norm = nn.LayerNorm(3)
        self.att = nn.MultiheadAttention(3, 1, batch_first=True)
        self.head = nn.Linear(3, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x[:, None]).mT.tanh())
        return self.head(self.att(x, x, x)[0].mean(1))


def is_bias(name: str) -> bool:
    return name.endswith("bias")


@pytest.mark.parametrize("fisher", ["type-2", "empirical", "forward-only"])
def test_biases_alone_are_trained_by_the_fallback(fisher: str) -> None:
    model, (batch,) = Several(), batches(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_bias(name))
    before = copy.deepcopy(model)
    optimizer, step = make(model, fisher=fisher)
    expected = {
        name: ("fallback", "its weight is not trained")
        if is_bias(name)
        else ("untrained", "frozen")
        for name, _ in model.named_parameters()
    }
    assert rows_of(optimizer) == expected
    step(batch)
    slopes = gradients(before, batch)
    for name, old in values(before).items():
        close(model.get_parameter(name), old - LR * slopes[name] if is_bias(name) else old)


@pytest.mark.promise("frozen weights")
def test_one_frozen_weight_leaves_the_other_layers_as_they_are() -> None:
    model, (batch,) = Several(), batches(1)
    model.head.weight.requires_grad_(False)
    before, whole = copy.deepcopy(model), Several()
    optimizer, step = make(model)
    reference, reference_step = make(whole)
    step(batch)
    reference_step(batch)
    assert rows_of(optimizer)["head.bias"] == ("fallback", "its weight is not trained")
    close(model.head.bias, before.head.bias - LR * gradients(before, batch)["head.bias"])
    for name in ("conv", "norm", *(f"att.{part}_proj" for part in ("q", "k", "v", "out"))):
        close(optimizer.factor(name), reference.factor(name))
    for name, value in values(model).items():
        if not name.startswith("head"):
            close(value, whole.get_parameter(name))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_frozen_biases_leave_their_weights_under_kfac_without_a_constant(sharing: str) -> None:
    model, (batch,) = Several(), batches(1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not is_bias(name))
    before = copy.deepcopy(model)
    optimizer, step = make(model, weight_sharing=sharing)
    reference, reference_step = make(Several(), weight_sharing=sharing)
    step(batch)
    reference_step(batch)
    slopes = gradients(before, batch)
    for name in ("conv", "head"):
        a, g = reference.factor(name)
        a = a[:, :-1, :-1]
        close(optimizer.factor(name), (a, g))
        old, new = before.get_submodule(name), model.get_submodule(name)
        slope = oracles.to_blocks(old, slopes[f"{name}.weight"], None)
        moved = oracles.solve_exact_damping(a, g, DAMPING, slope)
        close(oracles.to_blocks(new, new.weight - old.weight, None), -LR * moved)
    for name, value in values(model).items():
        assert torch.equal(value, before.get_parameter(name)) == is_bias(name)
        treatment = ("untrained", "frozen") if is_bias(name) else ("kfac", "")
        assert rows_of(optimizer)[name] == treatment


@pytest.mark.promise("parameters frozen after construction")
def test_a_weight_that_is_frozen_later_stays_and_its_bias_gets_the_plain_gradient() -> None:
    model, (one, two) = Several(), batches(2)
    _, step = make(model)
    step(one)
    model.head.weight.requires_grad_(False)
    before = copy.deepcopy(model)
    step(two)
    assert torch.equal(model.head.weight, before.head.weight)
    close(model.head.bias, before.head.bias - LR * gradients(before, two)["head.bias"])
    assert not torch.equal(model.conv.weight, before.conv.weight)


# Branches that do not run in every batch


class Mixture(nn.Module):
    """One of two experts for each batch, and a third that none is for."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, CLASSES)
        self.double()

    def forward(self, choice: tuple[Tensor, int]) -> Tensor:
        x, expert = choice
        return self.head(self.norms[expert](self.experts[expert](x).tanh()))


CHOICES = [0, 0, 1, 0, 1, 1]


def state_of(optimizer: KFAC, model: Mixture, expert: int) -> list[Tensor]:
    prefixes = f"experts.{expert}", f"norms.{expert}"
    factors = [factor for name in prefixes for factor in optimizer.factor(name)]
    parameters = [value for key, value in values(model).items() if key.startswith(prefixes)]
    return parameters + [factor for factor in factors if factor is not None]


@pytest.mark.parametrize(
    ("inverse", "fisher"),
    [
        (inverse, fisher)
        for inverse in ("eigen", "cholesky", "ekfac")
        for fisher in ("type-2", "mc", "empirical", "forward-only")
        if (inverse, fisher) != ("ekfac", "forward-only")
    ],
)
def test_what_did_not_run_stays_as_it_is(inverse: str, fisher: str) -> None:
    model = Mixture()
    settings = {"momentum": 0.9, "inverse_update_period": 2, "factor_decay": 0.5}
    optimizer, step = make(model, fisher=fisher, inverse=inverse, **settings)
    for expert, (x, target) in zip(CHOICES, batches(len(CHOICES)), strict=True):
        before = [state_of(optimizer, model, index) for index in range(3)]
        step(((x, expert), target))
        for index in range(3):
            pairs = list(zip(before[index], state_of(optimizer, model, index), strict=True))
            if index == expert:
                assert not any(torch.equal(old, new) for old, new in pairs[:4])
            else:
                assert all(torch.equal(old, new) for old, new in pairs)
    with pytest.raises(KeyError, match="no statistics"):
        optimizer.curvature()["experts.2"]


def test_an_average_is_over_the_batches_in_which_a_layer_ran() -> None:
    model, decay = Mixture(), 0.5
    optimizer, step = make(model, lr=0.0, factor_decay=decay)
    inputs: dict[int, list[Tensor]] = {0: [], 1: []}
    for expert, (x, target) in zip(CHOICES, batches(len(CHOICES)), strict=True):
        step(((x, expert), target))
        rows = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        inputs[expert].append(rows.T @ rows / len(rows))
        for index, seen in inputs.items():
            if seen:
                a, _ = optimizer.factor(f"experts.{index}")
                close(a[0], oracles.weighted_average(seen, decay))


# What K-FAC does not take


class Recurrent(nn.Module):
    """A recurrent layer, a parameter by itself, and a layer that K-FAC takes."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.start = nn.Parameter(torch.randn(1))
        self.memory = kind(1, 3, batch_first=True)
        self.head = nn.Linear(3, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x[..., None] + self.start)[0][:, -1])


@pytest.mark.promise("other modules")
@pytest.mark.parametrize("fallback", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_and_lone_parameters_are_trained(
    kind: type[nn.RNNBase], fallback: str
) -> None:
    model, (batch,) = Recurrent(kind), batches(1)
    before = copy.deepcopy(model)
    optimizer, step = make(model, fallback=fallback)
    rows = rows_of(optimizer)
    assert rows.pop("head.weight") == rows.pop("head.bias") == ("kfac", "")
    assert rows.pop("start") == ("fallback", "Recurrent is not supported")
    assert set(rows.values()) == {("fallback", f"{kind.__name__} is not supported")}
    step(batch)
    slopes, reference = gradients(before, batch), copy.deepcopy(before)
    others = [p for name, p in reference.named_parameters() if not name.startswith("head")]
    for name, parameter in reference.named_parameters():
        parameter.grad = slopes[name]
    inner = (
        torch.optim.SGD(others, lr=LR)
        if fallback == "sgd"
        else torch.optim.AdamW(others, weight_decay=0.0)
    )
    inner.step()
    for name, value in values(reference).items():
        found, old = model.get_parameter(name), before.get_parameter(name)
        assert (found != old).any()
        if not name.startswith("head"):
            close(found, value)


# Tokens that are ignored


class Tagger(nn.Module):
    """Every position for itself: [N, T, width] to [N, classes, T]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm = nn.Linear(WIDTH, 3), nn.LayerNorm(3)
        self.head = nn.Linear(3, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(x).tanh())).movedim(-1, 1)


def without_ignored_tokens(
    fisher: str, weights: list[float] | None, masked: bool
) -> tuple[KFAC, KFAC, Tagger, Tagger]:
    """One step with some tokens ignored, and one with only the others."""
    torch.manual_seed(1)
    x, target = randn(4, 5, WIDTH), torch.arange(20).reshape(4, 5) % CLASSES
    kept = torch.tensor([[1, 1, 1, 0, 0], [1] * 5, [0] * 5, [0, 1, 1, 1, 0]]).bool()
    weight = None if weights is None else torch.tensor(weights).double()
    loss = nn.CrossEntropyLoss(weight, ignore_index=-1)
    models = Tagger(), Tagger()
    settings = {"position_mask": lambda x: kept} if masked else {}
    padded, pad_step = make(models[0], fisher=fisher, loss=loss, **settings)
    dropped, drop_step = make(models[1], fisher=fisher, loss=loss)
    pad_step((x, target.masked_fill(~kept, -1)))
    drop_step((x[kept], target[kept]))
    return padded, dropped, *models


def check_ignored_tokens(fisher: str, weights: list[float] | None) -> None:
    padded, dropped, one, other = without_ignored_tokens(fisher, weights, masked=True)
    for name in ("inner", "norm", "head"):
        close(padded.factor(name), dropped.factor(name))
    close(list(one.parameters()), list(other.parameters()))


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_ignored_tokens_that_are_masked_are_as_good_as_dropped(
    fisher: str, weights: list[float] | None
) -> None:
    check_ignored_tokens(fisher, weights)


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_ignored_tokens_that_are_not_masked_enter_the_inputs_only(fisher: str) -> None:
    padded, dropped, *_ = without_ignored_tokens(fisher, None, masked=False)
    for name in ("inner", "norm", "head"):
        (a, g), (expected_a, expected_g) = padded.factor(name), dropped.factor(name)
        close(g, expected_g)
        assert not torch.allclose(a, expected_a)


# Tables


def test_a_table_has_no_square_factor_whatever_its_size() -> None:
    model = nn.Sequential(nn.Embedding(300, WIDTH), nn.Linear(WIDTH, CLASSES)).double()
    optimizer, step = make(model)
    assert optimizer.summary()[0].factors == f"A 1×300, G 1×{WIDTH}×{WIDTH}"
    step((torch.arange(6), torch.arange(6) % CLASSES))
    frequencies, _ = optimizer.factor("0")
    close(frequencies, torch.cat([torch.ones(1, 6), torch.zeros(1, 294)], dim=1).double() / 6)


# Mutants


def fold_all(original: Callable, bucket: Bucket, present: Tensor, *rest: Any) -> Tensor:
    """Layers that did not run are averaged with the zeros that are pending for them."""
    return original(bucket, torch.ones_like(present), *rest)


def scaled(
    original: Callable, bucket: Bucket, index: int, name: str, moment: Tensor, rows: int = 0
) -> None:
    """The scale of the low-rank product once more in G."""
    original(bucket, index, name, moment * (2 if name == "G" else 1), rows)


MUTANTS: dict[str, tuple[Callable, Callable]] = {
    "layers that did not run fade": (
        replace(Bucket, "fold", fold_all),
        test_an_average_is_over_the_batches_in_which_a_layer_ran,
    ),
    "scale of the low-rank product counted twice": (
        replace(Bucket, "accumulate", scaled),
        test_low_rank_additions_have_the_factors_and_the_step_written_out,
    ),
    "ignored terms in the normaliser": (
        replace(
            CrossEntropy, "normalizer",
            lambda original, *arguments: _TermwiseLikelihood.normalizer(*arguments),
        ),
        partial(check_ignored_tokens, "type-2", None),
    ),
    "ignored terms in the Fisher": (
        replace(
            CrossEntropy, "curvature_weights",
            lambda original, self, output, target, rows: torch.ones_like(rows[:, :1]),
        ),
        partial(check_ignored_tokens, "type-2", None),
    ),
    "inputs of ignored terms": (
        replace(CallReader, "_mask", lambda original, *call: None),
        partial(check_ignored_tokens, "type-2", None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test = MUTANTS[name]
    test()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test()
