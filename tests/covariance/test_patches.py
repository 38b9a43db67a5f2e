"""Patch moments against patches built pixel by pixel, and against torch's own convolution."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac.covariance import (
    extract_patches,
    patch_count,
    patch_covariance,
    patch_mean,
    patch_second_moment_diagonal,
    unfold,
)
from kfac.covariance.geometry import windows_of

DEFAULTS: dict[str, Any] = {
    "stride": 1, "padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros",
}  # fmt: skip


def at(axis: int, value: int | tuple[int, ...]) -> int:
    return value if isinstance(value, int) else value[axis]


def margins(padding: Any, kernel: int, dilation: int, axis: int) -> tuple[int, int]:
    if padding == "valid":
        return 0, 0
    if padding == "same":
        total = dilation * (kernel - 1)
        return total // 2, total - total // 2
    return at(axis, padding), at(axis, padding)


def source(index: int, size: int, mode: str) -> int:
    """Say which pixel of a line the padded coordinate shows; ``size`` stands for a zero."""
    if mode == "zeros":
        return index if 0 <= index < size else size
    if mode == "circular":
        return index % size
    if mode == "replicate":
        return min(max(index, 0), size - 1)
    return size - 1 - abs(size - 1 - abs(index))


def lines(size: int, kernel: int, axis: int, geometry: dict[str, Any]) -> list[list[int]]:
    """List, for every output position along one axis, the pixels under the kernel."""
    stride, dilation = at(axis, geometry["stride"]), at(axis, geometry["dilation"])
    before, after = margins(geometry["padding"], kernel, dilation, axis)
    starts = range(-before, size + after - dilation * (kernel - 1), stride)
    mode = geometry["padding_mode"]
    return [[source(start + dilation * i, size, mode) for i in range(kernel)] for start in starts]


def oracle_patches(x: Tensor, kernel: Any, bias: bool = False, **geometry: Any) -> np.ndarray:
    """Build the patches ``[N, groups, T, d]``."""
    geometry = DEFAULTS | geometry
    pixels = np.pad(x.double().numpy(), [(0, 0)] * 2 + [(0, 1)] * (x.dim() - 2))
    axes = [lines(n, at(axis, kernel), axis, geometry) for axis, n in enumerate(x.shape[2:])]
    positions = [pixels[:, :, *np.ix_(*window)] for window in product(*axes)]
    result = np.stack(positions, axis=1)  # [N, T, C, *kernel]
    row = int(np.prod(result.shape[2:]))
    shape = (len(x), len(positions), geometry["groups"], row // geometry["groups"])
    result = result.reshape(shape).swapaxes(1, 2)
    return np.insert(result, result.shape[-1], 1.0, axis=-1) if bias else result


def oracle(x: Tensor, kernel: Any, **arguments: Any) -> Tensor:
    rows = oracle_patches(x, kernel, **arguments)
    total = np.zeros((rows.shape[1], rows.shape[-1], rows.shape[-1]))
    for example, group in np.ndindex(rows.shape[:2]):
        for row in rows[example, group]:
            total[group] += np.outer(row, row)
    return torch.from_numpy(total)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def assert_close(actual: Tensor, expected: Any, tolerance: float = 1e-13) -> None:
    expected = torch.as_tensor(expected)
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


def assert_moments(x: Tensor, kernel: Any, **geometry: Any) -> None:
    """Check every public function against the patches of the oracle."""
    rows = oracle_patches(x, kernel, **geometry)
    assert patch_count(x.shape[2:], kernel, **geometry) == rows.shape[2]
    assert_close(extract_patches(x, kernel, **geometry), rows.swapaxes(2, 3).copy())
    bordered = oracle(x, kernel, bias=True, **geometry)
    means = np.insert(rows.mean(2), rows.shape[-1], 1.0, axis=-1)
    for bias, size in [(False, rows.shape[-1]), (True, rows.shape[-1] + 1)]:
        expected = bordered[:, :size, :size]
        assert_close(patch_covariance(x, kernel, bias=bias, **geometry), expected)
        assert_close(patch_mean(x, kernel, bias=bias, **geometry), means[..., :size])
        diagonal = patch_second_moment_diagonal(x, kernel, bias=bias, **geometry)
        assert_close(diagonal, expected.diagonal(dim1=1, dim2=2))


GRID = [
    dict(zip(DEFAULTS, values, strict=True))
    for values in product(
        [1, 2, (3, 1)],
        [0, 1, (2, 1), "same", "valid"],
        [1, (1, 2)],
        [1, 2, 4],
        ["zeros", "circular", "reflect", "replicate"],
    )
    if values[0] == 1 or values[1] != "same"
    if values[1] not in (0, "valid") or values[4] == "zeros"
]


def name(value: object) -> str:
    return ",".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize("geometry", GRID, ids=name)
def test_grid(geometry: dict[str, Any]) -> None:
    assert_moments(random(2, 4, 5, 6), (3, 2), **geometry)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": "valid", "stride": 3, "groups": 2},
        {"padding": 2, "dilation": 2, "groups": 4},
    ],
    ids=name,
)
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((7,), 1), ((7,), 3), ((8,), (2,)), ((4, 3, 5), 1), ((3, 4, 5), 2), ((3, 5, 4), (1, 3, 2))],
    ids=name,
)
def test_one_and_three_dimensions(
    shape: tuple[int, ...], kernel: Any, geometry: dict[str, Any], mode: str
) -> None:
    if "padding" not in geometry and mode != "zeros":
        return
    assert_moments(random(2, 4, *shape), kernel, padding_mode=mode, **geometry)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, (1, 3), (4, 1)], ids=name)
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
def test_same_padding_of_odd_and_even_kernels(kernel: Any, mode: str) -> None:
    assert_moments(random(2, 2, 5, 6), kernel, padding="same", padding_mode=mode)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, tuple[int, ...], dict[str, Any]]:
    dims = draw(st.integers(1, 3))
    largest = 7 if dims < 3 else 4

    def each(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * dims))

    groups = draw(st.integers(1, 3))
    channels = groups * draw(st.integers(1, 2))
    geometry = {
        "stride": each(1, 3), "padding": each(0, largest // 2), "dilation": each(1, 3),
        "groups": groups,
        "padding_mode": draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"])),
    }  # fmt: skip
    x = random(draw(st.integers(0, 3)), channels, *each(1, largest))
    return x, each(1, largest // 2 + 1), geometry


@given(problems())
@settings(max_examples=200, deadline=None)
def test_any_geometry_that_torch_accepts(problem: Any) -> None:
    x, kernel, geometry = problem
    groups = geometry["groups"]
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[x.dim() - 3]
    convolution = kind(x.shape[1], 2 * groups, kernel, dtype=torch.float64, **geometry)
    try:
        output = convolution(x)
    except RuntimeError:
        with pytest.raises(ValueError, match="must be"):
            patch_covariance(x, kernel, **geometry)
        assume(False)
    assert_moments(x, kernel, **geometry)
    assert_is_torch_convolution(convolution, x, output)


def assert_is_torch_convolution(convolution: nn.Module, x: Tensor, output: Tensor) -> None:
    """The output is ``W a`` and the weight gradient ``Σ b aᵀ`` for the patches ``a``."""
    geometry = {key: getattr(convolution, key) for key in DEFAULTS}
    rows = extract_patches(x, convolution.kernel_size, **geometry)
    weight = convolution.weight.flatten(1).unflatten(0, (convolution.groups, -1))
    assert convolution.bias is not None
    products = (weight @ rows).flatten(1, 2) + convolution.bias[:, None]
    torch.testing.assert_close(products, output.flatten(2))
    (gradient,) = torch.autograd.grad(output, convolution.weight, output.detach())
    b = output.detach().flatten(2).unflatten(1, (convolution.groups, -1))
    expected = torch.einsum("ngot,ngdt->god", b, rows)
    torch.testing.assert_close(gradient, expected.reshape(gradient.shape))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 2)], ids=name)
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("dilation", [1, (2, 1)], ids=name)
def test_same_padding_is_that_of_torch(kernel: Any, mode: str, dilation: Any) -> None:
    convolution = nn.Conv2d(
        4, 6, kernel, padding="same", padding_mode=mode, dilation=dilation, groups=2,
        dtype=torch.float64,
    )  # fmt: skip
    x = random(2, 4, 5, 6)
    assert_is_torch_convolution(convolution, x, convolution(x))


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "strided": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout: str, groups: int, kernel: int) -> None:
    assert_moments(LAYOUTS[layout](random(3, 4, 5, 6)), kernel, groups=groups, stride=2)


@pytest.mark.parametrize("limit", [1, 3, 4, 7, 20, 10**6])
def test_pieces_hold_as_many_patches_as_they_may(limit: int) -> None:
    windows = windows_of("", torch.arange(3.0 * 5 * 6).view(3, 1, 5, 6), 2)  # 4 · 5 positions
    pieces = list(unfold._parts(windows.view(), (0, 2, 3), limit))
    counts = [len(piece) * piece.shape[2] * piece.shape[3] for piece in pieces]
    assert sum(counts) == 60
    assert max(counts) <= limit
    assert len(pieces) == {1: 60, 3: 24, 4: 24, 7: 12, 20: 3, 10**6: 1}[limit]


def test_pieces_are_sized_for_the_device() -> None:
    assert unfold.chunk_bytes("cpu") == unfold.chunk_bytes("mps") == 16 * 2**20
    assert unfold.chunk_bytes("cuda") == 128 * 2**20


@pytest.mark.parametrize("shape", [(30,), (5, 6), (4, 2, 3)], ids=name)
@pytest.mark.parametrize("limit", [1, 700, 3000, 10000])
def test_pieces_of_any_size_add_up(
    monkeypatch: pytest.MonkeyPatch, limit: int, shape: tuple[int, ...]
) -> None:
    monkeypatch.setitem(unfold.CHUNK_BYTES, "cpu", limit)
    geometry = {"padding": 1, "dilation": (2, *[1] * (len(shape) - 1))[::-1]}
    x = random(5, 2, *shape)
    expected = oracle(x, 3, **geometry)
    assert_close(unfold.unfolded_covariance(windows_of("", x, 3, **geometry)), expected)


class LargestClone(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **kwargs or {})
        if func.overloadpacket is torch.ops.aten.clone:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("shape", [(1024,), (32, 32), (2, 32, 32), (2, 1024, 1)], ids=name)
@pytest.mark.parametrize("limit", [2**16, 2**18])
def test_materialised_patches_stay_bounded(
    monkeypatch: pytest.MonkeyPatch, limit: int, shape: tuple[int, ...]
) -> None:
    monkeypatch.setitem(unfold.CHUNK_BYTES, "cpu", limit)
    with LargestClone() as largest:
        unfold.unfolded_covariance(windows_of("", random(4, 8, *shape), 3, padding=1))
    assert limit / 2 < largest.bytes <= limit


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_float32_accuracy(kernel: int, offset: float) -> None:
    x = random(32, 8, 24, 24, dtype=torch.float32) + offset
    result = patch_covariance(x, kernel, padding=kernel // 2, bias=True)
    assert result.dtype == torch.float32
    expected = patch_covariance(x.double(), kernel, padding=kernel // 2, bias=True)
    assert_close(result, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [1, 3])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype, kernel: int) -> None:
    x = (300 * random(4, 2, 8, 8)).to(dtype)
    options: dict[str, Any] = {"padding": 1, "padding_mode": "reflect"}
    rows = oracle_patches(x, kernel, **options)
    results = [
        (patch_covariance(x, kernel, **options), oracle(x, kernel, **options)),
        (patch_mean(x, kernel, **options), rows.mean(2)),
        (patch_second_moment_diagonal(x, kernel, **options), (rows**2).sum((0, 2))),
        (extract_patches(x, kernel, **options), rows.swapaxes(2, 3).copy()),
    ]
    for result, expected in results:
        assert result.dtype == torch.float32
        assert_close(result, expected, 1e-6)


@pytest.mark.parametrize("kernel", [1, 3])
def test_autocast_does_not_lower_precision(kernel: int) -> None:
    x = random(2, 3, 6, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = patch_covariance(x, kernel, bias=True)
    assert_close(result, oracle(x, kernel, bias=True), 1e-6)


X = torch.zeros(2, 4, 5, 6)
ERRORS: list[tuple[Tensor, dict[str, Any], str]] = [
    (X[0, 0], {}, r"x=\.\.\.\) must be of shape \[N, C, \*spatial\] .*, but got \[5, 6\]\. Add"),
    (X[:, :, None, None], {}, r"x=\.\.\.\) must be of shape .* with one to 3 spatial dimensions"),
    (X[0], {"kernel_size": (3, 3)}, r"kernel_size=\.\.\.\) must be .* 1 of them.* examples first"),
    (X[:, :, None], {"stride": (1, 1)}, r"stride=\.\.\.\) must be .* or 3 of them, but got"),
    (X[..., :0], {}, r"x=\.\.\.\) must be .* one channel and pixel, but got \[2, 4, 5, 0\]"),
    (X.int(), {}, r"x=\.\.\.\) must be a floating-point tensor, but got torch.int32"),
    (X, {"kernel_size": 0}, r"kernel_size=\.\.\.\) must be an integer of at least 1, .* got 0\. "),
    (X, {"kernel_size": (3, 3, 3)}, r"kernel_size=\.\.\.\) must be .* or 2 of them"),
    (X, {"kernel_size": 2.0}, r"kernel_size=\.\.\.\) must be an integer"),
    (X, {"kernel_size": 6}, r"kernel_size=\.\.\.\) must be .* fits into .* \(5, 6\), .*enlarge"),
    (X, {"dilation": 3}, r"kernel_size=\.\.\.\) must be .* It spans \(7, 7\)"),
    (X, {"stride": 0}, r"stride=\.\.\.\) must be an integer of at least 1"),
    (X, {"stride": (1, -1)}, r"stride=\.\.\.\) must be .*but got \(1, -1\)"),
    (X, {"dilation": 0}, r"dilation=\.\.\.\) must be an integer of at least 1"),
    (X, {"padding": -1}, r"padding=\.\.\.\) must be an integer of at least 0"),
    (X, {"padding": "full"}, r"padding=\.\.\.\) must be 'same', 'valid' or in pixels, .* 'full'"),
    (X, {"padding": "same", "stride": 2}, r"stride=\.\.\.\) must be 1 with padding='same'"),
    (X, {"groups": 3}, r"groups=\.\.\.\) must be a divisor of the 4 channels of x, but got 3\. "),
    (X, {"groups": 0}, r"groups=\.\.\.\) must be an integer of at least 1, but got 0"),
    (X, {"padding_mode": "wrap"}, r"padding_mode=\.\.\.\) must be one of \['zeros', .*'wrap'"),
    (X, {"padding": 5, "padding_mode": "reflect"}, r"padding=\.\.\.\) must be at most \(4, 5\)"),
    (X, {"padding": 6, "padding_mode": "circular"}, r"padding=\.\.\.\) must be at most \(5, 6\)"),
]  # fmt: skip


@pytest.mark.parametrize(
    "function", [patch_covariance, extract_patches, patch_mean, patch_second_moment_diagonal]
)
@pytest.mark.parametrize(("x", "arguments", "message"), ERRORS)
def test_errors(function: Any, x: Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{function.__name__}\({message}"):
        function(x, **{"kernel_size": 3, **arguments})


def test_errors_of_patch_count() -> None:
    for spatial in [(), (4, 5, 6, 7)]:
        with pytest.raises(
            ValueError, match=r"^patch_count\(spatial=\.\.\.\) must be one to 3 sizes"
        ):
            patch_count(spatial, 3)
    with pytest.raises(ValueError, match=r"^patch_count\(kernel_size=\.\.\.\) must be"):
        patch_count((2, 2), 3)


@pytest.mark.parametrize("argument", ["strides", "bias_"])
def test_misspelt_arguments_are_refused(argument: str) -> None:
    for function in (extract_patches, patch_mean, patch_second_moment_diagonal):
        with pytest.raises(TypeError, match=argument):
            function(X, 3, **{argument: 1})  # type: ignore[operator]


def averaged_over_groups(x: Tensor, kernel: Any, **geometry: Any) -> Tensor:
    blocks = patch_covariance(x, kernel, **geometry)
    return blocks.mean(0, keepdim=True).expand_as(blocks)


def padded_at_the_wrong_end(x: Tensor, kernel: Any, **geometry: Any) -> Tensor:
    flipped = patch_covariance(x.flip(2, 3), kernel, **geometry)
    blocks = flipped.unflatten(2, (-1, 3, 2)).unflatten(1, (-1, 3, 2))
    return blocks.flip(2, 3, 5, 6).flatten(4).flatten(1, 3)


def offset_major(x: Tensor, kernel: Any, **geometry: Any) -> Tensor:
    result = patch_covariance(x, kernel, **geometry)
    order = torch.arange(result.shape[-1]).reshape(-1, 6).T.flatten()
    return result[:, order][:, :, order]


def ignoring(argument: str) -> Any:
    return lambda x, k, **g: patch_covariance(x, k, **g | {argument: DEFAULTS[argument]})


MUTANTS: list[tuple[str, Any, dict[str, Any]]] = [
    ("stride ignored", ignoring("stride"), {"stride": 2}),
    ("padding ignored", ignoring("padding"), {"padding": 1}),
    ("dilation ignored", ignoring("dilation"), {"dilation": 2}),
    ("padding_mode ignored", ignoring("padding_mode"), {"padding": 1, "padding_mode": "circular"}),
    ("groups averaged", averaged_over_groups, {"groups": 2}),
    ("groups ignored", lambda x, k, **g: patch_covariance(x, k), {"groups": 2}),
    ("same padding at the wrong end", padded_at_the_wrong_end, {"padding": "same"}),
    ("offset-major order", offset_major, {}),
    ("kernel transposed", lambda x, k, **g: patch_covariance(x, k[::-1], **g), {}),
    ("1/T", lambda x, k, **g: patch_covariance(x, k) / patch_count(x.shape[2:], k), {}),
    ("1/N", lambda x, k, **g: patch_covariance(x, k) / len(x), {}),
    ("constant first", lambda x, k, **g: patch_covariance(x, k, **g).roll((1, 1), (1, 2)),
     {"bias": True}),
    ("constant forgotten", lambda x, k, **g: patch_covariance(x, k), {"bias": True}),
    ("constant not summed over positions",
     lambda x, k, **g: border_divided(patch_covariance(x, k, **g), patch_count(x.shape[2:], k)),
     {"bias": True}),
    ("padding counted twice", lambda x, k, **g: patch_covariance(x, k, padding=2), {"padding": 1}),
    ("reduced", lambda x, k, **g: torch.einsum("ngi,ngj->gij", *[patch_mean(x, k, **g)] * 2), {}),
]  # fmt: skip


def border_divided(result: Tensor, count: int) -> Tensor:
    result[:, -1] /= count
    return result


def assert_caught(mutant: Any, **geometry: Any) -> None:
    x = random(3, 4, 5, 6)
    assert_close(patch_covariance(x, (3, 2), **geometry), oracle(x, (3, 2), **geometry))
    with pytest.raises(AssertionError):
        assert_close(mutant(x, (3, 2), **geometry), oracle(x, (3, 2), **geometry))


@pytest.mark.parametrize(("mutant", "geometry"), [pytest.param(m, g, id=n) for n, m, g in MUTANTS])
def test_oracle_catches(mutant: Any, geometry: dict[str, Any]) -> None:
    assert_caught(mutant, **geometry)
