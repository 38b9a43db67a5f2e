"""Convolutions of any geometry, drawn at random, against patches that are written out.

Every combination of settings once, exact against dense matrices: `tests/layers/test_conv.py`.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import oracles
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mutants import replace
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

import kfac.covariance.geometry
from kfac import KFAC, Preconditioner
from kfac.layers.conv import ConvLayer, ConvTransposeLayer

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

close = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)

DAMPING = 0.3
PLAIN: dict[str, Any] = {
    "lr": 1.0, "momentum": 0.0, "kl_clip": None, "damping": DAMPING,
    "factor_update_period": 1, "inverse_update_period": 1,
}  # fmt: skip
SOLVES = {"eigen": oracles.solve_exact_damping, "cholesky": oracles.solve_factored_damping}
KINDS: dict[bool, tuple[type[_ConvNd], ...]] = {
    False: (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    True: (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}


@dataclass
class Case:
    """A convolution, the size of its inputs, and how its step is taken."""

    kind: type[_ConvNd]
    channels: tuple[int, int]
    arguments: dict[str, Any]
    size: tuple[int, ...]
    examples: int
    sharing: str
    fisher: str
    inverse: str


# Spans and paddings that keep three dimensions as cheap to write out as one.
LARGEST = {1: (4, 3, 3), 2: (3, 3, 2), 3: (2, 2, 1)}  # kernel, dilation, pixels to spare


def per_axis(draw: st.DrawFn, dims: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(dims))


def plain(draw: st.DrawFn, dims: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Arguments of a convolution, and a size of inputs that it takes."""
    most_kernel, most_dilation, spare = LARGEST[dims]
    kernel = per_axis(draw, dims, 1, most_kernel)
    dilation = per_axis(draw, dims, 1, most_dilation)
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
    padding = draw(st.sampled_from(["pixels", "same", "valid"]))
    stride = (1,) * dims if padding == "same" else per_axis(draw, dims, 1, 3)
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    pixels = per_axis(draw, dims, 0, 2) if padding == "pixels" else (0,) * dims
    outside = [span // 2 for span in spans] if padding == "same" else pixels
    # Torch refuses to repeat an image more than once, or to reflect at a pixel that is not there.
    least = {"circular": 0, "reflect": 1}
    size = tuple(
        max(1, span - 2 * before, before + least[mode] if mode in least else 1) + extra
        for span, before, extra in zip(spans, outside, per_axis(draw, dims, 0, spare), strict=True)
    )
    arguments = {
        "kernel_size": kernel, "stride": stride, "dilation": dilation, "padding_mode": mode,
        "padding": pixels if padding == "pixels" else padding,
    }  # fmt: skip
    return arguments, size


def transposed(draw: st.DrawFn, dims: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Arguments of a transposed convolution, and a size of inputs that it takes."""
    most_kernel, most_dilation, spare = LARGEST[dims]
    kernel = per_axis(draw, dims, 1, most_kernel)
    dilation = per_axis(draw, dims, 1, most_dilation)
    stride = per_axis(draw, dims, 1, 3 if dims < 3 else 2)
    padding = per_axis(draw, dims, 0, 2)
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )
    axes = zip(kernel, dilation, stride, padding, extra, strict=True)
    # The least size of which something is left after cropping.
    least = [
        next(n for n in range(1, 9) if (n - 1) * s + d * (k - 1) + 1 + e > 2 * p)
        for k, d, s, p, e in axes
    ]
    size = tuple(n + m for n, m in zip(least, per_axis(draw, dims, 0, spare), strict=True))
    arguments = {
        "kernel_size": kernel, "stride": stride, "dilation": dilation, "padding": padding,
        "output_padding": extra,
    }  # fmt: skip
    return arguments, size


@st.composite
def cases(draw: st.DrawFn, is_transposed: bool, dims: int) -> Case:
    arguments, size = (transposed if is_transposed else plain)(draw, dims)
    groups = draw(st.integers(1, 3))
    inputs, outputs = (groups * draw(st.integers(1, 2)) for _ in range(2))
    return Case(
        KINDS[is_transposed][dims - 1],
        (inputs, outputs),
        arguments | {"groups": groups, "bias": draw(st.booleans())},
        size,
        examples=draw(st.integers(1, 3)),
        sharing=draw(st.sampled_from(["expand", "reduce"])),
        fisher=draw(st.sampled_from(["type-2", "empirical"])),
        inverse=draw(st.sampled_from(list(SOLVES))),
    )


Problem = tuple[nn.Sequential, Tensor, Tensor, nn.Module]


def build(case: Case) -> Problem:
    """A net that mixes the convolution's positions, its inputs, targets and loss."""
    torch.manual_seed(0)
    layer = case.kind(*case.channels, **case.arguments).double()
    x = torch.randn(case.examples, case.channels[0], *case.size, dtype=torch.float64)
    head = nn.Linear(layer(x[:1]).numel(), 2)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), head).double()
    return model, x, torch.arange(case.examples) % 2, nn.CrossEntropyLoss()


def check(case: Case) -> None:
    """A, G and one step are those of patches that are written out."""
    model, x, target, criterion = build(case)
    before = copy.deepcopy(model)
    seen = oracles.observe(before, "0", x, target, criterion)
    a = oracles.input_factor(seen, case.sharing)
    g = (
        oracles.exact_output_factor(seen, case.sharing)
        if case.fisher == "type-2"
        else oracles.empirical_output_factor(seen, case.examples, case.sharing)
    )
    gradient = oracles.parameter_blocks(before, oracles.gradients(before, x, target, criterion))

    chosen = {"fisher": case.fisher, "inverse": case.inverse, "weight_sharing": case.sharing}
    optimizer = KFAC(model, criterion=criterion, **PLAIN | chosen)
    criterion(model(x), target).backward()
    optimizer.step()
    close(optimizer.factor("0"), (a, g))
    old, new = (oracles.to_blocks(m[0], m[0].weight.detach(), m[0].bias) for m in (before, model))
    close(new - old, -SOLVES[case.inverse](a, g, DAMPING, gradient["0"]))


def check_second_moments(case: Case) -> None:
    """EKFAC's eigenvalues are the diagonal of the exact Fisher block in its basis.

    Positions are expanded: the few mean patches of "reduce" leave most of the basis undetermined.
    """
    model, x, target, criterion = build(case)
    before = copy.deepcopy(model)
    preconditioner = Preconditioner(
        model, criterion=criterion, fisher="type-2", inverse="ekfac", damping=DAMPING,
        factor_decay=0.0, factor_update_period=1, inverse_update_period=1,
    )  # fmt: skip
    for _ in range(2):  # the first batch has no basis yet
        model.zero_grad()
        criterion(model(x), target).backward()
        preconditioner.step()
    q = oracles.kronecker(
        *(torch.linalg.eigh(factor).eigenvectors for factor in preconditioner.factor("0"))
    )
    fisher = oracles.ggn_blocks(before, "0", x, target, criterion)
    diagonal = (q.mT @ fisher @ q).diagonal(dim1=1, dim2=2)
    gradient = oracles.parameter_blocks(before, oracles.gradients(before, x, target, criterion))
    rotated = (q.mT @ gradient["0"].flatten(1)[..., None])[..., 0]
    expected = q @ (rotated / (diagonal + DAMPING))[..., None]
    found = oracles.to_blocks(
        model[0], model[0].weight.grad, None if model[0].bias is None else model[0].bias.grad
    )
    close(found, expected.view_as(found))


def look_for_a_counterexample(
    is_transposed: bool,
    dims: int,
    examples: int,
    check: Callable[[Case], None] = check,
    phases: Sequence[Phase] = tuple(Phase),
) -> None:
    @settings(
        max_examples=examples, deadline=None, derandomize=True, phases=phases,
        report_multiple_bugs=False,
    )  # fmt: skip
    @given(cases(is_transposed, dims))
    def search(case: Case) -> None:
        check(case)

    search()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_any_geometry(dims: int) -> None:
    look_for_a_counterexample(False, dims, examples=80)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions_of_any_geometry(dims: int) -> None:
    look_for_a_counterexample(True, dims, examples=40)


@pytest.mark.parametrize("is_transposed", KINDS)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_second_moments_of_any_geometry(dims: int, is_transposed: bool) -> None:
    look_for_a_counterexample(is_transposed, dims, 30, check_second_moments)


# Mutants


def without(owner: type, **settings: Any) -> Callable:
    """A layer whose patches know nothing of some settings."""
    return replace(owner, "geometry", lambda original, layer: original(layer) | settings)


def same_for_all_groups(original: Callable, layer: ConvLayer, x: Tensor) -> Tensor:
    moment = original(layer, x)
    return moment.mean(0, keepdim=True).expand_as(moment)


def centred(original: Callable, *arguments: Any) -> tuple[tuple[int, int], ...]:
    """As much padding in front as behind, of which one pixel too many."""
    return tuple((max(pair), max(pair)) for pair in original(*arguments))


# name: (the mutant, whether it is of transposed convolutions)
MUTANTS: dict[str, tuple[Callable, bool]] = {
    "padding_mode ignored": (without(ConvLayer, padding_mode="zeros"), False),
    "dilation ignored": (without(ConvLayer, dilation=1), False),
    "groups averaged": (replace(ConvLayer, "input_moment", same_for_all_groups), False),
    "same: padding of an even kernel centred": (
        replace(kfac.covariance.geometry, "_margins", centred), False
    ),
    "transposed: dilation ignored": (without(ConvTransposeLayer, dilation=1), True),
    "transposed: kernel not flipped": (
        replace(ConvTransposeLayer, "_kernel_dims", lambda original, self: ()), True
    ),
    "transposed: output_padding in front": (
        replace(
            ConvTransposeLayer, "_margins",
            lambda original, self: [pair[::-1] for pair in original(self)],
        ),
        True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, is_transposed = MUTANTS[name]
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        look_for_a_counterexample(is_transposed, 2, 40, phases=[Phase.generate])
