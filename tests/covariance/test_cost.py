"""The cost model counts what the methods do; the counts here were made by hand."""

from math import ceil
from typing import Any

import pytest

from kfac.covariance import cost
from kfac.covariance.axes import Axis
from kfac.covariance.cost import (
    RATES,
    Method,
    Work,
    axes_of,
    choose,
    expected_seconds,
    methods,
    work_of,
)
from kfac.covariance.geometry import Layout, layout_of

MIB = 2**20
CHUNK = 8 * MIB  # of a spectrum


def problem(
    shape: tuple[int, ...], kernel: Any, **geometry: Any
) -> tuple[tuple[int, ...], Layout, list[Axis] | None]:
    layout = layout_of("", shape[2:], kernel, **geometry)
    return shape, layout, axes_of(shape[2:], layout)


def assert_equal(actual: Work, expected: Work) -> None:
    assert actual._asdict() == pytest.approx(expected._asdict(), rel=1e-12)


def plus(*works: Work) -> Work:
    return Work(*map(sum, zip(*works, strict=True)))


# Unfolding


def test_few_rows_take_as_long_as_32() -> None:
    # 8 examples, 5 × 4 positions, 2 groups: 320 patches of 27 rows, one band and one piece
    work = work_of("unfold", *problem((8, 6, 9, 7), 3, stride=2, padding=1, groups=2), 4)
    numbers = 1.5 * 320 * 27 + 2 * 27**2
    assert_equal(work, Work(products=320 * 27 * 32, numbers=numbers, calls=10 + 1 * (3 + 1)))


@pytest.mark.parametrize(
    ("device", "itemsize", "pieces"),
    [("cpu", 4, ceil(72 / 16)), ("cpu", 8, ceil(144 / 16)), ("cuda", 4, 1), ("mps", 4, 5)],
)
def test_many_rows_are_multiplied_in_bands(device: str, itemsize: int, pieces: int) -> None:
    # 64 · 256 patches of 128 · 9 rows: 72 MiB of 4-byte numbers; 8 bands of 144 rows each
    work = work_of("unfold", *problem((64, 128, 16, 16), 3, padding=1), itemsize, device)
    products = 64 * 256 * 1152**2 * (36 / 64)  # on and above the diagonal of 8 × 8 blocks
    numbers = 1.5 * 64 * 256 * 1152 + 1152**2
    assert_equal(work, Work(products=products, numbers=numbers, calls=10 + pieces * (3 + 8)))


def test_what_has_no_axes_is_unfolded() -> None:
    shape, layout, axes = problem((8, 4, 9, 9), 3, stride=2, dilation=2)
    assert axes is None
    unfolded = work_of("unfold", shape, layout, axes, 4)
    assert work_of("fourier", shape, layout, axes, 4) == unfolded


# The other methods: 3 × 3 of 8 examples with 4 channels of 6 × 7 pixels, same padding. Each
# dimension has offsets 0 to 2, so 5 shifts, and loses the products of one pixel at either end.

SAME = (8, 4, 6, 7), 3, {"padding": 1}
JOINED = Work(  # 7 sums per dimension, of which 9 pairs of kernel elements are made
    transforms=(7 * 7 * 9 + 7 * 9 * 9) * 16,
    numbers=2 * 16 * (7 * 7 + 9 * 9),
    calls=20 + 20 * 2,
)
CORNERS = Work(products=4 * 8 * 16, calls=4)  # 2 × 2 of them, in one call


def test_weight_gradients_are_counted() -> None:
    def convolution(pixels: int, shifts: int, calls: int) -> Work:
        # 4 channels take as long as 32
        work = 8 * pixels * 4 * 32 * shifts
        return Work(convolutions=work, numbers=3 * 8 * pixels * 4 + 8 * shifts * 16, calls=calls)

    inside = convolution(6 * 7, 3 * 5, 25)
    # Both borders of a dimension share a call.
    rows = plus(convolution(7, 3, 25), convolution(7, 3, 0))
    columns = plus(convolution(6, 3, 25), convolution(6, 3, 0))
    shape, kernel, geometry = SAME
    work = work_of("weight gradient", *problem(shape, kernel, **geometry), 4)
    assert_equal(work, plus(JOINED, inside, rows, columns, CORNERS))


@pytest.mark.parametrize("itemsize", [4, 8])
def test_fourier_transforms_are_counted(itemsize: int) -> None:
    def spectrum(
        pixels: int, transforms: float, frequencies: float, shifts: int, dims: int, shared: bool
    ) -> Work:
        maps, squares = 8 * 4, 4 * 4
        chunks = (4 * frequencies * maps + frequencies * squares) * itemsize / CHUNK
        return Work(
            products=2 * frequencies * maps * 8,  # 4 channels take as long as 8
            transforms=transforms + shifts * frequencies * squares,
            numbers=maps * pixels + 6 * frequencies * maps + 4 * shifts * squares,
            calls=0 if shared else 30 + (1 + chunks) * (10 + 10 * dims),
        )

    # Lengths are 6 + 2 and 7 + 2. Of the last dimension half of the frequencies are had from real
    # numbers, two products each; of the other one all from complex ones, four products each.
    lines = 0.5 * 9 * (8 * 4 * 6 * 7) * 2
    inside = spectrum(6 * 7, lines + 5.5 * 8 * (8 * 4 * 6) * 4, 5.5 * 8, 25, 2, shared=False)
    rows = [spectrum(7, 0.5 * 9 * (8 * 4 * 7) * 2, 5.5, 5, 1, shared=s) for s in (False, True)]
    columns = [spectrum(6, 0.5 * 8 * (8 * 4 * 6) * 2, 5.0, 5, 1, shared=s) for s in (False, True)]
    shape, kernel, geometry = SAME
    work = work_of("fourier", *problem(shape, kernel, **geometry), itemsize)
    assert_equal(work, plus(JOINED, inside, *rows, *columns, CORNERS))


# One dimension of 11 pixels with stride 2: 2 phases of 6 pixels. A kernel of 4 with one pixel of
# padding has offsets 0 to 2 and 5 outputs, and misses one pixel in front and two at the end.

STRIDED = (4, 6, 11), 4, {"stride": 2, "padding": 1, "groups": 3}
JOINED_STRIDED = Work(  # 5 shifts, 1 and 4 pairs of pixels, each between 2 × 2 phases
    transforms=40 * 16 * (3 * 4),
    numbers=2 * (3 * 4) * (40 + 16) + 2 * (4 * 6 * 11),
    calls=20 + 20,
)
ENDS = Work(products=4 * 3 * (4**2 + 8**2), calls=4 + 4)  # lines and phases are channels


def test_strided_groups_are_counted() -> None:
    shape, kernel, geometry = STRIDED
    pixels = 6 * 4 * 3
    by_gradient = Work(
        convolutions=pixels * 4 * 32 * 3, numbers=3 * pixels * 4 + 8 * 3 * 3 * 16, calls=25
    )
    work = work_of("weight gradient", *problem(shape, kernel, **geometry), 4)
    assert_equal(work, plus(JOINED_STRIDED, by_gradient, ENDS))
    maps, squares = 4 * 3 * 4, 3 * 16
    by_spectrum = Work(
        products=2 * 5 * maps * 8,
        transforms=0.5 * 8 * (maps * 6) * 2 + 5 * 5 * squares,
        numbers=maps * 6 + 8 * 5 * maps + 4 * 5 * squares,  # groups are copied once more
        calls=30 + (1 + 5 * (4 * maps + squares) * 4 / CHUNK) * 20,
    )
    work = work_of("fourier", *problem(shape, kernel, **geometry), 4)
    assert_equal(work, plus(JOINED_STRIDED, by_spectrum, ENDS))


def test_depthwise_spectra_are_copied_less() -> None:
    # One channel per group; padded by all that the kernel of 2 reaches, no border loses anything.
    shape, layout, axes = problem((4, 3, 5), 2, groups=3, padding=1)
    maps, squares, frequencies = 4 * 3, 3, 0.5 * 6 + 1
    expected = Work(
        products=2 * frequencies * maps * 8,
        transforms=0.5 * 6 * (maps * 5) * 2 + 3 * frequencies * squares + 3 * 4 * squares,
        numbers=maps * 5 + 6 * frequencies * maps + 4 * 3 * squares + 2 * squares * (3 + 4),
        calls=30 + (1 + frequencies * (4 * maps + squares) * 4 / CHUNK) * 20 + 20 + 20,
    )
    assert_equal(work_of("fourier", shape, layout, axes, 4), expected)


def test_borders_that_lose_nothing_take_nothing() -> None:
    # Padded by all that the kernel reaches; with dilation 2 the wave is 2 · 2 pixels longer.
    shape, layout, axes = problem((8, 32, 6), 3, padding=4, dilation=2)
    maps, squares, frequencies = 8 * 32, 32**2, 0.5 * 10 + 1
    expected = Work(
        products=2 * frequencies * maps * 32,
        transforms=0.5 * 10 * (maps * 6) * 2 + 5 * frequencies * squares + 5 * 9 * squares,
        numbers=maps * 6 + 6 * frequencies * maps + 4 * 5 * squares + 2 * squares * (5 + 9),
        calls=30 + (1 + frequencies * (4 * maps + squares) * 4 / CHUNK) * 20 + 20 + 20,
    )
    assert_equal(work_of("fourier", shape, layout, axes, 4), expected)


# From counts to a choice


@pytest.mark.parametrize(("device", "rates"), [("cpu", "cpu"), ("mps", "cpu"), ("cuda", "cuda")])
@pytest.mark.parametrize("method", ["unfold", "weight gradient", "fourier"])
def test_wide_numbers_take_longer_and_calls_do_not(method: Method, device: str, rates: str) -> None:
    shape, kernel, geometry = SAME
    work = work_of(method, *problem(shape, kernel, **geometry), 8, device)
    per = RATES[rates]
    seconds = work.products * per.products + work.transforms * per.transforms
    seconds += work.convolutions * per.convolutions + work.numbers * per.numbers
    expected = 2 * seconds + work.calls * per.calls
    actual = expected_seconds(method, *problem(shape, kernel, **geometry), device, 8)
    assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("fastest", ["unfold", "weight gradient", "fourier"])
def test_the_fastest_is_chosen(fastest: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"unfold": 2.0, "weight gradient": 3.0, "fourier": 4.0} | {fastest: 1.0}
    monkeypatch.setattr(cost, "expected_seconds", lambda method, *_: seconds[method])
    assert choose(*problem((8, 3, 32, 32), 3), "cpu", 4) == fastest


def test_rates_are_seconds() -> None:
    assert all(0 < rate < 1e-4 for rates in RATES.values() for rate in rates)


def test_strides_of_up_to_16_phases_are_correlated() -> None:
    assert axes_of((64, 64), layout_of("", (64, 64), 6, stride=4)) is not None
    assert axes_of((64, 64), layout_of("", (64, 64), 6, stride=(17, 1))) is None


@pytest.mark.parametrize(
    ("kernel", "geometry", "expected"),
    [
        (2, {"stride": 2}, ["unfold"]),
        (1, {"dilation": 3}, ["unfold"]),
        (2, {"stride": 2, "padding": 1}, ["unfold", "weight gradient", "fourier"]),
        (2, {"stride": 2, "padding": (1, 0)}, ["unfold", "weight gradient", "fourier"]),
        (3, {"stride": 2}, ["unfold", "weight gradient", "fourier"]),
        (2, {}, ["unfold", "weight gradient", "fourier"]),
    ],
)
def test_patches_that_overlap_or_leave_the_input_are_worth_a_comparison(
    kernel: int, geometry: dict[str, Any], expected: list[Method]
) -> None:
    assert methods(*problem((8, 3, 32, 32), kernel, **geometry), 4) == tuple(expected)


def test_libraries_unfold_for_weight_gradients_in_float64() -> None:
    assert methods(*problem((8, 3, 32, 32), 3), 8) == ("unfold", "fourier")
