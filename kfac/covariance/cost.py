"""Which way to compute the second moment of patches takes the least time: a model of each."""

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from typing import Literal, NamedTuple

from kfac.covariance.autocorrelation import CHUNK_BYTES
from kfac.covariance.axes import Axis, Part, axis_of
from kfac.covariance.geometry import Layout
from kfac.covariance.gram import row_bands
from kfac.covariance.unfold import chunk_bytes

Method = Literal["unfold", "weight gradient", "fourier"]
_MOST_PHASES = 16
_LEAST_CHANNELS = 8  # products of fewer take as long


class Work(NamedTuple):
    """What a method does, in units that do not depend on the machine."""

    products: float = 0.0
    """Multiply-adds in large matrix products."""
    transforms: float = 0.0
    """Multiply-adds in products with a small matrix of coefficients."""
    convolutions: float = 0.0
    """Multiply-adds in weight gradients of convolutions."""
    numbers: float = 0.0
    """Numbers read or written outside of these."""
    calls: float = 0.0
    """Operations that are started."""


class Rates(NamedTuple):
    """Seconds per unit of :class:`Work`, for 32-bit numbers."""

    products: float
    transforms: float
    convolutions: float
    numbers: float
    calls: float


RATES: Mapping[str, Rates] = {
    "cpu": Rates(8.4e-12, 1.7e-12, 1.1e-11, 5.7e-10, 9e-6),
    "cuda": Rates(5e-14, 1e-13, 1e-13, 4e-12, 1e-5),
}
"""Those of the CPU are fitted to ``tests/covariance/measurements.json`` (2 cores, AVX-512)."""


def choose(
    shape: Sequence[int], layout: Layout, axes: Sequence[Axis] | None, device: str, itemsize: int
) -> Method:
    """Name the method that the model expects to take the least time.

    Args:
        shape: ``[N, C, *spatial]``.
        layout: Geometry of the convolution.
        axes: As :func:`axes_of`.
        device: Type of the device; any other than ``"cuda"`` is taken for a CPU.
        itemsize: Bytes of a number.
    """
    seconds = {
        method: expected_seconds(method, shape, layout, axes, device, itemsize)
        for method in methods(shape, layout, axes, itemsize)
    }
    return min(seconds, key=lambda method: seconds[method])


def methods(
    shape: Sequence[int], layout: Layout, axes: Sequence[Axis] | None, itemsize: int
) -> tuple[Method, ...]:
    """List what is worth a comparison; arguments as of :func:`choose`.

    Patches that do not overlap are a mere view of the input, and libraries unfold the input of a
    convolution in float64.
    """
    overlapping = any(k > s for k, s in zip(layout.kernel, layout.stride, strict=True))
    if axes is None or not shape[0] or (not overlapping and not any(map(any, layout.margins))):
        return ("unfold",)
    return ("unfold", "fourier") if itemsize > 4 else ("unfold", "weight gradient", "fourier")


def axes_of(spatial: Sequence[int], layout: Layout) -> list[Axis] | None:
    """Describe the dimensions of an input of this size, zero outside.

    Returns:
        None where a dimension is both strided and dilated, or the strides multiply to more than 16.
    """
    axes = [
        axis_of(*numbers)
        for numbers in zip(
            spatial,
            *layout[:3],
            [before for before, _ in layout.margins],
            layout.output,
            strict=True,
        )
    ]
    if prod(layout.stride) > _MOST_PHASES:
        return None
    known = [axis for axis in axes if axis is not None]
    return known if len(known) == len(axes) else None


def expected_seconds(
    method: Method,
    shape: Sequence[int],
    layout: Layout,
    axes: Sequence[Axis] | None,
    device: str,
    itemsize: int,
) -> float:
    """Model the time of one method; that of its arithmetic and traffic grows with ``itemsize``."""
    work = work_of(method, shape, layout, axes, itemsize, device)
    rates = RATES["cuda" if device == "cuda" else "cpu"]
    *volumes, calls = (w * r for w, r in zip(work, rates, strict=True))
    return sum(volumes) * itemsize / 4 + calls


def work_of(
    method: Method,
    shape: Sequence[int],
    layout: Layout,
    axes: Sequence[Axis] | None,
    itemsize: int,
    device: str = "cpu",
) -> Work:
    """Count what a method does, see there for the formulas."""
    if method == "unfold" or axes is None:
        return _unfold(shape, layout, itemsize, device)
    total = _assembly(shape, layout, axes)
    for parts in product(Part, repeat=len(axes)):
        work = _autocorrelation(method, parts, shape, layout.groups, axes, itemsize)
        if any(p == Part.LAST and a.first == a.last for a, p in zip(axes, parts, strict=True)):
            work = work._replace(calls=0)  # it shares those of the first border
        total = _add(total, work)
    return total


def _unfold(shape: Sequence[int], layout: Layout, itemsize: int, device: str) -> Work:
    rows = shape[1] // layout.groups * prod(layout.kernel)
    patches = layout.groups * shape[0] * layout.positions
    bands = len(row_bands(rows))
    chunks = -(-patches * rows * itemsize // chunk_bytes(device))
    products = patches * rows * max(rows, 4 * _LEAST_CHANNELS) * (1 + 1 / bands) / 2
    numbers = 1.5 * patches * rows + layout.groups * rows**2
    return Work(products=products, numbers=numbers, calls=10 + chunks * (3 + bands))


def _assembly(shape: Sequence[int], layout: Layout, axes: Sequence[Axis]) -> Work:
    """Cutting the input into phases, joining the sums, writing the result."""
    square = shape[1] ** 2 / layout.groups
    sizes = [sum(axis.sums(part) for part in Part) * axis.phases**2 for axis in axes]
    numbers = 2 * square * (prod(sizes) + prod(layout.kernel) ** 2)
    if any(axis.phases > 1 for axis in axes):
        numbers += 2 * prod(shape)
    transforms = 0.0
    for dim in reversed(range(len(axes))):
        transforms += prod(sizes) * axes[dim].taps ** 2 * square
        sizes[dim] = axes[dim].taps ** 2
    return Work(transforms=transforms, numbers=numbers, calls=20 + 20 * len(axes))


def _autocorrelation(
    method: Method,
    parts: Sequence[Part],
    shape: Sequence[int],
    groups: int,
    axes: Sequence[Axis],
    itemsize: int,
) -> Work:
    """Correlate the input, or the lines of a border as its channels."""
    lines = prod(axis.border(part)[1] for axis, part in zip(axes, parts, strict=True) if part)
    inside = [axis for axis, part in zip(axes, parts, strict=True) if not part]
    channels = shape[1] // groups * prod(axis.phases for axis in axes) * lines
    if not lines:
        return Work()
    if not inside:
        return Work(products=shape[0] * groups * channels**2, calls=4)
    if method == "weight gradient":
        return _weight_gradient(shape[0], groups, channels, inside)
    return _fourier(shape[0], groups, channels, inside, itemsize)


def _weight_gradient(examples: int, groups: int, channels: int, axes: Sequence[Axis]) -> Work:
    shifts = (axes[0].reach + 1) * prod(axis.sums(Part.ALL) for axis in axes[1:])
    pixels = prod(axis.size for axis in axes) * examples * groups
    convolutions = pixels * channels * max(channels, 4 * _LEAST_CHANNELS) * shifts
    numbers = 3 * pixels * channels + 8 * shifts * groups * channels**2
    return Work(convolutions=convolutions, numbers=numbers, calls=25)


def _fourier(
    examples: int, groups: int, channels: int, axes: Sequence[Axis], itemsize: int
) -> Work:
    maps, square = examples * groups * channels, groups * channels**2
    lengths = [axis.size + axis.dilation * axis.reach for axis in axes]
    pixels = maps * prod(axis.size for axis in axes)
    transforms, frequencies, rest = 0.0, 0.5, float(pixels)
    for axis, length in zip(reversed(axes), reversed(lengths), strict=True):
        # Real numbers on the way in for the first dimension, complex ones for the others.
        transforms += frequencies * length * rest * (2 if frequencies < 1 else 4)
        frequencies = frequencies * length + (1 if frequencies < 1 else 0)
        rest /= axis.size
    shifts = prod(axis.sums(Part.ALL) for axis in axes)
    products = 2 * frequencies * maps * max(channels, _LEAST_CHANNELS)
    copies = 8 if groups > 1 and channels > 1 else 6
    numbers = pixels + copies * frequencies * maps + 4 * shifts * square
    chunks = (4 * frequencies * maps + frequencies * square) * itemsize / CHUNK_BYTES
    calls = 30 + (1 + chunks) * (10 + 10 * len(axes))
    return Work(products, transforms + shifts * frequencies * square, 0.0, numbers, calls)


def _add(one: Work, other: Work) -> Work:
    return Work(*(a + b for a, b in zip(one, other, strict=True)))
