"""Sums of products of a feature map with shifted copies of itself, by two exact methods."""

import math
from collections.abc import Callable, Iterator, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac.covariance.axes import constant

# Intermediate results are made in pieces of this size: allocators give larger buffers back, and the
# page faults of fresh ones cost more than larger matrix products gain.
CHUNK_BYTES = 8 * 2**20
# Vendors add up the terms of a weight gradient one after the other: so many lose few digits.
_MOST_PIXELS = 2**15

Autocorrelation = Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]


def by_weight_gradient(x: Tensor, reach: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Correlate ``x`` with itself by the weight gradient of a convolution of ``x`` with itself.

    Formula: ``S[δ] = Σₙ Σ_q x[n, q] x[n, q + dilation·δ]ᵀ``, ``x`` being zero outside: the gradient
    with respect to the weight of a convolution whose input is the padded ``x`` and whose output
    gradient is ``x``. Half of the δ suffice, ``S[−δ] = S[δ]ᵀ``.

    Args:
        x: ``[N, G, C, *spatial]`` with up to three spatial dimensions, none included.
        reach: Largest |δ| per spatial dimension.
        dilation: Distance in pixels that one unit of δ stands for, per spatial dimension.

    Returns:
        ``[|δ|, G, C, C]``: the second half of all δ in row-major order, from δ = 0 on.

    Cost: ``N·G·C²·|spatial|·|δ|`` multiply-adds, with half of the number of δ, and a padded copy.
    """
    groups, channels, *sizes = x.shape[1:]
    if not sizes:
        return _gram(x)
    widths = [reach[0] + 1, *(2 * r + 1 for r in reach[1:])]
    borders = [d * r for d, r in zip(dilation, reach, strict=True)]
    margins = [b for border in reversed(borders[1:]) for b in (border, border)] + [0, borders[0]]
    maps = x.flatten(1, 2)
    weight = x.new_empty(groups * channels, channels, *widths)
    ones, zeros = [1] * len(sizes), [0] * len(sizes)
    gradient: Tensor = torch.zeros_like(weight)
    for part in torch.split(maps, max(1, _MOST_PIXELS // prod(sizes))):
        gradient += torch.ops.aten.convolution_backward(
            part, F.pad(part, margins), weight, None, ones, zeros, list(dilation), False, zeros,
            groups, [False, True, False],
        )[1]  # fmt: skip
    shifts = torch.unflatten(gradient, 0, (groups, channels)).flatten(3).permute(3, 0, 1, 2)
    half = shifts[prod(widths[1:]) // 2 :].contiguous()
    half[0] = (half[0] + half[0].mT) / 2
    return half


def by_fourier(x: Tensor, reach: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Correlate ``x`` with itself by way of its spectrum.

    Formula: ``S[δ] = (1/L) Σ_f Re(conj(Z_f) Z_fᵀ e^{iθ_f δ})`` with ``Z_f`` the discrete Fourier
    transform of ``x`` padded to ``L = |spatial| + dilation·reach`` per dimension. With
    ``Z = R + iI`` the one real product ``W = Rᵀ(R − I) + Iᵀ(R + I)`` holds the real part of
    ``conj(Z) Zᵀ``, which is symmetric, and the imaginary one, which is antisymmetric. Transforms
    are products with matrices of cosines and sines that deliver the frequencies outermost: at these
    sizes they take less than a fast Fourier transform and a permutation.

    Args:
        x: As :func:`by_weight_gradient`, like the two that follow.
        reach: See there.
        dilation: See there.

    Returns:
        As :func:`by_weight_gradient`.

    Cost: ``N·G·C²·L`` multiply-adds whatever the number of δ, about ``2·N·G·C·L`` times the sum of
    the lengths for the transforms; memory of twice the result and 16 MiB.

    Source: Wiener–Khinchin theorem.
    """
    groups, channels, *sizes = x.shape[1:]
    if not sizes:
        return _gram(x)
    lengths = [n + d * r for n, d, r in zip(sizes, dilation, reach, strict=True)]
    offsets = prod(2 * r + 1 for r in reach) // 2 + 1
    total = x.new_empty(2 * offsets, groups * channels**2)
    space = _Workspace(x)
    kind = x.dtype, x.device
    weights = _weights_of_products(tuple(lengths), tuple(reach), tuple(dilation), *kind)
    turns = [_turns(m, n, *kind) for m, n in zip(lengths[:-1], sizes[:-1], strict=True)]
    done = 0
    for lines in _transforms_of_lines(x, lengths, total.numel() // 2, space):
        spectrum = _transform(lines, turns, space)
        products = _hermitian_products(spectrum.view(-1, 2, *x.shape[:3]), space)
        share = weights[:, done : done + len(products)]
        total.addmm_(share, products, beta=min(done, 1))
        done += len(products)
    ahead, back = total.view(2, offsets, groups, channels, channels).unbind()
    return ahead.add_(back.mT)


def _gram(x: Tensor) -> Tensor:
    columns = x.transpose(0, 1)
    return (columns.mT @ columns).unsqueeze(0)


def _transforms_of_lines(
    x: Tensor, lengths: Sequence[int], least: int, space: "_Workspace"
) -> Iterator[Tensor]:
    """Transform the last dimension, and split its non-negative frequencies.

    The products for all of them would fill too much memory, but a transform to a few frequencies
    at a time reads ``x`` again and again; and a large result should not be updated too often, hence
    ``least`` numbers at a time.

    Yields:
        Amplitudes ``[2·f, N·G·C·…]``: of each frequency the real and the imaginary one.
    """
    examples, groups, channels, *_, size = x.shape
    maps = examples * groups * channels
    lines = x.reshape(-1, size)
    outer = _chunk(2 * len(lines), x)
    numbers = prod(lengths[:-1]) * (4 * maps + groups * channels**2)
    inner = max(_chunk(numbers, x), least // numbers)
    waves = _waves(lengths[-1] // 2 + 1, size, lengths[-1], x.dtype, x.device)
    for some in torch.split(waves, outer):
        basis = some.flatten(0, 1)
        amplitudes = space.take("lines", len(basis), len(lines)).addmm_(basis, lines.T, beta=0)
        yield from torch.split(amplitudes, 2 * inner)


def _chunk(numbers: int, like: Tensor) -> int:
    """How many times so many numbers make a chunk."""
    return max(1, CHUNK_BYTES // max(1, numbers * like.element_size()))


def _transform(
    spectrum: Tensor, turns: Sequence[tuple[Tensor, Tensor]], space: "_Workspace"
) -> Tensor:
    """Transform all spatial dimensions but the last one.

    Returns:
        ``[F, 2, N·G·C]``: real and imaginary parts; of the ``F`` combinations of frequencies those
        of the last dimension are the outermost, then those of the one before it.
    """
    for dim, (of_real, of_imaginary) in reversed(list(enumerate(turns))):
        rows, size = of_real.shape
        columns = spectrum.shape[1] // size
        real, imaginary = spectrum.view(len(spectrum) // 2, 2, columns, size).mT.unbind(1)
        spectrum = space.take(f"dimension {dim}", len(real), rows, columns)
        spectrum.baddbmm_(of_real.expand(len(real), -1, -1), real, beta=0)
        spectrum.baddbmm_(of_imaginary.expand(len(real), -1, -1), imaginary)
        spectrum = spectrum.flatten(0, 1)
    return spectrum.view(-1, 2, spectrum.shape[-1])


@constant
def _waves(count: int, size: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Real and imaginary parts ``[count, 2, size]`` of the waves of a transform.

    Angles are reduced first: the cosines of large ones are inexact.
    """
    steps = torch.arange(max(count, size), device=device)
    turns = torch.outer(steps[:count], steps[:size]).remainder(length).double() / length
    angles = 2 * math.pi * turns
    return torch.stack([angles.cos(), -angles.sin()], 1).to(dtype)


@constant
def _turns(
    length: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weights ``[2·length, size]`` of real and of imaginary numbers in their transform."""
    waves = _waves(length, size, length, dtype, device)
    real, imaginary = waves.unbind(1)
    return waves.flatten(0, 1), torch.stack([-imaginary, real], 1).flatten(0, 1)


def _hermitian_products(spectrum: Tensor, space: "_Workspace") -> Tensor:
    """``W`` of :func:`by_fourier`, ``[F, G·C·C]``; uses the spectrum ``[F, 2, N, G, C]`` up."""
    if spectrum.shape[-1] == 1:
        return spectrum.square_().sum((1, 2)).flatten(1)
    real, imaginary = spectrum.unbind(1)
    turned = space.take("turned", *spectrum.shape)
    torch.sub(real, imaginary, out=turned[:, 0])
    torch.add(real, imaginary, out=turned[:, 1])
    left, right = (z.flatten(1, 2).transpose(1, 2) for z in (spectrum, turned))
    frequencies, groups, _, channels = left.shape
    products = space.take("products", frequencies * groups, channels, channels)
    products.baddbmm_(left.flatten(0, 1).mT, right.flatten(0, 1), beta=0)
    return products.view(frequencies, -1)


@constant
def _weights_of_products(
    lengths: tuple[int, ...],
    reach: tuple[int, ...],
    dilation: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Weights ``[2·|δ|, F]`` of ``W`` and of ``Wᵀ`` in ``S``, for the second half of all δ.

    The symmetric part of ``W`` counts with the cosine of θδ, the antisymmetric one with the sine:
    ``W`` with half their sum and ``Wᵀ`` with half their difference. Frequencies of the last
    dimension that are not their own negatives stand for both.
    """
    steps = torch.arange(2 * max(lengths), device=device, dtype=torch.float64)
    waves = torch.ones(1, 1, device=device, dtype=dtype.to_complex())
    for dim, (length, r, d) in enumerate(zip(lengths, reach, dilation, strict=True)):
        count = length if dim < len(lengths) - 1 else length // 2 + 1
        shifts = (steps[: 2 * r + 1] - r)[0 if dim else r :] * d
        phases = 2 * math.pi / length * torch.outer(shifts, steps[:count])
        wave = torch.polar(torch.ones_like(phases), phases).to(waves.dtype)
        waves = (waves[:, None, None] * wave[..., None]).flatten(2).flatten(0, 1)
    last = steps[: lengths[-1] // 2 + 1]
    alone = (last == 0) | (2 * last == lengths[-1])
    share = torch.where(alone, 0.5, 1.0).to(dtype) / prod(lengths)
    half = waves[prod(2 * r + 1 for r in reach[1:]) // 2 :]
    half = half * share.repeat_interleave(prod(lengths[:-1]))
    return torch.cat([half.real + half.imag, half.real - half.imag])


class _Workspace:
    """Buffers that all chunks share: the pages of fresh ones cost more than what they hold."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        size = prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = self._like.new_empty(size)
        return self._buffers[name][:size].view(shape)
