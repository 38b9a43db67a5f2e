"""`channel_covariance` against a loop over examples and positions in float64."""

from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac.covariance import channel_covariance

SHAPES = [
    (5, 3),
    (4, 3, 7),
    (2, 3, 4, 5),
    (3, 2, 2, 3, 2),
    (2, 9, 2, 2),
    (1, 4, 3, 3),
    (1, 7, 2),
    (3, 1, 4),
    (4, 3, 1, 1),
    (0, 3, 4, 4),
]


def oracle(x: Tensor) -> Tensor:
    maps = x.double().numpy().reshape(*x.shape[:2], int(np.prod(x.shape[2:])))
    total = np.zeros((x.shape[1], x.shape[1]))
    for example in maps:
        for position in range(maps.shape[2]):
            total += np.outer(example[:, position], example[:, position])
    return torch.from_numpy(total)


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-13) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_loop(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    result = channel_covariance(x)
    assert result.dtype == torch.float64
    assert_close(result, oracle(x))


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 9, 2, 2)], ids=str)
def test_equals_weight_gradient_of_pointwise_convolution(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    convolution = nn.Conv2d(shape[1], shape[1], 1, bias=False, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(convolution(x), convolution.weight, x)
    assert_close(channel_covariance(x), gradient[:, :, 0, 0])


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=5),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_any_shape_and_memory_order(shape: list[int], shuffle: Random) -> None:
    order = list(range(len(shape)))
    shuffle.shuffle(order)
    inverse = [order.index(dim) for dim in range(len(shape))]
    x = random(*(shape[dim] for dim in order)).permute(inverse)
    result = channel_covariance(x)
    assert_close(result, oracle(x))
    assert torch.linalg.eigvalsh(result).min() >= -1e-12 * result.trace()


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.mT.contiguous().mT,
    "examples_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "strided": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
}


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 10, 3, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout: str, shape: tuple[int, ...]) -> None:
    x = LAYOUTS[layout](random(*shape))
    assert_close(channel_covariance(x), oracle(x))


class OperatorNames(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (4, 10, 3, 2)], ids=str)
def test_channels_last_is_not_copied(shape: tuple[int, ...]) -> None:
    x = random(*shape).contiguous(memory_format=torch.channels_last)
    with OperatorNames() as operators:
        channel_covariance(x)
    assert operators.names & {"mm", "bmm"}
    assert not operators.names & {"clone", "copy_", "_to_copy", "contiguous"}


@pytest.mark.parametrize("shape", [(64, 3, 64, 64), (16, 256, 8, 8)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_float32_accuracy(shape: tuple[int, ...], offset: float) -> None:
    x = random(*shape, dtype=torch.float32) + offset
    result = channel_covariance(x)
    assert result.dtype == torch.float32
    assert_close(result, channel_covariance(x.double()), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    x = (300 * random(8, 3, 16, 16)).to(dtype)
    result = channel_covariance(x)
    assert result.dtype == torch.float32
    assert_close(result, oracle(x), 1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 9, 2, 2)], ids=str)
def test_autocast_does_not_lower_precision(shape: tuple[int, ...]) -> None:
    x = random(*shape, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = channel_covariance(x)
    assert result.dtype == torch.float32
    assert_close(result, oracle(x), 1e-6)


def test_input_is_left_alone() -> None:
    x = random(2, 3, 4, 5)
    before = x.clone()
    channel_covariance(x)
    assert torch.equal(x, before)


ERRORS = [
    (torch.zeros(3), r"x=\.\.\.\) must be of shape \[N, C, \*spatial\], but got \[3\]\. Add"),
    (torch.zeros(2, 3, dtype=torch.int64), r"must be a floating-point tensor, but got torch.int64"),
    (torch.zeros(2, 3, dtype=torch.complex64), r"floating-point tensor, but got torch.complex64"),
]


@pytest.mark.parametrize(("x", "message"), ERRORS)
def test_errors(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=r"^channel_covariance\(.*" + message):
        channel_covariance(x)


MUTANTS = {
    "divided by examples": lambda x: channel_covariance(x) / len(x),
    "divided by positions": lambda x: channel_covariance(x) / x[0, 0].numel(),
    "centred": lambda x: channel_covariance(x - x.mean((0, 2, 3), keepdim=True)),
    "positions averaged first": lambda x: channel_covariance(x.mean((2, 3))) * x[0, 0].numel(),
    "last example dropped": lambda x: channel_covariance(x[:-1]),
    "examples and channels swapped": lambda x: channel_covariance(x.transpose(0, 1)),
    "accumulated in bfloat16": lambda x: channel_covariance(x).bfloat16().double(),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_oracle_catches(mutant: str) -> None:
    x = random(3, 3, 4, 5)
    assert_close(channel_covariance(x), oracle(x))
    with pytest.raises(AssertionError):
        assert_close(MUTANTS[mutant](x), oracle(x))


class Largest(TorchDispatchMode):
    """Numbers in the largest product or copy that is made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **kwargs or {})
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.clone):
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [((5, 3, 40), 5 * 3 * 3), ((9, 6, 5), 9 * 6 * 5)],
    ids=["a product per example", "a copy"],
)
def test_the_smaller_of_products_and_copy_is_made(shape: tuple[int, ...], numbers: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    with Largest() as made:
        channel_covariance(x)
    assert made.numbers == numbers
