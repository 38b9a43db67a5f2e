"""Second moments of the patches that a convolution sees."""

from collections.abc import Iterator, Sequence
from math import prod
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac.covariance.channels import channel_covariance
from kfac.covariance.geometry import PaddingMode, PatchGeometry, Windows, layout_of, windows_of

# Patches are materialised in pieces of this size. Allocators reuse buffers below 32 MiB, and the
# page faults of fresh ones cost more than the larger matrix products gain.
_CHUNK_BYTES = 16 * 2**20


def patch_covariance(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    padding_mode: PaddingMode = "zeros",
    bias: bool = False,
) -> Tensor:
    """Sum the outer products of a convolution's input patches over examples and positions.

    Formula: ``A[g] = Σₙ Σₜ aₙₜ aₙₜᵀ``, neither centred nor normalised, where ``aₙₜ`` is the patch
    of group ``g`` under the kernel at output position ``t``, so that ``output = W a`` with
    ``W = weight.flatten(1)``.

    Args:
        x: Input ``[N, C, *spatial]`` of the convolution, one to three spatial dimensions.
        kernel_size: Size of the kernel in pixels, per spatial dimension.
        stride: As in :class:`PatchGeometry`, like the four that follow.
        padding: See there.
        dilation: See there.
        groups: See there.
        padding_mode: See there.
        bias: Append the constant 1 to every patch, as its last element.

    Returns:
        ``[groups, d, d]`` with ``d = C/groups·|kernel| (+ 1)`` for a kernel of ``|kernel|`` pixels,
        in the order of ``weight.flatten(1)``; float32, or float64 for a float64 input; symmetric up
        to rounding.

    Raises:
        ValueError: An argument is out of range, or the kernel does not fit into the padded input.

    Cost: ``groups·N·T·d²`` multiply-adds for ``T`` output positions. Extra memory of the padded
    input and 16 MiB of patches, or a single patch that takes more.

    Source: Grosse & Martens 2016, "A Kronecker-factored approximate Fisher matrix for convolution
    layers", section 3; there ``A`` is averaged over examples, here the caller divides.
    """
    windows = windows_of(
        "patch_covariance", x, kernel_size, stride=stride, padding=padding, dilation=dilation,
        groups=groups, padding_mode=padding_mode,
    )  # fmt: skip
    if groups == prod(windows.layout.kernel) == 1:
        second = channel_covariance(windows.view()).unsqueeze(0)
    else:
        second = _sum_of_products(windows)
    if not bias:
        return second
    bordered = F.pad(second, (0, 1, 0, 1), value=float(windows.patches))
    bordered[:, -1, :-1] = bordered[:, :-1, -1] = windows.sum().sum(0)
    return bordered


def extract_patches(
    x: Tensor, kernel_size: int | Sequence[int], **geometry: Unpack[PatchGeometry]
) -> Tensor:
    """Collect the patches themselves, as columns.

    Formula: ``(weight.unflatten(0, (groups, -1)).flatten(2) @ patches).flatten(1, 2)`` is the
    convolution's output without bias, its positions flattened.

    Args:
        x: Input ``[N, C, *spatial]`` of the convolution, one to three spatial dimensions.
        kernel_size: Size of the kernel in pixels, per spatial dimension.
        **geometry: See :class:`PatchGeometry`.

    Returns:
        ``[N, groups, d, T]``, ``d = C/groups·|kernel|``, dtype as in :func:`patch_covariance`.

    Raises:
        ValueError: As :func:`patch_covariance`.

    Cost: a copy of ``x`` times the size of the kernel, divided by the stride in each direction.
    """
    windows = windows_of("extract_patches", x, kernel_size, **geometry)
    output, kernel = _dims(windows)
    patches = windows.view().permute(0, 1, *kernel, *output)
    return patches.reshape(len(x), windows.layout.groups, windows.rows, windows.layout.positions)


def patch_count(
    spatial: Sequence[int], kernel_size: int | Sequence[int], **geometry: Unpack[PatchGeometry]
) -> int:
    """Count the positions ``T`` at which the kernel is applied to one example.

    Args:
        spatial: Size of the input in pixels, ``x.shape[2:]``.
        kernel_size: Size of the kernel in pixels, per spatial dimension.
        **geometry: See :class:`PatchGeometry`; ``groups`` has no influence.

    Returns:
        Product of the spatial sizes of the convolution's output.

    Raises:
        ValueError: As :func:`patch_covariance`.
    """
    return layout_of("patch_count", tuple(spatial), kernel_size, **geometry).positions


def patch_mean(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    bias: bool = False,
    **geometry: Unpack[PatchGeometry],
) -> Tensor:
    """Average the patches of each example over the output positions.

    Formula: ``āₙ = (1/T) Σₜ aₙₜ``.

    Args:
        x: Input ``[N, C, *spatial]`` of the convolution, one to three spatial dimensions.
        kernel_size: Size of the kernel in pixels, per spatial dimension.
        bias: Append the constant 1.
        **geometry: See :class:`PatchGeometry`.

    Returns:
        ``[N, groups, d]``, ``d`` and dtype as in :func:`patch_covariance`.

    Raises:
        ValueError: As :func:`patch_covariance`.

    Cost: one direction is summed after the other, with about as many passes over ``x`` as the
    kernel has pixels in the first; no patches.

    Source: Eschenhagen et al. 2023, "Kronecker-Factored Approximate Curvature for Modern Neural
    Network Architectures", section 3.2 (the "reduce" setting).
    """
    windows = windows_of("patch_mean", x, kernel_size, **geometry)
    mean = windows.sum() / windows.layout.positions
    return F.pad(mean, (0, 1), value=1.0) if bias else mean


def patch_second_moment_diagonal(
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    bias: bool = False,
    **geometry: Unpack[PatchGeometry],
) -> Tensor:
    """Compute the diagonal of :func:`patch_covariance` without the matrix.

    Formula: ``Σₙ Σₜ aₙₜ²``, element by element.

    Args:
        x: Input ``[N, C, *spatial]`` of the convolution, one to three spatial dimensions.
        kernel_size: Size of the kernel in pixels, per spatial dimension.
        bias: Append the entry of the constant, ``N·T``.
        **geometry: See :class:`PatchGeometry`.

    Returns:
        ``[groups, d]``, ``d`` and dtype as in :func:`patch_covariance`.

    Raises:
        ValueError: As :func:`patch_covariance`.

    Cost: as :func:`patch_mean`, and one copy of ``x``.
    """
    windows = windows_of("patch_second_moment_diagonal", x, kernel_size, **geometry)
    diagonal = windows._replace(x=windows.x.square()).sum().sum(0)
    return F.pad(diagonal, (0, 1), value=float(windows.patches)) if bias else diagonal


def _dims(windows: Windows) -> tuple[range, range]:
    """Dimensions of the outputs and of the kernel in the view of all patches."""
    dims = len(windows.layout.kernel)
    return range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)


def _sum_of_products(windows: Windows) -> Tensor:
    groups, rows = windows.layout.groups, windows.rows
    total = windows.x.new_zeros(groups, rows, rows)
    output, kernel = _dims(windows)
    patches = max(1, _CHUNK_BYTES // (groups * rows * windows.x.element_size()))
    for part in _parts(windows.view(), (0, *output), patches):
        columns = part.permute(1, *kernel, 0, *output).reshape(groups, rows, -1)
        total.baddbmm_(columns, columns.mT)  # in place: autocast then leaves it in float32
    return total


def _parts(view: Tensor, dims: tuple[int, ...], patches: int) -> Iterator[Tensor]:
    """Split the view of all patches into pieces of at most ``patches``, along ``dims`` in turn."""
    first, *rest = dims
    inner = prod(view.shape[dim] for dim in rest)
    for part in torch.split(view, max(1, patches // inner), first):
        if inner > patches:
            yield from _parts(part, tuple(rest), patches)
        else:
            yield part
