"""Every method of `patch_covariance`, used whatever the cost model says, against built patches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from mutants import Replacement, replace
from test_patches import oracle, problems, random
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kfac.covariance import autocorrelation as kernels
from kfac.covariance import axes, correlated, patch_covariance, patches
from kfac.covariance.axes import Axis
from kfac.covariance.cost import Method, axes_of, choose, methods, work_of
from kfac.covariance.geometry import Layout, checked, layout_of
from kfac.covariance.patches import second_moment

METHODS: list[Method] = ["unfold", "weight gradient", "fourier"]
DIRECT: list[Method] = METHODS[1:]


def by(method: Method, x: Tensor, kernel: Any, **geometry: Any) -> Tensor:
    return second_moment(*checked("", x, kernel, **geometry), method)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


def assert_exact(method: Method, x: Tensor, kernel: Any, **geometry: Any) -> None:
    """Up to rounding of the sums over all pixels, from which those at the border are subtracted."""
    result = by(method, x, kernel, **geometry)
    expected = oracle(x, kernel, **geometry)
    scale = expected.norm() + x.square().sum()
    assert result.shape == expected.shape
    assert (result - expected).norm() <= 1e-12 * scale
    assert (result - result.mT).norm() <= 1e-14 * scale


@pytest.mark.parametrize("method", METHODS)
@given(problem=problems())
@settings(max_examples=150, deadline=None)
def test_any_geometry(method: Method, problem: Any) -> None:
    x, kernel, geometry = problem
    try:
        layout = layout_of("", tuple(x.shape[2:]), kernel, **geometry)
    except ValueError:
        assume(False)
    assume(method == "unfold" or axes_of(x.shape[2:], layout) is not None)
    assert_exact(method, x, kernel, **geometry)


CASES: dict[str, tuple[tuple[int, ...], Any, dict[str, Any]]] = {
    "3×3 same": ((3, 4, 6, 7), 3, {"padding": 1}),
    "3×3 valid": ((3, 4, 6, 7), 3, {}),
    "more padding than the kernel reaches": ((2, 2, 4, 5), 3, {"padding": 3}),
    "5×5": ((2, 2, 7, 8), 5, {"padding": 1}),
    "kernel as large as the input": ((2, 2, 4, 4), 4, {}),
    "kernel larger than the input": ((2, 2, 2, 3), 5, {"padding": 2}),
    "rectangular": ((2, 2, 7, 5), (1, 4), {"padding": (0, 2)}),
    "even": ((2, 2, 7, 5), 2, {"padding": 1}),
    "same padding at the end": ((2, 2, 7, 5), (4, 2), {"padding": "same"}),
    "stride": ((2, 2, 8, 8), 3, {"stride": 2, "padding": 1}),
    "stride that leaves pixels out": ((2, 2, 9, 10), 3, {"stride": 4}),
    "stride that leaves most pixels out": ((2, 2, 1, 11), 2, {"stride": 4, "padding": 2}),
    "stem": ((2, 3, 16, 17), 7, {"stride": 2, "padding": 3}),
    "overlapping patches of a transformer": ((2, 3, 17, 17), 7, {"stride": 4, "padding": 3}),
    "different strides": ((2, 2, 9, 8), 3, {"stride": (1, 3), "padding": (2, 1)}),
    "strides and dilations of different dimensions": (
        (2, 2, 9, 8), 3, {"stride": (1, 2), "dilation": (2, 1), "padding": 2},
    ),
    "dilation": ((2, 2, 9, 8), 3, {"dilation": 2, "padding": 2}),
    "dilation without padding": ((2, 2, 9, 8), 3, {"dilation": 3}),
    "depthwise": ((3, 4, 6, 7), 3, {"padding": 1, "groups": 4}),
    "groups": ((3, 6, 6, 7), 3, {"padding": 1, "groups": 3}),
    "strided groups": ((3, 6, 6, 7), 3, {"padding": 1, "groups": 2, "stride": 2}),
    "circular": ((3, 2, 6, 7), 3, {"padding": 2, "padding_mode": "circular"}),
    "reflect": ((3, 2, 6, 7), 3, {"padding": 2, "padding_mode": "reflect"}),
    "replicate": ((3, 2, 6, 7), 3, {"padding": 2, "padding_mode": "replicate"}),
    "one dimension": ((3, 2, 9), 4, {"padding": 1}),
    "three dimensions": ((2, 2, 4, 5, 3), (3, 2, 3), {"padding": 1}),
    "three strided dimensions": ((2, 1, 4, 5, 6), 3, {"padding": 1, "stride": 2}),
    "one example": ((1, 2, 6, 7), 3, {"padding": 1}),
    "no example": ((0, 2, 6, 7), 3, {"padding": 1}),
}  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_cases(case: str, method: Method) -> None:
    shape, kernel, geometry = CASES[case]
    assert_exact(method, random(*shape), kernel, **geometry)


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("method", DIRECT)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout: str, stride: int, method: Method) -> None:
    x = LAYOUTS[layout](random(3, 4, 5, 6))
    assert_exact(method, x, 3, padding=1, stride=stride)


@pytest.mark.parametrize("limit", [1, 3000, 20000])
@pytest.mark.parametrize("case", ["3×3 same", "stem", "groups", "three dimensions"])
def test_pieces_of_any_size_add_up(monkeypatch: pytest.MonkeyPatch, case: str, limit: int) -> None:
    monkeypatch.setattr(kernels, "CHUNK_BYTES", limit)
    monkeypatch.setattr(kernels, "_MOST_PIXELS", limit // 100)
    monkeypatch.setattr(correlated, "_CHUNK_BYTES", limit)
    shape, kernel, geometry = CASES[case]
    for method in DIRECT:
        assert_exact(method, random(*shape), kernel, **geometry)


@pytest.mark.parametrize("offset", [0.0, 10.0])
@pytest.mark.parametrize(("method", "tolerance"), [("weight gradient", 2e-5), ("fourier", 2e-6)])
def test_float32_accuracy(method: Method, tolerance: float, offset: float) -> None:
    x = random(64, 8, 40, 40, dtype=torch.float32) + offset
    result = by(method, x, 3, padding=1)
    assert result.dtype == torch.float32
    assert_close(result, by("unfold", x.double(), 3, padding=1), tolerance)


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that an operator makes."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("method", DIRECT)
@pytest.mark.parametrize("stride", [1, 2])
def test_patches_are_never_materialised(
    monkeypatch: pytest.MonkeyPatch, method: Method, stride: int
) -> None:
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 2**16)
    monkeypatch.setattr(correlated, "_CHUNK_BYTES", 2**16)
    x = random(32, 4, 40, 40)
    with LargestResult() as largest:
        by(method, x, 5, padding=2, stride=stride)
    assert largest.bytes <= 1.6 * x.untyped_storage().nbytes()


@pytest.mark.parametrize(("numbers", "times"), [(2**18, 4), (2**19 - 1, 2), (2**40, 1), (0, 2**23)])
def test_a_chunk_is_as_large_as_the_cache_likes_it(numbers: int, times: int) -> None:
    assert kernels.CHUNK_BYTES == 2**23
    assert kernels._chunk(numbers, torch.zeros((), dtype=torch.float64)) == times


@pytest.mark.parametrize(("least", "pieces"), [(0, 5), (3 * (4 * 6 + 4), 2), (10**6, 1)])
def test_a_large_result_is_updated_less_often(
    monkeypatch: pytest.MonkeyPatch, least: int, pieces: int
) -> None:
    # 3 examples of 2 channels: 5 frequencies of 8 shifts, 4 · 6 + 2² numbers each
    monkeypatch.setattr(kernels, "_chunk", lambda numbers, like: 1 if numbers == 28 else 100)
    x = random(3, 1, 2, 6)
    lines = kernels._transforms_of_lines(x, [8], least, kernels._Workspace(x))
    assert len(list(lines)) == pieces


def test_updates_of_a_result_read_as_many_numbers_as_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 6 shifts between 8 channels are 384 numbers; a frequency has 4 · 8 + 8² = 96 of 6 frequencies
    updates = []
    replace(
        kernels, "_hermitian_products", lambda original, *a: updates.append(a[0]) or original(*a)
    )(monkeypatch)
    monkeypatch.setattr(kernels, "_chunk", lambda numbers, like: 1 if numbers == 96 else 100)
    kernels.by_fourier(random(1, 1, 8, 6), [5], [1])
    assert [len(spectrum) for spectrum in updates] == [4, 2]


def test_a_workspace_gives_out_one_buffer_per_name_as_large_as_the_largest_so_far() -> None:
    space = kernels._Workspace(torch.zeros((), dtype=torch.float64))
    first, again, other = space.take("a", 2, 3), space.take("a", 5), space.take("b", 6)
    assert (first.shape, again.shape, first.dtype) == ((2, 3), (5,), torch.float64)
    assert first.data_ptr() == again.data_ptr() != other.data_ptr()
    larger = space.take("a", 7)
    assert larger.shape == (7,)
    assert space.take("a", 2).data_ptr() == larger.data_ptr()


LARGE = (128, 16, 32, 32)


def test_autocast_does_not_lower_precision() -> None:
    x = random(*LARGE, dtype=torch.float32)
    assert chosen(LARGE, 3, padding=1) in DIRECT
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = patch_covariance(x, 3, padding=1)
    assert_close(result, by("unfold", x.double(), 3, padding=1), 1e-6)


def test_half_precision_is_summed_in_float32() -> None:
    x = (300 * random(*LARGE)).bfloat16()
    result = patch_covariance(x, 3, padding=1)
    assert result.dtype == torch.float32
    assert_close(result, by("unfold", x.double(), 3, padding=1), 1e-6)


def test_gradients_reach_the_input() -> None:
    x = random(2, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patch_covariance(x, 3, padding=1, bias=True), x)
    large = random(*LARGE, dtype=torch.float32).requires_grad_()
    patch_covariance(large, 3, padding=1).sum().backward()
    assert large.grad is not None


@pytest.mark.parametrize("method", METHODS)
def test_gradients_do_not_depend_on_the_mode_of_the_first_call(method: Method) -> None:
    x = random(2, 2, 7, 11)
    with torch.inference_mode():
        first = by(method, x, 5, padding=2)
    assert not axes.selection(Axis(7, 1, 1, 2, 7, 5, 0), x.dtype, x.device).is_inference()
    assert torch.equal(first, by(method, x, 5, padding=2))
    x.requires_grad_()
    patch_covariance(x, 5, padding=2).sum().backward()


def test_modes_that_intercept_operations_leave_nothing_behind() -> None:
    with FakeTensorMode():
        by("fourier", torch.empty(2, 2, 5, 13, dtype=torch.float64), 3, padding=1)
    assert_exact("fourier", random(2, 2, 5, 13), 3, padding=1)


def test_constants_are_made_once() -> None:
    device = torch.device("cpu")
    axis = Axis(9, 1, 1, 1, 9, 3, 0)
    assert axes.selection(axis, torch.float64, device) is axes.selection(
        axis, torch.float64, device
    )


def chosen(shape: tuple[int, ...], kernel: Any, device: str = "cpu", **geometry: Any) -> Method:
    layout = layout_of("", shape[2:], kernel, **geometry)
    return choose(shape, layout, axes_of(shape[2:], layout), device, 4)


MEASUREMENTS = json.loads((Path(__file__).parent / "measurements.json").read_text())
ROWS = [
    pytest.param(table["kind"], row, id=f"{table['kind']} {row['shape']} {row['geometry']}")
    for table in MEASUREMENTS["tables"]
    for row in table["results"]
]


@pytest.mark.parametrize(("device", "row"), ROWS)
def test_model_picks_a_method_that_measured_well(device: str, row: dict[str, Any]) -> None:
    geometry = dict(row["geometry"])
    choice = chosen(tuple(row["shape"]), geometry.pop("kernel_size"), device, **geometry)
    assert row["milliseconds"][choice] <= 1.3 * min(row["milliseconds"].values())


def layout_and_axes(shape: tuple[int, ...], kernel: Any, **geometry: Any) -> tuple[Layout, Any]:
    layout = layout_of("", shape[2:], kernel, **geometry)
    return layout, axes_of(shape[2:], layout)


@pytest.mark.parametrize(
    ("shape", "kernel", "geometry"),
    [
        ((8, 3, 32, 32), 16, {"stride": 16}),
        ((8, 3, 32, 32), 1, {}),
        ((0, 3, 32, 32), 3, {}),
        ((8, 3, 32, 32), 3, {"stride": 2, "dilation": 2}),
        ((8, 3, 64, 64), 6, {"stride": 5}),
    ],
)
def test_some_geometries_leave_no_choice(
    shape: tuple[int, ...], kernel: Any, geometry: dict[str, Any]
) -> None:
    assert methods(shape, *layout_and_axes(shape, kernel, **geometry), 4) == ("unfold",)


@pytest.mark.parametrize("method", METHODS)
def test_work_grows_with_the_batch(method: Method) -> None:
    works = [
        work_of(method, (n, 64, 16, 16), *layout_and_axes((n, 64, 16, 16), 3, padding=1), 4)
        for n in (64, 128)
    ]
    assert works[0].products + works[0].convolutions > 0
    for small, large in zip(*works, strict=True):
        assert small <= large <= 2 * small


def no_border(original: Any, self: Axis) -> int:
    return 0


def transposed(original: Any, x: Tensor, *arguments: Any) -> Tensor:
    return original(x, *arguments).mT


def mirrored_without_transposing(original: Any, half: Tensor, start: int, rows: int) -> Tensor:
    kept = half.narrow(half.dim() // 2, start, rows)
    return torch.cat([kept[1:].flip(0), kept])


def mirrored_without_reversing(original: Any, half: Tensor, start: int, rows: int) -> Tensor:
    both, count = original(half, start, rows), len(half) - 1
    return torch.cat([both[:count].flip(0), both[count:]])


def phases_reversed(original: Any, x: Tensor, *arguments: Any) -> Tensor:
    return original(x, *arguments).flip(2)


def not_dilated(original: Any, x: Tensor, reach: Any, dilation: Any) -> Tensor:
    return original(x, reach, [1] * len(dilation))


def without_order_of_missed_pixels(original: Any, nearest: Tensor, pixels: Tensor) -> Tensor:
    steps = nearest[:, None] - pixels
    return (steps[:, None, :, None] == steps[None, :, None, :]).flatten(2)


def frequencies_counted_once(original: Any, lengths: Any, *arguments: Any) -> Tensor:
    weights = original(lengths, *arguments)
    frequencies = torch.arange(lengths[-1] // 2 + 1)
    alone = (frequencies == 0) | (2 * frequencies == lengths[-1])
    share = torch.where(alone, 1.0, 0.5).repeat_interleave(weights.shape[1] // len(alone))
    return weights * share


def without_antisymmetric_part(original: Any, *arguments: Any) -> Tensor:
    return sum(original(*arguments).chunk(2)).repeat(2, 1) / 2


def groups_side_by_side(original: Any, lines: Tensor, inside: int) -> Tensor:
    return original(lines, inside).flip(1)


MUTANTS: list[tuple[str, Any, str, Replacement, str, Method]] = [
    ("first border forgotten", Axis, "first", no_border, "3×3 same", "fourier"),
    ("last border forgotten", Axis, "last", no_border, "3×3 same", "fourier"),
    ("last border of a stride forgotten", Axis, "last", no_border, "stride", "fourier"),
    ("δ transposed", patches, "by_fourier", transposed, "3×3 same", "fourier"),
    ("δ of the vendor's kernel transposed", patches, "by_weight_gradient", transposed,
     "3×3 same", "weight gradient"),
    ("half mirrored without transposing", correlated, "_mirrored", mirrored_without_transposing,
     "3×3 same", "fourier"),
    ("half mirrored without reversing", correlated, "_mirrored", mirrored_without_reversing,
     "3×3 same", "fourier"),
    ("wrong phase", correlated, "_phases", phases_reversed, "stride", "fourier"),
    ("dilation ignored", patches, "by_fourier", not_dilated, "dilation", "fourier"),
    ("dilation ignored by the vendor's kernel", patches, "by_weight_gradient", not_dilated,
     "dilation", "weight gradient"),
    ("used border pixels subtracted", axes, "_missed", without_order_of_missed_pixels,
     "5×5", "fourier"),
    ("negative frequencies forgotten", kernels, "_weights_of_products", frequencies_counted_once,
     "3×3 same", "fourier"),
    ("imaginary part forgotten", kernels, "_weights_of_products", without_antisymmetric_part,
     "3×3 same", "fourier"),
    ("groups of a border swapped", correlated, "_flat", groups_side_by_side, "groups", "fourier"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("owner", "function", "mutant", "case", "method"),
    [pytest.param(*mutant[1:], id=mutant[0]) for mutant in MUTANTS],
)
def test_cases_catch(
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    function: str,
    mutant: Replacement,
    case: str,
    method: Method,
) -> None:
    test_cases(case, method)
    monkeypatch.setattr(correlated, "selection", axes.selection.__wrapped__)  # type: ignore[attr-defined]
    replace(owner, function, mutant)(monkeypatch)
    with pytest.raises(AssertionError):
        test_cases(case, method)
