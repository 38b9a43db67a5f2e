"""Convolutions over one to three dimensions, plain and transposed, against explicit patches.

The 2-d geometries have more problems in `tests/test_exactness.py`.
"""

import copy
from collections.abc import Callable
from functools import partial
from itertools import product
from math import prod
from typing import Any

import oracles
import pytest
import torch
from mutants import replace
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import kfac.covariance.geometry
from kfac import KFAC
from kfac.layers.conv import ConvLayer, ConvTransposeLayer
from kfac.layers.linear import LinearLayer

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-9)

DAMPING = 0.3
PLAIN: dict[str, Any] = {
    "lr": 1.0, "momentum": 0.0, "kl_clip": None, "damping": DAMPING, "inverse": "eigen",
    "fisher": "type-2", "factor_update_period": 1, "inverse_update_period": 1,
}  # fmt: skip

KINDS = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
MODES = ["circular", "reflect", "replicate"]
CONVOLUTIONS: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    f"{dims}d {name}": (KINDS[False][dims - 1], {"kernel_size": 3} | geometry)
    for dims, geometries in {
        1: {
            "plain": {},
            "without bias": {"bias": False},
            "1 pixel": {"kernel_size": 1},
            "padding": {"padding": 1},
            "stride": {"stride": 2},
            "stride, padding": {"stride": 3, "padding": 2},
            "stride above the kernel": {"kernel_size": 1, "stride": 2},
            "dilation": {"dilation": 2},
            "dilation, stride, padding": {"dilation": 2, "stride": 2, "padding": 1},
            "valid": {"padding": "valid"},
            "same, odd kernel": {"padding": "same"},
            "same, even kernel": {"kernel_size": 4, "padding": "same"},
            "same, dilation": {"kernel_size": 2, "dilation": 3, "padding": "same"},
            "groups": {"groups": 2, "padding": 1},
            "groups without bias": {"groups": 2, "bias": False},
            "depthwise": {"groups": 4},
        }
        | {f"{mode}, stride": {"padding_mode": mode, "padding": 2, "stride": 2} for mode in MODES}
        | {
            f"{mode}, same, even kernel": {
                "padding_mode": mode, "padding": "same", "kernel_size": 4, "groups": 2
            }
            for mode in MODES
        },
        2: {
            "plain": {"kernel_size": (2, 3), "padding": (1, 0)},
            "groups": {"kernel_size": 2, "groups": 2, "stride": (1, 2), "dilation": (2, 1)},
        },
        3: {
            "plain": {"kernel_size": (1, 2, 3)},
            "without bias": {"kernel_size": 2, "bias": False},
            "padding, stride": {"kernel_size": 2, "padding": (1, 0, 2), "stride": (2, 1, 3)},
            "dilation": {"kernel_size": (2, 1, 2), "dilation": (1, 3, 2)},
            "same, odd and even kernel": {"kernel_size": (2, 3, 4), "padding": "same"},
            "same, dilation": {"kernel_size": 2, "dilation": (1, 1, 3), "padding": "same"},
            "groups": {"kernel_size": 2, "groups": 2, "padding": 1, "stride": 2},
            "depthwise": {"kernel_size": 2, "groups": 4},
        }
        | {
            mode: {"padding_mode": mode, "padding": (1, 0, 2), "kernel_size": 2, "stride": 2}
            for mode in MODES
        }
        | {
            f"{mode}, same": {"padding_mode": mode, "padding": "same", "kernel_size": (2, 1, 3)}
            for mode in MODES
        },
    }.items()
    for name, geometry in geometries.items()
}  # fmt: skip

TRANSPOSED: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    f"transposed {dims}d {name}": (
        KINDS[True][dims - 1],
        {"kernel_size": 3} | geometry,
    )
    for dims, geometries in {
        1: {
            "plain": {},
            "without bias": {"bias": False},
            "stride": {"stride": 2},
            "stride above the kernel": {"kernel_size": 2, "stride": 3},
            "padding": {"padding": 1},
            "cropping": {"kernel_size": 2, "padding": 2, "stride": 2},
            "output_padding": {"stride": 2, "output_padding": 1},
            "output_padding below the dilation": {"dilation": 3, "output_padding": 2},
            "dilation": {"dilation": 2},
            "groups": {"groups": 2, "stride": 2},
            "groups without bias": {"groups": 2, "bias": False},
            "depthwise": {"groups": 4},
            "everything": {
                "stride": 3, "padding": 2, "dilation": 2, "output_padding": 2, "groups": 2
            },
        },
        2: {
            "plain": {"kernel_size": (2, 3)},
            "stride": {"kernel_size": (2, 1), "stride": (2, 3), "padding": (1, 0)},
            "upsampling": {"kernel_size": 4, "stride": 2, "padding": 1},
            "everything": {
                "kernel_size": (3, 2), "stride": (2, 3), "padding": (1, 2), "dilation": (2, 1),
                "output_padding": (0, 2), "groups": 2, "bias": False,
            },
        },
        3: {
            "plain": {"kernel_size": (2, 1, 3)},
            "everything": {
                "kernel_size": (1, 2, 3), "stride": (2, 1, 2), "padding": (0, 1, 1),
                "dilation": (1, 2, 1), "output_padding": (1, 0, 0), "groups": 2,
            },
        },
    }.items()
    for name, geometry in geometries.items()
}  # fmt: skip

# Every combination of settings, different along every axis.
ODD, EVEN, SIZE = (3, 1, 3), (2, 4, 2), (7, 4, 5)
PADDINGS: dict[str, dict[str, Any]] = {
    "pixels": {"kernel_size": ODD, "padding": (2, 1, 1)},
    "valid": {"kernel_size": ODD, "padding": "valid"},
    "same, odd kernel": {"kernel_size": ODD, "padding": "same"},
    "same, even kernel": {"kernel_size": EVEN, "padding": "same"},
}
COMMON = [
    {"stride": stride, "dilation": dilation, "groups": groups, "bias": bias}
    for stride, dilation, groups, bias in product(
        [1, (2, 3, 1)], [1, (3, 1, 2)], [1, 2], [True, False]
    )
]


def spread(value: Any, dims: int) -> Any:
    return value[:dims] if isinstance(value, tuple) else value


def combinations(dims: int) -> dict[str, tuple[type[nn.Module], dict[str, Any]]]:
    plain = [
        (f"{padding}, {mode}", common, PADDINGS[padding] | {"padding_mode": mode})
        for padding, mode, common in product(PADDINGS, ["zeros", *MODES], COMMON)
        if common["stride"] == 1 or PADDINGS[padding]["padding"] != "same"
    ]
    transposed = [
        (f"output_padding {extra}", common, {"padding": (1, 0, 2), "output_padding": (extra, 0, 0)})
        for extra, common in product([0, 1], COMMON)
        if extra == 0 or (common["stride"], common["dilation"]) != (1, 1)
    ]
    return {
        ", ".join([kind.__name__, name, *(f"{k} {v}" for k, v in common.items())]): (
            kind,
            {k: spread(v, dims) for k, v in ({"kernel_size": ODD} | common | geometry).items()},
        )
        for kind, cases in [(KINDS[False][dims - 1], plain), (KINDS[True][dims - 1], transposed)]
        for name, common, geometry in cases
    }


COMBINATIONS = combinations(1) | combinations(2) | combinations(3)
LAYERS = CONVOLUTIONS | TRANSPOSED
SIZES = {False: [(7,), (5, 4), (5, 4, 3)], True: [(4,), (3, 2), (2, 3, 2)]}
CHANNELS = 4


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def build(
    name: str, *, pooled: bool, size: tuple[int, ...] | None = None
) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A net of the convolution and a linear layer, its inputs and its targets."""
    torch.manual_seed(0)
    kind, geometry = (LAYERS | COMBINATIONS)[name]
    outputs = 4 if geometry.get("groups", 1) > 1 else 3
    layer = kind(CHANNELS, outputs, **geometry)
    size = size or SIZES[layer.transposed][len(layer.kernel_size) - 1]
    inputs = torch.randn(5, CHANNELS, *size, dtype=torch.float64)
    features = outputs if pooled else layer.double()(inputs[:1]).numel()
    between = [Mean()] if pooled else [nn.Tanh(), nn.Flatten()]
    model = nn.Sequential(layer, *between, nn.Linear(features, 2)).double()
    return model, inputs, torch.randn(5, 2, dtype=torch.float64)


def step(model: nn.Module, inputs: Tensor, target: Tensor, **settings: Any) -> KFAC:
    criterion = nn.MSELoss()
    optimizer = KFAC(model, criterion=criterion, **PLAIN | settings)
    criterion(model(inputs), target).backward()
    optimizer.step()
    return optimizer


# References


def by_group(layer: Any, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`[M, groups, p]` of M stacked weights and biases; of both kinds the groups come first."""
    groups = getattr(layer, "groups", 1)
    parts = [part.reshape(len(part), groups, -1) for part in (weight, bias) if part is not None]
    return torch.cat(parts, dim=2)


def natural_step(model: nn.Module, name: str, inputs: Tensor, target: Tensor) -> Tensor:
    """−(F + λI)⁻¹ g `[groups, p]` with the generalised Gauss-Newton blocks of the groups."""
    layer, criterion = model.get_submodule(name), nn.MSELoss()
    values = {k: p.detach() for k, p in layer.named_parameters(prefix=name)}
    keys = f"{name}.weight", f"{name}.bias"
    output = functional_call(model, values, (inputs,))
    jacobian = jacrev(lambda v: functional_call(model, v, (inputs,)).flatten())(values)
    blocks = by_group(layer, *map(jacobian.get, keys))
    hessian = oracles.loss_hessian(output, target, criterion)
    fisher = torch.einsum("mgp,mk,kgq->gpq", blocks, hessian, blocks)
    slope = torch.autograd.functional.jacobian(lambda o: criterion(o, target), output.detach())
    gradient = torch.einsum("m,mgp->gp", slope.flatten(), blocks)
    return -oracles.solve(fisher, DAMPING, gradient)


@pytest.mark.parametrize("name", LAYERS)
def test_reference_patches_times_kernel_is_the_module(name: str) -> None:
    model, inputs, _ = build(name, pooled=True)
    layer, rows = model[0], oracles.input_rows(model[0], inputs, len(inputs))
    weight = oracles.to_blocks(layer, layer.weight, layer.bias)
    products = torch.einsum("ntgi,goi->ntgo", rows, weight)
    close(products, oracles.output_rows(layer, layer(inputs), len(inputs)))


# The optimizer


def check_natural_step(name: str, size: tuple[int, ...] | None = None) -> None:
    model, inputs, target = build(name, pooled=True, size=size)
    before = copy.deepcopy(model)
    step(model, inputs, target, weight_sharing="reduce")
    for layer in "0", "2":
        new, old = model.get_submodule(layer), before.get_submodule(layer)
        bias = None if old.bias is None else (new.bias - old.bias)[None]
        moved = by_group(old, (new.weight - old.weight)[None], bias)[0]
        close(moved, natural_step(before, layer, inputs, target))


@pytest.mark.parametrize("name", LAYERS)
def test_step_is_the_dense_natural_gradient(name: str) -> None:
    check_natural_step(name)


@pytest.mark.promise("`nn.ConvTranspose1d`, `nn.ConvTranspose2d`, `nn.ConvTranspose3d`")
@pytest.mark.promise("`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`")
@pytest.mark.parametrize("name", COMBINATIONS)
def test_step_is_the_dense_natural_gradient_for_every_combination(name: str) -> None:
    dims = len(COMBINATIONS[name][1]["kernel_size"])
    check_natural_step(name, SIZE[:dims] if "Transpose" not in name else (4, 3, 3)[:dims])


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", LAYERS)
def test_factors_are_those_of_explicit_patches(name: str, sharing: str) -> None:
    model, inputs, target = build(name, pooled=False)
    before = copy.deepcopy(model)
    a, g = step(model, inputs, target, weight_sharing=sharing).factor("0")
    layer, rest = before[0], before[1:]
    hidden = layer(inputs).detach()
    jacobian = jacrev(lambda h: rest(h).flatten())(hidden).flatten(3)
    seen = oracles.Layer(
        inputs=oracles.input_rows(layer, inputs, len(inputs)),
        jacobian=jacobian.mT.unflatten(-1, (layer.groups, -1)),
        gradient=hidden,  # of the empirical Fisher only
        hessian=oracles.loss_hessian(rest(hidden), target, nn.MSELoss()),
    )
    close(a, oracles.input_factor(seen, sharing))
    close(g, oracles.exact_output_factor(seen, sharing))


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class Columns(nn.Module):
    """`[N, T, C]` to `[N, C, *spatial]`."""

    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.mT.unflatten(2, self.size)


@pytest.mark.parametrize("fisher", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("kind", KINDS[False])
def test_a_convolution_of_one_pixel_is_a_linear_layer_on_sequences(
    kind: type[nn.Module], sharing: str, fisher: str
) -> None:
    torch.manual_seed(0)
    convolution = kind(CHANNELS, 3, 1)
    size = (2, 3, 1)[: len(convolution.kernel_size)]
    linear, head = nn.Linear(CHANNELS, 3), nn.Linear(3, 2)
    linear.weight.data, linear.bias.data = convolution.weight.data.flatten(1), convolution.bias.data
    models = [
        nn.Sequential(*between, nn.Tanh(), copy.deepcopy(head)).double()
        for between in ([linear], [Columns(size), convolution, nn.Flatten(2), Transposed()])
    ]
    inputs = torch.randn(5, prod(size), CHANNELS, dtype=torch.float64)
    target = torch.randn(5, prod(size), 2, dtype=torch.float64)
    for model in models:
        step(model, inputs, target, weight_sharing=sharing, fisher=fisher)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        close(one, other.reshape(one.shape))


SOME = ["1d dilation, stride, padding", "3d padding, stride", "transposed 1d everything"]
SOME += ["transposed 2d everything", "transposed 3d everything"]


@pytest.mark.parametrize("name", SOME)
def test_large_factors_keep_their_diagonal(name: str) -> None:
    full, diagonal = (
        step(*build(name, pooled=False), max_factor_dim=dim).factor("0") for dim in (1000, 1)
    )
    for whole, kept in zip(full, diagonal, strict=True):
        close(kept, whole.diagonal(dim1=1, dim2=2))


@pytest.mark.promise("`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`")
@pytest.mark.parametrize("name", SOME)
def test_an_unbatched_input_is_a_batch_of_one(name: str) -> None:
    kind, geometry = LAYERS[name]
    torch.manual_seed(0)
    batched = kind(CHANNELS, 4, **geometry).double()
    unbatched, before = copy.deepcopy(batched), batched.weight.detach().clone()
    inputs = torch.randn(1, CHANNELS, *[5] * len(batched.kernel_size), dtype=torch.float64)
    for model, x in (batched, inputs), (unbatched, inputs[0]):
        optimizer = KFAC(model, **PLAIN | {"fisher": "empirical", "loss_terms": 1})
        model(x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(before, batched.weight)
    close(list(unbatched.parameters()), list(batched.parameters()))


@pytest.mark.promise("subclasses of the above")
@pytest.mark.parametrize("kind", ConvLayer.module_types + ConvTransposeLayer.module_types)
def test_subclasses_that_compute_something_else_go_to_the_fallback(kind: type[nn.Module]) -> None:
    subclass = type("Subclass", (kind,), {"forward": lambda self, x: 2 * kind.forward(self, x)})
    rows = KFAC(nn.Sequential(kind(2, 2, 1), subclass(2, 2, 1)), lr=0.1).summary()
    assert [row.treatment for row in rows] == ["kfac", "kfac", "fallback", "fallback"]


# The size of the output given by the caller


class Sized(nn.Module):
    def __init__(self, size: list[int] | None, **geometry: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.ConvTranspose2d(2, 3, 3, stride=2, **geometry)
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.size).flatten(2).mean(2)


def sized_step(sharing: str, size: list[int] | None, **geometry: Any) -> Tensor:
    model = Sized(size, **geometry).double()
    step(
        model, torch.randn(4, 2, 3, 3).double(), torch.zeros(4, 3).double(), weight_sharing=sharing
    )
    return model.layer.weight


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_output_size_may_be_the_size_that_the_output_has(sharing: str) -> None:
    expected = sized_step(sharing, None, output_padding=(1, 0))
    close(sized_step(sharing, [8, 7], output_padding=(1, 0)), expected)


@pytest.mark.promise("`nn.ConvTranspose1d`, `nn.ConvTranspose2d`, `nn.ConvTranspose3d`")
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("size", [[7, 7], [8, 8]])
def test_another_output_size_is_refused(sharing: str, size: list[int]) -> None:
    with pytest.raises(
        RuntimeError, match=r"'layer' was called with an output_size .*=\(1, 0\) gives"
    ):
        sized_step(sharing, size, output_padding=(1, 0))


# Mutants


def geometry(key: str, value: Callable[[Any], Any]) -> Callable:
    def changed(original: Callable, layer: ConvLayer) -> dict[str, Any]:
        settings = original(layer)
        return settings | {key: value(settings[key])}

    return replace(ConvLayer, "geometry", changed)


def margins(change: Callable[[int, int], tuple[int, int]]) -> Callable:
    """Change the padding of the stretched input."""

    def changed(original: Callable, layer: ConvTransposeLayer) -> list[tuple[int, int]]:
        return [change(before, after) for before, after in original(layer)]

    def plant(patch: pytest.MonkeyPatch) -> None:
        replace(ConvTransposeLayer, "_margins", changed)(patch)
        patch.setattr(ConvTransposeLayer, "problem_of_call", lambda *call: None)

    return plant


def repeated(original: Callable, layer: ConvTransposeLayer, x: Tensor) -> Tensor:
    """Repeat pixels where zeros belong."""
    stretched = x
    for axis, step in enumerate(layer.module.stride, start=2):
        size = (stretched.shape[axis] - 1) * step + 1
        stretched = stretched.repeat_interleave(step, axis).narrow(axis, 0, size)
    module, stride = layer.module, layer.module.stride
    module.stride = (1,) * len(stride)
    result = original(layer, stretched)
    module.stride = stride
    return result


NATURAL = test_step_is_the_dense_natural_gradient
FACTORS = test_factors_are_those_of_explicit_patches

# name: (the mutant, the test that catches it, that test's arguments)
MUTANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Callable, tuple]] = {
    "1d: dilation ignored": (geometry("dilation", lambda d: 1), NATURAL, ("1d dilation",)),
    "1d: stride ignored": (geometry("stride", lambda s: 1), NATURAL, ("1d stride",)),
    "1d: padding ignored": (geometry("padding", lambda p: 0), NATURAL, ("1d padding",)),
    "3d: padding mode ignored": (
        geometry("padding_mode", lambda m: "zeros"), NATURAL, ("3d circular",)
    ),
    "3d: settings of the dimensions in reverse": (
        geometry("dilation", lambda d: d[::-1]), NATURAL, ("3d dilation",)
    ),
    "same: the odd pixel in front": (
        replace(
            kfac.covariance.geometry, "_margins",
            lambda original, *a: tuple(pair[::-1] for pair in original(*a)),
        ),
        NATURAL,
        ("1d same, even kernel",),
    ),
    "kernel not flipped": (
        replace(ConvTransposeLayer, "_kernel_dims", lambda original, self: ()),
        NATURAL,
        ("transposed 1d padding",),
    ),
    "kernel flipped in one dimension only": (
        replace(ConvTransposeLayer, "_kernel_dims", lambda original, self: original(self)[:1]),
        NATURAL,
        ("transposed 2d upsampling",),
    ),
    "channels of the kernel not exchanged": (
        replace(
            ConvTransposeLayer, "matrix",
            lambda original, self, weight, bias: original(
                self, weight.reshape(4, -1).T.reshape(weight.shape), bias
            ),
        ),
        NATURAL,
        ("transposed 1d plain",),
    ),
    "output_padding ignored": (
        margins(lambda before, after: (before, before)),
        NATURAL,
        ("transposed 1d output_padding",),
    ),
    "output_padding in front": (
        margins(lambda before, after: (after, before)),
        NATURAL,
        ("transposed 1d everything",),
    ),
    "padding of the transpose ignored": (
        margins(lambda before, after: (before + 1, after + 1)),
        NATURAL,
        ("transposed 1d padding",),
    ),
    "nothing cropped": (
        margins(lambda before, after: (max(before, 0), max(after, 0))),
        NATURAL,
        ("transposed 1d cropping",),
    ),
    "dilation of the transpose ignored": (
        replace(
            ConvTransposeLayer, "geometry", lambda original, self: original(self) | {"dilation": 1}
        ),
        NATURAL,
        ("transposed 1d dilation",),
    ),
    "pixels repeated where zeros belong": (
        replace(ConvTransposeLayer, "patched", repeated), NATURAL, ("transposed 1d stride",)
    ),
    "positions of a linear layer not counted": (
        replace(LinearLayer, "row_count", lambda original, self, x: len(x)),
        test_a_convolution_of_one_pixel_is_a_linear_layer_on_sequences,
        (nn.Conv1d, "expand", "type-2"),
    ),
    "positions of the input counted": (
        replace(ConvTransposeLayer, "positions", lambda original, self, spatial: prod(spatial)),
        FACTORS,
        ("transposed 1d stride", "expand"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, test, arguments = MUTANTS[name]
    test(*arguments)  # passes as it is
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        test(*arguments)
