"""Factors from the first examples of a batch: those of these examples, as if they were all."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import oracles
import pytest
import torch
import torch.nn.functional as F
from mutants import Replacement, replace
from torch import Tensor, nn

import kfac.statistics
from kfac import KFAC, Preconditioner
from kfac.layers import Layer
from kfac.layers.embedding import EmbeddingBagLayer, EmbeddingLayer
from kfac.layers.norm import BatchNormLayer
from kfac.statistics import Statistics

close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
equal = partial(torch.testing.assert_close, rtol=0, atol=0)
EXAMPLES, VOCABULARY = 6, 7
SETTINGS: dict[str, Any] = {
    "factor_decay": 0.0, "factor_update_period": 1, "inverse_update_period": 1000,
    "stagger_refreshes": False,
}  # fmt: skip


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@dataclass
class Fixed:
    """A loss whose vectors do not depend on chance; the first of them is the sampled one."""

    seeds: tuple[int, ...] = (1, 2)
    reduction: str = "mean"

    def __call__(self, output: Tensor, target: Tensor | None = None) -> Tensor:
        return (output.square() / 2).sum() / len(output)

    def normalizer(self, output: Tensor, target: Tensor | None) -> Tensor:
        return torch.tensor(float(len(output)), dtype=torch.float64)

    def sample(self, output: Tensor, target: Tensor | None, generator: torch.Generator) -> Tensor:
        return next(self.vectors(output, target, len(output)))

    def num_vectors(self, output: Tensor, examples: int) -> int:
        return len(self.seeds)

    def vectors(self, output: Tensor, target: Tensor | None, examples: int) -> Iterator[Tensor]:
        for seed in self.seeds:
            generator = torch.Generator().manual_seed(seed)
            yield torch.randn(output.shape, generator=generator, dtype=output.dtype)


class Tokens(nn.Module):
    """Tokens ``[N, T]`` to outputs ``[N, 3]``, with the tokens of all examples along one axis."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(VOCABULARY, 4), nn.LayerNorm(4)
        self.wide, self.flat = nn.Linear(4, 5), nn.Linear(5, 4)
        self.last, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wide(self.norm(self.table(tokens))).tanh()
        return self.head(self.last(self.flat(x.flatten(0, 1))).view(*tokens.shape, 4).mean(1))


def images() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), nn.Tanh(), nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3),
        nn.BatchNorm1d(3),
    )  # fmt: skip


def problem(name: str) -> tuple[nn.Module, Tensor, dict[str, nn.Module]]:
    """A model with norms that do something, its batch, its layers."""
    torch.manual_seed(3)
    if name == "tokens":
        model, x = Tokens().double(), torch.randint(0, VOCABULARY, (EXAMPLES, 5))
    else:
        model, x = images().double(), randn(EXAMPLES, 2, 4, 4)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    layers = {n: m for n, m in model.named_modules() if list(m.parameters(recurse=False))}
    return model, x, layers


# --- the factors written out ------------------------------------------------------------------


def rows_of(module: nn.Module, x: Tensor) -> Tensor:
    """The inputs a ``[N, T, groups, d_in]``, with a 1 for the bias."""
    if isinstance(module, nn.Embedding):
        return F.one_hot(x, VOCABULARY).double().view(EXAMPLES, -1, 1, VOCABULARY)
    if isinstance(module, nn.LayerNorm):
        deviation = x - x.mean(-1, keepdim=True)
        scaled = deviation / (deviation.square().mean(-1, keepdim=True) + module.eps).sqrt()
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        x = x.movedim(1, -1)
        axes = tuple(range(x.dim() - 1))
        deviation = x - x.mean(axes)
        scaled = deviation / (deviation.square().mean(axes) + module.eps).sqrt()
    else:
        return oracles.input_rows(module, x, EXAMPLES)
    rows = scaled.reshape(EXAMPLES, -1, scaled.shape[-1], 1)
    return torch.cat([rows, torch.ones_like(rows)], dim=-1)


def gradients_of(module: nn.Module, g: Tensor) -> Tensor:
    """The gradients of a layer's outputs ``[N, T, groups, d_out]``."""
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        g = g.movedim(1, -1)
    if isinstance(module, nn.LayerNorm | nn.BatchNorm1d | nn.BatchNorm2d):
        return g.reshape(EXAMPLES, -1, g.shape[-1], 1)
    if isinstance(module, nn.Embedding):
        return g.reshape(EXAMPLES, -1, 1, g.shape[-1])
    return oracles.output_rows(module, g, EXAMPLES)


def observe(
    model: nn.Module, module: nn.Module, x: Tensor, fisher: str
) -> tuple[Tensor, list[Tensor]]:
    """Rows of inputs, and of the gradients of every vector of a Fisher matrix, scaled to be b.

    With b the G of all examples is (1/N) Σ b bᵀ.
    """
    inputs, outputs = [], []

    def look(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        inputs.append(arguments[0].detach())
        outputs.append(output + torch.zeros_like(output, requires_grad=True))
        return outputs[-1]

    handle = module.register_forward_hook(look)
    y = model(x)
    handle.remove()
    vectors = {
        "empirical": [y.detach()],  # N times the gradient of the mean loss
        "mc": list(Fixed().vectors(y, None, EXAMPLES))[:1],
        "type-2": list(Fixed().vectors(y, None, EXAMPLES)),
    }[fisher]
    gradients = [torch.autograd.grad(y, outputs, v, retain_graph=True) for v in vectors]
    return rows_of(module, inputs[0]), [gradients_of(module, g) for (g,) in gradients]


def moment(rows: Tensor) -> Tensor:
    return torch.einsum("ntgi,ntgj->gij", rows, rows)


def expected(
    model: nn.Module, module: nn.Module, x: Tensor, fisher: str, sharing: str, kept: int
) -> tuple[Tensor, Tensor]:
    a, gradients = observe(model, module, x, fisher)
    if sharing == "reduce":
        a = a.mean(1, keepdim=True)
        gradients = [b.sum(1, keepdim=True) for b in gradients]
    second = moment(a[:kept]) / a[:kept, :, 0, 0].numel()
    return second, sum(moment(b[:kept]) for b in gradients) / EXAMPLES / (kept / EXAMPLES)


def preconditioner(model: nn.Module, **settings: Any) -> Preconditioner:
    return Preconditioner(model, **{"criterion": Fixed(), "fisher": "mc"} | SETTINGS | settings)


def update(model: nn.Module, engine: Preconditioner, *arguments: Tensor) -> None:
    """One factor update; running averages of norm layers do not matter in training mode."""
    model.zero_grad()
    Fixed()(model(*arguments)).backward()
    engine.step()


def check_factors(
    name: str, fraction: float = 0.5, kept: int = 3, sharing: str = "expand", fisher: str = "mc"
) -> None:
    model, x, layers = problem(name)
    wanted = {
        layer: expected(model, module, x, fisher, sharing, kept) for layer, module in layers.items()
    }
    engine = preconditioner(model, factor_fraction=fraction, weight_sharing=sharing, fisher=fisher)
    update(model, engine, x)
    for layer, (a, g) in wanted.items():
        found_a, found_g = engine.factor(layer)
        if found_a.dim() < a.dim():
            a = a.diagonal(dim1=-2, dim2=-1)
        close(found_a, a, msg=lambda text, layer=layer: f"A of {layer}: {text}")
        close(found_g, g, msg=lambda text, layer=layer: f"G of {layer}: {text}")


@pytest.mark.filterwarnings("ignore:fisher='type-2' is exact only if:UserWarning")
@pytest.mark.parametrize("name", ["images", "tokens"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["mc", "type-2", "empirical"])
def test_factors_are_the_averages_over_the_first_half_of_the_examples(
    name: str, sharing: str, fisher: str
) -> None:
    check_factors(name, sharing=sharing, fisher=fisher)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("fraction", "kept"), [(1e-9, 1), (0.4, 2), (0.45, 3), (0.99, 6)])
def test_the_number_of_examples_is_rounded_and_one_at_least(
    fraction: float, kept: int, sharing: str
) -> None:
    check_factors("tokens", fraction, kept, sharing)


def test_a_batch_of_one_is_used_whole() -> None:
    model, x = nn.Linear(3, 2).double(), randn(1, 3)
    engine = preconditioner(model, factor_fraction=0.1)
    update(model, engine, x)
    rows = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
    (b,) = list(Fixed().vectors(model(x), None, 1))[:1]
    a, g = engine.factor("")
    close(a[0], rows.mT @ rows)
    close(g[0], b.mT @ b)


def test_eigenvalues_of_ekfac_are_measured_with_the_first_half_of_the_examples() -> None:
    check_eigenvalues()


def check_eigenvalues() -> None:
    for name in ("images", "tokens"):
        for sharing in ("expand", "reduce"):
            model, x, layers = problem(name)
            engine = preconditioner(
                model, factor_fraction=0.5, inverse="ekfac", weight_sharing=sharing
            )
            update(model, engine, x)
            before = engine.state_dict()["layers"]
            rows = {n: observe(model, m, x, "mc") for n, m in layers.items()}
            update(model, engine, x)
            for layer, (a, (b,)) in rows.items():
                inverse = before[layer]["inverse"]
                q_a, q_g = (inverse.get(f"{f}_eigenvectors") for f in "AG")
                a = a if q_a is None else torch.einsum("ntgi,gij->ntgj", a, q_a)
                b = b if q_g is None else torch.einsum("ntgi,gij->ntgj", b, q_g)
                gradients = torch.einsum("ntgo,ntgi->ngoi", b, a)[:3]
                found = engine.state_dict()["layers"][layer]["factors"]["S"]
                close(found, gradients.square().sum(0) / EXAMPLES / 0.5, msg=layer)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_of_a_mask_the_part_of_the_first_half_of_the_examples_counts(
    flat: bool, sharing: str
) -> None:
    check_mask(flat, sharing)


class Averaged(nn.Module):
    """A linear layer at every position, averaged over positions."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.linear, self.flat = nn.Linear(3, 2).double(), flat

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.linear(x.flatten(0, 1)).view(*mask.shape, 2) if self.flat else self.linear(x)
        return (y * mask.unsqueeze(-1)).mean(1)


def check_mask(flat: bool, sharing: str) -> None:
    x, mask = randn(4, 3, 3), torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 1]])
    model = Averaged(flat)
    engine = preconditioner(
        model, factor_fraction=0.5, position_mask="mask", weight_sharing=sharing
    )
    update(model, engine, x, mask)
    rows = torch.stack([x[0, 0], x[0, 1], x[1, 0]])
    if sharing == "reduce":
        rows = torch.stack([x[0, :2].mean(0), x[1, 0]])
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    close(engine.factor("linear")[0][0], rows.mT @ rows / len(rows))


class Bags(nn.Module):
    """An average of tokens for every example, given where each begins."""

    def __init__(self) -> None:
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(VOCABULARY, 3).double(), nn.Linear(3, 2).double()

    def forward(self, starts: Tensor, tokens: Tensor) -> Tensor:
        return self.head(self.bags(tokens, starts))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_of_bags_of_any_length_the_first_ones_count(sharing: str) -> None:
    check_bags(sharing)


def check_bags(sharing: str) -> None:
    starts, tokens = torch.tensor([0, 1, 3, 3]), torch.tensor([2, 4, 4, 1, 2, 3, 5, 5])
    model = Bags()
    engine = preconditioner(model, factor_fraction=0.5, weight_sharing=sharing)
    update(model, engine, starts, tokens)
    a, g = engine.factor("bags")
    close(a, torch.tensor([[0, 0, 0.5, 0, 0.5, 0, 0]], dtype=torch.float64))
    (v,) = list(Fixed().vectors(torch.empty(4, 2, dtype=torch.float64), None, 4))[:1]
    b = v[:2] @ model.head.weight.detach()
    close(g[0], b.mT @ b / 2)


# --- a part of a batch is as good as that part alone ------------------------------------------


class Everything(nn.Module):
    """Layers of the kinds that the factors above were not written out for."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bags = nn.Embedding(VOCABULARY, 4), nn.EmbeddingBag(VOCABULARY, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.twice, self.rms = nn.Linear(4, 4), nn.RMSNorm(4)
        self.conv, self.group = nn.Conv1d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm1d(4, affine=True)
        self.batch = nn.BatchNorm1d(4)
        self.out = nn.Linear(4, VOCABULARY)
        self.out.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.twice(self.twice(self.table(tokens)).tanh())
        y = x.transpose(0, 1)
        x = self.rms(x + self.attention(y, y, y, need_weights=False)[0].transpose(0, 1))
        x = self.batch(self.instance(self.group(self.conv(x.mT))))
        return self.out(x.mean(2) + self.bags(tokens))


def everything() -> Everything:
    torch.manual_seed(4)
    model = Everything().double().eval()  # BatchNorm with running statistics mixes no examples
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def statistics(engine: Preconditioner) -> dict[str, Tensor]:
    return {
        f"{factor} of {layer}": value
        for layer, saved in engine.state_dict()["layers"].items()
        for factor, value in saved["factors"].items()
    }


class Alone(Fixed):
    """The vectors that the examples have in a batch of :data:`EXAMPLES`, whatever the batch."""

    def vectors(self, output: Tensor, target: Tensor | None, examples: int) -> Iterator[Tensor]:
        whole = output.new_zeros(EXAMPLES, *output.shape[1:])
        for vector in super().vectors(whole, target, examples):
            yield vector[: len(output)]


def statistics_of(batches: list[Tensor], **settings: Any) -> dict[str, Tensor]:
    model = everything()
    engine = preconditioner(model, **{"criterion": Alone()} | settings)
    examples = sum(map(len, batches))
    for _ in range(2):  # the eigenvalues of "ekfac" are measured from the second on
        model.zero_grad()
        for x in batches:
            (Alone()(model(x)) * len(x) / examples).backward()
        engine.step()
    return statistics(engine)


def same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, factor in wanted.items():
        close(found[name], factor, msg=lambda text, name=name: f"{name}: {text}")


ALONE: dict[str, dict[str, Any]] = {
    "expand": {},
    "reduce": {"weight_sharing": "reduce"},
    "type-2": {"fisher": "type-2", "weight_sharing": "reduce"},
    "empirical": {"fisher": "empirical"},
    "forward-only": {"fisher": "forward-only"},
    "ekfac": {"inverse": "ekfac"},
    "ekfac, type-2": {"inverse": "ekfac", "fisher": "type-2"},
    "ekfac, reduce": {"inverse": "ekfac", "weight_sharing": "reduce"},
    "diagonal": {"max_factor_dim": 1},
    "blocks": {"max_factor_dim": 3},
}


def check_alone(name: str) -> None:
    tokens = torch.randint(0, VOCABULARY, (EXAMPLES, 5), generator=torch.Generator().manual_seed(5))
    part = statistics_of([tokens], factor_fraction=0.5, **ALONE[name])
    same(part, statistics_of([tokens[:3]], **ALONE[name]))


@pytest.mark.parametrize("name", ALONE)
def test_half_of_a_batch_gives_the_statistics_of_that_half_alone(name: str) -> None:
    check_alone(name)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_every_micro_batch_is_cut_by_itself(sharing: str) -> None:
    tokens = torch.randint(0, VOCABULARY, (EXAMPLES, 5), generator=torch.Generator().manual_seed(5))
    settings = {"weight_sharing": sharing}
    part = statistics_of([tokens[:2], tokens[2:]], factor_fraction=0.5, **settings)
    same(part, statistics_of([tokens[:1], tokens[2:4]], **settings))


# --- where the examples are not known, and what is left as it was ------------------------------


class Shared(nn.Module):
    """Inputs that are the same for all examples, beside the batch."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.beside, self.places = nn.Linear(3, 4), nn.Embedding(rows, 4)
        self.token, self.head = nn.Embedding(3, 4), nn.Linear(4, 2)
        self.register_buffer("inputs", torch.linspace(-1, 1, 5 * 3).view(5, 3))
        self.register_buffer("positions", torch.arange(rows))

    def forward(self, x: Tensor) -> Tensor:
        common = self.beside(self.inputs).tanh().mean(0) + self.token(torch.tensor(1))
        return self.head((x + common + self.places(self.positions)).mean(1))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_rows_that_do_not_tell_the_examples_are_all_used(sharing: str) -> None:
    check_shared(sharing)


def check_shared(sharing: str) -> None:
    x, factors = randn(4, 8, 4), []
    for fraction in (1.0, 0.5):
        torch.manual_seed(6)
        model = Shared(rows=8).double()  # as many positions as twice the examples
        engine = preconditioner(
            model, factor_fraction=fraction, weight_sharing="expand" if fraction == 1 else sharing
        )
        update(model, engine, x)
        factors.append({n: engine.factor(n) for n in ("beside", "places", "token")})
    for name, wanted in factors[0].items():
        for found, factor in zip(factors[1][name], wanted, strict=True):
            close(found, factor, msg=name)
    assert (factors[0]["places"][0] > 0).all()


def test_summary_says_which_layers_are_expanded_for_it() -> None:
    model = Shared(rows=8).double()
    engine = preconditioner(model, factor_fraction=0.5, weight_sharing="reduce")
    update(model, engine, randn(4, 8, 4))
    reasons = {row.parameter: row.reason for row in engine.summary()}
    assert all("expanded" in reasons[f"{name}.weight"] for name in ("beside", "places", "token"))
    assert reasons["head.weight"] == ""


def test_all_examples_are_the_default_and_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Layer, EmbeddingBagLayer, BatchNormLayer):
        monkeypatch.setattr(kind, "leading_part", None)
    monkeypatch.setattr(EmbeddingLayer, "tells_examples", None)
    tokens = torch.randint(0, VOCABULARY, (EXAMPLES, 5))
    for settings in ALONE.values():
        default = statistics_of([tokens], **settings)
        explicit = statistics_of([tokens], factor_fraction=1.0, **settings)
        assert default.keys() == explicit.keys()
        for name, factor in default.items():
            equal(explicit[name], factor)


def test_gradients_are_checked_with_all_examples() -> None:
    """A gradient of a weight that differs from what was seen of it would be warned of."""
    model, x, _ = problem("images")
    for fisher in ("mc", "empirical"):
        update(model, preconditioner(model, factor_fraction=0.2, fisher=fisher), x)


def test_the_step_has_the_gradient_of_all_examples() -> None:
    model, x = nn.Linear(3, 2).double(), randn(EXAMPLES, 3)
    optimizer = KFAC(
        model, lr=1.0, momentum=0.0, damping=0.3, kl_clip=None, inverse="eigen", criterion=Fixed(),
        factor_fraction=0.5,
    )  # fmt: skip
    blocks = oracles.to_blocks(model, model.weight.detach(), model.bias.detach())
    a, g = expected(model, model, x, "mc", "expand", 3)
    Fixed()(model(x)).backward()
    gradient = oracles.to_blocks(model, model.weight.grad, model.bias.grad)
    optimizer.step()
    step = blocks - oracles.to_blocks(model, model.weight.detach(), model.bias.detach())
    close(step, oracles.solve_exact_damping(a, g, 0.3, gradient))


def test_a_state_may_be_continued_with_another_fraction() -> None:
    model, x, _ = problem("tokens")
    half = preconditioner(model, factor_fraction=0.5)
    update(model, half, x)
    whole = preconditioner(model)
    whole.load_state_dict(half.state_dict())
    same(statistics(whole), statistics(half))


# --- mutants ------------------------------------------------------------------------------------


def only_inputs(original: Replacement, statistics: Statistics, layer: Layer, *rest: Any) -> Any:
    """All gradients, and the inputs of the first examples."""
    statistics.fraction, fraction = 1.0, statistics.fraction
    x = rest[1]
    kept = max(1, round(fraction * len(x)))
    try:
        if layer.weight_sharing == "expand":
            statistics._take_input(layer, None, layer.leading_part(x, kept)[1])
        return original(statistics, layer, *rest, count_input=False)
    finally:
        statistics.fraction = fraction


def down(original: Replacement, statistics: Statistics, examples: int) -> int:
    return int(statistics.fraction * examples)


def not_down_to_zero(original: Replacement, statistics: Statistics, examples: int) -> int:
    return max(1, int(statistics.fraction * examples))


def as_if_alone(original: Replacement, layer: Layer, x: Tensor, size: int) -> tuple[Layer, Tensor]:
    return layer, x[:size]


def check_mixed() -> None:
    for sharing in ("expand", "reduce"):
        check_factors("images", sharing=sharing)


MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable[[], None]]] = {
    "the share is not divided by": (
        replace(kfac.statistics, "_of_all", lambda original, moment, share: moment),
        partial(check_factors, "tokens"),
    ),
    "the share is not divided by under reduce": (
        replace(kfac.statistics, "_of_all", lambda original, moment, share: moment),
        partial(check_factors, "tokens", sharing="reduce"),
    ),
    "the share is not divided by for eigenvalues": (
        replace(kfac.statistics, "_of_all", lambda original, moment, share: moment),
        check_eigenvalues,
    ),
    "the share that was asked for and not that which was taken": (
        replace(Statistics, "_share", lambda original, statistics, n: statistics.fraction),
        partial(check_factors, "tokens", 0.4, 2),
    ),
    "only inputs are cut": (
        replace(
            Statistics, "take",
            lambda original, *a, count_input: only_inputs(original, *a),
        ),
        partial(check_factors, "tokens"),
    ),
    "rounded down": (
        replace(Statistics, "_kept", not_down_to_zero), partial(check_factors, "tokens", 0.45, 3),
    ),
    "rounded down to none": (
        replace(Statistics, "_kept", down), partial(check_factors, "tokens", 1e-9, 1),
    ),
    "the last examples": (
        replace(Layer, "leading_part", lambda original, layer, x, size: (layer, x[-size:])),
        partial(check_factors, "tokens"),
    ),
    "BatchNorm of a part by itself": (
        replace(BatchNormLayer, "leading_part", as_if_alone), check_mixed,
    ),
    "the first slots of bags": (
        replace(EmbeddingBagLayer, "leading_part", as_if_alone), partial(check_bags, "expand"),
    ),
    "positions taken for examples": (
        replace(EmbeddingLayer, "tells_examples", lambda original, layer, x, n: x.dim() > 0),
        partial(check_shared, "expand"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, check = MUTANTS[mutant]
    plant(monkeypatch)
    with pytest.raises((AssertionError, UserWarning)):
        check()
