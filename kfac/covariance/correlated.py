"""Second moments of patches from the autocorrelation of the input, less what the kernel misses."""

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac.covariance.autocorrelation import Autocorrelation
from kfac.covariance.axes import Axis, Part, selection

# The result is written in pieces of this size, whose intermediate results stay in the cache.
_CHUNK_BYTES = 8 * 2**20


def correlated_covariance(
    x: Tensor, axes: Sequence[Axis], groups: int, autocorrelation: Autocorrelation
) -> Tensor:
    """Sum the outer products of patches without making them.

    Formula: the block of ``A`` for the kernel elements ``i`` and ``k`` is
    ``Σ_p x[p + i] x[p + k]ᵀ`` over the output positions ``p``. Over all ``p`` this is the
    autocorrelation ``S[k − i]``. In each dimension the positions before the first and after the
    last output are subtracted, which only meet pixels near the border; in several dimensions the
    differences multiply out. Sums over pairs of border pixels in some of the dimensions are an
    autocorrelation over the other dimensions, of the border's lines taken as channels.

    Args:
        x: Input ``[N, C, *spatial]``, zero outside.
        axes: Its spatial dimensions.
        groups: Number of blocks of channels.
        autocorrelation: How to compute ``S``.

    Returns:
        ``[groups, d, d]``, as :func:`kfac.covariance.patch_covariance` without bias.

    Cost: one autocorrelation of ``x``, one of each of its borders, and writing ``A``; memory for
    these sums, ``(2·|kernel| − 1)·C²/groups`` numbers per dimension of 3 pixels, and 32 MiB.
    """
    halves = _halves(_phases(x, axes, groups), axes, autocorrelation)
    selections = [selection(axis, x.dtype, x.device) for axis in axes]
    kernel = [axis.taps for axis in axes]
    channels = x.shape[1] // groups
    result = x.new_empty(groups, channels, *kernel, channels, *kernel)
    rows = max(1, _CHUNK_BYTES // (prod(kernel) ** 2 * x.shape[1] * x.element_size()))
    for start in range(0, channels, rows):
        target = result[:, start : start + rows]
        _write(_sums(halves, axes, start, target.shape[1]), selections, target)
    return result.view(groups, channels * prod(kernel), -1)


def _phases(x: Tensor, axes: Sequence[Axis], groups: int) -> Tensor:
    """Cut every dimension into phases: ``[N, groups, *phases, C/groups, *size]``."""
    pixels = [axis.size * axis.phases for axis in axes]
    for dim, count in enumerate(pixels, start=2):
        x = x.narrow(dim, 0, min(x.shape[dim], count))
    missing = [count - size for count, size in zip(pixels, x.shape[2:], strict=True)]
    if any(missing):
        x = F.pad(x, [size for count in reversed(missing) for size in (0, count)])
    split = torch.unflatten(x, 1, (groups, -1))
    for dim, axis in enumerate(axes):
        split = torch.unflatten(split, 3 + 2 * dim, (axis.size, axis.phases))
    last = 3 + 2 * len(axes)
    return split.permute(0, 1, *range(4, last, 2), 2, *range(3, last, 2))


def _halves(
    split: Tensor, axes: Sequence[Axis], autocorrelation: Autocorrelation
) -> dict[tuple[Part, ...], Tensor]:
    """Correlate all pixels, and each border of each dimension. Borders of equal shape share a call.

    Returns:
        ``[|δ ≥ 0|, groups, *channels, *channels]`` per choice of a part for each dimension, with
        ``channels`` the border's lines, the phases and the channels.
    """
    alike: dict[tuple[tuple[tuple[int, int], ...], torch.Size], list[tuple[Part, ...]]] = {}
    lines = {parts: _lines(parts, split, axes) for parts in product(Part, repeat=len(axes))}
    for parts, maps in lines.items():
        inside = [axis for axis, part in zip(axes, parts, strict=True) if part == Part.ALL]
        steps = tuple((axis.reach, axis.dilation) for axis in inside)
        if maps.numel():
            alike.setdefault((steps, maps.shape[2:]), []).append(parts)
    halves = {}
    for (steps, _), choices in alike.items():
        flat = [_flat(lines[parts], len(steps)) for parts in choices]
        maps = torch.cat(flat, 1) if len(flat) > 1 else flat[0]
        shifts = [[step[i] for step in steps] for i in range(2)]
        half = autocorrelation(maps, *shifts)
        for parts, part in zip(choices, torch.split(half, split.shape[1], 1), strict=True):
            channels = lines[parts].shape[2 : lines[parts].dim() - len(steps)]
            halves[parts] = part.view(*part.shape[:2], *channels, *channels)
    return halves


def _lines(parts: Sequence[Part], split: Tensor, axes: Sequence[Axis]) -> Tensor:
    """View a part of each dimension as ``[N, groups, *lines, *phases, C, *inside]``."""
    first = 3 + len(axes)
    for dim, (axis, part) in enumerate(zip(axes, parts, strict=True), start=first):
        split = split.narrow(dim, *axis.border(part))
    inside = [dim for dim, part in enumerate(parts, start=first) if part == Part.ALL]
    border = [dim for dim, part in enumerate(parts, start=first) if part != Part.ALL]
    return split.permute(0, 1, *border, *range(2, first), *inside)


def _flat(lines: Tensor, inside: int) -> Tensor:
    """Join lines, phases and channels."""
    return lines.flatten(2, lines.dim() - inside - 1)


def _sums(
    halves: Mapping[tuple[Part, ...], Tensor], axes: Sequence[Axis], start: int, rows: int
) -> Tensor:
    """Collect all sums for some channels on the left.

    Returns:
        ``[*((2·reach + 1 + first² + last²)·phases²), groups, rows, C]``.
    """
    widths = [[axis.sums(part) for part in Part] for axis in axes]
    some = next(iter(halves.values()))
    phases = [axis.phases for axis in axes]
    shape = (some.shape[1], *phases, rows, *phases, some.shape[-1])
    sums = some.new_empty(*map(sum, widths), *shape)
    for parts, half in halves.items():
        target = sums
        for dim, (width, part) in enumerate(zip(widths, parts, strict=True)):
            target = target.narrow(dim, sum(width[:part]), width[part])
        target.copy_(_by_dimension(_mirrored(half, start, rows), parts, axes))
    return _with_phases(sums, len(axes))


def _mirrored(half: Tensor, start: int, rows: int) -> Tensor:
    """Add the negative shifts, in front: ``S[−δ] = S[δ]ᵀ``. Some channels on the left only."""
    middle, last = half.dim() // 2, half.dim() - 1
    swapped = (0, 1, *range(middle + 1, last + 1), *range(2, middle + 1))
    negative = half[1:].narrow(last, start, rows).flip(0).permute(swapped)
    return torch.cat([negative, half.narrow(middle, start, rows)])


def _by_dimension(sums: Tensor, parts: Sequence[Part], axes: Sequence[Axis]) -> Tensor:
    """Order ``[shifts, groups, *lines, *phases, C, *lines, *phases, C]`` by spatial dimension.

    Returns:
        ``[*(shifts | lines²), groups, *phases, C, *phases, C]``.
    """
    inside = [axis for axis, part in zip(axes, parts, strict=True) if part == Part.ALL]
    lines = len(axes) - len(inside)
    right = (sums.dim() - 2) // 2
    sums = sums.view(*(axis.sums(Part.ALL) for axis in inside), *sums.shape[1:])
    group = len(inside)
    shifts, pairs = iter(range(group)), iter(range(lines))
    front: list[int] = []
    for part in parts:
        place = group + 1 + next(pairs) if part != Part.ALL else next(shifts)
        front += [place] if part == Part.ALL else [place, place + right]
    left = range(group + 1 + lines, group + 1 + right)
    sums = sums.permute(*front, group, *left, *(place + right for place in left))
    for dim, part in enumerate(parts):
        sums = sums if part == Part.ALL else sums.flatten(dim, dim + 1)
    return sums


def _with_phases(sums: Tensor, count: int) -> Tensor:
    """Join the sums of each dimension with the pairs of its phases."""
    strides = (0, count + 1, 2 * count + 2)
    front = [dim + stride for dim in range(count) for stride in strides]
    sums = sums.permute(*front, count, 2 * count + 1, 3 * count + 2)
    for dim in range(count):
        sums = sums.flatten(dim, dim + 2)
    return sums


def _write(sums: Tensor, selections: Sequence[Tensor], target: Tensor) -> None:
    """Select the sums of all pairs of kernel elements, and bring them into the weight's order.

    Args:
        sums: As of :func:`_sums`.
        selections: Of each dimension, ``[taps², sums·phases²]``.
        target: ``[groups, rows, *kernel, C, *kernel]``.
    """
    count = len(selections)
    blocks = sums.contiguous()
    for dim in reversed(range(count)):
        columns = blocks.view(prod(blocks.shape[:dim]), blocks.shape[dim], -1)
        pairs = selections[dim].expand(len(columns), -1, -1) @ columns
        blocks = pairs.view(*blocks.shape[:dim], -1, *blocks.shape[dim + 1 :])
    for dim in reversed(range(count)):
        blocks = torch.unflatten(blocks, dim, (target.shape[2 + dim], -1))
    # One copy for each element on the left keeps those on the right in one contiguous dimension.
    for left in product(*(range(taps) for taps in target.shape[2 : 2 + count])):
        block, to = blocks, target
        for dim, i in enumerate(left):
            block, to = block.select(dim, i), to.select(2, i)
        to.flatten(3).copy_(block.flatten(0, count - 1).permute(1, 2, 3, 0))
